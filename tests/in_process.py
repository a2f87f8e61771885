"""Runs of notebooks without a kernel: the cells executed one after the other in this process, recorded like any run.

A worker and a kernel take seconds to start, and every notebook's quick sweep has them. What a notebook does with other
parameters needs neither.
"""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from zimage.lab import runner
from zimage.lab.runner import Job
from zimage.lab.worker import one_line

import pytest


def execute(job: Job, partial: Path, _scratch: Path, _tick: Callable[[], None]) -> str | None:
    """Stands for the runner's `_execute`: None if all cells ran, else what one raised, in the words of a kernel."""
    variables: dict[str, Any] = {"__name__": "__main__", "display": repr}
    with pytest.MonkeyPatch.context() as patch, chdir(job.root):
        for name, value in runner._environment(job, partial).items():
            patch.setenv(name, value)
        for number, code in enumerate(job.notebook.code):
            try:
                exec(compile(code, f"{job.notebook.name}, cell {number}", "exec"), variables)
            except Exception as error:  # whatever a cell raises is what became of the run
                return one_line(f"{type(error).__name__}: {error}")
            if number == 0:
                variables |= job.parameters
    return None
