"""Two intervals combined: coverage, symmetry, and the verdicts on times, bytes and quality."""

import math

from zimage.analysis import combining
from zimage.analysis.combining import Interval, divided, quality_change, size_change, subtracted, time_change
from zimage.measure.statistics import analyse_many

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

SPREADS = st.floats(1.0, 3.0)
RATIOS = st.builds(
    lambda value, below, above: Interval(value, value / below, value * above), st.floats(0.01, 100.0), SPREADS, SPREADS
)
TOGETHER = st.integers(1, 100)


@given(RATIOS, TOGETHER)
def test_combined_with_itself_an_interval_holds_one(one: Interval, together: int) -> None:
    """A result beside itself is a ratio of exactly 1 whose interval holds 1, so it never is a regression."""
    found = divided(one, one, together)
    assert found.value == 1 and found.low <= 1 <= found.high
    assert not time_change(one, one, None, together).worse


@given(RATIOS, RATIOS, TOGETHER)
def test_swapping_the_sides_inverts(a: Interval, b: Interval, together: int) -> None:
    """A / B is one over B / A, ends and all, and a side that got slower the one way got faster the other."""
    there, back = divided(a, b, together), divided(b, a, together)
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx((there.value, there.low, there.high))
    opposite = {"faster": "slower", "slower": "faster"}
    words = [time_change(*sides, None, together).verdict for sides in ((a, b), (b, a))]
    if "equivalent" not in words:  # whose band, 1 +- 1 %, is not that of the inverse
        assert opposite.get(words[0], words[0]) == words[1]


@given(RATIOS, RATIOS)
def test_a_combined_interval_is_wider_than_either(a: Interval, b: Interval) -> None:
    """On the log scale it is at least as wide as the wider side, at most as both together, and several hold wider."""
    widths = [math.log(one.high / one.low) for one in (a, b)]
    found = divided(a, b)
    assert max(widths) / math.sqrt(2) - 1e-9 <= math.log(found.high / found.low) <= sum(widths) + 1e-9
    wider = divided(a, b, together=10)
    assert wider.low <= found.low and found.high <= wider.high


def test_asymmetric_sides() -> None:
    """B's lower end and A's upper one make the combined lower end, in squares, and the other two the upper one."""
    found = subtracted(Interval(1.0, 1.0 - 3.0, 1.0 + 4.0), Interval(2.0, 2.0 - 3.0, 2.0 + 12.0))
    assert (found.value, found.low, found.high) == (1.0, 1.0 - 5.0, 1.0 + math.sqrt(144 + 9))


@pytest.mark.parametrize("quads", [(20, 20), (10, 40), (8, 8)])
@pytest.mark.parametrize("spreads", [(0.01, 0.01), (0.01, 0.03)])
def test_coverage(quads: tuple[int, int], spreads: tuple[float, float]) -> None:
    """Of 4,000 pairs of signed-rank intervals, combined, at least 94.5 % hold the true ratio of ratios.

    Errors have heavy tails (Student's t of 3 degrees), sides have different numbers of quads and different noise.
    """
    random, truth = np.random.default_rng(5), (0.95, 1.02)
    sides = []
    for ratio, count, spread in zip(truth, quads, spreads, strict=True):
        errors = spread * random.standard_t(3, (4000, count))
        found = analyse_many(errors + math.log(ratio), 0.05)
        sides.append([Interval(*ends) for ends in zip(found.ratio, found.low, found.high, strict=True)])
    held = [one.low <= truth[1] / truth[0] <= one.high for one in map(divided, *sides)]
    assert np.mean(held) >= 0.945


def test_a_gate_over_many_comparisons_rarely_closes_by_chance() -> None:
    """Of comparisons of 20 arms that are alike, at most 5 % have even one that is called slower or faster."""
    random, families, arms = np.random.default_rng(6), 1000, 20
    closed = 0
    for _ in range(families):
        sides = [analyse_many(random.normal(0, 0.03, (arms, 20)), 0.05) for _ in range(2)]
        one, two = ([Interval(*ends) for ends in zip(s.ratio, s.low, s.high, strict=True)] for s in sides)
        changes = [time_change(a, b, None, arms) for a, b in zip(one, two, strict=True)]
        closed += any(change.verdict in ("faster", "slower") for change in changes)
    assert closed <= 0.05 * families


def test_one_comparison_is_not_widened() -> None:
    """Alone an interval keeps its level; twenty hold at once with half-widths of 3.02 / 1.96."""
    assert combining.widening(1) == 1
    assert combining.widening(20) == pytest.approx(3.0233 / 1.9600, rel=1e-3)


