"""QK norm and RoPE: from the projections' output to what attention takes."""

from collections.abc import Iterator

from zimage import trust
from zimage.kernels.native import Arguments, Kernel, Launch, float_bits, normal

import mlx.core as mx

Norm = tuple[mx.array, float]  # a weight [head_dim] and an eps
_THREADS = 256
_PACKS = 4
_HEAD_SIZES = (16, 32, 64, 128, 256)  # whole numbers of threads with eight values each, none across two SIMD groups


def rotate(x: mx.array, rotation: mx.array) -> mx.array:
    """RoPE in fp32: x [B, L, N, head_dim], adjacent pairs turned by `rotation` [2, 1 or B, L, 1, head_dim / 2]."""
    cos, sin = rotation[0], rotation[1]
    wide = x.astype(mx.float32)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def norm_then_rotate(
    q: mx.array, k: mx.array, q_norm: Norm, k_norm: Norm, rotation: mx.array
) -> tuple[mx.array, mx.array]:
    """Queries [B, L, N, head_dim] and keys [B, L, N_kv, head_dim], normed over each head, then rotated."""
    q, k = mx.fast.rms_norm(q, *q_norm), mx.fast.rms_norm(k, *k_norm)
    return rotate(q, rotation), rotate(k, rotation)


# A group of threads for each token, and neighbouring threads for a head, eight values each; PACKS of them at once.
# Queries and keys are read where they lie, in one fused product as well as in arrays of their own, and written
# [B, L, N, head_dim].
_BODY = r"""
  constexpr int LANES = D / 8;
  constexpr int HEADS = THREADS / LANES;
  const int length = q_shape[1];
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int item = group_index / length;
  const int token = group_index % length;
  const int first = (thread_index % LANES) * 8;
  const auto q_from = q + item * q_strides[0] + token * q_strides[1] + first * q_strides[3];
  const auto k_from = k + item * k_strides[0] + token * k_strides[1] + first * k_strides[3];
  const auto q_to = q_out + int64_t(group_index) * queries * D + first;
  const auto k_to = k_out + int64_t(group_index) * keys * D + first;

  const int64_t table = (rotation_shape[1] > 1 ? item * rotation_strides[1] : 0) +
      token * rotation_strides[2] + first / 2 * rotation_strides[4];
  const auto cosines = zimage::load<4>(rotation + table, rotation_strides[4]);
  const auto sines = zimage::load<4>(rotation + table + rotation_strides[0], rotation_strides[4]);
  float q_scale[8];
  float k_scale[8];
  zimage::widen(zimage::load<8>(q_weight + first * q_weight_strides[0], q_weight_strides[0]), q_scale);
  zimage::widen(zimage::load<8>(k_weight + first * k_weight_strides[0], k_weight_strides[0]), k_scale);

  for (int start = thread_index / LANES; start - thread_index / LANES < queries + keys; start += HEADS * PACKS) {
    zimage::Pack<T, 8> packs[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; ++j) {
      const int head = start + j * HEADS;
      if (head < queries) {
        packs[j] = zimage::load<8>(q_from + head * q_strides[2], q_strides[3]);
      } else if (head < queries + keys) {
        packs[j] = zimage::load<8>(k_from + (head - queries) * k_strides[2], k_strides[3]);
      } else {
        for (int i = 0; i < 8; ++i) {
          packs[j].values[i] = static_cast<T>(0.0f);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < PACKS; ++j) {
      const int head = start + j * HEADS;
      const bool is_query = head < queries;
      float v[8];
      zimage::widen(packs[j], v);
      float sum = 0;
      for (int i = 0; i < 8; ++i) {
        sum += v[i] * v[i];
      }
      for (int mask = LANES / 2; mask > 0; mask /= 2) {  // also threads without a head
        sum += SHUFFLE(sum, mask);
      }
      const float inverse = RSQRT(sum / D + (is_query ? FLOAT(Q_EPS) : FLOAT(K_EPS)));
      for (int i = 0; i < 4; ++i) {
        const float a = v[2 * i] * inverse * (is_query ? q_scale[2 * i] : k_scale[2 * i]);
        const float b = v[2 * i + 1] * inverse * (is_query ? q_scale[2 * i + 1] : k_scale[2 * i + 1]);
        v[2 * i] = a * cosines.values[i] - b * sines.values[i];
        v[2 * i + 1] = a * sines.values[i] + b * cosines.values[i];
      }
      if (head < queries + keys) {
        zimage::store8(is_query ? q_to + head * D : k_to + (head - queries) * D, zimage::narrow<T>(v));
      }
    }
  }
"""


def _prepare(most: int, q: mx.array, k: mx.array, q_norm: Norm, k_norm: Norm, rotation: mx.array) -> Launch | None:
    B, L, _, D = q.shape
    threads = min(_THREADS, most)
    if D not in _HEAD_SIZES or B * L * threads >= 2**31 or rotation.dtype != mx.float32:
        return None
    if k.dtype != q.dtype or q_norm[0].dtype != k_norm[0].dtype:
        return None
    return Launch(
        inputs=[q, k, q_norm[0], k_norm[0], rotation],
        template=[
            ("T", q.dtype),
            ("WEIGHT", k_norm[0].dtype),
            ("D", D),
            ("PACKS", _PACKS),
            ("THREADS", threads),
            ("Q_EPS", float_bits(q_norm[1])),
            ("K_EPS", float_bits(k_norm[1])),
        ],
        threads=(B * L * threads, 1, 1),
        group=(threads, 1, 1),
        shapes=[q.shape, k.shape],
        dtypes=[q.dtype, k.dtype],
    )


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype, D = getattr(mx, request["dtype"]), request["head_dim"]
    for seed, (B, L, queries, keys) in enumerate([(2, 33, 30, 30), (1, 5, 6, 2)]):
        heads = normal(seed, B, L, queries + 2 * keys, D).astype(dtype)
        norms = [((1 + 0.1 * normal(seed + n, D)).astype(dtype), 1e-5) for n in (10, 20)]
        angles = normal(seed + 30, 1 if seed else B, L, 1, D // 2)
        rotation = mx.stack([mx.cos(angles), mx.sin(angles)])
        q, k, _ = mx.split(heads, [queries, queries + keys], axis=2)
        yield q, k, *norms, rotation


QK_NORM_ROPE = Kernel(
    name="qk_norm_rope",
    composed=norm_then_rotate,
    inputs=("q", "k", "q_weight", "k_weight", "rotation"),
    outputs=("q_out", "k_out"),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
)
