"""The parts of a page about what operations cost: profile by operation, module tree, prediction, power."""

from collections.abc import Callable
from typing import Any

from zimage.analysis import cost_plots, plots, reading, scaling_plots, units
from zimage.analysis.cost import UNATTRIBUTED
from zimage.lab.sections import Cell, Head, Section, Table, chart, times

import pandas as pd


def operations(frame: pd.DataFrame, id: str) -> list[Section]:
    """One section a profiled stage: its operations' times, and where they stand under the roofline."""
    found = []
    stages = [(stage, group) for stage, group in frame.groupby("stage", sort=False)]
    stages.sort(key=lambda one: -float(one[1]["time_s"].sum()))  # what costs most comes first
    for place, (stage, group) in enumerate(stages):
        rows = reading.records(group)
        rest = next((row for row in rows if row["operation"] == UNATTRIBUTED), None)
        note = (
            "Each operation alone at its real shapes, inputs and weights rotated; bytes are the fewest that can be "
            "moved, and the roof is what this device was measured to reach."
        )
        if rest is not None and not units.missing(rest["time_s"]):
            note += (
                f" {units.seconds(rest['time_s'])} of the stage are unattributed: what it takes beyond the sum of its "
                "operations, negative where they overlap in it."
            )
        alt = f"Time of the operations of {stage}: " + "; ".join(
            f"{row['operation']} {units.seconds(row['time_s'])}" for row in rows
        )
        heads = [Head("Operation"), *(Head(n, True) for n in ("Time", "Interval", "FLOPs", "Bytes", "FLOP/byte"))]
        heads += [Head("Bound"), Head("Of the roof", True)]
        cells = [
            [
                Cell(str(row["operation"])),
                Cell(units.seconds(row["time_s"]), "num"),
                Cell(times(row), "num"),
                Cell(units.count(row["flops"]), "num"),
                Cell(units.size(row["bytes"]), "num"),
                Cell(units.significant(row["intensity_flop_per_byte"]), "num"),
                Cell(row["bound"] if isinstance(row["bound"], str) else ""),
                Cell(units.percent(row["attained_fraction"], 0), "num"),
            ]
            for row in rows
        ]
        charts = [chart(cost_plots.operations(group), f"{id}-operations-{place}", alt)]
        if (group["attained_fraction"] > 0).any():
            words = f"Roofline of {stage}: rate over arithmetic intensity of every operation"
            charts.append(chart(cost_plots.roofline(group), f"{id}-roofline-{place}", words))
        title = f"Operations of {stage}"
        found.append(Section(title, note, charts, Table(title, heads, cells), folded=True, stacked=True))
    return found


def memory(frame: pd.DataFrame, id: str) -> Section:
    """What was held at most by stage, beside what was predicted, and what process, system and device say."""
    stages = reading.by_stage(frame)
    peaks = stages[stages["metric"] == "peak_bytes"]
    heads = [Head("Of"), Head("What"), Head("Bytes", True)]
    whole = reading.records(frame[frame["stage"].isin(reading.WHOLE)].dropna(subset=["bytes"]))
    cells = [
        [Cell(str(r["stage"])), Cell(reading.metric_name(str(r["metric"]))), Cell(units.size(r["bytes"]), "num")]
        for r in whole
    ]
    found = {(row["stage"], row["metric"]): float(row["bytes"]) for row in whole}
    measured, predicted = found.get(("step", "peak_bytes")), found.get(("step", "predicted_peak_bytes"))
    note = "The most that MLX held while each stage and those before it were computed, weights included."
    if measured and predicted:
        note += (
            f" Predicted for the step before anything was allocated: {units.size(predicted)}, "
            f"{units.significant(predicted / measured)} times what was measured."
        )
    charts = []
    if len(peaks):
        alt = f"Peak memory by stage, {units.size(peaks['bytes'].max())} at most"
        charts.append(chart(plots.memory(peaks), f"{id}-memory", alt))
    return Section("Memory", note, charts, Table("Memory of the whole", heads, cells), folded=bool(charts))


def modules(frame: pd.DataFrame) -> Section:
    """The module tree: parameters, bytes, FLOPs, time and share of every module, indented by depth."""
    timed = frame["time_s"].notna().any()
    heads = [Head("Module"), *(Head(name, True) for name in ("Parameters", "Weights", "FLOPs"))]
    heads += [Head("Time", True), Head("Share", True)] if timed else []
    cells = []
    above: list[str] = []  # the modules that hold the current one, from the outside
    for row in reading.records(frame):
        path = _text(row["path"])
        while above and above[-1] and not path.startswith(f"{above[-1]}."):
            above.pop()
        line = [
            Cell("\N{NO-BREAK SPACE}" * 3 * len(above) + _module_name(path, above[-1] if above else "")),
            Cell(units.count(row["parameters"]), "num"),
            Cell(units.size(row["bytes"]), "num"),
            Cell(units.count(row["flops"]), "num"),
        ]
        if timed:
            line += [Cell(units.seconds(row["time_s"]), "num"), Cell(units.percent(row["share"]), "num")]
        cells.append(line)
        above.append(path)
    note = "Times are of the prefix view where a module is a stage, and of the operation view below that."
    return Section("Module tree", note if timed else "", table=Table("Module tree", heads, cells))


