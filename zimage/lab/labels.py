"""How a run is told from its neighbours: the parameters in which they differ, in words."""

from collections.abc import Iterable
from typing import Any

from zimage.analysis.matching import OF_THE_MODEL
from zimage.lab.store import Run


def of_parameters(run: Run, names: Iterable[str], most: int | None = None) -> str:
    """Those of the run's parameters that have these names, in one line; height and width together are a size.

    Of lists of more than `most` items the first and the last.
    """
    known = [name for name in names if name in run.parameters or name in OF_THE_MODEL]
    texts = {name: f"{name}={_in_words(run.parameters.get(name), most)}" for name in known}
    if {"height", "width"} <= set(known):
        del texts["width"]
        texts["height"] = f"{run.parameters['height']} x {run.parameters['width']} px"
    return ", ".join(texts.values())


def _in_words(value: Any, most: int | None) -> str:
    if value in (None, []):
        return "none"
    if isinstance(value, list) and most is not None and len(value) > most:
        return f"{value[0]} to {value[-1]} ({len(value)})"
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)
