"""Packed weights as floating-point ones, at the speed of memory, in all of MLX's modes."""

from collections.abc import Iterator

from zimage import kernels, trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal
from zimage.quantization import MODES

import mlx.core as mx

_THREADS = 256
_CHUNKS = 4  # of eight values, for each thread
_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")  # by the number that the body knows them by
_BITS = (2, 3, 4, 5, 6, 8)  # of affine weights
_GROUPS = (32, 64, 128)

# Neighbouring threads take neighbouring chunks of eight weights. A chunk is as many bytes as a weight has bits, the
# first weight in the lowest ones: 4 and 8 bits fill whole words, chunks of others may lie across two. Scales of the
# floating-point modes are bytes: exponents, but of nvfp4, which has e4m3 numbers.
_BODY = r"""
  constexpr bool AFFINE = MODE == 0;
  constexpr bool E2M1 = MODE == 1 || MODE == 2;
  constexpr bool E4M3 = MODE == 3;
  constexpr bool E4M3_SCALES = MODE == 2;
  constexpr uint32_t MASK = (1u << BITS) - 1;
  constexpr bool WHOLE = BITS % 4 == 0;
  constexpr int WORDS = BITS == 8 ? 2 : 1;
  const int64_t words = int64_t(packed_shape[0]) * packed_shape[1];
  const int64_t chunks = words * 4 / BITS;
#pragma unroll
  for (int j = 0; j < CHUNKS; ++j) {
    const int64_t chunk = (int64_t(group_index) * CHUNKS + j) * THREADS + thread_index;
    if (chunk < chunks) {
      uint32_t whole[WORDS];
      uint64_t across;
      if (WHOLE) {
        zimage::load_words<WORDS>(packed + chunk * WORDS, whole);
      } else {
        const int64_t word = chunk * BITS / 4;
        const uint32_t next = word + 1 < words ? packed[word + 1] : 0;
        across = (uint64_t(next) << 32 | packed[word]) >> (chunk * BITS % 4 * 8);
      }
      float scale = static_cast<float>(scales[chunk * 8 / GROUP]);
      float bias = 0;
      if (AFFINE) {
        bias = static_cast<float>(biases[chunk * 8 / GROUP]);
      } else if (E4M3_SCALES) {
        scale = FROM_E4M3(static_cast<int>(scale));
      } else {
        scale = FLOAT(scale == 0 ? 0x00400000 : static_cast<int>(scale) << 23);
      }
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = WHOLE ? whole[i * BITS / 32 % WORDS] >> (i * BITS % 32) : across >> (i * BITS);
        const uint32_t code = bits & MASK;
        v[i] = scale * (E2M1 ? FROM_E2M1(code) : E4M3 ? FROM_E4M3(code) : static_cast<float>(code)) + bias;
      }
      zimage::store8(weight + chunk * 8, zimage::narrow<T>(v));
    }
  }
"""


def _takes(mode: str, bits: int, group_size: int) -> bool:
    """Whether there is a kernel for such weights."""
    if mode == "affine":
        return bits in _BITS and group_size in _GROUPS
    return MODES.get(mode) == (bits, group_size)


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
    if not _takes(mode, bits, group_size) or (biases is None) == (mode == "affine") or weight.ndim != 2:
        return None
    shape = (weight.shape[0], weight.shape[1] * 32 // bits)
    threads = min(_THREADS, most)
    groups = -(-shape[0] * shape[1] // (8 * _CHUNKS * threads))
    return Launch(
        inputs=[weight, scales, scales if biases is None else biases],
        template=[
            ("T", dtype),
            ("SCALE", scales.dtype),
            ("MODE", _MODES.index(mode)),
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
    dtype, mode = getattr(mx, request["dtype"]), request["mode"]
    bits, group = request["bits"], request["group_size"]
    for seed, (rows, groups) in enumerate([(67, 10), (8, 2)]):
        values = normal(seed, rows, groups * group).astype(dtype)
        weight, scales, *biases = mx.quantize(values, group_size=group, bits=bits, mode=mode)
        yield weight, scales, biases[0] if biases else None, group, bits, mode, dtype


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
