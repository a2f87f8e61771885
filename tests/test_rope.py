"""Rotary tables and positions, beside the formula written out."""

from zimage import rope
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.kernels.heads import rotate

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

CONFIG = TransformerConfig.tiny(rope_theta=100.0)
POSITIONS = np.array([[0, 0, 0], [1, 0, 0], [33, 2, 5], [255, 63, 63], [7, 63, 0]])


def _angles(positions: NDArray[np.int64], config: TransformerConfig) -> NDArray[np.float64]:
    """position / theta^(2i/d), pair by pair, in plain Python and fp64."""
    return np.array(
        [
            [
                position[axis] / config.rope_theta ** (2 * i / dim)
                for axis, dim in enumerate(config.axes_dims)
                for i in range(dim // 2)
            ]
            for position in positions.tolist()
        ]
    )


def test_the_table_is_the_formula() -> None:
    """The table's cosines and sines are those of fp64 angles, to fp32 rounding of the angle."""
    found = rope.table(POSITIONS, CONFIG)
    angles = _angles(POSITIONS, CONFIG)
    assert found.shape == (2, 5, 16)
    assert found.dtype == np.float32
    allowed = 2e-7 + np.abs(angles) * 2.0**-24
    assert np.all(np.abs(found[0] - np.cos(angles)) <= allowed)
    assert np.all(np.abs(found[1] - np.sin(angles)) <= allowed)


def test_adjacent_pairs_turn() -> None:
    """rotate turns elements 2i and 2i + 1 of a head together, as a complex product, and keeps dtype and length."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 32)).astype(np.float32)
    table = rope.table(POSITIONS, CONFIG)
    turned = np.array(rotate(mx.array(x), mx.array(table[:, None, :, None, :])))
    wanted = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * _angles(POSITIONS, CONFIG))[None, :, None, :]
    np.testing.assert_allclose(turned[..., 0::2], wanted.real, atol=1e-4)
    np.testing.assert_allclose(turned[..., 1::2], wanted.imag, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    half = rotate(mx.array(x).astype(mx.bfloat16), mx.array(table[:, None, :, None, :]))
    assert half.dtype == mx.bfloat16


@pytest.mark.parametrize(("axis", "name"), [(0, "frame"), (1, "row"), (2, "column")])
def test_positions_beyond_the_table_are_refused(axis: int, name: str) -> None:
    """The last position of an axis has a row; the next is refused with the axis's name and length."""
    length = CONFIG.axes_lens[axis]
    position = np.zeros((1, 3), np.int64)
    position[0, axis] = length - 1
    rope.table(position, CONFIG)
    position[0, axis] = length
    with pytest.raises(InputError, match=rf"^{name} position {length} is beyond axes_lens\[{axis}\] = {length};"):
        rope.table(position, CONFIG)


def test_caption_positions_count_frames_from_one() -> None:
    """Caption token i, padding included, is at (1 + i, 0, 0)."""
    assert rope.caption_positions(32).tolist() == [[1 + i, 0, 0] for i in range(32)]


def test_image_positions_follow_the_caption() -> None:
    """Image tokens are at (padded caption length + 1, row, column), row by row, and padding at (0, 0, 0)."""
    found = rope.image_positions(3, 5, 64, 32).tolist()
    assert found == [[65, row, column] for row in range(3) for column in range(5)] + [[0, 0, 0]] * 17
