"""Attention without a mask on NVIDIA's Hopper processors: softmax(q k^T scale) v in one pass over the keys.

The method is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135), and of FlashAttention-3 (Shah et al. 2024,
arXiv 2407.08608) the products that run beside the softmax. Other devices have no such kernel here and take MLX's own.
"""

from collections.abc import Iterator

from zimage import kernels, trust
from zimage.kernels.native import Arguments, Kernel, Launch, float_bits, normal

import mlx.core as mx

HEAD_DIM = 128
_QUERIES, _KEYS, _SLOTS = 64, 96, 3  # rows of a group's tile and of a tile of keys, and how many of those are held
_GROUPS = 3  # of 128 threads, which the processor multiplies for as one
_THREADS = 128 * _GROUPS
_ROW = 2 * HEAD_DIM  # bytes
_SHARED = _GROUPS * _QUERIES * _ROW + 2 * _SLOTS * _KEYS * _ROW + 2 * _SLOTS * 8 + 1024  # with room to align
_LOG2E = 1.4426950408889634


def _numbers(first: int, count: int) -> str:
    return ", ".join(f"%{first + i}" for i in range(count))


def _added_to(name: str, count: int) -> str:
    return ", ".join(f'"+f"({name}[{i}])' for i in range(count))


# What the body needs of the processor, in PTX (NVIDIA's PTX ISA 9.0, the sections wgmma, mbarrier, cp.async and bar).
# MLX writes the function's head; how many registers a thread may have can only come in by its first word. Where there
# is no such processor, tests have other functions of the same names in its place.
PTX = rf"""
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({_THREADS}, 1)
#define POOL(name) extern __shared__ uint8_t name[]

namespace hopper {{

inline __device__ uint32_t address(const void* shared) {{
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}}

// Scores (+)= 64 queries x 16 of their values, times as many of the keys; both from shared memory.
inline __device__ void multiply_keys(float (&s)[{_KEYS // 2}], uint64_t queries, uint64_t keys, bool add) {{
  asm volatile(
      "{{.reg .pred p; setp.ne.b32 p, %{_KEYS // 2 + 2}, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n{_KEYS}k16.f32.bf16.bf16 "
      "{{{_numbers(0, _KEYS // 2)}}}, "
      "%{_KEYS // 2}, %{_KEYS // 2 + 1}, p, 1, 1, 0, 0;}}\n"
      : {_added_to("s", _KEYS // 2)}
      : "l"(queries), "l"(keys), "r"(int(add)));
}}

// Values += 64 rows of 16 weights, from the threads' registers, times 16 rows of values in shared memory.
inline __device__ void multiply_values(float (&o)[{HEAD_DIM // 2}], const uint32_t* weights, uint64_t values) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{HEAD_DIM}k16.f32.bf16.bf16 "
      "{{{_numbers(0, HEAD_DIM // 2)}}}, "
      "{{%{HEAD_DIM // 2}, %{HEAD_DIM // 2 + 1}, %{HEAD_DIM // 2 + 2}, %{HEAD_DIM // 2 + 3}}}, "
      "%{HEAD_DIM // 2 + 4}, 1, 1, 1, 1;\n"
      : {_added_to("o", HEAD_DIM // 2)}
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}}

inline __device__ void begin_products() {{ asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }}
inline __device__ void end_products() {{ asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }}

template <int LEFT, int N>
inline __device__ void await_products(float (&of)[N]) {{
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) {{
    asm volatile("" : "+f"(of[i])::"memory");
  }}
}}

// 16 bytes to shared memory, zeros where there is nothing.
inline __device__ void copy16(uint32_t to, const void* from, bool there) {{
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}}

inline __device__ void write16(uint32_t to, const uint32_t (&words)[4]) {{
  asm volatile("st.shared.v4.b32 [%0], {{%1, %2, %3, %4}};\n" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3]) : "memory");
}}

inline __device__ void end_copies() {{ asm volatile("cp.async.commit_group;\n" ::: "memory"); }}

// All but the last LEFT sets of copies are done, and what this thread wrote may be multiplied.
template <int LEFT>
inline __device__ void await_copies() {{
  asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;\n" ::"n"(LEFT) : "memory");
}}

inline __device__ void make_gate(uint32_t gate, int arrivals) {{
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(gate), "r"(arrivals) : "memory");
}}

inline __device__ void arrive(uint32_t gate) {{
  asm volatile("{{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}}\n" ::"r"(gate) : "memory");
}}

inline __device__ void await(uint32_t gate, uint32_t parity) {{
  asm volatile(
      "{{.reg .pred p;\nagain%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again%=;\n}}\n"
      ::"r"(gate), "r"(parity) : "memory");
}}

// Barriers by number, for some of the threads: those that wait, and those that only come by.
inline __device__ void meet(int number, int threads) {{
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}}

inline __device__ void come_by(int number, int threads) {{
  asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}}

inline __device__ float exp2(float x) {{
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}}

inline __device__ uint32_t pack(float first, float second) {{
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(second), "f"(first));
  return both;
}}

}} // namespace hopper
"""

