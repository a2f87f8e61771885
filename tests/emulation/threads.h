// Runs the threads of a GPU's thread groups on a CPU, as fibers that take turns: one group after the other, in it
// one warp after the other until it waits. Where fibers wait and no other can come, the kernel diverged: exit status 3.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

using std::size_t;

struct Bits16 {
  uint16_t bits;
};

// bfloat16, rounded to nearest, ties to even.
struct BFloat : Bits16 {
  BFloat() = default;
  BFloat(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = std::isnan(value) ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

using Half = _Float16;

namespace emulation {

struct Index {
  unsigned x, y, z;
};

inline Index thread_, group, groups;
inline ucontext_t scheduler;
inline int current = 0;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int waiting = 0;
  std::function<bool()> until;
  uint64_t slots[2] = {0, 0};  // what it shows its warp: one may be written while others still read the one before
  int slot = 0;
};

// What fibers wait for: all others; their warp; that `until` holds; that nobody else can go on, and then a whole warp
// does, or those of its fibers that wait so.
enum { RUNNING, EVERYBODY, WARP, UNTIL, LATE_WARP, LATE };

inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline size_t shared_bytes = 0;  // of memory that a group shares, beside what the body declares
inline void (*before_group)(int threads) = [](int) {};
inline void (*after_group)() = [] {};

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(7);
}

inline void wait(int what) {
  fibers[current].waiting = what;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void barrier() {
  wait(EVERYBODY);
}

template <typename F>
inline void wait_until(F holds) {
  fibers[current].until = holds;
  wait(UNTIL);
}

// Show the warp a value, and wait until all of it have: then `shown` gives each one's, until the next time.
template <typename T>
inline void show(T value) {
  static_assert(sizeof(T) <= 8);
  Fiber& fiber = fibers[current];
  fiber.slot ^= 1;
  std::memcpy(&fiber.slots[fiber.slot], &value, sizeof(T));
  wait(WARP);
}

template <typename T>
inline T shown(int of) {
  T value;
  std::memcpy(&value, &fibers[of].slots[fibers[current].slot], sizeof(T));
  return value;
}

inline float shuffle_xor(float value, int mask) {
  show(value);
  return shown<float>(current ^ mask);
}

inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline bool release(size_t from, size_t to, int what) {
  for (size_t i = from; i < to; ++i) {
    if (fibers[i].waiting != what || fibers[i].done) {
      return false;
    }
  }
  for (size_t i = from; i < to; ++i) {
    fibers[i].waiting = RUNNING;
  }
  return true;
}

// A number below `end` that no pattern chooses, the same ones in each run.
inline int chance(int end) {
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return int((state >> 16) % uint32_t(end));
}

// Where all wait: let a warp or a fiber go on that the others were to get ahead of.
inline bool release_late(int threads) {
  const int start = chance(threads);
  for (int i = 0; i < threads; ++i) {
    const int one = (start + i) % threads, first = one / 32 * 32;
    if (release(first, first + 32 < threads ? first + 32 : threads, LATE_WARP)) {
      return true;
    }
    if (!fibers[one].done && fibers[one].waiting == LATE) {
      fibers[one].waiting = RUNNING;
      return true;
    }
  }
  return false;
}

inline void run_group(int threads) {
  before_group(threads);
  fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 16);
    fiber.done = false;
    fiber.waiting = RUNNING;
    fiber.slot = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  for (;;) {
    bool moved = false, left = false;
    const int warps = (threads + 31) / 32, start = chance(warps);
    for (int warp = 0; warp < warps; ++warp) {  // one as far as it comes: others read what it wrote since
      const int first = (start + warp) % warps * 32;
      const int end = first + 32 < threads ? first + 32 : threads;
      do {
        for (current = first; current < end; ++current) {
          Fiber& fiber = fibers[current];
          if (!fiber.done && fiber.waiting == UNTIL && fiber.until()) {
            fiber.waiting = RUNNING;
          }
          if (!fiber.done && fiber.waiting == RUNNING) {
            thread_ = {unsigned(current), 0, 0};
            swapcontext(&scheduler, &fiber.context);
            moved = true;
          }
        }
      } while (release(first, end, WARP));  // all 32 must take part, as the mask says
      for (int i = first; i < end; ++i) {
        left = left || !fibers[i].done;
      }
    }
    if (!left) {
      after_group();
      return;
    }
    moved = release(0, threads, EVERYBODY) || moved;
    if (!moved && !release_late(threads)) {
      std::fprintf(stderr, "threads wait for others that will not come\n");
      std::exit(3);
    }
  }
}

// Memory that ends right before a page nobody may touch; what comes before its start is marked and checked.
struct Buffer {
  char* data;
  size_t bytes;
  explicit Buffer(size_t size) : bytes(size) {
    const size_t page = 4096, room = (size + 64 + page - 1) / page * page;
    char* start = static_cast<char*>(
        mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(start + room, page, PROT_NONE);
    data = start + room - (size + 15) / 16 * 16;
    std::memset(start, 0xff, room);  // NaN in every type, and the mark
  }
  bool intact() const {
    for (int i = 1; i <= 16; ++i) {
      if (static_cast<unsigned char>(data[-i]) != 0xff) {
        return false;
      }
    }
    for (size_t i = bytes; i < (bytes + 15) / 16 * 16; ++i) {
      if (static_cast<unsigned char>(data[i]) != 0xff) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace emulation
