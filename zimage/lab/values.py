"""Values of a notebook's parameters that nothing can be done with, refused by the parameter's name before a run starts.

`COMMON` has the names by which the notebooks of this project mean the same, `OWN` what one of them means by a name or
takes less of. The notebooks call `require_values` themselves, for those who run them in another way. A notebook whose
own default is none of these values means something else by the name, and is not judged. MLX is not loaded here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from zimage import ladder, levers, peers, practices, recipes, reusing, transform_names
from zimage.analysis import fitting, footprint, roofline
from zimage.analysis.roofline import Size
from zimage.errors import InputError, ZImageError, require_integer, require_number, require_seed
from zimage.measure.arguments import require_capture, require_positive
from zimage.measure.fresh import require_processes
from zimage.measure.statistics import LOOKS
from zimage.mixing import require_positive as require_budget
from zimage.names import require_orders
from zimage.quantization import Quantization
from zimage.sources.published import require_block_names
from zimage.streams import Stream

Check = Callable[[Any], object]  # raises ZImageError


def anything(_value: Any) -> None:
    """The check of a name that says nothing."""


def check_of(notebook: str, name: str, default: Any) -> Check:
    """The check of the parameter `name`, whose default is `default`, of a notebook by its file's name without ending.

    Where a name is known from other notebooks alone it is the first of their checks that the default passes.
    """
    own = OWN.get(notebook, {}).get(name) or COMMON.get(name)
    for check in [own] if own else [checks[name] for checks in OWN.values() if name in checks]:
        try:
            check(default)
        except ZImageError:
            continue
        return check
    return anything


def require_values(notebook: str, **given: Any) -> None:
    """Raise a ZImageError, one line, for the first of these parameters that the notebook can do nothing with."""
    for name, value in given.items():
        (OWN.get(notebook, {}).get(name) or COMMON[name])(value)


def _integer(name: str, least: int) -> Check:
    return partial(require_integer, name, least=least)


def _number(name: str, least: float) -> Check:
    return partial(require_number, name, least=least)


def _each(check: Check) -> Check:
    """The check of a list whose items pass `check`."""

    def checked(values: Any) -> None:
        if not isinstance(values, list):
            raise InputError(f"a list is needed, found {values!r:.60}")
        for value in values:
            check(value)

    return checked


def _require_three_sizes(sizes: Any) -> None:
    roofline.require_calibrating([Size.of(size) for size in sizes])


def _require_row_counts(counts: Any) -> None:
    if not counts:
        raise InputError("row_counts must be a list of integers of at least 1, one at least, found []")
    for count in counts:
        require_integer("each of row_counts", count, 1)


def _require_judged(count: Any) -> None:
    if count != 0:
        require_integer("judged, where it is not 0,", count, 20)  # two of every digit


def _require_recipe_file(path: Any) -> None:
    if path is not None:
        recipes.require_file(path)


COMMON: dict[str, Check] = {
    "seed": require_seed,
    "transforms": transform_names.require_known,
    "modes": recipes.require_known,
    "quads": partial(require_integer, "quads", least=1, most=LOOKS[-1]),
    "rounds": _integer("rounds", 1),
    "draws": _integer("draws", 0),
    "steps": _integer("steps", 1),
    "rows": _integer("rows", 1),
    "shift": lambda value: require_positive(shift=value),
    "batch": _integer("batch", 1),
    "sustained_s": _number("sustained_s", 0),
    "power_s": _number("power_s", 0),
}
OWN: dict[str, dict[str, Check]] = {
    "details": {"details": practices.chosen, "variables": practices.require_variables, "draws": _integer("draws", 1)},
    "fusions": {"transforms": transform_names.several},
    "matmuls": {"row_counts": _require_row_counts},
    "memory": {
        "sizes": _each(Size.of),
        "streams": _each(Stream.of),
        "unload": require_orders,
        "published": fitting.precisions,
        "published_px": fitting.squares,
        "published_on": footprint.require_kind,
    },
    "pareto": {"arms": levers.require, "draws": _integer("draws", 1)},
    "peers": {
        "diffusers_options": partial(peers.require_options, "diffusers"),
        "mflux_options": partial(peers.require_options, "mflux"),
    },
    "profile_layers": {"blocks": require_block_names, "capture": require_capture},
    "qkv_fusion": {"arms": ladder.require_arms, "scopes": ladder.require_scopes, "processes": require_processes},
    "quantization": {"modes": partial(recipes.require_known, different=True)},
    "scaling": {
        "sizes": _require_three_sizes,
        "block_sizes": _each(lambda pair: Size.of(pair, 1, 1)),
        "sustained_sizes": _each(Size.of),
    },
    "sensitivity": {
        "packing": Quantization.parse,
        "ladder": _each(Quantization.parse),
        "trajectories": _integer("trajectories", 1),
        "correcting": _integer("correcting", 1),
        "held_out": _integer("held_out", 1),
        "mixes": _integer("mixes", 1),
        "budget": partial(require_budget, name="budget"),
        "recipe_file": _require_recipe_file,
    },
    "step_caching": {
        "steps": _integer("steps", 2),  # one reuses nothing
        "draws": _integer("draws", 1),
        "thresholds": reusing.require_thresholds,
        "tea": reusing.require_tea,
        "every": reusing.require_every,
    },
    "train_digits": {
        "learning_rate": lambda value: require_positive(learning_rate=value),
        "weight_decay": _number("weight_decay", 0),
        "reports": _integer("reports", 0),
        "judged": _require_judged,
    },
}
