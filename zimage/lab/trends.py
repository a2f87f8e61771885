"""Trends read from the store, superseded runs included, as data and as lines; nothing here needs MLX."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zimage.analysis import comparing, trends, units
from zimage.analysis.matching import Recorded
from zimage.analysis.trends import Point, Trend
from zimage.lab.comparing import inputs_line, recorded
from zimage.lab.store import Run, Store


@dataclass(frozen=True)
class Comparable:
    """Completed runs of one notebook on one device, by key, and what each is compared by, without tables."""

    runs: dict[str, Run]
    bare: dict[str, Recorded]


def grouped(runs: Iterable[Run]) -> dict[tuple[str, str], Comparable]:
    """The completed ones of an experiment's runs, by notebook and device."""
    groups: dict[tuple[str, str], Comparable] = {}
    for run in runs:
        if run.completed:
            group = groups.setdefault((run.notebook, run.device), Comparable({}, {}))
            group.runs[run.key], group.bare[run.key] = run, recorded(run, ())
    return groups


def of(run: Run, group: Comparable, last: int | None = None) -> Trend | None:
    """The trend that `run` is a point of, among all of its `group`; None where there is only its version.

    last: how many versions at most, the newest.
    """
    found = trends.history(group.bare[run.key], group.bare.values())
    if len(found) < 2:
        return None
    earlier = 0 if last is None else max(0, len(found) - last)
    keys = [one.name.partition("/")[2] for one in found[earlier:]]
    return trends.trend([recorded(group.runs[key], trends.TABLES) for key in keys], earlier)


def read(store: Store, experiment: str) -> tuple[list[Trend], list[str]]:
    """The trends of an experiment, one for each notebook, set of inputs and device; and a line for what is unreadable.

    All runs count, not only those of the last sweep.
    """
    runs, problems = store.scan(experiment)
    found: list[Trend] = []
    for group in grouped(runs).values():
        seen: set[str] = set()
        for key, run in group.runs.items():
            one = group.bare[key]
            if one.name in seen:
                continue
            seen |= {other.name for other in trends.alike(one, group.bare.values())}
            seen |= {other.name for other in trends.history(one, group.bare.values())}
            if (trend := of(run, group)) is not None:
                found.append(trend)
                problems += [reason for one in trend.runs for reason in one.unreadable.values()]
    return found, list(dict.fromkeys(problems))


def content(found: Sequence[Trend]) -> list[dict[str, Any]]:
    """The trends as data for programs."""
    return [
        {
            "notebook": one.runs[-1].notebook,
            "parameters": dict(one.runs[-1].parameters),
            "device": one.runs[-1].device,
            "weights": one.runs[-1].kind,
            "versions": [
                {"version": version, "run": run.name, "started": run.started, "steps_s": steps}
                for version, run, steps in zip(one.versions, one.runs, one.steps_s, strict=True)
            ],
            "points": [_point_content(point) for point in one.points],
        }
        for one in found
    ]


def lines(experiment: str, found: Sequence[Trend]) -> list[str]:
    """The trends for a terminal."""
    if not found:
        return [f"{experiment}: every result is known of one version of MLX and zimage only"]
    said: list[str] = []
    for one in found:
        last = one.runs[-1]
        kind = f", {last.kind} weights" if last.kind else ""
        said += [*([""] if said else []), f"{last.notebook} with {inputs_line(last)}", f"  on {last.device}{kind}"]
        width = max(map(len, one.versions))
        for about in one.about():
            said.append(f"  {trends.name(about)}")
            said += [f"    {p.version:{width}}  {_ratio(p)}" for p in one.points if p.about == about]
        for arm in dict.fromkeys(arm for steps in one.steps_s for arm in steps):
            said.append(f"  for context, a step of {arm} (not judged: no clock links two runs)")
            said += [
                f"    {version:{width}}  {units.seconds(steps[arm])}  {run.name}, {units.date(run.started)}"
                for version, steps, run in zip(one.versions, one.steps_s, one.runs, strict=True)
                if arm in steps
            ]
    return [*said, "", f"How changes since the version before are judged: {comparing.METHOD}."]


def _ratio(point: Point) -> str:
    text = f"{units.ratio(point.ratio.value)} ({units.ratio(point.ratio.low)} to {units.ratio(point.ratio.high)})"
    if point.change is None:
        return text
    change = point.change.interval
    ends = f" ({units.ratio(change.low)} to {units.ratio(change.high)})" if change.high < math.inf else ""
    open_still = point.change.verdict == "inconclusive" and units.excludes_one(change.low, change.high)
    why = f": {point.change.reason}" if open_still else ""
    return f"{text}  {point.change.verdict}, {units.ratio(change.value)} times the ratio before{ends}{why}"


def _point_content(point: Point) -> dict[str, Any]:
    arm, baseline, scope, regime = point.about
    change = point.change
    return {
        "version": point.version, "run": point.run, "arm": arm, "baseline": baseline, "scope": scope, "regime": regime,
        **point.ratio.finite(), "noise_floor": point.noise_floor,
        "change": None if change is None else {**change.interval.finite(), "verdict": change.verdict,
                                               "reason": change.reason},
    }  # fmt: skip
