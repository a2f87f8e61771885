// The names of CUDA that the kernels use.
#include "threads.h"
#define __device__
#define __shared__ static
#define threadIdx emulation::thread_
#define blockIdx emulation::group
#define gridDim emulation::groups
#define __syncthreads() emulation::barrier()
inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  if (mask != 0xffffffffu) std::exit(4);
  return emulation::shuffle_xor(value, lanes);
}
inline int __shfl_sync(unsigned mask, int value, int lane) {
  if (mask != 0xffffffffu) std::exit(4);
  emulation::show(value);
  return emulation::shown<int>(emulation::current / 32 * 32 + lane);
}
inline int __any_sync(unsigned mask, int value) {
  if (mask != 0xffffffffu) std::exit(4);
  emulation::show(value);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) {
    any = any || emulation::shown<int>(emulation::current / 32 * 32 + lane);
  }
  return any;
}
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
using __nv_bfloat16 = BFloat;
using __half = Half;
