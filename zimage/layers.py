"""Linear layers and what is done to them: copied, packed, given a low-rank update, joined by rows and split again."""

from typing import Any, TypeVar

from zimage import rounding
from zimage.caching import OfOneModel
from zimage.errors import InputError
from zimage.kernels import QuantizedLinear
from zimage.kernels.native import dtype_name
from zimage.quantization import Quantization

import mlx.core as mx
import mlx.nn as nn

_T = TypeVar("_T")
LINEAR = (nn.Linear, nn.QuantizedLinear)


class AdaptedLinear(QuantizedLinear):
    """A quantized layer with a low-rank update beside it: y = layer(x) + (x lora_down^T) lora_up^T.

    lora_down [R, in] and lora_up [out, R] hold several updates one after the other; the layer is otherwise as it was.
    `ranks` says how R is shared out to the projections that were fused into this layer.
    """

    def __init__(self, layer: QuantizedLinear, down: mx.array, up: mx.array, ranks: tuple[int, ...] = ()) -> None:
        nn.Module.__init__(self)
        adopt(self, layer, without=())
        self.lora_down, self.lora_up = down, up
        self.freeze()
        object.__setattr__(self, "ranks", ranks)  # MLX would take a tuple for parameters

    def __call__(self, x: mx.array) -> mx.array:
        inner = x @ self.lora_down.T.astype(x.dtype)
        return super().__call__(x) + inner @ self.lora_up.T.astype(x.dtype)

    def without_update(self) -> QuantizedLinear:
        """The quantized layer alone."""
        layer = QuantizedLinear.__new__(QuantizedLinear)
        adopt(layer, self, without=("lora_down", "lora_up"))
        return layer


def packed(linear: nn.Linear, wanted: Quantization) -> QuantizedLinear:
    """The layer with packed weights, unevaluated. Raises ValueError where MLX cannot pack it so."""
    return rounding.like(linear, QuantizedLinear.from_linear(linear, wanted.group_size, wanted.bits, mode=wanted.mode))


def input_width(layer: Any) -> int:
    """How many values a linear layer takes, packed or not."""
    packed = isinstance(layer, nn.QuantizedLinear)
    return int(layer.scales.shape[1] * layer.group_size if packed else layer.weight.shape[1])


def clone(value: _T) -> _T:
    """A copy of a module, or of a list or dict of modules, whose arrays are the same objects."""
    if isinstance(value, nn.Module):
        new = value.__class__.__new__(value.__class__)
        dict.update(new, {k: clone(v) for k, v in value.items()})
        new.__dict__.update({k: _own(v) for k, v in value.__dict__.items()})
        return new
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [clone(v) for v in value]  # type: ignore[return-value]
    return value


def _own(value: Any) -> Any:
    """An attribute as a copy has it: what a model has kept is of its own weights."""
    if isinstance(value, OfOneModel):
        return value.fresh()
    return set(value) if isinstance(value, set) else value


def alike(one: Any, other: Any) -> bool:
    """Whether two modules, or what they hold, are of one kind with the same arrays: the same objects, not equal ones.

    What a model has kept or counted for itself is no difference.
    """
    if isinstance(one, (mx.array, OfOneModel)) or type(one) is not type(other):
        return one is other or (isinstance(one, OfOneModel) and type(one) is type(other))
    if isinstance(one, nn.Module) and not alike(one.__dict__, other.__dict__):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def as_class(kind: type[_T], module: nn.Module) -> _T:
    """A module of class `kind` with the attributes and children of `module`."""
    new = kind.__new__(kind)
    adopt(new, module, without=())
    return new


def adopt(new: nn.Module, old: nn.Module, without: tuple[str, ...]) -> None:
    """Make `new`, an empty module, have the attributes and children of `old` but for some."""
    new.__dict__.update(clone(old).__dict__)
    dict.update(new, {name: child for name, child in old.items() if name not in without})


def stack_rows(layers: list[Any]) -> Any:
    """One linear layer whose output is the outputs of `layers`, one after the other."""
    first = layers[0]
    for other in layers[1:]:
        if _kind(other) != _kind(first):
            raise InputError(
                "projections of one fused group must be stored alike, "
                f"found {_kind(first)} beside {_kind(other)}; quantize them the same way or not at all"
            )
    bare = [_bare(layer) for layer in layers]
    fused = clone(bare[0])
    for name, array in fused.items():
        if isinstance(array, mx.array):
            fused[name] = mx.concatenate([layer[name] for layer in bare], axis=0)
    ranks = [layer.lora_down.shape[0] if isinstance(layer, AdaptedLinear) else 0 for layer in layers]
    if not any(ranks):
        return fused
    # Each part's output takes its own part of the inner activations only: a block-diagonal lora_up.
    downs = [layer.lora_down for layer in layers if isinstance(layer, AdaptedLinear)]
    ups, before = [], 0
    for layer, rank in zip(layers, ranks, strict=True):
        up = layer.lora_up if rank else mx.zeros((layer.scales.shape[0], 0), downs[0].dtype)
        ups.append(mx.pad(up, [(0, 0), (before, sum(ranks) - before - rank)]))
        before += rank
    joint = AdaptedLinear(fused, mx.concatenate(downs, axis=0), mx.concatenate(ups, axis=0), tuple(ranks))
    return rounding.like(first, joint)


def split_rows(fused: Any, rows: list[int]) -> list[Any]:
    """The linear layers that `stack_rows` made one of, with `rows` outputs each."""
    bare, ranks = _bare(fused), fused.ranks if isinstance(fused, AdaptedLinear) else (0,) * len(rows)
    layers = []
    row = column = 0
    for count, rank in zip(rows, ranks, strict=True):
        layer = clone(bare)
        for name, array in bare.items():
            if isinstance(array, mx.array):
                layer[name] = array[row : row + count]
        if rank:
            inner = slice(column, column + rank)
            layer = AdaptedLinear(layer, fused.lora_down[inner], fused.lora_up[row : row + count, inner])
        layers.append(rounding.like(fused, layer))
        row, column = row + count, column + rank
    return layers


def _bare(layer: Any) -> Any:
    return layer.without_update() if isinstance(layer, AdaptedLinear) else layer


def _kind(layer: Any) -> str:
    mode = rounding.mode_of(layer)
    rounds = "" if mode is None else f", input rounded to {mode}"
    if isinstance(layer, nn.QuantizedLinear):
        return (
            f"{layer.mode} {layer.bits} bits, group {layer.group_size}, scales {dtype_name(layer.scales.dtype)}{rounds}"
        )
    return dtype_name(layer.weight.dtype) + rounds
