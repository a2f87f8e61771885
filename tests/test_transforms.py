"""Transforms: what they change, what they leave alone, and how exact they are."""

import re
from collections.abc import Callable

from tests.parity.cases import relative_l2
from tests.synthetic import synthetic
from zimage import kernels, transforms
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.transformer import Transformer, count_parameters, weight_bytes
from zimage.transforms import Quantization

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

PLAIN = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), n_layers=2)
CONFIGS = {
    "plain": PLAIN,
    "grouped queries": TransformerConfig.tiny(dim=192, n_heads=6, n_kv_heads=2, axes_dims=(8, 12, 12)),
    "no QK norm": TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), qk_norm=False),
}
MODES = ["2bit", "3bit", "4bit", "5bit", "6bit", "8bit", "4bit-g32", "mxfp4", "nvfp4", "mxfp8"]
FUSIONS: dict[str, Callable[[Transformer], Transformer]] = {
    "fuse_qkv": transforms.fuse_qkv,
    "fuse_gate_up": transforms.fuse_gate_up,
    "both": lambda model: transforms.fuse_gate_up(transforms.fuse_qkv(model)),
}
TRANSFORMS = {
    **FUSIONS,
    "quantize": lambda model: transforms.quantize(model, "4bit"),
    "cast": lambda model: transforms.cast(model, "bfloat16"),
    "unfuse": transforms.unfuse,
    "quantize_input": transforms.quantize_input,
    "fuse_qkv_copied": transforms.fuse_qkv_copied,
    "with_all_ones_mask": transforms.with_all_ones_mask,
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_fusion = pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS)


