"""Arms as data: the work of a step, a block and a projection, of a loaded model and by names alone."""

import json
from typing import Any

import zimage
from tests.synthetic import synthetic
from zimage import arms, half, inputs, transforms
from zimage.config import TransformerConfig
from zimage.errors import BackendError, InputError, WeightsError
from zimage.inputs import Inputs
from zimage.kernels.native import Kernel
from zimage.measure import Program, Resident
from zimage.transformer import State, Transformer
from zimage.weights import load_transformer

import mlx.core as mx
import pytest

SOURCE = "synthetic:tiny"
SIZES = {"height": 64, "width": 32, "batch": 2, "caption_tokens": 5, "seed": 3}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_transformer(SOURCE, "float32")


@pytest.fixture(scope="module")
def example(model: Transformer) -> Inputs:
    return inputs.example(model, SOURCE, **SIZES)


def same(found: Any, wanted: Any) -> bool:
    """Whether two results hold the same arrays, bit for bit."""
    if isinstance(wanted, mx.array):
        return bool(mx.array_equal(found, wanted))
    return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_step_is_the_models_own(model: Transformer, example: Inputs) -> None:
    """The work of the step gives the model's velocity for these inputs."""
    assert same(arms.scopes(model, example)["step"](), model(*example))


def test_the_block_is_given_what_reaches_it(model: Transformer, example: Inputs) -> None:
    """The work of the block gives the activations that the forward pass has after its first main block."""
    state = State(*example)
    for stage in model.stages(*example):
        state = stage(state)
        if stage.name == "layers.0":
            break
    assert same(arms.scopes(model, example)["block"](), state.arrays())


@pytest.mark.parametrize("scope", list(arms.SCOPES))
def test_work_builds_its_graph_anew(scope: str, model: Transformer, example: Inputs) -> None:
    """Every call of a scope's work gives new arrays with the same values, not those computed before."""
    work = arms.scopes(model, example)[scope]
    first, second = work(), work()
    parts = [(first, second)] if isinstance(first, mx.array) else list(zip(first, second, strict=True))
    assert any(a is not b for a, b in parts)
    assert all(same(a, b) for a, b in parts)


@pytest.mark.parametrize("scope", list(arms.SCOPES))
def test_a_fused_arm_computes_the_same(scope: str, model: Transformer, example: Inputs) -> None:
    """Every scope of a model with fused projections gives what the separate ones give, up to rounding."""
    wanted = arms.scopes(model, example)[scope]()
    found = arms.scopes(arms.transformed(model, ["fuse_qkv", "fuse_gate_up"]), example)[scope]()
    pairs = [(found, wanted)] if isinstance(wanted, mx.array) else list(zip(found, wanted, strict=True))
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("scope", list(arms.SCOPES))
def test_an_arm_by_names_is_the_loaded_one(scope: str, model: Transformer, example: Inputs) -> None:
    """`step` with names and numbers gives the work of the model that they name, transformed in that order."""
    fused = transforms.fuse_gate_up(transforms.fuse_qkv(model))
    names = ["fuse_qkv", "fuse_gate_up"]
    work = arms.step(SOURCE, "float32", transforms=names, device="cpu", scope=scope, **SIZES)
    assert list(arms.TRANSFORMS)[:2] == names
    assert same(work(), arms.scopes(fused, example)[scope]())


def test_transforms_do_what_they_are_called(model: Transformer) -> None:
    """Each name leads to its transform, none gives the model itself, and the argument is left as it was."""
    assert arms.transformed(model, []) is model
    block = arms.transformed(model, ["fuse_qkv"]).layers[0]
    assert "to_qkv" in block.attention and "w13" not in block.feed_forward
    block = arms.transformed(model, ["fuse_gate_up"]).layers[0]
    assert "to_qkv" not in block.attention and "w13" in block.feed_forward
    assert "to_q" in model.layers[0].attention


