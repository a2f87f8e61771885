"""How a sweep is told: progress with the time left on a terminal, only the lines that matter in a pipe."""

import time
from collections.abc import Sequence
from types import TracebackType

from zimage.lab.runner import Job, describe_failure
from zimage.lab.store import Run
from zimage.lab.sweep import Estimates

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn


def span(seconds: float) -> str:
    """A length of time in words, about as exact as an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def forecast(estimates: Estimates, jobs: Sequence[Job]) -> str:
    """About how long the jobs will take, in words."""
    seconds, unknown = estimates.total(jobs)
    if unknown == len(jobs):
        return "time not known yet"
    return f"about {span(seconds)}" if not unknown else f"at least {span(seconds)}"


class Teller:
    """The reporter of a sweep; a context manager, so that the progress line goes away however it ends."""

    def __init__(self, jobs: Sequence[Job], estimates: Estimates) -> None:
        self.left = list(jobs)
        self.total = len(jobs)
        self.current: Job | None = None
        self.estimates = estimates
        self.started = time.monotonic()
        self.console = Console(stderr=True)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[counted]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TextColumn("[dim]{task.fields[remaining]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=max(1, self.total), counted=self._counted(), remaining="")

    def __enter__(self) -> "Teller":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begins(self, job: Job) -> None:
        """Show which run is on."""
        self.current = job
        self.started = time.monotonic()
        self.progress.update(self.task, description=_label(job))
        self.tick()

    def tick(self) -> None:
        """Show the time left, and let the bar creep within a run as far as its expected length allows."""
        if self.current is None or self.progress.disable:
            return
        elapsed = time.monotonic() - self.started
        seconds, unknown = self.estimates.total(self.left)
        current = self.estimates.of(self.current)
        part = 0.0 if not current else min(0.95, elapsed / current)
        known = unknown < len(self.left)
        remaining = f"about {span(seconds - min(elapsed, current or 0.0))} left" if known else f"{span(elapsed)} so far"
        self.progress.update(self.task, completed=self.total - len(self.left) + part, remaining=remaining)

    def waits(self, job: Job) -> None:
        """Say that another sweep is at this run."""
        self._say(f"{job.experiment}/{job.key}: another process is at it; waiting for its result")

    def ends(self, job: Job, run: Run, new: bool) -> None:
        """Move on; a failure gets its line at once."""
        if new and run.completed:
            self.estimates.learn(run)
        if new and not run.completed:
            self._say(f"failed: {describe_failure(run)} (as executed: {run.path / 'notebook.ipynb'})")
        self.leaves(job)

    def leaves(self, job: Job) -> None:
        """Move on; what was left out is told at the end."""
        self.left = [one for one in self.left if (one.experiment, one.key) != (job.experiment, job.key)]
        self.progress.update(self.task, completed=self.total - len(self.left), counted=self._counted())

    def _counted(self) -> str:
        return f"{self.total - len(self.left)}/{self.total}"

    def _say(self, line: str) -> None:
        if self.progress.disable:
            click.echo(line, err=True)
        else:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _label(job: Job) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in list(job.parameters.items())[:3])
    return f"{escape(job.notebook.path.stem)} [dim]{escape(shown[:50])}"
