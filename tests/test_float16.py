"""float16: the plain model to the last bit but for rounding, in range where plain float16 is not, or refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.synthetic import synthetic
from tests.test_transforms import CONFIGS, PLAIN, arrays, error
from zimage import arms, details, digits, fusing, half, inputs, operations, transforms
from zimage.config import TransformerConfig
from zimage.digits import quality
from zimage.errors import InputError
from zimage.half import Exponents, Reach
from zimage.kernels.native import Kernel
from zimage.saving import save_transformer
from zimage.transformer import Attention, Transformer
from zimage.weights import load_transformer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

TINY = TransformerConfig.tiny(dim=96, n_heads=3, axes_dims=(8, 12, 12), n_layers=1, n_refiner_layers=0)  # packs slowly
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def example(config: TransformerConfig = PLAIN, seed: int = 3) -> inputs.Inputs:
    """Seeded inputs of a model with a ragged batch, so that masks are needed too."""
    keys = mx.random.split(mx.random.key(seed), 3)
    latents = mx.random.normal((2, config.in_channels, 6, 4), key=keys[0])
    captions = [mx.random.normal((n, config.cap_feat_dim), key=key) for n, key in zip((5, 40), keys[1:], strict=True)]
    return inputs.Inputs(latents, mx.array([0.3, 0.8]), captions)


def short(config: TransformerConfig) -> inputs.Inputs:
    """The first item of the example alone."""
    latents, timestep, captions = example(config)
    return inputs.Inputs(latents[:1], timestep[:1], captions[:1])


def scaled(config: TransformerConfig = PLAIN, **factors: float) -> Transformer:
    """A model with the weights of some linear layers of each block multiplied, the layers given by their names."""
    model = synthetic(config)
    for _, block in transforms.blocks(model):
        for name, factor in factors.items():
            part = block.attention if name.startswith("to_") else block.feed_forward
            layer = part.to_out[0] if name == "to_out" else part[name]
            layer.weight = layer.weight * factor
    return model


def stressed(config: TransformerConfig = PLAIN) -> Transformer:
    """A model that leaves float16's range where the published weights do, in to_out's and in w2's output."""
    return scaled(config, to_v=64, to_out=2000, w3=64, w2=2000)


def everywhere(model: Transformer, attention: int, feed_forward: int, dtype: mx.Dtype = mx.float16) -> Transformer:
    """The model converted with the same exponents in all blocks."""
    chosen = {path: Exponents(attention, feed_forward) for path, _ in transforms.blocks(model)}
    return half.converted(model, chosen, dtype)


@every_config
@pytest.mark.parametrize("by", [(0, 0), (2, 5), (9, 12)], ids=str)
def test_scaling_changes_no_bit(config: TransformerConfig, by: tuple[int, int]) -> None:
    """Divided by powers of two and computed in fp32, the velocity is the plain model's bit for bit."""
    model = synthetic(config)
    assert mx.array_equal(everywhere(model, *by, mx.float32)(*example(config)), model(*example(config)))


@every_config
def test_float16_rounds_less_than_bfloat16(config: TransformerConfig) -> None:
    """The velocity's error is close to float16's rounding, and at most a fifth of bfloat16's on the same inputs."""
    model = synthetic(config)
    models = {
        "bfloat16": transforms.cast(model, "bfloat16"),
        "float16": transforms.float16(model, example(config)),
    }
    rows = arms.velocity_errors(model, models, example(config), "synthetic")
    assert [(row["arm"], row["metric"], row["weights_kind"]) for row in rows] == [
        (arm, "relative_l2_error", "synthetic") for arm in models
    ]
    coarse, fine = (row["value"] for row in rows)
    assert 1e-4 < fine < 2e-3
    assert fine < coarse / 5


