"""Runs done for a command: what is said before and after, and the exit status."""

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zimage import machine, trust
from zimage.errors import StoreError, ZImageError
from zimage.lab import dashboard, fitting, sweep, terminal
from zimage.lab.experiment import Experiment, Values
from zimage.lab.progress import Teller, forecast, span
from zimage.lab.runner import Job
from zimage.lab.store import Store
from zimage.lab.suite import Budget, Suite, not_in_time
from zimage.lab.sweep import Estimates, Outcome
from zimage.lab.terminal import columns, complain, link, say, show


@dataclass(frozen=True)
class Part:
    """The runs of one experiment, what puts on record that they are asked for, and what this takes off its page."""

    jobs: Sequence[Job]
    note: Callable[[], None]
    hides: Callable[[], str] = str


def part(asked: Experiment, store: Store, quick: bool, forced: Values) -> Part:
    """The runs of an experiment. Those of the forced parameters that none of its notebooks knows are left to others."""
    known = {name: v for name, v in forced.items() if any(name in one.parameters for one in asked.notebooks)}
    jobs = sweep.jobs_of(asked.name, asked.plan(quick=quick, overrides=known), asked.root, asked.timeout_s)
    note = functools.partial(sweep.note_sweep, store, asked, jobs, quick, known)
    return Part(jobs, note, functools.partial(_hidden, store, asked, jobs, known)) if quick else Part(jobs, note)


def _hidden(store: Store, asked: Experiment, jobs: Sequence[Job], overrides: Values) -> str:
    """What a quick sweep takes off the experiment's page that a full one put there, "" for nothing."""
    quick = {job.key for job in jobs}
    try:
        full = store.experiment(asked.name).get("quick") is False
        keys = {run.key for run in store.current(asked.name) if run.completed and run.key not in quick}
    except StoreError:
        return ""
    again = keys & _keys_of_all(asked, overrides) if keys else keys
    hidden = keys if full else again
    if not hidden:
        return ""
    some = f"{len(again)} of them" if again else "none of them"
    shows = "shows them again" if again == hidden else f"shows {some} again, as code or parameters are others now"
    count = f"{len(hidden)} run{'s' * (len(hidden) > 1)}"
    return (
        f"{asked.name}: the page will no longer show {count} of the full experiment; they stay in the store, and the "
        f"same command without --quick {shows}"
    )


def _keys_of_all(asked: Experiment, overrides: Values) -> set[str]:
    """The keys of all runs of an experiment, none where they cannot be had."""
    try:
        planned = asked.plan(overrides=overrides)
        return {job.key for job in sweep.jobs_of(asked.name, planned, asked.root, asked.timeout_s)}
    except ZImageError:
        return set()


def execute(
    parts: Sequence[Part], store: Store, fresh: bool, as_json: bool, force: bool = False, suite: Suite | None = None
) -> int:
    """Do the runs of each part, build its page, say what came out. With a suite as long as they fit its time.

    Unless a run was started, an unwritable store is status 2, or 0 where all is there and on record. Raises InputError
    for a run that does not fit the device, before anything is done, unless `force`.
    """
    jobs = [job for part in parts for job in part.jobs]
    to_do = sweep.missing(jobs, store, fresh)
    fitting.check(to_do, force)
    estimates = Estimates(store)
    if not as_json:
        say(_beforehand(jobs, to_do, estimates, suite))
    if to_do and (doubt := machine.warning(jobs[0].facts)):
        terminal.note(doubt)
    if to_do and jobs[0].facts.get("device_type") == "gpu" and (doubt := trust.doubt()):
        complain(doubt)
    for part in parts:
        if hides := part.hides():
            terminal.note(hides)
    closed = not to_do and all(_is_closed(part, store) for part in parts)
    if closed:
        complain(f"{store.root}: cannot be written; its pages stay as they are")
    started = time.monotonic()
    limit = sweep.NO_LIMIT if suite is None else Budget(suite.budget_s, estimates)
    teller, told = Teller(jobs, estimates), []
    try:
        with _farewells(), machine.awake(), teller:
            for part in parts:
                told.append(_found(part, store) if closed else _do(part, store, teller, fresh, limit))
    except KeyboardInterrupt:
        done = len(jobs) - len(sweep.missing(jobs, store))
        complain(
            f"stopped: {done} of {len(jobs)} runs are done; the same command {'without --fresh ' * fresh}picks up there"
        )
        return 1
    except StoreError as error:
        complain(str(error))
        return 2 if teller.current is None else 1
    content, lines = told[0][1], [line for _, _, some in told for line in some]
    whole = Outcome(*([one for came, _, _ in told for one in getattr(came, part.name)] for part in fields(Outcome)))
    if suite is not None:
        content = {"suite": suite.name, "budget_s": suite.budget_s, "experiments": [one for _, one, _ in told]}
        lines.append(f"{suite.name}: {_counts(whole, time.monotonic() - started)}")
    show(content, as_json, lambda: lines)
    for doubt in machine.doubts([run.facts for run in (*whole.completed, *whole.found)]):
        terminal.note(doubt)
    _tell_unusable(parts, store)
    return 1 if whole.failed else 0


def _do(
    part: Part, store: Store, teller: Teller, fresh: bool, limit: sweep.Limit
) -> tuple[Outcome, dict[str, Any], list[str]]:
    """Do the jobs of one experiment and build its page: what came of them, the same for programs, and in lines.

    What the time did not reach keeps its record and page as they were.
    """
    name, started = part.jobs[0].experiment, time.monotonic()
    outcome = sweep.sweep(part.jobs, store, teller, fresh, limit, part.note)
    took_s = time.monotonic() - started
    page = None
    if outcome.completed or outcome.failed or outcome.found:
        page = dashboard.build(store, [name])[0]  # before anything is printed: whoever reads may have closed the pipe
    return outcome, *_told(part, store, outcome, took_s, page)


