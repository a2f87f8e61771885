"""Runs, experiments and stores found by what a person calls them, compared, and told; nothing here needs MLX."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.analysis import comparing, matching, reading, units
from zimage.analysis.claims import in_words
from zimage.analysis.combining import WORSE, Change
from zimage.analysis.comparing import Compared, Pair, Row, Time
from zimage.analysis.matching import Recorded
from zimage.errors import StoreError
from zimage.lab.store import Run, Store
from zimage.machine import doubts

_VERSIONS = ("python", "numpy")  # of all recorded versions, those that an environment lacks and that could matter
NO_TIMES = "no step or trajectory of both has seconds of one device"
_TABLES = ("ablation", "axes", "memory", "quality", "samples", "stages")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what it was called, what that is, its runs, and a line for each that is unreadable."""

    asked: str
    what: str
    runs: list[Recorded]
    problems: list[str]

    @property
    def completed(self) -> int:
        """How many of its runs completed."""
        return sum(not run.error for run in self.runs)


def side(asked: str, store: Store, completed: bool = True) -> Side:
    """The runs that `asked` names: in `store` an experiment, a run's key or the start of it, experiment/key; or a
    results folder, PATH/experiment, or PATH/experiment/key.

    Of experiments and stores the current runs count. Raises StoreError for what is neither, and where there is no run,
    or none that `completed` although one is asked for.
    """
    found, names, key = _place(asked, store)
    problems: list[str] = []
    runs: list[Run] = []
    for name in names:
        readable, unreadable = found.scan(name)
        problems += unreadable
        current = {run.key for run in found.current_or(name, readable)}
        runs += [run for run in readable if (run.key in current if key is None else run.key == key)]
    kept = [recorded(run) for run in runs]
    problems += [reason for run in kept for reason in run.unreadable.values()]
    if key is not None:  # what is wrong with that run before what is wrong with others
        problems.sort(key=lambda problem: f"/{key}/" not in problem)
    what = f"run {names[0]}/{key}" if key else f"experiment {names[0]}" if len(names) == 1 else "store"
    given = Side(asked, f"{what} in {found.root}", kept, problems)
    if not (given.completed if completed else kept):
        said = f": {problems[0]}" if problems else ""
        none = f"{given.what} has no {'completed ' * completed}run"
        raise StoreError(f"{asked}: {none}{said}; `zimage list --results DIR` shows the runs")
    return given


def recorded(run: Run, names: Collection[str] = _TABLES) -> Recorded:
    """A run as it is compared, with those of its tables that have these names."""
    tables, unreadable = {}, {}
    for name in [name for name in run.tables() if name in names] if names else []:
        try:
            tables[name] = run.table(name)
        except StoreError as error:
            unreadable[name] = str(error)
    digests, versions = run.mapping("digests"), run.mapping("versions")
    facts = run.facts | {"device": run.device}
    facts |= {name: str(versions[name]) for name in _VERSIONS if name in versions}
    facts |= {"sources": str(digests["sources"])[:12]} if "sources" in digests else {}
    failure = "" if run.completed else " ".join(str(run.meta.get("error") or "no error was kept").split())
    return Recorded(
        f"{run.experiment}/{run.key}", run.notebook, run.device, str(run.meta["started"]), run.parameters,
        run.mapping("weights") or None, run.meta.get("recipe"), facts, tables, failure, unreadable,
        run.mapping("recipes"),
    )  # fmt: skip


def compare(a: Side, b: Side, percent: float | None = None, require_all: bool = False) -> Compared:
    """Compare B with A; if `percent` is given, a time that grew by more is a regression too.

    Raises StoreError, which says why, where there is nothing to compare; with `require_all` that is a finding too.
    """
    found = comparing.compare(a.runs, b.runs, percent)
    if found.rows or found.worse or (percent is not None and found.times) or (require_all and incomplete(found)):
        return found
    left_out = sorted(found.left_out, key=lambda one: " against " not in one.reason)  # the nearest miss first
    reasons = list(dict.fromkeys(f"{one.what}: {one.reason}" for one in left_out))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    because = f"{reasons[0]}{more}" if reasons else "their runs recorded no time ratios, bytes or quality"
    raise StoreError(f"{a.asked} and {b.asked} have nothing to compare: {because}")


