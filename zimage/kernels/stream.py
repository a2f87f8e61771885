"""The residual stream: what a layer adds to it, and its norm and modulation before the next."""

from collections.abc import Callable, Iterator

from zimage import trust
from zimage.kernels.native import Arguments, Kernel, Launch, float_bits, normal, whole_groups

import mlx.core as mx

Norm = tuple[mx.array, float]  # a weight [D] and an eps
_WIDEST = 16384


def modulate(x: mx.array, scale: mx.array | None) -> mx.array:
    """x (1 + scale), or x in a block without modulation."""
    return x if scale is None else x * (1 + scale)


def residual(x: mx.array, change: mx.array, gate: mx.array | None) -> mx.array:
    """x + tanh(gate) * change, or x + change in a block without modulation."""
    return x + (change if gate is None else mx.tanh(gate) * change)


def residual_norm_modulate(
    x: mx.array,
    change: mx.array | None,
    gate: mx.array | None,
    after: Norm | None,
    before: Norm | None,
    scale: mx.array | None,
    rms_norm: Callable[[mx.array, mx.array, float], mx.array] = mx.fast.rms_norm,
) -> tuple[mx.array | None, mx.array | None]:
    """The stream x [B, L, D] after a layer's normed `change` with its gate, and the next layer's input.

    after: the norm of the change, None with it where nothing is added and the stream stays as it is, which None stands
    for; before: the next layer's norm, with the modulation's scale, or None where no input is wanted. gate and scale
    are [B, 1, D], or None in a block without modulation. rms_norm: how a norm is computed, from x, weight and eps.
    """
    stream = None
    if change is not None and after is not None:
        stream = residual(x, rms_norm(change, *after), gate)
    if before is None:
        return stream, None
    return stream, modulate(rms_norm(x if stream is None else stream, *before), scale)


def _sum_over_group(at: str) -> str:
    """Makes `sum` that of all threads of the group, by way of `partial` from `at` on."""
    return f"""
      for (int mask = 16; mask > 0; mask /= 2) {{
        sum += SHUFFLE(sum, mask);
      }}
      if (thread_index % 32 == 0) {{
        partial[{at} + thread_index / 32] = sum;
      }}
      BARRIER();
      sum = thread_index % LANES < THREADS / 32 ? partial[{at} + thread_index % LANES] : 0;
      for (int mask = LANES / 2; mask > 0; mask /= 2) {{
        sum += SHUFFLE(sum, mask);
      }}
"""


# A group of threads for some tokens one after the other, each thread with VECTORS times eight values: what the tokens
# share (norms, gate and scale, ready to be multiplied with) stays in registers, which on an H100 took a fifth less time
# than a group for each token. What is left out has other dimensions.
_BODY = (
    r"""
  constexpr int VECTORS = (W / 8 + THREADS - 1) / THREADS;
  constexpr int LANES = THREADS > 512 ? 32 : THREADS > 256 ? 16 : 8;  // one at least for each 32 threads
  SHARED float partial[4 * LANES];
  const int length = x_shape[1];
  const int item = group_row;
  const bool adds = change_ndim == 3;
  const bool norms = before_ndim == 1;
  const bool gated = gate_ndim == 3;
  const bool scaled = scale_ndim == 3;

  float gains[VECTORS][8];
  float scales[VECTORS][8];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int column = (j * THREADS + thread_index) * 8;
    if (column < W) {
      float factors[8];
      if (adds) {
        zimage::widen(zimage::load<8>(after + column * after_strides[0], after_strides[0]), gains[j]);
      }
      if (adds && gated) {
        const auto from = gate + item * gate_strides[0] + column * gate_strides[2];
        zimage::widen(zimage::load<8>(from, gate_strides[2]), factors);
        for (int i = 0; i < 8; ++i) {
          gains[j][i] *= TANH(factors[i]);
        }
      }
      if (norms) {
        zimage::widen(zimage::load<8>(before + column * before_strides[0], before_strides[0]), scales[j]);
      }
      if (norms && scaled) {
        const auto from = scale + item * scale_strides[0] + column * scale_strides[2];
        zimage::widen(zimage::load<8>(from, scale_strides[2]), factors);
        for (int i = 0; i < 8; ++i) {
          scales[j][i] *= 1 + factors[i];
        }
      }
    }
  }

  const int tokens = (length + group_count - 1) / group_count;
  const int first = group_index * tokens;
  const int end = first + tokens < length ? first + tokens : length;
  for (int token = first; token < end; ++token) {
    const int own = token % 2 * 2 * LANES;  // a thread ahead must not write where others still read
    const int64_t row = (int64_t(item) * length + token) * W;
    zimage::Pack<T, 8> values[VECTORS];
    const auto x_from = x + item * x_strides[0] + token * x_strides[1];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int column = (j * THREADS + thread_index) * 8;
      if (column < W) {
        values[j] = zimage::load<8>(x_from + column * x_strides[2], x_strides[2]);
      }
    }

    if (adds) {
      zimage::Pack<T, 8> changes[VECTORS];
      const auto change_from = change + item * change_strides[0] + token * change_strides[1];
      float sum = 0;
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const int column = (j * THREADS + thread_index) * 8;
        if (column < W) {
          changes[j] = zimage::load<8>(change_from + column * change_strides[2], change_strides[2]);
          float v[8];
          zimage::widen(changes[j], v);
          for (int i = 0; i < 8; ++i) {
            sum += v[i] * v[i];
          }
        }
      }
"""
    + _sum_over_group("own")
    + r"""
      const float inverse = RSQRT(sum / W + FLOAT(AFTER_EPS));
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const int column = (j * THREADS + thread_index) * 8;
        if (column < W) {
          float v[8];
          float c[8];
          zimage::widen(values[j], v);
          zimage::widen(changes[j], c);
          for (int i = 0; i < 8; ++i) {
            v[i] += c[i] * inverse * gains[j][i];
          }
          values[j] = zimage::narrow<T>(v);  // what follows is the norm of the stream as it is stored
          zimage::store8(stream + row + column, values[j]);
        }
      }
    }

    if (norms) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        if ((j * THREADS + thread_index) * 8 < W) {
          float v[8];
          zimage::widen(values[j], v);
          for (int i = 0; i < 8; ++i) {
            sum += v[i] * v[i];
          }
        }
      }
"""
    + _sum_over_group("own + LANES")
    + r"""
      const float inverse = RSQRT(sum / W + FLOAT(BEFORE_EPS));
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const int column = (j * THREADS + thread_index) * 8;
        if (column < W) {
          float v[8];
          zimage::widen(values[j], v);
          for (int i = 0; i < 8; ++i) {
            v[i] *= inverse * scales[j][i];
          }
          zimage::store8(normed + row + column, zimage::narrow<T>(v));
        }
      }
    }
  }
"""
)
_MOST_TOKENS = 4  # for a group
_GROUPS = 256  # at least, where there are as many tokens: fewer leave processors without work


