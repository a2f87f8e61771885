"""The command line: what it prints, and its exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.making import FACTS, PARAMETERS, RECORDS, fake_kernels, write_experiment, write_notebook
from zimage import __version__, cli, machine
from zimage.lab import dashboard, keys, terminal
from zimage.lab.runner import Job
from zimage.lab.store import Store

import pytest


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keys, "device_facts", lambda _device="auto": FACTS)
    monkeypatch.setattr(machine, "facts_now", dict)
    parameters = f"{PARAMETERS}seed: int = 0\ntransforms: list = []\n"
    write_notebook(tmp_path / "notebooks" / "a.ipynb", RECORDS, parameters=parameters)
    write_experiment(tmp_path, "grid: {batch: [1, 2, 3]}\nquick: {grid: {batch: [1]}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zimage(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    status = cli.main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


SWEEP = ("sweep", "experiments/demo.yaml")


def test_sweep_says_what_it_does_and_found(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep says how many runs, then what came out, what it found and where the page is."""
    fake_kernels(monkeypatch)
    status, out, err = zimage(capsys, *SWEEP)
    assert (status, err) == (0, "")
    first, second, *found, last = out.splitlines()
    assert first == "demo: 3 runs, 3 to do, time not known yet"
    assert second.startswith("demo: 3 completed, 0 failed in ")
    assert found == ["On cpu-test-2c:", *(f"- x: m 1.00 [batch={n}]" for n in (1, 2, 3))]
    assert last == "page: results/demo/index.html"
    assert (project / "results" / "demo" / "index.html").is_file()
    status, out, _ = zimage(capsys, *SWEEP)
    assert status == 0
    assert out.startswith(
        "demo: 3 runs, all done already (--fresh runs them again)\ndemo: 0 completed, 0 failed, 3 done"
    )


@pytest.mark.usefixtures("project")
def test_doubtful_machines_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Who watches a sweep on a machine that spoils timings gets one line beside the output; nobody else does."""
    fake_kernels(monkeypatch)
    battery = FACTS | {"power_source": "Battery Power", "low_power_mode": "on"}
    monkeypatch.setattr(keys, "device_facts", lambda _device="auto": battery)
    assert zimage(capsys, *SWEEP)[2] == ""
    noted: list[str] = []
    monkeypatch.setattr(terminal, "note", noted.append)
    _, out, _ = zimage(capsys, *SWEEP, "--fresh", "--json")
    assert json.loads(out)["experiment"] == "demo"
    before = "timings may be off: on battery power; low-power mode is on (zimage doctor says more)"
    after = "Times may be off: at the start of 3 of 3 runs on battery power."
    assert noted == [before, after]
    assert after in Path("results/demo/index.html").read_text()
    assert zimage(capsys, *SWEEP)[0] == 0
    assert noted == [before, after, after]  # nothing was left to do


@pytest.mark.usefixtures("project")
def test_work_that_begins_later_is_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What kept the cores busy as a run started, after the sweep began, is one line at the end; else there is none."""
    fake_kernels(monkeypatch)
    noted: list[str] = []
    monkeypatch.setattr(terminal, "note", noted.append)
    zimage(capsys, *SWEEP)
    assert noted == []
    cores = {"device_type": "cpu", "cores": "2", "machine_cores": "2"}
    busy = iter(["0.0", "2.0", "2.0"])
    monkeypatch.setattr(machine, "facts_now", lambda facts: {**facts, **cores, "other_busy_cores": next(busy)})
    zimage(capsys, *SWEEP, "--fresh")
    assert noted == ["Times may be off: at the start of 2 of 3 runs other work keeps 2.0 of 2 CPU cores busy."]