def content(a: Side, b: Side, found: Compared) -> dict[str, Any]:
    """The comparison as data for programs."""
    return {
        "a": {"asked": a.asked, "what": a.what, "runs": [run.name for run in a.runs]},
        "b": {"asked": b.asked, "what": b.what, "runs": [run.name for run in b.runs]},
        "method": comparing.METHOD,
        "intervals_together": found.together,
        "environment": [{"fact": name, "a": one, "b": two} for name, one, two in found.environments],
        "pairs": [_pair_content(pair, found.percent) for pair in found.pairs],
        "not_compared": [vars(one) for one in found.left_out],
        "missing_runs": found.missing_runs,
        "missing_rows": found.missing_rows,
        "unreadable_tables": found.unreadable,
        "undecided": found.undecided,
        "times_undecided": found.times_undecided,
        "times": {
            "percent": found.percent,
            "method": comparing.SECONDS,
            "compared": len(found.times),
            "longer": None if found.percent is None else found.longer,
            "rose_together": [_together_content(device, times) for device, times in found.rose_together.items()],
        },
        "regressions": found.worse,
    }


def lines(a: Side, b: Side, found: Compared) -> list[str]:
    """The comparison for a terminal: both sides, how they differ, the verdicts run by run, and what is left out."""
    said = [f"A  {a.what}, {_counted(a)}", f"B  {b.what}, {_counted(b)}", *_differing(found)]
    for letter, runs in (("A", [pair.a.facts for pair in found.pairs]), ("B", [pair.b.facts for pair in found.pairs])):
        said += [f"{letter}  {doubt}" for doubt in doubts(runs)]
    for pair in found.pairs:
        said += ["", *_pair_lines(pair, found.percent)]
    if found.left_out:
        said += ["", f"not compared ({len(found.left_out)}):"]
        said += [f"  {one.what}: {one.reason}{' (a regression)' if one.worse else ''}" for one in found.left_out]
    regressions = [f"  {pair.b.name}: {' '.join(' '.join(cells).split())}"
                   for pair in found.pairs for cells in _worse_cells(pair, found.percent)]  # fmt: skip
    said += ["", f"How: {comparing.METHOD}.", *([] if found.percent is None else [f"Times: {comparing.SECONDS}."])]
    return [*said, *(["regressions:", *regressions] if regressions else []), *_together(found), summary(found)]


def inputs_line(run: Recorded) -> str:
    """A run's parameters but for those of the effort, long ones cut short."""
    texts = {name: str(value) for name, value in run.parameters.items() if name not in matching.OF_THE_EFFORT}
    return " ".join(f"{name}={text if len(text) <= 40 else f'{text[:40]}...'}" for name, text in texts.items())


def summary(found: Compared) -> str:
    """How many were compared, how many of them are worse, and how much could not be judged."""
    counts: dict[str, int] = {}
    for row in found.rows:
        counts[row.change.verdict] = counts.get(row.change.verdict, 0) + 1
    told = ", ".join(f"{counts[word]} {word}" for word in sorted(counts, key=lambda word: word not in WORSE))
    verdict = _several(found.worse, "regression") if found.worse else "no regression"
    lacking = ", ".join([*_missing(found), *_undecided(found)])
    if lacking:
        verdict += f"; {lacking}" if found.worse else f" in what could be judged: {lacking}"
    times = "" if found.percent is None else f", {len(found.times)} by their seconds ({found.longer} longer)"
    return f"{len(found.rows)} compared ({told or 'none'}){times}, {len(found.left_out)} not: {verdict}"


def incomplete(found: Compared) -> str:
    """Why not all that A has was judged, "" where it was: what B lacks or cannot be read, or that no time was."""
    undecided = ["no time ratio is decided"] if found.times_undecided else []
    return " and ".join([*_missing(found), *undecided, *([NO_TIMES] if unjudged(found) else [])])


def unjudged(found: Compared) -> bool:
    """Whether times were to be judged and there are none."""
    return found.percent is not None and not found.times


def _missing(found: Compared) -> list[str]:
    """How many runs and rows of A have no counterpart in B, and how many of its tables cannot be read."""
    counts = {"run": found.missing_runs, "row": found.missing_rows}
    told = [
        f"{_several(count, what)} of A {'have' if count > 1 else 'has'} no counterpart in B"
        for what, count in counts.items()
        if count
    ]
    return told + [f"{_several(found.unreadable, 'table')} of A cannot be read"] * bool(found.unreadable)


