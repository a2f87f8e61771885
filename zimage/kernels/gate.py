"""SwiGLU's gate, from one fused product or two arrays."""

from collections.abc import Iterator

from zimage import kernels, trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal, whole_groups

import mlx.core as mx

_THREADS = 256
_PACKS = 2

# Groups of threads along each token's width, PACKS times eight values a thread, read where they lie.
_BODY = r"""
  const int length = gate_shape[1];
  const int width = gate_shape[2];
  const int item = group_index / length;
  const int token = group_index % length;
  const auto gates = gate + item * gate_strides[0] + token * gate_strides[1];
  const auto ups = up + item * up_strides[0] + token * up_strides[1];
  zimage::Pack<T, 8> g[PACKS];
  zimage::Pack<T, 8> u[PACKS];
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = ((group_row * PACKS + j) * THREADS + thread_index) * 8;
    if (column < width) {
      g[j] = zimage::load<8>(gates + column * gate_strides[2], gate_strides[2]);
      u[j] = zimage::load<8>(ups + column * up_strides[2], up_strides[2]);
    }
  }
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = ((group_row * PACKS + j) * THREADS + thread_index) * 8;
    if (column < width) {
      float a[8];
      float b[8];
      zimage::widen(g[j], a);
      zimage::widen(u[j], b);
      for (int i = 0; i < 8; ++i) {
        a[i] = a[i] * SIGMOID(a[i]) * b[i];
      }
      zimage::store8(hidden + int64_t(group_index) * width + column, zimage::narrow<T>(a));
    }
  }
"""


def _prepare(most: int, gate: mx.array, up: mx.array) -> Launch | None:
    if gate.ndim != 3 or gate.shape != up.shape or gate.dtype != up.dtype or gate.shape[2] % 8:
        return None
    B, L, H = gate.shape
    threads = whole_groups(_THREADS, most)
    if B * L * threads >= 2**31:
        return None
    return Launch(
        inputs=[gate, up],
        template=[("T", gate.dtype), ("PACKS", _PACKS), ("THREADS", threads)],
        threads=(B * L * threads, -(-H // 8 // (_PACKS * threads)), 1),
        group=(threads, 1, 1),
        shapes=[gate.shape],
        dtypes=[gate.dtype],
    )


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype = getattr(mx, request["dtype"])
    for seed, (B, L, H) in enumerate([(2, 9, 2568), (1, 1, 8)]):
        both = (4 * normal(seed, B, L, 2 * H)).astype(dtype)
        yield tuple(mx.split(both, 2, axis=-1))


SWIGLU = Kernel(
    name="swiglu",
    composed=kernels.swiglu,
    inputs=("gate", "up"),
    outputs=("hidden",),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
)
