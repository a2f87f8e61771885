"""Latents to tokens and back, and what each batch's shapes imply: padding, position tables, masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from zimage import rope
from zimage.config import SEQUENCE_MULTIPLE, TransformerConfig
from zimage.lengths import lengths

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def patchify(latents: mx.array, patch: int) -> mx.array:
    """Latents [B, C, H, W] as tokens [B, H/p * W/p, p * p * C], channels fastest."""
    B, C, H, W = latents.shape
    tokens = latents.reshape(B, C, H // patch, patch, W // patch, patch).transpose(0, 2, 4, 3, 5, 1)
    return tokens.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(tokens: mx.array, size: tuple[int, int], patch: int) -> mx.array:
    """Tokens [B, >= H/p * W/p, p * p * C] as latents [B, C, H, W]; what follows the image's tokens is left out."""
    H, W = size
    rows, columns = H // patch, W // patch
    B, _, width = tokens.shape
    C = width // (patch * patch)
    image = tokens[:, : rows * columns].reshape(B, rows, columns, patch, patch, C)
    return image.transpose(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


@dataclass(frozen=True)
class Layout:
    """How a model pads its tokens and places them; the published one's unless `details` changed it.

    image_multiple: that an image's tokens are padded to, 1 for no padding; caption_rows: every shorter caption is
    given that many rows, zeros after its own, which are embedded as if they were its own; bf16_positions: a position
    is rounded to bfloat16, which has eight bits for it.
    """

    image_multiple: int = SEQUENCE_MULTIPLE
    caption_rows: int = 0
    bf16_positions: bool = False

    def place(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions as RoPE takes them."""
        if not self.bf16_positions:
            return positions
        bits = positions.astype(np.float32).view(np.uint32)  # of which bfloat16 is the upper half, rounded to even
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return rounded.astype(np.uint32).view(np.float32).astype(np.int64)


PUBLISHED = Layout()


@dataclass(frozen=True)
class Geometry:
    """All that depends on a batch's shapes and not on its values.

    Masks are additive in fp32, [B, 1, 1, L], and None when every item has the same padded length: then nothing needs
    masking, and a mask of ones would only cost time.
    """

    image_tokens: int
    image_length: int  # padded
    caption_length: int  # padded, the longest of the batch
    caption_is_token: mx.array | None  # [B, caption_length, 1]; None when no caption has padding
    image_rotation: mx.array  # [2, 1 or B, L, 1, head_dim / 2] in fp32: cosines, then sines
    caption_rotation: mx.array
    joint_rotation: mx.array
    caption_mask: mx.array | None
    joint_mask: mx.array | None


@lru_cache(maxsize=64)
def geometry(
    config: TransformerConfig,
    size: tuple[int, int],
    patch: int,
    captions: tuple[int, ...],
    layout: Layout = PUBLISHED,
) -> Geometry:
    """The Geometry of a batch of latents of `size` (rows, columns) with captions of the given token counts.

    Raises InputError when the latents cannot be cut into patches, a caption is empty, or a position lies beyond
    `axes_lens`.
    """
    found = lengths(config, size, patch, captions)
    captions = tuple(max(n, layout.caption_rows) for n in captions)
    found = replace(found, captions=captions, image_multiple=layout.image_multiple)
    longest = found.caption
    # One table serves the batch when the captions are equally long; else each item has its own.
    items = found.items if found.ragged else found.items[:1]
    caption = rope.table(layout.place(rope.caption_positions(longest)), config)
    placed = [layout.place(rope.image_positions(found.rows, found.columns, n, found.image)) for n in items]
    images = [rope.table(positions, config) for positions in placed]
    joints = [np.concatenate([image, caption], axis=1) for image in images]
    is_token = np.arange(longest)[None, :, None] < np.array(captions)[:, None, None]
    return Geometry(
        image_tokens=found.image_tokens,
        image_length=found.image,
        caption_length=longest,
        caption_is_token=None if is_token.all() else mx.array(is_token),
        image_rotation=_rotation(images),
        caption_rotation=_rotation([caption]),
        joint_rotation=_rotation(joints),
        caption_mask=_mask(found.items, longest),
        joint_mask=_mask([found.image + n for n in found.items], found.joint),
    )


def _rotation(tables: list[NDArray[np.float32]]) -> mx.array:
    return mx.array(np.stack(tables, axis=1)[:, :, :, None, :])


def _mask(lengths: Sequence[int], longest: int) -> mx.array | None:
    if all(n == longest for n in lengths):
        return None
    beyond: NDArray[np.bool_] = np.arange(longest)[None, :] >= np.array(lengths)[:, None]
    return mx.array(np.where(beyond, np.float32(-np.inf), np.float32(0))[:, None, None, :])
