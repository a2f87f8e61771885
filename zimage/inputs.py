"""Seeded inputs for one step of a model, as the notebooks and the tests of timings use them."""

from typing import NamedTuple

from zimage import digits, sources
from zimage.errors import InputError
from zimage.transformer import Captions, Transformer, random_key

import mlx.core as mx


class Inputs(NamedTuple):
    """What a model is called with: latents [B, C, H, W], timestep [B], caption features."""

    latents: mx.array
    timestep: mx.array
    captions: Captions


def example(
    model: Transformer, source: str, height: int, width: int, batch: int, caption_tokens: int, seed: int
) -> Inputs:
    """Evaluated inputs for images of `height` x `width` pixels: noise, timesteps spread over (0, 1), and captions.

    Captions are the labels 0, 1, 2, ... of a digits model, and else noise of `caption_tokens` tokens. Raises InputError
    or ConfigError for sizes the model cannot take, and WeightsError where `source` is none.
    """
    if batch < 1 or caption_tokens < 1:
        raise InputError(f"batch and caption_tokens must be at least 1, found {batch} and {caption_tokens}")
    table = digits.table_of(sources.describe(source))
    if table is not None and caption_tokens != 1:
        raise InputError(f"a caption of a digits model has one token, its label; found caption_tokens {caption_tokens}")
    config = model.config
    size = config.latent_size(height, width)
    latent_key, caption_key = mx.random.split(random_key(seed))
    latents = mx.random.normal((batch, config.in_channels, *size), dtype=model.dtype, key=latent_key)
    timestep = (mx.arange(batch) + 0.5) / batch
    captions: Captions
    if table is not None:
        captions = [table[i % 10][None] for i in range(batch)]
    else:
        shape = (batch, caption_tokens, config.cap_feat_dim)
        captions = mx.random.normal(shape, dtype=model.dtype, key=caption_key)
    mx.eval(latents, timestep, captions)
    return Inputs(latents, timestep, captions)
