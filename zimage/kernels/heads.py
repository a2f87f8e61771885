"""QK norm and RoPE: from the projections' output to what attention takes."""

from collections.abc import Iterator

from zimage import trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal, small

import mlx.core as mx

Norm = tuple[mx.array, float]  # a weight [head_dim] and an eps
_THREADS = 256
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


# A group of threads for each token, and neighbouring threads for a head, eight values each. Queries and keys are read
# where they lie, in one fused product as well as in arrays of their own, and written [B, L, N, head_dim].
_BODY = r"""
  constexpr int LANES = D / 8;
  constexpr int HEADS = THREADS / LANES;
  const int length = q_shape[1];
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int item = group_index / length;
  const int token = group_index % length;
  const int first = (thread_index % LANES) * 8;

  const int64_t table =
      (rotation_shape[1] > 1 ? item * rotation_strides[1] : 0) + token * rotation_strides[2];
  float cosine[4];
  float sine[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t at = table + (first / 2 + i) * rotation_strides[4];
    cosine[i] = rotation[at];
    sine[i] = rotation[at + rotation_strides[0]];
  }
  float q_scale[8];
  float k_scale[8];
  zimage::load8(q_weight + first * q_weight_strides[0], q_weight_strides[0], q_scale);
  zimage::load8(k_weight + first * k_weight_strides[0], k_weight_strides[0], k_scale);

  for (int start = 0; start < queries + keys; start += HEADS) {
    const int head = start + thread_index / LANES;
    const bool is_query = head < queries;
    const bool is_key = !is_query && head < queries + keys;
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    auto from = q + item * q_strides[0] + token * q_strides[1] + head * q_strides[2] + first * q_strides[3];
    auto to = q_out + (int64_t(group_index) * queries + head) * D + first;
    if (is_key) {
      const int own = head - queries;
      from = k + item * k_strides[0] + token * k_strides[1] + own * k_strides[2] + first * k_strides[3];
      to = k_out + (int64_t(group_index) * keys + own) * D + first;
    }
    if (is_query || is_key) {
      zimage::load8(from, is_query ? q_strides[3] : k_strides[3], v);
    }
    float sum = 0;
    for (int i = 0; i < 8; ++i) {
      sum += v[i] * v[i];
    }
    for (int mask = LANES / 2; mask > 0; mask /= 2) {  // also threads without a head
      sum += SHUFFLE(sum, mask);
    }
    const float inverse = RSQRT(sum / D + (is_query ? eps[0] : eps[1]));
    for (int i = 0; i < 4; ++i) {
      const float a = v[2 * i] * inverse * (is_query ? q_scale[2 * i] : k_scale[2 * i]);
      const float b = v[2 * i + 1] * inverse * (is_query ? q_scale[2 * i + 1] : k_scale[2 * i + 1]);
      v[2 * i] = a * cosine[i] - b * sine[i];
      v[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
    if (is_query || is_key) {
      zimage::store8(to, v);
    }
  }
"""


def _prepare(most: int, q: mx.array, k: mx.array, q_norm: Norm, k_norm: Norm, rotation: mx.array) -> Launch | None:
    B, L, _, D = q.shape
    threads = min(_THREADS, most)
    if D not in _HEAD_SIZES or B * L * threads >= 2**31 or rotation.dtype != mx.float32 or k.dtype != q.dtype:
        return None
    return Launch(
        inputs=[q, k, q_norm[0], k_norm[0], rotation, small((q_norm[1], k_norm[1]))],
        template=[("D", D), ("THREADS", threads)],
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
    inputs=("q", "k", "q_weight", "k_weight", "rotation", "eps"),
    outputs=("q_out", "k_out"),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
)
