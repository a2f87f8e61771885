"""Comparing arms with a baseline in quads, and saying what came of it.

The evidence is looked at after every ten quads and after the last, 40 at most. The level is split over the looks that
are planned so, and over the arms.
"""

import math
import random
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.arguments import (
    require_calls,
    require_fractions,
    require_integer,
    require_names,
    require_pair,
    require_positive,
)
from zimage.measure.floor import NoiseFloor, floor_at, require_floor
from zimage.measure.quads import Quads, Sample, sample_rows
from zimage.measure.samples import Timed
from zimage.measure.statistics import LOOKS, Estimate, analyse, critical, verdict

_UNITS = {"sustained": "sustained quads", "fresh processes": "pairs of fresh processes"}
MANY_TIMES = 3.0  # a time ratio from which on it is told as times, not as per cent more
_FEWEST = 4  # quads before a budget may end a comparison


@dataclass(frozen=True)
class Comparison:
    """What an arm did to the time: ratio arm / baseline, interval, p over all looks, and the verdict with its reason.

    verdict is "faster", "slower", "equivalent" or "inconclusive". The interval holds 1 exactly when p > alpha; `level`
    is the part of alpha that one look at one arm has. `quads` are those the numbers come from; `dropped` counts the
    others by the arm that ran before them, and `verdict_without_drops` is what all of them together would have said.
    regime is "burst", "sustained", or "fresh processes", where a pair of them stands for a quad. `samples` holds every
    timed call of both arms and of the canary.
    """

    baseline: str
    arm: str
    ratio: float
    low: float
    high: float
    p: float
    verdict: str
    reason: str
    verdict_without_drops: str
    quads: int
    dropped: Mapping[str, int]
    looks: int
    alpha: float
    level: float
    delta: float
    noise_floor: float | None
    regime: str
    seed: int
    samples: list[Sample]

    @property
    def dropped_quads(self) -> int:
        """How many quads were dropped."""
        return sum(self.dropped.values())

    def __str__(self) -> str:
        confidence = f"{100 * (1 - self.alpha):g} % CI"
        if self.low <= 1 <= self.high:
            return (
                f"{self.arm}: {self.verdict}, time ratio {self.ratio:.3f} to {self.baseline}, "
                f"{confidence} {self.low:.3f}-{self.high:.3f}, {self._evidence()}"
            )
        if self.ratio >= MANY_TIMES:
            return (
                f"{self.arm}: {self.verdict}, {self.ratio:.2f} times as long as {self.baseline}, "
                f"{confidence} {self.low:.2f}-{self.high:.2f}, {self._evidence()}"
            )
        change, *ends = (100 * abs(1 - x) for x in (self.ratio, self.low, self.high))
        return (
            f"{self.arm}: {self.verdict}, {change:.1f} % {'less' if self.ratio < 1 else 'more'} time than "
            f"{self.baseline}, {confidence} {min(ends):.1f}-{max(ends):.1f}, {self._evidence()}"
        )

    def _evidence(self) -> str:
        text = f"{self.quads} {_UNITS.get(self.regime, 'quads')}"
        if self.dropped:
            text += f", {self.dropped_quads} dropped ("
            text += ", ".join(f"{count} after {arm}" for arm, count in self.dropped.items()) + ")"
        if self.noise_floor is not None:
            text += f", noise floor {100 * self.noise_floor:.1f} %"
        if self.verdict == "inconclusive":
            text += f" ({self.reason})"
        if self.verdict_without_drops != self.verdict:
            text += f"; {self.verdict_without_drops} if none were dropped"
        return text

    def row(self, scope: str, regime: str | None = None) -> dict[str, Any]:
        """The comparison as a row of the `ablation` table."""
        return {
            "arm": self.arm, "baseline": self.baseline, "scope": scope, "regime": regime or self.regime,
            "ratio": self.ratio, "ratio_low": self.low, "ratio_high": self.high, "p_value": self.p,
            "verdict": self.verdict, "reason": self.reason, "verdict_without_drops": self.verdict_without_drops,
            "quads": self.quads, "dropped_quads": self.dropped_quads, "noise_floor": self.noise_floor,
        }  # fmt: skip

    def sample_rows(self, scope: str, regime: str | None = None, trial: int = 0) -> list[dict[str, Any]]:
        """The raw samples as rows of the `samples` table; `trial` tells comparisons with one baseline apart.

        The canary's have the arm and the kind `canary`; the samples of dropped quads are marked as dropped.
        """
        return sample_rows(self.samples, scope, regime or self.regime, trial)


