"""Linear layers that round their input as a device with 8-bit or 4-bit products would: emulated in floating point.

What is computed is the rounding error of the activations, faithfully; what a device with such products would gain is
not. MLX 0.32 has no per-token ones, and has those of its own formats (`mx.qqmm`) neither on CPUs nor on most GPUs, so
everything here is emulated: its times mean nothing, and its arms say "emulated".

- "int8": per token (row), symmetric: the largest magnitude becomes 127, values the nearest integer, halves to even.
- "fp8": per token: the largest magnitude becomes 448, values the nearest of E4M3.
- "mxfp8", "nvfp4": MLX's formats, a scale for each 32 or 16 neighbours, as `mx.quantize` rounds.

The product takes the rounded values without their scale, exact in any dtype, and in fp32; the scale is multiplied in
afterwards, as such devices do it. So nothing is rounded but the input and, once, the result, to the input's dtype.
"""

from functools import cache
from typing import Any

from zimage.errors import InputError
from zimage.quantization import MODES

import mlx.core as mx
import mlx.nn as nn

INPUT_MODES = ("int8", "fp8", "mxfp8", "nvfp4")
EMULATED = True  # on every device; see above
_LARGEST = {"int8": 127.0, "fp8": 448.0}  # what the largest magnitude of a token becomes
_SMALLEST = 2.0**-100  # a token below that is rounded to zeros instead of divided by zero
_WIDTH = 32  # what MLX packs at once


def codes(x: mx.array, mode: str) -> tuple[mx.array, mx.array | None]:
    """The rounded values of x [..., D] without their scale, and the scale [..., 1], both fp32; None where it is one.

    Raises InputError for a mode that is not one of INPUT_MODES.
    """
    require_mode(mode)
    if mode in MODES:
        bits, group = MODES[mode]
        packed, scales = mx.quantize(x, group_size=group, bits=bits, mode=mode)[:2]
        return mx.dequantize(packed, scales, None, group, bits, mode, dtype=mx.float32), None
    wide = x.astype(mx.float32)
    scale = mx.maximum(mx.abs(wide).max(axis=-1, keepdims=True), _SMALLEST) / _LARGEST[mode]
    scaled = wide / scale
    if mode == "fp8":
        return mx.from_fp8(mx.to_fp8(scaled), mx.float32), scale
    return mx.clip(mx.round(scaled), -127, 127), scale


def require_mode(mode: object) -> None:
    """Raise InputError unless `mode` is one of INPUT_MODES."""
    if not isinstance(mode, str) or mode not in INPUT_MODES:
        raise InputError(f"input quantization {mode!r:.200} is not known; known are {', '.join(INPUT_MODES)}")


def require_width(path: str, width: int, mode: str) -> None:
    """Raise InputError, which names the layer at `path`, where inputs of `width` cannot be rounded so."""
    if mode in MODES and width % _WIDTH:
        raise InputError(
            f"{path}: input width {width} is not divisible by {_WIDTH}, which {mode} needs; use int8 or fp8"
        )


class RoundedInput(nn.Module):
    """What is put before the class of a linear layer so that its input is rounded; `input_mode` says how."""

    input_mode: str

    def __call__(self, x: mx.array) -> mx.array:
        rounded, scale = codes(x, self.input_mode)
        y = super().__call__(rounded)
        if scale is not None:
            bias = self.get("bias")
            y = y * scale if bias is None else (y - bias) * scale + bias
        return y.astype(x.dtype)


def rounded(layer: Any, mode: str) -> Any:
    """The linear layer, packed or not, with its input rounded; it shares the arrays of `layer`."""
    own: Any = type(layer)
    kind = _rounding(own)
    new = kind.__new__(kind)
    new.__dict__.update({name: set(v) if isinstance(v, set) else v for name, v in layer.__dict__.items()})
    dict.update(new, layer)
    object.__setattr__(new, "input_mode", mode)
    return new


def like(old: Any, new: Any) -> Any:
    """`new`, a layer made from `old`, with its input rounded if that of `old` is."""
    return rounded(new, old.input_mode) if mode_of(old) is not None and mode_of(new) is None else new


def mode_of(layer: object) -> str | None:
    """How the layer rounds its input; None where it takes it as it is."""
    return layer.input_mode if isinstance(layer, RoundedInput) else None


@cache
def _rounding(kind: type) -> Any:
    """The class of linear layers `kind` with its input rounded."""
    if issubclass(kind, RoundedInput):
        return kind
    return type(f"{kind.__name__}OfRoundedInput", (RoundedInput, kind), {"__doc__": kind.__doc__})
