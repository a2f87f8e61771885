"""Runs done for a command: what is said before and after, and the exit status."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from zimage import machine
from zimage.errors import StoreError
from zimage.lab import dashboard, fitting, sweep, terminal
from zimage.lab.progress import Teller, forecast, span
from zimage.lab.runner import Job
from zimage.lab.store import Store
from zimage.lab.sweep import Estimates
from zimage.lab.terminal import complain, link, say, show


def execute(
    jobs: Sequence[Job], store: Store, fresh: bool, as_json: bool, note: Callable[[], None], force: bool = False
) -> int:
    """Do the jobs, build the page, say what came out. Unless a run was started, an unwritable store is status 2.

    Raises InputError for a run that does not fit the device, before anything is done, unless `force`.
    """
    name = jobs[0].experiment
    fitting.check(sweep.missing(jobs, store, fresh), force)
    estimates = Estimates(store)
    if not as_json:
        say(_beforehand(jobs, store, fresh, estimates))
    if sweep.missing(jobs, store, fresh) and (doubt := machine.warning(jobs[0].facts)):
        terminal.note(doubt)
    started = time.monotonic()
    note()
    teller = Teller(jobs, estimates)
    try:
        with _farewells(), machine.awake(), teller:
            outcome = sweep.sweep(jobs, store, teller, fresh)
        pages = dashboard.build(store, [name])  # before anything is printed: whoever reads may have closed the pipe
        finding = dashboard.findings(store, name, {job.key for job in jobs})
    except KeyboardInterrupt:
        done = len(jobs) - len(sweep.missing(jobs, store))
        complain(
            f"stopped: {done} of {len(jobs)} runs are done; the same command {'without --fresh ' * fresh}picks up there"
        )
        return 1
    except StoreError as error:
        complain(str(error))
        return 2 if teller.current is None else 1
    failed = len(outcome.failed)
    took = f" in {span(time.monotonic() - started)}" if outcome.completed or failed else ""
    already = f", {len(outcome.found)} done before" if outcome.found else ""
    ended = {run.key: run for run in (*outcome.completed, *outcome.failed, *outcome.found)}
    runs = [{"key": job.key, "status": ended[job.key].status, "notebook": job.notebook.name} for job in jobs]
    content = {"experiment": name, "runs": runs, "finding": finding, "page": str(pages[0])}
    said = f"{name}: {len(outcome.completed)} completed, {failed} failed{already}{took}"
    show(content, as_json, lambda: [said, finding, f"page: {link(pages[0])}"])
    return 1 if failed else 0


@contextmanager
def _farewells() -> Iterator[None]:
    """Let a batch system's or a closing terminal's signal end things as tidily as Ctrl-C."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beforehand(jobs: Sequence[Job], store: Store, fresh: bool, estimates: Estimates) -> str:
    """How many runs there are, how many of them are to do, and how long that may take."""
    to_do = sweep.missing(jobs, store, fresh)
    runs = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"
    what = (
        f"{len(to_do)} to do, {forecast(estimates, to_do)}" if to_do else "all done already (--fresh runs them again)"
    )
    done = f"{len(jobs) - len(to_do)} done already, " if to_do and len(to_do) < len(jobs) else ""
    return f"{jobs[0].experiment}: {runs}, {done}{what}"


def plan(jobs: Sequence[Job], store: Store, fresh: bool, as_json: bool) -> None:
    """Say what a sweep would do: its runs, which of them are to do, and whether they fit the device."""
    to_do = {job.key for job in sweep.missing(jobs, store, fresh)}
    found = {job.key: fitting.of_job(job) for job in jobs}
    runs = [
        {
            "key": job.key,
            "status": "to do" if job.key in to_do else "done",
            "notebook": job.notebook.name,
            "parameters": job.parameters,
            "fit": fitting.content(found[job.key]),
        }
        for job in jobs
    ]

    def lines() -> list[str]:
        text = [_beforehand(jobs, store, fresh, Estimates(store))]
        for job in jobs:
            shown = [f"{name}={value}" for name, value in job.parameters.items()]
            shown += [f"({found[job.key]})"] if found[job.key] else []
            state = "to do" if job.key in to_do else "done "
            text.append(f"  {job.key}  {state}  {job.notebook.name}  {' '.join(shown)}")
        return text

    terminal.show({"experiment": jobs[0].experiment, "runs": runs}, as_json, lines)
