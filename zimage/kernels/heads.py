"""QK norm and RoPE: from the projections' output to what attention takes."""

from collections.abc import Callable, Iterator

from zimage import trust
from zimage.kernels.native import Arguments, Kernel, Launch, float_bits, normal

import mlx.core as mx

Norm = tuple[mx.array, float]  # a weight [head_dim] and an eps
_THREADS = 128
_HEAD_SIZES = (16, 32, 64, 128, 256)  # whole numbers of threads with eight values each, none across two SIMD groups


def rotate(x: mx.array, rotation: mx.array) -> mx.array:
    """RoPE in fp32: x [B, L, N, head_dim], adjacent pairs turned by `rotation` [2, 1 or B, L, 1, head_dim / 2]."""
    cos, sin = rotation[0], rotation[1]
    wide = x.astype(mx.float32)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def norm_then_rotate(
    q: mx.array,
    k: mx.array,
    q_norm: Norm,
    k_norm: Norm,
    rotation: mx.array,
    rms_norm: Callable[[mx.array, mx.array, float], mx.array] = mx.fast.rms_norm,
) -> tuple[mx.array, mx.array]:
    """Queries [B, L, N, head_dim] and keys [B, L, N_kv, head_dim], normed over each head, then rotated.

    rms_norm: how a norm is computed, from x, weight and eps.
    """
    q, k = rms_norm(q, *q_norm), rms_norm(k, *k_norm)
    return rotate(q, rotation), rotate(k, rotation)


# Neighbouring threads for a head, eight values each, and groups of them along the heads of a token (one group that goes
# through all of them took longer on an H100). Queries and keys are read where they lie, in one fused product as well as
# in arrays of their own, and written [B, L, N, head_dim].
_BODY = r"""
  constexpr int LANES = D / 8;
  constexpr int HEADS = THREADS / LANES;
  const int length = q_shape[1];
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int item = group_index / length;
  const int token = group_index % length;
  const int first = (thread_index % LANES) * 8;
  const int head = group_row * HEADS + thread_index / LANES;
  const bool is_query = head < queries;
  const bool is_head = head < queries + keys;

  float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  float w[8];
  auto to = q_out + (int64_t(group_index) * queries + head) * D + first;
  if (is_query) {
    const auto from = q + item * q_strides[0] + token * q_strides[1] + head * q_strides[2] + first * q_strides[3];
    zimage::widen(zimage::load<8>(from, q_strides[3]), v);
    zimage::widen(zimage::load<8>(q_weight + first * q_weight_strides[0], q_weight_strides[0]), w);
  } else {
    const int own = is_head ? head - queries : 0;
    to = k_out + (int64_t(group_index) * keys + own) * D + first;
    const auto from = k + item * k_strides[0] + token * k_strides[1] + own * k_strides[2] + first * k_strides[3];
    zimage::widen(zimage::load<8>(from, k_strides[3]), v);
    zimage::widen(zimage::load<8>(k_weight + first * k_weight_strides[0], k_weight_strides[0]), w);
  }
  const int64_t table = (rotation_shape[1] > 1 ? item * rotation_strides[1] : 0) +
      token * rotation_strides[2] + first / 2 * rotation_strides[4];
  const auto cosines = zimage::load<4>(rotation + table, rotation_strides[4]);
  const auto sines = zimage::load<4>(rotation + table + rotation_strides[0], rotation_strides[4]);

  float sum = 0;
  for (int i = 0; i < 8; ++i) {
    sum += v[i] * v[i];
  }
  for (int mask = LANES / 2; mask > 0; mask /= 2) {  // also threads without a head
    sum += SHUFFLE(sum, mask);
  }
  const float inverse = RSQRT(sum / D + (is_query ? FLOAT(Q_EPS) : FLOAT(K_EPS)));
  for (int i = 0; i < 4; ++i) {
    const float a = v[2 * i] * inverse * w[2 * i];
    const float b = v[2 * i + 1] * inverse * w[2 * i + 1];
    v[2 * i] = a * cosines.values[i] - b * sines.values[i];
    v[2 * i + 1] = a * sines.values[i] + b * cosines.values[i];
  }
  if (is_head) {
    zimage::store8(to, zimage::narrow<T>(v));
  }
"""


def _prepare(most: int, q: mx.array, k: mx.array, q_norm: Norm, k_norm: Norm, rotation: mx.array) -> Launch | None:
    B, L, queries, D = q.shape
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
            ("THREADS", threads),
            ("Q_EPS", float_bits(q_norm[1])),
            ("K_EPS", float_bits(k_norm[1])),
        ],
        threads=(B * L * threads, -(-(queries + k.shape[2]) * D // 8 // threads), 1),
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
