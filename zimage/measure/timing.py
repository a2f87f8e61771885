"""One synchronised timed call, and trials of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.samples import Timed

import mlx.core as mx
import numpy as np

_captures: list[str] = []  # that are under way and would be part of every time


@contextmanager
def untimed(what: str) -> Iterator[None]:
    """Refuse timings within the block, because `what`, such as "a Metal capture", would be in all of them."""
    _captures.append(what)
    try:
        yield
    finally:
        _captures.remove(what)


def timed(work: Callable[[], Any]) -> Timed:
    """A callable that does `work` once and returns its seconds.

    `work` builds its graph anew and returns every array that has to be computed, in lists, tuples and dicts as deep as
    it likes; evaluating them ends the sample. A call raises MeasurementError when `work` returns anything else, which
    MLX would silently leave uncomputed, and while a capture is under way.
    """

    def call() -> float:
        if _captures:
            raise MeasurementError(f"{_captures[-1]} is under way and would be in the time; measure without it")
        start = time.perf_counter()
        result = work()
        mx.eval(result)
        time_s = time.perf_counter() - start
        _check(result)
        return time_s

    return call


def _check(result: Any) -> None:
    if isinstance(result, (list, tuple, dict)):
        for part in result.values() if isinstance(result, dict) else result:
            _check(part)
    elif not (result is None or isinstance(result, (mx.array, int, float))):
        raise MeasurementError(
            f"timed work returned a {type(result).__name__}, which MLX cannot evaluate; return arrays, or lists, "
            "tuples and dicts of them"
        )


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
