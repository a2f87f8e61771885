"""Comparing arms with a baseline in quads: A B B A or B A A B, drawn anew for each, so that drift cancels.

Every quad starts with one untimed call, and one untimed call follows each switch of arms. The evidence is looked at
after 10, 20, 30 and 40 quads, and the level is split over the looks and the arms.
"""

import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from statistics import fmean
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.samples import Timed
from zimage.measure.statistics import LOOKS, analyse, verdict

import numpy as np

_FEWEST = 4  # quads before a budget may end a comparison


@dataclass(frozen=True)
class Sample:
    """One timed call: of which arm, in which quad, at which of its four positions."""

    arm: str
    quad: int
    position: int
    time_s: float


@dataclass(frozen=True)
class Comparison:
    """What an arm did to the time: ratio arm / baseline, interval, p over all looks, and the verdict with its reason.

    verdict is "faster", "slower", "equivalent" or "inconclusive". The interval holds 1 exactly when p > alpha; `level`
    is the part of alpha that one look at one arm has. `samples` holds every timed call of both.
    """

    baseline: str
    arm: str
    ratio: float
    low: float
    high: float
    p: float
    verdict: str
    reason: str
    quads: int
    looks: int
    alpha: float
    level: float
    delta: float
    noise_floor: float | None
    seed: int
    samples: list[Sample]

    def __str__(self) -> str:
        floor = "" if self.noise_floor is None else f", noise floor {100 * self.noise_floor:.1f} %"
        evidence = f"{self.quads} quads{floor}"
        if self.verdict == "inconclusive":
            evidence += f" ({self.reason})"
        confidence = f"{100 * (1 - self.alpha):g} % CI"
        if self.low <= 1 <= self.high:
            return (
                f"{self.arm}: {self.verdict}, time ratio {self.ratio:.3f} to {self.baseline}, "
                f"{confidence} {self.low:.3f}-{self.high:.3f}, {evidence}"
            )
        change, *ends = (100 * abs(1 - x) for x in (self.ratio, self.low, self.high))
        return (
            f"{self.arm}: {self.verdict}, {change:.1f} % {'less' if self.ratio < 1 else 'more'} time than "
            f"{self.baseline}, {confidence} {min(ends):.1f}-{max(ends):.1f}, {evidence}"
        )

    def row(self, scope: str, regime: str = "burst") -> dict[str, Any]:
        """The comparison as a row of the `ablation` table."""
        return {
            "arm": self.arm, "baseline": self.baseline, "scope": scope, "regime": regime, "ratio": self.ratio,
            "ratio_low": self.low, "ratio_high": self.high, "p_value": self.p, "verdict": self.verdict,
            "reason": self.reason, "verdict_without_drops": self.verdict, "quads": self.quads, "dropped_quads": 0,
            "noise_floor": self.noise_floor,
        }  # fmt: skip

    def sample_rows(self, scope: str, regime: str = "burst", trial: int = 0) -> list[dict[str, Any]]:
        """The raw samples as rows of the `samples` table; `trial` tells comparisons with one baseline apart."""
        return [
            {
                "arm": s.arm, "scope": scope, "process": 0, "trial": trial, "quad": s.quad, "position": s.position,
                "kind": "sample", "regime": regime, "time_s": s.time_s, "dropped": False,
            }
            for s in self.samples
        ]  # fmt: skip


def schedule(rng: random.Random) -> Iterator[tuple[bool, bool]]:
    """The calls of one quad as (is the arm, is timed), order A B B A or B A A B drawn from `rng`."""
    first = rng.random() < 0.5
    calls = (first, not first, not first, first)
    yield first, False
    for i, call in enumerate(calls):
        if i and calls[i - 1] != call:
            yield call, False
        yield call, True


def compare(
    baseline: Timed,
    arm: Timed,
    *,
    seed: int,
    alpha: float = 0.05,
    delta: float = 0.01,
    budget_s: float | None = None,
    max_quads: int = 40,
    noise_floor: float | None = None,
    names: tuple[str, str] = ("baseline", "arm"),
) -> Comparison:
    """Compare `arm` with `baseline`; each performs one timed call and returns its seconds.

    Stops at a look when the interval excludes 1 or its half-width is under delta / 2, else after `max_quads` quads, or
    when `budget_s` is spent. Raises MeasurementError for arguments out of range or a time that is not positive.
    """
    found = compare_many(
        baseline, {names[1]: arm}, seed=seed, alpha=alpha, delta=delta, budget_s=budget_s, max_quads=max_quads,
        noise_floor=noise_floor, baseline_name=names[0],
    )  # fmt: skip
    return found[names[1]]


