"""The method of `compare` on many simulated runs at once, and what wrong methods would do on the same runs.

The orders are those that `schedule` draws from the seed of each run; differences, estimates and canaries are judged by
the very functions that `compare` uses. What is written anew here is only the loop over the looks.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tests.measure.clocks import Bools, ClockModel
from zimage.measure import quads
from zimage.measure.statistics import LOOKS, Floats, analyse_many

import numpy as np

RUNS = 20_000
CHUNK = 2_000  # runs that are held at once
ALPHA, DELTA = 0.05, 0.01
ONE_LOOK, TWO_LOOKS = (20,), (10, 20)
CALLS = 7  # of a quad, the untimed ones included
_TIMED = [is_timed for _, is_timed in quads.schedule(random.Random(0))]

Differences = Callable[[Floats, Bools], Floats]


@dataclass(frozen=True)
class Outcome:
    """How R runs ended: after how many quads, and with what estimate. p is that of one look times their number."""

    quads: np.ndarray[tuple[int], np.dtype[np.int64]]
    ratio: Floats
    low: Floats
    high: Floats
    p: Floats

    @property
    def rejected(self) -> Bools:
        """Whether the interval excludes 1."""
        return (self.low > 1) | (self.high < 1)

    def covers(self, ratio: float) -> Bools:
        """Whether the interval holds `ratio`."""
        return (self.low <= ratio) & (ratio <= self.high)


@lru_cache(maxsize=1)
def orders() -> Bools:
    """Which calls of 2 * 40 quads are the arm's [RUNS, 560], from the seeds 0 .. RUNS - 1."""

    def drawn(seed: int) -> Iterator[bool]:
        rng = random.Random(seed)
        return (is_arm for _ in range(2 * LOOKS[-1]) for is_arm, _ in quads.schedule(rng))

    calls = 2 * LOOKS[-1] * CALLS
    return np.array([np.fromiter(drawn(seed), np.bool_, calls) for seed in range(RUNS)])


def weather(clock: ClockModel, calls: int, chunk: int) -> Floats:
    """The factors that the calls of one chunk of runs meet [CHUNK, calls]."""
    return clock.weather(np.random.default_rng([len(clock.name), *clock.name.encode(), calls, chunk]), CHUNK, calls)


def switches(is_arm: Bools) -> Bools:
    """Whether a call [R, calls] follows one of the other arm."""
    return np.diff(is_arm, axis=1, prepend=is_arm[:, :1])


def in_quads(clock: ClockModel, ratio: float, count: int, chunk: int, judge: Differences = quads.differences) -> Floats:
    """The differences [CHUNK, count] of one chunk of runs of `count` quads each."""
    is_arm = orders()[chunk * CHUNK : (chunk + 1) * CHUNK, : count * CALLS]
    times = clock.times(weather(clock, count * CALLS, chunk), ratio, is_arm, switches(is_arm))
    timed = np.tile(_TIMED, count)
    shape = (len(times), count, 4)
    return judge(times[:, timed].reshape(shape), is_arm[:, timed].reshape(shape)[..., 0])


def with_canary(clock: ClockModel, ratio: float, count: int, chunk: int) -> Floats:
    """The differences of the first `count` kept quads [CHUNK, count] where a canary's call stands before each quad."""
    taken = 2 * count
    is_arm = orders()[chunk * CHUNK : (chunk + 1) * CHUNK, : taken * CALLS]
    factors = weather(clock, taken * (CALLS + 1), chunk).reshape(-1, taken, CALLS + 1)
    canaries = clock.times(factors[..., 0], 1.0, np.bool_(False), np.bool_(False))
    windows = (canaries[:, max(0, i + 1 - quads.CANARIES) : i + 1] for i in range(taken))
    kept = np.stack([quads.in_step(window) for window in windows], axis=1)
    if kept.sum(axis=1).min() < count:
        raise ValueError(f"a run on the clock {clock.name!r} keeps fewer than {count} of {taken} quads")
    times = clock.times(factors[..., 1:].reshape(is_arm.shape), ratio, is_arm, switches(is_arm))
    timed, shape = np.tile(_TIMED, taken), (len(times), taken, 4)
    differences = quads.differences(times[:, timed].reshape(shape), is_arm[:, timed].reshape(shape)[..., 0])
    return np.take_along_axis(differences, np.argsort(~kept, axis=1, kind="stable")[:, :count], axis=1)


