"""The parts of a page about sensitivity: where packing does damage, what it costs a byte, and how it adds up."""

from zimage.analysis import reading, sensitivity_plots, units
from zimage.analysis.findings import Tables
from zimage.lab.sections import Cell, Head, Section, Table, chart, some

import pandas as pd


def sections(tables: Tables, id: str) -> list[Section]:
    """What the tables `sensitivity` and `additivity` of one run say, where it has them."""
    single, sums = some(tables, "sensitivity"), some(tables, "additivity")
    return [
        *([] if single is None else [damage(single, id)]),
        *([] if sums is None else [additivity(sums)]),
    ]


def damage(frame: pd.DataFrame, id: str) -> Section:
    """Blocks by steps, and the ranking of the layers, of one `sensitivity` table."""
    mapped = frame[(frame["kind"] == "block") & frame["step"].notna() & frame["end_error"].notna()]
    ways = mapped["quantization"].dropna().unique()
    layers = frame[(frame["kind"] == "layer") & frame["step"].isna()]
    if len(ways):  # what is ranked; the others are what a recipe may choose from
        layers = layers[layers["quantization"] == ways[0]]
    layers = layers.dropna(subset=["damage_per_byte"]).sort_values("damage_per_byte")
    charts = []
    if len(mapped):
        worst = reading.records(mapped.nlargest(1, "end_error"))[0]
        alt = "Error at the end of a trajectory with one block packed in one step; the largest is "
        alt += f"{units.percent(worst['end_error'])}, of {worst['unit']} in step {int(worst['step']) + 1}"
        charts.append(chart(sensitivity_plots.steps(mapped, "end_error"), f"{id}-steps", alt))
    if len(layers):
        ends = " to ".join(str(layers["unit"].iloc[place]) for place in (0, -1))
        alt = f"Squared error of the velocity per MB saved, layer by layer: {ends}"
        charts.append(chart(sensitivity_plots.damage(layers), f"{id}-damage", alt))
    title = "Where packing does damage"
    heads = [
        Head(text, place > 0) for place, text in enumerate(("Layer", "Saved", "Error", "At the end", "Damage / MB"))
    ]
    cells = [
        [
            Cell(str(row["unit"])),
            Cell(units.size(row["bytes_saved"]), "num"),
            Cell(units.percent(row["velocity_error"], 2), "num"),
            Cell(units.percent(row["end_error"], 2), "num"),
            Cell(units.significant(1e6 * row["damage_per_byte"]), "num"),
        ]
        for row in reading.records(layers)
    ]
    note = (
        "Each alone, all else in floating point. The map: the error that is left at the end of a trajectory where one "
        "block is packed in one step. The bars: a layer's squared error of the velocity by the megabytes it saves."
    )
    return Section(title, note, charts, Table(title, heads, cells), folded=bool(charts), stacked=True)


def additivity(frame: pd.DataFrame) -> Section:
    """How the squared errors of single changes add up, in the median and at the ends."""
    title = "How single errors add up"
    heads = [Head("Changes"), Head("Error of"), *(Head(text, True) for text in ("Sums", "Median", "Least", "Most"))]
    cells = [
        [Cell(str(what)), Cell(str(metric)), Cell(str(len(group)), "num")]
        + [Cell(units.ratio(value), "num") for value in (group.median(), group.min(), group.max())]
        for (what, metric), group in frame.dropna(subset=["ratio"]).groupby(["what", "metric"], sort=False)["ratio"]
    ]
    note = "Squared error of all changes at once by the sum of those of each alone: 1 where they add up."
    return Section(title, note, table=Table(title, heads, cells))
