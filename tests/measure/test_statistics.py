"""The signed-rank test, its interval, and the verdicts."""

import math
from itertools import product

from zimage.errors import MeasurementError
from zimage.measure.statistics import Estimate, analyse, analyse_many, verdict, walsh_averages

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import wilcoxon

LEVELS = st.sampled_from([0.5, 0.1, 0.05, 0.0125, 0.0125 / 2, 0.001])
# Few distinct values, zero among them, make ties; the smallest ones are lost when exp rounds to 1.
TIED = st.lists(st.sampled_from([-0.02, -0.01, -1e-18, 0.0, 1e-18, 0.01, 0.02, 0.03]), min_size=1, max_size=25)
UNTIED = st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=25)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 10, 20, 30, 40])
@pytest.mark.parametrize("shift", [-0.01, 0.0, 0.004, 0.03])
def test_p_is_the_exact_signed_rank_p(n: int, shift: float) -> None:
    """On untied differences p equals scipy's exact Wilcoxon test."""
    differences = shift + 0.01 * np.random.default_rng(n).standard_normal(n)
    assert analyse(differences, 0.05).p == pytest.approx(wilcoxon(differences, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize("differences", [[0.0] * 3, [0.01, -0.01, 0.02, 0.02, 0.0], [0.01] * 7, [0.02, 0.0, 0.0, 0.01]])
def test_ties_make_p_larger_than_its_exact_permutation_value(differences: list[float]) -> None:
    """With ties and zeros p is at least the sign-flip test's own p by enumeration: the error is on the safe side."""
    d = np.array(differences)
    observed = abs(_centred(d))
    flips = [abs(_centred(d * np.array(signs))) for signs in product((-1, 1), repeat=len(d))]
    assert analyse(d, 0.05).p >= np.mean([flip >= observed for flip in flips]) - 1e-12


def _centred(differences: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    walsh = walsh_averages(differences)
    return float((walsh > 0).sum() - (walsh < 0).sum())


@given(st.one_of(TIED, UNTIED), LEVELS)
@settings(max_examples=400, deadline=None)
def test_the_interval_holds_one_exactly_when_p_exceeds_the_level(differences: list[float], level: float) -> None:
    """Test and interval never disagree, also with ties, zeros and differences too small for exp."""
    estimate = analyse(np.array(differences), level)
    assert (estimate.p > level) == (estimate.low <= 1 <= estimate.high)
    assert estimate.low <= estimate.ratio <= estimate.high


@given(st.one_of(TIED, UNTIED), LEVELS)
@settings(max_examples=100, deadline=None)
def test_swapping_the_arms_inverts_the_estimate(differences: list[float], level: float) -> None:
    """With baseline and arm exchanged p stays and the ratio and the ends of its interval become their inverses."""
    one, other = (analyse(sign * np.array(differences), level) for sign in (1, -1))
    assert one.p == other.p
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.low == (pytest.approx(1 / other.high) if math.isfinite(other.high) else 0)


@pytest.mark.parametrize(("n", "level"), [(10, 0.05), (10, 0.0125), (20, 0.05), (30, 0.0125)])
@pytest.mark.parametrize("ratio", [1.0, 1.02])
def test_the_interval_covers(n: int, level: float, ratio: float) -> None:
    """The interval holds the true ratio in at least 1 - level of 2000 samples, and is not far wider than that needs."""
    random = np.random.default_rng(n)
    estimates = [analyse(math.log(ratio) + 0.02 * random.standard_normal(n), level) for _ in range(2000)]
    covered = float(np.mean([e.low <= ratio <= e.high for e in estimates]))
    spread = 3 * math.sqrt(level * (1 - level) / 2000)
    assert 1 - level - spread <= covered <= 1 - 0.6 * level + spread


def test_an_interval_off_by_one_rank_would_be_seen() -> None:
    """The ends are the very Walsh averages at which the test turns: just inside it accepts, just outside it rejects."""
    differences = np.random.default_rng(3).normal(0.01, 0.01, 12)
    estimate, walsh = analyse(differences, 0.05), walsh_averages(differences)
    low = int(np.argmin(abs(walsh - math.log(estimate.low))))
    inside, outside = (walsh[low] + walsh[low + 1]) / 2, (walsh[low - 1] + walsh[low]) / 2
    assert wilcoxon(differences - inside, method="exact").pvalue > 0.05
    assert wilcoxon(differences - outside, method="exact").pvalue <= 0.05


def test_more_quads_than_a_power_of_two_has_floats_for() -> None:
    """Beyond a thousand quads, where 2^n is no float, the estimate is as scipy's approximation has it."""
    differences = np.random.default_rng(0).normal(0.0005, 0.01, 1100)
    estimate = analyse(differences, 0.05)
    assert estimate.p == pytest.approx(wilcoxon(differences, method="approx").pvalue, rel=0.02)
    assert 1 - 0.0015 < estimate.low < estimate.ratio < estimate.high < 1 + 0.0025


@pytest.mark.parametrize(("difference", "wanted"), [(-1453.0, "faster"), (1453.0, "slower")])
def test_ratios_beyond_all_floats_have_a_verdict(difference: float, wanted: str) -> None:
    """A ratio too small or too large for a float stays positive and finite, and is judged beside a noise floor too."""
    estimate = analyse(np.full(10, difference), 0.05)
    assert 0 < estimate.low <= estimate.ratio <= estimate.high < math.inf
    assert verdict(estimate, 0.01, 0.004)[0] == wanted


def test_few_quads_say_nothing() -> None:
    """Where no outcome could be rejected at the level the interval is everything, and the verdict says why."""
    estimate = analyse(np.full(7, 0.1), 0.0125)
    assert (estimate.low, estimate.high) == (0, math.inf)
    assert verdict(estimate, 0.01, None) == ("inconclusive", "too few quads for any interval at this level")
    assert analyse(np.full(8, 0.1), 0.0125).low > 1


@pytest.mark.parametrize(
    ("low", "ratio", "high", "floor", "wanted", "words"),
    [
        (0.995, 1.0, 1.005, None, "equivalent", "lies within 1 % of 1"),
        (0.99, 1.0, 1.01, None, "equivalent", "lies within"),
        (1.002, 1.004, 1.006, None, "equivalent", "lies within"),  # though it excludes 1
        (0.992, 0.995, 0.998, 0.1, "equivalent", "lies within"),  # and whatever the floor
        (0.90, 0.93, 0.96, None, "faster", "below 1"),
        (1.04, 1.06, 1.08, None, "slower", "above 1"),
        (0.90, 0.93, 0.96, 0.05, "faster", "below 1"),
        (0.90, 0.93, 0.96, 0.08, "inconclusive", "within the noise floor of 8.0 %"),
        (1.005, 1.02, 1.03, 0.03, "inconclusive", "within the noise floor of 3.0 %"),
        (0.985, 1.0, 1.005, None, "inconclusive", "too wide"),
        (0.90, 1.0, 1.2, 0.5, "inconclusive", "too wide"),
        (1.0, 1.02, 1.04, None, "inconclusive", "too wide"),  # closed: it holds 1
        (0.0, 1.1, math.inf, None, "inconclusive", "too few quads"),
    ],
)
def test_verdicts(low: float, ratio: float, high: float, floor: float | None, wanted: str, words: str) -> None:
    """Equivalent comes first, then faster and slower beyond the noise floor, then inconclusive with its reason."""
    found, reason = verdict(Estimate(ratio, low, high, 0.5), 0.01, floor)
    assert found == wanted
    assert words in reason


@pytest.mark.parametrize("n", [1, 7, 10, 20])
def test_many_are_analysed_as_each_alone(n: int) -> None:
    """A row's estimate does not depend on the rows beside it, to the last bit, with ties and without."""
    random = np.random.default_rng(n)
    differences = np.concatenate([random.normal(0.005, 0.01, (50, n)), random.integers(-2, 3, (50, n)) / 100])
    many = analyse_many(differences, 0.0125)
    for i, row in enumerate(differences):
        assert analyse(row, 0.0125) == Estimate(many.ratio[i], many.low[i], many.high[i], many.p[i])


@pytest.mark.parametrize("differences", [[], [0.1, math.nan], [math.inf]])
def test_what_is_no_difference_is_refused(differences: list[float]) -> None:
    """No differences, or some that are not finite, give a MeasurementError of one line."""
    with pytest.raises(MeasurementError, match="at least one and all finite") as caught:
        analyse(np.array(differences * 40), 0.05)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("level", [0.0, 1.0, math.nan])
def test_impossible_levels_are_refused(level: float) -> None:
    """A level outside (0, 1) gives a MeasurementError."""
    with pytest.raises(MeasurementError, match="level must lie between 0 and 1"):
        analyse(np.ones(10), level)
