"""Where the time of a chain of steps goes, in three views that are never mixed.

*Prefix*: T(k) is one evaluation of the first k stages, and stage k costs T(k) - T(k-1). *Depth*: time against the
number of repeated blocks; the slope is one block, the intercept the rest. *Operations*: one operation alone, its time
the slope over how often it is repeated in one evaluation.

Every round times everything once, in a new random order, so that a drifting clock spreads over all of it. A round gives
one value of each quantity; the estimate is the Hodges-Lehmann one over the rounds, and the interval inverts the exact
signed-rank test, as in a comparison.
"""

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.arguments import is_number, require_fractions, require_integer
from zimage.measure.samples import Timed
from zimage.measure.statistics import Floats, critical, walsh_averages
from zimage.measure.timing import timed

import mlx.core as mx
import numpy as np

Work = Callable[[], Any]
Clock = Callable[[Work], Timed]  # makes a timed call of work; `timed` outside of tests


@dataclass(frozen=True)
class Time:
    """Seconds of one thing: the estimate over the rounds, its interval, and the value of every round.

    Negative values are noise of a difference, and shown. Both ends are NaN where there are too few rounds for any
    interval at the level. repeated_s: of a slope, what was timed: T(r) of every round, by r.
    """

    name: str
    time_s: float
    low_s: float
    high_s: float
    samples_s: list[float]
    repeated_s: dict[int, list[float]] = field(default_factory=dict)

    def row(self, view: str) -> dict[str, Any]:
        """The time as columns of the `stages` table."""
        ends = {"time_low_s": _or_none(self.low_s), "time_high_s": _or_none(self.high_s)}
        return {"stage": self.name, "view": view, "time_s": self.time_s, **ends}


@dataclass(frozen=True)
class Prefix:
    """The prefix view. The stages' intervals hold together (level alpha over their number); others stand at alpha.

    whole: T(n), with the start of an evaluation, which the stages' sum is without. start: T(0), the evaluation of a
    trivial graph, which is the floor of clock and launch. overhead: what evaluating the stages' states costs beyond the
    plain call, where one was given. first_call_s: the whole before anything else ran. prefixes_s: T(0) .. T(n) of every
    round. note: why there are no intervals, or "".
    """

    stages: list[Time]
    whole: Time
    start: Time
    overhead: Time | None
    first_call_s: float
    prefixes_s: list[list[float]]
    note: str

    @property
    def kernel_build_s(self) -> float:
        """What the first call took longer than the median of later ones: building kernels, caches, first touches."""
        return self.first_call_s - float(np.median(self.whole.samples_s))

    def rows(self) -> list[dict[str, Any]]:
        """All of it as rows of the `stages` table, in views `prefix`, `whole` and `profiler`."""
        once = [("first call", self.first_call_s), ("kernel build", self.kernel_build_s)]
        return [
            *(stage.row("prefix") for stage in self.stages),
            self.whole.row("whole"),
            self.start.row("profiler"),
            *([self.overhead.row("profiler")] if self.overhead else []),
            *(Time(name, time_s, math.nan, math.nan, [time_s]).row("profiler") for name, time_s in once),
        ]


@dataclass(frozen=True)
class Depth:
    """The depth view: one block and the rest, each with its interval (both hold together), and T by count and round."""

    block: Time
    rest: Time
    times_s: dict[int, list[float]]
    note: str