# How tiles come to shared memory.
_COPYING = r"""
namespace hopper {

// Whether the 16 bytes that a thread brings lie together, at an address that they can be copied from.
template <typename T, typename S>
inline __device__ bool whole(const T* from, const S& strides) {
  return strides[3] == 1 && ((reinterpret_cast<size_t>(from) | strides[1] * sizeof(T)) & 15) == 0;
}

// One thread's share of ROWS rows: 16 bytes of each eighth one, as far as `there` goes, and zeros beyond.
template <int ROWS, typename T, typename S>
inline __device__ void bring(const T* from, const S& strides, int there, bool together, uint32_t to) {
  const int64_t step = 8 * strides[1];
  if (together && there >= ROWS) {
#pragma unroll
    for (int i = 0; i < ROWS; i += 8) {
      copy16(to + i * 128, from, true);
      from += step;
    }
    return;
  }
  const T* next = from;
#pragma unroll 1
  for (int i = 0; i < ROWS; i += 8) {
    const bool is = i < there;
    if (together) {
      copy16(to + i * 128, is ? next : from, is);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
      for (int n = 0; is && n < 4; ++n) {
        words[n] = pack(next[2 * n * strides[3]], next[(2 * n + 1) * strides[3]]);
      }
      write16(to + i * 128, words);
    }
    next += step;
  }
}

} // namespace hopper
"""

