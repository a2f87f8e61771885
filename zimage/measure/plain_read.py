"""`python -m zimage.measure.plain_read FILE START END ...` reads bytes into fresh memory: what any loader must do."""

import sys

from zimage.measure.reporting import report

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 1 << 26


def read(file: str, start: int, end: int) -> NDArray[np.uint8]:
    """The bytes of `file` from `start` to `end`. Raises EOFError where it has fewer."""
    memory = np.empty(end - start, np.uint8)
    view, done = memory.data, 0
    with open(file, "rb", buffering=0) as f:
        f.seek(start)
        while done < len(view):
            count = f.readinto(view[done : done + PIECE_BYTES])
            if not count:
                raise EOFError(f"{file} ends at byte {start + done}, expected {end}")
            done += count
    return memory


def main(arguments: list[str]) -> None:
    """Read every FILE from START to END, all of them kept, and report."""
    ranges = [(file, int(start), int(end)) for file, start, end in zip(*[iter(arguments)] * 3, strict=True)]
    report(
        lambda: [read(file, start, end) for file, start, end in ranges],
        lambda pieces: sum(piece.nbytes for piece in pieces),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
