"""Categories of arms by time, memory and error: what the definition promises, on drawn points."""

import math
from dataclasses import replace

from zimage.analysis.pareto import CATEGORIES, NONE, Category, Margins, Place, Point, Quantity, classify, rows
from zimage.errors import MeasurementError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Few different values, so that ties and touching intervals are common; zero is among them, as an exact error is.
VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.004, 1.02, 2.0, 3.0])
WIDTHS = st.sampled_from([0.0, 0.1, 0.5, math.inf])
MARGINS = st.sampled_from([NONE, Margins(), Margins(0.3, 0.02, 0.5)])


@st.composite
def quantities(draw: st.DrawFn, exact: bool = False) -> Quantity:
    value = draw(VALUES)
    below, above = (0.0, 0.0) if exact else (draw(WIDTHS), draw(WIDTHS))
    return Quantity(max(value - below, 0.0), value, value + above)


@st.composite
def several(draw: st.DrawFn, exact: bool = False, least: int = 1) -> list[Point]:
    one = quantities(exact)
    drawn = draw(st.lists(st.tuples(one, one, one), min_size=least, max_size=7))
    return [Point(f"arm {i}", *given) for i, given in enumerate(drawn)]


def categories(points: list[Point], margins: Margins = NONE) -> dict[str, Category]:
    return {name: place.category for name, place in classify(points, margins).items()}


def exact(name: str, time: float, size: float, error: float) -> Point:
    return Point(name, *(Quantity.exact(value) for value in (time, size, error)))


def beside(a: Point, b: Point) -> bool:
    """Whether a surely dominates b without any margin, written down anew."""
    pairs = list(zip(a.quantities, b.quantities, strict=True))
    return all(x.high <= y.low for x, y in pairs) and any(x.high < y.low for x, y in pairs)


@given(several(), MARGINS, st.randoms())
def test_the_order_of_points_does_not_matter(points: list[Point], margins: Margins, random: object) -> None:
    """Every point has the same category and the same dominator in any order."""
    shuffled = list(points)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert classify(shuffled, margins) == classify(points, margins)


@given(several(exact=True))
def test_without_uncertainty_it_is_the_classic_front(points: list[Point]) -> None:
    """With zero-width intervals the front is the Pareto set, and all else is dominated."""
    classic = {p.name for p in points if not any(beside(other, p) for other in points)}
    found = categories(points)
    assert {name for name, category in found.items() if category == "front"} == classic
    assert set(found.values()) <= {"front", "dominated"}


@settings(max_examples=300)
@given(several(least=2))
def test_a_surely_dominated_point_changes_no_other(points: list[Point]) -> None:
    """Without margins, leaving out any dominated point leaves every other category as it is."""
    found = categories(points)
    for name in [name for name, category in found.items() if category == "dominated"]:
        rest = {other: category for other, category in found.items() if other != name}
        assert categories([point for point in points if point.name != name]) == rest


@settings(max_examples=300)
@given(several(least=2), st.data(), MARGINS)
def test_wider_intervals_never_dominate(points: list[Point], data: st.DataObject, margins: Margins) -> None:
    """Where intervals become wider around the same estimates only dominated points may change their category, and
    those of the front to unknown."""
    wider = [
        replace(
            point,
            **{
                name: replace(old, low=max(old.low - data.draw(WIDTHS), 0.0), high=old.high + data.draw(WIDTHS))
                for name, old in (("time", point.time), ("bytes", point.bytes), ("error", point.error))
            },
        )
        for point in points
    ]
    before, after = categories(points, margins), categories(wider, margins)
    kept = {name: "front" if category == "unknown" else category for name, category in after.items()}
    unknown = {name for name, category in before.items() if category == "unknown"}
    assert all(after[name] == "unknown" for name in unknown)
    assert all(kept[name] == before[name] for name in before if before[name] != "dominated" and name not in unknown)


@settings(max_examples=300)
@given(several(), MARGINS)
def test_there_is_a_front_and_dominators_are_named(points: list[Point], margins: Margins) -> None:
    """Whatever the margins some point is on the front or unknown, and exactly the points beaten name another one."""
    found = classify(points, margins)
    assert {"front", "unknown"} & {place.category for place in found.values()}
    for name, place in found.items():
        assert place.category in CATEGORIES
        unbeaten = place.category in ("front", "unknown")
        assert (place.dominated_by is None) == unbeaten and place.dominated_by != name
    assert not any(point.time.unbounded for point in points if found[point.name].category == "front")
    assert all(point.time.unbounded for point in points if found[point.name].category == "unknown")


@given(several())
def test_what_is_certain_is_never_missed(points: list[Point]) -> None:
    """Without margins a point is dominated exactly where another one's intervals say so."""
    found = categories(points)
    for point in points:
        assert (found[point.name] == "dominated") == any(beside(other, point) for other in points)


