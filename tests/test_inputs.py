"""Seeded inputs for one step of a model."""

from pathlib import Path
from typing import Any

from zimage import digits, inputs, weights
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, InputError
from zimage.transformer import Transformer
from zimage.weights import load_transformer

import mlx.core as mx
import numpy as np
import pytest

SIZES = {"height": 64, "width": 32, "batch": 2, "caption_tokens": 5, "seed": 3}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(TransformerConfig.tiny())


@pytest.fixture(scope="module")
def digits_model() -> Transformer:
    return load_transformer("digits")


def example(model: Transformer, source: str = "synthetic:tiny", **changes: Any) -> inputs.Inputs:
    return inputs.example(model, source, **{**SIZES, **changes})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_shapes_follow_pixels_batch_and_caption_tokens(dtype: mx.Dtype) -> None:
    """Latents are the pixels over the config's pixels per latent; all activations have the model's dtype."""
    model = Transformer(TransformerConfig.tiny(), dtype=dtype)
    latents, timestep, captions = example(model)
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 4), dtype)
    assert timestep.shape == (2,)
    assert isinstance(captions, mx.array)
    assert (captions.shape, captions.dtype) == ((2, 5, 48), dtype)
    assert model(latents, timestep, captions).shape == (2, 4, 8, 4)


def test_values_follow_the_seed(model: Transformer) -> None:
    """One seed gives the same bits again; another changes latents and captions, and the two never share their noise."""
    one, again, other = example(model), example(model), example(model, seed=4)
    for a, b, c in ((one.latents, again.latents, other.latents), (one.captions, again.captions, other.captions)):
        assert mx.array_equal(a, b)
        assert not mx.array_equal(a, c)
    shared = min(one.latents.size, one.captions.size)
    assert not np.array_equal(np.array(one.latents).ravel()[:shared], np.array(one.captions).ravel()[:shared])


def test_values_are_realistically_scaled(model: Transformer) -> None:
    """Latents and captions are standard normal: neither zeros, which run faster, nor anything large."""
    found = example(model, height=256, width=256, caption_tokens=64)
    for array in (found.latents, found.captions):
        values = np.array(array)
        assert abs(values.mean()) < 0.05
        assert 0.95 < values.std() < 1.05


@pytest.mark.parametrize(("batch", "wanted"), [(1, [0.5]), (2, [0.25, 0.75]), (4, [0.125, 0.375, 0.625, 0.875])])
def test_timesteps_spread_over_the_unit_interval(model: Transformer, batch: int, wanted: list[float]) -> None:
    """Timesteps lie evenly within (0, 1), one for each item, in fp32."""
    timestep = example(model, batch=batch).timestep
    assert timestep.tolist() == wanted
    assert timestep.dtype == mx.float32


def test_inputs_are_computed_beforehand(model: Transformer) -> None:
    """What is given is evaluated already, so that no timing pays for it: evaluating it allocates nothing."""
    mx.eval(model.parameters())
    found = example(model, height=512, width=512)
    before = mx.get_active_memory()
    mx.eval(found)
    assert mx.get_active_memory() == before


def test_captions_of_the_digits_are_their_labels(digits_model: Transformer) -> None:
    """On digits the captions are the learned labels 0, 1, 2, ... in turn, one token each."""
    found = example(digits_model, "digits", height=8, width=8, batch=12, caption_tokens=1)
    assert found.latents.shape == (12, 1, 8, 8)
    wanted = digits.captions([*range(10), 0, 1])
    assert all(mx.array_equal(a, b) for a, b in zip(found.captions, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch": 0}, InputError, "batch and caption_tokens must be at least 1, found 0 and 5"),
        ({"caption_tokens": 0}, InputError, "found 2 and 0"),
        ({"caption_tokens": -3}, InputError, "found 2 and -3"),
        ({"seed": -1}, InputError, "seed must be an integer"),
        ({"height": 60}, ConfigError, "height 60 is not a positive multiple of 8"),
        ({"width": 0}, ConfigError, "width 0 is not a positive multiple of 8"),
    ],
)
def test_impossible_sizes_are_refused(
    model: Transformer, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Sizes that the model cannot take are refused in one line that says what was found."""
    with pytest.raises(error, match=words) as caught:
        example(model, **changes)
    assert "\n" not in str(caught.value)


def test_captions_of_a_converted_digits_model(digits_model: Transformer, tmp_path: Path) -> None:
    """A folder with label embeddings gives its own as captions, one token each."""
    weights.convert("digits", tmp_path / "own")
    table = mx.arange(10.0)[:, None] * mx.ones((1, digits_model.config.cap_feat_dim))
    mx.save_safetensors(str(tmp_path / "own" / "captions.safetensors"), {"captions": table.astype(mx.bfloat16)})
    found = example(digits_model, str(tmp_path / "own"), height=8, width=8, batch=3, caption_tokens=1)
    assert [(one.shape, one.dtype) for one in found.captions] == [((1, table.shape[1]), mx.float32)] * 3
    assert [float(one[0, 0]) for one in found.captions] == [0.0, 1.0, 2.0]
    with pytest.raises(InputError, match="one token"):
        example(digits_model, str(tmp_path / "own"), height=8, width=8, caption_tokens=2)


def test_a_digit_has_one_caption_token(digits_model: Transformer) -> None:
    """More caption tokens than the one of a label are refused on digits."""
    with pytest.raises(InputError, match="one token, its label; found caption_tokens 2"):
        example(digits_model, "digits", height=8, width=8, caption_tokens=2)
