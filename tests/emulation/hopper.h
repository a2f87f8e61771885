// What zimage/kernels/flash.py has in PTX, for fibers. Copies and products take effect as late as they may: when they
// are awaited and nobody else can go on. Until then the memory that is copied to, and the sums that are added to, hold
// NaN, and nothing that a product reads may change. Exit status 7 where a kernel does what a processor does not allow.
#pragma once
#include <algorithm>
#include <cfloat>
#include "threads.h"

#define POOL(name) uint8_t* const name = emulation::pool.data()

namespace emulation {

constexpr uint32_t POOL_AT = 0x410;  // in shared memory, aligned no more than it must be
constexpr uint32_t IN_FLIGHT = 0x7fc0dead;  // a NaN that nothing computes
constexpr int MOST = 256;  // columns of a product

struct Copy {
  uint32_t to;
  uint8_t bytes[16];
  bool plain;  // a thread's own writing
  int set;
};

struct Product {
  bool in_registers;  // the left factor
  uint64_t left, right;
  const uint32_t* weights;
  uint32_t weights_then[4];
  bool add;
  float* to;
  int count;
  int set;
  std::vector<uint16_t> left_then, right_then;  // the factors as they were; a warp's first thread has them
};

struct Sums {
  float* to;
  std::vector<float> values;
};

struct Own {  // of one thread
  bool begun = false;
  int copy_sets = 0, product_sets = 0;
  std::vector<Copy> copies;
  std::vector<Product> products;
  std::vector<Sums> sums;  // what products in flight add to
};

struct Meeting {
  int here = 0, expected = 0;
  unsigned generation = 0;
};

struct Gate {
  uint16_t arrivals, missing;
  uint32_t phase;
};

inline std::vector<uint8_t> pool;
inline std::vector<Own> owns;
inline Meeting meetings[16];

inline uint8_t* shared(uint32_t at, uint32_t bytes) {
  if (at % bytes || at < POOL_AT || at + bytes > POOL_AT + pool.size()) {
    fail("an address is not aligned or not in shared memory");
  }
  return pool.data() + (at - POOL_AT);
}

inline Gate gate_at(uint32_t at) {
  Gate gate;
  std::memcpy(&gate, shared(at, 8), 8);
  if (gate.arrivals == 0xffff) {
    fail("a gate is used before it is made");
  }
  return gate;
}

inline void start_copy(uint32_t to, const void* from, bool there, bool plain) {
  Copy copy = {to, {}, plain, owns[current].copy_sets};
  if (there && !plain && reinterpret_cast<size_t>(from) % 16) {
    fail("16 bytes are copied from an address that is not aligned");
  }
  if (there) {
    std::memcpy(copy.bytes, from, 16);
  }
  std::memset(shared(to, 16), 0xff, 16);
  owns[current].copies.push_back(copy);
}

// Where a factor lies, by the descriptor that the processor gets: swizzled rows of 128 bytes.
struct Described {
  uint32_t start, leading, stride;
  explicit Described(uint64_t d) : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4),
                                   stride((d >> 32 & 0x3fff) << 4) {
    if (d >> 62 != 1 || (d >> 49 & 7)) {
      fail("a descriptor does not say that rows have 128 bytes");
    }
  }
  void read(uint32_t at, uint16_t* to) const {  // eight items
    std::memcpy(to, shared(at ^ (((at >> 7) & 7) << 4), 16), 16);
  }
};

// Rows from `first` of 16 items each, which lie one after the other.
inline std::vector<uint16_t> rows_of_16(uint64_t descriptor, int first, int rows) {
  const Described at(descriptor);
  std::vector<uint16_t> found(rows * 16);
  for (int row = first; row < first + rows; ++row) {
    for (int k = 0; k < 16; k += 8) {
      at.read(at.start + row / 8 * at.stride + row % 8 * 128 + 2 * k, &found[(row - first) * 16 + k]);
    }
  }
  return found;
}

// 16 rows of `count` items, each 64 columns of which lie apart.
inline std::vector<uint16_t> sixteen_rows(uint64_t descriptor, int count) {
  const Described at(descriptor);
  std::vector<uint16_t> found(16 * count);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < count; n += 8) {
      at.read(at.start + n / 64 * at.leading + k / 8 * at.stride + k % 8 * 128 + n % 64 * 2, &found[k * count + n]);
    }
  }
  return found;
}

