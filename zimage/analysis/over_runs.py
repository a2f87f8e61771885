"""What several runs of one experiment, beside each other, found of the step: a finding an arm instead of one a run."""

from collections.abc import Sequence

from zimage.analysis import gains, units
from zimage.analysis.findings import KNOWN_VERDICTS, Finding, Tables, verdict_of
from zimage.analysis.reading import records

import pandas as pd


def step(runs: Sequence[tuple[str, Tables]]) -> list[Finding]:
    """How often each arm was faster, slower, equivalent or undecided per step, and between which ratios.

    runs: each one's label and tables. None unless there are several and in all of them the step holds narrower scopes:
    their own findings say more than a sentence can hold.
    """
    tables = [(label, frames) for label, frames in runs if "ablation" in frames]
    if len(tables) < 2 or not all(gains.nested(frames.get("gains")) for _, frames in tables):
        return []
    every = pd.concat([gains.the_step(frames["ablation"]).assign(case=label) for label, frames in tables])
    burst = every[every["regime"].fillna("burst") == "burst"]
    return [
        _of(str(arm), records(burst[burst["arm"] == arm]), [frames["gains"] for _, frames in tables])
        for arm in dict.fromkeys(burst["arm"].dropna())
    ]


def _of(arm: str, rows: list[dict[str, object]], saved: Sequence[pd.DataFrame]) -> Finding:
    counts = {verdict: sum(verdict_of(row) == verdict for row in rows) for verdict in KNOWN_VERDICTS}
    found = {verdict: count for verdict, count in counts.items() if count}
    words = [f"{_WORDS[verdict]} in {count}" for verdict, count in found.items()]
    ratios = [float(row["ratio"]) for row in rows if not units.missing(row["ratio"])]  # type: ignore[arg-type]
    where, every = f"{len(rows)} runs", f"all of {len(rows)} runs"
    if len(rows) < len(saved):
        where = f"the {len(rows)} of {len(saved)} runs that measured it"
        every = f"all that measured it ({len(rows)} of {len(saved)} runs)"
    text = f"{arm} against {rows[0]['baseline']} per step, in {where}: {', '.join(words)}"
    if len(found) == 1:
        text = f"{arm} against {rows[0]['baseline']} per step is {_WORDS[next(iter(found))]} in {every}"
    span = "no ratio"
    if ratios:
        ends = [units.ratio(end) for end in (min(ratios), max(ratios))]
        span = f"ratio {ends[0]}" if ends[0] == ends[1] else f"ratios {ends[0]} to {ends[1]}"
    verdict = next(iter(found)) if len(found) == 1 else ""
    return Finding(text, verdict, (span, *_lost(arm, saved)), f"{text} ({span})")


def _lost(arm: str, saved: Sequence[pd.DataFrame]) -> list[str]:
    """Where most of the product's gain is lost most often, and in how many runs it is known to be."""
    losses = [gains.largest_loss(frame, arm) for frame in saved]
    places = [loss.to for loss in losses if loss is not None]
    if not places:
        return []
    place = max(dict.fromkeys(places), key=places.count)
    return [f"in {places.count(place)} of {len(saved)} the largest loss of the product's gain is in {place}"]


_WORDS = {verdict: verdict for verdict in KNOWN_VERDICTS} | {"inconclusive": "undecided"}
