"""Every packing that there is: fused exactly, kept exactly, predicted exactly, or refused clearly."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from tests.synthetic import synthetic
from tests.test_recipes import WIDE
from tests.test_weights import arrays, same_bits
from zimage import recipes, sources, transforms, weights
from zimage.analysis import cost, footprint
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.quantization import AFFINE_BITS, AFFINE_GROUPS, MODES, Quantization
from zimage.sources.published import BLOCKS, linears
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PACKINGS = [f"{bits}bit-g{group}" for bits in AFFINE_BITS for group in AFFINE_GROUPS] + list(MODES)
every_packing = pytest.mark.parametrize("name", PACKINGS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


class Models:
    """Synthetic models and their packings, made once for all tests of this file: a change gives another model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.packed = cache(self._packed)
        self.plain = cache(self._plain)
        self.saved = cache(self._saved)

    def _plain(self, dtype: str) -> Transformer:
        return synthetic(WIDE, dtype=getattr(mx, dtype))

    def _packed(self, name: str, dtype: str) -> Transformer:
        model = transforms.quantize(self.plain(dtype), name)
        mx.eval(model.parameters())
        return model

    def _saved(self, dtype: str) -> Path:
        return weights.save_transformer(self.plain(dtype), self._folder / dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("plain"))


def unpacked(layer: Any) -> mx.array:
    """A packed layer's weights as floats."""
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
    )  # fmt: skip


def fused(model: Transformer) -> Transformer:
    return transforms.fuse_gate_up(transforms.fuse_qkv(model))


def relative_error(found: mx.array, wanted: mx.array) -> float:
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    return (mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)).item()


@every_dtype
@every_packing
def test_fused_weights_are_the_separate_ones(name: str, dtype: str, models: Models) -> None:
    """Unpacked, the rows of a fused layer have the bits of the separate layers', one after the other."""
    model = models.packed(name, dtype)
    for (_, plain), (_, joint) in zip(transforms.blocks(model), transforms.blocks(fused(model)), strict=True):
        a, f = plain.attention, plain.feed_forward
        for parts, whole in (
            ((a.to_q, a.to_k, a.to_v), joint.attention.to_qkv),
            ((f.w1, f.w3), joint.feed_forward.w13),
        ):
            assert bool(mx.array_equal(unpacked(whole), mx.concatenate([unpacked(part) for part in parts], axis=0)))


@every_dtype
@every_packing
def test_a_packed_model_is_kept_bit_for_bit(name: str, dtype: str, models: Models, tmp_path: Path) -> None:
    """Saved, also fused, and loaded again, a model has the same bits; so it has when it is packed while loading."""
    model = models.packed(name, dtype)
    back = weights.load_transformer(weights.save_transformer(fused(model), tmp_path / "a"))
    assert same_bits(arrays(back), arrays(model))
    assert transforms.packing_of(back) == recipes.packing(WIDE, name)
    assert same_bits(arrays(weights.load_transformer(models.saved(dtype), dtype, name)), arrays(model))


@every_dtype
@every_packing
def test_bytes_are_predicted(name: str, dtype: str, models: Models) -> None:
    """The cost model, the footprint and `loaded_bytes` predict the model's weights to the byte."""
    model = models.packed(name, dtype)
    whole = sum(array.nbytes for array in arrays(model).values())
    assert cost.whole(cost.step(WIDE, 64, 64, 1, 5, dtype, name)).weight_bytes == whole
    assert footprint.step_bytes(WIDE, 64, 64, 1, 5, dtype, name, device="cpu").weight_bytes == whole
    info = sources.SourceInfo("a config", "synthetic", WIDE, {})
    assert info.loaded_bytes({"float32": 4, "bfloat16": 2}[dtype], recipes.packing(WIDE, name)) == whole


@every_dtype
@every_packing
def test_a_packed_layer_multiplies_by_its_unpacked_weights(name: str, dtype: str, models: Models) -> None:
    """A packed layer's product is that with its unpacked weights, to the rounding of the dtype."""
    layer = models.packed(name, dtype).layers[0].feed_forward.w2
    x = mx.random.normal((5, layer.scales.shape[1] * layer.group_size), key=mx.random.key(1)).astype(getattr(mx, dtype))
    wanted = x.astype(mx.float32) @ unpacked(layer).astype(mx.float32).T
    assert relative_error(layer(x), wanted) < {"float32": 1e-5, "bfloat16": 0.01}[dtype]


@every_packing
def test_the_error_is_that_of_its_bits(name: str, models: Models) -> None:
    """Unpacked weights are as near the given ones as so many bits allow."""
    weight = models.plain("float32").layers[0].feed_forward.w1.weight
    error = relative_error(unpacked(models.packed(name, "float32").layers[0].feed_forward.w1), weight)
    # A group of 32 to 128 normal weights spans 4 to 5 deviations, in 2^bits - 1 steps that err by step / sqrt(12).
    expected = {"mxfp4": 0.13, "nvfp4": 0.1, "mxfp8": 0.03}.get(name, 1.6 / (2 ** Quantization.parse(name).bits - 1))
    assert expected / 2 < error < expected, error


@settings(max_examples=40)
@given(
    head=st.sampled_from([32, 48, 64]),
    heads=st.sampled_from([1, 2, 3, 4]),
    grouped=st.booleans(),
    name=st.sampled_from(PACKINGS),
)
def test_any_shape_is_packed_or_refused(head: int, heads: int, grouped: bool, name: str) -> None:
    """Where the group divides every width, any model is packed, fused and counted exactly; else a layer is named."""
    axes = (head // 2, head // 4, head // 4)
    config = TransformerConfig.tiny(
        dim=head * heads, n_heads=heads, n_kv_heads=1 if grouped else heads, axes_dims=axes, n_layers=1
    )
    group = Quantization.parse(name).group_size
    layers = {path: shape for path, shape in linears(config).items() if path.split(".")[0] in BLOCKS}
    bad = {path: shape[1] for path, shape in layers.items() if shape[1] % group}
    model = synthetic(config)
    if bad:
        path, width = next(iter(bad.items()))
        line = f"{path}: input width {width} is not divisible by the group size {group} of {Quantization.parse(name)};"
        for refuse in (
            lambda: transforms.quantize(model, name),
            lambda: transforms.quantize(fused(model), name),
            lambda: cost.step(config, 64, 64, quantization=name),
        ):
            with pytest.raises(InputError, match=re.escape(line)):
                refuse()
        name_rest = {
            "rules": [{"pattern": "*", "quantization": name}, *({"pattern": p, "quantization": None} for p in bad)]
        }
        packed = transforms.quantize(model, name_rest)
        assert set(transforms.packing_of(packed)) == set(layers) - set(bad)
        return
    packed = transforms.quantize(model, name)
    joint = fused(packed)
    assert same_bits(arrays(joint), arrays(transforms.quantize(fused(model), name)))
    assert same_bits(arrays(transforms.unfuse(joint)), arrays(packed))
    steps = [cost.step(config, 64, 64, dtype="float32", quantization=name, fused=f) for f in ((), ("qkv", "gate_up"))]
    assert {cost.whole(step).weight_bytes for step in steps} == {sum(a.nbytes for a in arrays(packed).values())}
    inputs = mx.ones((1, config.in_channels, 8, 8)), mx.array([0.5]), mx.ones((1, 3, config.cap_feat_dim))
    assert np.isfinite(np.array(joint(*inputs))).all()
    assert relative_error(joint(*inputs), packed(*inputs)) < 1e-5
