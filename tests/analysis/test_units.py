"""Quantities in words."""

import math

from zimage.analysis import units

import pytest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0112, "11.2 ms"), (1.02, "1.02 s"), (0.00083, "830 µs"), (0.9999, "1.00 s"), (-0.00003, "-30.0 µs"),
        (0.0099999, "10.0 ms"), (0.0, "0 s"), (125.0, "125 s"),
    ],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    """A time has three significant digits, also where rounding carries it over a power of ten or a unit."""
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3_240_000, "3.24 MB"), (512, "512 B"), (999_990, "1.00 MB"), (12_310_000_000, "12.3 GB")]
)
def test_size(value: float, text: str) -> None:
    """A number of bytes is given in decimal units."""
    assert units.size(value) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing(value: float | None) -> None:
    """What was not measured is a dash in every unit, never `nan`."""
    assert {f(value) for f in (units.seconds, units.size, units.count, units.percent, units.ratio)} == {units.MISSING}
    assert units.significant(value) == units.MISSING


def test_percent_never_negative_zero() -> None:
    """A share that rounds to nothing has no sign."""
    assert units.percent(-0.0001) == "0.0 %"
    assert units.percent(0.05) == "5.0 %"


@pytest.mark.parametrize(("value", "text"), [(0.0813, "0.0813"), (3.1e-7, "3.1e-07"), (0.0, "0"), (9.999, "10.0")])
def test_significant(value: float, text: str) -> None:
    """A bare number keeps three digits, and two with an exponent."""
    assert units.significant(value) == text


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2026-11-24T04:12:09+00:00", "24 Nov 2026, 04:12 UTC"),
        ("2026-11-24T04:12:09Z", "24 Nov 2026, 04:12 UTC"),
        ("2026-11-24T05:12:09+01:00", "24 Nov 2026, 04:12 UTC"),
        ("yesterday", "yesterday"),
        (None, units.MISSING),
    ],
)
def test_date(text: str | None, date: str) -> None:
    """A time is shown in UTC; text that is none stays as it is."""
    assert units.date(text) == date


def test_ends_say_a_shared_unit_once() -> None:
    """Ends of an interval share their unit where they have one; ends that are unknown or read the same are missing."""
    assert units.ends(units.size, 10_690_000, 11_120_000) == "10.7 to 11.1 MB"
    assert units.ends(units.size, 999_000, 1_200_000) == "999 kB to 1.20 MB"
    assert units.ends(units.ratio, 0.711, 0.881) == "0.711 to 0.881"
    assert units.ends(units.significant, 2.1e-7, 2.7e-7).count(" to ") == 1
    for low, high in ((None, 1.0), (1.0, float("nan")), (15_460_000, 15_497_000)):
        assert units.ends(units.size, low, high) == units.MISSING
