"""A sweep: the runs of an experiment that the store does not have yet, one after the other."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zimage.lab import keys, runner
from zimage.lab.experiment import Experiment, Planned
from zimage.lab.runner import Job
from zimage.lab.store import Run, Store


class Limit(Protocol):
    """What time the runs of a sweep have together."""

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 or more."""

    def grant(self, job: Job) -> Job | None:
        """The job as it may be done, or None where it is to be left out."""


class _NoLimit:
    left_s = math.inf

    def grant(self, job: Job) -> Job:
        return job


NO_LIMIT = _NoLimit()


class Reporter(Protocol):
    """Who is told how a sweep goes."""

    def begins(self, job: Job) -> None:
        """A run starts."""

    def tick(self) -> None:
        """A moment has passed."""

    def waits(self, job: Job) -> None:
        """Another process is at this run; we wait for it."""

    def ends(self, job: Job, run: Run, new: bool) -> None:
        """A run is in the store; `new` if it was not there when the sweep came to it."""

    def leaves(self, job: Job) -> None:
        """A run is left out, for want of time."""


@dataclass
class Outcome:
    """What became of a sweep's runs: executed here, found in the store, or left out for want of time."""

    completed: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    found: list[Run] = field(default_factory=list)
    left_out: list[Job] = field(default_factory=list)


def jobs_of(experiment: str, planned: Sequence[Planned], root: Path, timeout_s: float) -> list[Job]:
    """The planned runs with their keys, each once. Raises WeightsError for a source that cannot be had."""
    jobs: dict[str, Job] = {}
    for one in planned:
        identity = keys.identify(one.notebook, one.parameters, root)
        jobs.setdefault(identity.key, Job(experiment, one.notebook, one.parameters, identity, root, timeout_s))
    return list(jobs.values())


def missing(jobs: Sequence[Job], store: Store, fresh: bool = False) -> list[Job]:
    """The jobs that are not in the store as completed runs; all of them if `fresh`."""
    return [job for job in jobs if fresh or store.done(job.experiment, job.key) is None]


def sweep(
    jobs: Sequence[Job],
    store: Store,
    reporter: Reporter,
    fresh: bool = False,
    limit: Limit = NO_LIMIT,
    note: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the jobs that the store lacks, in order; those that another process is at come last, and are waited for.

    A failed run is kept with its error and the others go on. note: called before the first job that is done or found.
    Raises StoreError if the store cannot be written.
    """
    for name in dict.fromkeys(job.experiment for job in jobs):
        store.tidy(name)
    mine = _Sweep(store, reporter, limit, note)
    busy = [job for job in jobs if not mine.do(job, fresh, 0)]
    for job in busy:
        reporter.waits(job)
        # What the other process has just done is as fresh as it gets.
        if not mine.do(job, False, limit.left_s):
            mine.leave(job)
    return mine.outcome


@dataclass
class _Sweep:
    """A sweep on its way."""

    store: Store
    reporter: Reporter
    limit: Limit
    note: Callable[[], None]
    outcome: Outcome = field(default_factory=Outcome)
    noted: bool = False

    def do(self, job: Job, fresh: bool, wait_s: float) -> bool:
        """Do one job unless it is done or not granted. False if another process is still at it after `wait_s`."""
        with self.store.lock(job.experiment, job.key, wait_s=wait_s) as mine:
            if not mine:
                return False
            found = None if fresh else self.store.done(job.experiment, job.key)
            granted = self.limit.grant(job) if found is None else job
            if granted is None:
                self.leave(job)
                return True
            if not self.noted:
                self.note()
                self.noted = True
            if found is not None:
                self.outcome.found.append(found)
                self.reporter.ends(job, found, new=False)
                return True
            self.reporter.begins(job)
            run = runner.run(granted, self.store, self.reporter.tick)
        if run is None:
            self.leave(job)
        else:
            (self.outcome.completed if run.completed else self.outcome.failed).append(run)
            self.reporter.ends(job, run, new=True)
        return True

    def leave(self, job: Job) -> None:
        """Leave a job out for want of time."""
        self.outcome.left_out.append(job)
        self.reporter.leaves(job)


def note_sweep(
    store: Store, experiment: Experiment, jobs: Sequence[Job], quick: bool, overrides: dict[str, Any]
) -> None:
    """Put on record what this sweep asks for."""
    common = dict(jobs[0].parameters)
    for job in jobs:
        common = {name: value for name, value in common.items() if job.parameters.get(name, value) == value}
    store.write_experiment(
        experiment.name,
        {
            "schema": 1,
            "name": experiment.name,
            "question": experiment.question,
            "notebooks": [notebook.name for notebook in experiment.notebooks],
            "parameters": common,
            "quick": quick,
            "overrides": overrides,
            "run_keys": [job.key for job in jobs],
        },
    )


def note_single(store: Store, job: Job) -> None:
    """Put a run that no sweep asked for on record, in place of one of the same notebook and parameters."""
    known = store.experiment(job.experiment)
    old = {
        r.key for r in store.runs(job.experiment) if (r.notebook, r.parameters) == (job.notebook.name, job.parameters)
    }
    before = [key for key in known.get("run_keys", []) if key not in old and key != job.key]
    blank = {
        "schema": 1,
        "name": job.experiment,
        "question": job.notebook.title,
        "notebooks": [job.notebook.name],
        "parameters": {},
    }
    store.write_experiment(job.experiment, {**blank, **known, "run_keys": [*before, job.key]})


class Estimates:
    """How long runs take, from earlier ones on their device: with the same parameters, or else of the same notebook."""

    def __init__(self, store: Store) -> None:
        self._exact: dict[tuple[str, str, str], float] = {}
        self._notebook: dict[tuple[str, str], list[float]] = {}
        for name in store.experiments():
            for run in store.runs(name):
                if run.completed:
                    self.learn(run)

    def learn(self, run: Run) -> None:
        """Take account of a run that has ended."""
        seconds = float(run.meta["duration_s"])
        self._exact[run.device, run.notebook, repr(sorted(run.parameters.items()))] = seconds
        self._notebook.setdefault((run.device, run.notebook), []).append(seconds)

    def exact(self, job: Job) -> float | None:
        """Seconds that `job` took with the same parameters, or None if it has not run."""
        return self._exact.get((job.facts["device"], job.notebook.name, repr(sorted(job.parameters.items()))))

    def of(self, job: Job) -> float | None:
        """Seconds that `job` may take, or None if nothing is known."""
        if (exact := self.exact(job)) is not None:
            return exact
        known = self._notebook.get((job.facts["device"], job.notebook.name))
        return statistics.median(known) if known else None

    def total(self, jobs: Sequence[Job]) -> tuple[float, int]:
        """Seconds for those jobs of which something is known, and how many the others are."""
        times = [self.of(job) for job in jobs]
        known = [time for time in times if time is not None]
        return sum(known), len(times) - len(known)