def _undecided(found: Compared) -> list[str]:
    """How many rows are inconclusive, and whether no time ratio is decided."""
    count = found.undecided
    told = [f"{_several(count, 'row')} {'are' if count > 1 else 'is'} undecided"] if count else []
    return [*told, *(["no time ratio is decided"] if found.times_undecided else [])]


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"


def _place(asked: str, store: Store) -> tuple[Store, list[str], str | None]:
    """The store, the experiments in it, and the key where one run is meant."""
    if asked in store.experiments():
        return store, [asked], None
    path = Path(asked)
    try:
        there = bool(asked) and path.is_dir()
    except OSError as error:
        raise StoreError(f"{asked}: {error.strerror or error}; name a run, an experiment or a results folder") from None
    if not there:
        above = path.parent.parent
        if path.parent.is_dir() and path.parent.name in Store(above).experiments():
            run = Store(above).find(f"{path.parent.name}/{path.name}")
            return Store(above), [run.experiment], run.key
        try:
            run = store.find(asked)
        except StoreError as error:
            raise StoreError(f"{error}; or name a results folder") from None
        return store, [run.experiment], run.key
    path = path.resolve() if path.name in ("", "..") else path
    if (path / "run.json").is_file():
        return Store(path.parent.parent), [path.parent.name], path.name
    if path.name in Store(path.parent).experiments():
        return Store(path.parent), [path.name], None
    if names := Store(path).experiments():
        return Store(path), names, None
    below = [inner for inner in sorted(path.iterdir()) if inner.is_dir() and Store(inner).experiments()]
    hint = f"; name one of the stores in it, such as {below[0]}" if below else ""
    raise StoreError(f"{asked}: no runs in this folder{hint}")


def _counted(one: Side) -> str:
    """How many runs, and from when."""
    dates = [units.date(started) for started in sorted(run.started for run in one.runs)]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    devices = " and ".join(dict.fromkeys(run.device for run in one.runs))
    return f"{len(one.runs)} run{'s' * (len(one.runs) > 1)} on {devices}, {when}"


def _differing(found: Compared) -> list[str]:
    if not found.environments:
        return ["   machines and programs are the same"] if found.pairs else []
    told = [(name, one, two) for name, one, two in found.environments if matching.matters(name)]
    rest = [name for name, _, _ in found.environments if not matching.matters(name)]
    width = max((len(name) for name, _, _ in told), default=0)
    said = [f"   {name:{width}}  {one} -> {two}" for name, one, two in told]
    return ["they differ in:", *said, *([f"   and in {', '.join(rest)} (--json has the values)"] if rest else [])]


def _together(found: Compared) -> list[str]:
    """That all times of a device rose, where they are not judged, a line each."""
    said = []
    for device, times in found.rose_together.items() if found.percent is None else ():
        low, high = (units.significant(end, 2) for end in _ends(times))
        what = " and ".join(dict.fromkeys("trajectory" if time.scope == "trajectory" else "step" for time in times))
        often = low if low == high else f"{low} to {high}"
        percent = 25 if _ends(times)[1] > 1.25 else int(comparing.TOGETHER)
        where = f"{device}: " if len({pair.a.device for pair in found.pairs}) > 1 else ""
        said.append(f"{where}every {what} takes {often} times as long in B; no ratio can tell that: --times {percent} "
                    "makes it a failure, --rerun measures both in turns")  # fmt: skip
    return said


def _ends(times: Sequence[Time]) -> tuple[float, float]:
    """The least and the greatest ratio of these times."""
    return min(time.ratio for time in times), max(time.ratio for time in times)


def _together_content(device: str, times: Sequence[Time]) -> dict[str, Any]:
    low, high = _ends(times)
    return {"device": device, "times": len(times), "ratio_low": low, "ratio_high": high}


def _pair_lines(pair: Pair, percent: float | None) -> list[str]:
    kind = f", {pair.a.kind} weights" if pair.a.kind else ""
    head = f"{pair.a.name} -> {pair.b.name}{kind}" + (": one and the same run" if pair.same else "")
    said = [head, f"  {Path(pair.a.notebook).stem} with {inputs_line(pair.a)}", *(f"  {note}" for note in pair.notes)]
    if not pair.rows:
        said.append("  its tables hold no time ratios, bytes or quality that both have")
    cells = [_cells(row) for row in pair.rows]
    cells += [] if percent is None else [_time_cells(time, percent) for time in pair.times]
    widths = [max((len(line[place]) for line in cells), default=0) for place in range(3)]
    said += ["  " + "  ".join(f"{text:{width}}" for text, width in zip(line, [*widths, 0], strict=True)).rstrip()
             for line in cells]  # fmt: skip
    steps = [f"{arm} {units.seconds(one)} -> {units.seconds(two)}" for arm, (one, two) in pair.steps_s.items()]
    if percent is not None and pair.a.device != pair.b.device:
        said.append(f"  no seconds are judged: {pair.a.device} against {pair.b.device}")
    elif percent is None and steps:
        said.append(f"  for context, a step: {'; '.join(steps)} (not judged: no clock links the two runs)")
    return said


