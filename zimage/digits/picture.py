"""Digits as a picture one can look at: every pixel a clean square, the images in a grid."""

from zimage.digits.data import Images
from zimage.errors import InputError

import numpy as np
from numpy.typing import NDArray

_PAPER, _INK = 255, 24


def grid(images: Images, columns: int = 10, scale: int = 8) -> NDArray[np.uint8]:
    """Grey-scale pixels [height, width] of images [N, 8, 8] with ink 0..1, row by row, each pixel `scale` wide.

    Raises InputError where there is nothing to draw.
    """
    if images.ndim != 3 or not len(images) or columns < 1 or scale < 1:
        raise InputError(
            f"a grid needs images [N, H, W], columns and a scale, found {images.shape}, {columns}, {scale}"
        )
    count, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = scale
    page = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap), _PAPER, np.uint8)
    for i, image in enumerate(np.clip(images, 0, 1)):
        top, left = (
            gap + n * (size * scale + gap) for n, size in zip(divmod(i, columns), (height, width), strict=True)
        )
        grey = np.round(_PAPER + (_INK - _PAPER) * image).astype(np.uint8)
        page[top : top + height * scale, left : left + width * scale] = grey.repeat(scale, 0).repeat(scale, 1)
    return page
