"""The ways a linear layer's product can be computed, which of them is fastest here, and a model that takes it.

Which way wins is a property of device, row count and shape, so it is measured, once: `tune` finds the products of a
model's step, compares the ways of each in quads, and keeps the choices (`choices`) in the user's cache folder.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from zimage import backend, kernels, rounding
from zimage.choices import FLOATING, PACKED, Choice, Product, keep, kept
from zimage.errors import InputError, MeasurementError
from zimage.kernels.native import dtype_name, platform
from zimage.kernels.packed import DEQUANTIZE
from zimage.layers import LINEAR, as_class, clone, input_width
from zimage.measure.canary import default_canary
from zimage.measure.comparison import Comparison, compare_many
from zimage.measure.floor import NoiseFloor, noise_floor
from zimage.measure.samples import Timed
from zimage.measure.timing import timed
from zimage.transformer import Transformer
from zimage.transforms import blocks, require_loaded

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

Way = Callable[[Any, mx.array], mx.array]  # layer, x [..., in] -> [..., out]
LEAST_GAIN = 0.02  # a way is preferred only where it takes at least so much less time, and simpler ones that near are
HOPELESS = 4.0  # times the baseline: a way that takes this long in its first calls is not compared further
_SPLIT = 1024  # rows before a split are a multiple of this, which fills whole waves of a large GPU's processors
_PAD = 128
_FEW_ROWS = 64  # CUDA compiles a packed product of more rows for a minute or more
_CALL_S = 0.005  # a timed call holds several products where one is shorter, so that submitting it hardly counts
_MOST_IN_A_CALL = 8
_FIRST_LOOK = 10  # quads
_SHORT_LOOKS = 5
_CALLS_A_QUAD = 7  # at most, with the untimed ones


def _rows_split(x: mx.array, weight: mx.array) -> mx.array:
    """The rows up to a multiple of _SPLIT and the rest as two products."""
    rows = x.reshape(-1, x.shape[-1])
    head = _head(rows.shape[0])
    y = mx.concatenate([kernels.product(part, weight) for part in (rows[:head], rows[head:])], axis=0)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _padded(x: mx.array, weight: mx.array) -> mx.array:
    """Rows of zeros up to a multiple of _PAD, and their results cut off again."""
    rows = x.reshape(-1, x.shape[-1])
    y = kernels.product(mx.pad(rows, [(0, -rows.shape[0] % _PAD), (0, 0)]), weight)
    return y[: rows.shape[0]].reshape(*x.shape[:-1], weight.shape[0])


def _head(rows: int) -> int:
    return rows // _SPLIT * _SPLIT


def _floating(product: Callable[[mx.array, mx.array], mx.array]) -> Way:
    def way(layer: Any, x: mx.array) -> mx.array:
        return _biased(layer, product(x, layer.weight))

    return way


def _unpacking(unpack: Callable[..., mx.array], product: Callable[[mx.array, mx.array], mx.array]) -> Way:
    def way(layer: Any, x: mx.array) -> mx.array:
        weight = unpack(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode, x.dtype
        )
        return _biased(layer, product(x, weight))

    return way


def _packed(layer: Any, x: mx.array) -> mx.array:
    biases = layer.get("biases")
    y = mx.quantized_matmul(x, layer.weight, layer.scales, biases, True, layer.group_size, layer.bits, mode=layer.mode)
    return _biased(layer, y)


def _biased(layer: Any, y: mx.array) -> mx.array:
    return y + layer.bias if "bias" in layer else y


WAYS: dict[str, Way] = {
    "whole": _floating(kernels.product),
    "rows split": _floating(_rows_split),
    "padded": _floating(_padded),
    "unpacked": _unpacking(kernels.dequantize, kernels.product),
    "packed": _packed,
    "unpacked, rows split": _unpacking(kernels.dequantize, _rows_split),
    "unpacked wide": _unpacking(DEQUANTIZE, kernels.product),
    "unpacked wide, rows split": _unpacking(DEQUANTIZE, _rows_split),
}


class TunedLinear(kernels.Linear):
    """A floating-point layer that takes a chosen way for some numbers of rows, and is the plain one for all others."""

    ways: Mapping[int, Way]

    def __call__(self, x: mx.array) -> mx.array:
        way = self.ways.get(x.size // x.shape[-1])
        return super().__call__(x) if way is None else way(self, x)


def tuned(model: Transformer, *examples: Sequence[Any]) -> Transformer:
    """The model whose linear layers in blocks are computed the way that is fastest here, the same up to rounding.

    examples: what it will be called with, each (latents [B, C, H, W], timestep [B], captions), as seen by their shapes;
    with other numbers of rows a layer is computed as without this. Chosen as `tune` does, for the layers as they are:
    transforms that fuse or pack them come before. Raises as `tune`.
    """
    require_loaded(model, "tune")
    chosen = tune(model, *examples)
    ways: dict[int, dict[int, Way]] = {}  # by the id of a layer
    for product, layers in products(model, *examples).items():
        for layer in layers if product in chosen else ():
            ways.setdefault(id(layer), {})[product.rows] = WAYS[_usable(layer, product, chosen[product].way)]
    new = clone(model)
    for (_, block), (_, old) in zip(blocks(new), blocks(model), strict=True):
        originals = dict(old.named_modules())

        def taken(path: str, layer: nn.Module, originals: dict[str, nn.Module] = originals) -> nn.Module:
            own = ways.get(id(originals[path]))
            return layer if own is None else _with_ways(layer, own)

        block.update_modules(tree_map_with_path(taken, block.leaf_modules(), is_leaf=nn.Module.is_module))
    return new


def _with_ways(layer: nn.Module, ways: dict[int, Way]) -> nn.Module:
    if not isinstance(layer, kernels.QuantizedLinear):
        ways = {rows: way for rows, way in ways.items() if way is not WAYS["whole"]}  # that is the plain layer's own
        if not ways:
            return layer
        layer = as_class(TunedLinear, layer)
    layer.__dict__["ways"] = ways  # MLX would take a dict for parameters
    return layer


def _usable(layer: Any, product: Product, way: str) -> str:
    """The way, or the one without our kernel where that is not trusted in this process."""
    return way if "wide" not in way or _wide_runs(layer, product) else way.replace("unpacked wide", "unpacked")


def _wide_runs(layer: Any, product: Product) -> bool:
    if platform() is None:
        return False
    sizes = {"mode": layer.mode, "bits": layer.bits, "group_size": layer.group_size}
    return DEQUANTIZE.install({"dtype": product.dtype, **sizes})


def tune(
    model: Transformer,
    *examples: Sequence[Any],
    everything: bool = False,
    again: bool = False,
) -> dict[Product, Choice]:
    """The fastest way for every product of the model's blocks on these examples that has more than one.

    Choices that are kept are taken from there, others measured and kept. again: measure also those. everything: try
    also what compiles for a minute or more, packed products of many rows on CUDA. Raises InputError without examples,
    and as the model does for examples it does not take; MeasurementError where a product fails, as for want of memory.
    """
    if not examples:
        raise InputError("tuning needs to know the shapes of a step: give an example of what the model is called with")
    facts = backend.device_facts()
    known = {} if again else kept(facts)
    chosen, canary = {}, None
    for product, layers in products(model, *examples).items():
        if str(product) in known:
            chosen[product] = known[str(product)]
        elif len(ways_of(product, layers[0], everything)) > 1:
            canary = canary or default_canary()
            chosen[product] = measure(product, layers, everything=everything, canary=canary).choice
            keep(facts, {str(product): chosen[product]})  # now: what follows may be interrupted
    return chosen


def products(model: Transformer, *examples: Sequence[Any]) -> dict[Product, list[Any]]:
    """The products that the linear layers of the model's blocks compute on these examples, each with its layers.

    Layers that round their input are left out: what they compute is emulated. Nothing is computed, shapes are enough.
    """
    found: dict[Product, list[Any]] = {}
    watched = clone(model)
    watched.submission = None  # which would compute the step's parts
    for (_, block), (_, old) in zip(blocks(watched), blocks(model), strict=True):
        originals = dict(old.named_modules())

        def watch(path: str, layer: nn.Module, originals: dict[str, nn.Module] = originals) -> nn.Module:
            tunable = isinstance(layer, LINEAR) and rounding.mode_of(layer) is None
            return _Watched(layer, originals[path], found) if tunable else layer

        block.compiled = False
        block.update_modules(tree_map_with_path(watch, block.leaf_modules(), is_leaf=nn.Module.is_module))
    for example in examples:
        watched(*example)
    return found


class _Watched(nn.Module):
    """A linear layer that notes the products it is asked for."""

    def __init__(self, layer: nn.Module, original: nn.Module, found: dict[Product, list[Any]]) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "note", (original, found))

    def __call__(self, x: mx.array) -> mx.array:
        original, found = self.__dict__["note"]
        layers = found.setdefault(product_of(original, x.size // x.shape[-1], x.dtype), [])
        if not any(layer is original for layer in layers):
            layers.append(original)
        y: mx.array = self.layer(x)
        return y


def product_of(layer: Any, rows: int, dtype: mx.Dtype) -> Product:
    """What a layer computes for so many rows of `dtype`."""
    weights = dtype_name(layer.weight.dtype)
    if isinstance(layer, nn.QuantizedLinear):
        weights = f"{layer.mode} {layer.bits} bits, group {layer.group_size}"
    return Product(weights, dtype_name(dtype), rows, input_width(layer), layer.weight.shape[0])


def ways_of(product: Product, layer: Any, everything: bool = False) -> list[str]:
    """The ways that a layer's product can be computed here, that without tuning first.

    everything: also a packed product of many rows on CUDA.
    """
    splits, cuda = 0 < _head(product.rows) < product.rows, backend.kind() == "cuda"
    if not isinstance(layer, nn.QuantizedLinear):
        pads = product.rows > _PAD and product.rows % _PAD != 0
        left_out = {"rows split": not splits, "padded": not pads}
        return [way for way in FLOATING if not left_out.get(way)]
    wide = _wide_runs(layer, product)
    baseline = "packed" if backend.kind() == "metal" else "unpacked"  # as in kernels.QuantizedLinear
    found = [
        way
        for way in PACKED
        if way != baseline
        and (splits or "rows split" not in way)
        and (wide or "wide" not in way)
        and (way != "packed" or everything or not cuda or product.rows <= _FEW_ROWS)
    ]
    return [baseline, *found]


@dataclass(frozen=True)
class Measured:
    """How the ways of one product compare, and the choice that follows.

    looks_s: seconds of one product by each way, from a few calls; comparisons: of the ways that were not hopeless
    with the baseline, in quads, empty where that would have taken too long. repeats: products in each of their calls.
    """

    product: Product
    baseline: str
    looks_s: dict[str, float]
    repeats: int = 1
    floor: NoiseFloor | None = None
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    @property
    def times_s(self) -> dict[str, float]:
        """Seconds of one product by each way: the median of its samples, or its few calls where it has none."""
        samples: dict[str, list[float]] = {}
        for comparison in self.comparisons.values():
            for sample in comparison.samples:
                if sample.kind == "sample" and not sample.dropped:
                    samples.setdefault(sample.arm, []).append(sample.time_s / self.repeats)
        return {way: median(samples.get(way, [look_s])) for way, look_s in self.looks_s.items()}

    @property
    def choice(self) -> Choice:
        """The simplest way among the fastest; the baseline unless one is faster beyond noise and by LEAST_GAIN."""
        most = 1 - LEAST_GAIN
        if self.comparisons:
            ratios = {n: c.ratio for n, c in self.comparisons.items() if c.verdict == "faster" and c.ratio <= most}
        else:  # single calls, which must be far apart
            ratios = {n: s / self.looks_s[self.baseline] for n, s in self.looks_s.items()}
            ratios = {n: ratio for n, ratio in ratios.items() if ratio <= 1 / HOPELESS}
        tried = tuple(self.looks_s)
        if not ratios:
            return Choice(self.baseline, self.baseline, 1.0, 1.0, 1.0, 0, tried)
        best = min(ratios.values())
        way = next(n for n in FLOATING + PACKED if n in ratios and ratios[n] * most <= best)
        found = self.comparisons.get(way)
        if found is None:
            return Choice(way, self.baseline, ratios[way], 0.0, 1.0, 0, tried)
        return Choice(way, self.baseline, found.ratio, found.low, found.high, found.quads, tried)


def measure(
    product: Product,
    layers: Sequence[Any],
    *,
    seed: int = 0,
    quads: int = 20,
    budget_s: float = 30.0,
    everything: bool = False,
    canary: Timed | None = None,
    clock: Callable[[Callable[[], Any]], Timed] = timed,
) -> Measured:
    """Compare the ways of one product, with the weights of its `layers` going round.

    quads: at most, of each way with the baseline; the comparison is left out where ten of them would take longer than
    `budget_s`. A way that takes HOPELESS times as long as the baseline at first is called no more. Raises
    MeasurementError where the device fails, as for want of memory.
    """
    names = ways_of(product, layers[0], everything)
    layers = list(layers)[:_MOST_IN_A_CALL]

    def call(way: str, x: mx.array, order: Sequence[Any], repeats: int) -> Timed:
        return clock(lambda: [WAYS[way](order[i % len(order)], x) for i in range(repeats)])

    try:
        x, copy = _normal(product, seed), _normal(product, seed)  # the same values in arrays of their own
        looks_s = dict(_looks((name, call(name, x, layers, 1)) for name in names))
        baseline, base_s = names[0], looks_s[names[0]]
        repeats = max(1, min(_MOST_IN_A_CALL, math.ceil(_CALL_S / base_s)))
        rivals = [name for name in names[1:] if looks_s[name] < HOPELESS * base_s]
        expected_s = repeats * _FIRST_LOOK * _CALLS_A_QUAD * sum((base_s + looks_s[name]) / 2 for name in rivals)
        base = call(baseline, x, layers, repeats)
        if not rivals and repeats > 1:  # its time is all there is to know
            looks_s[baseline] = median(base() / repeats for _ in range(_SHORT_LOOKS))
        if not rivals or expected_s > budget_s:
            return Measured(product, baseline, looks_s, repeats)
        pair = base, call(baseline, copy, layers[::-1], repeats)
        floor = noise_floor(*pair, seed=seed, quads=_FIRST_LOOK, canary=canary)
        arms = {name: call(name, x, layers, repeats) for name in rivals}
        found = compare_many(
            base, arms, seed=seed, max_quads=quads, noise_floor=floor, canary=canary, baseline_name=baseline
        )
    except RuntimeError as error:  # MLX's own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MeasurementError(f"the ways of {product} could not be compared: {reason}") from None
    return Measured(product, baseline, looks_s, repeats, floor, found)


def _looks(calls: Iterator[tuple[str, Timed]]) -> Iterator[tuple[str, float]]:
    """Seconds of one call of each way, the first of them the baseline.

    Of two calls the second, but where the first alone is hopeless and no kernel can have been compiled in it.
    """
    compiles = backend.kind() != "cpu"
    base_s: float | None = None
    for name, call in calls:
        look_s = call()
        if compiles or base_s is None or look_s < max(HOPELESS * base_s, 0.1):
            look_s = call()
        base_s = base_s or look_s
        yield name, look_s


def _normal(product: Product, seed: int) -> mx.array:
    shape = (1, product.rows, product.inputs)
    x = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, product.dtype))
    mx.eval(x)
    return x