inline std::vector<uint16_t> left_of(const Product& product) {
  return product.in_registers ? std::vector<uint16_t>() : rows_of_16(product.left, current / 32 % 4 * 16, 16);
}

inline std::vector<uint16_t> right_of(const Product& product) {
  return product.in_registers ? sixteen_rows(product.right, product.count)
                              : rows_of_16(product.right, 0, product.count);
}

inline void start_product(Product product) {
  Own& own = owns[current];
  if (!own.begun) {
    fail("a product is started without begin_products");
  }
  product.set = own.product_sets;
  if (product.in_registers) {
    std::memcpy(product.weights_then, product.weights, 16);
  }
  if (current % 32 == 0) {
    product.left_then = left_of(product);
    product.right_then = right_of(product);
  }
  const auto same = [&](const Sums& sums) { return sums.to == product.to; };
  if (std::none_of(own.sums.begin(), own.sums.end(), same)) {
    own.sums.push_back({product.to, {product.to, product.to + product.count / 2}});
    for (int i = 0; i < product.count / 2; ++i) {
      std::memcpy(product.to + i, &IN_FLIGHT, 4);
    }
  }
  own.products.push_back(product);
}

inline float widened(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

__attribute__((optimize("O3"), no_sanitize("undefined"))) inline void multiply(
    const float (*left)[16], const float (*right)[MOST], int count, float (*to)[MOST]) {
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < count; ++n) {
      to[row][n] = 0;
    }
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < count; ++n) {
        to[row][n] += left[row][k] * right[k][n];
      }
    }
  }
}

