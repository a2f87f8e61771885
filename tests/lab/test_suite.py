"""Suites: several experiments within a stated time, each in its own folder; no kernels here."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.lab.making import fake_kernels, meta, write_experiment, write_notebook
from tests.lab.test_sweep import Silent
from zimage import cli
from zimage.errors import ExperimentError
from zimage.lab import executing, suite, sweep
from zimage.lab.files import write_json
from zimage.lab.runner import Job
from zimage.lab.store import Store
from zimage.yaml_lines import load

import pytest

SUITE = "kind: suite\nname: night\nquestion: What of it?\n"
RUN = ("sweep", "experiments/night.yaml")


def write(root: Path, text: str) -> Path:
    path = root / "experiments" / "night.yaml"
    path.write_text(SUITE + text)
    return path


def run_of(job: Job, **changes: Any) -> dict[str, Any]:
    """The run.json of an earlier run of this job."""
    named = {"experiment": job.experiment, "notebook": job.notebook.name, "parameters": job.parameters}
    return meta(job.key, **named, **changes)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experiments of one notebook, one with a parameter that the other's notebook lacks, and a suite of both."""
    write_notebook(tmp_path / "notebooks" / "a.ipynb", "x = 1")
    write_notebook(tmp_path / "notebooks" / "b.ipynb", "x = 1", parameters="batch: int = 1\nother: int = 0\n")
    write_experiment(tmp_path, "grid: {batch: [1, 2]}\nquick: {grid: {batch: [1]}}\ntimeout_s: 60\n", name="one")
    path = write_experiment(tmp_path, "grid: {batch: [1, 3]}\nquick: {grid: {batch: [4]}}\ntimeout_s: 60\n", name="two")
    path.write_text(path.read_text().replace("a.ipynb", "b.ipynb"))
    write(tmp_path, "experiments: [two.yaml, one.yaml]\nbudget_s: 3600\nquick: {experiments: [one.yaml]}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    status = cli.main([*RUN, *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_each_experiment_keeps_its_own_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs of all experiments are done in the order of the file, into the folder and page of each."""
    ran = fake_kernels(monkeypatch)
    status, out, err = said(capsys)
    assert (status, err, ran) == (0, "", [1, 3, 1, 2])
    lines = out.splitlines()
    assert lines[0] == "night: 2 experiments, 4 runs, 4 to do, time not known yet; at most 60 min"
    assert [line for line in lines if line.startswith("page: ")] == [
        "page: results/two/index.html",
        "page: results/one/index.html",
    ]
    assert lines[-1].startswith("night: 4 completed, 0 failed in ")
    assert {folder.name for folder in (project / "results").iterdir() if folder.is_dir()} == {"assets", "one", "two"}
    assert Store(project / "results").experiment("two")["question"] == "Does it work?"
    status, out, _ = said(capsys)
    assert out.splitlines()[0].startswith("night: 2 experiments, 4 runs, all done already (--fresh")
    assert out.splitlines()[-1] == "night: 0 completed, 0 failed, 4 done before"
    assert ran == [1, 3, 1, 2]


@pytest.mark.usefixtures("project")
def test_options_of_a_suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--quick takes its own list and each one's quick part; --set reaches those whose notebooks know the name."""
    ran = fake_kernels(monkeypatch)
    assert said(capsys, "--quick")[0] == 0
    assert ran == [1]
    content = json.loads(said(capsys, "--set", "other=5", "--dry-run", "--json")[1])
    assert (content["suite"], content["budget_s"]) == ("night", 3600)
    two, one = content["experiments"]
    assert [run["parameters"].get("other") for run in (*two["runs"], *one["runs"])] == [5, 5, None, None]
    assert [run["status"] for run in one["runs"]] == ["done", "to do"]
    assert ran == [1]
    done = json.loads(said(capsys, "--quick", "--fresh", "--json")[1])
    assert [one["experiment"] for one in done["experiments"]] == ["one"] and ran == [1, 1]


def test_what_does_not_fit_the_time_is_left_out_and_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that nothing is known of needs its whole time limit; known ones need what they took. The same command

    goes on with what was left out, and a dry run tells beforehand.
    """
    ran = fake_kernels(monkeypatch)
    write(project, "experiments: [one.yaml, two.yaml]\nbudget_s: 50\n")
    status, out, _ = said(capsys)
    assert (status, ran) == (0, [])
    assert out.splitlines()[0].endswith("at most 50 s, which leaves out 4")
    assert out.splitlines()[-1] == (
        "night: 0 completed, 0 failed; 4 left out for want of time: the same command goes on with them"
    )
    write_experiment(project, "grid: {batch: [1, 2]}\ntimeout_s: 20\n", name="one")
    content = json.loads(said(capsys, "--dry-run", "--json")[1])
    assert [[run["status"] for run in one["runs"]] for one in content["experiments"]] == [
        ["to do"] * 2,
        ["left out"] * 2,
    ]
    done = json.loads(said(capsys, "--json")[1])
    assert [[run["status"] for run in one["runs"]] for one in done["experiments"]] == [
        ["completed"] * 2,
        ["left out"] * 2,
    ]
    assert ran == [1, 2]
    write_experiment(project, "grid: {batch: [1, 3]}\ntimeout_s: 20\n", name="two")
    assert said(capsys)[1].splitlines()[-1].startswith("night: 2 completed, 0 failed, 2 done before")


def test_time_that_runs_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took no longer than is left, with a margin, is begun, and stopped when the time is over at the latest."""
    now = [0.0]
    limits: list[float] = []

    def act(job: Job) -> None:
        limits.append(min(job.timeout_s, job.left_s))
        now[0] += 30

    fake_kernels(monkeypatch, act)
    store = Store(project / "r")
    asked = suite.read(load(write(project, "experiments: [one.yaml]\nbudget_s: 100\n")))
    jobs = executing.part(asked.experiments[0], store, False, {"batch": 1}).jobs
    every = [*jobs, *executing.part(asked.experiments[0], store, False, {"batch": 2}).jobs]
    assert [job.timeout_s for job in every] == [60, 60]
    estimates = sweep.Estimates(store)
    budget = suite.Budget(100, estimates, lambda: now[0])
    assert len(sweep.sweep(every, store, Silent(), False, budget).completed) == 2
    estimates.exact = lambda _job: 20.0  # type: ignore[method-assign]
    outcome = sweep.sweep(every, store, Silent(), True, budget)
    assert (len(outcome.completed), len(outcome.left_out)) == (1, 1)
    assert (limits, budget.left_s) == ([60, 60, 40], 10)


def test_other_parameters_tell_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run of the same notebook is no reason to begin a run that was never done; its time limit is."""
    fake_kernels(monkeypatch)
    store = Store(project / "r")
    asked = suite.read(load(write(project, "experiments: [one.yaml]\nbudget_s: 59\n")))
    quick, full = executing.part(asked.experiments[0], store, False, {}).jobs
    write_json(store.root / "one" / quick.key / "run.json", run_of(quick, duration_s=12.0))
    estimates = sweep.Estimates(store)
    assert (estimates.of(full), suite.needed_s(full, estimates)) == (12.0, 60)
    assert suite.needed_s(quick, estimates) == 18
    assert suite.not_in_time([quick, full], estimates, 59) == [full]
    outcome = sweep.sweep([full, quick], store, Silent(), True, suite.Budget(59, estimates, lambda: 0.0))
    assert ([run.key for run in outcome.completed], outcome.left_out) == ([quick.key], [full])


def test_a_run_that_the_budget_ends_is_left_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure, nothing of it is kept, and with --fresh the earlier completed run stays."""

    def act(_job: Job) -> None:
        time.sleep(0.02)
        raise ValueError("stopped")

    fake_kernels(monkeypatch, act)
    store = Store(project / "r")
    asked = suite.read(load(write(project, "experiments: [one.yaml]\nbudget_s: 0.01\n")))
    (job,) = executing.part(asked.experiments[0], store, False, {"batch": 1}).jobs
    before = run_of(job, duration_s=0.001)
    write_json(store.root / "one" / job.key / "run.json", before)
    outcome = sweep.sweep([job], store, Silent(), True, suite.Budget(0.01, sweep.Estimates(store), lambda: 0.0))
    assert (outcome.failed, outcome.left_out) == ([], [job])
    (run,) = store.runs("one")
    assert run.meta == before and {path.name for path in (store.root / "one").iterdir()} == {job.key}
    limited = replace(job, timeout_s=0.01)
    outcome = sweep.sweep([limited], store, Silent(), True, suite.Budget(9, sweep.Estimates(store), lambda: 0.0))
    assert (len(outcome.failed), outcome.left_out) == (1, [])


def test_waiting_for_another_process_ends_with_the_time(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another process is at is left out once the time is over."""
    fake_kernels(monkeypatch)
    store = Store(project / "r")
    (job,) = executing.part(suite.read(load(project / RUN[1])).experiments[0], store, False, {"batch": 1}).jobs
    reporter = Silent()
    with store.lock(job.experiment, job.key):
        outcome = sweep.sweep([job], store, reporter, False, suite.Budget(0.3, sweep.Estimates(store)))
    assert (outcome.left_out, reporter.waited, reporter.began) == ([job], [job.key], [])


def test_what_was_not_reached_keeps_its_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An experiment none of whose runs was done or found, after it changed, shows its earlier runs."""
    ran = fake_kernels(monkeypatch)
    assert said(capsys)[0] == 0
    page, store = project / "results" / "one" / "index.html", Store(project / "results")
    before, text = store.experiment("one"), page.read_text()
    write_experiment(project, "grid: {batch: [5, 6]}\ntimeout_s: 9000\n", name="one")
    status, out, _ = said(capsys)
    assert (status, len(ran), out.count("page: ")) == (0, 4, 1) and "one: 0 completed, 0 failed; 2 left out" in out
    assert (store.experiment("one"), page.read_text()) == (before, text)


@pytest.mark.usefixtures("project")
def test_a_failure_in_one_stops_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed run is told with its line, the experiments after it are done, and the exit status is 1."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 3:
            raise ValueError("no good")

    ran = fake_kernels(monkeypatch, act)
    status, out, err = said(capsys)
    assert (status, ran) == (1, [1, 3, 1, 2])
    assert err.startswith("failed: notebooks/b.ipynb: ValueError: no good")
    assert "night: 3 completed, 1 failed in " in out


@pytest.mark.usefixtures("project")
def test_a_stopped_suite_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C keeps what is done of all experiments."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise KeyboardInterrupt

    fake_kernels(monkeypatch, act)
    status, _, err = said(capsys)
    assert (status, err) == (1, "zimage: stopped: 3 of 4 runs are done; the same command picks up there\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experiments: [one.yaml]\nbudget_s: 9\nextra: 1\n", "night.yaml:6: unknown key 'extra'"),
        ("experiments: [one.yaml]\n", "key 'budget_s' is missing"),
        ("experiments: [one.yaml]\nbudget_s: 0\n", "night.yaml:5: 'budget_s' must be greater than 0"),
        ("experiments: []\nbudget_s: 9\n", "night.yaml:4: 'experiments' must not be empty"),
        ("experiments:\n  - one.yaml\n  - nope.yaml\nbudget_s: 9\n", "night.yaml:6: experiment 'nope.yaml' not found"),
        ("experiments: [night.yaml]\nbudget_s: 9\n", "night.yaml:4: night.yaml is this suite itself"),
        ("experiments: [../experiments/night.yaml]\nbudget_s: 9\n", "is this suite itself"),
        ("experiments: [other.yaml]\nbudget_s: 9\n", "night.yaml:4: other.yaml is a suite; list its experiments"),
        ("experiments: [one.yaml, one.yaml]\nbudget_s: 9\n", "'one.yaml' is there twice"),
        ("experiments: [one.yaml, same.yaml]\nbudget_s: 9\n", "same.yaml and one.yaml are both called 'one'"),
        ("experiments: [bad.yaml]\nbudget_s: 9\n", "bad.yaml:5: unknown key 'gird'"),
        (
            "experiments: [one.yaml]\nbudget_s: 9\nquick:\n  experiments: [nope.yaml]\n",
            "night.yaml:7: experiment 'nope.yaml' not found",
        ),
    ],
)
def test_a_bad_suite_is_one_line(text: str, words: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with a suite, in the half that is not asked for too, is refused with the line, status 2."""
    (project / "experiments" / "other.yaml").write_text("kind: suite\n")
    (project / "experiments" / "same.yaml").write_text((project / "experiments" / "one.yaml").read_text())
    write_experiment(project, "gird: {}\n", name="bad")
    write(project, text)
    status, out, err = said(capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_quick_needs_its_own_list(project: Path) -> None:
    """A suite without a quick part refuses --quick."""
    path = write(project, "experiments: [one.yaml]\nbudget_s: 9\n")
    with pytest.raises(ExperimentError, match="has no 'quick' part"):
        suite.read(load(path), quick=True)
