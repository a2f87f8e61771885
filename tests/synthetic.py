"""Models with synthetic weights for tests: drawing the weights takes longer than most tests, so it is done once."""

from functools import lru_cache

from zimage.config import TransformerConfig
from zimage.layers import clone
from zimage.transformer import Transformer

import mlx.core as mx


def synthetic(config: TransformerConfig, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Transformer:
    """What `Transformer` with these arguments gives. Arrays are shared; modules are its own, and may be replaced."""
    return clone(_made(config, seed, dtype))


@lru_cache(maxsize=16)
def _made(config: TransformerConfig, seed: int, dtype: mx.Dtype) -> Transformer:
    model = Transformer(config, seed, dtype)
    mx.eval(model.parameters())
    return model
