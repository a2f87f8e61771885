"""What a step, sizes, a power meter and loaders were found to cost, in words, where no arms are compared."""

from zimage.analysis import units
from zimage.analysis.cost import UNATTRIBUTED
from zimage.analysis.reading import loads, part_of, profile, records, without_interval
from zimage.measure.loading import PLAIN_READ

import pandas as pd

Text = tuple[str, tuple[str, ...], str]  # a statement, the numbers behind it, and all of it in short or ""


def stages(frame: pd.DataFrame | None) -> list[Text]:
    """Which stages take the most of a step, and what a block takes."""
    if frame is None or frame.empty:
        return []
    first = frame["arm"].fillna("").iloc[0]
    rows, whole = profile(frame[frame["arm"].fillna("") == first])
    rows = rows.dropna(subset=["time_s"])
    if rows.empty or not whole:
        return []
    parts = rows["stage"].map(part_of)
    sums = {part: float(rows.loc[parts == part, "time_s"].sum()) for part in dict.fromkeys(parts)}
    top = max(sums, key=lambda part: sums[part])
    number = int((parts == top).sum())
    texts = []
    if number > 1:
        texts.append(f"the {number} {top} take {units.percent(sums[top] / whole, 0)} of a step")
    ranked = rows.sort_values("time_s", ascending=False).reset_index(drop=True)
    if len(ranked) == 1 or _stands_out(ranked):
        share = units.percent(float(ranked["time_s"].iloc[0]) / whole, 0)
        name = ranked["stage"].iloc[0]
        texts.append(f"{name} alone takes {share}" if texts else f"{name} takes the most of a step, {share}")
    elif not texts:
        texts.append("no single stage stands out beyond its interval")
    text = " and ".join(texts)
    step = f"a step takes {units.seconds(whole)}"
    if rows["time_low_s"].isna().all():
        text += f", {without_interval()}"
    return [(text, (step, *_by_depth(frame)), f"{text} ({step})")]


def _by_depth(frame: pd.DataFrame) -> list[str]:
    """One block as the depth view has it, which is far more certain than any single difference of prefixes."""
    rows = records(frame[(frame["view"] == "depth") & (frame["stage"] == "one block")].dropna(subset=["time_s"]))
    texts = []
    for row in rows[:1]:
        if not row["time_s"] > 0:
            texts.append("the noise hid what one main block takes by the depth view")
            continue
        text = f"one main block takes {units.seconds(row['time_s'])} by the depth view"
        if not (units.missing(row["time_low_s"]) or units.missing(row["time_high_s"])):
            text += f" ({units.seconds(row['time_low_s'])} to {units.seconds(row['time_high_s'])})"
        texts.append(text)
    return texts


def _stands_out(ranked: pd.DataFrame) -> bool:
    """Whether the largest stage's interval lies above all others. Without intervals nobody can tell."""
    low, others = ranked["time_low_s"].iloc[0], ranked["time_high_s"].iloc[1:]
    return bool(not units.missing(low) and others.notna().all() and low > others.max())


def block_alone(stage: str, time_s: float, unattributed_s: float) -> str:
    """What a block that was taken apart takes alone, and how much of that its operations do not explain.

    A slope that came out at 0 or below is no time: then it says that the noise hid it.
    """
    if not time_s > 0:
        return f"{stage}: the noise hid its time alone; take more rounds or a larger size"
    return f"{stage}: {time_s * 1e3:.3f} ms alone, {unattributed_s * 1e3:.3f} unattributed"