def _is_closed(part: Part, store: Store) -> bool:
    """Whether an experiment cannot be written, and need not be: its record asks for all of these jobs already."""
    name = part.jobs[0].experiment
    return not store.writable(name) and {job.key for job in part.jobs} <= {run.key for run in store.current(name)}


def _found(part: Part, store: Store) -> tuple[Outcome, dict[str, Any], list[str]]:
    """The same as `_do` of jobs that are all done, in a store that cannot be written."""
    name = part.jobs[0].experiment
    there = [store.done(name, job.key) for job in part.jobs]
    outcome = Outcome(found=[run for run in there if run is not None])
    page = store.root / name / "index.html"
    return outcome, *_told(part, store, outcome, 0.0, page if page.is_file() else None)


def _told(
    part: Part, store: Store, outcome: Outcome, took_s: float, page: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """What came of the jobs of one experiment, for programs and in lines."""
    jobs, name = part.jobs, part.jobs[0].experiment
    said = f"{name}: {_counts(outcome, took_s)}"
    ended = {run.key: run.status for run in (*outcome.completed, *outcome.failed, *outcome.found)}
    runs = [{"key": j.key, "status": ended.get(j.key, "left out"), "notebook": j.notebook.name} for j in jobs]
    content = {"experiment": name, "runs": runs, "finding": None, "page": None if page is None else str(page)}
    if not ended:
        return content, [said]
    finding = dashboard.findings(store, name, {job.key for job in jobs})
    kept = filter(None, [dashboard.earlier(store, name)])
    where = [] if page is None else [f"page: {link(page)}"]
    return content | {"finding": finding.sentence}, [said, *finding.lines(columns()), *kept, *where]


def _counts(outcome: Outcome, took_s: float) -> str:
    """How many runs came to what, and how long that took."""
    text = f"{len(outcome.completed)} completed, {len(outcome.failed)} failed"
    if outcome.found:
        text += f", {len(outcome.found)} done before"
    if outcome.completed or outcome.failed:
        text += f" in {span(took_s)}"
    if outcome.left_out:
        text += f"; {len(outcome.left_out)} left out for want of time: the same command goes on with them"
    return text


@contextmanager
def _farewells() -> Iterator[None]:
    """Let a batch system's or a closing terminal's signal end things as tidily as Ctrl-C."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beforehand(jobs: Sequence[Job], to_do: Sequence[Job], estimates: Estimates, suite: Suite | None) -> str:
    """How many runs there are, how many of them are to do, and how long that may take."""
    runs = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"
    what = (
        f"{len(to_do)} to do, {forecast(estimates, to_do)}" if to_do else "all done already (--fresh runs them again)"
    )
    done = f"{len(jobs) - len(to_do)} done already, " if to_do and len(to_do) < len(jobs) else ""
    if suite is None:
        return f"{jobs[0].experiment}: {runs}, {done}{what}"
    several = f"{len(suite.experiments)} experiment{'' if len(suite.experiments) == 1 else 's'}"
    text = f"{suite.name}: {several}, {runs}, {done}{what}; at most {span(suite.budget_s)}"
    beyond = len(not_in_time(to_do, estimates, suite.budget_s))
    return f"{text}, which leaves out {beyond}" if beyond else text


def plan(parts: Sequence[Part], store: Store, fresh: bool, as_json: bool, suite: Suite | None = None) -> None:
    """Say what a sweep would do: its runs, which of them are to do, and whether they fit the device and the time."""
    jobs, estimates = [job for part in parts for job in part.jobs], Estimates(store)
    to_do = sweep.missing(jobs, store, fresh)
    states = {id(job): "to do" for job in to_do}
    if suite is not None:
        states |= {id(job): "left out" for job in not_in_time(to_do, estimates, suite.budget_s)}
    planned = [_planned(part.jobs, states) for part in parts]
    content, lines = planned[0][0], [line for _, some in planned for line in some]
    if suite is not None:
        content = {"suite": suite.name, "budget_s": suite.budget_s, "experiments": [one for one, _ in planned]}
        lines = [line for one, some in planned for line in (f"{one['experiment']}:", *some)]
    terminal.show(content, as_json, lambda: [_beforehand(jobs, to_do, estimates, suite), *lines])
    _tell_unusable(parts, store)


def _tell_unusable(parts: Sequence[Part], store: Store) -> None:
    """Say what of the parts' experiments cannot be read or used, a line each."""
    names = dict.fromkeys(part.jobs[0].experiment for part in parts)
    terminal.skipped([problem for name in names for problem in store.scan(name)[1]])


def _planned(jobs: Sequence[Job], states: Mapping[int, str]) -> tuple[dict[str, Any], list[str]]:
    """The runs of one experiment, for programs and a line each; `states` by a job's id, "done" where it has none."""
    runs, lines = [], []
    for job in jobs:
        state, fit = states.get(id(job), "done"), fitting.of_job(job)
        about = {"key": job.key, "status": state, "notebook": job.notebook.name, "parameters": job.parameters}
        runs.append({**about, "fit": fitting.content(fit)})
        shown = [f"{name}={value}" for name, value in job.parameters.items()] + ([f"({fit})"] if fit else [])
        lines.append(f"  {job.key}  {state:5}  {job.notebook.name}  {' '.join(shown)}")
    return {"experiment": jobs[0].experiment, "runs": runs}, lines
