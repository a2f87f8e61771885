"""The real digits: scikit-learn's copy of the UCI optical recognition test set, 1797 images of 8 x 8 pixels.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
SPLIT_SEED = 0
SIZE = (8, 8)


class Digits(NamedTuple):
    """Images [N, 8, 8] with ink from 0 (none) to 1 (full), and their labels [N]."""

    images: Images
    labels: NDArray[np.int64]


def real() -> tuple[Digits, Digits]:
    """The training images (80 %) and the held-out ones, split once by a fixed seed, classes in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = (raw.images / 16).astype(np.float32)
    parts = train_test_split(images, raw.target, test_size=0.2, random_state=SPLIT_SEED, stratify=raw.target)
    train_images, test_images, train_labels, test_labels = parts
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def to_latents(images: Images) -> Images:
    """Images [N, 8, 8] in 0..1 as latents [N, 1, 8, 8] in -1..1."""
    return (images * 2 - 1)[:, None]


def to_images(latents: Images) -> Images:
    """Latents [N, 1, 8, 8] as images [N, 8, 8], clipped to 0..1."""
    return np.clip((latents[:, 0] + 1) / 2, 0, 1)
