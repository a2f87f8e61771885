"""A small trained Z-Image that ships with the package: 8x8 handwritten digits, drawn on request.

The architecture is the published one at another size: one latent channel of 8 x 8 pixels, and a caption of one token,
the learned embedding of the label. `train` says how it was trained; the weights lie in `weights/`.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

import mlx.core as mx

from zimage.errors import InputError

LABELS = range(10)


@lru_cache(maxsize=1)
def _table() -> mx.array:
    loaded = mx.load(str(files("zimage") / "digits" / "weights" / "captions.safetensors"))
    assert isinstance(loaded, dict)
    return loaded["captions"].astype(mx.float32)


def captions(labels: Sequence[int]) -> list[mx.array]:
    """Caption features of digits 0 to 9: a list of [1, F], one for each label. Raises InputError for other labels."""
    unknown = [label for label in labels if label not in LABELS]
    if unknown:
        raise InputError(f"the digits model draws 0 to 9, found {unknown[0]!r}")
    return [_table()[label][None] for label in labels]
