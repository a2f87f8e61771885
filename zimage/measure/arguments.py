"""What measurements are asked with, refused before any call. Raises MeasurementError, one line."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from zimage.errors import MeasurementError


def is_number(value: Any) -> bool:
    """A real number, finite or not, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_calls(arms: Mapping[str, Any], canary: Any = None) -> None:
    """The arms have to be something to call, and the canary too, if there is one."""
    for name, call in arms.items() if canary is None else {**arms, "canary": canary}.items():
        if not callable(call):
            raise MeasurementError(f"{name} must be a callable that performs one timed call, found {call!r}")


def require_pair(names: Any) -> None:
    """The names of a baseline and an arm."""
    if not isinstance(names, (tuple, list)) or len(names) != 2:
        raise MeasurementError(f"names must be two, of the baseline and of the arm, found {names!r}")
    require_names(*names)


def require_names(*names: Any) -> None:
    """Names of arms: texts, all different, and none that the samples need for something else."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise MeasurementError(f"an arm's name must be a text, found {name!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MeasurementError(f"baseline and arm are both called {twice!r}; their names must differ")
    if "canary" in names:
        raise MeasurementError("no arm can be called 'canary': the samples of the canary are")


def require_fractions(**values: Any) -> None:
    """Each has to lie between 0 and 1, neither included."""
    for name, value in values.items():
        if not is_number(value) or not 0 < value < 1:
            raise MeasurementError(f"{name} must lie between 0 and 1, found {value!r}")


def require_positive(**values: Any) -> None:
    """Each has to be a positive, finite number."""
    for name, value in values.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise MeasurementError(f"{name} must be positive and finite, found {value!r}")


def require_gputrace(path: str | Path) -> None:
    """What a Metal capture may be called."""
    if Path(path).suffix != ".gputrace":
        raise MeasurementError(f"{path}: a Metal capture is a .gputrace; name it {Path(path).with_suffix('.gputrace')}")


def require_capture(kind: str | None) -> None:
    """A native capture: "nvtx", the path of a Metal capture, or None for none."""
    if kind and kind != "nvtx":
        require_gputrace(kind)


def require_integer(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """An integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = "" if low == -math.inf else f" of at least {low}" if high == math.inf else f" between {low} and {high}"
        raise MeasurementError(f"{name} must be an integer{limits}, found {value!r}")
