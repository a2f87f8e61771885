"""The command line in a process of its own, several such at once, and sweeps of experiments that tests share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from zimage.lab import experiment
from zimage.lab import notebook as notebooks
from zimage.lab.store import Store

ROOT = Path(__file__).parent.parent
SUITES = [ROOT / "experiments" / "overnight.yaml"]
EXPERIMENTS = sorted({*(ROOT / "experiments").glob("*.yaml")} - {ROOT / "experiments" / "claims.yaml", *SUITES})
QUICKSTART = ("sweep", "experiments/quickstart.yaml")
# How much of it is done: the least that can be asked for. A notebook without these does its work in seconds.
LEAST = {
    "rounds": 1, "quads": 1, "draws": 1, "steps": 1, "samples": 1, "reports": 1, "judged": 20, "row_counts": [1, 64],
    "block_sizes": [[8, 8], [16, 16]],
}  # fmt: skip
Command = tuple[str, ...]
T = TypeVar("T")
_OF_A_RUN = ("ZIMAGE_RUN_DIR", "ZIMAGE_RUN_KEY", "ZIMAGE_EXPERIMENT", "ZIMAGE_DEVICE", "ZIMAGE_WEIGHTS_KIND")


@dataclass(frozen=True)
class Sweep:
    """A finished `zimage sweep` or `run`: its exit status, what it printed, its results and its seconds."""

    status: int
    out: str
    err: str
    results: Path
    duration_s: float

    @property
    def store(self) -> Store:
        return Store(self.results)


def side_by_side(*calls: Callable[[], T]) -> list[T]:
    """What the calls give, two at a time: each starts a process of one busy core, and no test judges how long it took.

    Those that take longest should come first.
    """
    with ThreadPoolExecutor(2) as two:
        return [started.result() for started in [two.submit(call) for call in calls]]


def environment() -> dict[str, str]:
    """This process's environment without what a run would have put there."""
    return {name: value for name, value in os.environ.items() if name not in _OF_A_RUN}


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`zimage` with these arguments, to its end."""
    line = [sys.executable, "-m", "zimage.cli", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=600)


def quick(experiment: Path) -> Command:
    """What sweeps one of the repository's experiments quickly."""
    return ("sweep", str(experiment.relative_to(ROOT)), "--quick")


@cache
def on_digits(notebook: Path) -> Command:
    """What runs a notebook on digits: the quick sweep of the first experiment that has it, else the least work."""
    for path in EXPERIMENTS:
        if any(planned.notebook.path.samefile(notebook) for planned in experiment.read(path).plan(quick=True)):
            return quick(path)
    known = notebooks.read(notebook, ROOT).parameters
    given = [
        text for name, value in (LEAST | {"batch": 1}).items() if name in known for text in ("-p", name, f"{value}")
    ]
    return ("run", str(notebook.relative_to(ROOT)), *given)


def sweep(line: Command, results: Path) -> Sweep:
    """The `zimage` command of a sweep or run, with its results there."""
    started = time.monotonic()
    done = command(*line, "--results", str(results))
    return Sweep(done.returncode, done.stdout, done.stderr, results, time.monotonic() - started)
