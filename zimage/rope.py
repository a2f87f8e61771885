"""Three-axis rotary position tables.

A token's position has three coordinates: frame, row, column. Each axis owns a slice of every head, in that order, and
rotates its adjacent pairs by `position / theta^(2i/d)`. Angles are computed in fp64 and rounded to fp32 before their
cosine and sine are taken, as the published PyTorch model does.
"""

from functools import lru_cache

from zimage.config import TransformerConfig
from zimage.errors import InputError

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=32)
def _axis_angles(length: int, dim: int, theta: float) -> NDArray[np.float32]:
    frequencies = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    return np.outer(np.arange(length, dtype=np.float64), frequencies).astype(np.float32)


def table(positions: NDArray[np.int64], config: TransformerConfig) -> NDArray[np.float32]:
    """Cosines and sines of the angles at `positions` [L, 3]: [2, L, head_dim / 2] in fp32.

    Raises InputError when a position lies at or beyond `axes_lens`: a gather there would silently return rubbish.
    """
    axes = ("frame", "row", "column")
    angles = []
    for axis, (name, dim, length) in enumerate(zip(axes, config.axes_dims, config.axes_lens, strict=True)):
        index = positions[..., axis]
        largest = int(index.max(initial=0))
        if largest >= length:
            raise InputError(
                f"{name} position {largest} is beyond axes_lens[{axis}] = {length}; "
                "use a smaller image or a shorter caption"
            )
        used = _axis_angles(length, dim, config.rope_theta)
        angles.append(used[index])
    angle = np.concatenate(angles, axis=-1)
    return np.stack([np.cos(angle), np.sin(angle)])


def caption_positions(length: int) -> NDArray[np.int64]:
    """Positions [length, 3] of caption tokens, padding included: `(1 + i, 0, 0)`."""
    positions = np.zeros((length, 3), np.int64)
    positions[:, 0] = np.arange(1, length + 1)
    return positions


def image_positions(rows: int, columns: int, caption_length: int, length: int) -> NDArray[np.int64]:
    """Positions [length, 3] of image tokens: `(caption_length + 1, row, column)`, then `(0, 0, 0)` for padding.

    `caption_length` is the padded caption length of the same item.
    """
    positions = np.zeros((length, 3), np.int64)
    tokens = rows * columns
    positions[:tokens, 0] = caption_length + 1
    positions[:tokens, 1] = np.repeat(np.arange(rows), columns)
    positions[:tokens, 2] = np.tile(np.arange(columns), rows)
    return positions
