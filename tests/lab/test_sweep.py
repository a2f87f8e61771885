"""Runs and sweeps, with real kernels: what they leave in the store, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.lab.making import FACTS, RECORDS, write_experiment, write_notebook
from tests.sweeping import side_by_side
from zimage import machine
from zimage.lab import experiment, runner, sweep
from zimage.lab.runner import Job, describe_failure
from zimage.lab.store import Run, Store

import pytest

TROUBLE = """import os, time
if batch == 2:
    raise ValueError("two is\\ntoo many")
if batch == 3:
    time.sleep(600)
if batch == 4:
    os.kill(os.getpid(), 9)
"""
TIMEOUT_S = 8.0


class Silent:
    """A reporter that only counts."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.waited: list[str] = []

    def begins(self, job: Job) -> None:
        self.began.append(job.key)

    def tick(self) -> None:
        pass

    def waits(self, job: Job) -> None:
        self.waited.append(job.key)

    def ends(self, job: Job, run: Run, new: bool) -> None:
        pass

    def leaves(self, job: Job) -> None:
        pass


def jobs_in(project: Path, **options: Any) -> list[Job]:
    asked = experiment.read(project / "experiments" / "demo.yaml")
    return sweep.jobs_of(asked.name, asked.plan(**options), asked.root, asked.timeout_s)


def kernels_of(marker: str) -> list[str]:
    """Processes whose environment says that they belong to the results in `marker`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"ZIMAGE_RUN_DIR={marker}".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose notebook works, raises, hangs or dies, as its batch says; in a folder with braces and blanks."""
    root = tmp_path_factory.mktemp("a {project} of mine")
    write_notebook(root / "notebooks" / "a.ipynb", RECORDS, TROUBLE)
    write_experiment(root, "grid: {batch: [1, 2, 3, 4]}\ntimeout_s: 120\n")
    return root


@pytest.fixture(scope="module")
def swept(project: Path) -> Store:
    """The store after the four runs: a sweep waits for the one that hangs while another does the rest."""
    store, jobs = Store(project / "results {}"), jobs_in(project)
    hangs = [replace(job, timeout_s=TIMEOUT_S) for job in jobs if job.parameters["batch"] == 3]
    rest = [job for job in jobs if job.parameters["batch"] != 3]
    outcomes = side_by_side(*(partial(sweep.sweep, some, store, Silent()) for some in (rest, hangs)))
    assert [(len(one.completed), len(one.failed), len(one.found)) for one in outcomes] == [(1, 2, 0), (0, 1, 0)]
    return store


def test_a_completed_run(swept: Store) -> None:
    """A run keeps what it was asked, what it recorded and where it ran."""
    run = next(run for run in swept.runs("demo") if run.completed)
    assert run.parameters["batch"] == 1
    assert run.notebook == "notebooks/a.ipynb"
    environment = run.meta["environment"]
    assert {name: environment[name] for name in FACTS} == FACTS
    assert environment.keys() - FACTS.keys() <= set(machine.MOMENTARY)  # read again when the run began
    assert "load_average" in environment
    assert "peaks" in run.meta  # what the doctor last measured on this device, or null
    assert run.meta["weights"] is None
    assert set(run.meta["digests"]) == {"notebook", "sources"}
    assert run.meta["duration_s"] > 0
    assert run.meta["started"].endswith("+00:00")
    row = run.table("quality").iloc[0]
    assert (row["run_key"], row["experiment"], row["device"], row["arm"]) == (
        run.key,
        "demo",
        "cpu-test-2c",
        "baseline",
    )
    facts = run.table("environment")
    assert dict(zip(facts["key"], facts["value"], strict=True)) == environment


def test_the_notebook_as_executed(swept: Store, project: Path) -> None:
    """The executed notebook is kept with its parameters, and without this machine's paths."""
    run = next(run for run in swept.runs("demo") if run.completed)
    text = (run.path / "notebook.ipynb").read_text()
    content = json.loads(text)
    assert content["metadata"]["papermill"]["parameters"]["batch"] == 1
    assert str(project) not in text


def test_failures_are_kept_and_said(swept: Store) -> None:
    """A cell that raises, hangs or takes the kernel down gives a failed run with a line that names the cell."""
    said = {run.parameters["batch"]: describe_failure(run) for run in swept.runs("demo") if not run.completed}
    assert said[2] == "notebooks/a.ipynb, cell 4: ValueError: two is"
    assert said[3].endswith(f": took longer than its {TIMEOUT_S:g} s and was stopped (timeout_s)")
    assert said[4].startswith("notebooks/a.ipynb, cell 4: the kernel died")
    failed = next(run for run in swept.runs("demo") if run.parameters["batch"] == 2)
    assert "ValueError" in (failed.path / "notebook.ipynb").read_text()


def test_nothing_is_left_over(swept: Store) -> None:
    """After a sweep there are only whole runs, and no process of its runs lives."""
    assert all((path / "run.json").is_file() for path in (swept.root / "demo").iterdir())
    assert kernels_of(str(swept.root.resolve())) == []


def test_a_run_ends_with_what_is_left_of_the_time(project: Path) -> None:
    """A run that may not take its whole limit is stopped before it; then there is no run, no folder and no process."""
    (job,) = (job for job in jobs_in(project) if job.parameters["batch"] == 3)
    store, started = Store(project / "ended results"), time.monotonic()
    with store.lock(job.experiment, job.key):
        assert runner.run(replace(job, timeout_s=300.0, left_s=2.0), store) is None
    assert time.monotonic() - started < 150
    assert [*(store.root / "demo").iterdir()] == [] and kernels_of(str(store.root.resolve())) == []


def test_kill_and_resume(project: Path) -> None:
    """A sweep killed with -9 in mid-run leaves no run and no living kernel; the next one tidies up and finishes."""
    write_experiment(project, "grid: {batch: [3, 1]}\n", name="killed")
    store = Store(project / "killed results")
    code = (
        "import sys; from pathlib import Path; from tests.lab import test_sweep as t; from zimage.lab import *\n"
        "from zimage.lab import experiment, keys, sweep; from zimage.lab.store import Store\n"
        "keys.device_facts = lambda _device: t.FACTS\n"
        "asked = experiment.read(Path(sys.argv[1]))\n"
        "jobs = sweep.jobs_of(asked.name, asked.plan(), asked.root, 60)\n"
        "sweep.sweep(jobs, Store(sys.argv[2]), t.Silent())\n"
    )
    command = [sys.executable, "-c", code, str(project / "experiments" / "killed.yaml"), str(store.root)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        deadline = time.monotonic() + 60
        while not list(store.root.glob("killed/.*.partial/tables/quality.parquet")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    assert store.runs("killed") == []
    (leftover,) = store.root.glob("killed/.*.partial")
    deadline = time.monotonic() + 20
    while kernels_of(str(leftover.resolve())):
        assert time.monotonic() < deadline, "the killed sweep's kernel lives on"
        time.sleep(0.1)
    asked = experiment.read(project / "experiments" / "killed.yaml")
    jobs = sweep.jobs_of(asked.name, asked.plan(overrides={"batch": 1}), asked.root, 60)
    outcome = sweep.sweep(jobs, store, Silent())
    assert len(outcome.completed) == 1
    assert [path.name for path in (store.root / "killed").iterdir()] == [jobs[0].key]
