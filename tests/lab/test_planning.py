"""Which runs a sweep does, in which order and company; no kernels here."""

import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.lab.making import FACTS, fake_kernels, meta, write_experiment, write_notebook
from tests.lab.test_sweep import Silent, jobs_in
from zimage import machine
from zimage.errors import BackendError, WeightsError
from zimage.lab import experiment, keys, notebook, sweep
from zimage.lab.keys import device_facts
from zimage.lab.progress import Teller, forecast, span
from zimage.lab.runner import Job
from zimage.lab.store import Run, Store

import mlx.core as mx
import pytest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_notebook(tmp_path / "notebooks" / "a.ipynb", "x = 1")
    write_experiment(tmp_path, "grid: {batch: [1, 2, 3]}\n")
    return tmp_path


def test_a_second_sweep_finds_everything_done(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is completed is not run again, unless asked for afresh; then the new run takes the old one's place."""
    ran, store, jobs = fake_kernels(monkeypatch), Store(project / "r"), jobs_in(project)
    assert len(sweep.sweep(jobs, store, Silent()).completed) == 3
    assert len(sweep.sweep(jobs, store, Silent()).found) == 3
    assert ran == [1, 2, 3]
    assert sweep.missing(jobs, store) == []
    assert len(sweep.sweep(jobs, store, Silent(), fresh=True).completed) == 3
    assert ran == [1, 2, 3, 1, 2, 3]
    assert len(store.runs("demo")) == 3


def test_a_failure_does_not_stop_the_others_and_is_tried_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs after a failed one happen, and the next sweep does only the failed one."""
    broken = [True]

    def act(job: Job) -> None:
        if broken[0] and job.parameters["batch"] == 2:
            raise ValueError("no")

    ran, store, jobs = fake_kernels(monkeypatch, act), Store(project / "r"), jobs_in(project)
    outcome = sweep.sweep(jobs, store, Silent())
    assert ([r.parameters["batch"] for r in outcome.completed], len(outcome.failed)) == ([1, 3], 1)
    broken[0] = False
    outcome = sweep.sweep(jobs, store, Silent())
    assert (len(outcome.completed), len(outcome.found)) == (1, 2)
    assert ran == [1, 2, 3, 2]
    assert all(run.completed for run in store.runs("demo"))


def test_two_sweeps_at_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps of the same runs share them: each happens once, both end with all of them, nothing is left over."""
    write_experiment(project, "grid: {batch: [1, 2, 3, 4, 5, 6]}\n")
    ran = fake_kernels(monkeypatch, lambda _: time.sleep(0.05))
    store, jobs = Store(project / "r"), jobs_in(project)
    outcomes: list[sweep.Outcome] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(sweep.sweep(jobs, Store(store.root), Silent())))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran) == [1, 2, 3, 4, 5, 6]
    assert [len(one.completed) + len(one.found) for one in outcomes] == [6, 6, 6]
    assert sorted(path.name for path in (store.root / "demo").iterdir()) == sorted(job.key for job in jobs)


def test_an_interrupted_run_leaves_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in mid-run keeps the finished runs and nothing of the interrupted one."""

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise KeyboardInterrupt

    fake_kernels(monkeypatch, act)
    store, jobs = Store(project / "r"), jobs_in(project)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(jobs, store, Silent())
    assert [path.name for path in (store.root / "demo").iterdir()] == [jobs[0].key]


def key_of(root: Path, facts: dict[str, str] = FACTS, **given: Any) -> str:
    found = notebook.read(root / "notebooks" / "a.ipynb", root)
    with patch.object(keys, "device_facts", lambda _device: facts):
        return keys.identify(found, found.resolve(given), root).key


def test_what_the_key_depends_on(project: Path) -> None:
    """Code, parameters, device, versions and MLX variables change the key; outputs, text and other facts do not."""
    base = key_of(project)
    assert len(base) == 16
    different = [
        key_of(project, batch=2),
        *(key_of(project, {**FACTS, name: "x"}) for name in ("device", "mlx", "blas", "kernels", "tuning")),
    ]
    different += [key_of(project, {**FACTS, "driver": "x"}), key_of(project, {**FACTS, "MLX_Y": "x"})]
    assert key_of(project, {**FACTS, "os": "another", "commit": "x"}) == base
    assert key_of(project, {**FACTS, **dict.fromkeys(machine.MOMENTARY, "x")}) == base
    assert key_of(project, batch=1, scale=1) == base
    path = write_notebook(project / "notebooks" / "a.ipynb", "x = 1")
    path.write_text(path.read_text().replace("# A question", "# Another").replace('"outputs": []', '"outputs": [ ]'))
    assert key_of(project) == base
    write_notebook(project / "notebooks" / "a.ipynb", "x = 2")
    different.append(key_of(project))
    assert len({base, *different}) == 1 + len(different)


def test_cells_do_not_run_together(project: Path) -> None:
    """Moving code from one cell into the next changes the key."""
    write_notebook(project / "notebooks" / "a.ipynb", "x = 1\n", "y = 2")
    one = key_of(project)
    write_notebook(project / "notebooks" / "a.ipynb", "x = 1", "\ny = 2")
    assert key_of(project) != one


def test_the_sources_are_in_the_key(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another zimage is another run."""
    base = key_of(project)
    monkeypatch.setattr(keys, "sources_digest", lambda: "another")
    assert key_of(project) != base