def test_blocks_compute_in_float16() -> None:
    """All products of the blocks have float16 weights and activations; stream and velocity are in fp32."""
    model = transforms.float16(synthetic(PLAIN), example())
    seen: list[mx.Dtype] = []
    for _, block in transforms.blocks(model):
        for layer in (block.attention.to_q, block.attention.to_out[0], block.feed_forward.w1, block.feed_forward.w2):
            assert layer.weight.dtype == mx.float16
    attention = model.layers[0].attention

    class Spied(Attention):
        def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
            out: mx.array = super().attend(q, k, v, mask)
            seen.extend((q.dtype, k.dtype, v.dtype, out.dtype))
            return out

        def __call__(self, x: mx.array, rotation: mx.array, mask: mx.array | None = None) -> mx.array:
            out: mx.array = super().__call__(x, rotation, mask)
            seen.extend((x.dtype, out.dtype))
            return out

    attention.__class__ = Spied
    velocity = model(*example())
    assert seen == [mx.float16] * 6
    assert (model.dtype, velocity.dtype) == (mx.float32, mx.float32)


def test_plain_float16_overflows_where_the_transform_survives() -> None:
    """Of weights like the published ones plain float16 makes no numbers, nor does scaling one part; the transform does.

    Its error is that of weights which need no scaling, to a factor of 1.5.
    """
    model = stressed()
    plain = synthetic(PLAIN)
    plain.update(tree_map(lambda array: array.astype(mx.float16), model.parameters()))
    assert not mx.isfinite(plain(*example())).all()
    new = transforms.float16(model, example())
    chosen = half.exponents(new)
    assert set(chosen) == {path for path, _ in transforms.blocks(model)}
    for attention, feed_forward in chosen.values():
        assert 3 < attention < 10 and 3 < feed_forward < 10
        for less in ((0, feed_forward), (attention, 0)):
            assert not mx.isfinite(everywhere(model, *less)(*example())).all()
    usual = error(transforms.float16(synthetic(PLAIN), example())(*example()), synthetic(PLAIN)(*example()))
    assert error(new(*example()), model(*example())) < 1.5 * usual


def test_exponents_are_the_smallest_that_keep_the_headroom() -> None:
    """What was found to reach furthest ends in the upper half of an eighth of float16's range, in every block."""
    model = stressed()
    reached, _ = half.measure(model, [example()])
    for path, (attention, feed_forward) in half.exponents(transforms.float16(model, example())).items():
        assert half.LIMIT / 2 < reached[path]["to_out"].largest / 2**attention <= half.LIMIT == 8188
        assert half.LIMIT / 2 < reached[path]["w2"].largest / 2**feed_forward <= half.LIMIT


def test_what_is_measured_is_what_the_operations_give() -> None:
    """The largest magnitudes found in a block are those of its operations, performed one by one."""
    model = synthetic(CONFIGS["no QK norm"])
    found, velocities = half.measure(model, [example(model.config)])
    assert mx.array_equal(velocities[0], model(*example(model.config)))
    names = {name for name in found["layers.1"] if name not in ("t_embedder", "adaln")}
    block, values = model.layers[1], operations._inputs_of(model, example(model.config), "layers.1")
    gives = {"to_q": "q", "to_k": "k", "to_v": "v", "sdpa": "attended", "to_out": "change", "w1": "gate", "w3": "up",
             "swiglu": "hidden", "w2": "change", "attention_norm1": "normed", "ffn_norm1": "normed"}  # fmt: skip
    for operation in operations.operations(block):
        values = operations.perform([operation], block, values)
        if operation.name in gives:
            value = values[gives[operation.name]]
            assert value is not None
            assert found["layers.1"][operation.name].largest == mx.abs(value).max().item()
            names.remove(operation.name)
    assert names == set()


def test_its_blocks_can_be_taken_apart() -> None:
    """The operations of a float16 block, performed one by one, give the block's output bit for bit."""
    model = transforms.float16(stressed(), example())
    block, values = model.layers[1], operations._inputs_of(model, example(), "layers.1")
    wanted = block(*(values[name] for name in ("x", "rotation", "mask", "temb")))
    found = operations.perform(operations.operations(block), block, values)["x"]
    assert found is not None and found.dtype == mx.float32
    assert mx.array_equal(found, wanted)


