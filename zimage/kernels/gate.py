"""SwiGLU's gate, from one fused product or two arrays."""

from collections.abc import Iterator

from zimage import kernels, trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal, whole_groups

import mlx.core as mx

_THREADS = 128

# Groups of threads along each token's width, eight values a thread (two or four times as many took longer on an H100),
# read where they lie. GPUs start groups in the order of x, then y: counted on from token to token, the memory is gone
# through from its beginning to its end, which took 6 % less time there than a column of groups after the other.
_BODY = r"""
  const int length = gate_shape[1];
  const int width = gate_shape[2];
  const int across = (width / 8 + THREADS - 1) / THREADS;
  const int group = group_row * group_count + group_index;
  const int row = group / across;
  const int item = row / length;
  const int token = row % length;
  const int column = (group % across * THREADS + thread_index) * 8;
  if (column < width) {
    float a[8];
    float b[8];
    const auto gates = gate + item * gate_strides[0] + token * gate_strides[1] + column * gate_strides[2];
    const auto ups = up + item * up_strides[0] + token * up_strides[1] + column * up_strides[2];
    zimage::widen(zimage::load<8>(gates, gate_strides[2]), a);
    zimage::widen(zimage::load<8>(ups, up_strides[2]), b);
    for (int i = 0; i < 8; ++i) {
      a[i] = a[i] * SIGMOID(a[i]) * b[i];
    }
    zimage::store8(hidden + int64_t(row) * width + column, zimage::narrow<T>(a));
  }
"""


def _prepare(most: int, gate: mx.array, up: mx.array) -> Launch | None:
    if gate.ndim != 3 or gate.shape != up.shape or gate.dtype != up.dtype or gate.shape[2] % 8:
        return None
    B, L, H = gate.shape
    threads = whole_groups(_THREADS, most)
    if B * L * -(-H // 8 // threads) * threads >= 2**31:
        return None
    return Launch(
        inputs=[gate, up],
        template=[("T", gate.dtype), ("THREADS", threads)],
        threads=(B * L * threads, -(-H // 8 // threads), 1),
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
