"""Noise levels, Euler steps and the noise they start from."""

from typing import Any

from zimage import scheduler
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest

PUBLISHED = [1, 0.9545454, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]
CAPTIONS = [mx.zeros((3, 48)), mx.zeros((5, 48))]


class PointsAtData:
    """Stands for a model whose velocity is exact: from the noise it was asked about to the data, `data - noise`.

    At noise level sigma a latent is sigma * noise + (1 - sigma) * data, so the velocity is (data - latent) / sigma.
    """

    config, latents_dtype, kept_captions = TransformerConfig.tiny(), mx.float32, None

    def __init__(self, data: mx.array) -> None:
        self.data = data
        self.timesteps: list[list[float]] = []

    def __call__(self, latents: mx.array, timestep: mx.array, _captions: Any, _patch_size: Any) -> mx.array:
        assert timestep.dtype == mx.float32
        self.timesteps.append(timestep.tolist())
        return (self.data - latents) / (1 - timestep)[:, None, None, None]


def test_the_published_eight_steps() -> None:
    """Eight steps at shift 3 have the published pipeline's noise levels."""
    assert scheduler.sigmas(8, shift=3.0) == pytest.approx(PUBLISHED, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_without_a_shift_levels_are_even(steps: int) -> None:
    """At shift 1 there are steps + 1 evenly spaced levels from 1 to 0."""
    assert scheduler.sigmas(steps) == pytest.approx([1 - i / steps for i in range(steps + 1)], abs=1e-12)


@pytest.mark.parametrize("shift", [0.3, 1.0, 7.0])
def test_levels_fall_from_one_to_zero(shift: float) -> None:
    """Whatever the shift, levels start at 1, end at exactly 0 and fall at each step."""
    levels = scheduler.sigmas(9, shift)
    assert levels[0] == pytest.approx(1.0, abs=1e-12)
    assert levels[-1] == 0.0
    assert all(a > b for a, b in zip(levels[:-1], levels[1:], strict=True))


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 3.0), (20, 1.0)])
def test_euler_lands_on_the_data(steps: int, shift: float) -> None:
    """Along a straight field from noise to data, any number of Euler steps ends at the data."""
    data = mx.random.normal((2, 4, 6, 8), key=mx.random.key(3))
    model = PointsAtData(data)
    found = scheduler.sample(model, CAPTIONS, (6, 8), steps, shift, seed=5)  # type: ignore[arg-type]
    assert found.dtype == mx.float32
    assert np.allclose(np.array(found), np.array(data), atol=1e-5)
    wanted = [[1 - sigma] * 2 for sigma in scheduler.sigmas(steps, shift)[:-1]]
    assert model.timesteps == [pytest.approx(pair, abs=1e-6) for pair in wanted]


