"""Values of a notebook's parameters that nothing can be done with, refused by the parameter's name before a run starts.

The notebooks of this project mean the same by these names, and some of them take less. A notebook whose own default is
none of these values means something else by the name, and is not judged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from zimage import recipes
from zimage.errors import InputError, ZImageError, require_integer, require_seed
from zimage.measure.arguments import require_positive
from zimage.measure.statistics import LOOKS
from zimage.transform_names import require_known

Check = Callable[[Any], None]  # raises ZImageError


def anything(_value: Any) -> None:
    """The check of a name that says nothing."""


def check_of(name: str, default: Any) -> Check:
    """The check of the values of the parameter `name`, whose default is `default`."""
    check = CHECKS.get(name, anything)
    try:
        check(default)
    except ZImageError:
        return anything
    return check


def _require_packings(modes: Any) -> None:
    """Names of packings; a recipe's file is left to the run, whose folder it is in."""
    if not isinstance(modes, list):
        raise InputError(f"modes must be a list of packings, found {modes!r:.60}")
    for mode in modes:
        if not recipes.is_file(mode):
            recipes.read(mode)


CHECKS: dict[str, Check] = {
    "seed": require_seed,
    "transforms": require_known,
    "modes": _require_packings,
    "quads": partial(require_integer, "quads", least=1, most=LOOKS[-1]),
    "rounds": partial(require_integer, "rounds", least=1),
    "draws": partial(require_integer, "draws", least=0),
    "steps": partial(require_integer, "steps", least=1),
    "rows": partial(require_integer, "rows", least=1),
    "shift": lambda value: require_positive(shift=value),
}
