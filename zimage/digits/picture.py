"""Digits as a picture one can look at: every pixel a clean square, the images in a grid."""

from collections.abc import Mapping

from zimage.digits.data import Images
from zimage.errors import InputError

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK = 255, 24
MOST_ROWS, MOST_COLUMNS = 32, 20  # of pictures side by side


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


def side_by_side(drawn: Mapping[str, Images], scale: int = 4) -> NDArray[np.uint8]:
    """Grey-scale pixels of several arms' images [N, 8, 8] with ink 0..1: a named row an arm, a column a seed.

    At most MOST_ROWS arms and MOST_COLUMNS seeds, the first ones. Raises InputError where there is nothing to draw.
    """
    if not drawn:
        raise InputError("pictures side by side need the images of one arm at least")
    rows = {arm: grid(images[:MOST_COLUMNS], MOST_COLUMNS, scale) for arm, images in list(drawn.items())[:MOST_ROWS]}
    font = ImageFont.load_default(size=4 * scale)
    wide = max(int(font.getlength(arm)) for arm in rows) + 4 * scale
    page = []
    for arm, row in rows.items():
        name = Image.new("L", (wide, len(row)), _PAPER)
        ImageDraw.Draw(name).text((scale, len(row) // 2), arm, _INK, font, anchor="lm")
        page.append(np.concatenate([np.asarray(name), row], axis=1))
    if len({row.shape for row in page}) > 1:
        raise InputError("pictures side by side need images of the same seeds in every arm")
    return np.concatenate(page)
