// Runs the threads of a GPU's thread groups on a CPU, as fibers that take turns: one group after the other, in it
// one warp after the other until it waits at a barrier. Where fibers wait and no other can come, the kernel diverged: exit status 3.
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
  int waiting = 0;  // 0: running, 1: at a barrier, 2: at a shuffle
  float slot = 0;
};

inline std::vector<Fiber> fibers;
inline std::function<void()> body;

inline void wait(int what) {
  fibers[current].waiting = what;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void barrier() {
  wait(1);
}

inline float shuffle_xor(float value, int mask) {
  fibers[current].slot = value;
  wait(2);
  const float other = fibers[current ^ mask].slot;
  wait(2);  // until all have read
  return other;
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
    fibers[i].waiting = 0;
  }
  return true;
}

inline void run_group(int threads) {
  fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 16);
    fiber.done = false;
    fiber.waiting = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  for (;;) {
    bool moved = false, left = false;
    for (int first = 0; first < threads; first += 32) {  // one warp as far as it comes: others read what it wrote since
      const int end = first + 32 < threads ? first + 32 : threads;
      do {
        for (current = first; current < end; ++current) {
          if (!fibers[current].done && !fibers[current].waiting) {
            thread_ = {unsigned(current), 0, 0};
            swapcontext(&scheduler, &fibers[current].context);
            moved = true;
          }
        }
      } while (release(first, end, 2));  // all 32 must take part, as the mask says
      for (int i = first; i < end; ++i) {
        left = left || !fibers[i].done;
      }
    }
    if (!left) {
      return;
    }
    moved = release(0, threads, 1) || moved;
    if (!moved) {
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