def test_the_weights_are_in_the_key(project: Path) -> None:
    """A notebook with a source has its weights' kind and digest with the run; a source that is none is refused."""
    path = write_notebook(project / "notebooks" / "a.ipynb", parameters='source: str = "synthetic:tiny"')
    found = notebook.read(path, project)
    identity = keys.identify(found, found.resolve({}), project)
    assert identity.weights is not None
    assert (identity.weights.kind, len(identity.weights.digest)) == ("synthetic", 64)
    assert identity.digests["weights"] == identity.weights.digest
    with pytest.raises(WeightsError):
        keys.identify(found, found.resolve({"source": "synthetic:nope"}), project)


def test_a_device_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the device's facts cannot be had, one line says why."""
    monkeypatch.setattr(keys.sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="the device cannot be asked"):
        device_facts.__wrapped__("auto")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there() -> None:
    """A GPU that this machine lacks is told in the words of who looked for it, which say what to do."""
    with pytest.raises(BackendError, match=r"^no GPU that MLX can use here; use device auto or cpu, and see `zimage"):
        device_facts.__wrapped__("gpu")


def run_of(notebook_name: str, seconds: float, **parameters: Any) -> Run:
    return Run(Path("x"), meta(notebook=notebook_name, duration_s=seconds, parameters=parameters))


def test_estimates(project: Path) -> None:
    """A run is expected to take as long as the same one did, or else as its notebook's median; else nothing is said."""
    store, jobs = Store(project / "r"), jobs_in(project)
    estimates = sweep.Estimates(store)
    assert forecast(estimates, jobs) == "time not known yet"
    for seconds, batch in [(10.0, 7), (20.0, 8), (60.0, 9)]:
        estimates.learn(run_of("notebooks/a.ipynb", seconds, batch=batch))
    estimates.learn(run_of("notebooks/a.ipynb", 100.0, **jobs[0].parameters))
    assert [estimates.of(job) for job in jobs] == [100.0, 40.0, 40.0]
    assert forecast(estimates, jobs) == "about 3 min"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_spans(seconds: float, words: str) -> None:
    """Lengths of time are as exact as an estimate deserves."""
    assert span(seconds) == words


def test_what_is_on_record(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """experiment.json has the question, what all runs share, and the run keys in order; a single run joins it."""
    fake_kernels(monkeypatch)
    store, jobs = Store(project / "r"), jobs_in(project)
    asked = experiment.read(project / "experiments" / "demo.yaml")
    sweep.note_sweep(store, asked, jobs, False, {})
    found = store.experiment("demo")
    assert (found["question"], found["run_keys"]) == ("Does it work?", [job.key for job in jobs])
    assert "batch" not in found["parameters"]
    assert found["parameters"]["dtype"] == "float32"
    sweep.sweep(jobs[:1], store, Silent())
    sweep.note_single(store, jobs[0])
    assert store.experiment("demo")["run_keys"] == [jobs[1].key, jobs[2].key, jobs[0].key]


def test_progress_in_a_pipe_is_quiet(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where nobody watches, a sweep that goes well writes nothing while it runs; a failure writes its line."""
    store, jobs = Store(project / "r"), jobs_in(project)

    def act(job: Job) -> None:
        if job.parameters["batch"] == 2:
            raise ValueError("no [bold]good[/]")

    fake_kernels(monkeypatch, act)
    with Teller(jobs, sweep.Estimates(store)) as teller:
        sweep.sweep(jobs, store, teller)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("failed: notebooks/a.ipynb: ValueError: no [bold]good[/] (as executed: ")
    assert said.err.count("\n") == 1


def test_progress_on_a_terminal(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a terminal the number of runs and the time left are shown."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    store, jobs = Store(project / "r"), jobs_in(project)
    fake_kernels(monkeypatch)
    estimates = sweep.Estimates(store)
    estimates.learn(run_of("notebooks/a.ipynb", 60.0, batch=9))
    teller = Teller(jobs, estimates)
    with teller:
        teller.begins(jobs[0])
        teller.progress.refresh()
    said = capfd.readouterr().err
    assert "0/3" in said
    assert "about 3 min left" in said
