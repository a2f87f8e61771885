"""Where the time of a chain of steps goes: the prefix view, T(k) - T(k-1)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.timing import timed

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class PrefixTime:
    """Seconds of one step: median and quartiles over the rounds of T(k) - T(k-1). Negative values are noise, shown."""

    name: str
    time_s: float
    low_s: float
    high_s: float
    samples_s: list[float]


def prefix(
    names: Sequence[str], run: Callable[[int], Any], rounds: int, seed: int
) -> tuple[list[PrefixTime], PrefixTime]:
    """The time of each step of a chain, and of the whole chain.

    `run(k)` builds the first k steps and returns what has to be evaluated; it is called for k = 1 .. len(names) in a
    new random order each round, after one untimed round that compiles and warms. Raises MeasurementError for no steps
    or fewer than one round.
    """
    if not names or rounds < 1:
        raise MeasurementError(f"a profile needs steps and at least one round, found {len(names)} and {rounds}")
    order = list(range(1, len(names) + 1))
    calls = {k: timed(lambda k=k: run(k)) for k in order}  # type: ignore[misc]
    for k in order:
        calls[k]()
    rng = random.Random(seed)
    times = np.zeros((rounds, len(names) + 1))
    for r in range(rounds):
        rng.shuffle(order)
        for k in order:
            times[r, k] = calls[k]()
    steps = [_summary(name, times[:, k] - times[:, k - 1]) for k, name in enumerate(names, start=1)]
    return steps, _summary("whole step", times[:, -1])


def _summary(name: str, samples: np.ndarray[Any, np.dtype[np.float64]]) -> PrefixTime:
    low, median, high = (float(x) for x in np.quantile(samples, [0.25, 0.5, 0.75]))
    return PrefixTime(name, median, low, high, [float(x) for x in samples])


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory MLX held while `work`'s arrays were computed, everything that was held before included."""
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(work())
    return max(int(mx.get_peak_memory()), int(mx.get_active_memory()))  # the first is 0 until something is allocated
