"""What the levers of `step_caching` take, as plain numbers and names. Needs no MLX."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from zimage.errors import InputError, require_integer

# Published polynomials of TeaCache, highest power first: TeaCache4FLUX and TeaCache4Lumina2 (its first version) of
# https://github.com/ali-vilab/TeaCache. Lumina2 has the architecture that Z-Image's is nearest to; none was published
# for Z-Image. "none" leaves distances as they are.
POLYNOMIALS = {
    "none": (1.0, 0.0),
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401, 2.64230861e-01),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
}
FITTED = "fitted"  # where polynomials are asked for by name: the one that is fitted to the model's own steps


def coefficients(polynomial: str | Sequence[float], others: Sequence[str] = ()) -> tuple[float, ...]:
    """Those of one of POLYNOMIALS, or a list of them, highest power first. Raises InputError for what is neither.

    others: names that are known too where this is asked; a name is told from all of them.
    """
    if isinstance(polynomial, str):
        if polynomial not in POLYNOMIALS:
            known = ", ".join([*POLYNOMIALS, *others])
            raise InputError(f"polynomial {polynomial!r:.60} is not known; known are {known}")
        return POLYNOMIALS[polynomial]
    if not isinstance(polynomial, (list, tuple)) or not polynomial or not all(map(is_number, polynomial)):
        raise InputError(
            "polynomial must be a name or a list of finite coefficients from the highest power down, found "
            f"{polynomial!r:.60}"
        )
    return tuple(float(c) for c in polynomial)


def require_threshold(value: object) -> None:
    """Raise InputError unless it is a finite number of at least 0."""
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise InputError(f"threshold must be a finite number of at least 0, found {value!r:.60}")


def is_number(value: object) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def require_thresholds(thresholds: Any) -> None:
    """Raise InputError unless it is a list of thresholds of the rule by timestep."""
    for threshold in _listed("thresholds", thresholds, "numbers", lambda _: True):
        require_threshold(threshold)


def require_tea(tea: Any) -> None:
    """Raise InputError unless it is a list of pairs: the name or coefficients of a polynomial, and a threshold."""
    for polynomial, threshold in _listed("tea", tea, "[polynomial, threshold] pairs", _of(2)):
        if polynomial != FITTED:
            coefficients(polynomial, [FITTED])
        require_threshold(threshold)


def require_every(every: Any) -> None:
    """Raise InputError unless it is a list of intervals, each with the shares of the main blocks it is from and to."""
    form = "[interval, start, stop] lists, start and stop from 0 to 1"
    for interval, start, stop in _listed("every", every, form, _of(3)):
        if not (is_number(start) and is_number(stop) and 0 <= start < stop <= 1):
            raise InputError(
                f"every takes from which to which share of the main blocks, found {start!r:.40}, {stop!r:.40}"
            )
        require_integer("interval", interval, 1)


def _listed(name: str, given: Any, form: str, fits: Callable[[Any], bool]) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)) or not all(map(fits, given)):
        raise InputError(f"{name} must be a list of {form}, found {given!r:.80}")
    return given


def _of(width: int) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and len(values) == width
