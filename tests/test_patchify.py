"""Patches and back, and what the shapes of a batch imply."""

from zimage import rope
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.lengths import padded
from zimage.patchify import geometry, patchify, unpatchify

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    patch=st.integers(1, 4),
    padding=st.integers(0, 3),
)
def test_unpatchify_undoes_patchify(
    batch: int, channels: int, rows: int, columns: int, patch: int, padding: int
) -> None:
    """Latents of any shape come back from their tokens, whatever rows of padding follow."""
    shape = (batch, channels, rows * patch, columns * patch)
    latents = mx.arange(int(np.prod(shape))).reshape(shape)
    tokens = patchify(latents, patch)
    assert tokens.shape == (batch, rows * columns, patch * patch * channels)
    filled = mx.pad(tokens, [(0, 0), (0, padding), (0, 0)], constant_values=-1)
    assert mx.array_equal(unpatchify(filled, shape[2:], patch), latents)


def test_a_token_is_a_patch_with_channels_fastest() -> None:
    """Token (r, c) holds its patch's pixels row by row, all channels of a pixel together."""
    latents = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = np.array(patchify(mx.array(latents), 2))
    for r in range(2):
        for c in range(3):
            wanted = [latents[1, k, 2 * r + i, 2 * c + j] for i in range(2) for j in range(2) for k in range(3)]
            assert tokens[1, r * 3 + c].tolist() == wanted


@pytest.mark.parametrize(("length", "wanted"), [(1, 32), (31, 32), (32, 32), (33, 64), (64, 64), (4096, 4096)])
def test_lengths_are_padded_to_multiples_of_32(length: int, wanted: int) -> None:
    """A length is rounded up to the next multiple of 32, and a multiple stays."""
    assert padded(length) == wanted


@pytest.mark.parametrize("captions", [(5,), (32,), (1, 32), (33, 64, 40)])
def test_equal_padded_lengths_need_no_mask(captions: tuple[int, ...]) -> None:
    """Where all items have the same padded length, no mask exists and one rotation table serves the batch."""
    geo = geometry(CONFIG, (6, 6), 2, captions)
    assert geo.caption_mask is None
    assert geo.joint_mask is None
    assert geo.joint_rotation.shape[1] == geo.image_rotation.shape[1] == 1


def test_a_ragged_batch_masks_what_fills_it_up() -> None:
    """Masks are additive: zero for an item's own padded length, minus infinity beyond it."""
    geo = geometry(CONFIG, (6, 6), 2, (5, 40, 32))
    assert geo.caption_mask is not None
    assert geo.joint_mask is not None
    caption, joint = np.array(geo.caption_mask), np.array(geo.joint_mask)
    assert caption.shape == (3, 1, 1, 64)
    assert joint.shape == (3, 1, 1, 96)
    for item, length in enumerate((32, 64, 32)):
        assert np.all(caption[item, 0, 0, :length] == 0)
        assert np.all(np.isneginf(caption[item, 0, 0, length:]))
        assert np.all(joint[item, 0, 0, : 32 + length] == 0)
        assert np.all(np.isneginf(joint[item, 0, 0, 32 + length :]))


def test_image_positions_depend_on_the_items_own_caption() -> None:
    """In a ragged batch each item's image is at the frame after its own padded caption, not after the longest."""
    geo = geometry(CONFIG, (6, 6), 2, (5, 40))
    rotation = np.array(geo.image_rotation)
    for item, length in enumerate((32, 64)):
        wanted = rope.table(rope.image_positions(3, 3, length, 32), CONFIG)
        assert np.array_equal(rotation[:, item, :, 0], wanted)


def test_only_padded_captions_name_their_tokens() -> None:
    """caption_is_token is None when no caption has padding, and else true for an item's own tokens only."""
    assert geometry(CONFIG, (6, 6), 2, (32, 32)).caption_is_token is None
    marked = geometry(CONFIG, (6, 6), 2, (5, 32)).caption_is_token
    assert marked is not None
    assert np.array(marked).sum(axis=(1, 2)).tolist() == [5, 32]


@pytest.mark.parametrize(
    ("size", "patch", "captions", "message"),
    [
        ((7, 8), 2, (5,), "latents of 7 x 8 cannot be cut into patches of 2 x 2"),
        ((8, 0), 2, (5,), "latents of 8 x 0 cannot be cut"),
        ((8, 8), 4, (5,), r"patch_size 4 is not one of this model's \[1, 2\]"),
        ((8, 8), 2, (5, 0), "a caption needs at least one token"),
    ],
)
def test_impossible_shapes_are_refused(
    size: tuple[int, int], patch: int, captions: tuple[int, ...], message: str
) -> None:
    """Latents that don't divide, unknown patch sizes and empty captions give an InputError that says which."""
    with pytest.raises(InputError, match=message):
        geometry(CONFIG, size, patch, captions)
