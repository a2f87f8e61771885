"""How a run is told from its neighbours: the parameters in which they differ, in words."""

from collections.abc import Iterable
from typing import Any

from zimage.lab.store import Run

# Parameters that make another model of the source: runs that differ in them are not of the same thing, swept or not.
OF_THE_MODEL = ("quantization", "transforms")


def of_parameters(run: Run, names: Iterable[str]) -> str:
    """Those of the run's parameters that have these names, in one line; height and width together are a size."""
    known = [name for name in names if name in run.parameters or name in OF_THE_MODEL]
    texts = {name: f"{name}={_in_words(run.parameters.get(name))}" for name in known}
    if {"height", "width"} <= set(known):
        del texts["width"]
        texts["height"] = f"{run.parameters['height']} x {run.parameters['width']} px"
    return ", ".join(texts.values())


def _in_words(value: Any) -> str:
    if value in (None, []):
        return "none"
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
