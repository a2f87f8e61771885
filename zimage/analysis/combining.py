"""Two results that were measured apart, combined: how B differs from A, with an interval, and whether it is worse.

Each side of a comparison is a number with its own interval, and nothing links the two measurements but what they are
of. They are combined as independent, by the method of variance estimates recovery (Zou and Donner, Statistics in
Medicine 2008): how far an interval reaches from its estimate stands for the estimate's error on that side. B - A is
too low when B is too low or A too high, errors that add in squares, so with A = a (a - p, a + q), B = b (b - r, b + s):

    B - A = b - a,   from (b - a) - sqrt(r^2 + q^2)   to (b - a) + sqrt(s^2 + p^2)

Time ratios are combined on the log scale, where this gives the ratio of ratios. An interval without an end leaves the
combined one without an end. That sides are independent holds for two runs; of quality they may share the seeds, which
makes the true interval the narrower one.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from zimage.analysis import reading, units
from zimage.measure.statistics import Estimate, verdict

DELTA = 0.01  # the margin of equivalence, and how much memory may grow
ALPHA = 0.05
ERROR_TOLERANCE = 0.1  # of its value, for an error that has no interval: rounding differs from version to version
ROUNDING = 1e-5  # relative errors below this are rounding in fp32 (see the parity tests), however they change
LOWER_IS_BETTER = ("relative_l2_error", reading.DRIFT, "frechet_distance", "error_ratio")
HIGHER_IS_BETTER = ("digit_accuracy", "psnr_db", "ssim")
JUDGED_BYTES = ("weight_bytes", "peak_bytes")
WORSE = ("slower", "larger", "worse")


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval; NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def bounded(self) -> bool:
        """Whether it has an interval that holds its value; its ends may be infinite."""
        return self.low <= self.value <= self.high

    def finite(self) -> dict[str, float | None]:
        """Value and ends by name, as JSON can say them: what is no finite number is None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True)
class Change:
    """What became of a value from A to B: a ratio B / A or, where `difference`, B - A, and the verdict with its reason.

    verdict is "faster", "slower", "equivalent" or "inconclusive" for times, "smaller", "larger" or "same" for bytes,
    and "better", "worse", "same" or "inconclusive" for quality.
    """

    interval: Interval
    verdict: str
    reason: str
    difference: bool = False

    @property
    def worse(self) -> bool:
        """Whether it is a regression."""
        return self.verdict in WORSE


def widening(together: int) -> float:
    """By what the half-widths of 95 % intervals grow so that `together` of them hold at once, as for normal errors."""
    quantile = NormalDist().inv_cdf
    return quantile(1 - ALPHA / (2 * together)) / quantile(1 - ALPHA / 2)


def subtracted(a: Interval, b: Interval, together: int = 1) -> Interval:
    """B - A with its interval, one of `together` that are to hold at once."""
    scale, middle = widening(together), b.value - a.value
    below = math.hypot(b.value - b.low, a.high - a.value)
    above = math.hypot(b.high - b.value, a.value - a.low)
    return Interval(middle, middle - scale * below, middle + scale * above)


def divided(a: Interval, b: Interval, together: int = 1) -> Interval:
    """B / A with its interval: the ratio of two positive ratios, `subtracted` on the log scale."""
    left, right = (Interval(*(_log(end) for end in (one.value, one.low, one.high))) for one in (a, b))
    found = subtracted(left, right, together)
    return Interval(math.exp(found.value), math.exp(found.low), _exp(found.high))


def combined_floor(a: float | None, b: float | None, together: int = 1) -> float | None:
    """The noise floor of the ratio of two time ratios with these floors, each a |log ratio|; None where none is known.

    What makes copies differ is there on both sides, independently, so floors add in squares as the intervals do, and
    are widened as they are where `together` are to hold at once.
    """
    known = [floor for floor in (a, b) if floor is not None]
    return widening(together) * math.hypot(*known) if known else None


def time_change(a: Interval, b: Interval, noise_floor: float | None, together: int = 1) -> Change:
    """How the time ratio of an arm to its baseline changed, judged as `measure` judges one.

    noise_floor: that of the ratio of both, see `combined_floor`, or None. Without both intervals it is inconclusive.
    """
    left, right = (one if one.bounded else Interval(one.value, 0.0, math.inf) for one in (a, b))
    found = divided(left, right, together)
    word, reason = verdict(Estimate(found.value, found.low, found.high, math.nan), DELTA, noise_floor)
    return Change(found, word, "one side has no interval of its own" if math.isinf(found.high) else reason)


def size_change(a_bytes: float, b_bytes: float) -> Change:
    """How a number of bytes changed: allocations are counted, not measured, so a margin takes an interval's place."""
    ratio = b_bytes / a_bytes if a_bytes else math.inf if b_bytes else 1.0
    word = "larger" if ratio > 1 + DELTA else "smaller" if ratio < 1 - DELTA else "same"
    inside = "at most" if word == "same" else "more than"
    return Change(Interval(ratio), word, f"it differs by {inside} {units.percent(DELTA, 0)}")


def quality_change(metric: str, a: Interval, b: Interval, together: int = 1) -> Change:
    """How a number of quality changed, by the interval of the difference, or without intervals by a tolerance.

    metric: one of LOWER_IS_BETTER or HIGHER_IS_BETTER. A number that is no number any more is worse; where more is
    better an infinite one, as the PSNR of the same picture, is perfect.
    """
    higher = metric in HIGHER_IS_BETTER
    grows, shrinks = ("better", "worse") if higher else ("worse", "better")
    if higher and a.value == math.inf:
        if b.value == math.inf:
            return Change(Interval(0.0), "same", "nothing was and is left of the error", True)
        return Change(Interval(-math.inf), "worse", "there was no error", True)
    if not math.isfinite(b.value):
        perfect = higher and b.value == math.inf
        reason = "nothing is left of the error" if perfect else "it is no finite number any more"
        return Change(Interval(b.value), grows if perfect else "worse", reason, True)
    found, tolerance = Interval(b.value - a.value), units.percent(ERROR_TOLERANCE, 0)
    if found.value == 0:
        word, reason = "same", "it is the same number"
    elif not higher and max(abs(a.value), abs(b.value)) <= ROUNDING:
        word, reason = "same", f"both are at most {ROUNDING:g}, which is rounding"
    elif a.bounded and b.bounded:
        found = subtracted(a, b, together)
        word = grows if found.low > 0 else shrinks if found.high < 0 else "inconclusive"
        reason = f"the interval of the difference {_place(found)}"
    elif abs(found.value) <= ERROR_TOLERANCE * abs(a.value):
        word, reason = "same", f"without intervals, it may differ by {tolerance}"
    else:
        word = grows if found.value > 0 else shrinks
        reason = f"without intervals, it differs by more than {tolerance}"
    return Change(found, word, reason, True)


def number(value: Any) -> float:
    """A table's value as a float, NaN where it is missing; infinities stay."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _place(interval: Interval) -> str:
    if interval.low <= 0 <= interval.high:
        return "holds 0"
    return "lies above 0" if interval.low > 0 else "lies below 0"


def _log(value: float) -> float:
    return -math.inf if value == 0 else math.log(value)


def _exp(shift: float) -> float:
    return math.inf if shift > 700 else math.exp(shift)