def operations(frame: pd.DataFrame | None) -> list[Text]:
    """Of the costliest block that was taken apart: what takes the most, how near the roof, and what is unattributed."""
    if frame is None:
        return []
    timed = frame.dropna(subset=["time_s", "stage"])
    # Without a rest they are no parts of a whole: ways to compute one product, of which a step takes one.
    timed = timed[timed["stage"].isin(timed.loc[timed["operation"] == UNATTRIBUTED, "stage"])]
    wholes = timed.groupby("stage", sort=False)["time_s"].sum()
    if wholes.empty or not wholes.max() > 0:
        return []
    stage, whole = wholes.idxmax(), float(wholes.max())
    group = timed[timed["stage"] == stage]
    rest = group.loc[group["operation"] == UNATTRIBUTED, "time_s"]
    rows = group[group["operation"] != UNATTRIBUTED].sort_values("time_s", ascending=False)
    if rows.empty:
        return []
    kinds = rows.groupby(rows["bound"].fillna(""), sort=False)["time_s"].sum()
    name, time_s, attained = rows[["operation", "time_s", "attained_fraction"]].iloc[0]
    text = f"{name} takes the most of {stage}, {units.percent(time_s / whole, 0)} of its time"
    if not units.missing(attained):
        text += f", at {units.percent(attained, 0)} of the roof"
    memory = units.percent(float(kinds.get("memory", 0.0)) / whole, 0)
    numbers = [f"{memory} in operations bound by memory"] if len(kinds) > 1 else []
    numbers += [f"{units.percent(float(t) / whole, 0)} unattributed" for t in rest[:1]]
    if "time_low_s" in rows and rows["time_low_s"].isna().all():
        text += f", {without_interval()}"
    return [(text, tuple(numbers), "")]


def scaling(frame: pd.DataFrame | None, rounds: int | None = None) -> list[Text]:
    """How far the calibrated cost model is off where it was not calibrated; rounds: in which all sizes were timed."""
    if frame is None or frame.empty:
        return []
    held = frame[frame["use"] == "held out"]["error"].abs().dropna()
    if held.empty:
        return []
    sizes = int((frame["use"] == "calibration").sum())
    off = units.percent(float(held.median()))
    text = f"calibrated at {sizes} sizes, the cost model is {off} off in the median of others"
    if frame["time_low_s"].isna().all():
        text += f", {without_interval(rounds)}"
    numbers = (
        f"{len(held)} size{'' if len(held) == 1 else 's'} held out, at most {units.percent(float(held.max()))} off"
    )
    return [(text, (numbers,), f"{text} ({numbers})")]


def power(frame: pd.DataFrame | None) -> list[Text]:
    """What a step costs in energy, where the device tells."""
    if frame is None or frame.empty:
        return []
    found = []
    for row in records(frame.dropna(subset=["energy_j"])):
        text = f"{row['arm']}: {units.significant(row['energy_j'])} J a step"
        power = "" if units.missing(row["power_w"]) else f"{units.significant(row['power_w'])} W on average"
        reasons = row["throttle"] if isinstance(row["throttle"], str) else ""
        throttle = f"throttled by {reasons}" if reasons not in ("", "none", "unknown") else ""
        found.append((text, tuple(filter(None, (power, throttle))), ""))
    return found


def loading(frame: pd.DataFrame | None) -> list[Text]:
    """A statement a loader: its time beside a plain read's, and its memory beside what it gives.

    What gives less than it reads, because it packs, has its memory compared with the files instead.
    """
    if frame is None or frame.empty:
        return []
    rows = {str(row["arm"]): row for row in records(loads(frame))}
    plain = rows.pop(PLAIN_READ, None)
    found = []
    for arm, row in rows.items():
        spread = f"{units.seconds(row['time_low_s'])} to {units.seconds(row['time_high_s'])}"
        numbers = [units.seconds(row["time_s"]) + (f" (of {row['rounds']}: {spread})" if row["rounds"] > 1 else "")]
        if plain is None:
            text = f"{arm} loads in {units.seconds(row['time_s'])}"
        else:
            text = f"{arm} loads in {units.significant(row['time_s'] / plain['time_s'])} times a plain read's time"
            numbers[0] += f" against {units.seconds(plain['time_s'])}"
        peak, result = row["peak_bytes"], row["result_bytes"]
        if not (units.missing(peak) or units.missing(result)):
            packs = plain is not None and result < 0.9 * plain["result_bytes"]
            whole, name = (plain["result_bytes"], "files") if plain is not None and packs else (result, "result")
            text += f", with a peak memory of {units.significant(peak / whole)} times the {name}"
            numbers.append(f"peak {units.size(peak)}, {name} {units.size(whole)}")
        found.append((text, tuple(numbers), f"{text} ({'; '.join(numbers)})"))
    return found
