"""How CUDA and Metal spell what the kernels' bodies need.

Bodies use: `thread_index` in its group, `group_index` and `group_row` of the group in the grid (x and y), the number
`group_count` of groups along x, SHARED arrays, BARRIER(), SHUFFLE(v, mask) with the lane whose number differs in the
mask's bits, RSQRT, SIGMOID, TANH, FLOAT(bits), and packs of N values: `load` reads one from anywhere in an input,
`store8` writes one of eight to an output, `widen` and `narrow` make floats of a pack and a pack of floats. FROM_E2M1
and FROM_E4M3 make floats of narrow ones.
"""

# An int64 step, as strides are; outputs are contiguous and begin at an aligned address.
_CUDA = r"""
#define SHARED __shared__
#define BARRIER() __syncthreads()
#define SHUFFLE(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define RSQRT(value) rsqrtf(value)
#define SIGMOID(value) __fdividef(1.0f, 1.0f + __expf(-(value)))
#define TANH(value) tanhf(value)
#define FLOAT(bits) __int_as_float(bits)

namespace zimage {

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <int N, typename T>
inline __device__ Pack<T, N> load(const T* from, int64_t step) {
  Pack<T, N> pack;
  if (step == 1 && reinterpret_cast<size_t>(from) % alignof(Pack<T, N>) == 0) {
    pack = *reinterpret_cast<const Pack<T, N>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      pack.values[i] = from[i * step];
    }
  }
  return pack;
}

template <typename T, int N>
inline __device__ void widen(const Pack<T, N>& pack, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = static_cast<float>(pack.values[i]);
  }
}

template <typename T>
inline __device__ Pack<T, 8> narrow(const float* from) {
  Pack<T, 8> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pack.values[i] = static_cast<T>(from[i]);
  }
  return pack;
}

template <typename T>
inline __device__ void store8(T* to, const Pack<T, 8>& pack) {
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
#define SIGMOID(value) (1.0f / (1.0f + metal::precise::exp(-(value))))
#define TANH(value) metal::precise::tanh(value)
#define FLOAT(bits) as_type<float>(bits)

namespace zimage {

template <typename T, int N>
struct Pack {
  T values[N];
};

template <int N, typename T>
inline Pack<T, N> load(const device T* from, int64_t step) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    pack.values[i] = from[i * step];
  }
  return pack;
}

template <typename T, int N>
inline void widen(const thread Pack<T, N>& pack, thread float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[i] = static_cast<float>(pack.values[i]);
  }
}

template <typename T>
inline Pack<T, 8> narrow(const thread float* from) {
  Pack<T, 8> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pack.values[i] = static_cast<T>(from[i]);
  }
  return pack;
}

template <typename T>
inline void store8(device T* to, const thread Pack<T, 8>& pack) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    to[i] = pack.values[i];
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

# Numbers of 4 and of 8 bits as floats: two and four bits of exponent, one and three of mantissa. Seven ones are NaN.
_NARROW = r"""
#define FROM_E2M1(code) \
  (((code) & 8 ? -0.5f : 0.5f) * ((code) & 6 ? (2 + ((code) & 1)) << (((code) >> 1 & 3) - 1) : (code) & 1))
#define FROM_E4M3(code) \
  (((code) & 128 ? -1.0f : 1.0f) * \
   (((code) & 127) == 127 ? FLOAT(0x7fc00000) \
    : (code) & 120 ? FLOAT((((code) & 127) << 20) + 0x3c000000) : ((code) & 7) * 0.001953125f))
"""

PRELUDES = {"cuda": _CUDA + _NARROW, "metal": _METAL + _NARROW}
# MLX gives a Metal kernel those positions only whose names it finds in the source.
STARTS = {
    "cuda": """
  const int thread_index = threadIdx.x;
  const int group_index = blockIdx.x;
  const int group_row = blockIdx.y;
  const int group_count = gridDim.x;
""",
    "metal": """
  const int thread_index = thread_position_in_threadgroup.x;
  const int group_index = threadgroup_position_in_grid.x;
  const int group_row = threadgroup_position_in_grid.y;
  const int group_count = threadgroups_per_grid.x;
""",
}
