"""What the tables of the notebook memory say, in words and compact tables: predictions, peaks, arms and orders."""

from collections.abc import Mapping
from typing import Any

from zimage.analysis import reading, tables, units

import pandas as pd

PLAIN, PLAIN_ORDER = "plain", "load, step"  # the arm and the order that others are beside
SHOWN_PX = 1024
_SHAPES = {"synthetic:turbo": "the published shape"}  # of which a prediction takes nothing but its shape
_ORDERED = ("peak_bytes", "allocated_bytes")
_REACHED = 0.99  # of the peak, above which a stage is as much of one


def predicted(footprint: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `footprint` table of which nothing was measured."""
    frame = tables.complete("footprint", footprint)
    return frame[frame["measured_bytes"].isna()].reset_index(drop=True)


def measured(footprint: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `footprint` table whose step was run."""
    frame = tables.complete("footprint", footprint)
    return frame[frame["measured_bytes"].notna()].reset_index(drop=True)


def predicted_and_measured(footprint: pd.DataFrame) -> pd.DataFrame:
    """Predictions beside what was measured, as texts: a row a precision and size."""
    rows = [
        {
            "precision": row["arm"],
            "size": size_name(row),
            "weights": units.size(row["weight_bytes"]),
            "predicted": units.size(row["predicted_bytes"]),
            "measured": units.size(row["measured_bytes"]),
            "off": units.percent(row["error"]),
        }
        for row in reading.records(measured(footprint))
    ]
    return pd.DataFrame(rows, columns=["precision", "size", "weights", "predicted", "measured", "off"])


def size_name(row: Mapping[str, Any]) -> str:
    """A size in words: `1024 x 768 px`, and the batch where it is more than one image."""
    batch = "" if row["batch"] == 1 else f", batch {int(row['batch'])}"
    return f"{int(row['height'])} x {int(row['width'])} px{batch}"


def shape_name(model: str) -> str:
    """What a prediction is of, in words: a model's shape, whose weights it does not depend on."""
    return _SHAPES.get(model, model)


def what_peaks(memory: pd.DataFrame) -> str:
    """In which stage of the step the most was held, in a sentence; "" where no stages were recorded."""
    stages = reading.by_stage(memory)
    peaks = stages[stages["metric"] == "peak_bytes"].dropna(subset=["bytes"]).reset_index(drop=True)
    if peaks.empty:
        return ""
    most, rows = float(peaks["bytes"].max()), reading.records(peaks)
    place = next(i for i, row in enumerate(rows) if row["bytes"] >= _REACHED * most)
    text = f"the most of a step is held from {rows[place]['stage']} on, {units.size(most)}"
    if place:
        text += f" ({units.size(rows[place - 1]['bytes'])} before it)"
    return text


def orders(memory: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `memory` table that say what orders hold at most."""
    return memory[(memory["stage"] == "process") & memory["metric"].isin(_ORDERED)].reset_index(drop=True)


def arms(memory: pd.DataFrame) -> pd.DataFrame:
    """By arm, the bytes of its weights and the most that its step holds: columns weight_bytes and peak_bytes."""
    rows = memory[memory["stage"].isin(["weights", "step"])].dropna(subset=["bytes"])
    wide = rows.pivot_table(index="arm", columns="metric", values="bytes", sort=False)
    return wide.reindex(columns=["weight_bytes", "peak_bytes"])


def verdicts(memory: pd.DataFrame, ablation: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """A row an arm, then a row an order: the most it holds, that beside plain, its time, and its output."""
    times = {str(row["arm"]): row for row in reading.records(ablation)}
    same = outputs(quality)
    held, ordered = peaks_of_arms(memory), peaks_of_orders(memory)
    rows = {}
    for name, peak in held.items():
        rows[name] = {
            "holds at most": units.size(peak),
            "of plain": share(peak, held.get(PLAIN)),
            "time": _time(times[name]) if name in times else "",
            "output": same.get(name, ""),
        }
    for name, peak in ordered.items():
        beside = share(peak, ordered.get(PLAIN_ORDER))
        rows[f"order: {name}"] = {"holds at most": units.size(peak), "of plain": beside, "time": "", "output": ""}
    return pd.DataFrame.from_dict(rows, orient="index")


def peaks_of_arms(memory: pd.DataFrame) -> dict[str, float]:
    """The most that each arm's step holds."""
    return {str(name): float(value) for name, value in arms(memory)["peak_bytes"].dropna().items()}


def peaks_of_orders(memory: pd.DataFrame) -> dict[str, float]:
    """The most that each order holds, without kept buffers."""
    rows = orders(memory)
    return {str(row["arm"]): float(row["bytes"]) for row in reading.records(rows[rows["metric"] == "peak_bytes"])}


def share(value: float, whole: float | None) -> str:
    """One number of bytes as a share of another, in words."""
    return units.percent(value / whole, 0) if whole else units.MISSING


def _time(row: Mapping[str, Any]) -> str:
    return f"{row['verdict']}, ratio {units.ratio(row['ratio'])}"


def outputs(quality: pd.DataFrame) -> dict[str, str]:
    """By arm, how far its output is from that of the model in memory, in words."""
    return {str(row["arm"]): _output(row) for row in reading.records(tables.complete("quality", quality))}


def _output(row: Mapping[str, Any]) -> str:
    beside = row["baseline"] if isinstance(row["baseline"], str) else PLAIN
    if row["value"] == 0:
        return f"{beside}'s bit for bit"
    return f"{units.significant(row['value'])} off {beside}'s (relative L2)"


def statements(found: Mapping[str, pd.DataFrame]) -> list[tuple[str, tuple[str, ...]]]:
    """What the tables say of memory, each a statement and its numbers; none without a `footprint` table."""
    footprint, memory = found.get("footprint"), found.get("memory")
    if footprint is None or footprint.empty:
        return []
    texts = [*_needs(predicted(footprint)), *_errors(measured(footprint))]
    if memory is not None and len(memory):
        text = what_peaks(memory)
        texts += [(text, ())] if text else []
        texts += [*_least(memory, found.get("ablation")), *_orders(memory)]
    return texts


def _needs(rows: pd.DataFrame) -> list[tuple[str, tuple[str, ...]]]:
    """What the widest and the narrowest precision need of a size that people ask about."""
    if rows.empty:
        return []
    near = min(reading.records(rows), key=lambda row: abs(row["height"] - SHOWN_PX))
    same = reading.records(rows[(rows["height"] == near["height"]) & (rows["width"] == near["width"])])
    most, least = (end(same, key=lambda row: row["predicted_bytes"]) for end in (max, min))
    where = f"a step of {shape_name(str(most['model']))} at {size_name(most)} is predicted to need"
    text = f"{where} {units.size(most['predicted_bytes'])} in {most['arm']}"
    if least["arm"] != most["arm"]:
        text += f" and {units.size(least['predicted_bytes'])} in {least['arm']}"
    text += f" on {most['kind']}, handed over at once"
    return [(text, ("predicted before anything is allocated; zimage.fast holds less",))]


def _errors(rows: pd.DataFrame) -> list[tuple[str, tuple[str, ...]]]:
    off = rows["error"].dropna()
    if off.empty:
        return []
    text = f"predicted peaks are {units.percent(float(off.abs().median()))} off in the median of {len(off)} measured"
    return [(text, (f"from {_signed(float(off.min()))} to {_signed(float(off.max()))}",))]


def _signed(fraction: float) -> str:
    return f"{units.percent(abs(fraction))} {'below' if fraction < 0 else 'above'}"


def _least(memory: pd.DataFrame, ablation: pd.DataFrame | None) -> list[tuple[str, tuple[str, ...]]]:
    """The arm whose step holds least beside the plain one's, and its time; or that none holds less than plain."""
    peaks = peaks_of_arms(memory)
    plain = peaks.pop(PLAIN, None)
    if plain is None or not peaks:
        return []
    name = min(peaks, key=lambda arm: peaks[arm])
    numbers = [f"{units.size(peaks[name])} against {units.size(plain)}"]
    if ablation is not None:
        timed = reading.records(ablation[ablation["arm"] == name].dropna(subset=["ratio"]))
        numbers += [f"{units.ratio(row['ratio'])} times its time, {row['verdict']}" for row in timed[:1]]
    beside = f"{share(peaks[name], plain)} of what plain does"
    text = f"of the arms {name} holds the least in a step, {beside}"
    if peaks[name] >= plain:
        text = f"no arm holds less in a step than plain; {name}, the next, holds {beside}"
    return [(text, tuple(numbers))]


def _orders(memory: pd.DataFrame) -> list[tuple[str, tuple[str, ...]]]:
    """What the hungriest order holds beside that which only loads and steps."""
    peaks = peaks_of_orders(memory)
    worst = max(peaks, key=lambda order: peaks[order], default=PLAIN_ORDER)
    if PLAIN_ORDER not in peaks or worst == PLAIN_ORDER:
        return []
    times = units.significant(peaks[worst] / peaks[PLAIN_ORDER])
    numbers = (f"{units.size(peaks[worst])} against {units.size(peaks[PLAIN_ORDER])}",)
    return [(f"of the orders '{worst}' holds the most, {times} times '{PLAIN_ORDER}'", numbers)]
