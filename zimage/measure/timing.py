"""One synchronised timed call, and trials of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError

import mlx.core as mx
import numpy as np

Timed = Callable[[], float]


def timed(work: Callable[[], Any]) -> Timed:
    """A callable that does `work` once and returns its seconds.

    `work` builds its graph anew and returns every array that has to be computed; evaluating them ends the sample.
    """

    def call() -> float:
        start = time.perf_counter()
        mx.eval(work())
        return time.perf_counter() - start

    return call


@dataclass(frozen=True)
class Trial:
    """Seconds of one arm in one process: the first call apart, warm-ups apart, then the samples."""

    first_call_s: float
    warm_up_s: list[float]
    samples_s: list[float]

    @property
    def median_s(self) -> float:
        """Median of the samples."""
        return float(np.median(self.samples_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile of the samples."""
        low, high = np.quantile(self.samples_s, [0.25, 0.75])
        return float(low), float(high)


def trial(call: Timed, samples: int = 10, warm_up: int = 3) -> Trial:
    """A first call, `warm_up` more, then `samples`. Raises MeasurementError for fewer than one sample."""
    if samples < 1 or warm_up < 0:
        raise MeasurementError(f"a trial needs at least one sample, found samples={samples}, warm_up={warm_up}")
    first = call()
    return Trial(first, [call() for _ in range(warm_up)], [call() for _ in range(samples)])
