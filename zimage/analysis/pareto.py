"""Which arms are worth having: the front of time, memory and error, and what cannot be told from it.

An arm is a point of three quantities, less of each being better: the time ratio to a baseline, bytes, and an error.
Each is known to an interval, whose ends are the value itself where it is exact, and 0 and infinity where nothing is
known. Of two points, *a* over *b* in one quantity:

- *surely better*: the ratio a / b lies below 1 / (1 + margin) over the whole of its interval;
- *surely no worse*: it lies at or below 1 + margin over the whole of it.

The interval of the ratio is [a.low / b.high, a.high / b.low], as of independent quantities, unless the error's was
measured in pairs, on the same seeds (`paired`). Margins are what counts as equivalent: with margins of 0 the two mean
"the intervals lie apart" and "they do, or touch". Then *a surely dominates b* where a is surely no worse in all three,
surely better in one, and by the estimates gains more than it loses: the product of its three ratios to b is below 1.
That last condition keeps arms from dominating each other in a circle, each a little worse within a margin; with margins
of 0 it always holds. Categories:

- `dominated`: some point surely dominates it;
- `front`: none does, and none dominates it by the estimates alone (no more in all three, less in one);
- `indistinguishable`: some point dominates it by the estimates, but not surely: measure more to know;
- `unknown`: it would be on the front, but nothing is known of how sure its time is, so that no point could dominate it.

So the order of points does not matter, wider intervals never make a point `dominated`, there always is a front where
all times have intervals, and with margins of 0 a surely dominated point changes no other's category and points without
any uncertainty give the classic Pareto set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zimage.analysis import tables
from zimage.analysis.reading import records
from zimage.errors import MeasurementError

import pandas as pd

Category = Literal["front", "indistinguishable", "unknown", "dominated"]
CATEGORIES: tuple[Category, ...] = ("front", "indistinguishable", "unknown", "dominated")
Ratio = tuple[float, float]  # the ends of the interval of a ratio


@dataclass(frozen=True)
class Quantity:
    """A quantity of which less is better: its estimate and the ends of its interval, none of them negative."""

    low: float
    value: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Quantity":
        """Known without uncertainty."""
        return cls(value, value, value)

    @classmethod
    def of(cls, value: float, low: float | None, high: float | None) -> "Quantity":
        """With the ends of its interval; where either is None or NaN, nothing is known of how sure it is."""
        known = low is not None and high is not None and not (math.isnan(low) or math.isnan(high))
        return cls(low, value, high) if known else cls(0.0, value, math.inf)  # type: ignore[arg-type]

    @property
    def unbounded(self) -> bool:
        """Whether nothing is known of how sure it is."""
        return self.low == 0 and self.high == math.inf


@dataclass(frozen=True)
class Point:
    """An arm: its time ratio to a baseline that all points share, the bytes it needs, and its error."""

    name: str
    time: Quantity
    bytes: Quantity
    error: Quantity

    @property
    def quantities(self) -> tuple[Quantity, Quantity, Quantity]:
        """Time, bytes, error."""
        return self.time, self.bytes, self.error


@dataclass(frozen=True)
class Margins:
    """Relative differences that count as none, of each quantity."""

    time: float = 0.01  # that of a verdict
    bytes: float = 0.01
    error: float = 0.05

    @property
    def each(self) -> tuple[float, float, float]:
        """Of time, bytes and error."""
        return self.time, self.bytes, self.error


NONE = Margins(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Place:
    """What category a point is in, and for a dominated or indistinguishable one which point dominates it."""

    category: Category
    dominated_by: str | None = None


def classify(
    points: Sequence[Point],
    margins: Margins = Margins(),
    paired: Mapping[tuple[str, str], Ratio] | None = None,
) -> dict[str, Place]:
    """The place of every point by its name, in their order; see the module's text.

    paired: the interval of the ratio of errors a / b by (a, b), where it is known better than from both intervals.
    `dominated_by` is one of those that dominate a point in the way of its category, for an indistinguishable one by the
    estimates: one of the front where there is any, and of these that of the least error. Raises MeasurementError for
    two points of one name, quantities that are negative, NaN or outside of their own interval, and negative margins.
    """
    _check(points, margins)
    over = {point.name: [p for p in points if _surely(p, point, margins, paired or {})] for point in points}
    likely = {point.name: [p for p in points if _by_estimates(p, point)] for point in points}
    unbeaten: dict[str, Category] = {p.name: "unknown" if p.time.unbounded else "front" for p in points}
    found: dict[str, Category] = {
        name: "dominated" if over[name] else "indistinguishable" if likely[name] else best
        for name, best in unbeaten.items()
    }

    def rank(point: Point) -> tuple[object, ...]:
        return CATEGORIES.index(found[point.name]), point.error.value, point.time.value, point.bytes.value, point.name

    best = {name: min(over[name] or likely[name], key=rank, default=None) for name in over}
    return {name: Place(found[name], None if by is None else by.name) for name, by in best.items()}


def _surely(a: Point, b: Point, margins: Margins, paired: Mapping[tuple[str, str], Ratio]) -> bool:
    """Whether a surely dominates b."""
    ends = [(x.high, y.low) for x, y in zip(a.quantities, b.quantities, strict=True)]  # what speaks most against a
    if (a.name, b.name) in paired:
        ends[2] = paired[a.name, b.name][1], 1.0
    pairs = [(high, low, 1 + margin) for (high, low), margin in zip(ends, margins.each, strict=True)]
    no_worse = all(high <= factor * low for high, low, factor in pairs)
    better = any(factor * high < low for high, low, factor in pairs)
    return no_worse and better and (_by_estimates(a, b) or _sum(a) < _sum(b))


def _by_estimates(a: Point, b: Point) -> bool:
    pairs = [(x.value, y.value) for x, y in zip(a.quantities, b.quantities, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def _sum(point: Point) -> float:
    """What orders points as the product of their quantities does, zeros included."""
    return math.fsum(math.log(max(quantity.value, 1e-300)) for quantity in point.quantities)


def _check(points: Sequence[Point], margins: Margins) -> None:
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MeasurementError(f"two points are called {twice!r}; name every arm once")
    for point in points:
        for name in ("time", "bytes", "error"):
            found: Quantity = getattr(point, name)
            if not 0 <= found.low <= found.value <= found.high or math.isinf(found.value):
                raise MeasurementError(
                    f"{name} of {point.name!r} must be a finite number of 0 or more within its interval, found "
                    f"{found.value!r} in [{found.low!r}, {found.high!r}]"
                )
    if not all(margin >= 0 for margin in margins.each):
        raise MeasurementError(f"margins must be 0 or more, found {margins.each}")


def rows(points: Sequence[Point], paired: Mapping[tuple[str, str], Ratio] | None = None) -> list[dict[str, Any]]:
    """Rows of a `pareto` table, the front first and in each category the fastest first; raises as `classify` does."""
    places = classify(points, paired=paired)
    ordered = sorted(points, key=lambda p: (CATEGORIES.index(places[p.name].category), p.time.value))
    found = []
    for point in ordered:
        held = point.bytes
        row: dict[str, Any] = {"arm": point.name, "bytes": int(held.value)}
        row |= {"bytes_low": int(held.low), "bytes_high": int(held.high)} if math.isfinite(held.high) else {}
        for name, quantity in (("time_ratio", point.time), ("error", point.error)):
            ends = (quantity.low, quantity.high) if math.isfinite(quantity.high) else (None, None)
            row |= {name: quantity.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
        place = places[point.name]
        found.append({**row, "category": place.category, "dominated_by": place.dominated_by})
    return found


def pooled(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One `pareto` table of the arms of several runs that were compared with the same baseline at the same size.

    An arm that several have is taken from the first of them. What was dominated in its own run stays so, as more points
    cannot change that and the run may have known its errors in pairs; all others are classified among all.
    """
    table = pd.concat([usable(frame) for frame in frames], ignore_index=True).drop_duplicates("arm", ignore_index=True)
    points = [
        Point(
            row["arm"],
            Quantity.of(row["time_ratio"], row["time_ratio_low"], row["time_ratio_high"]),
            _bytes(row),
            Quantity.of(row["error"], row["error_low"], row["error_high"]),
        )
        for row in records(table)
    ]
    places = classify(points)
    own = table["category"] == "dominated"
    table["dominated_by"] = table["dominated_by"].where(own, table["arm"].map(lambda arm: places[arm].dominated_by))
    table["category"] = table["category"].where(own, table["arm"].map(lambda arm: places[arm].category))
    order = table["category"].map(CATEGORIES.index)
    return table.assign(order=order).sort_values(["order", "time_ratio"]).drop(columns="order").reset_index(drop=True)