def test_a_quick_sweep_tells_what_leaves_the_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before full runs leave the page a line says how many, and what shows them again; the store keeps them all."""
    ran = fake_kernels(monkeypatch)
    noted: list[tuple[str, int]] = []
    monkeypatch.setattr(terminal, "note", lambda line: noted.append((line, len(ran))))
    zimage(capsys, *SWEEP, "--quick")
    zimage(capsys, *SWEEP)
    assert noted == []
    write_experiment(project, "grid: {batch: [1, 2, 3]}\nquick: {grid: {batch: [4]}}\n")
    zimage(capsys, *SWEEP, "--quick", "--dry-run")
    assert noted == []
    zimage(capsys, *SWEEP, "--quick", "--json")
    text = "demo: the page will no longer show 3 runs of the full experiment; they stay in the store, and the same "
    assert noted == [(f"{text}command without --quick shows them again", 3)]
    store = Store(project / "results")
    assert (len(store.runs("demo")), len(store.current("demo"))) == (4, 1)
    zimage(capsys, *SWEEP, "--quick")  # they are gone from the page already
    assert len(noted) == 1
    zimage(capsys, *SWEEP)
    assert (len(ran), len(store.current("demo"))) == (4, 3)
    write_experiment(project, "grid: {batch: [1, 2, 5]}\nquick: {grid: {batch: [1]}}\n")
    zimage(capsys, *SWEEP, "--quick")
    assert "2 runs of" in noted[1][0] and "shows 1 of them again, as code or parameters are others now" in noted[1][0]


@pytest.mark.usefixtures("project")
def test_an_unknown_word_for_the_kernels_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep on a GPU says in one line that it takes ZIMAGE_KERNELS=offf for off; a CPU has no kernels."""
    fake_kernels(monkeypatch)
    monkeypatch.setenv("ZIMAGE_KERNELS", "offf")
    for kind, lines in (("cpu", 0), ("gpu", 1)):
        monkeypatch.setattr(keys, "device_facts", lambda _device="auto", kind=kind: FACTS | {"device_type": kind})
        status, _, err = zimage(capsys, *SWEEP, "--fresh")
        assert (status, err.count("\n"), err.count("zimage: ZIMAGE_KERNELS='offf' is not known")) == (0, lines, lines)