def compare_many(
    baseline: Timed,
    arms: Mapping[str, Timed],
    *,
    seed: int,
    alpha: float = 0.05,
    delta: float = 0.01,
    budget_s: float | None = None,
    max_quads: int = 40,
    noise_floor: float | None = None,
    baseline_name: str = "baseline",
) -> dict[str, Comparison]:
    """Compare each of `arms` with `baseline`, all interleaved in time, the level divided by their number too.

    An arm that has its answer at a look takes no more calls. Otherwise as `compare`.
    """
    _check(arms, baseline_name, seed, alpha, delta, budget_s, max_quads, noise_floor)
    rng = random.Random(seed)
    level = alpha / (len(LOOKS) * len(arms))
    differences: dict[str, list[float]] = {name: [] for name in arms}
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    done: dict[str, Comparison] = {}
    start = time.monotonic()
    for quad in range(max_quads):
        waiting = [name for name in arms if name not in done]
        rng.shuffle(waiting)
        for name in waiting:
            taken = _quad(quad, (baseline_name, baseline), (name, arms[name]), rng)
            samples[name] += taken
            differences[name].append(_mean_log(taken, name) - _mean_log(taken, baseline_name))
        count = quad + 1
        spent = budget_s is not None and count >= _FEWEST and time.monotonic() - start > budget_s
        last = spent or count == max_quads
        if count not in LOOKS and not last:
            continue
        for name in waiting:
            estimate = analyse(np.array(differences[name]), level)
            narrow = estimate.low > 0 and math.log(estimate.high) - math.log(estimate.low) < delta
            if last or narrow or not estimate.low <= 1 <= estimate.high:
                word, reason = verdict(estimate, delta, noise_floor)
                if spent and word == "inconclusive":
                    reason += f"; the budget of {budget_s:g} s was spent"
                done[name] = Comparison(
                    baseline_name, name, estimate.ratio, estimate.low, estimate.high,
                    min(1.0, len(LOOKS) * len(arms) * estimate.p), word, reason, count,
                    _looks(count), alpha, level, delta, noise_floor, seed, samples[name],
                )  # fmt: skip
        if len(done) == len(arms):
            break
    return {name: done[name] for name in arms}


def _quad(quad: int, baseline: tuple[str, Timed], arm: tuple[str, Timed], rng: random.Random) -> list[Sample]:
    taken: list[Sample] = []
    for is_arm, is_timed in schedule(rng):
        name, call = arm if is_arm else baseline
        seconds = call()
        if is_timed:
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
                raise MeasurementError(f"{name} returned {seconds!r} seconds for a timed call; it must be positive")
            taken.append(Sample(name, quad, len(taken), float(seconds)))
    return taken


def _mean_log(samples: list[Sample], arm: str) -> float:
    return fmean(math.log(s.time_s) for s in samples if s.arm == arm)


def _looks(count: int) -> int:
    """How often the evidence has been looked at when a comparison ends after `count` quads."""
    return sum(look < count for look in LOOKS) + 1


def _check(
    arms: Mapping[str, Timed],
    baseline_name: str,
    seed: int,
    alpha: float,
    delta: float,
    budget_s: float | None,
    max_quads: int,
    noise_floor: float | None,
) -> None:
    if not arms:
        raise MeasurementError("a comparison needs at least one arm")
    if baseline_name in arms:
        raise MeasurementError(f"baseline and arm are both called {baseline_name!r}; their names must differ")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MeasurementError(f"seed must be an integer, found {seed!r}")
    if not 0 < alpha < 1 or not 0 < delta < 1:
        raise MeasurementError(f"alpha and delta must lie between 0 and 1, found {alpha} and {delta}")
    if budget_s is not None and not budget_s > 0:
        raise MeasurementError(f"budget_s must be positive, found {budget_s}")
    if noise_floor is not None and not 0 <= noise_floor < math.inf:
        raise MeasurementError(f"noise_floor must be a |log ratio|, 0 or more, found {noise_floor}")
    if isinstance(max_quads, bool) or not isinstance(max_quads, int) or not 1 <= max_quads <= LOOKS[-1]:
        raise MeasurementError(f"max_quads must be an integer between 1 and {LOOKS[-1]}, found {max_quads!r}")