def _bytes(row: Mapping[str, Any]) -> Quantity:
    """Of a row of the table, exact where it is from a version that kept the most of several runs alone."""
    found = Quantity.of(row["bytes"], row["bytes_low"], row["bytes_high"])
    return Quantity.exact(row["bytes"]) if found.unbounded else found


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `pareto` table that are points: of a known category, time and memory above 0, and finite.

    What an earlier version put on the front although its time has no interval is unknown.
    """
    frame = tables.complete("pareto", frame)
    good = frame["category"].isin(CATEGORIES) & frame["arm"].notna()
    for name in ("time_ratio", "bytes", "error"):
        values = pd.to_numeric(frame[name], errors="coerce")
        good &= values.lt(math.inf) & (values.ge(0) if name == "error" else values.gt(0))
    unsure = frame["time_ratio_low"].isna() | frame["time_ratio_high"].isna()
    category = frame["category"].mask(unsure & (frame["category"] == "front"), "unknown")
    return frame.assign(category=category)[good].reset_index(drop=True)


def summary(frame: pd.DataFrame | None) -> tuple[str, tuple[str, ...]] | None:
    """What a `pareto` table says in one sentence, and what stands behind it; None where it holds no point."""
    if frame is None or (points := usable(frame)).empty:
        return None
    named = {category: list(points.loc[points["category"] == category, "arm"]) for category in CATEGORIES}
    front, unsure, untimed, out = (named[category] for category in CATEGORIES)
    count = f"{len(front)} {'is' if len(front) == 1 else 'are'}" if front else "none is known to be"
    text = f"of {len(points)} arms {count} on the front of time, memory and error"
    text += f": {', '.join(front)}" if front else ""
    if not out and points[["time_ratio_high", "error_high"]].notna().all(axis=1).sum() < 2:
        text = f"which of {len(points)} arms are on the front of time, memory and error could not be decided: "
        text += "without intervals of both time and error no arm surely dominates another"
        return text, ()
    evidence = []
    if unsure:
        evidence.append(f"indistinguishable from it: {', '.join(unsure)}")
    if untimed:
        evidence.append(f"unknown without an interval of the time: {', '.join(untimed)}")
    if out:
        by = points.set_index("arm")["dominated_by"]
        evidence.append("dominated: " + ", ".join(f"{arm} by {by[arm]}" for arm in out))
    if unknown := int(points[["time_ratio_high", "error_high"]].isna().any(axis=1).sum()):
        evidence.append(f"{unknown} without an interval, which nothing can surely dominate")
    return text, tuple(evidence)
