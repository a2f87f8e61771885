"""The part of a page about small decisions in which implementations differ: what each is and does, and who makes it."""

from zimage import practices
from zimage.analysis import detail_texts, reading, units
from zimage.analysis.findings import Tables
from zimage.lab.sections import Cell, Head, Section, Table, some

import pandas as pd

_TITLE = "Which details matter"


def details(tables: Tables) -> list[Section]:
    """A table of every detail with its time and what it does to the output; nothing for tables of something else."""
    frame = some(tables, "ablation")
    if frame is None or not detail_texts.is_of_details(frame):
        return []
    quality = some(tables, "quality")
    velocity, drift = (_against_plain(quality, metric) for metric in (detail_texts.ERROR, reading.DRIFT))
    heads = [Head("Detail"), Head("What it is"), Head("Who does it"), Head("Time"), Head("Ratio", True)]
    heads += [Head("Velocity", True), Head("End of run", True)]
    cells = []
    for row in reading.records(frame):
        arm = str(row["arm"])
        known = practices.ALL.get(arm, practices.Practice("", ""))
        measured = not units.missing(row["ratio"])
        cells.append(
            [
                Cell(arm),
                Cell(known.what, "free"),
                Cell(known.who, "free"),
                Cell(str(row["verdict"]), "verdict") if measured else Cell(str(row["reason"]), "free"),
                Cell(_ratio(row) if measured else units.MISSING, "num"),
                Cell(velocity.get(arm, units.MISSING), "num"),
                Cell(drift.get(arm, units.MISSING), "num"),
            ]
        )
    kinds = [] if quality is None else [str(kind) for kind in quality["weights_kind"].dropna().unique()]
    note = (
        "Velocity and end of run are relative L2 distances from the same model without the detail, of one step and of "
        f"the latents at the end of a denoising run; 0 where not a bit differs. {'/'.join(kinds).capitalize()} weights."
    )
    return [Section(_TITLE, note if kinds else "", table=Table(_TITLE, heads, cells))]


def _ratio(row: dict[str, object]) -> str:
    return f"{units.ratio(row['ratio'])} ({units.ratio(row['ratio_low'])} to {units.ratio(row['ratio_high'])})"  # type: ignore[arg-type]


def _against_plain(quality: pd.DataFrame | None, metric: str) -> dict[str, str]:
    """A metric beside the plain model by arm."""
    if quality is None:
        return {}
    rows = reading.records(reading.final_step(quality))
    rows = [row for row in rows if row["metric"] == metric and row["baseline"] == "plain"]
    return {str(row["arm"]): reading.metric_value(metric, row["value"]) for row in rows}
