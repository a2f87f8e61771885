"""What an experiment found, in plain sentences assembled from its tables.

Nothing is claimed that a table does not say: an inconclusive verdict is reported as undecided, the largest stage is
only called so when its interval lies above every other, and a missing table is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from zimage.analysis import units
from zimage.analysis.reading import arms, final_step, is_fraction, metric_name, metric_value, part_of, profile, records

Tables = Mapping[str, pd.DataFrame]
KNOWN_VERDICTS = ("faster", "slower", "equivalent", "inconclusive")
_REFERENCES = ("baseline", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Finding:
    """One line of what was found. `verdict` is one of KNOWN_VERDICTS, or "" for a plain observation."""

    text: str
    verdict: str = ""


def findings(tables: Tables) -> list[Finding]:
    """The findings of one run or of several runs with the same parameters, most telling first.

    `tables` maps table names (stages, ablation, memory, quality) to frames; missing and empty ones are left out.
    """
    lines = [*_where_time_goes(tables.get("stages")), *_arms(tables)]
    return [line for line in lines if line.text]


def sentence(found: list[Finding], device: str, weights: str | None) -> str:
    """One sentence for the terminal: `On <device>, with <kind> weights: a; b.`"""
    start = f"On {device}" + (f", with {weights} weights" if weights else "")
    if not found:
        return f"{start}: nothing was recorded that a finding could rest on."
    return f"{start}: {'; '.join(line.text for line in found)}."


def baseline_arm(tables: Tables) -> str | None:
    """The reference arm: what the ablation compares with, else the first arm with a name that says so."""
    compared = tables.get("ablation")
    if compared is not None and len(compared):
        named = compared["baseline"].dropna()
        if len(named):
            return str(named.iloc[0])
    for name in ("memory", "quality"):
        frame = tables.get(name)
        for reference in _REFERENCES:
            if reference in arms(frame):
                return reference
    return None


def verdict_of(row: Mapping[str, object]) -> str:
    """The verdict of an ablation row; a missing or unknown one, or one without a ratio, is inconclusive."""
    verdict = row.get("verdict")
    known = verdict in KNOWN_VERDICTS and not units.missing(row.get("ratio"))
    return str(verdict) if known else "inconclusive"


def time_phrase(ratio: float) -> str:
    """A time ratio in words: 0.95 -> `5.0 % less time`."""
    change = units.percent(abs(ratio - 1))
    if change == "0.0 %":
        return "the same time to 0.1 %"
    return f"{change} {'less' if ratio < 1 else 'more'} time"


def time_finding(row: Mapping[str, object]) -> Finding:
    """One row of an ablation table as a finding, its interval included."""
    arm, baseline, scope = str(row["arm"]), _text(row.get("baseline")) or "the baseline", _text(row.get("scope"))
    per = f" per {scope}" if scope else ""
    per += f" ({regime})" if (regime := _text(row.get("regime"))) == "sustained" else ""
    numbers = _numbers(row)
    verdict = verdict_of(row)
    if verdict == "equivalent":
        return Finding(f"{arm} takes the same time as {baseline}{per} within the margin ({numbers})", verdict)
    if verdict in ("faster", "slower"):
        ratio = float(row["ratio"])  # type: ignore[arg-type]
        return Finding(f"{arm} takes {time_phrase(ratio)} than {baseline}{per} ({numbers})", verdict)
    if units.missing(row.get("ratio")):
        return Finding(f"{arm} against {baseline}{per} was not measured", verdict)
    reason = _text(row.get("reason"))
    why = f": {reason}" if reason else ""
    return Finding(f"whether {arm} is faster than {baseline}{per} is undecided{why} ({numbers})", verdict)


def _where_time_goes(frame: pd.DataFrame | None) -> list[Finding]:
    if frame is None or frame.empty:
        return []
    first = frame["arm"].fillna("").iloc[0]
    rows, whole = profile(frame[frame["arm"].fillna("") == first])
    rows = rows.dropna(subset=["time_s"])
    if rows.empty or not whole:
        return []
    parts = rows["stage"].map(part_of)
    sums = {part: float(rows.loc[parts == part, "time_s"].sum()) for part in dict.fromkeys(parts)}
    top_part = max(sums, key=lambda part: sums[part])
    number = int((parts == top_part).sum())
    share = sums[top_part] / whole
    texts = []
    if number > 1:
        texts.append(f"the {number} {top_part} take {units.percent(share, 0)} of a step of {units.seconds(whole)}")
    ranked = rows.sort_values("time_s", ascending=False).reset_index(drop=True)
    top = ranked.iloc[0]
    of = f"{units.percent(float(top['time_s']) / whole)}" + ("" if texts else f" of {units.seconds(whole)}")
    if len(ranked) == 1 or _stands_out(ranked):
        texts.append(f"{top['stage']} is the largest single stage ({of})")
    elif not texts:
        texts.append(f"no single stage of a step of {units.seconds(whole)} stands out beyond its interval")
    return [Finding(", ".join(texts))]


def _stands_out(ranked: pd.DataFrame) -> bool:
    """Whether the largest stage's interval lies above all others. Without intervals nobody can tell."""
    low, others = ranked["time_low_s"].iloc[0], ranked["time_high_s"].iloc[1:]
    return bool(not units.missing(low) and others.notna().all() and low > others.max())


