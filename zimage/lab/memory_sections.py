"""The parts of a page about memory: what a step needs, predicted and measured, and what arms and orders hold."""

from zimage.analysis import memory_plots, memory_reading, plots, reading, units
from zimage.analysis.findings import Tables
from zimage.lab.sections import Cell, Head, Section, Table, chart, some

import pandas as pd

_UNPACKED = (
    "On CUDA packed weights are unpacked where they are used, and MLX closes a batch of work by the elements it reads: "
    "the larger the image, the fewer unpacked weights wait at once, so that a larger one may need less."
)


def sections(tables: Tables, id: str) -> list[Section]:
    """What a `footprint` table, and `memory` and `ablation` tables beside it, say; none without the first."""
    footprint, memory, ablation = (some(tables, name) for name in ("footprint", "memory", "ablation"))
    if footprint is None:
        return []
    found = []
    if len(memory_reading.predicted(footprint)):
        found.append(needs(footprint, id))
    if len(memory_reading.measured(footprint)):
        found.append(measured(footprint, memory))
    if memory is not None:
        found += arms(memory, ablation, some(tables, "quality"), id) + orders(memory, id)
    return found


def needs(footprint: pd.DataFrame, id: str) -> Section:
    """What a step of the published model is predicted to need."""
    rows = memory_reading.predicted(footprint)
    shapes = " and ".join(map(memory_reading.shape_name, dict.fromkeys(rows["model"])))
    note = (
        f"One plain step of {shapes}, its weights included, predicted for {', '.join(dict.fromkeys(rows['kind']))} "
        "before anything is allocated: nothing of this run's weights. It hands over all its work at once, of which "
        "much is alive then; submit_early holds less."
    )
    if "cuda" in set(rows["kind"]):
        note += f" {_UNPACKED}"
    alt = "Predicted peak memory: " + "; ".join(
        f"{row['arm']}, {memory_reading.size_name(row)} {units.size(row['predicted_bytes'])}"
        for row in reading.records(rows)
    )
    charts = [chart(memory_plots.needs(footprint), f"{id}-needs", alt)]
    return Section("What a step of the published model needs", note, charts, stacked=True, weights="")


def measured(footprint: pd.DataFrame, memory: pd.DataFrame | None) -> Section:
    """Predictions beside measured peaks, and which stage has the peak."""
    texts = memory_reading.predicted_and_measured(footprint)
    title = "Predicted and measured"
    heads = [Head(name.capitalize(), place > 1) for place, name in enumerate(texts.columns)]
    cells = [
        [Cell(str(value), "num" if place > 1 else "") for place, value in enumerate(row)]
        for row in texts.itertuples(index=False)
    ]
    peak = "" if memory is None else memory_reading.what_peaks(memory)
    note = "Steps of this run's model, one in memory at a time; what is off is the predicted peak beside the measured."
    return Section(title, f"{note} {peak[:1].upper()}{peak[1:]}.".replace(" .", ""), table=Table(title, heads, cells))


def arms(memory: pd.DataFrame, ablation: pd.DataFrame | None, quality: pd.DataFrame | None, id: str) -> list[Section]:
    """What every arm's step holds, its time, and whether its output is the plain one's."""
    held = memory_reading.arms(memory)
    if held.empty:
        return []
    title, base = "What a step holds at most", memory_reading.peaks_of_arms(memory).get(memory_reading.PLAIN)
    heads = [Head("Arm"), *(Head(name, True) for name in ("Its weights in memory", "At most in a step", "Of plain"))]
    outputs = {} if quality is None else memory_reading.outputs(quality)
    heads += [Head("Output")] if outputs else []
    cells = [
        [
            Cell(str(name)),
            Cell(units.size(row["weight_bytes"]), "num"),
            Cell(units.size(row["peak_bytes"]), "num"),
            Cell(memory_reading.share(row["peak_bytes"], base), "num"),
            *([Cell(outputs.get(str(name), ""), "free")] if outputs else []),
        ]
        for name, row in held.iterrows()
    ]
    note = "Arrays that the arm needs itself, between steps and at the worst moment of one."
    charts = []
    if ablation is not None:
        peaks = memory_reading.peaks_of_arms(memory).items()
        alt = "Peak memory and time ratio: " + "; ".join(f"{name} {units.size(peak)}" for name, peak in peaks)
        charts.append(chart(memory_plots.trade(memory, ablation), f"{id}-trade", alt))
    return [Section(title, note, charts, Table(title, heads, cells), stacked=True)]


def orders(memory: pd.DataFrame, id: str) -> list[Section]:
    """What each order of loading, changing and dropping holds."""
    rows = memory_reading.orders(memory)
    if rows.empty:
        return []
    own = memory[memory["stage"] == "process"]
    wide = own.pivot_table(index="arm", columns="metric", values="bytes", sort=False)
    metrics = [name for name in ("peak_bytes", "allocated_bytes", "process_bytes") if name in wide]
    title = "What the order of loading and dropping costs"
    heads = [Head("Order"), *(Head(reading.metric_name(name).capitalize(), True) for name in metrics)]
    cells = [
        [Cell(str(name)), *(Cell(units.size(row[metric]), "num") for metric in metrics)]
        for name, row in wide.iterrows()
    ]
    peaks = rows[rows["metric"] == "peak_bytes"]
    alt = "Peak memory by order: " + "; ".join(f"{r['arm']} {units.size(r['bytes'])}" for r in reading.records(peaks))
    charts = [chart(plots.memory(peaks, memory_reading.PLAIN_ORDER), f"{id}-orders", alt)]
    note = "Each order in a process of its own. A GPU's own memory is no part of its process's."
    return [Section(title, note, charts, Table(title, heads, cells), folded=True, stacked=True)]
