"""What tables of the notebook scaling say beside how far predictions are off: a sentence and its numbers each."""

from collections.abc import Mapping
from typing import Any

from zimage.analysis import tables, units
from zimage.analysis.crossover import FLOPS, OPERATIONS, RATES
from zimage.analysis.reading import records, rounds, without_interval

import pandas as pd

Said = tuple[str, tuple[str, ...]]


def said(found: Mapping[str, pd.DataFrame]) -> list[Said]:
    """All sentences that the tables of a run give, in the order in which they are told."""
    times = rounds(found.get("samples"))
    return [
        *crossing(found.get("crossover"), times),
        *axes(found.get("axes")),
        *throughput(found.get("scaling"), times),
    ]


def crossing(frame: pd.DataFrame | None, times: int | None = None) -> list[Said]:
    """From how many tokens on attention takes more time than the linear layers, by each method.

    times: rounds in which all was timed, said where there is no interval.
    """
    if frame is None or frame.empty:
        return []
    frame = tables.complete("crossover", frame)
    rows = {str(row["method"]): row for row in records(frame[frame["note"] != "measured"])}
    by_times = rows.get(OPERATIONS) or rows.get(RATES)
    if by_times is None:
        return []
    if by_times["note"] == "never":
        text = "attention takes less time than the linear layers however many tokens there are"
    elif units.missing(by_times["tokens"]) and (least := _least_above(frame)) is not None:
        text = f"attention takes more time than the linear layers at all sizes measured, from {least:,.0f} tokens on"
    elif units.missing(by_times["tokens"]):
        text = "from how many tokens on attention takes more time than the linear layers is undecided"
    else:
        text = f"attention takes more time than the linear layers of a block from {_tokens(by_times)} on"
    if "undecided" not in text and units.missing(by_times["tokens_low"]):
        text += f", {without_interval(times)}"
    evidence = [] if units.missing(by_times["side_px"]) else [f"a square of {by_times['side_px']:.0f} px"]
    if by_times["note"] == "extrapolated":
        evidence.append("extrapolated beyond the sizes that were measured")
    other, flops = (rows.get(method, {"tokens": None}) for method in (RATES, FLOPS))
    if by_times is not other and not units.missing(other["tokens"]):
        told = f"from {_tokens(other)} on beside all else of a step, by the calibrated rates"
        evidence.append(told + (f", {without_interval(times)}" if units.missing(other["tokens_low"]) else ""))
    if not units.missing(flops["tokens"]):
        evidence.append(f"by FLOPs alone from {_tokens(flops)} on")
    return [(text, tuple(evidence))]


def _least_above(frame: pd.DataFrame) -> float | None:
    """The least tokens at which a block was timed, where attention took longer at all; else None."""
    timed = frame[frame["note"] == "measured"]
    return float(timed["tokens"].min()) if len(timed) and (timed["attention_s"] > timed["linear_s"]).all() else None


def _tokens(row: Mapping[str, Any]) -> str:
    low, high = row.get("tokens_low"), row.get("tokens_high")
    text = f"{row['tokens']:,.0f} tokens"
    return text if units.missing(low) or units.missing(high) else f"{text} ({low:,.0f} to {high:,.0f})"


