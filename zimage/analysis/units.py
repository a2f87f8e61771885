"""Quantities in words: seconds, bytes, shares and counts as a person reads them.

Every function takes a plain number and returns text; a missing value (None or NaN) becomes an en dash.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

MISSING = "\u2013"  # an en dash

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))


def missing(value: object) -> bool:
    """Whether `value` is None, NaN, pandas' NA, or no finite number at all."""
    try:
        return not math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return True


def excludes_one(low: Any, high: Any) -> bool:
    """Whether an interval of ratios has two ends, and 1 does not lie between them."""
    return not (missing(low) or missing(high)) and bool(low > 1 or high < 1)


def time_unit(value_s: float) -> tuple[float, str]:
    """The unit fit for a time in seconds: its size in seconds and its name, such as (1e-3, "ms")."""
    return _unit(value_s, _TIMES)


def size_unit(value_bytes: float) -> tuple[float, str]:
    """The decimal unit fit for a number of bytes: its size in bytes and its name, such as (1e6, "MB")."""
    return _unit(value_bytes, _SIZES)


def seconds(value_s: float | None) -> str:
    """A time in seconds as text with three significant digits: `11.2 ms`."""
    return _scaled(value_s, _TIMES)


def size(value_bytes: float | None) -> str:
    """A number of bytes as text in decimal units: `3.24 MB`."""
    return _scaled(value_bytes, _SIZES)


def ends(text: Callable[[Any], str], low: float | None, high: float | None) -> str:
    """The ends of an interval as `text` has them, a shared unit once: `10.7 to 11.1 MB`.

    MISSING where they are not known, or read the same.
    """
    if low is None or high is None or missing(low) or missing(high):
        return MISSING
    first, last = text(low), text(high)
    number, _, unit = first.partition(" ")
    joined = f"{number if unit and last.endswith(f' {unit}') else first} to {last}"
    return MISSING if first == last else joined


def count(value: float | None) -> str:
    """A count as text: `6.15 G`, `448`."""
    return _scaled(value, _COUNTS, joint="")


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.05 -> `5.0 %`."""
    if fraction is None or missing(fraction):
        return MISSING
    return f"{signed(100 * fraction, digits)} %"


def ratio(value: float | None) -> str:
    """A ratio with three decimals: `0.998`."""
    return MISSING if value is None or missing(value) else f"{value:.3f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A bare number with `digits` significant digits: `0.0813`, `1.2e-07`."""
    if value is None or missing(value):
        return MISSING
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        # The exponent after rounding: 9.999 with three digits is 10.0, not 10.00.
        exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
        return signed(value, max(0, digits - 1 - exponent))
    return f"{value:.{max(digits - 2, 0)}e}"


def signed(value: float, digits: int) -> str:
    """A number with fixed decimals, never `-0.0`."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def date(iso: str | None) -> str:
    """An ISO 8601 time as `24 Nov 2026, 04:12 UTC`; text that is no such time is returned as it is."""
    if not iso:
        return MISSING
    try:
        moment = datetime.fromisoformat(iso)
    except (TypeError, ValueError):
        return str(iso)
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%b %Y, %H:%M} UTC"


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    if missing(value) or value == 0:
        return next(((s, n) for s, n in units if s == 1.0), units[-1])
    # 0.9995 of a unit rounds to 1.00 of it, so it already belongs to that unit.
    return next(((s, n) for s, n in units if abs(value) >= 0.9995 * s), units[-1])


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], joint: str = " ") -> str:
    if value is None or missing(value):
        return MISSING
    scale, name = _unit(value, units)
    scaled = value / scale
    whole = scale == 1.0 and float(value).is_integer()
    return f"{scaled:.0f}{joint}{name}" if whole else f"{significant(scaled)}{joint}{name}"
