"""How a run is told from its neighbours: the parameters in which they differ, in words."""

from collections.abc import Iterable, Sequence
from typing import Any

from zimage.analysis.matching import OF_THE_EFFORT, OF_THE_MODEL, OF_THE_ROWS, dtype_of
from zimage.lab.store import Run

# On how much arms are judged, and what recipes are made of: like OF_THE_ROWS nothing that a page's reader looks for.
_OF_THE_JUDGING = ("correcting", "draws", "held_out", "ladder", "mixes", "trajectories")


def telling(runs: Sequence[Run], swept: Sequence[str]) -> list[str]:
    """Those of the swept parameters that runs are told apart by: what chooses rows, or effort, only where it must."""
    few = [name for name in swept if name not in (*OF_THE_ROWS, *_OF_THE_JUDGING, *OF_THE_EFFORT)]
    apart = [len({of_parameters(run, names) for run in runs}) for names in (few, swept)]
    return few if apart[0] == apart[1] else list(swept)


def of_parameters(run: Run, names: Iterable[str], most: int | None = None) -> str:
    """Those of the run's parameters that have these names, in one line; height and width together are a size.

    A dtype stands for itself, that which suited the device where none was asked for.
    Of lists of more than `most` items the first and the last.
    """
    known = [name for name in names if name in run.parameters or name in OF_THE_MODEL]
    texts = {name: f"{name}={_in_words(run.parameters.get(name), most)}" for name in known}
    if "dtype" in texts:
        texts["dtype"] = dtype_of(run.parameters, run.facts)
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