def test_overlap_cannot_be_told_from_the_front() -> None:
    """A point that is worse by its estimates, but within the intervals, is indistinguishable; apart it is dominated."""
    front, size = exact("front", 1.0, 10, 0.1), Quantity.exact(10)
    near = Point("near", Quantity(0.99, 1.02, 1.05), size, Quantity(0.09, 0.12, 0.15))
    far = Point("far", Quantity(1.03, 1.05, 1.07), size, Quantity(0.11, 0.12, 0.15))
    unknown = Point("unknown", Quantity.of(9.0, None, math.nan), size, Quantity.exact(0.2))
    assert classify([front, near, far, unknown], NONE) == {
        "front": Place("front"),
        "near": Place("indistinguishable", "front"),
        "far": Place("dominated", "front"),
        "unknown": Place("indistinguishable", "front"),
    }


def test_what_has_no_interval_of_its_time_is_on_no_front() -> None:
    """An arm that nothing beats but whose time has no interval is unknown, and still beats others by the estimates."""
    quick = Point("quick", Quantity.of(0.5, None, None), Quantity.exact(10), Quantity.exact(0.1))
    points = [quick, exact("slow", 1.0, 10, 0.1), exact("small", 1.0, 5, 0.2)]
    assert classify(points) == {
        "quick": Place("unknown"),
        "slow": Place("indistinguishable", "quick"),
        "small": Place("front"),
    }
    assert [row["category"] for row in rows(points)] == ["front", "indistinguishable", "unknown"]


def test_margins_are_what_counts_as_no_difference() -> None:
    """An arm that is half a percent slower and much smaller dominates within a margin of 1 %, and not without one."""
    points = [exact("plain", 1.0, 10, 0.1), exact("small", 1.005, 5, 0.1)]
    assert categories(points) == {"plain": "front", "small": "front"}
    assert classify(points, Margins()) == {"plain": Place("dominated", "small"), "small": Place("front")}
    assert categories([exact("a", 1.0, 10, 0.1), exact("b", 0.995, 10, 0.1)], Margins()) == {
        "a": "indistinguishable", "b": "front"
    }  # fmt: skip


def test_a_circle_within_the_margins_dominates_nobody() -> None:
    """Three arms each better than the next in one thing and within the margins in the rest do not all go."""
    wide = Margins(0.1, 0.1, 0.1)
    points = [exact("a", 1.0, 1.09, 1.18), exact("b", 1.18, 1.0, 1.09), exact("c", 1.09, 1.18, 1.0)]
    assert "front" in categories(points, wide).values()


def test_errors_measured_in_pairs_decide_where_their_intervals_overlap() -> None:
    """Two errors whose intervals overlap because of the seeds they share are compared by their paired ratio."""
    error = Quantity(0.08, 0.1, 0.12)
    fast, plain = (Point(n, Quantity.exact(t), Quantity.exact(10), error) for n, t in (("fast", 0.7), ("plain", 1.0)))
    assert classify([fast, plain])["plain"] == Place("indistinguishable", "fast")
    assert classify([fast, plain], paired={("fast", "plain"): (0.98, 1.02)})["plain"] == Place("dominated", "fast")
    assert classify([fast, plain], paired={("fast", "plain"): (0.98, 1.2)})["plain"].category == "indistinguishable"


def test_errors_that_few_draws_do_not_tell_apart_decide_nothing() -> None:
    """Where nothing is known of a ratio of errors, an arm dominates no other, however far apart their own intervals."""
    slow, fast = (Point(n, Quantity.exact(t), Quantity.exact(10), Quantity.exact(t)) for n, t in (("s", 2), ("f", 1)))
    assert classify([fast, slow])["s"] == Place("dominated", "f")
    assert classify([fast, slow], paired={("f", "s"): (0, math.inf)})["s"] == Place("indistinguishable", "f")


def test_the_dominator_that_is_named_is_on_the_front() -> None:
    """Of several that dominate an arm one of the front is named, and of these that of the least error."""
    points = [exact("bad", 9, 9, 9), exact("middle", 5, 5, 1), exact("x", 1, 1, 2), exact("y", 4, 4, 1)]
    assert classify(points, NONE)["bad"] == Place("dominated", "y")


@pytest.mark.parametrize(
    ("points", "margins", "words"),
    [
        ([exact("a", 1, 1, 1)] * 2, NONE, "two points are called 'a'"),
        ([exact("a", -1, 1, 1)], NONE, "time of 'a' must be"),
        ([exact("a", 1, math.nan, 1)], NONE, "bytes of 'a' must be"),
        ([Point("a", Quantity(2, 1, 3), Quantity.exact(1), Quantity.exact(1))], NONE, "within its interval"),
        ([exact("a", 1, 1, math.inf)], NONE, "error of 'a' must be a finite number"),
        ([], Margins(time=-0.1), "margins must be 0 or more"),
    ],
)
def test_what_is_no_point_is_refused(points: list[Point], margins: Margins, words: str) -> None:
    """Names twice, numbers that are none and negative margins are one clear line."""
    with pytest.raises(MeasurementError, match=words) as caught:
        classify(points, margins)
    assert "\n" not in str(caught.value)
