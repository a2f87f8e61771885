"""Quads: A B B A or B A A B, drawn anew for each, so that drift cancels; and the canary that tells which to drop.

Every quad starts with one untimed call, and one untimed call follows each switch of arms. Where there is a canary, one
call of it stands before each quad; it alone decides whether the quad is dropped, before the quad's order is drawn.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.arguments import is_number
from zimage.measure.samples import Timed
from zimage.measure.statistics import Floats

import numpy as np
from numpy.typing import NDArray

CANARIES = 9  # the last so many, the newest included, say what is normal
TOLERANCE = 0.05


@dataclass(frozen=True)
class Sample:
    """One call: of which arm, in which quad, at which of its four positions.

    kind is "sample", "canary" (position -1) or "warm-up" (in sustained blocks: a call right after a switch). In fresh
    processes a pair of them stands for the quad, kinds are "first call", "warm-up" and "sample", and processes are
    numbered from 1; 0 is the one that asks.
    """

    arm: str
    quad: int
    position: int
    time_s: float
    kind: str = "sample"
    dropped: bool = False
    process: int = 0


def schedule(rng: random.Random) -> Iterator[tuple[bool, bool]]:
    """The calls of one quad as (is the arm, is timed), order A B B A or B A A B drawn from `rng`."""
    first = rng.random() < 0.5
    calls = (first, not first, not first, first)
    yield first, False
    for i, call in enumerate(calls):
        if i and calls[i - 1] != call:
            yield call, False
        yield call, True


def differences(times_s: Floats, arm_outside: NDArray[np.bool_]) -> Floats:
    """Mean log time of the arm minus that of the baseline [...], from quads [..., 4] with the arm outside or inside."""
    logs = np.log(times_s)
    outer, inner = (logs[..., 0] + logs[..., 3]) / 2, (logs[..., 1] + logs[..., 2]) / 2
    return np.where(arm_outside, outer - inner, inner - outer)


def in_step(canaries_s: Floats) -> NDArray[np.bool_]:
    """Whether the last of these canaries [..., n] lies within TOLERANCE of their median; give the last CANARIES."""
    median = np.median(canaries_s, axis=-1)
    return np.asarray(abs(canaries_s[..., -1] - median) <= TOLERANCE * median)


def seconds(name: str, value: Any) -> float:
    """What a timed call returned. Raises MeasurementError unless it is a positive, finite number."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise MeasurementError(f"{name} returned {value!r} seconds for a timed call; it must be positive")
    return float(value)


class Quads:
    """The quads of one arm and its baseline taken so far, each as (name, call)."""

    def __init__(self, baseline: tuple[str, Timed], arm: tuple[str, Timed], canary: Timed | None = None) -> None:
        self.baseline, self.arm = baseline[0], arm[0]
        self.samples: list[Sample] = []
        self.kept: list[bool] = []  # of every quad taken
        self.dropped: Counter[str] = Counter()  # by the arm that ran last before the canary
        self._calls = {False: baseline, True: arm}
        self._canary = canary
        self._canaries_s: list[float] = []

    def take(self, rng: random.Random, before: str | None = None) -> bool:
        """Take one more, and say whether it is kept; `before` is the arm that ran last, where that is one of others."""
        quad, kept = len(self.kept), True
        if before is None and quad:
            before = self.samples[-1].arm
        if self._canary is not None:
            self._canaries_s.append(seconds("the canary", self._canary()))
            kept = bool(in_step(np.array(self._canaries_s[-CANARIES:])))
            self.samples.append(Sample("canary", quad, -1, self._canaries_s[-1], "canary", not kept))
        position = 0
        for is_arm, is_timed in schedule(rng):
            name, call = self._calls[is_arm]
            value = call()
            if is_timed:
                self.samples.append(Sample(name, quad, position, seconds(name, value), dropped=not kept))
                position += 1
        self.kept.append(kept)
        if not kept and before is not None:  # the first canary is its own median
            self.dropped[before] += 1
        return kept

    def differences(self, with_dropped: bool = False) -> Floats:
        """The differences of the kept quads, or of all that were taken."""
        timed = [s for s in self.samples if s.kind == "sample"]
        times = np.array([s.time_s for s in timed]).reshape(-1, 4)
        found = differences(times, np.array([s.arm == self.arm for s in timed[::4]]))
        return found if with_dropped else found[self.kept]


def sample_rows(samples: list[Sample], scope: str, regime: str, trial: int) -> list[dict[str, Any]]:
    """Samples as rows of the `samples` table; `trial` tells comparisons with one baseline apart."""
    return [
        {
            "arm": s.arm, "scope": scope, "process": s.process, "trial": trial, "quad": s.quad, "position": s.position,
            "kind": s.kind, "regime": regime, "time_s": s.time_s, "dropped": s.dropped,
        }
        for s in samples
    ]  # fmt: skip