def _worse_cells(pair: Pair, percent: float | None) -> list[tuple[str, str, str, str]]:
    """The cells of a pair's regressions."""
    rows = [_cells(row) for row in pair.rows if row.change.worse]
    return rows + [_time_cells(time, percent) for time in pair.times if percent is not None and time.longer(percent)]


def _time_cells(time: Time, percent: float) -> tuple[str, str, str, str]:
    """The verdict on seconds, what they are of, both, and their ratio."""
    word, than = ("longer", "more than") if time.longer(percent) else ("within", "at most")
    values = f"{units.seconds(time.a_s)} -> {units.seconds(time.b_s)}"
    told = f"{units.ratio(time.ratio)} times: {than} {percent:g} % longer"
    return word, f"{time.arm}, {time.scope}", values, told


def _cells(row: Row) -> tuple[str, str, str, str]:
    """The verdict, what it is about, both values, and the change with its reason."""
    if row.table == "ablation":
        arm, baseline, scope, regime = row.about
        about = f"{arm} / {baseline}, {scope}" + ("" if regime == comparing.BURST else f", {regime}")
        values = _ratios(row)
    elif row.table == "axes":
        about, values = f"{row.about[0]}, {comparing.sizes(row.about)}", _ratios(row)
    elif row.table == "memory":
        about = f"{row.about[0]}, {reading.metric_name(row.about[2])}"
        values = f"{units.size(row.a.value)} -> {units.size(row.b.value)}"
    else:
        arm, metric, baseline = row.about
        about = f"{arm}, {reading.metric_name(metric)}" + (f" against {baseline}" if baseline else "")
        one, two = (reading.metric_value(metric, end.value) for end in (row.a, row.b))
        values = f"{one} -> {two}"
    return row.change.verdict, about, values, _change(row.change, row.table)


def _ratios(row: Row) -> str:
    return f"ratio {units.ratio(row.a.value)} -> {units.ratio(row.b.value)}"


def _change(change: Change, table: str) -> str:
    found = change.interval
    if table in comparing.TIMES:
        ends = in_words(found.low, found.high).removesuffix(" time") if found.high < math.inf else ""
        told = f"{units.ratio(found.value)} times ({ends})" if ends else ""
    elif table == "memory":
        told = "" if change.verdict == "same" else f"{units.ratio(found.value)} times"
    else:
        told = f"{units.significant(found.low)} to {units.significant(found.high)}" if found.bounded else ""
    told_too = change.verdict == "inconclusive" or (table == "quality" and change.worse)
    reason = change.reason.split(":")[0] if told_too else ""
    return ": ".join(filter(None, (told, reason)))


def _pair_content(pair: Pair, percent: float | None) -> dict[str, Any]:
    return {
        "a": pair.a.name,
        "b": pair.b.name,
        "notebook": pair.a.notebook,
        "parameters": dict(pair.a.parameters),
        "weights": pair.a.kind,
        "same_run": pair.same,
        "notes": pair.notes,
        "rows": [_row_content(row) for row in pair.rows],
        "steps_s": {arm: list(times) for arm, times in pair.steps_s.items()},
        "times": [
            {**vars(time), "ratio": time.ratio, "regression": None if percent is None else time.longer(percent)}
            for time in pair.times
        ],
    }


def _row_content(row: Row) -> dict[str, Any]:
    about = dict(zip(comparing.KEYS[row.table], row.about, strict=True))
    sizes = {name: int(text) for name, text in about.items() if name.removeprefix("beside_") in comparing.SIZE and text}
    return {
        "table": row.table,
        **about,
        **sizes,
        "a": row.a.finite(),
        "b": row.b.finite(),
        "difference" if row.change.difference else "ratio": row.change.interval.finite(),
        "noise_floor": row.noise_floor,
        "verdict": row.change.verdict,
        "reason": row.change.reason,
        "regression": row.change.worse,
    }
