"""How CUDA and Metal spell what the kernels' bodies need.

Bodies use: `thread_index` in its group, `group_index` and `group_row` of the group in the grid (x and y), SHARED
arrays, BARRIER(), SHUFFLE(v, mask) with the lane whose number differs in the mask's bits, RSQRT, EXP, load8, store8.
"""

# An int64 step, as strides are; outputs are contiguous and begin at an aligned address.
_CUDA = r"""
#define SHARED __shared__
#define BARRIER() __syncthreads()
#define SHUFFLE(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define RSQRT(value) rsqrtf(value)
#define EXP(value) expf(value)

namespace zimage {

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <typename T>
inline __device__ void load8(const T* from, int64_t step, float* to) {
  if (step == 1 && reinterpret_cast<size_t>(from) % 16 == 0) {
    const Pack<T, 8> pack = *reinterpret_cast<const Pack<T, 8>*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = static_cast<float>(pack.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = static_cast<float>(from[i * step]);
    }
  }
}

template <typename T>
inline __device__ void store8(T* to, const float* from) {
  Pack<T, 8> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pack.values[i] = static_cast<T>(from[i]);
  }
  *reinterpret_cast<Pack<T, 8>*>(to) = pack;
}

template <int N>
inline __device__ void load_words(const uint32_t* from, uint32_t* to) {
  const Pack<uint32_t, N> pack = *reinterpret_cast<const Pack<uint32_t, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = pack.values[i];
  }
}

} // namespace zimage
"""

_METAL = r"""
#define SHARED threadgroup
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SHUFFLE(value, mask) simd_shuffle_xor(value, ushort(mask))
#define RSQRT(value) metal::precise::rsqrt(value)
#define EXP(value) metal::precise::exp(value)

namespace zimage {

template <typename T>
inline void load8(const device T* from, int64_t step, thread float* to) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    to[i] = static_cast<float>(from[i * step]);
  }
}

template <typename T>
inline void store8(device T* to, const thread float* from) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

template <int N>
inline void load_words(const device uint32_t* from, thread uint32_t* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = from[i];
  }
}

} // namespace zimage
"""

PRELUDES = {"cuda": _CUDA, "metal": _METAL}
# MLX gives a Metal kernel those positions only whose names it finds in the source.
STARTS = {
    "cuda": """
  const int thread_index = threadIdx.x;
  const int group_index = blockIdx.x;
  const int group_row = blockIdx.y;
""",
    "metal": """
  const int thread_index = thread_position_in_threadgroup.x;
  const int group_index = threadgroup_position_in_grid.x;
  const int group_row = threadgroup_position_in_grid.y;
""",
}