def test_the_widest_of_several_examples_counts() -> None:
    """Of several examples the largest magnitude counts, and the smallest root mean square."""
    model, both = synthetic(PLAIN), (example(seed=3), example(seed=4))
    one, other, together = (half.measure(model, some)[0]["layers.0"] for some in (both[:1], both[1:], both))
    for name, reach in together.items():
        pair = (one[name], other[name])
        assert reach == Reach(max(r.largest for r in pair), min(r.rms for r in pair))


FUSIONS: dict[str, Callable[[Transformer], Transformer]] = {
    "fuse_qkv": transforms.fuse_qkv,
    "fuse_qkv_copied": transforms.fuse_qkv_copied,
    "fuse_gate_up": transforms.fuse_gate_up,
    "both": lambda model: transforms.fuse_gate_up(transforms.fuse_qkv(model)),
}


@pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS)
def test_fusing_before_and_after_is_the_same(fuse: Callable[[Transformer], Transformer]) -> None:
    """A fused model made float16 has the modules and bits of a float16 model that is fused, and unfuses to it."""
    model = stressed()
    plain = transforms.float16(model, example())
    before, after = transforms.float16(fuse(model), example()), fuse(plain)
    assert [type(module) for module in before.modules()] == [type(module) for module in after.modules()]
    found, wanted = arrays(before), arrays(after)
    assert set(found) == set(wanted) and all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    assert mx.array_equal(before(*example()), after(*example()))
    assert error(before(*example()), model(*example())) < 2e-3
    back = arrays(transforms.unfuse(before))
    assert all(mx.array_equal(back[name], array) for name, array in arrays(plain).items())


EXACT = [
    name
    for name in arms.TRANSFORMS
    if name not in ("wide_dequantize", *details.TRANSFORMS, *arms.NEED_EXAMPLES)
    and not name.startswith("quantize_input")
]


@pytest.mark.parametrize("name", EXACT)
def test_every_named_transform_goes_with_it(name: str) -> None:
    """On a CPU a lever pulled before or after gives the same bits, those of float16 alone to its rounding."""
    model, pull = stressed(), arms.TRANSFORMS[name]
    alone = transforms.float16(model, example())
    before, after = transforms.float16(pull(model), example()), pull(alone)
    assert mx.array_equal(before(*example()), after(*example()))
    assert error(after(*example()), alone(*example())) < 1e-3


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_rounded_inputs_go_with_it(mode: str) -> None:
    """Activations may be rounded further in float16: about as far from the rounded plain model as that from its own."""
    model = stressed()
    plain, rounded = model(*example()), transforms.quantize_input(model, mode)(*example())
    found = transforms.quantize_input(transforms.float16(model, example()), mode)(*example())
    assert mx.isfinite(found).all().item()
    assert 0 < error(found, rounded) < 2 * error(rounded, plain)