// One product of the warp whose first thread is the current one, number `which` of those in flight.
inline void multiply_warp(int which) {
  static float left[16][16], right[16][MOST], found[16][MOST];
  const Product& product = owns[current].products[which];
  if (left_of(product) != product.left_then || right_of(product) != product.right_then) {
    fail("what is multiplied changed before the product was through");
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < product.count; ++n) {
      right[k][n] = widened(product.right_then[product.in_registers ? k * product.count + n : n * 16 + k]);
    }
  }
  for (int i = 0; i < 256 && !product.in_registers; ++i) {
    left[i / 16][i % 16] = widened(product.left_then[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& its = owns[current + lane].products[which];
    if (its.left != product.left || its.right != product.right || its.add != product.add || its.set != product.set ||
        its.count != product.count || its.in_registers != product.in_registers) {
      fail("threads of a warp start different products");
    }
    if (its.in_registers && std::memcmp(its.weights, its.weights_then, 16)) {
      fail("weights changed before their product was through");
    }
    for (int i = 0; i < 8 && its.in_registers; ++i) {  // pairs: first of a row, then eight rows and eight columns on
      const int word = i / 2, row = lane / 4 + word % 2 * 8, k = lane % 4 * 2 + word / 2 * 8 + i % 2;
      left[row][k] = widened(its.weights_then[word] >> i % 2 * 16 & 0xffff);
    }
  }
  multiply(left, right, product.count, found);
  for (int lane = 0; lane < 32; ++lane) {
    Own& own = owns[current + lane];
    for (Sums& sums : own.sums) {
      for (int i = 0; i < product.count / 2 && sums.to == own.products[which].to; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sums.values[i] = (product.add ? sums.values[i] : 0) + found[row][column];
      }
    }
  }
}

// What a warp started in all but the last `left` sets; its first thread does it for all.
inline void finish_products(int left) {
  const Own& first = owns[current];
  size_t through = 0;
  while (through < first.products.size() && first.products[through].set < first.product_sets - left) {
    ++through;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Own& own = owns[current + lane];
    if (own.products.size() != first.products.size() || own.product_sets != first.product_sets) {
      fail("threads of a warp start different products");
    }
  }
  for (size_t i = 0; i < through; ++i) {
    multiply_warp(i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Own& own = owns[current + lane];
    own.begun = false;
    own.products.erase(own.products.begin(), own.products.begin() + through);
    std::vector<Sums> still;
    for (const Sums& sums : own.sums) {
      const auto same = [&](const Product& product) { return product.to == sums.to; };
      if (std::any_of(own.products.begin(), own.products.end(), same)) {
        still.push_back(sums);
        continue;
      }
      for (size_t i = 0; i < sums.values.size(); ++i) {
        if (std::memcmp(sums.to + i, &IN_FLIGHT, 4)) {
          fail("sums were written to before their product was through");
        }
        sums.to[i] = sums.values[i];
      }
    }
    own.sums = still;
  }
}

inline void come(int number, int threads) {
  if (number < 1 || number > 15 || threads % 32) {
    fail("there is no such barrier");
  }
  Meeting& meeting = meetings[number];
  if (meeting.here && meeting.expected != threads) {
    fail("threads at a barrier expect different numbers of them");
  }
  meeting.expected = threads;
  if (++meeting.here == threads) {
    meeting.here = 0;
    ++meeting.generation;
  }
}

inline const bool hopper_is_here = [] {
  before_group = [](int threads) {
    pool.assign(shared_bytes, 0xff);
    owns.assign(shared_bytes ? threads : 0, {});
    std::fill(meetings, meetings + 16, Meeting());
  };
  after_group = [] {
    for (const Own& own : owns) {
      if (!own.copies.empty() || !own.products.empty()) {
        fail("the kernel ended before its copies or products");
      }
    }
  };
  return true;
}();

}  // namespace emulation

namespace hopper {

inline uint32_t address(const void* shared) {
  return emulation::POOL_AT + uint32_t(static_cast<const uint8_t*>(shared) - emulation::pool.data());
}

template <int N>
inline void multiply_keys(float (&s)[N], uint64_t queries, uint64_t keys, bool add) {
  emulation::start_product({false, queries, keys, nullptr, {}, add, s, 2 * N, 0, {}, {}});
}

template <int N>
inline void multiply_values(float (&o)[N], const uint32_t* weights, uint64_t values) {
  emulation::start_product({true, 0, values, weights, {}, true, o, 2 * N, 0, {}, {}});
}

inline void begin_products() { emulation::owns[emulation::current].begun = true; }
inline void end_products() { ++emulation::owns[emulation::current].product_sets; }

template <int LEFT, int N>
inline void await_products(float (&of)[N]) {
  emulation::wait(emulation::LATE_WARP);
  if (emulation::current % 32 == 0) {
    emulation::finish_products(LEFT);
  }
  for (const emulation::Sums& sums : emulation::owns[emulation::current].sums) {
    if (sums.to == of) {
      emulation::fail("sums are used before their product was awaited");
    }
  }
}

inline void copy16(uint32_t to, const void* from, bool there) { emulation::start_copy(to, from, there, false); }
inline void write16(uint32_t to, const uint32_t (&words)[4]) { emulation::start_copy(to, words, true, true); }
inline void end_copies() { ++emulation::owns[emulation::current].copy_sets; }

template <int LEFT>
inline void await_copies() {
  emulation::wait(emulation::LATE);
  emulation::Own& own = emulation::owns[emulation::current];
  std::vector<emulation::Copy> still;
  for (const emulation::Copy& copy : own.copies) {
    if (copy.plain || copy.set < own.copy_sets - LEFT) {
      std::memcpy(emulation::shared(copy.to, 16), copy.bytes, 16);
    } else {
      still.push_back(copy);
    }
  }
  own.copies = still;
}

inline void make_gate(uint32_t gate, int arrivals) {
  const emulation::Gate made = {uint16_t(arrivals), uint16_t(arrivals), 0};
  std::memcpy(emulation::shared(gate, 8), &made, 8);
}

inline void arrive(uint32_t gate) {
  emulation::Gate now = emulation::gate_at(gate);
  if (--now.missing == 0) {
    now.missing = now.arrivals;
    ++now.phase;
  }
  std::memcpy(emulation::shared(gate, 8), &now, 8);
}

inline void await(uint32_t gate, uint32_t parity) {
  emulation::wait_until([=] { return (emulation::gate_at(gate).phase & 1) != parity; });
}

inline void meet(int number, int threads) {
  const unsigned generation = emulation::meetings[number & 15].generation;
  emulation::come(number, threads);
  emulation::wait_until([=] { return emulation::meetings[number].generation != generation; });
}

inline void come_by(int number, int threads) { emulation::come(number, threads); }

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0 : y;
}

inline uint32_t pack(float first, float second) { return BFloat(first).bits | uint32_t(BFloat(second).bits) << 16; }

}  // namespace hopper