def test_a_change_that_changes_nothing_is_refused(model: Transformer, example: Inputs) -> None:
    """What a model has already makes no arm of its own; what differs in an array, a class or a setting does."""
    had = ["fuse_qkv", "compile_blocks", "submit_early", "keep_captions", "bf16_latents"]
    made = arms.transformed(model, had)
    made(*example)
    for name in had:
        with pytest.raises(InputError, match=f"{name}: the model is so already"):
            arms.changed(made, name, example)
        assert arms.changed(model, name, example) is not model
    for name in ("fuse_gate_up", "submit_every_block", "zero_pad_tokens", "bf16_positions", "with_all_ones_mask"):
        assert arms.changed(made, name, example)


@pytest.mark.parametrize("quantization", [None, "4bit-g32", "mxfp8"])
@pytest.mark.parametrize("captions", ["even", "ragged"])
def test_the_fast_model_computes_the_same(quantization: str | None, captions: str) -> None:
    """In fp32 the fast model gives the plain one's velocity to 1e-5, packed or not, with padded captions or none."""
    plain = synthetic(TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24)))
    plain = transforms.quantize(plain, quantization) if quantization else plain
    keys = mx.random.split(mx.random.key(1), 3)
    latents = mx.random.normal((2, plain.config.in_channels, 6, 4), key=keys[0])
    lengths = (32, 32) if captions == "even" else (5, 40)
    features = [
        mx.random.normal((n, plain.config.cap_feat_dim), key=key) for n, key in zip(lengths, keys[1:], strict=True)
    ]
    given = (latents, mx.array([0.2, 0.9]), features)
    wanted = plain(*given)
    fast = zimage.fast(plain)
    assert half.relative_l2(fast(*given), wanted) < 1e-5
    assert half.relative_l2(arms.transformed(plain, arms.FAST)(*given), wanted) < 1e-5
    assert same(plain(*given), wanted)
    block = fast.layers[0]
    assert "to_qkv" in block.attention and "w13" in block.feed_forward and fast.submission is not None