def _module_name(path: str, parent: str) -> str:
    """A module's path below its parent's; a place in a list keeps the list's name."""
    if not path:
        return "the whole step"
    name = path.removeprefix(f"{parent}.") if parent else path
    return f"{parent.rpartition('.')[2]}.{name}" if name.isdigit() else name


def overhead(frame: pd.DataFrame) -> Section | None:
    """What a profile measured beside its stages: the depth view, the first call, kernel build, its own cost."""
    rows = frame[frame["view"].isin([reading.OVERHEAD, "depth"])]
    if rows.empty:
        return None
    heads = [Head("What"), Head("Time", True), Head("Interval", True)]
    cells = [
        [
            Cell(str(row["stage"]) + (", by depth" if row["view"] == "depth" else "")),
            *((Cell("hidden by noise"), Cell("")) if _hidden(row) else _timed(row)),
        ]
        for row in reading.records(rows)
    ]
    note = "Measured apart and in no stage's time. The depth view regresses the time of a step on its number of blocks."
    return Section("Beside the stages", note, table=Table("Beside the stages", heads, cells))


def _timed(row: dict[str, Any]) -> tuple[Cell, Cell]:
    """A time and its interval."""
    return Cell(units.seconds(row["time_s"]), "num"), Cell(times(row), "num")


def _hidden(row: dict[str, Any]) -> bool:
    """Whether a row is a block by the depth view that came out at 0 or below, which is no time."""
    return bool(row["view"] == "depth" and row["stage"] == "one block" and row["time_s"] <= 0)


def scaling(frame: pd.DataFrame, id: str) -> Section:
    """Time of a step over sizes, and how far the calibrated prediction is off where it was not calibrated."""
    rows = reading.records(frame)
    heads = [Head("Size"), Head("Used for"), *(Head(n, True) for n in ("Time", "Interval", "Predicted", "Off", "MFU"))]
    cells = [
        [
            Cell(cost_plots.size_name(row)),
            Cell(_text(row["use"])),
            Cell(units.seconds(row["time_s"]), "num"),
            Cell(times(row), "num"),
            Cell(units.seconds(row["predicted_s"]), "num"),
            Cell(units.percent(row["error"]), "num"),
            Cell(units.percent(row["mfu"]), "num"),
        ]
        for row in rows
    ]
    held = frame[frame["use"] == "held out"]["error"].abs().dropna()
    note = ""
    if len(held):
        note = (
            f"Predicted from the cost model after calibration at {(frame['use'] == 'calibration').sum()} sizes: "
            f"median absolute error {units.percent(float(held.median()))} at {len(held)} sizes held out, "
            f"{units.percent(float(held.max()))} at most."
        )
    if len(frame) and frame["time_low_s"].isna().all():
        note = f"{note} Each time is {reading.without_interval()}: there were too few rounds for one.".lstrip()
    charts = []
    if frame["predicted_s"].notna().any():
        charts.append(chart(cost_plots.scaling(frame), f"{id}-scaling", f"Measured over predicted time. {note}"))
    else:
        charts.append(chart(cost_plots.throughput(frame), f"{id}-throughput", "Time of a step for every size"))
    title = "Time over sizes"
    return Section(title, note, charts, Table(title, heads, cells))


def images(frame: pd.DataFrame) -> Section | None:
    """How many images an hour each size makes, in bursts and sustained; None where nobody asked for that."""
    rows = frame.dropna(subset=["images_per_hour", "steps"])
    if rows.empty:
        return None
    heads = [Head("Size"), *(Head(n, True) for n in ("Steps", "Burst", "Step", "Sustained", "Step", "Interval"))]
    cells = [
        [
            Cell(cost_plots.size_name(row)),
            Cell(f"{int(row['steps'])}", "num"),
            Cell(units.significant(row["images_per_hour"]), "num"),
            Cell(units.seconds(row["time_s"]), "num"),
            Cell(units.significant(row["sustained_images_per_hour"]), "num"),
            Cell(units.seconds(row["sustained_s"]), "num"),
            Cell(times({"time_low_s": row["sustained_low_s"], "time_high_s": row["sustained_high_s"]}), "num"),
        ]
        for row in reading.records(rows)
    ]
    note = "Denoising steps alone, without text encoder and image decoder. Sustained: in blocks of many steps on end."
    return Section("Images an hour", note, table=Table("Images an hour", heads, cells))


