"""What the small decisions of `practices` were found to do, in a few sentences for all of them."""

from collections.abc import Mapping
from typing import Any

from zimage import practices
from zimage.analysis import units
from zimage.analysis.reading import DRIFT, final_step, is_fraction, metric_name, metric_value, records

import pandas as pd

Text = tuple[str, tuple[str, ...]]  # a statement, and what stands behind it
ERROR = "relative_l2_error"
_ALSO_ELSEWHERE = ("compile_blocks", "submit_early")  # other notebooks have these as well
_WORDS = {"faster": "less time", "slower": "more time", "equivalent": "equivalent", "inconclusive": "undecided"}
_KINDS = {
    "details that change the output": practices.OUTPUT,
    "details that leave the output as it is": practices.EXECUTION | practices.SETTINGS,
}
_JUDGED = {ERROR: "velocity", DRIFT: "end of run", "digit_accuracy": metric_name("digit_accuracy")}


def is_of_details(ablation: pd.DataFrame | None) -> bool:
    """Whether an ablation is one of small decisions, as the notebook details makes it."""
    return ablation is not None and bool({*practices.ALL} - {*_ALSO_ELSEWHERE} & {*ablation["arm"]})


def texts(tables: Mapping[str, pd.DataFrame]) -> list[Text]:
    """A sentence about the time of those that change the output, of those that do not, and about that change itself.

    None for tables of something else. What is undecided is said to be, and what was left out.
    """
    ablation = tables.get("ablation")
    if ablation is None or not is_of_details(ablation):
        return []
    found = []
    rows = {str(row["arm"]): row for row in records(ablation)}
    for kind, names in _KINDS.items():
        timed = {name: rows[name] for name in names if name in rows and not units.missing(rows[name]["ratio"])}
        if timed:
            found.append(_times(kind, timed))
    if (changed := _changes(tables.get("quality"), rows)) is not None:
        found.append(changed)
    variables = {name: row for name, row in rows.items() if name.startswith("MLX_")}
    if variables:
        found.append(_times("variables of MLX", variables))
    left = [name for name, row in rows.items() if name in practices.ALL and units.missing(row["ratio"])]
    if left:
        text = f"left out here: {', '.join(left)}"
        found.append((text, tuple(f"{name}: {rows[name]['reason']}".replace(": left out:", ":") for name in left)))
    return found


def summary(ablation: pd.DataFrame, quality: pd.DataFrame | None) -> pd.DataFrame:
    """All there is to say of each detail, as texts: a row each, indexed by its name, in the ablation's order.

    What it is, who does it, the verdict on its time, the ratio with its interval, the change of the velocity and of the
    end of a run beside the plain model, accuracy where pictures were judged, and why it was not measured. A column that
    nothing is in is not there.
    """
    found: dict[str, dict[str, str]] = {}
    for row in records(ablation):
        name, known = str(row["arm"]), practices.ALL.get(str(row["arm"]), practices.Practice("", ""))
        measured = not units.missing(row["ratio"])
        found[name] = {
            "what it is": known.what,
            "who does it": known.who,
            "time": str(row["verdict"]) if measured else "",
            "ratio": _ratio(row) if measured else "",
            **dict.fromkeys(_JUDGED.values(), ""),
            "not measured": "" if measured else str(row["reason"]),
        }
    for row in records(final_step(quality)) if quality is not None else []:
        metric, name = str(row["metric"]), str(row["arm"])
        if name in found and metric in _JUDGED and (is_fraction(metric) or row["baseline"] == "plain"):
            found[name][_JUDGED[metric]] = metric_value(metric, row["value"])
    table = pd.DataFrame.from_dict(found, orient="index")
    return table.loc[:, (table != "").any()]


def _times(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> Text:
    if all(units.missing(row["ratio_high"]) for row in rows.values()):
        return f"{kind}, {len(rows)} timed: nothing could be decided, as none has an interval", ()
    ways = {verdict: [name for name, row in rows.items() if row["verdict"] == verdict] for verdict in _WORDS}
    text = f"{kind}, {len(rows)} timed: {_known(ways['slower'])} known to take more time"
    for verdict, pick in (("slower", max), ("faster", min)):
        if ways[verdict]:
            most = pick(ways[verdict], key=lambda name: float(rows[name]["ratio"]))
            change = units.percent(abs(float(rows[most]["ratio"]) - 1))
            at_most = f"{most} the most, {change}"
            text += f" ({at_most})" if verdict == "slower" else f" and {len(ways[verdict])} less ({at_most})"
    return text, tuple(f"{_WORDS[verdict]}: {', '.join(names)}" for verdict, names in ways.items() if names)


def _changes(quality: pd.DataFrame | None, rows: Mapping[str, Any]) -> Text | None:
    """What each does to the velocity, beside the same model without it."""
    if quality is None or quality.empty:
        return None
    beside = quality[(quality["metric"] == ERROR) & (quality["baseline"] == "plain")].dropna(subset=["value"])
    errors = {str(row["arm"]): float(row["value"]) for row in records(beside) if row["arm"] in rows}
    if not errors:
        return None
    kinds = "/".join(str(kind) for kind in beside["weights_kind"].dropna().unique())
    ends = final_step(quality[(quality["metric"] == DRIFT) & (quality["value"] > 0)])
    moved = dict(zip(ends["arm"].astype(str), ends["value"].astype(float), strict=True))
    none = [name for name, value in errors.items() if value == 0 and name not in moved]
    late = [f"{name} {units.significant(moved[name])}" for name in errors if errors[name] == 0 and name in moved]
    most = max(errors, key=lambda name: errors[name])
    text = "no detail changes a bit of the velocity here"
    if errors[most] > 0:
        text = f"{most} changes the velocity the most, by {units.percent(errors[most])} of its length ({kinds} weights)"
    some = sorted((name for name in errors if errors[name] > 0), key=lambda name: -errors[name])
    evidence = [f"{name} {units.significant(errors[name])}" for name in some]
    own = quality[(quality["metric"] == ERROR) & (quality["baseline"] == "float32") & (quality["arm"] == "plain")]
    yardstick = [f"the plain model is {units.significant(v)} away from float32" for v in own["value"].dropna() if v > 0]
    unchanged = [f"only the end of a run changes: {', '.join(late)}"] if late else []
    unchanged += [f"no bit changes: {', '.join(none)}"] if none else []
    return text, tuple(filter(None, [", ".join(evidence), *yardstick, *unchanged]))


def _ratio(row: Mapping[str, Any]) -> str:
    """A ratio with its interval, where that has two ends."""
    ends = [units.ratio(row[end]) for end in ("ratio_low", "ratio_high")]
    bounded = units.MISSING not in ends and float(row["ratio_low"]) > 0
    return units.ratio(row["ratio"]) + (f" ({' to '.join(ends)})" if bounded else "")


def _known(names: list[str]) -> str:
    return "none is" if not names else f"{len(names)} {'is' if len(names) == 1 else 'are'}"
