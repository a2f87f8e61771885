"""The part of a page about quality over a whole denoising run: the drift step by step, and every number there is."""

from typing import Any

from zimage.analysis import plots, reading, units
from zimage.lab.sections import Cell, Head, Section, Table, chart

import pandas as pd


def quality(frame: pd.DataFrame, id: str) -> Section:
    """Drift of every arm's latents along its denoising run, and all metrics at the end of it with their intervals."""
    last = reading.records(reading.final_step(frame))
    drifted = [row for row in last if row["metric"] == reading.DRIFT]
    random = (frame["weights_kind"] == "synthetic").any()
    charts, note = [], "Of random weights it says nothing of pictures." if random else ""
    if frame.loc[frame["metric"] == reading.DRIFT, "step"].nunique() > 1:
        alt = "Drift at the end of the run: " + "; ".join(
            f"{row['arm']} {units.significant(row['value'])}" for row in drifted
        )
        charts = [chart(plots.drift(frame), f"{id}-drift", alt)]
        baseline = next((str(row["baseline"]) for row in drifted if isinstance(row["baseline"], str)), "the baseline")
        note = (
            f"How far the latents of every arm are from those of {baseline} after each step from the same noise, as a "
            f"share of their length. {note}"
        ).rstrip()
    heads = [Head("Arm"), Head("Measure"), Head("Against"), Head("Value", True), Head("Interval", True)]
    heads += [Head("Seeds", True)]
    cells = [
        [
            Cell(str(row["arm"])),
            Cell(reading.metric_name(str(row["metric"]))),
            Cell(row["baseline"] if isinstance(row["baseline"], str) else ""),
            Cell(_value(row, "value"), "num"),
            Cell(_interval(row), "num"),
            Cell(units.MISSING if units.missing(row["count"]) else f"{int(row['count'])}", "num"),
        ]
        for row in last
    ]
    title = "Quality along the denoising run" if charts else "Quality in full"
    return Section(title, note, charts, Table(title, heads, cells), folded=bool(charts))


def says_more(frame: pd.DataFrame) -> bool:
    """Whether a `quality` table holds more than the headlines that stand beside time and size already."""
    return len(reading.final_step(frame)) > len(reading.headline(frame))


def _value(row: dict[str, Any], column: str) -> str:
    return reading.metric_value(str(row["metric"]), row[column])


def _interval(row: dict[str, Any]) -> str:
    ends = [_value(row, name) for name in ("low", "high")]
    return units.MISSING if units.MISSING in ends else " to ".join(ends)
