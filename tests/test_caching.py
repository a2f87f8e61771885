"""Captions refined once: the plain bits, no work where nothing changed, and new work where something did."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.test_operations import _tiny
from tests.test_transforms import CONFIGS, every_config, run
from zimage import arms, launching, scheduler, transforms
from zimage.config import TransformerConfig
from zimage.layers import clone
from zimage.transformer import State, Transformer, TransformerBlock

import mlx.core as mx
import pytest

PLAIN = CONFIGS["plain"]


def refined(monkeypatch: pytest.MonkeyPatch, model: Transformer, call: Callable[[], Any]) -> int:
    """How many blocks of the caption branch a call runs."""
    ran: list[TransformerBlock] = []
    plain = TransformerBlock.forward

    def forward(block: TransformerBlock, *arguments: Any) -> mx.array:
        ran.append(block)
        return plain(block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformerBlock, "forward", forward)
        mx.eval(call())
    return sum(any(block is one for one in model.context_refiner) for block in ran)


@every_config
def test_a_second_call_has_the_bits_of_the_first(config: TransformerConfig) -> None:
    """With other latents and timesteps too, what is kept changes no bit, also of a ragged batch."""
    plain = Transformer(config)
    model = transforms.keep_captions(plain)
    assert plain.kept_captions is None
    for _ in range(2):
        assert mx.array_equal(run(model), run(plain))
    _, (latents, timestep, captions) = _tiny(config)
    for step in (1, 2, 3):
        given = (latents * step, timestep / step, captions)
        assert mx.array_equal(model(*given), plain(*given))


def test_captions_are_refined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with the same caption arrays, in any list, skip the branch; others don't, and take the place of the old."""
    model, (latents, timestep, captions) = _tiny(PLAIN)
    model = transforms.keep_captions(model)
    blocks = len(model.context_refiner)
    assert blocks

    def ran(given: Any) -> int:
        return refined(monkeypatch, model, lambda: model(latents, timestep, given))

    assert not isinstance(captions, mx.array)
    other = [caption + 1 for caption in captions]
    assert [ran(captions), ran(captions), ran([*captions])] == [blocks, 0, 0]
    assert [ran(other), ran(other), ran(captions)] == [blocks, 0, blocks]
    single = mx.stack([captions[0]] * latents.shape[0])
    assert [ran(single), ran(single), ran(single + 0)] == [blocks, 0, blocks]


def test_new_weights_of_the_branch_refine_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another array in the caption branch is seen, one elsewhere needs no new captions; both give the right output."""
    model, example = _tiny(PLAIN)
    model = transforms.keep_captions(model)
    mx.eval(model(*example))
    model.layers[0].ffn_norm1.weight = model.layers[0].ffn_norm1.weight * 2
    assert refined(monkeypatch, model, lambda: model(*example)) == 0
    for change in ("refiner", "embedder", "padding"):
        if change == "refiner":
            model.context_refiner[0].feed_forward.w2.weight = model.context_refiner[0].feed_forward.w2.weight * 2
        elif change == "embedder":
            model.cap_embedder[1].weight = model.cap_embedder[1].weight * 2
        else:
            model.cap_pad_token = model.cap_pad_token + 1
        plain = clone(model)
        plain.kept_captions = None
        assert mx.array_equal(model(*example), plain(*example)), change
    assert refined(monkeypatch, model, lambda: model(*example)) == 0


def test_a_transformed_model_keeps_captions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept stays with the model whose weights made it."""
    model, example = _tiny(PLAIN)
    kept = transforms.keep_captions(model)
    mx.eval(kept(*example))
    for after in (clone(kept), transforms.quantize(kept, "4bit-g32"), arms.transformed(kept, ["fuse_qkv"])):
        assert refined(monkeypatch, after, lambda after=after: after(*example)) == len(model.context_refiner)  # type: ignore[misc]
        plain = clone(after)
        plain.kept_captions = None
        assert mx.array_equal(after(*example), plain(*example))


def test_the_call_is_the_fold_of_its_stages() -> None:
    """Also with kept captions the stages have the same names, and their fold is the call bit for bit."""
    model, example = _tiny(replace(PLAIN, n_refiner_layers=0))
    for plain in (model, _tiny(PLAIN)[0]):
        kept = transforms.keep_captions(plain)
        for _ in range(2):
            stages = kept.stages(*example)
            assert [stage.name for stage in stages] == [stage.name for stage in plain.stages(*example)]
            state = State(*example)
            for stage in stages:
                state = stage(state)
            assert state.velocity is not None and mx.array_equal(state.velocity, plain(*example))


def test_every_trajectory_refines_its_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of the scheduler refines its captions once, also those that the run before it, or a step, had kept;

    what is compiled is not traced again, and steps by themselves keep theirs.
    """
    model, (latents, timestep, captions) = _tiny(PLAIN)
    blocks = len(model.context_refiner)
    for names in (["keep_captions"], ["compile_blocks", "keep_captions", "reuse_every_2nd"]):
        kept = arms.transformed(model, names)
        for block in kept.context_refiner:
            block.compiled = False  # or its calls could not be counted
        mx.eval(kept(latents, timestep, captions))
        made = [launching.compiled(block, "forward") for block in kept.layers]

        def run(kept: Transformer = kept) -> mx.array:
            return scheduler.sample(kept, captions, (latents.shape[2], latents.shape[3]), steps=3)

        assert [refined(monkeypatch, kept, run) for _ in range(3)] == [blocks] * 3, names
        assert kept.kept_captions is not None and kept.kept_captions.hits == 2
        mx.eval(kept(latents, timestep, captions))
        assert refined(monkeypatch, kept, lambda kept=kept: kept(latents, timestep, captions)) == 0  # type: ignore[misc]
        assert all(launching.compiled(b, "forward") is call for b, call in zip(kept.layers, made, strict=True))
