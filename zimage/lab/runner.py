"""One run: a notebook executed in a process of its own, and its folder put into the store, whole or not at all."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import zimage
from zimage import choices, machine
from zimage.lab import keys
from zimage.lab.notebook import Notebook
from zimage.lab.recording import append_rows
from zimage.lab.store import SCHEMA_VERSION, Run, Store
from zimage.measure import peaks

_POLL_S = 0.2
_ADDED_TAGS = {"papermill-error-cell-tag", "injected-parameters"}  # of cells that papermill puts in
_END_S = 5.0  # for a worker to kill its kernel once its pipe is closed


@dataclass(frozen=True)
class Job:
    """A run to do, with its identity known."""

    experiment: str
    notebook: Notebook
    parameters: dict[str, Any]
    identity: keys.Identity
    root: Path  # the kernel's working folder
    timeout_s: float
    left_s: float = math.inf  # to several runs together; one that this ends is not kept

    @property
    def key(self) -> str:
        """The run key."""
        return self.identity.key

    @property
    def facts(self) -> dict[str, str]:
        """What is known about the device it is for."""
        return self.identity.facts


def run(job: Job, store: Store, tick: Callable[[], None] = lambda: None) -> Run | None:
    """Execute `job` and put it into `store`; a failed run is kept too, with its error. The caller holds its lock.

    None, and the store as it was, where what is left of the time ended it and not its own limit. tick is called
    a few times a second meanwhile. Raises StoreError when the store cannot be written. On Ctrl-C the processes are
    ended and nothing is left behind.
    """
    partial = store.begin(job.experiment, job.key)
    facts = machine.facts_now(job.facts)  # a sweep may take hours, and the machine has warmed up since it began
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="zimage-", ignore_cleanup_errors=True) as scratch:
            error = _execute(job, partial, Path(scratch), tick)
        duration = time.monotonic() - clock
        if error is not None and job.left_s < job.timeout_s and duration >= job.left_s:
            return None  # cut short, which says nothing of the run
        failed_cell = _tidy_notebook(job, partial / "notebook.ipynb")
        _keep_environment(job, facts, partial)
        meta = {
            "schema": SCHEMA_VERSION,
            "status": "completed" if error is None else "failed",
            "experiment": job.experiment,
            "run_key": job.key,
            "notebook": job.notebook.name,
            "parameters": job.parameters,
            "device": job.facts["device"],
            "environment": facts,
            "peaks": peaks.kept(facts["device"], facts),
            "choices": choices.copied(facts),
            "weights": keys.weights_meta(job.identity.weights),
            "digests": job.identity.digests,
            **({} if job.identity.recipe is None else {"recipe": job.identity.recipe}),
            **({"recipes": job.identity.recipes} if job.identity.recipes else {}),
            "started": started.isoformat(timespec="seconds"),
            "duration_s": round(duration, 3),
            "versions": keys.versions(),
            "error": error,
            "failed_cell": None if error is None else failed_cell,
        }
        return store.commit(partial, meta)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def describe_failure(run: Run) -> str:
    """One line: the notebook, the cell and what was raised."""
    cell = run.meta.get("failed_cell")
    return f"{run.notebook}{f', cell {cell}' if cell else ''}: {run.meta.get('error')}"


def _execute(job: Job, partial: Path, scratch: Path, tick: Callable[[], None]) -> str | None:
    """Run the worker to its end or the time limit. None if all went well, else what did not, in one line."""
    result, log = scratch / "result.json", scratch / "log.txt"
    order = {
        "notebook": str(job.notebook.path.resolve()),
        "output": str((partial / "notebook.ipynb").resolve()),
        "parameters": job.parameters,
        "cwd": str(job.root),
        "scratch": str(scratch),
        "result": str(result),
    }
    command = [sys.executable, "-W", "ignore", "-P", "-m", "zimage.lab.worker"]
    with log.open("wb") as said:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=job.root, start_new_session=True,
            env=_environment(job, partial),
        )  # fmt: skip
        assert worker.stdin is not None
        try:
            _send(worker.stdin, order)
            in_time = _wait(worker, min(job.timeout_s, job.left_s), tick)
        finally:
            _end(worker)
    try:
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        answer = {"error": None, "dead": True}
        if in_time:
            answer["error"] = f"the process that runs the notebook ended with status {worker.returncode}"
    if not in_time:
        return f"took longer than its {job.timeout_s:g} s and was stopped (timeout_s)"
    if answer["dead"] and (last := _last_line(log)):
        return f"{answer['error']}; its last words: {last}"
    return None if answer["error"] is None else str(answer["error"])


def _tidy_notebook(job: Job, output: Path) -> int | None:
    """Take this machine's paths out of the executed notebook; the number, from 1 as written, of a cell cut short."""
    try:
        content = json.loads(output.read_text(encoding="utf-8"))
        content["metadata"].get("papermill", {}).update(input_path=job.notebook.name, output_path=output.name)
        output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError):
        shutil.copyfile(job.notebook.path, output)  # it never came to the first cell
        return None
    number, running, unanswered = 0, None, None
    for cell in content["cells"]:
        number += not _ADDED_TAGS & set(cell["metadata"].get("tags", []))
        if any(one.get("output_type") == "error" for one in cell.get("outputs", [])):
            return number
        busy = cell["metadata"].get("execution", {})
        if cell["cell_type"] == "code" and unanswered is None and "shell.execute_reply" not in busy:
            unanswered = number  # a kernel that dies may take even the word that it had begun with it
        if cell["metadata"].get("papermill", {}).get("status") in ("running", "failed"):
            running = number
    return unanswered if running is None else running