def _prepare(
    most: int,
    x: mx.array,
    change: mx.array | None,
    gate: mx.array | None,
    after: Norm | None,
    before: Norm | None,
    scale: mx.array | None,
) -> Launch | None:
    B, L, W = x.shape
    threads = whole_groups(-(-W // 8), most)
    some = after if after is not None else before
    groups = -(-L // max(1, min(_MOST_TOKENS, B * L // _GROUPS)))
    if some is None or W % 8 or W > _WIDEST or groups * threads >= 2**31:
        return None
    weight = some[0]  # in the place of what is left out: its number of dimensions says so
    adds = change is not None and after is not None
    arrays = [
        x,
        change if adds and change is not None else weight,
        weight if gate is None else gate,
        weight if after is None else after[0],
        x if before is None else before[0],
        weight if scale is None else scale,
    ]
    if any(array.dtype != x.dtype for array in arrays) or any(a is not None and a.shape[1] != 1 for a in (gate, scale)):
        return None
    return Launch(
        inputs=arrays,
        template=[
            ("T", x.dtype), ("W", W), ("THREADS", threads),
            ("AFTER_EPS", float_bits(some[1] if after is None else after[1])),
            ("BEFORE_EPS", float_bits(some[1] if before is None else before[1])),
        ],
        threads=(groups * threads, B, 1),
        group=(threads, 1, 1),
        shapes=[x.shape if adds else (8,), x.shape if before is not None else (8,)],
        dtypes=[x.dtype, x.dtype],
    )  # fmt: skip


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype, W = getattr(mx, request["dtype"]), request["width"]
    for seed, (B, L) in enumerate([(2, 9), (1, 1), (2, 2 * _GROUPS + 2)]):
        x, change = normal(seed, B, L, W).astype(dtype), (3 * normal(seed + 10, B, L, W)).astype(dtype)
        after, before = [((1 + 0.1 * normal(seed + n, W)).astype(dtype), 1e-5) for n in (20, 30)]
        scale, gate, _ = mx.split((0.5 * normal(seed + 40, B, 1, 3 * W)).astype(dtype), 3, axis=-1)
        yield x, change, gate, after, before, scale
        if seed == 2:  # long enough for a group to have several tokens, the last group fewer
            return
        yield x, change, None, after, before, None
        yield x, None, None, None, before, scale
        yield x, change, gate, after, None, None


RESIDUAL_NORM_MODULATE = Kernel(
    name="residual_norm_modulate",
    composed=residual_norm_modulate,
    inputs=("x", "change", "gate", "after", "before", "scale"),
    outputs=("stream", "normed"),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
)
