"""The residual stream: what a layer adds to it, and its norm and modulation before the next."""

from collections.abc import Iterator

from zimage import trust
from zimage.kernels.native import Arguments, Kernel, Launch, normal, small, whole_groups

import mlx.core as mx

Norm = tuple[mx.array, float]  # a weight [D] and an eps
_WIDEST = 16384


def modulate(x: mx.array, scale: mx.array | None) -> mx.array:
    """x (1 + scale), or x in a block without modulation."""
    return x if scale is None else x * (1 + scale)


def residual(x: mx.array, change: mx.array, gate: mx.array | None) -> mx.array:
    """x + gate * change, or x + change in a block without modulation."""
    return x + (change if gate is None else gate * change)


def residual_norm_modulate(
    x: mx.array,
    change: mx.array | None,
    gate: mx.array | None,
    after: Norm | None,
    before: Norm | None,
    scale: mx.array | None,
) -> tuple[mx.array | None, mx.array | None]:
    """The stream x [B, L, D] after a layer's normed `change` with its gate, and the next layer's input.

    after: the norm of the change, None with it where nothing is added and the stream stays as it is, which None stands
    for; before: the next layer's norm, with the modulation's scale, or None where no input is wanted. gate and scale
    are [B, 1, D], or None in a block without modulation.
    """
    stream = None
    if change is not None and after is not None:
        stream = residual(x, mx.fast.rms_norm(change, *after), gate)
    if before is None:
        return stream, None
    return stream, modulate(mx.fast.rms_norm(x if stream is None else stream, *before), scale)


# A group of threads for each token, each thread with VECTORS times eight values in registers.
_BODY = r"""
  constexpr int VECTORS = (W / 8 + THREADS - 1) / THREADS;
  constexpr int WARPS = THREADS / 32;
  SHARED float partial[2 * WARPS];
  const int length = x_shape[1];
  const int item = group_index / length;
  const int token = group_index % length;
  const int64_t row = int64_t(group_index) * W;
  const bool adds = forms[0] != 0;
  const bool norms = forms[1] != 0;
  const bool gated = forms[2] != 0;
  const bool scaled = forms[3] != 0;

  float v[VECTORS][8];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int column = (j * THREADS + thread_index) * 8;
    for (int i = 0; i < 8; ++i) {
      v[j][i] = 0;
    }
    if (column < W) {
      zimage::load8(
          x + item * x_strides[0] + token * x_strides[1] + column * x_strides[2], x_strides[2], v[j]);
    }
  }

  if (adds) {
    float c[VECTORS][8];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int column = (j * THREADS + thread_index) * 8;
      for (int i = 0; i < 8; ++i) {
        c[j][i] = 0;
      }
      if (column < W) {
        zimage::load8(
            change + item * change_strides[0] + token * change_strides[1] + column * change_strides[2],
            change_strides[2],
            c[j]);
      }
      for (int i = 0; i < 8; ++i) {
        sum += c[j][i] * c[j][i];
      }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += SHUFFLE(sum, mask);
    }
    if (thread_index % 32 == 0) {
      partial[thread_index / 32] = sum;
    }
    BARRIER();
    float total = 0;
    for (int i = 0; i < WARPS; ++i) {
      total += partial[i];
    }
    const float inverse = RSQRT(total / W + eps[0]);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int column = (j * THREADS + thread_index) * 8;
      if (column < W) {
        float w[8];
        float g[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        zimage::load8(after + column * after_strides[0], after_strides[0], w);
        if (gated) {
          zimage::load8(gate + item * gate_strides[0] + column * gate_strides[2], gate_strides[2], g);
        }
        for (int i = 0; i < 8; ++i) {
          // Rounded, so that what follows is the norm of the stream as it is stored.
          v[j][i] = static_cast<float>(static_cast<T>(v[j][i] + g[i] * (c[j][i] * inverse * w[i])));
        }
        zimage::store8(stream + row + column, v[j]);
      }
    }
  }

  if (norms) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      for (int i = 0; i < 8; ++i) {
        sum += v[j][i] * v[j][i];
      }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += SHUFFLE(sum, mask);
    }
    if (thread_index % 32 == 0) {
      partial[WARPS + thread_index / 32] = sum;
    }
    BARRIER();
    float total = 0;
    for (int i = 0; i < WARPS; ++i) {
      total += partial[WARPS + i];
    }
    const float inverse = RSQRT(total / W + eps[1]);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const int column = (j * THREADS + thread_index) * 8;
      if (column < W) {
        float w[8];
        float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        zimage::load8(before + column * before_strides[0], before_strides[0], w);
        if (scaled) {
          zimage::load8(scale + item * scale_strides[0] + column * scale_strides[2], scale_strides[2], s);
        }
        for (int i = 0; i < 8; ++i) {
          v[j][i] = v[j][i] * inverse * w[i] * (1 + s[i]);
        }
        zimage::store8(normed + row + column, v[j]);
      }
    }
  }
"""


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
    none = after if after is not None else before
    if none is None or W % 8 or W > _WIDEST or B * L * threads >= 2**31:
        return None
    weight = none[0]  # in the place of what is left out; the body does not read it
    arrays = [
        x,
        weight if change is None else change,
        weight if gate is None else gate,
        weight if after is None else after[0],
        weight if before is None else before[0],
        weight if scale is None else scale,
    ]
    if any(array.dtype != x.dtype for array in arrays) or any(a is not None and a.shape[1] != 1 for a in (gate, scale)):
        return None
    adds, norms = change is not None and after is not None, before is not None
    eps = (after[1] if after is not None else 0.0, before[1] if before is not None else 0.0)
    forms = (adds, norms, gate is not None, scale is not None)
    return Launch(
        inputs=[*arrays, small(eps), small(forms, mx.int32)],
        template=[("T", x.dtype), ("W", W), ("THREADS", threads)],
        threads=(B * L * threads, 1, 1),
        group=(threads, 1, 1),
        shapes=[x.shape if adds else (8,), x.shape if norms else (8,)],
        dtypes=[x.dtype, x.dtype],
    )


def _examples(request: trust.Request) -> Iterator[Arguments]:
    dtype, W = getattr(mx, request["dtype"]), request["width"]
    for seed, (B, L) in enumerate([(2, 9), (1, 1)]):
        x, change = normal(seed, B, L, W).astype(dtype), (3 * normal(seed + 10, B, L, W)).astype(dtype)
        after, before = [((1 + 0.1 * normal(seed + n, W)).astype(dtype), 1e-5) for n in (20, 30)]
        scale, gate, _ = mx.split((0.5 * normal(seed + 40, B, 1, 3 * W)).astype(dtype), 3, axis=-1)
        yield x, change, gate, after, before, scale
        yield x, change, None, after, before, None
        yield x, None, None, None, before, scale
        yield x, change, gate, after, None, None


RESIDUAL_NORM_MODULATE = Kernel(
    name="residual_norm_modulate",
    composed=residual_norm_modulate,
    inputs=("x", "change", "gate", "after", "before", "scale", "eps", "forms"),
    outputs=("stream", "normed"),
    body=_BODY,
    prepare=_prepare,
    examples=_examples,
)