@pytest.mark.usefixtures("project")
def test_a_run_tells_what_it_found_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` prints the finding of its own run, not those of earlier runs with other parameters, which the page has."""
    fake_kernels(monkeypatch)
    first, second = (
        json.loads(zimage(capsys, "run", "notebooks/a.ipynb", "-p", "batch", n, "--json")[1]) for n in "12"
    )
    assert first["runs"] != second["runs"]
    assert first["finding"] == second["finding"] != ""
    assert "batch=" not in second["finding"]


def test_sweep_options(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--quick, --set, --fresh and --results do what they say, and what is done already is not counted again."""
    ran = fake_kernels(monkeypatch)
    assert zimage(capsys, *SWEEP, "--quick")[0] == 0
    assert ran == [1]
    assert zimage(capsys, *SWEEP)[1].startswith("demo: 3 runs, 1 done already, 2 to do, about ")
    assert ran == [1, 2, 3]
    assert zimage(capsys, *SWEEP, "--set", "batch=9", "--set", "label=7")[0] == 0
    assert ran == [1, 2, 3, 9]
    assert zimage(capsys, *SWEEP, "--fresh", "--quick")[0] == 0
    assert ran == [1, 2, 3, 9, 1]
    assert zimage(capsys, *SWEEP, "--quick", "--results", "elsewhere")[0] == 0
    assert (project / "elsewhere" / "index.html").is_file()


def test_dry_run(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run lists the runs and what is done, runs nothing and writes nothing."""
    ran = fake_kernels(monkeypatch)
    status, out, _ = zimage(capsys, *SWEEP, "--dry-run")
    assert (status, ran, out.count(" to do "), (project / "results").exists()) == (0, [], 4 - 1, False)
    zimage(capsys, *SWEEP, "--quick")
    lines = zimage(capsys, *SWEEP, "--dry-run")[1].splitlines()
    assert ["done" in line for line in lines[1:]] == [True, False, False]
    assert "batch=1 scale=1.0" in lines[1]


@pytest.mark.usefixtures("project")
def test_a_failing_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed run gives exit 1 and one line; the others happen and the page is built."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise ValueError("no good")

    ran = fake_kernels(monkeypatch, act)
    status, out, err = zimage(capsys, *SWEEP)
    assert (status, ran) == (1, [1, 2, 3])
    assert "demo: 2 completed, 1 failed" in out
    assert err.startswith("failed: notebooks/a.ipynb: ValueError: no good (as executed: results/demo/")
    assert "page: " in out


@pytest.mark.usefixtures("project")
def test_stopping(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C gives exit 1 and a line that says how to go on."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise KeyboardInterrupt

    fake_kernels(monkeypatch, act)
    status, _, err = zimage(capsys, *SWEEP)
    assert status == 1
    assert err == "zimage: stopped: 1 of 3 runs are done; the same command picks up there\n"


def test_json_of_runs(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--json of `sweep` and `run` lists the runs with their status, the finding and the page, and nothing else."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise ValueError("no good")

    fake_kernels(monkeypatch, act)
    planned = json.loads(zimage(capsys, *SWEEP, "--dry-run", "--json")[1])
    assert [(run["status"], run["parameters"]["batch"]) for run in planned["runs"]] == [("to do", i) for i in (1, 2, 3)]
    status, out, _ = zimage(capsys, *SWEEP, "--json")
    said = json.loads(out)
    assert (status, said["experiment"], said["page"]) == (1, "demo", "results/demo/index.html")
    states = ["completed", "failed", "completed"]
    assert said["runs"] == [
        {"key": run["key"], "status": state, "notebook": "notebooks/a.ipynb"}
        for run, state in zip(planned["runs"], states, strict=True)
    ]
    assert said["finding"].startswith("On cpu-test-2c: ")
    assert (project / said["page"]).is_file()
    status, out, _ = zimage(capsys, "run", "notebooks/a.ipynb", "--json")
    assert (status, [run["status"] for run in json.loads(out)["runs"]]) == (0, ["completed"])


def test_unwritable_results(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A store that cannot be written is exit 2 before the first run, and 1 after it; the line says what to do."""
    ran = fake_kernels(monkeypatch)
    (project / "results").mkdir()
    (project / "results" / "demo").write_text("in the way")
    status, _, err = zimage(capsys, *SWEEP)
    assert (status, ran, err.count("\n")) == (2, [], 1)
    assert err.endswith("choose another folder with --results\n")
    (project / "results" / "demo").unlink()
    (project / "results" / "assets").write_text("in the way")
    status, out, err = zimage(capsys, *SWEEP)
    assert (status, ran, out.count("\n"), err.count("\n")) == (1, [1, 2, 3], 1, 1)
    assert "assets" in err and err.endswith("choose another folder with --results\n")


def test_a_finished_sweep_in_results_to_read_only(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all runs are there and nothing can be written it says what they found, exit 0, and changes nothing."""
    ran = fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    page = project / "results" / "demo" / "index.html"
    page.write_text("as it was")
    files = {path: path.read_bytes() for path in (project / "results").rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    status, out, err = zimage(capsys, *SWEEP)
    assert (status, err) == (0, "zimage: results: cannot be written; its pages stay as they are\n")
    first, *found, last = out.splitlines()[1:]
    assert first == "demo: 0 completed, 0 failed, 3 done before"
    assert found == ["On cpu-test-2c:", *(f"- x: m 1.00 [batch={n}]" for n in (1, 2, 3))]
    assert last == "page: results/demo/index.html"
    assert {path: path.read_bytes() for path in (project / "results").rglob("*") if path.is_file()} == files
    page.unlink()
    status, out, _ = zimage(capsys, *SWEEP, "--json")
    assert (status, json.loads(out)["page"], len(ran)) == (0, None, 3)
    assert zimage(capsys, *SWEEP, "--fresh")[0] == 0 and len(ran) == 6


def test_show_of_no_run_of_an_experiment(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What starts with the name of an experiment gets the store's answer, and not one about checkpoints."""
    fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    for what in ("demo/", "demo/ffff", "demo/x"):
        assert zimage(capsys, "show", what)[::2] == (
            2, f"zimage: results: no run '{what}'; `zimage list` shows what there is\n",
        )  # fmt: skip
    path = next((project / "results" / "demo").glob("*/run.json"))
    for weights in ("x", {"kind": 3}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
        status, _, err = zimage(capsys, "show", f"demo/{path.parent.name}")
        assert (status, err.count("\n")) == (2, 1)


@pytest.mark.usefixtures("project")
def test_a_bad_experiment_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` beside an experiment.json that holds no list of runs is one line, exit 2, before anything runs."""
    ran = fake_kernels(monkeypatch)
    Path("results/a").mkdir(parents=True)
    Path("results/a/experiment.json").write_text('{"run_keys": 3}')
    status, _, err = zimage(capsys, "run", "notebooks/a.ipynb")
    assert (status, ran) == (2, [])
    assert err.startswith("zimage: results/a/experiment.json: run_keys is not a list of run keys")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("project")
def test_what_the_system_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the operating system that nobody foresaw is one line with the file and the reason, exit 2."""

    def denied(*_arguments: object, **_named: object) -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    monkeypatch.setattr(dashboard, "build", denied)
    assert zimage(capsys, "report") == (2, "", "zimage: some/file: Permission denied\n")


