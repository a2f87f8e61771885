"""The autotuner of linear layers: every way gives the same product, and the choice between them follows the times."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage import arms, backend, blas, choices, fusing, inputs, layers, transforms, tuning
from zimage.choices import FLOATING, PACKED, Choice, Product
from zimage.errors import InputError, MeasurementError
from zimage.inputs import Inputs
from zimage.quantization import Quantization
from zimage.transformer import Transformer
from zimage.weights import load_transformer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = "synthetic:small"
LONG = Product("float32", "float32", 1056, 64, 32)
few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "cache_folder", lambda: tmp_path)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_transformer(SOURCE, "float32")


@pytest.fixture(scope="module")
def example(model: Transformer) -> Inputs:
    return inputs.example(model, SOURCE, 32, 32, 2, 5, 0)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> "Simulated":
    return Simulated(monkeypatch)


class Simulated:
    """A clock on which each way takes the seconds it is told, with a little noise, and a count of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.first: Counter[str] = Counter()  # seconds more in the first call of a way
        self._patch, self._now, self._rng = monkeypatch, 0.0, random.Random(0)

    def takes(self, **seconds: float) -> None:
        """Ways with underscores for spaces; "unpacked__rows_split" is "unpacked, rows split"."""
        for name, value in seconds.items():
            way = name.replace("__", ", ").replace("_", " ")
            self._patch.setitem(tuning.WAYS, way, self._way(way, value))

    def _way(self, name: str, seconds: float) -> tuning.Way:
        def way(_layer: Any, x: mx.array) -> mx.array:
            self.calls[name] += 1
            self._now += seconds + (self.first[name] if self.calls[name] == 1 else 0)
            return x

        return way

    def clock(self, work: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            before = self._now
            work()
            return (self._now - before) * self._rng.gauss(1, 0.003)

        return call

    def measure(self, product: Product = LONG, layer: Any = None, **options: Any) -> tuning.Measured:
        return tuning.measure(product, [layer or nn.Linear(64, 32, bias=False)], clock=self.clock, **options)


def close(found: mx.array, wanted: mx.array) -> bool:
    """Equal to the rounding of sums in another order, in fp32."""
    scale = float(np.sqrt(np.mean(np.square(np.array(wanted))))) + 1e-6
    return found.shape == wanted.shape and bool(
        np.allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-4 * scale)
    )