def _environment(job: Job, partial: Path) -> dict[str, str]:
    """This process's environment, with what `record` needs and the same zimage first in reach."""
    ours = {
        "ZIMAGE_RUN_DIR": str(partial.resolve()),
        "ZIMAGE_RUN_KEY": job.key,
        "ZIMAGE_EXPERIMENT": job.experiment,
        "ZIMAGE_DEVICE": job.facts["device"],
        "ZIMAGE_WEIGHTS_KIND": _weights_kind(job) or "",
    }
    if job.facts.get("blas_threads", "").isdigit():  # what is on record is what the kernel uses
        ours["OPENBLAS_NUM_THREADS"] = job.facts["blas_threads"]
    home = str(Path(zimage.__file__).resolve().parents[1])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        ours["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ours}


def _send(pipe: IO[bytes], order: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # it ended at once; its status and last words say why
        pipe.write(json.dumps(order).encode() + b"\n")
        pipe.flush()


def _wait(worker: subprocess.Popen[bytes], timeout_s: float, tick: Callable[[], None]) -> bool:
    """Whether the worker ended by itself within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            worker.wait(_POLL_S)
            return True
        except subprocess.TimeoutExpired:
            tick()
    return False


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Make sure that the worker and its kernel are gone: its closed pipe tells it, a signal follows."""
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        worker.stdin.close()
    try:
        worker.wait(_END_S)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)  # it leads its own group; its kernel ends with it
        worker.wait()


def _last_line(log: Path) -> str:
    from zimage.lab.worker import one_line

    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return one_line(lines[-1]) if lines else ""


def _keep_environment(job: Job, facts: dict[str, str], partial: Path) -> None:
    """The table `environment`, unless the notebook kept one."""
    import pandas as pd

    if (partial / "tables" / "environment.parquet").exists():
        return
    frame = pd.DataFrame({"key": list(facts), "value": list(facts.values())})
    append_rows(
        partial, "environment",
        frame.assign(
            run_key=job.key, experiment=job.experiment, device=job.facts["device"], weights_kind=_weights_kind(job)
        ),
    )  # fmt: skip


def _weights_kind(job: Job) -> str | None:
    """ "trained" or "synthetic"; None for a run without weights."""
    return None if job.identity.weights is None else job.identity.weights.kind