def arrays(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def run(model: Transformer, seed: int = 3) -> mx.array:
    """The model's velocity for seeded inputs with a ragged batch."""
    config = model.config
    keys = mx.random.split(mx.random.key(seed), 3)
    latents = mx.random.normal((2, config.in_channels, 6, 4), key=keys[0])
    captions = [mx.random.normal((n, config.cap_feat_dim), key=key) for n, key in zip((5, 40), keys[1:], strict=True)]
    return model(latents, mx.array([0.3, 0.8]), captions)


def error(found: mx.array, wanted: mx.array) -> float:
    return relative_l2(np.array(found.astype(mx.float32)), np.array(wanted.astype(mx.float32)))


def same_bits(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and bool(mx.array_equal(a[n], b[n])) for n in a)


@every_config
@every_fusion
def test_fusing_is_exact_to_rounding(config: TransformerConfig, fuse: Callable[[Transformer], Transformer]) -> None:
    """In fp32 a fused model's output is within 1e-6 of the plain one's, relative L2."""
    model = synthetic(config)
    assert error(run(fuse(model)), run(model)) <= 1e-6


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_after_the_split_change_no_bit(config: TransformerConfig, dtype: str) -> None:
    """fuse_qkv_copied gives the bits of fuse_qkv, shares the weights of a fused model, and unfuses."""
    model = transforms.cast(synthetic(config), dtype)
    fused = transforms.fuse_qkv(model)
    copied = transforms.fuse_qkv_copied(fused)
    assert mx.array_equal(run(copied), run(fused))
    assert all(arrays(copied)[name] is array for name, array in arrays(fused).items())
    assert {type(block.attention) for _, block in transforms.blocks(copied)} == {transforms.CopiedQKVAttention}
    assert {type(block.attention) for _, block in transforms.blocks(fused)} == {transforms.FusedQKVAttention}
    assert same_bits(arrays(transforms.unfuse(copied)), arrays(model))


def test_copied_projections_are_arrays_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three of Q, K and V of a copied fused projection pass through a copy, and those of a fused one don't."""
    copies: list[tuple[int, ...]] = []
    copy = mx.contiguous

    def counted(array: mx.array) -> mx.array:
        copies.append(array.shape)
        return copy(array)

    monkeypatch.setattr(mx, "contiguous", counted)
    model = synthetic(CONFIGS["grouped queries"])
    x = mx.random.normal((2, 5, 192))
    transforms.fuse_qkv(model).layers[0].attention.project(x)
    assert copies == []
    transforms.fuse_qkv_copied(model).layers[0].attention.project(x)
    assert copies == [(2, 5, 6, 32), (2, 5, 2, 32), (2, 5, 2, 32)]


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_of_ones_changes_nothing(config: TransformerConfig, dtype: str) -> None:
    """With an all-ones mask the output stays the same, to the rounding of the path that attention takes for masks."""
    model = transforms.cast(synthetic(config), dtype)
    masked = transforms.with_all_ones_mask(model)
    even = [mx.random.normal((32, config.cap_feat_dim), key=mx.random.key(n)) for n in (1, 2)]
    latents = mx.random.normal((2, config.in_channels, 6, 4), key=mx.random.key(3))
    wanted, found = (one(latents, mx.array([0.3, 0.8]), even) for one in (model, masked))
    assert error(found, wanted) <= (1e-6 if dtype == "float32" else 0.02)
    assert error(run(masked), run(model)) <= (1e-6 if dtype == "float32" else 0.02)


def test_a_mask_of_ones_reaches_the_attention_of_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention of a masked model gets a boolean mask of its length; masks of padding stay as they are."""
    seen: list[mx.array | None] = []
    attention = kernels.attention

    def spied(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
        seen.append(mask)
        return attention(q, k, v, scale, mask)

    monkeypatch.setattr(kernels, "attention", spied)
    model = synthetic(PLAIN)
    masked = transforms.with_all_ones_mask(model)
    latents, even = mx.zeros((1, PLAIN.in_channels, 6, 4)), mx.zeros((1, 5, PLAIN.cap_feat_dim))
    model(latents, mx.array([0.5]), even)
    assert seen == [None] * len(seen)
    blocks, seen[:] = len(seen), []
    masked(latents, mx.array([0.5]), even)
    masks = [mask for mask in seen if mask is not None]
    assert len(masks) == blocks == len(list(transforms.blocks(model)))
    assert {mask.dtype for mask in masks} == {mx.bool_} and all(mask.all().item() for mask in masks)
    assert [mask.shape[-1] for mask in masks] == [32] * (blocks - 2) + [64] * 2
    seen[:] = []
    run(model)
    padding = seen[:]
    seen[:] = []
    run(masked)
    for own, given in zip(padding, seen, strict=True):
        assert given is not None and (given.dtype == mx.bool_ if own is None else bool(mx.array_equal(given, own)))
    assert any(own is not None for own in padding)


@pytest.mark.parametrize("mode", MODES)
def test_fusing_packed_weights_repacks_nothing(mode: str) -> None:
    """Fusing a quantized model gives the bits of quantizing a fused one, and its output to rounding."""
    model = synthetic(PLAIN)
    packed = transforms.quantize(model, mode)
    fused = FUSIONS["both"](packed)
    assert same_bits(arrays(fused), arrays(transforms.quantize(FUSIONS["both"](model), mode)))
    assert error(run(fused), run(packed)) <= 1e-6


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_its_argument_alone(name: str) -> None:
    """After a transform the argument holds the same array objects and modules, and its output has the same bits."""
    model = synthetic(PLAIN)
    mx.eval(model.parameters())
    before, output, modules = arrays(model), run(model), [id(m) for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    mx.eval(output)
    mx.eval(TRANSFORMS[name](model).parameters())
    after = arrays(model)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert [id(m) for m in model.modules()] == modules
    assert [type(m) for m in model.modules()] == kinds
    assert mx.array_equal(run(model), output)


@pytest.mark.parametrize(
    "name", ["fuse_qkv", "fuse_qkv_copied", "fuse_gate_up", "quantize", "unfuse", "with_all_ones_mask"]
)
def test_untouched_arrays_are_shared(name: str) -> None:
    """Arrays that a transform does not concern are the very same objects in its result."""
    model = synthetic(PLAIN)
    before, after = arrays(model), arrays(TRANSFORMS[name](model))
    touched = {"fuse_qkv": r"to_[qkv]\.", "fuse_qkv_copied": r"to_[qkv]\.", "fuse_gate_up": r"\.w[13]\.",
               "unfuse": "(?!)", "with_all_ones_mask": "(?!)",
               "quantize": r"^(noise_refiner|context_refiner|layers).*(to_|w[123]|adaLN).*weight"}[name]  # fmt: skip
    untouched = [key for key in before if not re.search(touched, key)]
    assert len(untouched) > 30
    assert [key for key in untouched if after[key] is not before[key]] == []


def test_cast_shares_what_has_the_dtype_already() -> None:
    """Casting a model to its own dtype gives the same array objects; packed integers are never cast."""
    model = transforms.quantize(synthetic(PLAIN), "4bit")
    same = arrays(transforms.cast(model, "float32"))
    assert all(same[key] is array for key, array in arrays(model).items())
    halved = arrays(transforms.cast(model, "bfloat16"))
    assert {array.dtype for array in halved.values()} == {mx.bfloat16, mx.uint32}


def test_cast_rounds_every_value() -> None:
    """A cast model holds the values rounded to its dtype, and computes in it."""
    model = synthetic(PLAIN)
    halved = transforms.cast(model, "bfloat16")
    assert same_bits(arrays(halved), {key: a.astype(mx.bfloat16) for key, a in arrays(model).items()})
    assert run(halved).dtype == mx.bfloat16
    assert 1e-4 < error(run(halved), run(model)) < 0.1


@pytest.mark.parametrize("dtype", ["float16", "int8", "", None, 4, ["float32"], mx.float32], ids=str)
def test_other_dtypes_are_refused(dtype: object) -> None:
    """Only bfloat16 and float32 are dtypes, by name; float16 is refused with its reason."""
    with pytest.raises(InputError, match="use bfloat16 or float32") as caught:
        transforms.cast(synthetic(PLAIN), dtype)  # type: ignore[arg-type]
    assert ("overflow" in str(caught.value)) == (dtype == "float16")


def test_fused_parameter_names() -> None:
    """fuse_qkv replaces to_q, to_k and to_v by to_qkv in every block, fuse_gate_up w1 and w3 by w13; no more."""
    names = set(arrays(synthetic(PLAIN)))
    qkv = {re.sub(r"to_[qkv]\.", "to_qkv.", name) for name in names}
    gate_up = {re.sub(r"\.w[13]\.", ".w13.", name) for name in names}
    assert set(arrays(FUSIONS["fuse_qkv"](synthetic(PLAIN)))) == qkv
    assert set(arrays(FUSIONS["fuse_gate_up"](synthetic(PLAIN)))) == gate_up
    assert len(names) - len(qkv) == 2 * 4
    assert len(names) - len(gate_up) == 1 * 4


@every_config
@every_fusion
@pytest.mark.parametrize("mode", [None, "4bit", "mxfp8"])
def test_unfusing_gives_back_the_bits(
    config: TransformerConfig, fuse: Callable[[Transformer], Transformer], mode: str | None
) -> None:
    """Unfusing a fused model gives the plain one bit for bit, names and output included, also where it is packed."""
    model = synthetic(config)
    model = model if mode is None else transforms.quantize(model, mode)
    back = transforms.unfuse(fuse(model))
    assert same_bits(arrays(back), arrays(model))
    assert mx.array_equal(run(back), run(model))
    assert same_bits(transforms.tensors(fuse(model)), arrays(model))


@every_fusion
def test_fusing_twice_changes_nothing_more(fuse: Callable[[Transformer], Transformer]) -> None:
    """Fusing a fused model gives the same arrays again."""
    once = fuse(synthetic(PLAIN))
    twice = fuse(once)
    assert all(arrays(twice)[key] is array for key, array in arrays(once).items())


def test_fusing_keeps_the_count_and_bytes_of_the_weights() -> None:
    """A fused model has as many weights and bytes as the plain one, packed or not."""
    for model in (synthetic(PLAIN), transforms.quantize(synthetic(PLAIN), "4bit")):
        fused = FUSIONS["both"](model)
        assert (count_parameters(fused), weight_bytes(fused)) == (count_parameters(model), weight_bytes(model))


@pytest.mark.parametrize("other", ["8bit", "4bit-g32", "mxfp4", None])
def test_a_group_stored_in_different_ways_is_not_fused(other: str | None) -> None:
    """Projections packed differently are refused with both ways, and the model stays as it was."""
    model = transforms.quantize(synthetic(PLAIN), "4bit")
    source = synthetic(PLAIN) if other is None else transforms.quantize(synthetic(PLAIN), other)
    model.layers[1].attention.to_v = source.layers[1].attention.to_v
    model.layers[1].feed_forward.w3 = source.layers[1].feed_forward.w3
    before = arrays(model)
    for fuse in (transforms.fuse_qkv, transforms.fuse_gate_up):
        with pytest.raises(InputError, match="affine 4 bits, group 64, scales float32 beside "):
            fuse(model)
    assert all(arrays(model)[key] is array for key, array in before.items())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *((f"{bits}bit", Quantization("affine", bits, 64)) for bits in (2, 3, 4, 5, 6, 8)),
        ("4bit-g32", Quantization("affine", 4, 32)),
        ("8bit-g64", Quantization("affine", 8, 64)),
        ("4bit-g128", Quantization("affine", 4, 128)),
        ("mxfp4", Quantization("mxfp4", 4, 32)),
        ("nvfp4", Quantization("nvfp4", 4, 16)),
        ("mxfp8", Quantization("mxfp8", 8, 32)),
    ],
)
def test_quantization_names(name: str, wanted: Quantization) -> None:
    """Each quantization name means one mode, bits and group size."""
    assert Quantization.parse(name) == wanted


@pytest.mark.parametrize(
    "name",
    ["", "4", "bit", "7bit", "1bit", "16bit", "4bit-g16", "4bit-g", "4BIT", " 4bit", "4bit\n", "mxfp4-g32", "int4",
     None, 4, ["4bit"]],
    ids=repr,
)  # fmt: skip
def test_other_quantization_names_are_refused(name: object) -> None:
    """What is no quantization name gives one line that lists those there are."""
    with pytest.raises(InputError, match="known are 2bit") as caught:
        transforms.quantize(synthetic(PLAIN), name)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_only_the_blocks_linear_layers_are_packed() -> None:
    """Quantizing packs every linear layer of every block and nothing else, so embedders and norms keep their floats."""
    model = transforms.quantize(synthetic(PLAIN), "4bit")
    packed = {path for path, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}
    left = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(path.split(".")[0] in ("noise_refiner", "context_refiner", "layers") for path in packed)
    assert all(
        path.split(".")[0] in ("t_embedder", "all_x_embedder", "cap_embedder", "all_final_layer") for path in left
    )
    assert len(packed) == 4 * 7 + 3
    assert arrays(model)["layers.0.adaLN_modulation.0.bias"].dtype == mx.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_a_weight(mode: str, dtype: str) -> None:
    """A packed layer takes its bits a weight, and each group two floats of its dtype, or one byte if not affine."""
    wanted = Quantization.parse(mode)
    model = transforms.quantize(synthetic(PLAIN, dtype=transforms.parse_dtype(dtype)), mode)
    item = {"float32": 4, "bfloat16": 2}[dtype]
    overhead = 2 * item if wanted.mode == "affine" else 1
    block = model.layers[0]
    for layer, size in ((block.attention.to_q, 192 * 192), (block.feed_forward.w2, 192 * 512)):
        weights = count_parameters(layer)
        assert weights == size
        assert weight_bytes(layer) * 8 == weights * wanted.bits + weights // wanted.group_size * overhead * 8
    assert count_parameters(model) == count_parameters(synthetic(PLAIN))


def test_four_bits_take_four_and_a_half() -> None:
    """Affine 4 bits in groups of 64 with bf16 scales take 4.5 bits a weight."""
    layer = transforms.quantize(synthetic(PLAIN, dtype=mx.bfloat16), "4bit").layers[0].attention.to_q
    assert weight_bytes(layer) * 8 / count_parameters(layer) == 4.5


def test_more_bits_err_less() -> None:
    """The output's error falls with every bit, and is under 2 % at 8 bits."""
    model = synthetic(PLAIN)
    wanted = run(model)
    errors = [error(run(transforms.quantize(model, f"{bits}bit")), wanted) for bits in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]
    assert errors[-1] < 0.02


def _unpacked(mode: str) -> tuple[mx.array, mx.array]:
    """A packed weight as floats again, and each weight's step between neighbouring values."""
    layer = transforms.quantize(synthetic(PLAIN), mode).layers[0].attention.to_q
    values = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    return values, mx.repeat(mx.abs(layer.scales), layer.group_size, axis=1)


def test_smaller_groups_err_less() -> None:
    """At 4 bits, weights in groups of 32 err less than in groups of 64."""
    weight = synthetic(PLAIN).layers[0].attention.to_q.weight
    small, large = (error(_unpacked(name)[0], weight) for name in ("4bit-g32", "4bit"))
    assert small < 0.95 * large


def test_a_packed_layer_holds_near_values() -> None:
    """Every unpacked weight lies within a step of the weight it stands for, and on average within a third of one."""
    values, step = _unpacked("4bit")
    off = mx.abs(values - synthetic(PLAIN).layers[0].attention.to_q.weight) / step
    assert off.max().item() <= 1
    assert off.mean().item() < 1 / 3


def test_quantizing_twice_is_refused() -> None:
    """A quantized model is not quantized again; the line names the layer."""
    with pytest.raises(InputError, match=r"noise_refiner\.0\.\S+ is quantized already"):
        transforms.quantize(transforms.quantize(synthetic(PLAIN), "4bit"), "8bit")


def test_a_width_that_no_group_divides_is_refused() -> None:
    """A layer whose input width the group size does not divide is named with both numbers."""
    line = r"noise_refiner\.0\.\S+: input width 192 is not divisible by the group size 128 of 4bit-g128"
    with pytest.raises(InputError, match=line):
        transforms.quantize(synthetic(PLAIN), "4bit-g128")


def test_quantization_of_a_plain_model_is_none() -> None:
    """A model without packed layers has no quantization entry; one with them has one for all."""
    assert transforms.quantization_of(synthetic(PLAIN)) is None
    entry = transforms.quantization_of(transforms.quantize(synthetic(PLAIN), "nvfp4"))
    assert entry == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