# A thread group takes 192 queries of one head: three groups of 128 threads, which take turns at the tensor cores and do
# the softmax of their scores while the other two multiply. The third also brings keys and values, two tiles ahead, once
# all three have left a slot. Rows of shared memory are 128 bytes whose 16-byte parts are exchanged by the row's number,
# as the products want them. The largest score of a row is only followed where it grew by a factor of 2^8: the weights
# are divided by their sum in the end, and until then may be that much larger than one.
_BODY = r"""
  constexpr uint32_t TILE = KEYS * D * 2;
  constexpr uint32_t HALF = TILE / 2;
  constexpr int SCORES = KEYS / 2;
  constexpr int ALL = 128 * GROUPS;
  POOL(pool);
  const uint32_t queries_at = (hopper::address(pool) + 1023) & ~1023u;
  const uint32_t keys_at = queries_at + GROUPS * QUERIES * D * 2;
  const uint32_t values_at = keys_at + SLOTS * TILE;
  const uint32_t full = values_at + SLOTS * TILE;  // gates: a slot's keys are there, and the values of the tile before
  const uint32_t left = full + SLOTS * 8;  // gates: all groups are through with them

  const int team = __shfl_sync(0xffffffffu, thread_index / 128, 0);
  const int own = thread_index % 128;
  const int lane = thread_index % 32;
  const int length = q_shape[1];
  const int heads = q_shape[2];
  const int count = k_shape[1];
  const int tiles = (count + KEYS - 1) / KEYS;
  const int item = group_row / heads;
  const int head = group_row % heads;
  const int shared_head = head / (heads / k_shape[2]);
  const int first = (group_index * GROUPS + team) * QUERIES;
  const auto queries = q + item * q_strides[0] + head * q_strides[2];
  const auto keys = k + item * k_strides[0] + shared_head * k_strides[2];
  const auto values = v + item * v_strides[0] + shared_head * v_strides[2];

  if (thread_index == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      hopper::make_gate(full + 8 * i, 128);
      hopper::make_gate(left + 8 * i, ALL / 32);
    }
  }
  BARRIER();

  // Sixteen neighbouring threads bring a row, 16 bytes each, and 128 threads eight rows at once.
  const int row = own / 16;
  const int part = own % 16;
  const uint32_t place = row * 128 + ((part % 8 ^ row) << 4);
  const bool whole_keys = hopper::whole(keys, k_strides);
  const bool whole_values = hopper::whole(values, v_strides);
  auto bring_keys = [&](int tile) {
    if (tile < tiles) {
      const uint32_t to = keys_at + tile % SLOTS * TILE + part / 8 * HALF + place;
      const auto from = keys + (tile * KEYS + row) * k_strides[1] + part * 8 * k_strides[3];
      hopper::bring<KEYS>(from, k_strides, count - tile * KEYS - row, whole_keys, to);
    }
  };
  auto bring_values = [&](int tile) {
    if (tile < tiles) {
      const uint32_t to = values_at + tile % SLOTS * TILE + part / 8 * HALF + place;
      const auto from = values + (tile * KEYS + row) * v_strides[1] + part * 8 * v_strides[3];
      hopper::bring<KEYS>(from, v_strides, count - tile * KEYS - row, whole_values, to);
    }
  };
  hopper::bring<QUERIES>(
      queries + (first + row) * q_strides[1] + part * 8 * q_strides[3], q_strides, length - first - row,
      hopper::whole(queries, q_strides), queries_at + team * QUERIES * D * 2 + part / 8 * QUERIES * 128 + place);
  if (team == GROUPS - 1) {
    bring_keys(0);
    hopper::end_copies();
    bring_keys(1);
    bring_values(0);
    hopper::end_copies();
    bring_keys(2);
    bring_values(1);
    hopper::end_copies();
    hopper::await_copies<2>();
    hopper::arrive(full);
    hopper::await_copies<1>();
    hopper::arrive(full + 8);
    hopper::come_by(1, 256);  // the first team's turn
  } else {
    hopper::end_copies();
    hopper::await_copies<0>();
  }
  hopper::meet(1 + GROUPS + team, 128);

  float s[SCORES];  // of two rows a thread, side by side in pairs: 0 0 1 1 0 0 1 1 ...
  float o[D / 2];
  uint32_t weights[KEYS / 4];
  float largest[2] = {-FLOAT(0x7f800000), -FLOAT(0x7f800000)};
  float sums[2] = {0, 0};
  float factors[2] = {1, 1};
  bool grown = false;
  const float scale = FLOAT(SCALE_LOG2);
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    o[i] = 0;
  }

  // How the products find rows of 128 bytes in shared memory: where they begin, and the bytes to the next 64 columns
  // and to the next eight rows, all in units of 16 bytes.
  auto described = [](uint32_t at, uint32_t columns) {
    return uint64_t((at & 0x3ffff) >> 4) | uint64_t(columns >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  };
  const uint64_t all_queries = described(queries_at + team * QUERIES * D * 2, 16);
  const uint64_t all_keys = described(keys_at, 16);
  const uint64_t all_values = described(values_at, HALF);
  auto start_scores = [&](int slot) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const uint64_t in_queries = all_queries + i / 4 * (QUERIES * 128 >> 4) + i % 4 * 2;
      hopper::multiply_keys(s, in_queries, all_keys + slot * (TILE >> 4) + i / 4 * (HALF >> 4) + i % 4 * 2, i > 0);
    }
    hopper::end_products();
  };
  auto start_values = [&](int slot) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
      hopper::multiply_values(o, weights + 4 * i, all_values + slot * (TILE >> 4) + i * (16 * 128 >> 4));
    }
    hopper::end_products();
  };
  auto soften = [&](int tile) {
    if ((tile + 1) * KEYS > count) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {
        if (tile * KEYS + i / 4 * 8 + lane % 4 * 2 + i % 2 >= count) {
          s[i] = -FLOAT(0x7f800000);
        }
      }
    }
    float now[2] = {fmaxf(s[0], s[1]), fmaxf(s[2], s[3])};
#pragma unroll
    for (int i = 4; i < SCORES; i += 4) {
      now[0] = fmaxf(now[0], fmaxf(s[i], s[i + 1]));
      now[1] = fmaxf(now[1], fmaxf(s[i + 2], s[i + 3]));
    }
    grown = __any_sync(0xffffffffu, fmaxf(now[0] - largest[0], now[1] - largest[1]) * scale > 8.0f);
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        now[r] = fmaxf(now[r], SHUFFLE(now[r], 1));
        now[r] = fmaxf(fmaxf(now[r], SHUFFLE(now[r], 2)), largest[r]);
        factors[r] = hopper::exp2((largest[r] - now[r]) * scale);
        largest[r] = now[r];
        sums[r] *= factors[r];
      }
    }
    const float low[2] = {largest[0] * scale, largest[1] * scale};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) {
      s[i] = hopper::exp2(fmaf(s[i], scale, -low[i / 2 % 2]));
      sums[i / 2 % 2] += s[i];
    }
  };
  int slot = 0;
  int before = SLOTS - 1;
  uint32_t parity = 0;
  auto go_on = [&](int tile) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) {
      weights[i] = hopper::pack(s[2 * i], s[2 * i + 1]);
    }
    if (team == GROUPS - 1) {
      hopper::await(left + 8 * slot, parity);
      bring_keys(tile + 3);
      bring_values(tile + 2);
      hopper::end_copies();
      hopper::await_copies<1>();
      hopper::arrive(full + 8 * before);  // the slot of the tile after the next
    }
    before = slot;
    slot = slot + 1 == SLOTS ? 0 : slot + 1;
    parity ^= slot == 0;
  };

  hopper::meet(1 + team, 256);
  hopper::await(full, 0);
  hopper::begin_products();
  start_scores(0);
  hopper::come_by(1 + (team + 1) % GROUPS, 256);
  hopper::await_products<0>(s);
  soften(0);
  if (lane == 0) {
    hopper::arrive(left);
  }
  go_on(0);
  for (int tile = 1; tile < tiles; ++tile) {
    hopper::meet(1 + team, 256);
    hopper::await(full + 8 * slot, parity);
    hopper::begin_products();
    start_scores(slot);
    start_values(before);
    hopper::come_by(1 + (team + 1) % GROUPS, 256);
    hopper::await_products<1>(s);
    soften(tile);
    hopper::await_products<0>(o);
    if (lane == 0) {
      hopper::arrive(left + 8 * slot);
    }
    if (grown) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        o[i] *= factors[i / 2 % 2];
      }
    }
    go_on(tile);
  }
  hopper::await(full + 8 * slot, parity);  // the last tile's values
  hopper::begin_products();
  start_values(before);
  hopper::await_products<0>(o);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[r] + SHUFFLE(sums[r], 1);
    sum += SHUFFLE(sum, 2);
    const float inverse = 1 / sum;
    const int to = first + own / 32 * 16 + lane / 4 + 8 * r;
    if (to < length) {
      auto line = reinterpret_cast<uint32_t*>(out + ((int64_t(item) * length + to) * heads + head) * D) + lane % 4;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        line[i * 4] = hopper::pack(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
      }
    }
  }
"""


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """`kernels.attention` for heads within tokens: q [B, L, N, D], k and v [B, L_kv, N_kv, D], to q's shape."""
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    return kernels.attention(q, k, v, scale, mask).transpose(0, 2, 1, 3)