def axes(frame: pd.DataFrame, id: str) -> Section:
    """What changes where one thing alone is changed: resolution, shape, batch or caption."""
    title = "One thing at a time"
    heads = [Head("Axis"), Head("Size"), Head("Beside"), Head("Verdict")]
    heads += [Head(name, True) for name in ("Tokens", "Ratio", "Interval", "Predicted")]
    rows = reading.records(frame.dropna(subset=["ratio"]))
    cells = [
        [
            Cell(_text(row["axis"])),
            Cell(cost_plots.size_name(row), "free"),
            Cell(scaling_plots.beside_name(row), "free"),
            Cell(_text(row["verdict"]), "verdict"),
            Cell(units.MISSING if units.missing(row["tokens"]) else f"{int(row['tokens'])}", "num"),
            Cell(units.ratio(row["ratio"]), "num"),
            Cell(_ends(row["ratio_low"], row["ratio_high"], units.ratio), "num"),
            Cell(units.ratio(row["predicted_ratio"]), "num"),
        ]
        for row in rows
    ]
    note = (
        "Time of a step by that of the least size that differs in this alone, round by round; of a batch, the time of "
        "an image. The intervals hold together."
    )
    alt = "Time ratios: " + "; ".join(f"{line[0].text} {line[1].text} {line[5].text}" for line in cells)
    drawn = frame["axis"].isin(["aspect", "batch", "caption"]).any() and rows
    charts = [chart(scaling_plots.axes(frame), f"{id}-axes", alt)] if drawn else []
    return Section(title, note, charts, Table(title, heads, cells), folded=bool(charts))


def crossover(frame: pd.DataFrame, id: str) -> Section:
    """From how many tokens on attention takes more time than the linear layers, by every method."""
    title = "Where attention overtakes the linear layers"
    rows = reading.records(frame[frame["note"] != "measured"])
    heads = [Head("By"), *(Head(name, True) for name in ("Tokens", "Interval", "Square image")), Head("")]
    cells = [
        [
            Cell(_text(row["method"])),
            Cell(units.MISSING if units.missing(row["tokens"]) else f"{row['tokens']:,.0f}", "num"),
            Cell(_ends(row["tokens_low"], row["tokens_high"], "{:,.0f}".format), "num"),
            Cell(units.MISSING if units.missing(row["side_px"]) else f"{row['side_px']:,.0f} px", "num"),
            Cell(_text(row["note"])),
        ]
        for row in rows
    ]
    note = (
        "Tokens of an item in a main block from which on attention takes the longer. The calibrated rates are of a "
        "whole step: beside attention stands all else that grows with the tokens. The operations are of one block, "
        "each timed alone: beside attention stand its linear layers."
    )
    if len(rows) and frame["tokens_low"].isna().all():
        note += f" Each number of tokens that was measured is {reading.without_interval()}: there were too few rounds."
    alt = "Crossings: " + "; ".join(f"{line[0].text} {line[1].text} tokens" for line in cells)
    charts = [chart(scaling_plots.crossing(frame), f"{id}-crossover", alt)] if len(frame) else []
    return Section(title, note, charts, Table(title, heads, cells))


def _ends(low: float | None, high: float | None, text: Callable[[float], str]) -> str:
    return units.MISSING if units.missing(low) or units.missing(high) else f"{text(low)} to {text(high)}"  # type: ignore[arg-type]


def power(frame: pd.DataFrame) -> Section:
    """Energy, power and clocks while steps ran."""
    heads = [Head("Arm"), Head("Scope"), *(Head(n, True) for n in ("Energy a step", "Power", "Clock", "Temperature"))]
    heads.append(Head("Throttled by"))
    cells = [
        [
            Cell(_text(row["arm"])),
            Cell(", ".join(filter(None, (_text(row["scope"]), _text(row["regime"]))))),
            Cell(_unit(row["energy_j"], "J"), "num"),
            Cell(_unit(row["power_w"], "W"), "num"),
            Cell(_unit(row["clock_hz"] / 1e9, "GHz"), "num"),
            Cell(_unit(row["temperature_c"], "\N{DEGREE SIGN}C"), "num"),
            Cell(_text(row["throttle"]) or units.MISSING, "free"),
        ]
        for row in reading.records(frame)
    ]
    return Section("Power and clocks", "", table=Table("Power and clocks", heads, cells))


def _unit(value: float | None, unit: str) -> str:
    return units.MISSING if units.missing(value) else f"{units.significant(value)} {unit}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
