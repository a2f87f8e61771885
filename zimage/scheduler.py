"""Flow matching: the noise levels of a denoising run, and Euler steps along them.

A latent at noise level sigma is `sigma * noise + (1 - sigma) * data`. The model takes `1 - sigma` as its timestep and
returns a velocity that points from noise to data, so an Euler step adds `(sigma - next_sigma) * velocity`.
"""

from collections.abc import Callable, Sequence

from zimage.errors import InputError
from zimage.transformer import Captions, Transformer, random_key

import mlx.core as mx
import numpy as np

MAX_STEPS = 10_000


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` noise levels from 1 down to 0, evenly spaced and then shifted: `s * x / (1 + (s - 1) * x)`.

    The published pipeline uses eight steps and shift 3. Raises InputError for steps outside 1 to MAX_STEPS or a
    shift that isn't positive.
    """
    if not _is_count(steps) or steps > MAX_STEPS:
        raise InputError(f"steps must be an integer from 1 to {MAX_STEPS}, found {steps!r:.60}")
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < 1e9:
        raise InputError(f"shift must be a positive number, found {shift!r}")
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
    timestep = mx.full((latents.shape[0],), 1.0 - sigma, dtype=mx.float32)
    velocity = model(latents, timestep, captions, patch_size)
    return latents + (sigma - next_sigma) * velocity.astype(latents.dtype)


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

    `size` counts latent rows and columns. `on_step(i, latents)` is called after step i, with evaluated latents.
    `patch_size` may be left out where the model has one. Raises InputError for bad steps, shift or shapes.
    """
    several = captions.ndim > 0 if isinstance(captions, mx.array) else isinstance(captions, (list, tuple))
    if not several or len(captions) < 1:
        raise InputError("sample needs at least one caption: an array [B, L, F] or a list of arrays [L_i, F]")
    batch = len(captions)
    levels = sigmas(steps, shift)
    latents = noise(model, batch, size, seed)
    for i, (sigma, next_sigma) in enumerate(_pairs(levels)):
        latents = step(model, latents, captions, sigma, next_sigma, patch_size)
        mx.eval(latents)
        if on_step is not None:
            on_step(i, latents)
    return latents


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _pairs(levels: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(levels[:-1], levels[1:], strict=True))