def _arms(tables: Tables) -> list[Finding]:
    """One finding an arm and scope; memory and quality join the finding of the widest scope."""
    baseline = baseline_arm(tables)
    timed: dict[str, list[Finding]] = {}
    compared = tables.get("ablation")
    for row in [] if compared is None else records(compared):
        timed.setdefault(str(row["arm"]), []).append(time_finding(row))
    extras = {arm: _memory(tables.get("memory"), arm, baseline) for arm in arms(tables.get("memory"))}
    for arm in arms(tables.get("quality")):
        extras.setdefault(arm, []).extend(_quality(tables.get("quality"), arm, baseline))
    lines = []
    for arm in dict.fromkeys([*timed, *extras]):
        own = timed.get(arm, [])
        more = extras.get(arm, [])
        if arm == baseline or not (own or more):
            continue
        if not own:
            lines.append(Finding(f"{arm}: {', '.join(more)}"))
            continue
        # The step comes last in a notebook that widens its scope; what was measured of the whole arm belongs there.
        lines += own[:-1]
        lines.append(Finding(", ".join([own[-1].text, *more]), own[-1].verdict))
    return lines


def _memory(frame: pd.DataFrame | None, arm: str, baseline: str | None) -> list[str]:
    if frame is None or baseline is None or arm == baseline:
        return []
    texts = []
    keys = frame[["stage", "metric"]].fillna("").agg("/".join, axis=1)
    for key in dict.fromkeys(keys):
        rows = frame[keys == key].dropna(subset=["bytes"])
        mine, theirs = (rows.loc[rows["arm"] == name, "bytes"] for name in (arm, baseline))
        if mine.empty or theirs.empty or float(theirs.iloc[0]) <= 0:
            continue
        now, then, name = float(mine.iloc[0]), float(theirs.iloc[0]), metric_name(str(rows["metric"].iloc[0]))
        change = units.percent(abs(now / then - 1), 0)
        if change == "0 %":
            texts.append(f"the same {name} ({units.size(now)})")
        else:
            less = "smaller" if now < then else "larger"
            texts.append(f"{name} {change} {less} ({units.size(now)} against {units.size(then)})")
    return texts


def _quality(frame: pd.DataFrame | None, arm: str, baseline: str | None) -> list[str]:
    if frame is None or arm == baseline:
        return []
    texts = []
    last = final_step(frame)
    for metric in dict.fromkeys(last["metric"]):
        rows = last[last["metric"] == metric].set_index("arm")
        if arm not in rows.index:
            continue
        text = f"{metric_name(metric)} {metric_value(metric, rows.loc[arm, 'value'])}"
        # The baseline's own error is zero by construction and says nothing; its accuracy does.
        if baseline in rows.index and (is_fraction(metric) or rows.loc[baseline, "value"] != 0):
            text += f" against {metric_value(metric, rows.loc[baseline, 'value'])}"
            text += _overlap(rows.loc[arm], rows.loc[baseline])
        texts.append(text)
    return texts


def _overlap(mine: "pd.Series[float]", theirs: "pd.Series[float]") -> str:
    ends = (mine["low"], mine["high"], theirs["low"], theirs["high"])
    if any(units.missing(end) for end in ends):
        return ""
    return " (intervals overlap)" if ends[0] <= ends[3] and ends[2] <= ends[1] else ""


def _numbers(row: Mapping[str, object]) -> str:
    low, high = row.get("ratio_low"), row.get("ratio_high")
    text = f"ratio {units.ratio(row['ratio'])}"  # type: ignore[arg-type]
    if units.missing(low) or units.missing(high):
        return text
    # Only a tested comparison has a p-value and with it an interval of known coverage.
    kind = "interval" if units.missing(row.get("p_value")) else "95 % interval"
    return f"{text}, {kind} {units.ratio(low)} to {units.ratio(high)}"  # type: ignore[arg-type]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
