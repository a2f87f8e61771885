"""Suite files: several experiments, done one after the other within a stated time.

    kind: suite
    name: overnight
    question: What do all experiments say about this device at the real size?
    experiments: [scaling.yaml, fusions.yaml]  # beside this file, in this order
    budget_s: 28800                            # no run is started that may take longer than what is left of this
    quick: {experiments: [scaling.yaml]}       # with --quick: these, each with its own quick part

Each experiment keeps its own folder and page in the store, whoever asks for it.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from zimage.errors import ExperimentError, StoreError
from zimage.lab import experiment
from zimage.lab.experiment import MAX_TIMEOUT_S, Experiment
from zimage.lab.runner import Job
from zimage.lab.store import check_name
from zimage.lab.sweep import Estimates
from zimage.strict import Strict, short, validate
from zimage.yaml_lines import Document, Place, load

from pydantic import Field

MARGIN = 1.5  # by which a run may take longer than it did before


class _Quick(Strict):
    experiments: list[str] = Field(min_length=1)


class _File(Strict):
    kind: Literal["suite"]
    name: str
    question: str
    experiments: list[str] = Field(min_length=1)
    budget_s: float = Field(gt=0, le=MAX_TIMEOUT_S)
    quick: _Quick | None = None


@dataclass(frozen=True)
class Suite:
    """A checked suite file with its experiments read."""

    name: str
    question: str
    budget_s: float
    experiments: tuple[Experiment, ...]


def is_one(document: Document) -> bool:
    """Whether a file says that it is a suite."""
    return isinstance(document.value, dict) and document.value.get("kind") == "suite"


def read(document: Document, quick: bool = False) -> Suite:
    """The suite in a file; with `quick` its quick half. Both halves are checked.

    Raises ExperimentError, with file and line, for what is no suite file, and for an experiment that is missing,
    faulty, there twice, a suite itself or called as another; also where `quick` is asked for and there is no such part.
    """
    file = validate(document, _File, "a suite file", "suite")
    try:
        check_name(file.name)
    except StoreError as error:
        raise document.error(("name",), str(error)) from None
    known: dict[str, Experiment] = {}
    full = _members(document, ("experiments",), file.experiments, known)
    small = _members(document, ("quick", "experiments"), file.quick.experiments if file.quick else [], known)
    if quick and file.quick is None:
        raise ExperimentError(f"{document.path}: has no 'quick' part; write one or leave --quick out")
    return Suite(file.name, file.question, file.budget_s, tuple(small if quick else full))


def _members(document: Document, place: Place, listed: Sequence[str], known: dict[str, Experiment]) -> list[Experiment]:
    """The experiments of one half, those in `known` not read again."""
    found: dict[str, Experiment] = {}
    for index, name in enumerate(listed):
        here = (*place, index)
        if name in found:
            raise document.error(here, f"experiment {short(name)} is there twice")
        found[name] = known.get(name) or _member(document, here, name)
        known[name] = found[name]
        same = [other for other, one in found.items() if one.name == found[name].name and other != name]
        if same:
            raise document.error(here, f"{name} and {same[0]} are both called {found[name].name!r}; rename one")
    return list(found.values())


def _member(document: Document, place: Place, name: str) -> Experiment:
    path = Path(document.path).parent / name
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise document.error(place, f"experiment {short(name)} not found; paths are relative to {path.parent}")
    if os.path.samefile(path, document.path):
        raise document.error(place, f"{name} is this suite itself; list experiments")
    if is_one(load(path)):
        raise document.error(place, f"{name} is a suite; list its experiments instead")
    return experiment.read(path)


class Budget:
    """What is left of the time that a suite may take. `clock` gives seconds."""

    def __init__(self, seconds: float, estimates: Estimates, clock: Callable[[], float] = time.monotonic) -> None:
        self._end, self._clock, self._estimates = clock() + seconds, clock, estimates

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 or more."""
        return max(0.0, self._end - self._clock())

    def grant(self, job: Job) -> Job | None:
        """The job, to be stopped when the time is over at the latest; None where it may take longer than is left."""
        left = self.left_s
        return None if left <= 0 or needed_s(job, self._estimates) > left else replace(job, left_s=left)


def needed_s(job: Job, estimates: Estimates) -> float:
    """Seconds that have to be left for `job` to be started: its time limit, or less if the very same run took less.

    What the notebook took with other parameters says nothing here: a larger model may take a thousand times as long.
    """
    before = estimates.exact(job)
    return job.timeout_s if before is None else min(job.timeout_s, MARGIN * before)


def not_in_time(jobs: Sequence[Job], estimates: Estimates, budget_s: float) -> list[Job]:
    """Of jobs to do, those that `Budget` leaves out if each takes what it took, and those not known yet no time."""
    spent, left_out = 0.0, []
    for job in jobs:
        if spent + needed_s(job, estimates) > budget_s:
            left_out.append(job)
        else:
            spent += estimates.exact(job) or 0.0
    return left_out