def test_kernels_are_checked_for_what_the_blocks_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels inside attention and feed-forward are asked for in float16, though the stream is in fp32."""
    asked: list[str] = []
    monkeypatch.setattr(Kernel, "install", lambda _self, request: asked.append(request["dtype"]))
    model = transforms.float16(synthetic(TINY), short(TINY))
    fusing.fuse_swiglu(fusing.fuse_norm_rope(model))
    assert asked == ["float16", "float16"]


def test_packed_weights() -> None:
    """Affine weights can be packed before or after; their scales are then rounded to float16 too."""
    model, one = stressed(TINY), short(TINY)
    packed = transforms.quantize(model, "8bit-g32")
    before = transforms.float16(packed, one)
    assert error(before(*one), packed(*one)) < 6e-3
    assert before.layers[0].attention.to_q.scales.dtype == mx.float16
    assert before.layers[0].attention.to_q.weight is packed.layers[0].attention.to_q.weight
    after = transforms.quantize(transforms.float16(model, one), "8bit-g32")
    assert error(after(*one), model(*one)) < 1.2 * error(packed(*one), model(*one))
    assert after.layers[0].feed_forward.w1.scales.dtype == mx.float16


def test_scales_that_take_no_factor() -> None:
    """Weights in mxfp8 are taken where nothing needs scaling, and else refused with the layer and the way out."""
    packed = transforms.quantize(synthetic(TINY), "mxfp8")
    assert error(transforms.float16(packed, short(TINY))(*short(TINY)), packed(*short(TINY))) < 2e-3
    line = r"layers\.0\.feed_forward\.w1 is packed as mxfp8, whose scales take no factor; pack afterwards"
    with pytest.raises(InputError, match=line):
        transforms.float16(transforms.quantize(stressed(TINY), "mxfp8"), short(TINY))


def test_a_transform_leaves_its_argument_alone() -> None:
    """The argument keeps its array objects, modules, eps and output."""
    model = transforms.fuse_qkv(stressed())
    mx.eval(model.parameters())
    before, modules, output = arrays(model), [id(m) for m in model.modules()], model(*example())
    eps = [m.eps for m in model.modules() if "eps" in m.__dict__]
    transforms.float16(model, example())
    assert all(arrays(model)[name] is array for name, array in before.items())
    assert [id(m) for m in model.modules()] == modules
    assert [m.eps for m in model.modules() if "eps" in m.__dict__] == eps
    assert mx.array_equal(model(*example()), output)


def refusal(call: Callable[[], Any]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("factors", "line"),
    [
        ({"w1": 1e4}, r"noise_refiner\.0: w1 reaches \S+e\+04, beyond 8188, the 8th part of what float16 holds; use "),
        ({"w2": 1e11}, r"noise_refiner\.0: ffn_norm1 has a root mean square of \S+e-08 after a division by 2\^26; "),
        ({"to_q": 1e6}, r"noise_refiner\.0\.attention\.to_q\.weight has a value of \S+e\+05, and float16 holds 65504"),
        ({"to_out": math.inf}, r"noise_refiner\.0: to_out is not finite in float32 either"),
        ({"w3": 1e-7}, r"noise_refiner\.0: w3 has a root mean square of 1\S+e-07 after a division by 2\^0; "),
    ],
    ids=["a gate", "a norm scaled away", "a weight", "infinity", "a small product"],
)  # fmt: skip
def test_what_would_overflow_or_vanish_is_refused(factors: dict[str, float], line: str) -> None:
    """Values out of float16's range are refused with the block, the operation, the magnitude and the limit."""
    with pytest.raises(InputError, match=line):
        transforms.float16(scaled(**factors), example())


def test_too_large_an_error_is_refused() -> None:
    """An error of the velocity beyond what was asked for is refused with both."""
    line = refusal(lambda: transforms.float16(synthetic(PLAIN), example(), most_error=1e-4))
    assert "relative L2 error on the examples is 0.000" in line and "0.0001 is the most" in line


def test_a_block_that_gives_nothing_is_no_underflow() -> None:
    """Layers whose weights are zero are exact in any dtype."""
    model = scaled(to_out=0, w2=0)
    new = transforms.float16(model, example())
    assert set(half.exponents(new).values()) == {Exponents(0, 0)}
    assert error(new(*example()), model(*example())) < 2e-3


def test_a_block_that_hides_its_operations_is_refused() -> None:
    """Where an operation was not seen, nothing is assumed of it."""
    reached, _ = half.measure(synthetic(TINY), [short(TINY)])
    del reached["layers.0"]["sdpa"]
    line = refusal(lambda: half.choose("layers.0", reached["layers.0"]))
    assert line.startswith("layers.0: sdpa is not computed by a layer of its own; apply float16 before")


@pytest.mark.parametrize(
    "examples",
    [(), (mx.zeros((1, 4, 6, 4)), mx.zeros(1), mx.zeros((1, 5, 48))), (None,), ((1, 2),), ("abc",), ((1, 2, 3),)],
    ids=["none", "three arrays", "None", "two", "text", "numbers"],
)
def test_what_is_no_example_is_refused(examples: tuple[Any, ...]) -> None:
    """Without an example, or with something else, the line says what one is."""
    line = refusal(lambda: transforms.float16(synthetic(PLAIN), *examples))
    assert "(latents, timestep, captions)" in line or "must be an MLX array" in line


@pytest.mark.parametrize("most", [0, -1, math.nan, "1", None, True], ids=repr)
def test_a_bound_that_is_no_number_is_refused(most: Any) -> None:
    """most_error is a positive number."""
    assert "most_error" in refusal(lambda: transforms.float16(synthetic(PLAIN), example(), most_error=most))


