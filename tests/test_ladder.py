"""Scopes of a step, from the products of a block on, and fused projections compared in one after the other."""

from typing import Any

from tests.synthetic import synthetic
from zimage import arms, half, inputs, ladder, scopes, transforms
from zimage.analysis import gains
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.inputs import Inputs
from zimage.kernels.native import Kernel
from zimage.transformer import Attention, FeedForward, Transformer

import mlx.core as mx
import pytest

SIZES = {"height": 64, "width": 32, "batch": 2, "caption_tokens": 5, "seed": 3}
PACKABLE = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return synthetic(PACKABLE)


@pytest.fixture(scope="module")
def example(model: Transformer) -> Inputs:
    return inputs.example(model, "synthetic:tiny", **SIZES)


def arrays(found: Any) -> list[mx.array]:
    return [found] if isinstance(found, mx.array) else list(found)


def called(kind: type, model: Transformer, example: Inputs, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What the first main block's attention or feed-forward is called with in a step, and what it gives."""
    module = model.layers[0].attention if kind is Attention else model.layers[0].feed_forward
    seen = []
    plain = kind.__call__

    def watch(self: Any, *given: Any) -> Any:
        result = plain(self, *given)
        if self is module:
            seen.append((given, result))
        return result

    monkeypatch.setattr(kind, "__call__", watch)
    mx.eval(model(*example))
    monkeypatch.undo()
    ((given, result),) = seen
    return given, result


def test_attentions_scopes_are_its_parts(model: Transformer, example: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, norm, RoPE and the whole attention are computed of what reaches them in a step, each upon the last."""
    (x, rotation, mask), wanted = called(Attention, model, example, monkeypatch)
    attention = model.layers[0].attention
    found = {name: arrays(work()) for name, work in arms.scopes(model, example).items()}
    q, k, v = attention.project(x)
    assert all(mx.array_equal(a, b) for a, b in zip(found["qkv"], (q, k, v), strict=True))
    normed = attention.norm(q, k)
    assert all(mx.array_equal(a, b) for a, b in zip(found["qkv_norm"], (*normed, v), strict=True))
    assert not mx.allclose(found["qkv_norm"][0], q)
    turned = attention.turned(q, k, rotation)
    assert all(mx.array_equal(a, b) for a, b in zip(found["qkv_norm_rope"], (*turned, v), strict=True))
    assert not mx.allclose(turned[0], normed[0])
    assert mx.array_equal(found["attention"][0], wanted)
    assert mx.array_equal(attention.to_out[0](attention.attend(*turned, v, mask)), wanted)


def test_the_feed_forwards_scopes_are_its_parts(
    model: Transformer, example: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate and up products, SwiGLU and the whole feed-forward are those of a step."""
    (x,), wanted = called(FeedForward, model, example, monkeypatch)
    feed_forward = model.layers[0].feed_forward
    found = {name: arrays(work()) for name, work in arms.scopes(model, example).items()}
    gate, up = feed_forward.gate_and_up(x)
    assert mx.array_equal(found["gate_up"][0], gate) and mx.array_equal(found["gate_up"][1], up)
    assert mx.array_equal(feed_forward.w2(found["gate_up_swiglu"][0]), wanted)
    assert mx.array_equal(found["feed_forward"][0], wanted)


def test_watching_leaves_the_model_as_it_was(model: Transformer, example: Inputs) -> None:
    """What a scope needs to see is seen in a copy: the model computes the same, with the same modules."""
    compiled = transforms.compile_blocks(model)
    before, wanted = compiled.layers[0].attention, compiled(*example)
    mx.eval(arms.scopes(compiled, example, ["attention"])["attention"]())
    assert compiled.layers[0].attention is before and compiled.layers[0].compiled
    assert mx.array_equal(compiled(*example), wanted)


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit-g32", "mxfp8"])
def test_arms_compute_the_same_in_every_scope(model: Transformer, example: Inputs, quantization: str | None) -> None:
    """In fp32 every arm gives what its baseline gives to 1e-5, in each of its scopes, with packed weights too."""
    plain = transforms.quantize(model, quantization) if quantization else model
    baselines, fused = ladder.baselines(plain, list(ladder.ARMS)), ladder.fused(plain, list(ladder.ARMS))
    assert set(fused) == set(ladder.ARMS)
    for name, arm in ladder.ARMS.items():
        wanted = arms.scopes(baselines[arm.baseline], example, arm.scopes)
        for scope, work in arms.scopes(fused[name], example, arm.scopes).items():
            for a, b in zip(arrays(work()), arrays(wanted[scope]()), strict=True):
                assert half.relative_l2(a, b) < 1e-5, (name, scope)


@pytest.mark.parametrize("quantization", ["8bit", "4bit-g32", "mxfp8"])
def test_packed_projections_are_joined_as_they_are(model: Transformer, quantization: str) -> None:
    """A fused packed projection holds the rows of the three, bit for bit: packing again would round again."""
    packed = transforms.quantize(model, quantization)
    fused = ladder.fused(packed, ["fused_both"])["fused_both"]
    for (_, block), (_, plain) in zip(transforms.blocks(fused), transforms.blocks(packed), strict=True):
        attention, feed_forward = plain.attention, plain.feed_forward
        for joint, parts in (
            (block.attention.to_qkv, (attention.to_q, attention.to_k, attention.to_v)),
            (block.feed_forward.w13, (feed_forward.w1, feed_forward.w3)),
        ):
            for name in ("weight", "scales"):
                assert mx.array_equal(joint[name], mx.concatenate([part[name] for part in parts], axis=0))


def test_arms_differ_from_their_baseline_in_the_fusion_alone(model: Transformer) -> None:
    """Copies, and the kernel for QK norm and RoPE, are where the arm says, and the kernel on both sides."""
    names = list(ladder.ARMS)
    baselines, fused = ladder.baselines(model, names), ladder.fused(model, names)
    own = {name: one.layers[0].attention for name, one in {**baselines, **fused}.items()}
    with_kernel = {name for name, attention in own.items() if isinstance(attention.norm_then_rotate, Kernel)}
    assert with_kernel == {"separate_qkv_kernel", "fused_qkv_kernel"}
    copying = {name for name, attention in own.items() if isinstance(attention, transforms.CopiedQKVAttention)}
    assert copying == {"fused_qkv_copied"}
    stacked = {name for name, attention in own.items() if "to_qkv" in attention}
    assert stacked == {"fused_qkv", "fused_qkv_copied", "fused_qkv_kernel", "fused_both"}
    assert len({id(own[name].to_qkv.weight) for name in stacked}) == 1  # held once
    kept = [one.layers[0].feed_forward for one in fused.values()]
    assert len({id(part.w2.weight) for part in kept}) == 1
    assert {name for name, one in fused.items() if "w13" in one.layers[0].feed_forward} == {
        "fused_gate_up",
        "fused_both",
    }


def test_families_go_from_the_product_to_the_step() -> None:
    """Comparisons come in the order of the scopes, arms of one baseline together, each in the scopes that it has."""
    found = ladder.families(list(ladder.ARMS), ["all"])
    assert list(dict.fromkeys(one.scope for one in found)) == list(scopes.SCOPES)
    pairs = {(one.scope, name) for one in found for name in one.arms}
    assert pairs == {(scope, name) for name, arm in ladder.ARMS.items() for scope in arm.scopes}
    assert found[0] == ladder.Family("qkv", "separate_qkv", ("fused_qkv", "fused_qkv_copied"))
    # A model with the kernel never has its queries and keys normed and not yet rotated.
    assert ("qkv_norm", "fused_qkv_kernel") not in pairs
    of_the_step = {one.floor for one in found if one.scope == "step"}
    assert of_the_step == {("step", ()), ("step", ("fuse_norm_rope",))}
    asked = ladder.families(["fused_qkv"], ["step", "qkv", "block", "gate_up"])
    assert [(one.scope, one.arms) for one in asked] == [(scope, ("fused_qkv",)) for scope in ("qkv", "block", "step")]


@pytest.mark.parametrize(
    ("names", "where", "words"),
    [
        ([], ["all"], "arms must be a list of names, at least one, found []"),
        ("fused_qkv", ["all"], "arms must be a list of names"),
        (["fused_kv"], ["all"], "arms: 'fused_kv' is not known; known are fused_qkv, fused_qkv_copied"),
        (["fused_qkv", "fused_qkv"], ["all"], "arms: 'fused_qkv' is there twice"),
        (["fused_qkv"], ["rope", "step"], "scopes: 'rope' is not known; known are qkv, qkv_norm"),
        (["fused_qkv"], ["qkv", "block"], "scopes must hold 'step', which the verdict is about"),
        (["fused_qkv"], [], "scopes must be a list of names"),
        (["fused_qkv"], ["all", "step"], "scopes: 'all' is not known"),
    ],
)
def test_what_cannot_be_compared_is_refused(names: Any, where: Any, words: str) -> None:
    """Arms and scopes that are not known, twice, or none are refused in one line that lists the known ones."""
    with pytest.raises(InputError) as refused:
        ladder.families(names, where)
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


def test_scopes_and_their_names_go_together() -> None:
    """Every scope has a name for the page, and every arm's scopes are rungs of one ladder, in its order."""
    assert list(gains.NAMES) == list(scopes.SCOPES)
    for arm in ladder.ARMS.values():
        assert any([scope for scope in rungs if scope in arm.scopes] == list(arm.scopes) for rungs in gains.LADDERS)
