"""Flow matching: the noise levels of a denoising run, and Euler steps along them.

A latent at noise level sigma is `sigma * noise + (1 - sigma) * data`. The model takes `1 - sigma` as its timestep and
returns a velocity that points from noise to data, so an Euler step adds `(sigma - next_sigma) * velocity`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from zimage import step_caching
from zimage.errors import InputError
from zimage.transformer import Captions, Transformer, random_key

import mlx.core as mx
import numpy as np

MAX_STEPS = 10_000


class Step(NamedTuple):
    """One step of a denoising run: latents [B, C, H, W] before and after it, and the velocity between, evaluated."""

    sigma: float
    latents: mx.array
    velocity: mx.array
    after: mx.array


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` noise levels from 1 down to 0, evenly spaced and then shifted: `s * x / (1 + (s - 1) * x)`.

    The published pipeline uses eight steps and shift 3. Raises InputError for steps outside 1 to MAX_STEPS or a
    shift that isn't positive.
    """
    if not _is_count(steps) or steps > MAX_STEPS:
        raise InputError(f"steps must be an integer from 1 to {MAX_STEPS}, found {steps!r:.60}")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < 1e9:
        raise InputError(f"shift must be a positive number below 1e9, found {shift!r:.60}")
    even = np.linspace(1.0, 0.0, steps + 1)
    return [float(x) for x in shift * even / (1 + (shift - 1) * even)]


def step(
    model: Transformer,
    latents: mx.array,
    captions: Captions,
    sigma: float,
    next_sigma: float,
    patch_size: int | None = None,
) -> mx.array:
    """One Euler step of latents [B, C, H, W] from `sigma` to `next_sigma`; latents stay in their own dtype."""
    return _euler(latents, velocity(model, latents, captions, sigma, patch_size), sigma, next_sigma)


def velocity(
    model: Transformer, latents: mx.array, captions: Captions, sigma: float, patch_size: int | None = None
) -> mx.array:
    """The model's velocity [B, C, H, W] at latents of noise level `sigma`, in the model's own dtype."""
    timestep = mx.full((latents.shape[0],), 1.0 - sigma, dtype=mx.float32)
    return model(latents, timestep, captions, patch_size)


def noise(model: Transformer, batch: int, size: tuple[int, int], seed: int) -> mx.array:
    """Seeded fp32 noise [B, C, *size] to start from; item i is the same whatever the batch around it.

    Raises InputError for a bad batch, size or seed.
    """
    if not _is_count(batch):
        raise InputError(f"batch must be an integer of at least 1, found {batch!r}")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_count(n) for n in size):
        raise InputError(f"size must be two positive integers, latent rows and columns, found {size!r}")
    random_key(seed)  # a seed that isn't a number must be refused before it is added to
    keys = [random_key(seed + i) for i in range(batch)]
    return mx.stack([mx.random.normal((model.config.in_channels, *size), key=key) for key in keys])


def sample(
    model: Transformer,
    captions: Captions,
    size: tuple[int, int],
    steps: int = 8,
    shift: float = 3.0,
    seed: int = 0,
    on_step: Callable[[int, mx.array], None] | None = None,
    patch_size: int | None = None,
) -> mx.array:
    """Latents [B, C, *size] in fp32, denoised from seeded noise by Euler steps; one item for each caption.

    They are in bfloat16 where the model keeps them so (`details.bf16_latents`). `size` counts latent rows and columns.
    `on_step(i, latents)` is called after step i, with evaluated latents. `patch_size` may be left out where the model
    has one. Where the model takes over something from earlier steps, its `report` says what. Raises InputError for bad
    steps, shift or shapes.
    """
    latents = None
    for i, taken in enumerate(walk(model, captions, size, steps, shift, seed, patch_size)):
        latents = taken.after
        if on_step is not None:
            on_step(i, latents)
    assert latents is not None  # there is one step at least
    return latents


def walk(
    model: Transformer,
    captions: Captions,
    size: tuple[int, int],
    steps: int = 8,
    shift: float = 3.0,
    seed: int = 0,
    patch_size: int | None = None,
) -> Iterator[Step]:
    """Every step of `sample`, one after the other; the same arguments and errors.

    Where the model takes over something from earlier steps, this is the trajectory that it does so in.
    """
    several = captions.ndim > 0 if isinstance(captions, mx.array) else isinstance(captions, (list, tuple))
    if not several or len(captions) < 1:
        raise InputError("sample needs at least one caption: an array [B, L, F] or a list of arrays [L_i, F]")
    levels = sigmas(steps, shift)
    latents = noise(model, len(captions), size, seed).astype(model.latents_dtype)
    model = step_caching.started(model, steps)
    for sigma, next_sigma in zip(levels[:-1], levels[1:], strict=True):
        found = velocity(model, latents, captions, sigma, patch_size)
        after = _euler(latents, found, sigma, next_sigma)
        mx.eval(found, after)
        yield Step(sigma, latents, found, after)
        latents = after


def _euler(latents: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    return latents + (sigma - next_sigma) * velocity.astype(latents.dtype)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
