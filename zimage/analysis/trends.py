"""One comparison across versions of MLX and zimage: what every arm's time ratio was in each, and whether it changed.

A history is the runs of one notebook on the same inputs and one device, the newest of each version. Its ratios are to
each run's own baseline and are judged between versions as `comparing` judges two runs; a step's absolute time is shown
as context, since no clock links two runs.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zimage.analysis import combining, comparing, matching, reading, units
from zimage.analysis.combining import Change, Interval
from zimage.analysis.findings import Finding
from zimage.analysis.matching import Recorded
from zimage.machine import UNKNOWN

import pandas as pd

TABLES = ("ablation", "samples", "stages")  # what a trend is made of
_PARTS = {"mlx": "MLX ", "zimage": "zimage ", "commit": "", "sources": "sources "}


@dataclass(frozen=True)
class Point:
    """An arm's time ratio in one version, and what became of it since the version before that measured it."""

    version: str
    run: str
    started: str
    about: tuple[str, ...]  # arm, baseline, scope, regime
    ratio: Interval
    noise_floor: float | None
    change: Change | None


@dataclass(frozen=True)
class Trend:
    """A history with the names of its versions, oldest first, the points of every ratio, and the steps' seconds."""

    runs: list[Recorded]
    versions: list[str]
    points: list[Point]
    steps_s: list[dict[str, float]]  # of every run, by arm
    since_first: dict[tuple[str, ...], Change]  # from the first to the last version of every ratio that has two
    earlier: int = 0  # versions before these

    @property
    def span(self) -> str:
        """From which version to which."""
        return f"{self.versions[0]} to {self.versions[-1]}"

    def about(self) -> list[tuple[str, ...]]:
        """What the points are about, each once."""
        return list(dict.fromkeys(point.about for point in self.points))


def alike(run: Recorded, runs: Iterable[Recorded], rows: bool = True) -> list[Recorded]:
    """The completed runs on the same device of the same notebook and inputs.

    rows: whether they must also have been asked for the same arms and sizes. Where one has no parameter in which
    several that fit it differ, it is none of them: there a history breaks.
    """
    allowed = () if rows else matching.OF_THE_ROWS
    known = [one for one in runs if one.device == run.device and not one.error]

    def unclear(one: Recorded) -> set[str]:
        return set(matching.untold(one, matching.fitting(one, known, allowed))) - set(allowed)

    own = unclear(run)
    return [
        one
        for one in matching.fitting(run, known, allowed)
        if not own & one.inputs.keys()
        and (one.inputs.keys() >= run.inputs.keys() or not run.inputs.keys() & unclear(one))
    ]


def history(run: Recorded, runs: Iterable[Recorded]) -> list[Recorded]:
    """Of the runs that are `alike`, whichever arms and sizes they were asked for, one of each version.

    Of several of a version it is the newest that was asked for the same, else the one that was asked for most of what
    `run` was. Ordered by the versions of MLX and of zimage, then by date.
    """
    chosen: dict[tuple[str, ...], Recorded] = {}
    for one in sorted(alike(run, runs, rows=False), key=lambda one: _nearness(run, one)):
        chosen[tuple(one.facts.get(name, UNKNOWN) for name in ("mlx", "zimage", "sources"))] = one
    return sorted(chosen.values(), key=lambda one: (*(_number(one, name) for name in ("mlx", "zimage")), one.started))


def _nearness(run: Recorded, one: Recorded) -> tuple[bool | int | str, ...]:
    asked = [(run.parameters.get(name), one.parameters.get(name)) for name in matching.OF_THE_ROWS]
    shared = sum(item in own for own, others in asked if isinstance(own, list) and isinstance(others, list)
                 for item in others)  # fmt: skip
    return not matching.differences(run, one), shared, one.started


