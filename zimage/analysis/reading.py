"""How the result tables are read: which rows belong together, and what their columns are called in words.

Figures, findings and pages all read a table through these, so that they never disagree about what it says.
"""

import math
from collections.abc import Mapping
from typing import Any

from zimage.analysis import tables, units

import pandas as pd

PARTS = {  # the parts of the forward pass and how their stages' names begin
    "embedders": "",
    "noise refiner": "noise_refiner",
    "context refiner": "context_refiner",
    "main layers": "layers",
    "final layer": "final_layer",
    "other": "",
}
OVERHEAD = "profiler"  # the view of a stages table whose rows are no stages: first call, kernel build, the profiler
WHOLE = ("weights", "step", "process", "system", "device")  # what a memory table may speak of besides stages
DRIFT = "drift_relative_l2"  # the metric whose every step is drawn
# Metrics that say in other words what a headline says, or that say how sure it is: in the full table only.
SUPPLEMENTARY = (
    *("cosine_similarity", "snr_db", "drift_cosine", "drift_snr_db", "frechet_difference", "repeat_difference"),
    "error_budget",
)
_NAMES = {
    "predicted_peak_bytes": "predicted peak",
    "resident_bytes": "process memory",
    "relative_l2_error": "relative L2 error",
    "snr_db": "SNR (dB)",
    "drift_relative_l2": "drift (relative L2)",
    "drift_cosine": "cosine of drifted latents",
    "drift_snr_db": "SNR of drifted latents (dB)",
    "frechet_distance": "Fr\u00e9chet distance",
    "frechet_difference": "Fr\u00e9chet distance beyond it",
    "skipped_blocks_fraction": "blocks skipped",
    "repeat_difference": "difference when computed again",
    "weight_bytes": "weights",
    "peak_bytes": "peak memory",
    "active_bytes": "active memory",
    "cache_bytes": "buffer cache",
    "process_bytes": "process memory",
    "allocated_bytes": "with buffers kept for reuse",
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def arms(frame: pd.DataFrame | None) -> list[str]:
    """The arms of a table in the order they appear."""
    return [] if frame is None else [str(arm) for arm in dict.fromkeys(frame["arm"].dropna())]


def loads(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a loader of a `loading` table: medians over its rounds, and its fastest and slowest one."""
    kept = frame.dropna(subset=["arm", "time_s"])
    return kept.groupby("arm", sort=False, as_index=False).agg(
        rounds=("time_s", "size"),
        time_s=("time_s", "median"),
        time_low_s=("time_s", "min"),
        time_high_s=("time_s", "max"),
        result_bytes=("result_bytes", "median"),
        peak_bytes=("peak_bytes", "median"),
    )


def metric_name(metric: str) -> str:
    """A metric's column value in words: `digit_accuracy` -> `digit accuracy`."""
    return _NAMES.get(metric, metric.replace("_", " "))


def is_fraction(metric: str) -> bool:
    """Whether a quality metric is a share that people read as a percentage."""
    return metric.endswith(("accuracy", "fraction"))


def metric_value(metric: str, value: float | None) -> str:
    """A quality metric's value as text: a percentage for accuracies, three digits for the rest."""
    if value == math.inf:
        return "\N{INFINITY}"
    return units.percent(value) if is_fraction(metric) else units.significant(value)


def metric_text(row: Mapping[str, Any]) -> str:
    """A row of a quality table as text: its value, and its interval where it has one."""
    low, high = (metric_value(row["metric"], row[end]) for end in ("low", "high"))
    text = metric_value(row["metric"], row["value"])
    return text if units.MISSING in (low, high) else f"{text} ({low} to {high})"


def quality_by_arm(quality: pd.DataFrame) -> pd.DataFrame:
    """The headlines of a quality table as texts: a row an arm, a column a metric in words."""
    texts: dict[str, dict[str, str]] = {arm: {} for arm in arms(quality)}
    for row in records(headline(quality)):
        texts[row["arm"]][metric_name(row["metric"])] = metric_text(row)
    return pd.DataFrame.from_dict(texts, orient="index").fillna(units.MISSING)


def pictures_by_arm(quality: pd.DataFrame) -> dict[str, str]:
    """For every arm whose pictures were held against a baseline's, whether they are known to differ from them.

    By the interval of `frechet_difference`, of a `quality` table.
    """
    rows = records(quality[quality["metric"] == "frechet_difference"])
    return {
        str(row["arm"]): f"other than {row['baseline']}'s"
        if row["low"] > 0 or row["high"] < 0
        else f"no difference to {row['baseline']}'s found in {row['count']:.0f}"
        for row in rows
    }


def rounds(samples: pd.DataFrame | None) -> int | None:
    """In how many rounds everything was timed, as a `samples` table has it; None where it does not tell."""
    if samples is None:
        return None
    rows = tables.complete("samples", samples)
    counts = rows[(rows["kind"] == "sample") & (rows["regime"] == "burst")].groupby(["arm", "scope"]).size()
    return int(counts.min()) if len(counts) else None


def without_interval(rounds: int | None = None) -> str:
    """What is said beside a number that has no interval, and of how many rounds it is where that is known."""
    return "an estimate without an interval" + (f" ({rounds} round{'s' * (rounds > 1)})" if rounds else "")


def part_of(stage: object) -> str:
    """The part of the forward pass that a stage belongs to, one of PARTS; `other` where the stage has no name."""
    head = stage.split(".", maxsplit=1)[0] if isinstance(stage, str) else ""
    if head.endswith("embedder"):
        return "embedders"
    return next((part for part, start in PARTS.items() if start == head), "other")


def profile(frame: pd.DataFrame) -> tuple[pd.DataFrame, float | None]:
    """The rows of a stages table that hold single stages, in forward order, and the whole step's time in seconds.

    Views are never mixed: where several are recorded it is the prefix view, else the first one. Without a row of view
    `whole` the time is None.
    """
    whole = frame[frame["view"] == "whole"]
    rest = frame[~frame["view"].isin(["whole", OVERHEAD])]
    views = list(dict.fromkeys(rest["view"].dropna()))
    view = "prefix" if "prefix" in views or not views else views[0]
    times = whole["time_s"].dropna()
    return rest[rest["view"] == view].reset_index(drop=True), float(times.iloc[0]) if len(times) else None


def final_step(quality: pd.DataFrame) -> pd.DataFrame:
    """The last recorded step of every arm and metric, and of each baseline it is against, in the table's order."""
    kept = tables.complete("quality", quality).dropna(subset=["value"])
    order = kept["step"].astype("Float64").fillna(-1.0)
    by = ["arm", "metric", "baseline"]
    last = order.groupby([kept[name] for name in by], sort=False, dropna=False).transform("max")
    return kept[order == last].drop_duplicates(by, keep="last").reset_index(drop=True)


def headline(quality: pd.DataFrame) -> pd.DataFrame:
    """Of `final_step` what an arm is judged by: no SUPPLEMENTARY metric, and each against one baseline, its first."""
    rows = final_step(quality)
    rows = rows[~rows["metric"].isin(SUPPLEMENTARY)]
    first = rows.groupby("metric", sort=False)["baseline"].transform("first")
    return rows[rows["baseline"].fillna("") == first.fillna("")].reset_index(drop=True)


def ablation_labels(frame: pd.DataFrame) -> list[str]:
    """One label a row: the arm, and what else is needed to tell the rows apart: scope, regime, case."""
    parts = ["arm"] + [c for c in ("scope", "regime", "case") if c in frame and frame[c].nunique() > 1]
    rows = records(frame[parts].fillna("").astype(str))
    return _distinct([" · ".join(value for value in row.values() if value) for row in rows])


def by_stage(memory: pd.DataFrame) -> pd.DataFrame:
    """The rows of a memory table that are of single stages of the model, in forward order."""
    return memory[~memory["stage"].isin(WHOLE) & memory["stage"].notna()].reset_index(drop=True)


def memory_groups(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A memory table cut into what can be compared: per metric, and per stage too where there are several arms."""
    by = ["metric"] if frame["arm"].nunique() <= 1 else ["metric", "stage"]
    cut = [(group.iloc[0], group) for _, group in frame.fillna({"stage": ""}).groupby(by, sort=False)]
    metrics = [first["metric"] for first, _ in cut]
    return [
        (metric_name(first["metric"]) + (f", {first['stage']}" if metrics.count(first["metric"]) > 1 else ""), group)
        for first, group in cut
    ]


def best_scope(frame: pd.DataFrame) -> str:
    """The widest scope in an `ablation` table: `step` where it was measured, else the last one."""
    scopes = list(dict.fromkeys(frame["scope"].dropna()))
    return "step" if "step" in scopes or not scopes else str(scopes[-1])


def _distinct(labels: list[str]) -> list[str]:
    """Labels made unique, so that two rows of the same name keep two places on the axis."""
    seen: dict[str, int] = {}
    result = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        result.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return result