def test_an_example_that_is_not_finite_is_refused() -> None:
    """NaN among the inputs is found in the first block that it reaches."""
    latents, timestep, captions = example()
    bad = (mx.where(latents > 1, math.nan, latents), timestep, captions)
    assert "noise_refiner.0: attention_norm1 is not finite" in refusal(
        lambda: transforms.float16(synthetic(PLAIN), bad)
    )


def test_a_float16_model_is_not_cast_adapted_saved_or_made_one_again(tmp_path: Path) -> None:
    """Whatever would take the scaled weights for the published ones is refused; the line says what to take instead."""
    model = transforms.fuse_qkv(transforms.float16(synthetic(PLAIN), example()))
    for doing, call in {
        "cast": lambda: transforms.cast(model, "float32"),
        "adapt": lambda: transforms.adapt(model, []),
        "save": lambda: save_transformer(model, tmp_path / "saved"),
        "transform": lambda: transforms.float16(model, example()),
        "mask": lambda: transforms.with_all_ones_mask(model),
    }.items():
        assert refusal(call).endswith(f"{doing} the model it was made from")
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_another_transform_are_refused() -> None:
    """Blocks that a transform replaced are not replaced once more, but named."""
    masked = transforms.with_all_ones_mask(synthetic(PLAIN))
    line = refusal(lambda: transforms.float16(masked, example()))
    assert line.startswith("noise_refiner.0 is a MaskedTransformerBlock")


def test_queries_and_keys_stay_within_what_their_norm_can_give() -> None:
    """The bound for qk_norm is never exceeded, by norm or RoPE, and a weight that takes it out of range is refused."""
    model = synthetic(PLAIN)
    seen: list[mx.array] = []
    attention = model.layers[0].attention

    class Spied(Attention):
        def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
            seen.extend((q, k))
            return super().attend(q, k, v, mask)

    attention.__class__ = Spied
    model(*example())
    attention.__class__ = Attention
    found, _ = half.measure(model, [example()])
    assert max(mx.abs(a).max().item() for a in seen) <= found["layers.0"]["qk_norm"].largest < 12
    attention.norm_k.weight = attention.norm_k.weight * 2000
    assert refusal(lambda: transforms.float16(model, example())).startswith("layers.0: qk_norm reaches ")


def test_loading_in_float16_names_the_transform() -> None:
    """float16 as a dtype stays refused, and the line names the way to have it."""
    line = refusal(lambda: load_transformer("synthetic:tiny", "float16"))
    assert "overflow" in line and "zimage.transforms.float16" in line


def test_an_adapted_model_can_be_made_float16() -> None:
    """LoRA updates beside packed weights are scaled with their layer."""
    model = transforms.quantize(stressed(TINY), "8bit-g32")
    keys, ff = mx.random.split(mx.random.key(1)), model.layers[0].feed_forward
    down, up = mx.random.normal((2, 96), key=keys[0]), mx.random.normal((256, 2), key=keys[1]) * 0.05
    unadapted = model(*short(TINY))
    ff.w1 = transforms.AdaptedLinear(ff.w1, down, up, (2,))
    wanted = model(*short(TINY))
    assert error(unadapted, wanted) > 0.02
    assert error(transforms.float16(model, short(TINY))(*short(TINY)), wanted) < 6e-3


def test_digits_stay_digits() -> None:
    """The shipped model draws the same digits in float16 from the same seeds, and its error is below bfloat16's."""
    model = load_transformer("digits", "float32")
    one = inputs.example(model, "digits", 8, 8, 4, 1, 0)
    new = transforms.float16(model, one)
    models = {"bfloat16": transforms.cast(model, "bfloat16"), "float16": new}
    rows = arms.velocity_errors(model, models, one, "trained")
    assert rows[1]["value"] < rows[0]["value"] / 5
    wanted, found = (digits.draw(each, [7, 3], steps=4, seed=0) for each in (model, new))
    assert np.abs(found.images - wanted.images).max() < 0.01
    assert quality.recognised(found).all() and quality.recognised(wanted).all()
