"""The first digits of seed 0, drawn two halves at once: `python -m tests.digits.drawing FIRST END FILE` draws some.

Digit i has label i % 10 and a seed of its own, so it is the same whoever draws it.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.sweeping import ROOT, side_by_side
from zimage import digits
from zimage.digits.data import Digits
from zimage.weights import load_transformer

import numpy as np

BATCH = 50


class First:
    """The first digits of seed 0 by the shipped weights in fp32; each is drawn once, however many tests look at it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images = np.zeros((0, 8, 8), np.float32)

    def __call__(self, count: int) -> Digits:
        """The first `count` of them."""
        known = len(self._images)
        if known < count:
            middle = known + -(-(count - known) // (2 * BATCH)) * BATCH
            parts = [(known, min(middle, count)), (middle, count)]
            ranges = [(first, end) for first, end in parts if first < end]
            drawn = side_by_side(*(partial(self._drawn, first, end) for first, end in ranges))
            self._images = np.concatenate([self._images, *drawn])
        return Digits(self._images[:count], np.arange(count) % 10)

    def _drawn(self, first: int, end: int) -> np.ndarray:
        file = self._folder / f"{first}-{end}.npy"
        command = [sys.executable, "-m", "tests.digits.drawing", str(first), str(end), str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        return np.load(file)


def main(first: int, end: int, file: str) -> None:
    """Draw the digits from `first` to before `end` into `file`."""
    drawn = digits.draw(load_transformer("digits", "float32"), [i % 10 for i in range(first, end)], seed=first)
    np.save(file, drawn.images)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