@pytest.mark.usefixtures("project")
def test_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`zimage run` stores one run under the notebook's name, with its parameters."""
    ran = fake_kernels(monkeypatch)
    status, out, _ = zimage(capsys, "run", "notebooks/a.ipynb", "-p", "batch", "5", "-p", "label", "7")
    assert (status, ran) == (0, [5])
    assert out.splitlines()[-1] == "page: results/a/index.html"
    found = json.loads(zimage(capsys, "list", "--json")[1])["experiments"]
    assert [(one["name"], one["runs"][0]["parameters"]["label"]) for one in found] == [("a", "7")]


def test_a_sweep_tells_of_results_that_left_the_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a sweep of other parameters, failed or not, a line says how many runs left the page and what lists them."""

    def act(job: Job) -> None:
        if job.parameters["scale"] == 9.0:
            raise ValueError("no such scale")

    fake_kernels(monkeypatch, act)
    assert "earlier" not in zimage(capsys, *SWEEP)[1]
    status, out, _ = zimage(capsys, *SWEEP, "--set", "scale=9.0")
    line = "The newest sweep has no completed run. 3 earlier completed runs are no longer on its page, as the newest "
    line += "sweep asks for others; their files are kept, and `zimage show demo` lists them."
    assert status == 1 and line in out.splitlines()
    assert line.replace("its page", "this page") in (project / "results/demo/index.html").read_text().replace(
        "&#39;", "'"
    )
    assert len(zimage(capsys, "show", "demo")[1].splitlines()) == 2 + 6
    _, out, _ = zimage(capsys, *SWEEP, "--quick", "--results", str(project / "results"))
    assert (
        "\n2 earlier completed runs are no longer" in out and f"`zimage show demo --results {project}/results`" in out
    )
    assert "earlier" not in zimage(capsys, *SWEEP)[1]


def test_tables_that_cannot_be_used_are_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report`, `list`, `show` and a dry run name a table that cannot be used; a sweep does its run again."""
    ran = fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    run = Store(project / "results").runs("demo")[0]
    run.table("quality").drop(columns="metric").to_parquet(run.path / "tables" / "quality.parquet")
    line = (
        f"zimage: skipped: table quality of run demo/{run.key} cannot be used: column metric is missing; run it again\n"
    )
    for command in (["report"], ["list"], ["show", "demo"], [*SWEEP, "--dry-run"]):
        assert zimage(capsys, *command)[2] == line, command
    assert (zimage(capsys, *SWEEP)[2], len(ran)) == ("", 4)
    run = Store(project / "results").runs("demo")[0]
    run.table("quality").drop(columns="metric").to_parquet(run.path / "tables" / "quality.parquet")
    assert zimage(capsys, *SWEEP, "--set", "scale=2.0")[2] == line


