"""How many tokens a batch has, and how they are padded: arithmetic on its shapes that needs no MLX."""

from dataclasses import dataclass
from functools import cached_property

from zimage.config import SEQUENCE_MULTIPLE, TransformerConfig
from zimage.errors import InputError


def padded(length: int, multiple: int = SEQUENCE_MULTIPLE) -> int:
    """`length` rounded up to the multiple that every item's image and caption are padded to."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Lengths:
    """Token counts of a batch: of its images, which are all alike, and of its captions, which may differ."""

    rows: int  # of image tokens
    columns: int
    captions: tuple[int, ...]  # as given, one an item
    image_multiple: int = SEQUENCE_MULTIPLE  # that an image's tokens are padded to

    @property
    def image_tokens(self) -> int:
        """Tokens of an image before padding."""
        return self.rows * self.columns

    @property
    def image(self) -> int:
        """Tokens of an image, padded."""
        return padded(self.image_tokens, self.image_multiple)

    @property
    def items(self) -> tuple[int, ...]:
        """Each item's own caption length, padded."""
        return tuple(padded(n) for n in self.captions)

    @cached_property
    def caption(self) -> int:
        """Tokens of every caption of the batch: the longest, padded."""
        return padded(max(self.captions))

    @property
    def joint(self) -> int:
        """Tokens of image and caption together."""
        return self.image + self.caption

    @cached_property
    def ragged(self) -> bool:
        """Whether padded captions differ: then the shorter are masked, and each item has positions of its own."""
        return padded(min(self.captions)) < self.caption


def lengths(config: TransformerConfig, size: tuple[int, int], patch: int, captions: tuple[int, ...]) -> Lengths:
    """The Lengths of a batch of latents of `size` (rows, columns) with captions of the given token counts.

    Raises InputError when the latents cannot be cut into patches or a caption is empty.
    """
    if patch not in config.all_patch_size:
        raise InputError(f"patch_size {patch} is not one of this model's {list(config.all_patch_size)}")
    H, W = size
    if H < patch or W < patch or H % patch or W % patch:
        raise InputError(f"latents of {H} x {W} cannot be cut into patches of {patch} x {patch}")
    if min(captions) < 1:
        raise InputError("a caption needs at least one token")
    return Lengths(H // patch, W // patch, captions)