def prefix(
    names: Sequence[str],
    run: Callable[[int], Any],
    rounds: int,
    seed: int,
    *,
    plain: Work | None = None,
    alpha: float = 0.05,
    clock: Clock = timed,
) -> Prefix:
    """The time of each stage of a chain, and of the whole.

    `run(k)` builds the first k stages and returns what has to be evaluated, `plain()` the same whole in the ordinary
    way. The very first call is that of the whole; one untimed round of everything follows, then the rounds. Raises
    MeasurementError for no stages, fewer than one round, or an alpha outside (0, 1).
    """
    n = len(names)
    _check(rounds, alpha, n > 0, "a profile needs at least one stage")
    zero = mx.zeros(())
    mx.eval(zero)
    calls: dict[int, Timed] = {k: clock(lambda k=k: run(k)) for k in range(n, 0, -1)}  # type: ignore[misc]
    calls[0] = clock(lambda: zero + 1)
    if plain is not None:
        calls[-1] = clock(plain)
    first_call_s = _checked(calls[n]())
    times = _rounds({"": calls}, rounds, seed)[""]
    level = alpha / n
    stages = [estimate(name, times[k] - times[k - 1], level) for k, name in enumerate(names, start=1)]
    return Prefix(
        stages,
        estimate("whole step", times[n], alpha),
        estimate("evaluation start", times[0], alpha),
        None if plain is None else estimate("profiler overhead", times[n] - times[-1], alpha),
        first_call_s,
        [[float(times[k][r]) for k in range(n + 1)] for r in range(rounds)],
        note(rounds, level),
    )


def depth(
    run: Callable[[int], Any],
    counts: Sequence[int],
    rounds: int,
    seed: int,
    *,
    alpha: float = 0.05,
    clock: Clock = timed,
) -> Depth:
    """The time of one repeated block and of the rest, from a line through T(count) in every round.

    `run(m)` builds the whole with m of its repeated blocks and returns what has to be evaluated. Raises
    MeasurementError for fewer than two different counts, fewer than one round, or an alpha outside (0, 1).
    """
    times, slopes, intercepts = _lines({"": run}, counts, rounds, seed, alpha, clock)[""]
    return Depth(
        estimate("one block", slopes, alpha / 2),
        estimate("the rest", intercepts, alpha / 2),
        {count: [float(x) for x in values] for count, values in times.items()},
        note(rounds, alpha / 2),
    )


def in_turns(
    works: Mapping[str, Work], rounds: int, seed: int, *, alpha: float = 0.05, clock: Clock = timed
) -> dict[str, Time]:
    """The time of each of several works, every one of them timed once a round, each with its own interval.

    Raises MeasurementError for no works, fewer than one round, or an alpha outside (0, 1).
    """
    _check(rounds, alpha, len(works) > 0, "there is nothing to time: give at least one work")
    times = _rounds({name: {0: clock(work)} for name, work in works.items()}, rounds, seed)
    return {name: estimate(name, times[name][0], alpha) for name in works}


def slope(
    make: Callable[[int], Work],
    rounds: int,
    seed: int,
    repeats: Sequence[int] = (1, 2, 4, 8),
    *,
    name: str = "one repetition",
    alpha: float = 0.05,
    clock: Clock = timed,
) -> Time:
    """The time of one repetition: the slope of T(r) over `repeats`, without the start of an evaluation.

    `make(r)` gives work that does the operation r times in one evaluation and returns all r results: what isn't
    returned isn't computed. Raises MeasurementError as `depth` does.
    """
    return slopes({name: make}, rounds, seed, repeats, alpha=alpha, clock=clock)[name]


def slopes(
    makes: Mapping[str, Callable[[int], Work]],
    rounds: int,
    seed: int,
    repeats: Sequence[int] = (1, 2, 4, 8),
    *,
    alpha: float = 0.05,
    clock: Clock = timed,
) -> dict[str, Time]:
    """The times of several operations, each as `slope` takes it, in turns; their intervals hold together.

    Every round takes the operations in a new order, all repeats of one before the next, so that values of one round
    belong together and may be added up. Raises MeasurementError as `depth` does, and for no operations.
    """
    if not makes:
        raise MeasurementError("slopes need at least one operation")
    runs = {name: _made(make, repeats) for name, make in makes.items()}
    lines = _lines(runs, repeats, rounds, seed, alpha, clock)
    return {
        name: replace(estimate(name, slopes, alpha / len(makes)), repeated_s={r: t.tolist() for r, t in times.items()})
        for name, (times, slopes, _) in lines.items()
    }