def _prepare(_most: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> Launch | None:
    B, L, N, D = q.shape
    if D != HEAD_DIM or any(a.dtype != mx.bfloat16 for a in (q, k, v)) or k.shape != v.shape:
        return None
    if k.shape[0] != B or k.shape[3] != D or 0 in (*q.shape, *k.shape) or N % k.shape[2] or scale <= 0:
        return None  # MLX's own has an answer, or says what is wrong
    if B * N >= 2**16 or max(L, k.shape[1]) >= 2**20:  # a grid's rows; tiles are counted in 32 bits
        return None
    return Launch(
        inputs=[q, k, v],
        template=[
            ("D", D),
            ("QUERIES", _QUERIES),
            ("KEYS", _KEYS),
            ("SLOTS", _SLOTS),
            ("GROUPS", _GROUPS),
            ("SCALE_LOG2", float_bits(scale * _LOG2E)),
        ],
        threads=(-(-L // (_GROUPS * _QUERIES)) * _THREADS, B * N, 1),
        group=(_THREADS, 1, 1),
        shapes=[q.shape],
        dtypes=[q.dtype],
    )


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype, D = getattr(mx, request["dtype"]), request["head_dim"]
    # Flat scores, where a key too many would show, and sharp ones, whose largest grows on the way by more than 2^8.
    cases = [(2, 33, 2, 2, 9, 0.5), (1, 200, 4, 2, 300, 8), (1, 65, 1, 1, 700, 8)]
    for seed, (B, L, N, shared, count, sharpness) in enumerate(cases):
        q = (sharpness * normal(seed, B, L, N, D)).astype(dtype)
        product = normal(seed + 10, B, count, 2 * shared, D).astype(dtype)
        k, v = mx.split(product, 2, axis=2)
        yield q, k, v, D**-0.5


FLASH_ATTENTION = Kernel(
    name="flash_attention",
    composed=attend,
    inputs=("q", "k", "v"),
    outputs=("out",),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
    header=PTX + _COPYING,
    shared_bytes=_SHARED,
    roundings=3,
    architecture=trust.HOPPER,
)
