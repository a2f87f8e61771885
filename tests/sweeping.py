"""The command line in a process of its own, and sweeps of the repository's experiments that tests share."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from zimage.lab.store import Store

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").glob("*.yaml") if path.name != "claims.yaml")
_OF_A_RUN = ("ZIMAGE_RUN_DIR", "ZIMAGE_RUN_KEY", "ZIMAGE_EXPERIMENT", "ZIMAGE_DEVICE")


@dataclass(frozen=True)
class Sweep:
    """A finished `zimage sweep`: its exit status, what it printed, its results and its seconds."""

    status: int
    out: str
    err: str
    results: Path
    duration_s: float

    @property
    def store(self) -> Store:
        return Store(self.results)


def environment() -> dict[str, str]:
    """This process's environment without what a run would have put there."""
    return {name: value for name, value in os.environ.items() if name not in _OF_A_RUN}


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`zimage` with these arguments, to its end."""
    line = [sys.executable, "-m", "zimage.cli", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=600)


def sweep(experiment: Path, results: Path, *options: str) -> Sweep:
    """`zimage sweep` of one of the repository's experiments."""
    started = time.monotonic()
    name = str(experiment.relative_to(ROOT))
    done = command("sweep", name, *options, "--results", str(results))
    return Sweep(done.returncode, done.stdout, done.stderr, results, time.monotonic() - started)