def _made(make: Callable[[int], Work], repeats: Sequence[int]) -> Callable[[int], Any]:
    works = {r: make(r) for r in dict.fromkeys(repeats)}
    return lambda r: works[r]()


def estimate(name: str, samples: Floats, level: float) -> Time:
    """The Hodges-Lehmann estimate of a quantity's values [rounds] and its exact interval, two-sided at `level`."""
    walsh = walsh_averages(samples)
    # As in a comparison: a value is rejected when at most `rank` Walsh averages lie on one side of it.
    rank = critical(len(samples), level)
    low, high = (float(walsh[rank]), float(walsh[-rank - 1])) if rank >= 0 else (math.nan, math.nan)
    return Time(name, float(np.median(walsh)), low, high, [float(x) for x in samples])


def fewest_rounds(quantities: int, alpha: float = 0.05) -> int:
    """How many rounds it takes before so many quantities can have simultaneous intervals at all."""
    return math.ceil(1 - math.log2(alpha / quantities))


def _lines(
    runs: Mapping[str, Callable[[int], Any]], counts: Sequence[int], rounds: int, seed: int, alpha: float, clock: Clock
) -> dict[str, tuple[dict[int, Floats], Floats, Floats]]:
    """By name: T by count, and the slope and the intercept of the line through it, each by round."""
    _check(rounds, alpha, len(set(counts)) > 1, f"a slope needs at least two different counts, found {list(counts)}")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        raise MeasurementError(f"counts must be integers of 0 or more, found {list(counts)}")
    different = sorted(set(counts), reverse=True)
    calls = {
        name: {count: clock(lambda run=run, count=count: run(count)) for count in different}  # type: ignore[misc]
        for name, run in runs.items()
    }
    x = np.array(different, np.float64)
    found = {}
    for name, times in _rounds(calls, rounds, seed).items():
        y = np.stack([times[count] for count in different], axis=-1)
        slopes = y @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        found[name] = times, slopes, y.mean(axis=-1) - slopes * x.mean()
    return found


def _rounds(groups: Mapping[str, Mapping[int, Timed]], rounds: int, seed: int) -> dict[str, dict[int, Floats]]:
    """The seconds of every call in every round, after one untimed round that builds kernels and warms.

    A round takes the groups in a new order, and the calls of each in a new order. An untimed call comes before each
    timed one: what ran before left the device with other buffers and plans, which is not this call's time.
    """
    rng, names = random.Random(seed), list(groups)
    orders = {name: list(calls) for name, calls in groups.items()}
    for calls in groups.values():
        for call in calls.values():
            call()
    times: dict[str, dict[int, list[float]]] = {name: {key: [] for key in orders[name]} for name in names}
    for _ in range(rounds):
        rng.shuffle(names)
        for name in names:
            rng.shuffle(orders[name])
            for key in orders[name]:
                groups[name][key]()
                times[name][key].append(_checked(groups[name][key]()))
    return {name: {key: np.array(values) for key, values in found.items()} for name, found in times.items()}


def _checked(seconds: Any) -> float:
    if not is_number(seconds) or not 0 <= seconds <= sys.float_info.max:
        raise MeasurementError(f"a timed call returned {seconds!r} seconds; it must be a finite number, 0 or more")
    return float(seconds)


def _check(rounds: int, alpha: float, given: bool, otherwise: str) -> None:
    if not given:
        raise MeasurementError(otherwise)
    require_integer("rounds", rounds, 1)
    require_fractions(alpha=alpha)


def note(rounds: int, level: float) -> str:
    """Why so many rounds give no intervals at this level, or "" where they do."""
    needed = fewest_rounds(1, level)
    return "" if rounds >= needed else f"no intervals: {rounds} rounds are too few at this level, it takes {needed}"


def _or_none(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds
