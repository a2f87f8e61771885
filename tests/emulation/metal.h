// The names of Metal that the kernels use. Address spaces are left out: a CPU has one.
#include "threads.h"
using uint = unsigned;
using ushort = unsigned short;
#define device
#define constant
#define thread
#define threadgroup static
#define thread_position_in_threadgroup emulation::thread_
#define threadgroup_position_in_grid emulation::group
#define threadgroups_per_grid emulation::groups
namespace mem_flags {
constexpr int mem_threadgroup = 1;
}
inline void threadgroup_barrier(int) { emulation::barrier(); }
inline float simd_shuffle_xor(float value, ushort lanes) { return emulation::shuffle_xor(value, lanes); }
template <typename To>
inline To as_type(int bits) {
  To value;
  std::memcpy(&value, &bits, 4);
  return value;
}
namespace metal {
namespace precise {
inline float rsqrt(float value) { return 1 / std::sqrt(value); }
inline float exp(float value) { return std::exp(value); }
inline float tanh(float value) { return std::tanh(value); }
}  // namespace precise
}  // namespace metal
using bfloat16_t = BFloat;
using float16_t = Half;
