"""Two sets of runs compared: every number that both have, judged; the rest listed with why it is not compared.

Runs are paired by notebook and inputs (`matching`), whichever arms they were asked for, their rows by what they are
about: an arm, its baseline, scope and regime for a time ratio, or of a step of two sizes an arm, axis and both sizes;
arm, stage and metric for bytes; arm, metric and baseline for quality at the last step. What counts as a regression:

    a time ratio    slower: the interval of B / A excludes 1, beyond both recorded noise floors, added in squares
    bytes           weights, and on one device the peak of a step, more than 1 % larger
    quality         the interval of B - A excludes 0 for the worse; without intervals, worse by more than 10 %
    a run           that completed in A and failed in B, where it asked for what that of A asked for

The intervals of all times and qualities of one comparison hold together with 95 %, and noise floors are widened with
them, so that a gate over many of them rarely closes by chance. Absolute times are context: no clock links two runs, so
they are shown, and judged only where one says by how much they may grow. The canary does not link them either: every
run sizes its own, and keeps its seconds but not how much work they were for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zimage.analysis import combining, matching, reading, units
from zimage.analysis.combining import Change, Interval, number
from zimage.analysis.matching import Recorded

import pandas as pd

BURST = "burst"  # the regime of rows from before there were others
METHOD = (
    "each side's time ratios are to its own baseline, so that one also rises where only the baseline got faster; "
    "intervals and floors are combined as independent, in quadrature on the log scale, and hold together with 95 %"
)
SECONDS = (
    "medians of each run's samples in bursts, or a profile's whole step; no clock links two runs, nor does the canary, "
    "which every run sizes anew"
)
TOGETHER = 10.0  # by how many percent all times of a device have to grow to be told of
TIMES = ("ablation", "axes")  # the tables of time ratios
SIZE = ("height", "width", "batch", "caption_tokens")
KEYS = {
    "ablation": ("arm", "baseline", "scope", "regime"),
    "axes": ("arm", "axis", *SIZE, *(f"beside_{name}" for name in SIZE)),
    "memory": ("arm", "stage", "metric"),
    "quality": ("arm", "metric", "baseline"),
}
_WHOLE = (
    r"step|trajectory|\d+ x \d+ px\b.*"  # the scopes of a step, of a trajectory, and of a step of one of several sizes
)
_ENDS = {
    **dict.fromkeys(TIMES, ("ratio", "ratio_low", "ratio_high")),
    "memory": ("bytes",),
    "quality": ("value", "low", "high"),
}


@dataclass(frozen=True)
class Row:
    """One number of both sides: the table it is in, what it is about, its values, and what became of it."""

    table: str
    about: tuple[str, ...]
    a: Interval
    b: Interval
    change: Change
    noise_floor: float | None = None

    @property
    def decided(self) -> bool:
        """Whether there is an answer."""
        return self.change.verdict != "inconclusive"


@dataclass(frozen=True)
class Time:
    """The seconds of an arm's step or trajectory on both sides, which ran on one device."""

    arm: str
    scope: str
    a_s: float
    b_s: float

    @property
    def ratio(self) -> float:
        """How many times as long it takes in B."""
        return self.b_s / self.a_s

    def longer(self, percent: float | None) -> bool:
        """Whether it takes more than `percent` longer in B; never where that is None."""
        return percent is not None and self.ratio > 1 + percent / 100


@dataclass(frozen=True)
class Alone:
    """What is not compared, and why; `worse` where that is a regression by itself.

    missing_runs, missing_rows: how many completed runs or usable rows of A this is that have no counterpart in B.
    """

    what: str
    reason: str
    worse: bool = False
    missing_runs: int = 0
    missing_rows: int = 0