@given(
    st.sampled_from([1, 31, 127, 128, 129, 1023, 1024, 1025, 1056, 2081]) | st.integers(1, 1200),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
@few
def test_every_way_gives_the_same_product(
    length: int, batch: int, groups: int, outputs: int, bias: bool, seed: int
) -> None:
    """Whole, split and padded; unpacked or packed: the same values to rounding, for any rows, batch and bias."""
    rng = np.random.default_rng(seed)
    linear = nn.Linear(32 * groups, outputs, bias=bias)
    linear.weight = mx.array(rng.standard_normal((outputs, 32 * groups)).astype(np.float32))
    x = mx.array(rng.standard_normal((batch, length, 32 * groups)).astype(np.float32))
    wanted = linear(x)
    assert all(close(tuning.WAYS[way](linear, x), wanted) for way in FLOATING)
    packed = layers.packed(linear, Quantization("affine", 4, 32))
    wanted = packed(x)
    assert all(close(tuning.WAYS[way](packed, x), wanted) for way in PACKED)


@pytest.mark.parametrize("mode", [("affine", 8, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)], ids=str)
def test_every_packing_has_all_ways(mode: tuple[Any, int, int]) -> None:
    """MLX's other modes, which have no biases, too."""
    linear = nn.Linear(64, 32, bias=False)
    packed, x = layers.packed(linear, Quantization(*mode)), mx.random.normal((2, 700, 64), key=mx.random.key(1))
    assert all(close(tuning.WAYS[way](packed, x), packed(x)) for way in PACKED)


def test_all_known_ways_can_be_computed() -> None:
    """What a file of choices may name is what there is."""
    assert set(tuning.WAYS) == {*FLOATING, *PACKED}


def test_the_products_of_a_step(model: Transformer, example: Inputs) -> None:
    """Every linear layer of every block is found, once for each number of rows, and nothing is computed for it."""
    fused = transforms.submit_early(transforms.compile_blocks(transforms.fuse_qkv(model)))
    found = tuning.products(fused, example)
    config = model.config
    assert {(p.weights, p.dtype) for p in found} == {("float32", "float32")}
    qkv = [p for p in found if p.outputs == (config.n_heads + 2 * config.n_kv_heads) * config.head_dim]
    tokens = (32 // 16) ** 2  # of an image; it and the caption of five are padded to 32
    assert tokens <= 32 and {p.rows for p in qkv} == {2 * 32, 2 * 64}
    held = {id(layer) for layers in found.values() for layer in layers}
    all_linear = {
        id(m) for _, block in transforms.blocks(fused) for m in block.modules() if isinstance(m, layers.LINEAR)
    }
    unmodulated = {id(m) for block in fused.context_refiner for m in block.modules()}
    assert held == all_linear and held & unmodulated


def test_emulated_layers_are_left_alone(model: Transformer, example: Inputs) -> None:
    """Layers that round their input have times that mean nothing, so they are not tuned."""
    assert tuning.products(transforms.quantize_input(model, "int8"), example) == {}


@pytest.mark.parametrize(
    ("rows", "ways"),
    [
        (1, ["whole"]),
        (128, ["whole"]),
        (130, ["whole", "padded"]),
        (1024, ["whole"]),
        (1056, ["whole", "rows split", "padded"]),
        (4096, ["whole"]),
        (4128, ["whole", "rows split", "padded"]),
    ],
)
def test_ways_are_tried_where_they_differ(rows: int, ways: list[str]) -> None:
    """Rows that are a multiple already are neither split nor padded."""
    layer = nn.Linear(64, 32, bias=False)
    assert tuning.ways_of(tuning.product_of(layer, rows, mx.float32), layer) == ways


def test_what_compiles_for_long_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a packed product of many rows is left out unless everything is to be tried; elsewhere it never is."""
    packed = layers.packed(nn.Linear(64, 32, bias=False), Quantization("affine", 4, 64))

    def tried(rows: int, everything: bool = False) -> bool:
        return "packed" in tuning.ways_of(tuning.product_of(packed, rows, mx.bfloat16), packed, everything)

    assert tried(4096)
    monkeypatch.setattr(backend, "kind", lambda: "cuda")
    assert tried(64) and not tried(65) and tried(65, everything=True)
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    assert tuning.ways_of(tuning.product_of(packed, 4096, mx.bfloat16), packed) == ["packed", "unpacked"]


def test_a_clear_gain_is_chosen(simulated: Simulated) -> None:
    """A way that takes a tenth less time is taken, with its ratio; all that were tried are named."""
    simulated.takes(whole=0.01, rows_split=0.009, padded=0.012)
    choice = simulated.measure().choice
    assert (choice.way, choice.baseline, choice.tried) == ("rows split", "whole", ("whole", "rows split", "padded"))
    assert choice.low <= 0.9 <= choice.high and choice.quads >= 10


@pytest.mark.parametrize("split", [0.00995, 0.0101, 0.0099])
def test_the_simplest_stays_for_little(split: float, simulated: Simulated) -> None:
    """A gain below two per cent is not worth another way."""
    simulated.takes(whole=0.01, rows_split=split, padded=0.02)
    choice = simulated.measure().choice
    assert (choice.way, choice.ratio) == ("whole", 1.0)


def test_the_simplest_of_the_fastest_is_chosen(simulated: Simulated) -> None:
    """Of two ways that are about as fast the one named first is taken."""
    simulated.takes(whole=0.01, rows_split=0.0081, padded=0.008)
    assert simulated.measure().choice.way == "rows split"
    simulated.takes(padded=0.007)
    assert simulated.measure().choice.way == "padded"


def test_a_hopeless_way_is_called_once(simulated: Simulated) -> None:
    """On a CPU what takes fifty times as long in its first call is not called again, and is still named as tried."""
    simulated.takes(unpacked=0.01, packed=0.5, unpacked__rows_split=0.0099)
    packed = layers.packed(nn.Linear(64, 32, bias=False), Quantization("affine", 4, 64))
    found = simulated.measure(tuning.product_of(packed, 1056, mx.float32), packed)
    assert simulated.calls["packed"] == 1 and "packed" in found.choice.tried
    assert set(found.comparisons) == {"unpacked, rows split"} and found.choice.way == "unpacked"


def test_a_first_call_that_compiles_is_forgiven(simulated: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a slow first call says nothing; the second does."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    simulated.takes(whole=0.01, rows_split=0.005, padded=0.01)
    simulated.first["rows split"] = 3.0
    assert simulated.measure().choice.way == "rows split"


@pytest.mark.parametrize(("split", "way"), [(20.0, "whole"), (12.0, "whole"), (2.0, "rows split")])
def test_a_slow_product_is_chosen_by_single_calls(split: float, way: str, simulated: Simulated) -> None:
    """Where quads would take minutes a way must be four times as fast in a single call."""
    simulated.takes(whole=20.0, rows_split=split, padded=21.0)
    found = simulated.measure(budget_s=30)
    assert found.comparisons == {} and sum(simulated.calls.values()) <= 6
    assert (found.choice.way, found.choice.quads) == (way, 0)


def test_short_products_share_a_call(simulated: Simulated) -> None:
    """A timed call holds as many products as it takes to be some milliseconds long, eight at most."""
    simulated.takes(whole=1e-4, rows_split=1e-4, padded=1e-4)
    looks = simulated.measure().looks_s
    assert looks["whole"] < 1.1e-4
    assert (simulated.calls["whole"] - 2) % 8 == 0


def test_a_device_that_fails_is_one_line(simulated: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX raises on the way is a MeasurementError that names the product."""

    def fails(_layer: Any, _x: mx.array) -> mx.array:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(tuning.WAYS, "padded", fails)
    with pytest.raises(MeasurementError, match="1056 x 64 to 32 could not be compared: out of memory"):
        simulated.measure()


def choosing(monkeypatch: pytest.MonkeyPatch, way: str) -> list[Product]:
    """Let every measurement prefer this way where it is tried; gives the list of what is measured."""
    asked: list[Product] = []

    def measure(product: Product, layers: Any, **_options: Any) -> Any:
        names = tuning.ways_of(product, layers[0])
        asked.append(product)
        choice = Choice(way if way in names else names[0], names[0], 0.5, 0.4, 0.6, 10, tuple(names))
        return type("Found", (), {"choice": choice})()

    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "default_canary", lambda: lambda: 0.02)
    return asked


def test_a_product_is_measured_once(model: Transformer, example: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time choices come from the cache folder; other shapes are measured, and all again if so asked."""
    asked = choosing(monkeypatch, "padded")
    long = inputs.example(model, SOURCE, 32, 32, 5, 5, 0)
    first = tuning.tune(model, long)
    assert set(asked) == set(first) and {p.rows for p in asked} == {160, 320}
    assert tuning.tune(model, long) == first
    assert len(asked) == len(first)
    assert tuning.tune(model, example) == {}
    assert tuning.tune(model, long, again=True) == first and len(asked) == 2 * len(first)
    assert choices.in_force(backend.device_facts()) == "as first measured"


@pytest.mark.parametrize("way", ["padded", "unpacked, rows split", "packed", "unpacked"])
@pytest.mark.parametrize("packing", [None, "4bit-g32"])
def test_a_tuned_model_computes_the_same(
    way: str, packing: str | None, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is chosen, the velocity is the same to rounding, the arrays are shared and the argument is as it was."""
    choosing(monkeypatch, way)
    plain = transforms.fuse_qkv(model)
    plain = transforms.quantize(plain, packing) if packing else plain
    example = inputs.example(plain, SOURCE, 32, 32, 5, 5, 0)
    before = plain(*example)
    tuned = tuning.tuned(plain, example)
    calls: Counter[str] = Counter()
    for _, block in transforms.blocks(tuned):
        for layer in block.modules():
            calls.update(
                name for own in layer.__dict__.get("ways", {}).values() for name, w in tuning.WAYS.items() if w is own
            )
    expected = way in (PACKED if packing else FLOATING) and "split" not in way  # 320 rows are none to split
    assert (calls[way] > 0) == expected
    assert close(tuned(*example), before) and mx.array_equal(plain(*example), before)
    assert not any("ways" in layer.__dict__ for layer in plain.modules())
    shared = dict(nn.utils.tree_flatten(plain.parameters()))
    assert all(shared[name] is array for name, array in nn.utils.tree_flatten(tuned.parameters()))
    other = inputs.example(plain, SOURCE, 64, 32, 1, 5, 0)  # rows that nothing was chosen for
    assert mx.array_equal(tuned(*other), plain(*other))


def test_a_choice_without_its_kernel_is_the_plain_form(model: Transformer) -> None:
    """Where a kept choice names our kernel and this process doesn't trust it, weights are unpacked by MLX."""
    packed = transforms.quantize(model, "4bit-g32")
    example = inputs.example(packed, SOURCE, 32, 32, 5, 5, 0)
    chosen = Choice("unpacked wide", "unpacked", 0.5, 0.4, 0.6, 10, ("unpacked", "unpacked wide"))
    found = tuning.products(packed, example)
    choices.keep(backend.device_facts(), {str(product): chosen for product in found})
    tuned = tuning.tuned(packed, example)
    ways = {way for layer in tuned.layers[0].modules() for way in layer.__dict__.get("ways", {}).values()}
    assert ways == {tuning.WAYS["unpacked"]}
    assert close(tuned(*example), packed(*example))


def test_a_tuned_model_goes_through_the_other_transforms(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, packed, with kernels and compiled afterwards, it still computes what it should."""
    choosing(monkeypatch, "padded")
    example = inputs.example(model, SOURCE, 32, 32, 5, 5, 0)
    tuned = tuning.tuned(model, example)
    assert isinstance(tuned.layers[0].attention.to_q, tuning.TunedLinear)
    for transform in (transforms.fuse_qkv, transforms.fuse_gate_up, fusing.fuse_swiglu, transforms.compile_blocks):
        tuned = transform(tuned)
        assert close(tuned(*example), model(*example))
    packed = transforms.quantize(tuned, "8bit-g32")
    assert close(packed(*example), transforms.quantize(model, "8bit-g32")(*example))
    assert set(transforms.tensors(tuned)) == set(transforms.tensors(model))


def test_a_float16_model_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are those of half precision, and computed another way they stay within that precision."""
    asked, model = choosing(monkeypatch, "padded"), load_transformer("synthetic:tiny", "float32")
    example = inputs.example(model, "synthetic:tiny", 32, 32, 5, 5, 0)
    half = transforms.float16(model, example)
    tuned = tuning.tuned(half, example)
    assert {(product.weights, product.dtype) for product in asked} == {("float16", "float16")}
    wanted, found = (np.array(one(*example).astype(mx.float32)) for one in (half, tuned))
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_tuning_needs_to_know_a_step(model: Transformer) -> None:
    """Without an example there are no row counts: refused, with what to give."""
    with pytest.raises(InputError, match="give an example"):
        tuning.tuned(model)
    with pytest.raises(InputError, match="give an example"):
        arms.transformed(model, ["tuned"])


def test_an_arm_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, an arm's step is tuned for its own inputs, with the layers that transforms before it left."""
    asked = choosing(monkeypatch, "padded")
    sizes = {"height": 32, "width": 32, "batch": 5, "caption_tokens": 5}
    plain = arms.step(SOURCE, "float32", None, ["fuse_qkv"], **sizes)()
    assert close(arms.step(SOURCE, "float32", None, ["fuse_qkv", "tuned"], **sizes)(), plain)
    config = load_transformer(SOURCE).config
    assert (config.n_heads + 2 * config.n_kv_heads) * config.head_dim in {product.outputs for product in asked}


def test_the_tuner_measures_on_this_device() -> None:
    """With the real clock a small product is compared and its choice is one of its ways."""
    layer = nn.Linear(64, 32, bias=False)
    product = tuning.product_of(layer, 1030, mx.float32)
    found = tuning.measure(product, [layer], quads=10)
    assert found.choice.way in tuning.ways_of(product, layer) and all(s > 0 for s in found.looks_s.values())
    assert found.floor is None or found.floor.quads == 10