def axes(frame: pd.DataFrame | None) -> list[Said]:
    """Whether the shape matters, and what the largest batch and the longest caption cost, of an `axes` table."""
    if frame is None or frame.empty:
        return []
    frame = tables.complete("axes", frame).dropna(subset=["ratio"])
    found: list[Said] = []
    shapes = frame[frame["axis"] == "aspect"]
    if len(shapes):
        told = {"equivalent": 0, "not": 0, "undecided": 0}
        for row in records(shapes):
            told[{"equivalent": "equivalent", "inconclusive": "undecided"}.get(_verdict(row), "not")] += 1
        beside = "beside a squarer one of as many tokens"
        alike, others, unknown = told.values()
        text = f"of {len(shapes)} shapes {beside} {alike} take{'s' * (alike == 1)} the same time to 1 %, "
        text += f"{others} {'does' if others == 1 else 'do'} not"
        text += f", {unknown} undecided" * bool(unknown)
        if unknown == len(shapes):
            text = f"whether {unknown} other shapes take as long as a squarer one of as many tokens is undecided"
        if len(shapes) == 1:
            text = {
                alike: f"another shape {beside} takes the same time to 1 %",
                others: f"another shape {beside} takes other time",
                unknown: f"whether another shape {beside} takes as long is undecided",
            }[1]
        found.append((text, tuple(map(_change, records(shapes)))))
    for axis, words, beside in (
        ("batch", "an image in a batch of {}", "in one of {}"),
        ("caption", "a step with {} caption tokens", "one with {}"),
    ):
        column = "batch" if axis == "batch" else "caption_tokens"
        rows = frame[(frame["axis"] == axis) & frame[column].notna() & frame[f"beside_{column}"].notna()]
        if rows.empty:
            continue
        row = records(rows.sort_values(column))[-1]
        what, other = words.format(int(row[column])), beside.format(int(row[f"beside_{column}"]))
        change = f"{units.percent(abs(row['ratio'] - 1))} {'less' if row['ratio'] < 1 else 'more'} time"
        text = {
            "equivalent": f"{what} takes the same time to 1 % as {other}",
            "inconclusive": f"whether {what} takes as long as {other} is undecided",
        }.get(_verdict(row), f"{what} takes {change} than {other}")
        found.append((text, (_change(row), f"predicted {units.ratio(row['predicted_ratio'])}")))
    return found


def _many(value: float) -> str:
    """A number of images, thousands apart."""
    return f"{value:,.0f}" if value >= 1000 else units.significant(value)


def _verdict(row: Mapping[str, Any]) -> str:
    """Its verdict, inconclusive where it is missing."""
    return row["verdict"] if row["verdict"] in ("faster", "slower", "equivalent") else "inconclusive"


def _change(row: Mapping[str, Any]) -> str:
    sides = " x ".join("?" if units.missing(row[name]) else f"{int(row[name])}" for name in ("height", "width"))
    low, high = row["ratio_low"], row["ratio_high"]
    between = "" if units.missing(low) or units.missing(high) else f" ({units.ratio(low)} to {units.ratio(high)})"
    return f"{sides} px: ratio {units.ratio(row['ratio'])}{between}"


def throughput(frame: pd.DataFrame | None, times: int | None = None) -> list[Said]:
    """Images an hour at the size with a sustained time and the most pixels, else the size with the most of all.

    Each with the interval that the step's time gives it; times: rounds, said where it has none.
    """
    if frame is None or frame.empty:
        return []
    rows = tables.complete("scaling", frame).dropna(subset=["images_per_hour", "height", "width", "steps"])
    held = rows.dropna(subset=["sustained_images_per_hour"])
    found: list[Said] = []
    for row in records(held if len(held) else rows.nlargest(1, "images_per_hour"))[:3]:
        size = f"{int(row['height'])} x {int(row['width'])} px"
        size += "" if units.missing(row["batch"]) else f", batch {int(row['batch'])}"
        text = f"{_many(row['images_per_hour'])} images an hour{_hourly(row, '')} of {size}, {int(row['steps'])} steps "
        text += "each, in bursts"
        if not units.missing(row["sustained_images_per_hour"]):
            text += f", {_many(row['sustained_images_per_hour'])}{_hourly(row, 'sustained_')} sustained"
        if units.missing(row["time_low_s"]):
            text += f"; that of bursts is {without_interval(times)}"
        found.append((text, ("denoising alone, without text encoder and image decoder",)))
    return found


def _hourly(row: Mapping[str, Any], kind: str) -> str:
    """The interval of images an hour that follows from that of the step's time, in brackets; "" where it has none.

    kind: "sustained_", or "" for bursts.
    """
    prefix = kind or "time_"
    time, low, high = row[f"{kind}s" if kind else "time_s"], row[f"{prefix}low_s"], row[f"{prefix}high_s"]
    if any(units.missing(value) for value in (time, low, high)) or not low > 0:
        return ""
    fewest, most = (row[f"{kind}images_per_hour"] * time / end for end in (high, low))
    return f" ({_many(fewest)} to {_many(most)})"