@dataclass(frozen=True)
class Pair:
    """A run of each side with the same inputs: the rows of both, what only one has, and remarks.

    times: the seconds of every arm that both have; steps_s: the step of every baseline, as context; neither of two
    devices.
    """

    a: Recorded
    b: Recorded
    rows: list[Row] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps_s: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    times: list[Time] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both are one and the same run."""
        return (self.a.name, self.a.started) == (self.b.name, self.b.started)


@dataclass(frozen=True)
class Compared:
    """All pairs, the runs that have no counterpart, and how the machines and programs of what is compared differ."""

    pairs: list[Pair]
    alone: list[Alone]
    environments: list[tuple[str, str, str]]
    together: int  # intervals that hold at once
    timed: bool = False  # whether completed runs of A have time ratios
    percent: float | None = None  # by how much the times of B may be longer; None where they are not judged
    unreadable: int = 0  # tables of completed runs of A that cannot be read

    @property
    def rows(self) -> list[Row]:
        """The rows of all pairs."""
        return [row for pair in self.pairs for row in pair.rows]

    @property
    def left_out(self) -> list[Alone]:
        """All that is not compared."""
        return [*self.alone, *(one for pair in self.pairs for one in pair.alone)]

    @property
    def worse(self) -> int:
        """How many regressions there are."""
        return sum(row.change.worse for row in self.rows) + sum(one.worse for one in self.left_out) + self.longer

    @property
    def times(self) -> list[Time]:
        """The times of all pairs."""
        return [time for pair in self.pairs for time in pair.times]

    @property
    def longer(self) -> int:
        """How many times are longer than they may be."""
        return sum(time.longer(self.percent) for time in self.times)

    @property
    def rose_together(self) -> dict[str, list[Time]]:
        """The times of every device on which all of them rose by more than TOGETHER percent."""
        found: dict[str, list[Time]] = {}
        for pair in self.pairs:
            found.setdefault(pair.a.device, []).extend(pair.times)
        return {device: times for device, times in found.items()
                if times and all(time.longer(TOGETHER) for time in times)}  # fmt: skip

    @property
    def missing_runs(self) -> int:
        """How many completed runs of A have no counterpart in B."""
        return sum(one.missing_runs for one in self.left_out)

    @property
    def missing_rows(self) -> int:
        """How many rows of A, in runs that are compared, have none that can be used in B."""
        return sum(one.missing_rows for one in self.left_out)

    @property
    def undecided(self) -> int:
        """How many rows are compared and inconclusive."""
        return sum(not row.decided for row in self.rows)

    @property
    def times_undecided(self) -> bool:
        """Whether A has time ratios and not one of them is decided."""
        return self.timed and not any(row.decided for row in self.rows if row.table in TIMES)


def compare(a: Sequence[Recorded], b: Sequence[Recorded], percent: float | None = None) -> Compared:
    """Compare B with A, the reference; if `percent` is given, a time that grew by more is a regression too."""
    matched = matching.match(a, b)
    alone = [Alone(f"A {run.name}", reason, missing_runs=int(not run.error)) for run, reason in matched.alone_a]
    alone += [Alone(f"B {run.name}", reason) for run, reason in matched.alone_b]
    alone += [_failed(one, two) for one, two in matched.pairs if one.error or two.error]
    completed = [(one, two) for one, two in matched.pairs if not (one.error or two.error)]
    found = [_common(one, two) for one, two in completed]
    together = max(1, sum(both.has_intervals for common, _ in found for both in common))
    pairs = []
    for (one, two), (common, missing) in zip(completed, found, strict=True):
        rows = [_judged(both, together) for both in common]
        times = _times(one, two)
        pairs.append(Pair(one, two, rows, missing, _notes(one, two), _steps(times, one, two), times))
    differing = matching.environments([p.a.facts for p in pairs], [p.b.facts for p in pairs])
    timed = any(_has(table, run) for table in TIMES for run in a if not run.error)
    unreadable = sum(len(run.unreadable) for run in a if not run.error)
    return Compared(pairs, alone, differing, together, timed, percent, unreadable)


def steps_s(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Seconds of a whole step of every arm, as in `times_s`."""
    return {arm: time_s for (arm, scope), time_s in times_s(tables).items() if scope == "step"}


def times_s(tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, str], float]:
    """Seconds of steps and trajectories by arm and scope: as profiled, else the median of the samples in bursts.

    Those of dropped quads are left out.
    """
    found: dict[tuple[str, str], float] = {}
    if (samples := tables.get("samples")) is not None:
        dropped = samples["dropped"].fillna(False).astype(bool)
        whole = samples["scope"].str.fullmatch(_WHOLE).fillna(False).astype(bool)
        kept = samples[(samples["kind"] == "sample") & whole & ~dropped]
        kept = kept[kept["regime"].fillna(BURST) == BURST]
        for (arm, scope), own in kept.groupby(["arm", "scope"], sort=False):
            found[str(arm), str(scope)] = float(own["time_s"].median())
    if (stages := tables.get("stages")) is not None:
        profiled = stages[stages["view"] == "whole"].dropna(subset=["time_s"])
        found |= {(str(row["arm"]), "step"): float(row["time_s"]) for row in reading.records(profiled)}
    return found