@pytest.mark.parametrize(
    ("b", "floor", "verdict"),
    [
        (Interval(0.901, 0.899, 0.903), None, "equivalent"),
        (Interval(0.95, 0.94, 0.96), None, "slower"),
        (Interval(0.95, 0.94, 0.96), 0.06, "inconclusive"),
        (Interval(0.85, 0.84, 0.86), 0.05, "faster"),
        (Interval(0.91, 0.88, 0.94), None, "inconclusive"),
        (Interval(0.95, 0.0, math.inf), None, "inconclusive"),
    ],
)
def test_times_are_judged_as_measure_judges_them(b: Interval, floor: float | None, verdict: str) -> None:
    """Equivalent first, then faster or slower beyond the noise floor, else inconclusive with a reason."""
    change = time_change(Interval(0.9, 0.898, 0.902), b, floor)
    assert change.verdict == verdict and change.reason
    assert change.worse == (verdict == "slower")


def test_floors_add_in_squares() -> None:
    """The floor of a ratio of ratios has both sides' noise in it, and grows with the intervals."""
    assert combining.combined_floor(0.03, 0.04) == pytest.approx(0.05)
    assert combining.combined_floor(0.03, None) == combining.combined_floor(None, 0.03) == 0.03
    assert combining.combined_floor(None, None) is None
    assert combining.combined_floor(0.03, 0.04, 20) == pytest.approx(0.05 * combining.widening(20))


def test_what_copies_differ_by_is_no_change() -> None:
    """Of gates over sides whose copies differ by what their floors say, at most 5 % have any slower or faster."""
    random, spread, arms = np.random.default_rng(7), 0.02, 20
    floor = combining.combined_floor(1.96 * spread, 1.96 * spread, arms)
    one, two = np.exp(spread * random.standard_normal((2, 1000, arms)))
    closed = 0
    for family in zip(one, two, strict=True):
        sides = [[Interval(x, x / 1.001, x * 1.001) for x in side] for side in family]
        changes = [time_change(a, b, floor, arms) for a, b in zip(*sides, strict=True)]
        closed += any(change.verdict in ("faster", "slower") for change in changes)
    assert closed <= 0.05 * 1000


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (100, 100, "same"),
        (100, 101, "same"),
        (1000, 1011, "larger"),
        (1000, 989, "smaller"),
        (0, 0, "same"),
        (0, 1, "larger"),
    ],
)
def test_bytes(a: int, b: int, verdict: str) -> None:
    """Bytes may grow by 1 %; more is a regression."""
    assert size_change(a, b).verdict == verdict
    assert size_change(a, b).worse == (verdict == "larger")


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict"),
    [
        ("relative_l2_error", Interval(0.05), Interval(0.05), "same"),
        ("relative_l2_error", Interval(0.05), Interval(0.054), "same"),
        ("relative_l2_error", Interval(0.05), Interval(0.056), "worse"),
        ("relative_l2_error", Interval(0.05), Interval(0.04), "better"),
        ("relative_l2_error", Interval(0.0), Interval(0.01), "worse"),
        ("relative_l2_error", Interval(2e-7), Interval(9e-6), "same"),
        ("relative_l2_error", Interval(0.05), Interval(math.inf), "worse"),
        ("relative_l2_error", Interval(0.05, 0.04, 0.06), Interval(0.06, 0.05, 0.07), "inconclusive"),
        ("drift_relative_l2", Interval(0.05, 0.049, 0.051), Interval(0.06, 0.059, 0.061), "worse"),
        ("drift_relative_l2", Interval(0.05, 0.049, 0.051), Interval(0.04, 0.039, 0.041), "better"),
        ("frechet_distance", Interval(-0.1, -0.3, 0.2), Interval(0.9, 0.6, 1.2), "worse"),
        ("digit_accuracy", Interval(0.98, 0.96, 0.99), Interval(0.6, 0.55, 0.65), "worse"),
        ("digit_accuracy", Interval(0.6, 0.55, 0.65), Interval(0.98, 0.96, 0.99), "better"),
        ("digit_accuracy", Interval(0.98), Interval(0.5), "worse"),
        ("psnr_db", Interval(40.0), Interval(math.inf), "better"),
        ("psnr_db", Interval(40.0), Interval(-math.inf), "worse"),
        ("psnr_db", Interval(math.inf), Interval(math.inf), "same"),
        ("psnr_db", Interval(math.inf, math.inf, math.inf), Interval(40.0, 39.0, 41.0), "worse"),
        ("psnr_db", Interval(math.inf), Interval(-math.inf), "worse"),
    ],
)
def test_quality(metric: str, a: Interval, b: Interval, verdict: str) -> None:
    """Errors may not grow and accuracies not fall beyond the interval of the difference, or 10 % without intervals.

    What lies within fp32's rounding does not count, and a number that is none any more is worse.
    """
    assert quality_change(metric, a, b).verdict == verdict
    assert quality_change(metric, a, b).worse == (verdict == "worse")