@pytest.mark.parametrize("given", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("computed", [mx.float32, mx.bfloat16], ids=["model_float32", "model_bfloat16"])
def test_a_step_adds_the_velocity(given: mx.Dtype, computed: mx.Dtype) -> None:
    """The model's velocity points from noise to data: a step adds (sigma - next_sigma) times it, in latents' dtype."""

    def ones(latents: mx.array, _timestep: mx.array, _captions: Any, _patch_size: Any) -> mx.array:
        return mx.ones(latents.shape, dtype=computed)

    latents = mx.zeros((1, 4, 2, 2), dtype=given)
    moved = scheduler.step(ones, latents, CAPTIONS[:1], 0.75, 0.5)  # type: ignore[arg-type]
    assert moved.dtype == given
    assert np.array_equal(np.array(moved.astype(mx.float32)), np.full((1, 4, 2, 2), 0.25))


def test_an_items_noise_does_not_depend_on_its_batch() -> None:
    """Item i of a batch starts from the same noise as item 0 of seed + i alone, and items differ."""
    model = PointsAtData(mx.zeros((1,)))
    batch = scheduler.noise(model, 3, (6, 8), seed=7)  # type: ignore[arg-type]
    assert batch.shape == (3, 4, 6, 8)
    for i in range(3):
        alone = scheduler.noise(model, 1, (6, 8), seed=7 + i)  # type: ignore[arg-type]
        assert mx.array_equal(alone[0], batch[i])
    assert not mx.array_equal(batch[0], batch[1])


def test_on_step_sees_every_step() -> None:
    """on_step is called once a step, in order, and last with the result."""
    seen: list[tuple[int, mx.array]] = []
    model = PointsAtData(mx.ones((2, 4, 4, 4)))
    found = scheduler.sample(
        model, CAPTIONS, (4, 4), 3, on_step=lambda i, latents: seen.append((i, latents))  # type: ignore[arg-type]
    )  # fmt: skip
    assert [i for i, _ in seen] == [0, 1, 2]
    assert mx.array_equal(seen[-1][1], found)


def test_a_real_model_samples_the_same_alone_and_in_a_batch() -> None:
    """A caption's latents are the same from a ragged batch as alone, to fp32 rounding."""
    model = Transformer(TransformerConfig.tiny())
    captions = [mx.random.normal((n, 48), key=mx.random.key(n)) for n in (3, 40)]
    both = scheduler.sample(model, captions, (6, 8), steps=2, seed=1)
    for i, caption in enumerate(captions):
        alone = scheduler.sample(model, caption[None], (6, 8), steps=2, seed=1 + i)
        assert np.allclose(np.array(alone[0]), np.array(both[i]), atol=1e-4)


BAD_LEVELS: list[tuple[Any, Any, str]] = [
    (0, 1.0, "steps must be an integer from 1 to 10000, found 0"),
    (-3, 1.0, "steps must be"),
    (2.5, 1.0, "steps must be"),
    ("8", 1.0, "steps must be"),
    (True, 1.0, "steps must be"),
    (scheduler.MAX_STEPS + 1, 1.0, "steps must be"),
    (10**20, 1.0, "steps must be"),
    (8, 0, "shift must be a positive number below 1e9, found 0"),
    (8, -1.0, "shift must be"),
    (8, float("nan"), "shift must be"),
    (8, float("inf"), "shift must be"),
    (8, "3", "shift must be"),
    (8, None, "shift must be"),
]


@pytest.mark.parametrize(("steps", "shift", "message"), BAD_LEVELS)
def test_bad_levels_are_refused(steps: Any, shift: Any, message: str) -> None:
    """Steps that are no count and shifts that are no positive number give an InputError."""
    with pytest.raises(InputError, match=message):
        scheduler.sigmas(steps, shift)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": []}, "at least one caption"),
        ({"captions": None}, "at least one caption"),
        ({"captions": mx.array(1.0)}, "at least one caption"),
        ({"size": (8,)}, "size must be two positive integers"),
        ({"size": (8, 8, 8)}, "size must be two positive integers"),
        ({"size": "88"}, "size must be two positive integers"),
        ({"size": (8, -8)}, "size must be two positive integers"),
        ({"size": (7, 8)}, "cannot be cut into patches"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_bad_arguments_of_sample_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Whatever of sample's arguments is wrong, an InputError of one line says which."""
    model = Transformer(TransformerConfig.tiny())
    with pytest.raises(InputError, match=message) as caught:
        scheduler.sample(model, **{"captions": CAPTIONS, "size": (8, 8), **arguments})
    assert "\n" not in str(caught.value)


def test_a_model_with_several_patch_sizes_is_sampled() -> None:
    """The patch size asked for reaches the model, and a model that has two refuses to be sampled without one."""
    model = Transformer(TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1)))
    captions = mx.zeros((1, 2, model.config.cap_feat_dim))
    drawn = [scheduler.sample(model, captions, (4, 4), steps=1, patch_size=patch) for patch in (1, 2)]
    assert [x.shape for x in drawn] == [(1, 4, 4, 4)] * 2
    assert not mx.array_equal(*drawn)
    with pytest.raises(InputError, match="patch_size="):
        scheduler.sample(model, captions, (4, 4), steps=1)
