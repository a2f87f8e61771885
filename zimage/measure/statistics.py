"""The exact signed-rank test over quads, and the verdict drawn from it. NumPy only.

A quad gives one difference of mean log times, arm minus baseline. Its Walsh averages (means of all pairs, each with
itself included) carry both the test and the interval: a shift is rejected when too few of them lie on one side of it,
"too few" being read off the exact distribution of the signed-rank statistic. The interval is the set of shifts that
are not rejected, so that test and interval always agree.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from zimage.errors import MeasurementError

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LOOKS = (10, 20, 30, 40)


@dataclass(frozen=True)
class Estimate:
    """A time ratio arm / baseline with its interval, and the p-value of a ratio of one at a single look."""

    ratio: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Estimates:
    """Estimates of many comparisons [R]: the fields of Estimate as arrays."""

    ratio: Floats
    low: Floats
    high: Floats
    p: Floats


@lru_cache(maxsize=64)
def _cumulative(n: int) -> Floats:
    """P(W <= k) for k = 0 .. n(n+1)/2 of the signed-rank statistic of n quads without ties."""
    chances = np.ones(1)
    for rank in range(1, n + 1):  # halved as it grows: 2^n has no float beyond a thousand quads
        chances = (np.concatenate([chances, np.zeros(rank)]) + np.concatenate([np.zeros(rank), chances])) / 2
    return np.cumsum(chances)


def critical(n: int, level: float) -> int:
    """The largest number of Walsh averages on one side of a shift that still rejects it; -1 where none does."""
    return int(np.searchsorted(2 * _cumulative(n), level, side="right")) - 1


def walsh_averages(differences: Floats) -> Floats:
    """The n(n+1)/2 means of all pairs of `differences` [..., n], sorted."""
    i, j = np.triu_indices(differences.shape[-1])
    return np.sort((differences[..., i] + differences[..., j]) / 2, axis=-1)


def centre(walsh: Floats) -> Floats:
    """The Hodges-Lehmann estimates: medians of sorted Walsh averages [..., n(n+1)/2]."""
    return (walsh[..., (walsh.shape[-1] - 1) // 2] + walsh[..., walsh.shape[-1] // 2]) / 2


def analyse_many(differences: Floats, level: float) -> Estimates:
    """Estimates from R comparisons' log differences [R, n], one of each quad; the intervals reject at `level`.

    Two-sided. An interval is closed, and holds 1 if and only if p > level. With too few quads for any rejection at this
    level it is 0 to infinity. Raises MeasurementError for no differences, for those that are not finite, and for levels
    outside (0, 1).
    """
    n = differences.shape[-1]
    if not n or not np.isfinite(differences).all():
        odd = int((~np.isfinite(differences)).sum())
        raise MeasurementError(
            f"an estimate needs log differences, at least one and all finite, found {n} a comparison, {odd} not finite"
        )
    if not 0 < level < 1:
        raise MeasurementError(f"level must lie between 0 and 1, found {level}")
    walsh = walsh_averages(differences)
    fewest = np.minimum((walsh <= 0).sum(axis=-1), (walsh >= 0).sum(axis=-1))
    p = np.minimum(1.0, 2 * _cumulative(n)[fewest])
    # A shift below walsh[rank], counted from 0, has at most `rank` averages on its lower side.
    rank = critical(n, level)
    infinite = np.full(len(walsh), math.inf)
    low, high = (walsh[:, rank], walsh[:, -rank - 1]) if rank >= 0 else (-infinite, infinite)
    return Estimates(_exp(centre(walsh)), _exp(low), _exp(high), p)


def analyse(differences: Floats, level: float) -> Estimate:
    """The estimate from one comparison's log differences [n], as `analyse_many` gives it."""
    found = analyse_many(differences[None], level)
    return Estimate(float(found.ratio[0]), float(found.low[0]), float(found.high[0]), float(found.p[0]))


def _exp(shifts: Floats) -> Floats:
    """exp, on the same side of 1 as a shift is of 0 however small it is, so that rounding changes no verdict.

    Only an infinite shift gives 0 or infinity.
    """
    ratios = np.exp(np.where(np.isinf(shifts), shifts, np.clip(shifts, -700, 700)))
    return np.where((ratios == 1) & (shifts != 0), np.nextafter(1, 1 + np.sign(shifts)), ratios)


def verdict(estimate: Estimate, delta: float, noise_floor: float | None) -> tuple[str, str]:
    """(verdict, reason): equivalent, faster, slower or inconclusive, decided in that order.

    Equivalent when the whole interval lies within a ratio of 1 +- delta, even if it excludes 1. Faster or slower when
    it excludes 1 and the estimate lies beyond the noise floor, a |log ratio|, where one was measured.
    """
    low, high = estimate.low, estimate.high
    if 1 - delta <= low and high <= 1 + delta:
        return "equivalent", f"the whole interval lies within {100 * delta:g} % of 1"
    if math.isinf(high):
        return "inconclusive", "too few quads for any interval at this level"
    if low <= 1 <= high:
        return "inconclusive", "the interval is too wide: it holds 1 and reaches beyond the band of equivalence"
    if noise_floor is not None and abs(math.log(estimate.ratio)) <= noise_floor:
        return "inconclusive", f"the difference is within the noise floor of {100 * noise_floor:.1f} %"
    return ("faster", "the interval lies below 1") if high < 1 else ("slower", "the interval lies above 1")
