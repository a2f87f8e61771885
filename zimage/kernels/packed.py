"""Packed weights as floating-point ones, at the speed of memory: affine, 4 and 8 bits."""

from collections.abc import Iterator

from zimage import kernels, trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal

import mlx.core as mx

_THREADS = 256
_CHUNKS = 4  # of eight values, for each thread
_GROUPS = (32, 64, 128)
_BITS = (4, 8)

# Neighbouring threads take neighbouring chunks of eight weights, which lie in one 32-bit word or two.
_BODY = r"""
  constexpr int WORDS = BITS / 4;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  const int64_t chunks = int64_t(packed_shape[0]) * packed_shape[1] / WORDS;
#pragma unroll
  for (int j = 0; j < CHUNKS; ++j) {
    const int64_t chunk = (int64_t(group_index) * CHUNKS + j) * THREADS + thread_index;
    if (chunk < chunks) {
      uint32_t words[WORDS];
      zimage::load_words<WORDS>(packed + chunk * WORDS, words);
      const float scale = static_cast<float>(scales[chunk * 8 / GROUP]);
      const float bias = static_cast<float>(biases[chunk * 8 / GROUP]);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = scale * static_cast<float>((words[i * BITS / 32] >> (i * BITS % 32)) & MASK) + bias;
      }
      zimage::store8(weight + chunk * 8, zimage::narrow<T>(v));
    }
  }
"""


def _prepare(
    most: int,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
    dtype: mx.Dtype,
) -> Launch | None:
    if mode != "affine" or biases is None or bits not in _BITS or group_size not in _GROUPS or weight.ndim != 2:
        return None
    shape = (weight.shape[0], weight.shape[1] * 32 // bits)
    threads = min(_THREADS, most)
    groups = -(-shape[0] * shape[1] // (8 * _CHUNKS * threads))
    return Launch(
        inputs=[weight, scales, biases],
        template=[
            ("T", dtype),
            ("SCALE", scales.dtype),
            ("BITS", bits),
            ("GROUP", group_size),
            ("CHUNKS", _CHUNKS),
            ("THREADS", threads),
        ],
        threads=(groups * threads, 1, 1),
        group=(threads, 1, 1),
        shapes=[shape],
        dtypes=[dtype],
    )


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype, bits, group = getattr(mx, request["dtype"]), request["bits"], request["group_size"]
    for seed, (rows, columns) in enumerate([(67, 5 * group), (8, group)]):
        packed = mx.quantize(normal(seed, rows, columns).astype(dtype), group_size=group, bits=bits)
        yield *packed, group, bits, "affine", dtype


DEQUANTIZE = Kernel(
    name="dequantize",
    composed=kernels.dequantize,
    inputs=("packed", "scales", "biases"),
    outputs=("weight",),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
    strided=False,
)
