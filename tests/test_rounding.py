"""Rounded activations: which values come out, where they enter, and that the rest of the model stays as it was."""

from typing import Any

from tests.loras import named, pairs
from tests.synthetic import synthetic
from tests.test_packings import fused, relative_error
from tests.test_recipes import WIDE
from tests.test_transforms import arrays, run, same_bits
from zimage import arms, recipes, rounding, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.kernels import QuantizedLinear
from zimage.rounding import INPUT_MODES, codes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

every_mode = pytest.mark.parametrize("mode", INPUT_MODES)
E4M3 = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32))
ROWS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 32, 64])),
    elements=st.floats(-1e4, 1e4, width=32),
)  # fmt: skip


def activations(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    """Normal values with tokens of very different sizes."""
    sizes = mx.exp(mx.random.normal((*shape[:-1], 1), key=mx.random.key(seed + 1)))
    return (mx.random.normal(shape, key=mx.random.key(seed)) * sizes).astype(dtype)


def layer_of(width: int = 64, rows: int = 48, bias: bool = True, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    layer = nn.Linear(width, rows, bias=bias)
    layer.weight = mx.random.normal((rows, width), key=mx.random.key(5)).astype(dtype)
    if bias:
        layer.bias = mx.random.normal((rows,), key=mx.random.key(6)).astype(dtype)
    return layer


@settings(max_examples=80)
@given(ROWS)
def test_int8_is_the_nearest_of_255_values(x: np.ndarray) -> None:
    """Each token's values are the nearest multiples of its largest magnitude over 127, at most half a step away."""
    found, scale = codes(mx.array(x), "int8")
    assert scale is not None
    values, step = np.array(found, np.float64), np.array(scale, np.float64)
    assert np.array_equal(values, np.round(values)) and np.abs(values).max() <= 127
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert np.allclose(step[largest > 0], largest[largest > 0] / 127, rtol=1e-6)
    assert (np.abs(values * step - x) <= step * (0.5 + 1e-4)).all()


@settings(max_examples=80)
@given(ROWS)
def test_fp8_is_the_nearest_e4m3_value(x: np.ndarray) -> None:
    """Each token is scaled to 448 and its values are the nearest of the 8-bit format with 4 bits of exponent."""
    found, scale = codes(mx.array(x), "fp8")
    assert scale is not None
    scaled = x.astype(np.float64) / np.array(scale, np.float64)
    known = E4M3[np.isfinite(E4M3)].astype(np.float64)
    nearest = np.abs(scaled[..., None] - known).min(axis=-1)
    off = np.abs(np.array(found, np.float64) - scaled)
    assert np.isin(np.array(found), E4M3).all()
    assert (off <= nearest * (1 + 1e-5) + 1e-4 * np.abs(scaled) + 1e-9).all()


def test_halves_go_to_even() -> None:
    """A value half-way between two int8 values becomes the even one."""
    found, _ = codes(mx.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), "int8")
    assert found.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
def test_mlx_formats_round_as_mlx_packs(mode: str) -> None:
    """In MLX's own formats the activations are what its packing of them holds."""
    x = activations((5, 64), mx.bfloat16)
    packing = recipes.read(mode).default
    assert packing is not None
    packed = mx.quantize(x, group_size=packing.group_size, bits=packing.bits, mode=mode)
    wanted = mx.dequantize(*packed, None, packing.group_size, packing.bits, mode, dtype=mx.float32)
    found, scale = codes(x, mode)
    assert scale is None and bool(mx.array_equal(found, wanted))


@every_mode
def test_zeros_stay_zeros_and_tokens_do_not_mix(mode: str) -> None:
    """A token of zeros gives zeros, a bad one spoils itself only, and the others don't depend on their neighbours."""
    x = activations((3, 64))
    alone, scale = codes(x[1:2], mode)
    zeros, _ = codes(mx.zeros((2, 64)), mode)
    assert not zeros.any().item()
    spoilt = mx.concatenate([mx.full((1, 64), mx.nan), x[1:2], mx.zeros((1, 64)) + 1e30], axis=0)
    found, scales = codes(spoilt, mode)
    assert bool(mx.array_equal(found[1], alone[0]))
    assert scale is None or (scales is not None and bool(mx.array_equal(scales[1], scale[0])))


@every_mode
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packing", [None, "4bit-g32", "mxfp8"])
def test_the_layer_multiplies_the_rounded_input(mode: str, bias: bool, packing: str | None) -> None:
    """A layer of rounded input gives, in fp32, what the layer itself gives for values times scale; bias stays exact."""
    layer: Any = layer_of(bias=bias)
    if packing is not None:
        wanted = recipes.read(packing).default
        assert wanted is not None
        layer = QuantizedLinear.from_linear(layer, wanted.group_size, wanted.bits, mode=wanted.mode)
    x = activations((2, 7, 64))
    values, scale = codes(x, mode)
    found = rounding.rounded(layer, mode)(x)
    assert relative_error(found, layer(values if scale is None else values * scale)) < 1e-5
    assert relative_error(found, layer(x)) > 1e-3
    zero = rounding.rounded(layer, mode)(mx.zeros((1, 64)))
    assert np.allclose(np.array(zero), np.array(layer(mx.zeros((1, 64)))), atol=1e-6)


@every_mode
def test_in_bfloat16_only_input_and_result_are_rounded(mode: str) -> None:
    """In bf16 the result is that in fp32, rounded once."""
    layer, x = layer_of(dtype=mx.bfloat16), activations((9, 64), mx.bfloat16)
    wide = layer_of()
    wide.weight, wide.bias = layer.weight.astype(mx.float32), layer.bias.astype(mx.float32)
    found = rounding.rounded(layer, mode)(x)
    assert found.dtype == mx.bfloat16
    exact = rounding.rounded(wide, mode)(x.astype(mx.float32))
    assert relative_error(found, exact) < 2.0**-8


@every_mode
def test_every_linear_layer_of_the_blocks_rounds(mode: str) -> None:
    """All linear layers of all blocks round their input, no other does, arrays are shared, and the argument is kept."""
    model = synthetic(WIDE)
    before, output = arrays(model), run(model)
    rounds = transforms.quantize_input(model, mode)
    modes = {path: rounding.mode_of(m) for path, m in rounds.named_modules() if isinstance(m, nn.Linear)}
    assert {path for path, own in modes.items() if own == mode} == set(recipes.packing(WIDE, "4bit"))
    assert all(arrays(rounds)[name] is array for name, array in before.items()) and set(arrays(rounds)) == set(before)
    assert bool(mx.array_equal(run(model), output))
    assert not any(rounding.mode_of(module) for module in model.modules())
    error = relative_error(run(rounds), output)
    assert {"int8": 0.001, "fp8": 0.005, "mxfp8": 0.005, "nvfp4": 0.02}[mode] < error < 0.4


def test_it_says_that_it_is_emulated() -> None:
    """A model says how its activations are rounded and that it is emulated, and so do the names of its arms."""
    model = synthetic(WIDE)
    assert transforms.input_quantization_of(model) is None
    rounds = transforms.quantize_input(model)
    assert transforms.input_quantization_of(rounds) == {"mode": "int8", "emulated": True}
    names = [name for name in arms.TRANSFORMS if "input" in name]
    assert names == [f"quantize_input_{mode}_emulated" for mode in INPUT_MODES]
    assert bool(mx.array_equal(run(arms.transformed(model, [names[0]])), run(rounds)))


@every_mode
def test_it_goes_with_the_other_transforms(mode: str) -> None:
    """Before or after fusing, packing and unfusing, the same layers round alike and hold the same bits."""
    plain = synthetic(WIDE)
    rounds = transforms.quantize_input(plain, mode)
    for change in (
        fused,
        lambda model: transforms.quantize(model, "4bit"),
        lambda model: transforms.unfuse(fused(model)),
    ):
        after, before = transforms.quantize_input(change(plain), mode), change(rounds)
        assert same_bits(arrays(after), arrays(before))
        assert bool(mx.array_equal(run(after), run(before)))
        assert transforms.input_quantization_of(before) == {"mode": mode, "emulated": True}
    assert relative_error(run(fused(rounds)), run(rounds)) < 0.02


def test_a_lora_beside_packed_weights_sees_the_rounded_input(tmp_path: Any) -> None:
    """A LoRA update beside packed weights may come before or after, fused or not: the layer rounds for both."""
    file = tmp_path / "lora.safetensors"
    save_file(named(pairs(WIDE, only="layers.0.attention")), file)
    packed = transforms.quantize(synthetic(WIDE), "4bit")
    after = transforms.quantize_input(transforms.adapt(packed, [(file, 1.0)]))
    before = transforms.adapt(transforms.quantize_input(packed), [(file, 1.0)])
    assert bool(mx.array_equal(run(after), run(before)))
    assert not bool(mx.array_equal(run(after), run(transforms.quantize_input(packed))))
    for model in (fused(after), transforms.unfuse(fused(after))):
        linears = [m for _, block in transforms.blocks(model) for m in block.modules() if hasattr(m, "scales")]
        assert {rounding.mode_of(layer) for layer in linears} == {"int8"}
        assert relative_error(run(model), run(after)) < 0.02


def test_parts_that_round_differently_are_not_fused() -> None:
    """A fused product takes one input, so its parts must round alike."""
    model = transforms.quantize_input(synthetic(WIDE))
    model.layers[0].attention.to_v = synthetic(WIDE).layers[0].attention.to_v
    with pytest.raises(InputError, match="found float32, input rounded to int8 beside float32; quantize them the same"):
        transforms.fuse_qkv(model)


def test_saving_keeps_the_weights_only(tmp_path: Any) -> None:
    """A checkpoint holds the weights and no rounding of activations."""
    model = transforms.quantize(synthetic(WIDE), "4bit")
    folder = weights.save_transformer(transforms.quantize_input(model), tmp_path / "a")
    back = weights.load_transformer(folder)
    assert same_bits(arrays(back), arrays(model)) and transforms.input_quantization_of(back) is None


@pytest.mark.parametrize("mode", ["int4", "", None, 8, ["int8"], "INT8"], ids=repr)
def test_other_modes_are_refused(mode: Any) -> None:
    """An unknown mode is one line that lists those there are."""
    with pytest.raises(InputError, match=r"is not known; known are int8, fp8, mxfp8, nvfp4") as caught:
        transforms.quantize_input(synthetic(WIDE), mode)
    assert str(caught.value).isprintable()


def test_rounding_twice_and_widths_that_do_not_fit_are_refused() -> None:
    """Layers round once, and a format that does not divide an input's width is refused with both."""
    with pytest.raises(InputError, match=r"^noise_refiner\.0\.\S+ rounds its input already, to int8"):
        transforms.quantize_input(transforms.quantize_input(synthetic(WIDE)), "fp8")
    narrow = synthetic(TransformerConfig.tiny(dim=48, n_heads=3, axes_dims=(4, 6, 6)))
    with pytest.raises(InputError, match=r"^noise_refiner\.0\.\S+: input width 48 is not divisible by 32, which nvfp4"):
        transforms.quantize_input(narrow, "nvfp4")
    assert np.isfinite(np.array(run(transforms.quantize_input(narrow, "int8")))).all()
