"""`python -m tests.stopwatch [SOURCE PIXELS CAPTION_TOKENS]`: what the project's timer says beside other stopwatches.

One is a second clock around the same call, in turns with the timer; the other stands around the whole series of timed
calls, from outside, and so counts what lies between them too.
"""

import sys
import time
from statistics import median

import zimage
from zimage import inputs
from zimage.measure import timed

import mlx.core as mx

ROUNDS = 40


def main(source: str = "digits", pixels: str = "8", caption_tokens: str = "1") -> None:
    """Print the medians, the total of the series, and both ratios."""
    model = zimage.load_transformer(source)
    example = inputs.example(model, source, int(pixels), int(pixels), 1, int(caption_tokens), 0)
    call = timed(lambda: model(*example))
    ours, theirs = [], []
    for i in range(ROUNDS + 4):
        for ours_first in (i % 2 == 0, i % 2 == 1):
            if ours_first:
                seconds, kept = call(), ours
            else:
                start = time.monotonic_ns()
                mx.eval(model(*example))
                seconds, kept = (time.monotonic_ns() - start) / 1e9, theirs
            if i >= 4:
                kept.append(seconds)
    start = time.monotonic_ns()
    series = sum(call() for _ in range(ROUNDS))
    outside = (time.monotonic_ns() - start) / 1e9
    print(f"a call: timer {median(ours):.6f} s, stopwatch {median(theirs):.6f} s, {median(ours) / median(theirs):.4f}")
    print(f"{ROUNDS} calls: timer {series:.6f} s, stopwatch {outside:.6f} s, {series / outside:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
