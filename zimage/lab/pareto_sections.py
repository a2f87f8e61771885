"""The part of a page about the front of time, memory and error: two charts, and a table that leads to the runs."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from zimage.analysis import pareto, pareto_plots, units
from zimage.analysis.matching import OF_THE_EFFORT, OF_THE_ROWS
from zimage.analysis.reading import records
from zimage.lab.sections import Cell, Head, Link, Section, Table, chart, of_weights

import pandas as pd

_MARGINS = pareto.Margins()
_NOTE = (
    "Time, memory and error of an arm at the end of a denoising run: less of each is better. An arm is dominated where "
    "another is surely no worse in all three and surely better in one, by intervals that lie apart and with "
    f"{units.percent(_MARGINS.time, 0)} of time, {units.percent(_MARGINS.bytes, 0)} of memory and "
    f"{units.percent(_MARGINS.error, 0)} of error counting as no difference. Memory is the most of three runs, its "
    "interval begins with the least. Indistinguishable "
    "from the front is what another beats by the estimates alone, unknown what nothing beats but whose time has no "
    "interval. A click on a point leads to the run that it is from."
)
NOT_IN_COMMON = (*OF_THE_ROWS, *OF_THE_EFFORT)  # parameters in which runs may differ whose arms belong on one front


def front(frame: pd.DataFrame, id: str, title: str = "What is worth having together", note: str = "") -> Section | None:
    """Error over time and over memory, and every arm with its category; None where the table holds no point."""
    points = pareto.usable(frame)
    if points.empty:
        return None
    found = {str(row["arm"]): _notebook(row["run_key"]) for row in records(points)}
    links = {arm: link for arm, link in found.items() if link}
    told = "; ".join(f"{row['arm']} {', '.join(pareto_plots.facts(row))}" for row in records(points))
    charts = [
        chart(pareto_plots.by_time(points, links), f"{id}-by-time", f"Error over time: {told}"),
        chart(pareto_plots.by_bytes(points, links), f"{id}-by-bytes", "Error over memory, of the same arms"),
    ]
    heads = [Head("Arm"), Head("Place"), Head("Beaten by")]
    heads += [Head(name, True) for name in ("Time", "Interval", "Memory", "Interval", "Error", "Interval")] + [
        Head("Run")
    ]
    cells = [
        [
            Cell(str(row["arm"])),
            Cell(str(row["category"]), "verdict"),
            Cell(_beaten(row), "free"),
            Cell(units.ratio(row["time_ratio"]), "num"),
            Cell(units.ends(units.ratio, row["time_ratio_low"], row["time_ratio_high"]), "num"),
            Cell(units.size(row["bytes"]), "num"),
            Cell(units.ends(units.size, row["bytes_low"], row["bytes_high"]), "num"),
            Cell(units.significant(row["error"]), "num"),
            Cell(units.ends(units.significant, row["error_low"], row["error_high"]), "num"),
            Cell(
                "", links=(Link(str(row["run_key"])[:8], links[str(row["arm"])]),) if str(row["arm"]) in links else ()
            ),
        ]
        for row in records(points)
    ]
    kept = [place for place, _ in enumerate(heads) if any(_holds(line[place]) for line in cells)]
    heads, cells = [heads[place] for place in kept], [[line[place] for place in kept] for line in cells]
    return Section(title, note or _NOTE, charts, Table(title, heads, cells), stacked=True)


def pools(runs: Sequence[tuple[Mapping[str, Any], str, str, pd.DataFrame]], id: str) -> list[Section]:
    """One section for every several runs whose arms belong on one front.

    runs: parameters, device, kind of weights and `pareto` table of each. They belong together where their parameters
    agree in all but NOT_IN_COMMON.
    """
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for parameters, device, weights, frame in runs:
        kept = {name: value for name, value in sorted(parameters.items()) if name not in NOT_IN_COMMON}
        groups.setdefault((weights, f"{device} {kept!r}"), []).append(frame)
    several = [(weights, frames) for (weights, _), frames in groups.items() if len(frames) > 1]
    found = []
    for place, (weights, frames) in enumerate(several):
        title = f"All arms of {len(frames)} runs"
        note = f"{_NOTE} An arm that several runs have is taken from the first of them."
        section = front(pareto.pooled(frames), f"{id}-pool-{place}", title, note)
        found += [] if section is None else of_weights([section], weights)
    return found


def _notebook(key: Any) -> str:
    """The executed notebook of a run, beside its experiment's page."""
    return f"{quote(key, safe='')}/notebook.ipynb" if isinstance(key, str) and key else ""


def _holds(cell: Cell) -> bool:
    """Whether there is anything in a cell: a column that nothing is in has no place on a page."""
    return bool(cell.links) or cell.text not in ("", units.MISSING)


def _beaten(row: Mapping[str, Any]) -> str:
    """Which arm beats that of a row, and whether that is no more than what the estimates say; "" for none."""
    by = row["dominated_by"]
    if not isinstance(by, str) or not by:
        return ""
    return by if row["category"] == "dominated" else f"{by}, by its estimate"