def compare(
    baseline: Timed,
    arm: Timed,
    *,
    seed: int,
    alpha: float = 0.05,
    delta: float = 0.01,
    budget_s: float | None = None,
    max_quads: int = 40,
    noise_floor: float | NoiseFloor | None = None,
    canary: Timed | None = None,
    names: tuple[str, str] = ("baseline", "arm"),
    of: int = 1,
) -> Comparison:
    """Compare `arm` with `baseline`; each performs one timed call and returns its seconds.

    Looks after every ten quads and after `max_quads`, at an equal part of alpha each. Stops at a look when the interval
    excludes 1 or its half-width is under delta / 2, else after `max_quads` quads, or when `budget_s` is spent. Warns,
    before anything is called, where `max_quads` are too few for any interval.

    noise_floor: a |log ratio|, or what `noise_floor` measured. canary: one timed call of something that never changes,
    before each quad; a quad whose canary is out of step is dropped, whatever came of it, and at most 2 * max_quads are
    taken in all. of: how many arms are compared with the baseline one after the other, as where they do not fit in
    memory together; the level is divided by their number, as `compare_many` does. Raises MeasurementError for arguments
    out of range or a time that is not positive.
    """
    require_pair(names)
    found = compare_many(
        baseline, {names[1]: arm}, seed=seed, alpha=alpha, delta=delta, budget_s=budget_s, max_quads=max_quads,
        noise_floor=noise_floor, canary=canary, baseline_name=names[0], of=of,
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
    noise_floor: float | NoiseFloor | None = None,
    canary: Timed | None = None,
    baseline_name: str = "baseline",
    of: int | None = None,
) -> dict[str, Comparison]:
    """Compare each of `arms` with `baseline`, all interleaved in time, the level divided by their number too.

    An arm that has its answer at a look takes no more calls. Otherwise as `compare`; canaries are judged arm by arm.
    of: how many arms there are in all, where others are compared before or after these; theirs alone if None.
    """
    if not isinstance(arms, Mapping) or not arms:
        raise MeasurementError(f"a comparison needs at least one arm, as a mapping of names to calls, found {arms!r}")
    require_names(baseline_name, *arms)
    require_calls({**arms, baseline_name: baseline}, canary)
    require_integer("seed", seed)
    require_integer("max_quads", max_quads, 1, LOOKS[-1])
    require_fractions(alpha=alpha, delta=delta)
    if budget_s is not None:
        require_positive(budget_s=budget_s)
    require_floor(noise_floor)
    number = len(arms) if of is None else of
    require_integer("of", number, len(arms))
    rng = random.Random(seed)
    # A budget or dropped quads may bring the last look forward, blind to which arm is faster, but never add a look.
    tests = _looks(max_quads) * number
    level, needed = alpha / tests, _needed(max_quads, number, alpha)
    if critical(max_quads, level) < 0:
        warnings.warn(
            f"max_quads={max_quads} is too few for any interval at alpha {alpha:g} with {number} "
            f"{'arm' if number == 1 else 'arms'}, whatever is measured: it takes {needed} quads",
            RuntimeWarning,
            stacklevel=2,
        )
    taken = {name: Quads((baseline_name, baseline), (name, arm), canary) for name, arm in arms.items()}
    done: dict[str, Comparison] = {}
    before: str | None = None
    start = time.monotonic()
    for count in range(1, 2 * max_quads + 1):
        waiting = [name for name in arms if name not in done]
        rng.shuffle(waiting)
        grown = []
        for name in waiting:
            grown += [name] * taken[name].take(rng, before)
            before = taken[name].samples[-1].arm
        spent = budget_s is not None and count >= _FEWEST and time.monotonic() - start > budget_s
        for name in waiting:
            kept = sum(taken[name].kept)
            last = spent or kept == max_quads or count == 2 * max_quads
            if not last and not (name in grown and kept in LOOKS):
                continue
            estimate = analyse(taken[name].differences(), level)
            narrow = estimate.low > 0 and math.log(estimate.high) - math.log(estimate.low) < delta
            if not last and not narrow and estimate.low <= 1 <= estimate.high:
                continue
            ending = f", it takes {needed}" if math.isinf(estimate.high) else ""
            if spent:
                ending += f"; the budget of {budget_s:g} s was spent"
            elif last and kept < max_quads:
                ending += f"; only {kept} of {count} quads were kept"
            done[name] = _concluded(
                taken[name], estimate, looks=_looks(kept), tests=tests, seed=seed, alpha=alpha, level=level,
                delta=delta, noise_floor=noise_floor, ending=ending,
            )  # fmt: skip
        if len(done) == len(arms):
            break
    return {name: done[name] for name in arms}


def _looks(quads: int) -> int:
    """How often the evidence is looked at where a comparison ends after so many quads."""
    return sum(look < quads for look in LOOKS) + 1


def _needed(max_quads: int, number: int, alpha: float) -> str:
    """How many quads any interval takes, by the looks planned for `max_quads`, or for more where it takes more."""
    counts = range(1, LOOKS[-1] + 1)
    enough = (n for n in counts if critical(n, alpha / (_looks(max(n, max_quads)) * number)) >= 0)
    return str(next(enough, f"more than {LOOKS[-1]}"))


def _concluded(
    run: Quads,
    estimate: Estimate,
    *,
    looks: int,
    tests: int,
    seed: int,
    alpha: float,
    level: float,
    delta: float,
    noise_floor: float | NoiseFloor | None,
    ending: str,
) -> Comparison:
    kept, floor = sum(run.kept), floor_at(noise_floor, sum(run.kept))
    word, reason = verdict(estimate, delta, floor)
    undropped = word
    if run.dropped:
        every = run.differences(with_dropped=True)
        undropped, _ = verdict(analyse(every, level), delta, floor_at(noise_floor, len(every)))
    return Comparison(
        run.baseline, run.arm, estimate.ratio, estimate.low, estimate.high, min(1.0, tests * estimate.p), word,
        reason + ending, undropped, kept, dict(run.dropped), looks, alpha, level, delta, floor, "burst", seed,
        run.samples,
    )  # fmt: skip