def in_sequence(clock: ClockModel, ratio: float, count: int, chunk: int) -> Floats:
    """What quads are there to prevent: all calls of the baseline, then all of the arm, taken in pairs."""
    half = 2 * count + 1  # one untimed call at the start and one after the switch
    is_arm = np.tile(np.arange(2 * half) >= half, (CHUNK, 1))
    times = clock.times(weather(clock, 2 * half, chunk), ratio, is_arm, switches(is_arm))
    baseline, arm = (np.log(t[:, 1:]).reshape(-1, count, 2).mean(axis=-1) for t in (times[:, :half], times[:, half:]))
    return np.asarray(arm - baseline)


def without_outliers_of_the_arm(times_s: Floats, arm_outside: Bools) -> Floats:
    """Differences after the arm's calls far above its median were dropped, the baseline's being left alone."""
    of_arm = np.array([True, False, False, True]) == arm_outside[..., None]
    medians = np.nanmedian(np.where(of_arm, times_s, np.nan), axis=(1, 2))[:, None, None]
    outlying = of_arm & (times_s > 1.2 * medians)
    neighbours = np.where(of_arm & ~outlying, times_s, 0.0).sum(axis=-1, keepdims=True)  # the arm's other call
    return quads.differences(np.where(outlying, np.where(neighbours > 0, neighbours, medians), times_s), arm_outside)


def swapped(times_s: Floats, arm_outside: Bools) -> Floats:
    """Differences with the labels of arm and baseline exchanged."""
    return quads.differences(times_s, ~arm_outside)


def ended(differences: Floats, looks: Sequence[int], level: float, tests: int) -> Outcome:
    """How comparisons with these differences [R, n] end that stop as `compare` does, looking after `looks` quads."""
    runs = len(differences)
    count, numbers = np.zeros(runs, np.int64), np.empty((4, runs))
    waiting = np.arange(runs)
    for look in looks:
        found = analyse_many(differences[waiting, :look], level)
        with np.errstate(divide="ignore"):
            narrow = (found.low > 0) & (np.log(found.high) - np.log(found.low) < DELTA)
        stops = narrow | (found.low > 1) | (found.high < 1) | (look == looks[-1])
        now = waiting[stops]
        count[now] = look
        numbers[:, now] = [x[stops] for x in (found.ratio, found.low, found.high, np.minimum(1, tests * found.p))]
        waiting = waiting[~stops]
    return Outcome(count, *numbers)


def run(
    clock: ClockModel,
    ratio: float = 1.0,
    looks: Sequence[int] = ONE_LOOK,
    level: float | None = None,
    taken: Callable[[ClockModel, float, int, int], Floats] = in_quads,
    runs: int = RUNS,
) -> Outcome:
    """How `runs` comparisons end, with `alpha` split over the looks unless a level is given."""
    level = ALPHA / len(looks) if level is None else level
    parts = [
        ended(taken(clock, ratio, looks[-1], chunk), looks, level, len(looks))
        for chunk in range(math.ceil(runs / CHUNK))
    ]
    return Outcome(*(np.concatenate([getattr(p, f) for p in parts])[:runs] for f in Outcome.__dataclass_fields__))


# What an honest method does. Each takes an outcome; the wrong methods have to fail.


def rarely_rejects(same: Outcome) -> bool:
    """Of an arm like its baseline at most alpha is rejected, and what 20,000 runs may show by chance (3 sigma)."""
    return float(same.rejected.mean()) <= 0.0548


def covers_truth(outcome: Outcome, ratio: float) -> bool:
    """The interval holds the true ratio in at least 94.5 % of the runs."""
    return float(outcome.covers(ratio).mean()) >= 0.945


def has_power(outcome: Outcome) -> bool:
    """A planted difference is found in at least 95 % of the runs."""
    return float(outcome.rejected.mean()) >= 0.95


def has_right_sign(outcome: Outcome, ratio: float) -> bool:
    """Hardly a run concludes on the wrong side, one in 1000 at most, and half of the estimates are close to `ratio`."""
    wrong = outcome.high < 1 if ratio > 1 else outcome.low > 1
    return bool(wrong.mean() <= 0.001 and abs(np.median(outcome.ratio) / ratio - 1) < 0.002)


def disagreements(outcome: Outcome) -> int:
    """In how many runs test and interval say different things of a ratio of 1."""
    return int(((outcome.p > ALPHA) != outcome.covers(1.0)).sum())