def trend(runs: Sequence[Recorded], earlier: int = 0) -> Trend | None:
    """What changed along a history, as `history` gives it, from which the `earlier` first runs were left out.

    None where no ratio or step is known of two versions.
    """
    versions, before = _labels(runs), dict[tuple[str, ...], tuple[Interval, float | None]]()
    rows = [comparing.ratios(run.tables) for run in runs]
    measured = Counter(about for found in rows for about in found)
    together = max(1, sum(count - 1 for count in measured.values()))
    ends: dict[tuple[str, ...], list[tuple[Interval, float | None]]] = {}
    points = []
    for run, version, found in zip(runs, versions, rows, strict=True):
        for about, row in found.items():
            ratio, floor = comparing.interval_of("ablation", row), comparing.floor_of(row)
            change = None
            if about in before:
                change = _changed(before[about], (ratio, floor), together)
            before[about] = ratio, floor
            ends.setdefault(about, []).append((ratio, floor))
            points.append(Point(version, run.name, run.started, about, ratio, floor, change))
    several = {about: values for about, values in ends.items() if len(values) > 1}
    steps = [comparing.steps_s(run.tables) for run in runs]
    timed = Counter(arm for step in steps for arm in step)
    if max([*measured.values(), *timed.values()], default=0) < 2:
        return None
    whole = {about: _changed(values[0], values[-1], len(several)) for about, values in several.items()}
    return Trend(list(runs), versions, points, _baselines(steps, points), whole, earlier)


def findings(found: Trend) -> list[Finding]:
    """What changed from the first version to the last, an arm each; or that nothing is known to have."""
    changed = [(about, one) for about, one in found.since_first.items() if one.verdict in ("faster", "slower")]
    if not changed:
        if not found.since_first:
            return []
        alike = all(one.verdict == "equivalent" for one in found.since_first.values())
        text = f"no time ratio is known to have changed from {found.span}"
        return [Finding(text, "equivalent" if alike else "inconclusive", (_counted(found),))]
    wide = best(found)
    told = []
    for about, one in changed:
        moved = f"{'rose' if one.worse else 'fell'} by {units.percent(abs(one.interval.value - 1))}"
        text = f"the time ratio of {name(about)}, {moved} from {found.span}"
        ends = f"{units.ratio(one.interval.low)} to {units.ratio(one.interval.high)}"
        evidence = f"ratio of the two ratios {units.ratio(one.interval.value)}, interval {ends}"
        told.append(Finding(text, one.verdict, (evidence,), f"{text} ({ends})" if about in wide else ""))
    return told


def name(about: tuple[str, ...]) -> str:
    """What a ratio is about, in words."""
    arm, baseline, scope, regime = about
    return f"{arm} to {baseline}, {scope}" + ("" if regime == comparing.BURST else f", {regime}")


def best(found: Trend) -> list[tuple[str, ...]]:
    """What is drawn: the ratios of the widest scope in bursts, or else all."""
    about = found.about()
    if not about:
        return []
    scope = reading.best_scope(pd.DataFrame({"scope": [one[2] for one in about]}))
    return [one for one in about if one[2] == scope and one[3] == comparing.BURST] or about


def _changed(a: tuple[Interval, float | None], b: tuple[Interval, float | None], together: int) -> Change:
    return combining.time_change(a[0], b[0], combining.combined_floor(a[1], b[1], together), together)


def _labels(runs: Sequence[Recorded]) -> list[str]:
    """A name for every version: what it differs in from others; sources only where nothing else tells."""
    parts = ["mlx", "zimage", "commit"]
    varying = [part for part in parts if len({run.facts.get(part, UNKNOWN) for run in runs}) > 1]
    texts = [[f"{_PARTS[part]}{_short(part, run.facts.get(part, UNKNOWN))}" for part in varying] for run in runs]
    if len({tuple(text) for text in texts}) < len(runs):
        texts = [
            [*t, f"{_PARTS['sources']}{r.facts.get('sources', UNKNOWN)[:7]}"] for t, r in zip(texts, runs, strict=True)
        ]
    return [", ".join(text) for text in texts]


def _short(part: str, value: str) -> str:
    """A commit as git shortens it, with what follows its digits, such as a sign of changes."""
    return re.sub("^([0-9a-f]{7})[0-9a-f]*", r"\1", value) if part == "commit" else value


def _number(run: Recorded, part: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall("[0-9]{1,9}", run.facts.get(part, "")))


def _baselines(steps: list[dict[str, float]], points: Sequence[Point]) -> list[dict[str, float]]:
    """Of the steps those of baselines; of all arms where nothing is compared."""
    named = {point.about[1] for point in points}
    return [{arm: time_s for arm, time_s in step.items() if not named or arm in named} for step in steps]


def _counted(found: Trend) -> str:
    ratios = len(found.since_first)
    return f"{ratios} time ratio{'s' * (ratios > 1)}, {len(found.versions)} versions"