def ratios(tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The usable rows of an `ablation` table by (arm, baseline, scope, regime); none that is there twice."""
    return _usable("ablation", tables)


def interval_of(table: str, row: Mapping[str, Any]) -> Interval:
    """The value of a row with its interval."""
    return Interval(*(number(row.get(name)) for name in _ENDS[table]))


def floor_of(row: Mapping[str, Any]) -> float | None:
    """The noise floor of a row, a |log ratio|; None where it has none."""
    floor = number(row.get("noise_floor"))
    return floor if floor >= 0 else None


@dataclass(frozen=True)
class _Both:
    """A row of each side about the same."""

    table: str
    about: tuple[str, ...]
    a: Mapping[str, Any]
    b: Mapping[str, Any]

    @property
    def has_intervals(self) -> bool:
        return all(interval_of(self.table, row).bounded for row in (self.a, self.b))


def _judged(both: _Both, together: int) -> Row:
    a, b = (interval_of(both.table, row) for row in (both.a, both.b))
    floor = None
    if both.table in TIMES:
        floor = combining.combined_floor(floor_of(both.a), floor_of(both.b), together)
        change = combining.time_change(a, b, floor, together)
    elif both.table == "memory":
        change = combining.size_change(a.value, b.value)
    else:
        change = combining.quality_change(both.about[1], a, b, together)
    return Row(both.table, both.about, a, b, change, floor)


def _common(a: Recorded, b: Recorded) -> tuple[list[_Both], list[Alone]]:
    """The rows that both runs have, and what of them is not compared."""
    common: list[_Both] = []
    missing: list[Alone] = []
    shared = [table for table in KEYS if _has(table, a) and _has(table, b)]
    arms = [dict.fromkeys(key[0] for table in shared for key in _by_key(table, run.tables)) for run in (a, b)]
    for own, other, side, rest, run in ((arms[0], arms[1], "A", "B", a), (arms[1], arms[0], "B", "A", b)):
        only = [arm for arm in own if arm not in other]
        for arm in only:
            count = sum(key[0] == arm for table in shared for key in _usable(table, run.tables)) if run is a else 0
            reason = f"only {side} has this arm, {rest} has not"
            missing.append(Alone(f"{arm} of {run.name}", reason, missing_rows=count))
    for table in KEYS:
        if table not in shared:
            missing += _without_table(table, a, b)
            continue
        left, right = (_by_key(table, run.tables) for run in (a, b))
        usable = _usable(table, a.tables)
        for key in dict.fromkeys([*left, *right]):
            if not all(key[0] in own for own in arms):
                continue
            rows = left.get(key, []), right.get(key, [])
            what = f"{_told(table, key)} of {a.name}"
            if reason := _not_comparable(table, rows):
                missing.append(Alone(what, reason, missing_rows=int(key in usable)))
            elif reason := _other_allocator(table, key, a, b):
                missing.append(Alone(what, reason))
            else:
                common.append(_Both(table, key, rows[0][0], rows[1][0]))
    return common, missing


def _not_comparable(table: str, rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> str:
    for side, other, own in (("A", "B", rows[0]), ("B", "A", rows[1])):
        if not own:
            return f"only {other} has it in its table {table!r}"
        if len(own) > 1:
            return f"{side} has it {len(own)} times in its table {table!r}"
        if (side == "A" or table != "quality") and (reason := _unusable(table, own[0])):
            return f"{side} {reason}"
    return ""


def _unusable(table: str, row: Mapping[str, Any]) -> str:
    """Why a row has nothing to compare, or ""."""
    value = interval_of(table, row)
    open_ended = table == "axes" and math.isnan(value.low) and math.isnan(value.high)  # told as undecided
    known = open_ended or (value.bounded and value.low >= 0)
    if table in TIMES and not (known and 0 < value.value < math.inf):
        return "recorded no usable interval"
    perfect = table == "quality" and value.value == math.inf and row["metric"] in combining.HIGHER_IS_BETTER
    return "recorded no finite number" if units.missing(value.value) and not perfect else ""


def _other_allocator(table: str, key: tuple[str, ...], a: Recorded, b: Recorded) -> str:
    if table == "memory" and key[-1] == "peak_bytes" and a.device != b.device:
        return "the peaks of two devices are those of different allocators and kernels"
    return ""


def _has(table: str, run: Recorded) -> bool:
    return table in run.tables and len(_by_key(table, run.tables)) > 0


def _without_table(table: str, a: Recorded, b: Recorded) -> list[Alone]:
    """Why a whole table is not compared; nothing where neither run has it."""
    what, count = f"table {table!r} of {a.name}", len(_usable(table, a.tables))
    unreadable = [run.unreadable[table] for run in (a, b) if table in run.unreadable]
    if unreadable:
        return [Alone(what, unreadable[0], missing_rows=count)]
    sides = [side for side, run in (("A", a), ("B", b)) if _has(table, run)]
    return [Alone(what, f"only {sides[0]} has one", missing_rows=count)] if sides else []


def _by_key(table: str, tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The rows of a table that can be judged, by what they are about, in the table's order."""
    frame = tables.get(table)
    if frame is None or frame.empty:
        return {}
    if table == "quality":
        frame = frame[frame["metric"].isin([*combining.LOWER_IS_BETTER, *combining.HIGHER_IS_BETTER])]
        worst = frame["metric"].isin(combining.HIGHER_IS_BETTER).map({True: -math.inf, False: math.inf})
        frame = reading.final_step(frame.assign(value=frame["value"].fillna(worst)))  # NaN is kept as a missing value
    elif table == "memory":
        frame = frame[frame["metric"].isin(combining.JUDGED_BYTES) & frame["stage"].isin(reading.WHOLE)]
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in reading.records(frame):
        found.setdefault(tuple(_text(name, row.get(name)) for name in KEYS[table]), []).append(row)
    return found


def _usable(table: str, tables: Mapping[str, pd.DataFrame]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a table that are there once and have something to compare, by what they are about."""
    found = _by_key(table, tables)
    return {key: rows[0] for key, rows in found.items() if len(rows) == 1 and not _unusable(table, rows[0])}


def _text(name: str, value: Any) -> str:
    if name.removeprefix("beside_") in SIZE:
        return "" if units.missing(value) else f"{int(value)}"
    return value if isinstance(value, str) else BURST if name == "regime" else ""


def sizes(about: tuple[str, ...]) -> str:
    """What a row of `axes` is about but for its arm, in words: the axis, the size, and that beside it."""
    size, beside = (
        f"{height or '?'} x {width or '?'} px" + f", batch {batch}" * bool(batch) + f", {tokens} tokens" * bool(tokens)
        for height, width, batch, tokens in (about[2:6], about[6:])
    )
    return f"{about[1]} {size} beside {beside}"


def _told(table: str, about: tuple[str, ...]) -> str:
    return f"{about[0]} {sizes(about)}" if table == "axes" else " ".join(filter(None, about))


def _failed(a: Recorded, b: Recorded) -> Alone:
    if not b.error:
        return Alone(f"B {b.name}", f"the run of A failed: {a.error}")
    if a.error:
        return Alone(f"B {b.name}", f"it failed, as it did in A: {b.error}")
    if others := matching.differences(a, b):  # nobody asked A for these
        reason = f"it failed, and asked for other rows than A's {a.name} ({', '.join(others)}): {b.error}"
        return Alone(f"B {b.name}", reason, missing_runs=1)
    return Alone(f"B {b.name}", f"it failed, and completed in A: {b.error}", worse=True)


def _notes(a: Recorded, b: Recorded) -> list[str]:
    chosen = [f"asked for other rows: {text}" for text in matching.differences(a, b)]
    return [*chosen, *(f"inputs known of one side only: {text}" for text in matching.only_one_has(a, b))]


def _steps(times: Sequence[Time], a: Recorded, b: Recorded) -> dict[str, tuple[float, float]]:
    """The step of every baseline on both sides, or of every arm where none was compared."""
    named = {key[1] for run in (a, b) for key in _by_key("ablation", run.tables)}
    return {
        time.arm: (time.a_s, time.b_s) for time in times if time.scope == "step" and (not named or time.arm in named)
    }


def _times(a: Recorded, b: Recorded) -> list[Time]:
    """What both took for the same arm and scope; copies of a baseline are no arms. Nothing for two devices."""
    if a.device != b.device:
        return []
    left, right = times_s(a.tables), times_s(b.tables)
    named = {arm for run in (a, b) for key in _by_key("ablation", run.tables) for arm in key[:2]}
    return [
        Time(arm, scope, time_s, right[arm, scope])
        for (arm, scope), time_s in left.items()
        if (not named or arm in named) and all(0 < one < math.inf for one in (time_s, right.get((arm, scope), 0.0)))
    ]
