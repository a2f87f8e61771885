"""Arms as data: the work of a step, a block and a projection, of a loaded model and by names alone."""

import json
from typing import Any

from zimage import arms, inputs, transforms
from zimage.config import TransformerConfig
from zimage.errors import BackendError, InputError, WeightsError
from zimage.inputs import Inputs
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


def test_the_projections_are_those_of_the_block(model: Transformer, example: Inputs) -> None:
    """The work of the projections gives queries, keys and values of all tokens, from the normed input of the block."""
    attention = model.layers[0].attention
    q, k, v = arms.scopes(model, example)["qkv"]()
    tokens = arms._before_first_block(model, example)
    assert tokens.image is not None and tokens.caption is not None
    joint = mx.concatenate([tokens.image, tokens.caption], axis=1)
    assert q.shape == (2, joint.shape[1], attention.n_heads, attention.head_dim)
    assert same((q, k, v), attention.project(model.layers[0].attention_norm1(joint)))


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
    assert same(work(), arms.scopes(fused, example)[scope]())


def test_transforms_do_what_they_are_called(model: Transformer) -> None:
    """Each name leads to its transform, none gives the model itself, and the argument is left as it was."""
    assert arms.transformed(model, []) is model
    block = arms.transformed(model, ["fuse_qkv"]).layers[0]
    assert "to_qkv" in block.attention and "w13" not in block.feed_forward
    block = arms.transformed(model, ["fuse_gate_up"]).layers[0]
    assert "to_qkv" not in block.attention and "w13" in block.feed_forward
    assert "to_q" in model.layers[0].attention


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
        ({"transforms": ["fuse_kv"]}, InputError, "transform 'fuse_kv' is not known; known are fuse_qkv, fuse_gate_up"),
        ({"transforms": [["fuse_qkv"]]}, InputError, "is not known; known are fuse_qkv"),
        ({"transforms": "fuse_qkv"}, InputError, "a list of names, found 'fuse_qkv'"),
        ({"scope": "layer"}, InputError, "scope 'layer' is not known; known are qkv, block, step"),
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
    bare = Transformer(TransformerConfig(**fields))
    example = inputs.example(bare, SOURCE, **SIZES)
    assert list(arms.scopes(bare, example)) == ["qkv", "block", "step"]