def test_blocks_of_the_fast_model_are_compiled_on_a_gpu_alone(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the fast model's blocks are not compiled, on a GPU they are."""
    assert not any(block.compiled for _, block in transforms.blocks(arms.fast(model)))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    monkeypatch.setattr(Kernel, "install", lambda _self, _request: None)
    assert all(block.compiled for _, block in transforms.blocks(arms.fast(model)))


def test_the_fast_model_leaves_apart_what_is_packed_apart(example: Inputs) -> None:
    """Projections that are packed differently stay separate, and all else is fused."""
    recipe = {"rules": [{"pattern": "*.to_q", "quantization": "8bit", "group_size": 32}]}
    packed = transforms.quantize(load_transformer(SOURCE, "float32"), recipe)
    fast = arms.fast(packed)
    assert "to_q" in fast.layers[0].attention and "w13" in fast.layers[0].feed_forward
    assert half.relative_l2(fast(*example), packed(*example)) < 1e-5
    with pytest.raises(InputError, match="stored alike"):
        arms.transformed(packed, arms.FAST)


def test_the_fast_step_is_made_of_known_transforms() -> None:
    """Every name of FAST is a transform, there once, and fusions come before what reads from them."""
    assert set(arms.FAST) < set(arms.TRANSFORMS) and len(set(arms.FAST)) == len(arms.FAST)
    assert arms.FAST.index("fuse_qkv") < arms.FAST.index("fuse_norm_rope")


def test_variants_share_their_weights(model: Transformer, example: Inputs) -> None:
    """Variants are what their transforms make alone, and hold one copy of stacked weights, and the plain ones."""
    wanted = {
        "plain": [],
        "qkv": ["fuse_qkv"],
        "gate_up": ["fuse_swiglu", "fuse_gate_up"],
        "both": ["fuse_gate_up", "fuse_qkv", "submit_early"],
        "fast": ["fast"],
    }
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    found = arms.variants(model, wanted)
    mx.eval([one.parameters() for one in found.values()])
    stacked = found["both"].layers[0]
    parts = [
        layer
        for _, block in transforms.blocks(found["both"])
        for layer in (block.attention.to_qkv, block.feed_forward.w13)
    ]
    parts += [found["fast"].stacked_modulation.layer]
    assert mx.get_active_memory() - before < 1.1 * sum(layer.weight.nbytes for layer in parts)
    for name, one in found.items():
        alone = arms.transformed(model, wanted[name])
        assert [type(module) for module in one.modules()] == [type(module) for module in alone.modules()]
        assert same(one(*example), alone(*example))
        attention, feed_forward = one.layers[0].attention, one.layers[0].feed_forward
        shared = (stacked if name in ("qkv", "both", "fast") else model.layers[0]).attention
        assert all(attention[key].weight is shared[key].weight for key in ("to_qkv", "to_q") if key in shared)
        shared = (stacked if name in ("gate_up", "both", "fast") else model.layers[0]).feed_forward
        assert all(feed_forward[key].weight is shared[key].weight for key in ("w13", "w1") if key in shared)
    assert "to_q" in model.layers[0].attention and "w1" in model.layers[0].feed_forward
    with pytest.raises(InputError, match="'fuse_kv' is not known"):
        arms.variants(model, {"a": ["fuse_qkv"], "b": ["fuse_kv"]})


def test_a_quantized_arm() -> None:
    """dtype and quantization reach the loader."""
    sizes = {"height": 8, "width": 8, "batch": 2, "caption_tokens": 1, "seed": 3}
    packed = load_transformer("digits", "bfloat16", "8bit")
    wanted = packed(*inputs.example(packed, "digits", **sizes))
    found = arms.step("digits", "bfloat16", "8bit", device="cpu", **sizes)()
    assert found.dtype == mx.bfloat16
    assert same(found, wanted)


def test_an_arm_runs_as_a_program() -> None:
    """An arm is JSON, and is loaded and timed in another process."""
    arguments = {"source": SOURCE, "transforms": ["fuse_qkv"], "device": "cpu", "scope": "qkv", **SIZES}
    assert json.loads(json.dumps(arguments)) == arguments
    with Resident(Program("zimage.arms:step", arguments), warm_up=1, timeout_s=60) as arm:
        assert 0 < arm() < 5
        assert len(arm.before_s) == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"transforms": ["fuse_kv"]}, InputError, "transform 'fuse_kv' is not known; did you mean 'fuse_qkv'"),
        ({"transforms": ["no"]}, InputError, "transform 'no' is not known; known are fuse_qkv, fuse_gate_up"),
        ({"transforms": [["fuse_qkv"]]}, InputError, "is not known; known are fuse_qkv"),
        ({"transforms": "fuse_qkv"}, InputError, "a list of names, found 'fuse_qkv'"),
        ({"scope": "layer"}, InputError, "scope 'layer' is not known; known are qkv, qkv_norm"),
        ({"device": "tpu"}, BackendError, "device 'tpu' is not known"),
        ({"source": "synthetic:none"}, WeightsError, "none"),
        ({"quantization": "9bit"}, InputError, "unknown quantization '9bit'"),
        ({"batch": 0}, InputError, "batch and caption_tokens must be at least 1"),
    ],
)
def test_unknown_names_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    """Names that are not known are refused in one line that lists the known ones."""
    with pytest.raises(error, match=words) as caught:
        arms.step(**{"source": SOURCE, **SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_the_smallest_model_has_every_scope() -> None:
    """A model without refiners has the same scopes."""
    fields = vars(TransformerConfig.tiny()) | {"n_refiner_layers": 0, "n_layers": 1}
    bare = synthetic(TransformerConfig(**fields))
    example = inputs.example(bare, SOURCE, **SIZES)
    assert list(arms.scopes(bare, example)) == list(arms.SCOPES)
