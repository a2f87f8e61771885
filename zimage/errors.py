"""Errors a user can meet. Each is one line: what went wrong, where, and what to do."""

import difflib
import math
from collections.abc import Iterable


class ZImageError(Exception):
    """Base of every error that bad input or a missing piece of the machine can cause."""


class ConfigError(ZImageError):
    """A model configuration has an unknown, missing or impossible value."""


class WeightsError(ZImageError):
    """A checkpoint cannot be found, read, or does not hold the tensors its configuration asks for."""


class DownloadError(WeightsError):
    """A download was asked for rightly and failed: the network, the server or the disk."""


class InputError(ZImageError):
    """A model, transform or scheduler was called with shapes or values it does not accept."""


class ExperimentError(ZImageError):
    """An experiment file, a notebook's parameters or a command's arguments are wrong."""


class StoreError(ZImageError):
    """The results store holds something unreadable, or cannot be written."""


class MeasurementError(ZImageError):
    """A measurement could not be taken or judged."""


class BackendError(ZImageError):
    """MLX, its device or its libraries are missing or unusable on this machine."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The line that says a name is not known, with the nearest one or all there are."""
    near = nearest(name, known := list(known))
    return f"{what} {name!r}; " + (f"did you mean {near!r}?" if near else f"known: {', '.join(known) or 'none'}")


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that was probably meant, "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return near[0] if near else ""


def require_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise InputError unless the argument called `name` is an integer from `least` on, and up to `most` if given."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):  # type: ignore[operator]
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be an integer {span}, found {value!r:.60}")


def require_number(name: str, value: object, least: float) -> None:
    """Raise InputError unless the argument called `name` is a finite number from `least` on."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value < math.inf:  # type: ignore[operator]
        raise InputError(f"{name} must be a number of at least {least:g}, found {value!r:.60}")


def require_seed(seed: object) -> None:
    """Raise InputError for what is no seed of random numbers."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer from 0 to 2^64 - 1, found {seed!r:.60}")