def test_list_and_show(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`list` and `show` tell what is stored, for people and as JSON, and skip with a line what is unreadable."""
    fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    status, out, err = zimage(capsys, "list")
    assert (status, err) == (0, "")
    assert out.splitlines()[:2] == ["demo: 3 completed", "  Does it work?"]
    runs = json.loads(zimage(capsys, "list", "--json")[1])["experiments"][0]["runs"]
    assert [run["parameters"]["batch"] for run in runs] == [1, 2, 3]
    assert zimage(capsys, "show", "demo")[1] == out
    key = runs[1]["key"]
    for what in (key, key[:12], f"demo/{key[:12]}"):
        status, out, _ = zimage(capsys, "show", what)
        assert status == 0
        assert out.startswith(f"demo/{key}: completed\n")
    recipe = project / "results" / "demo" / key / "recipes" / "within_error.yaml"
    recipe.parent.mkdir()
    recipe.write_text("default: null\n")
    assert f"  recipes written  {recipe.relative_to(project)}\n" in zimage(capsys, "show", key)[1]
    shown = json.loads(zimage(capsys, "show", key, "--json")[1])
    assert shown["recipes_written"] == [str(recipe.relative_to(project))]
    assert (shown["run_key"], shown["tables"]) == (key, {"quality": 1, "environment": len(shown["environment"])})
    assert shown["environment"].items() >= FACTS.items()
    (project / "results" / "demo" / key / "run.json").write_text("{")
    status, out, err = zimage(capsys, "list")
    assert status == 0
    assert out.startswith("demo: 2 completed")
    assert err.startswith("zimage: skipped: results/demo/")


def test_show_reads_the_peaks_of_old_and_new_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`show` tells the peaks that a run was recorded with, also in the form of older runs, and nothing for none."""
    fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    (path, *_) = (project / "results" / "demo").glob("*/run.json")
    content = json.loads(path.read_text())
    old = {"dtype": "float32", "float32_matmul_flops_per_s": 3e9, "float32_matmul_size": 512}
    new = {"matmul": {"float32": {"burst": 3e9, "sustained": None, "size": 512}}}
    for peaks, words in ((old, True), (new, True), (None, False), (["damaged"], False)):
        path.write_text(json.dumps(content | {"peaks": peaks}))
        status, out, err = zimage(capsys, "show", content["run_key"])
        assert (status, err) == (0, "")
        assert ("  peaks       Matmul float32 3 GFLOP/s at 512 cubed" in out) == words


def test_report(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`report` builds the pages again and says where they are."""
    fake_kernels(monkeypatch)
    zimage(capsys, *SWEEP)
    (project / "results" / "index.html").unlink()
    status, out, _ = zimage(capsys, "report", "--json")
    content = json.loads(out)
    assert status == 0
    found = "; ".join(f"x: m 1.00 [batch={n}]" for n in (1, 2, 3))
    assert content["findings"] == {"demo": f"On cpu-test-2c: {found}."}
    listed = zimage(capsys, "report")[1].splitlines()
    assert listed[:2] == ["demo: On cpu-test-2c:", "- x: m 1.00 [batch=1]"]
    assert listed[4:] == content["pages"]
    assert content["pages"] == ["results/demo/index.html", "results/index.html"]
    assert (project / "results" / "index.html").is_file()
    assert zimage(capsys, "report", "--single-file")[0] == 0
    run = next((project / "results" / "demo").glob("*/run.json"))
    run.write_text("{")
    status, _, err = zimage(capsys, "report")
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith(f"zimage: skipped: {run.relative_to(project)}: not valid JSON")


@pytest.mark.usefixtures("project")
def test_show_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    """`show` describes a checkpoint source: config, size, kind and digest."""
    status, out, _ = zimage(capsys, "show", "synthetic:tiny", "--json")
    content = json.loads(out)
    assert status == 0
    assert content["kind"] == "synthetic"
    assert content["config"]["dim"] == 64
    assert content["parameters"] > 100_000
    assert len(content["digest"]) == 64
    assert zimage(capsys, "show", "synthetic:tiny")[1].startswith("synthetic:tiny: synthetic weights\n")


WRONG = {
    "no such command": (["swep"], "No such command 'swep'"),
    "no such option": ([*SWEEP, "--quik"], "No such option '--quik'"),
    "no experiment": (["sweep"], "Missing argument"),
    "no such experiment": (["sweep", "nope.yaml"], "nope.yaml: no such file"),
    "set without value": ([*SWEEP, "--set", "batch"], "--set batch: write --set batch=VALUE"),
    "set without name": ([*SWEEP, "--set", "=1"], "--set =1: write NAME=VALUE"),
    "set twice": ([*SWEEP, "--set", "batch=1", "--set", "batch=2"], "--set batch is given twice"),
    "set unknown": ([*SWEEP, "--set", "bacth=1"], "did you mean 'batch'?"),
    "set of wrong type": ([*SWEEP, "--set", "batch=x"], "parameter 'batch' takes int, not str 'x'"),
    "set of no use": ([*SWEEP, "--set", "seed=-1"], "--set seed: notebooks/a.ipynb: seed must be an integer from 0"),
    "parameter of no use": (["run", "notebooks/a.ipynb", "-p", "seed", "-1"], "seed must be an integer from 0"),
    "parameter no list": (["run", "notebooks/a.ipynb", "-p", "sizes", "8"], "takes list[int], not int 8; write [8]"),
    "parameter no list of texts": (["run", "notebooks/a.ipynb", "-p", "transforms", "fast"], "write [fast]"),
    "no such notebook": (["run", "nope.ipynb"], "nope.ipynb: no such notebook"),
    "notebook by its name": (["run", "a"], "zimage: a: no such file; did you mean notebooks/a.ipynb?"),
    "notebook misspelt": (["run", "notebooks/aa.ipynb"], "did you mean notebooks/a.ipynb?"),
    "notebook a folder": (["run", "notebooks"], "notebooks: not a file; name a notebook"),
    "notebook an experiment": (["run", SWEEP[1]], f"not a notebook; `zimage sweep {SWEEP[1]}` does the runs"),
    "experiment by its name": (["sweep", "demo"], "zimage: demo: no such file; did you mean experiments/demo.yaml?"),
    "experiment misspelt": (["sweep", "experiments/deno.yaml"], "did you mean experiments/demo.yaml?"),
    "experiment a notebook": (["sweep", "notebooks/a.ipynb"], "file; `zimage run notebooks/a.ipynb` executes"),
    "parameter as for set": (["run", "notebooks/a.ipynb", "-p", "batch=3"], "-p batch=3: write -p batch 3"),
    "parameters as for set": (["run", "notebooks/a.ipynb", "-p", "batch=", "-p", "x", "1"], "write -p batch VALUE"),
    "set as for a parameter": ([*SWEEP, "--set", "batch", "3"], "--set batch: write --set batch=VALUE"),
    "parameter unknown": (["run", "notebooks/a.ipynb", "-p", "x", "1"], "has no parameter 'x'"),
    "parameter without value": (
        ["run", "notebooks/a.ipynb", "-p", "batch"],
        "requires 2 arguments. (see zimage run -h)",
    ),
    "parameter no YAML": (["run", "notebooks/a.ipynb", "-p", "batch", "[1"], "zimage: -p batch: not valid YAML"),
    "set no YAML": ([*SWEEP, "--set", "batch={a"], "zimage: --set batch: not valid YAML"),
    **{
        f"timeout {text}": (["run", "notebooks/a.ipynb", "--timeout", text], "'--timeout'")
        for text in ("0", "-1", "nan", "inf", "1e9", "604801", "soon")
    },
    "show nothing": (["show", "abc123"], "no run 'abc123'"),
    "show no source": (["show", "no/such"], "no/such"),
    "show nonsense": (["show", "nope"], "no run, experiment or checkpoint 'nope'"),
    "results a file": (["list", "--results", "experiments/demo.yaml"], "is not a folder"),
    "report on nothing": (["report"], "no runs to report on"),
    **{
        f"{command[0]}, results {what}": ([*command, "--results", results], message)
        for command in (["list"], ["show", "digits"], ["report"], ["run", "notebooks/a.ipynb"], [*SWEEP])
        for what, results, message in (("nameless", "", "it is empty"), ("too long", "x" * 5000, "File name too long"))
    },
    "notebook nameless": (["run", ""], "it is empty"),
    "notebook too long": (["run", "x" * 5000], "File name too long"),
    "experiment too long": (["sweep", "x" * 5000], "File name too long"),
    "source too long": (["show", "no/" + "x" * 5000], "File name too long"),
}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("case", WRONG)
def test_asked_wrongly(capsys: pytest.CaptureFixture[str], case: str) -> None:
    """A wrong question gives exit 2 and one line on standard error that starts with the command's name."""
    arguments, message = WRONG[case]
    status, out, err = zimage(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("zimage: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["", "run", "sweep", "list", "show", "report", "doctor", "lab"])
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """-h works everywhere."""
    status, out, _ = zimage(capsys, *filter(None, [command]), "-h")
    assert status == 0
    assert out.startswith(f"Usage: zimage {command}".strip())


def test_help_says_what_every_command_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal of 80 columns each command has one line, which is not cut short."""
    monkeypatch.setattr("click.formatting.FORCED_WIDTH", 80 - 2)  # what click leaves of 80 columns
    lines = zimage(capsys, "-h")[1].partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == sorted(cli.cli.commands)
    assert [line for line in lines if "..." in line or len(line) > 80] == []


def test_usage_of_lab(capsys: pytest.CaptureFixture[str]) -> None:
    """The usage of `lab` tells its own options from JupyterLab's."""
    assert zimage(capsys, "lab", "-h")[1].startswith("Usage: zimage lab [OPTIONS] [JUPYTERLAB_OPTION]...\n")


def test_lab_needs_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lab` starts JupyterLab on the nearest notebooks/ and says so if there is none."""
    monkeypatch.chdir(tmp_path)
    assert zimage(capsys, "lab")[0] == 2
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: started.append(arguments))
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "deep")
    assert zimage(capsys, "lab", "--no-browser")[0] == 0
    assert started == [[sys.executable, "-m", "jupyterlab", str(tmp_path / "notebooks"), "--no-browser"]]


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` shows each check with its advice, and exits with 1 if one fails."""
    from zimage import backend
    from zimage.doctor import Check

    checks = [Check("python", "ok", "3.11"), Check("BLAS", "warn", "reference", "install zimage[cpu]")]
    asked: list[bool] = []
    monkeypatch.setattr(backend, "doctor", lambda _results, full, _advance: asked.append(full) or checks)
    status, out, _ = zimage(capsys, "doctor")
    assert (status, out) == (0, "ok    python  3.11\nnote  BLAS    reference\n              -> install zimage[cpu]\n")
    assert zimage(capsys, "doctor", "--full")[0] == 0
    assert asked == [False, True]
    checks.append(Check("MLX", "fail", "missing", "install it"))
    status, out, _ = zimage(capsys, "doctor", "--json")
    assert (status, [one["status"] for one in json.loads(out)]) == (1, ["ok", "warn", "fail"])


def test_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On Windows one line says WSL2."""
    monkeypatch.setattr(cli, "_WINDOWS", True)
    status, out, err = zimage(capsys, "list")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "WSL2" in err


def test_help_is_light() -> None:
    """`zimage -h` loads neither pandas, pydantic, jupyter nor MLX."""
    code = "import sys; from zimage.cli import main; main(['-h']); print([m for m in %r if m in sys.modules])"
    heavy = ["pandas", "numpy", "pydantic", "papermill", "jupyter_client", "mlx.core", "plotly", "rich", "yaml"]
    done = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("module", ["zimage", "zimage.cli"])
def test_python_runs_the_command(module: str) -> None:
    """`python -m zimage` is the command, where its script is not on the path."""
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"zimage, version {__version__}\n", "")


def test_findings_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a line may take its columns, some at least; in a pipe or a file it is never broken."""
    size = os.terminal_size((100, 24))
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: size)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.columns() == 100
    size = os.terminal_size((5, 24))
    assert terminal.columns() == 40
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert terminal.columns() > 10_000


def test_closed_pipe(project: Path) -> None:
    """A reader that has seen enough (`| head -1`) causes no traceback."""
    command = [sys.executable, "-m", "zimage.cli", "show", "synthetic:tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=project) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("redirection", "said", "status"),
    [(">/dev/full", "zimage: standard output: No space left on device\n", 1), (">&-", "", 0),
     (">&- 2>&-", "", 0)],
)  # fmt: skip
def test_output_that_goes_nowhere(project: Path, redirection: str, said: str, status: int) -> None:
    """A full or closed standard output causes no traceback."""
    command = f"{sys.executable} -m zimage.cli list {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=project, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(project: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end a real run within seconds, leave no trace of it, and say how to go on."""
    write_notebook(project / "notebooks" / "a.ipynb", RECORDS, "import time; time.sleep(600)")
    command = [sys.executable, "-m", "zimage.cli", *SWEEP, "--quick"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=project, text=True) as process:
        deadline = time.monotonic() + 60
        while not list((project / "results").glob("demo/.*.partial/tables/quality.parquet")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out == "demo: 1 run, 1 to do, time not known yet\n"
    assert err.startswith("zimage: stopped: 0 of 1 runs are done; ")
    assert err.count("\n") == 1
    assert [path.name for path in (project / "results" / "demo").iterdir()] == ["experiment.json"]
