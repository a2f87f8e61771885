"""The command `zimage`: parses, calls, prints.

Exit 0: done; 1: it ran and something failed, or was stopped; 2: it was asked wrongly, and one line says how to mend it.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zimage
from zimage.errors import ExperimentError, InputError, StoreError, ZImageError

import click

if TYPE_CHECKING:
    from zimage.lab.runner import Job
    from zimage.lab.store import Store

_WINDOWS = os.name == "nt"
_results = click.option(
    "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True, metavar="DIR",
    help="Folder of the results.",
)  # fmt: skip
_as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
_quantization = click.option(
    "--quantization", metavar="NAME", help="Pack the weights: 2bit to 6bit, 8bit, 4bit-g32, mxfp4, nvfp4, mxfp8."
)
_fresh = click.option("--fresh", is_flag=True, help="Run again what is done already.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
             invoke_without_command=True)  # fmt: skip
@click.version_option(zimage.__version__, prog_name="zimage")
@click.pass_context
def cli(context: click.Context) -> None:
    """Profile and ablate the Z-Image diffusion transformer on MLX."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option("-p", "--parameter", "given", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="Set a parameter; may be repeated.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=3600.0, show_default=True,
              metavar="SECONDS", help="Stop the run after that long.")  # fmt: skip
@_fresh
@_results
def run(notebook: Path, given: tuple[tuple[str, str], ...], timeout: float, fresh: bool, results: Path) -> int:
    """Execute one NOTEBOOK into the results, under its own name."""
    from zimage.lab import notebook as notebooks
    from zimage.lab import sweep
    from zimage.lab.experiment import Planned, value_from_text
    from zimage.lab.store import Store, check_name

    root = notebooks.project_root(notebook)
    found = notebooks.read(notebook, root)
    values = {name: value_from_text((found,), name, text) for name, text in _once("-p", given).items()}
    name, store = check_name(notebook.stem), Store(results)
    jobs = sweep.jobs_of(name, [Planned(found, found.resolve(values))], root, timeout)
    return _execute(jobs, store, fresh, lambda: sweep.note_single(store, jobs[0]))


@cli.command(name="sweep")
@click.argument("experiment", type=click.Path(path_type=Path), metavar="EXPERIMENT.yaml")
@click.option("--quick", is_flag=True, help="The experiment's small version.")
@click.option("--dry-run", is_flag=True, help="Only list the runs.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE",
              help="Fix a parameter in all runs; may be repeated.")  # fmt: skip
@_fresh
@_results
def sweep_command(
    experiment: Path, quick: bool, dry_run: bool, given: tuple[str, ...], fresh: bool, results: Path
) -> int:
    """Execute all runs of an experiment that are not done yet; the same command picks up where it stopped."""
    from zimage.lab import experiment as experiments
    from zimage.lab import sweep
    from zimage.lab.store import Store

    asked = experiments.read(experiment)
    pairs = [tuple(text.split("=", 1)) for text in given]
    for pair, text in zip(pairs, given, strict=True):
        if len(pair) != 2 or not pair[0]:
            raise ExperimentError(f"--set {text}: write NAME=VALUE")
    texts = _once("--set", [(pair[0], pair[-1]) for pair in pairs])
    forced = {name: experiments.value_from_text(asked.notebooks, name, text) for name, text in texts.items()}
    planned, store = asked.plan(quick=quick, overrides=forced), Store(results)
    jobs = sweep.jobs_of(asked.name, planned, asked.root, asked.timeout_s)
    if dry_run:
        _say_beforehand(jobs, store, fresh)
        to_do = {job.key for job in sweep.missing(jobs, store, fresh)}
        for job in jobs:
            shown = " ".join(f"{name}={value}" for name, value in job.parameters.items())
            click.echo(f"  {job.key}  {'to do' if job.key in to_do else 'done ':5}  {job.notebook.name}  {shown}")
        return 0
    return _execute(jobs, store, fresh, lambda: sweep.note_sweep(store, asked, jobs, quick, forced))


@cli.command(name="list")
@_as_json
@_results
def list_command(as_json: bool, results: Path) -> None:
    """List the experiments and their runs."""
    from zimage.lab import listing
    from zimage.lab.store import Store

    store = Store(results)
    content = listing.store_content(store)
    _print(content, as_json, lambda: listing.store_lines(store, content))
    _skipped(content["problems"])


@cli.command()
@click.argument("what")
@_as_json
@_results
def show(what: str, as_json: bool, results: Path) -> None:
    """Show WHAT: a run (its key or the start of it, or experiment/key), an experiment, or a checkpoint source."""
    from zimage.lab import listing
    from zimage.lab.store import Store

    store = Store(results)
    if what in store.experiments():
        content = listing.store_content(store, [what])
        _print(content, as_json, lambda: listing.store_lines(store, content))
        return
    try:
        found = store.find(what)
    except StoreError as no_run:
        if " fits " in str(no_run):
            raise
        content = listing.source_content(_source(what, no_run))
        _print(content, as_json, lambda: listing.source_lines(content))
        return
    _print(listing.run_content(found), as_json, lambda: listing.run_lines(found))


@cli.command()
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--dtype", metavar="NAME", help="bfloat16 or float32; as suits the device if left out.")
@_quantization
def convert(source: str, directory: Path, dtype: str | None, quantization: str | None) -> None:
    """Load SOURCE, change it as asked, and save it in the new folder DIR as safetensors with a config.json."""
    from zimage import sources, weights

    started = time.monotonic()
    info = sources.describe(weights.convert(source, directory, dtype, quantization))
    took = time.monotonic() - started
    click.echo(f"{directory}: {len(info.tensors)} tensors, {info.bytes:,} bytes, in {took:.1f} s")


@cli.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--source", default="digits", show_default=True, help="The model that draws.")
@click.option("--steps", type=int, default=20, show_default=True, help="Euler steps.")
@click.option("--shift", type=float, default=1.0, show_default=True, help="Shift of the noise levels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise to start from.")
@_quantization
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.png",
              help="The picture's file; digits-LABELS.png if left out.")  # fmt: skip
def generate(
    prompts: tuple[str, ...], source: str, steps: int, shift: float, seed: int, quantization: str | None,
    out: Path | None,
) -> None:  # fmt: skip
    """Draw PROMPT as a PNG. A prompt of the digits model is a label, such as 7; several are drawn as one grid."""
    from zimage import digits, scheduler, sources, weights
    from zimage.digits import picture
    from zimage.lab.files import write_atomically

    from PIL import Image

    if source != "digits":
        sources.describe(source)
        raise InputError(
            f"{source}: drawing from a text prompt needs the text encoder and the VAE, which this version does not "
            "have; --source digits draws digits"
        )
    labels = digits.labels_in(" ".join(prompts))
    scheduler.sigmas(steps, shift)  # refused before anything is loaded
    path = _picture_path(out, "".join(map(str, labels)))
    started = time.monotonic()
    with _progress(f"drawing {len(labels)} digit{'s' * (len(labels) > 1)}", steps * digits.batches(len(labels))) as on:
        model = weights.load_transformer(source, quantization=quantization)
        drawn = digits.draw(model, labels, steps, shift, seed, on)
    pixels = Image.fromarray(picture.grid(drawn.images, scale=32))
    write_atomically(path, lambda draft: pixels.save(draft, format="PNG"))
    click.echo(f"{path}: {steps} steps in {time.monotonic() - started:.1f} s")


def _picture_path(out: Path | None, labels: str) -> Path:
    path = out or Path(f"digits-{labels if len(labels) <= 40 else f'{labels[:40]}-and-{len(labels) - 40}-more'}.png")
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: the picture is a PNG; end the file's name in .png")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}; make it first")
    return path


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on a terminal, nothing in a pipe; calling what it gives moves it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@cli.command()
@click.option("--single-file", is_flag=True, help="Put plotly's script into each page, so that it can be sent around.")
@_as_json
@_results
def report(single_file: bool, as_json: bool, results: Path) -> None:
    """Build the pages again from what is stored; needs no MLX."""
    from zimage.lab import dashboard
    from zimage.lab.store import Store

    store = Store(results)
    names = store.experiments()
    if not names:
        raise StoreError(f"{results}: no runs to report on; `zimage sweep EXPERIMENT.yaml` makes some")
    pages = dashboard.build(store, None, single_file=single_file)
    findings = {name: dashboard.findings(store, name) for name in names}
    content = {"pages": [str(page) for page in pages], "findings": findings}
    _skipped([problem for name in names for problem in store.scan(name)[1]])
    _print(content, as_json, lambda: [*(f"{name}: {text}" for name, text in findings.items()), *map(_link, pages)])


@cli.command()
@_as_json
@_results
def doctor(as_json: bool, results: Path) -> int:
    """Check this machine: device, libraries, and how fast they are."""
    from dataclasses import asdict

    from zimage import backend

    checks = backend.doctor(results)
    signs = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}
    width = max(len(check.name) for check in checks)

    def lines() -> list[str]:
        text = []
        for check in checks:
            text.append(f"{signs[check.status]}  {check.name:{width}}  {check.value}")
            if check.advice:
                text.append(f"      {'':{width}}  -> {check.advice}")
        return text

    _print([asdict(check) for check in checks], as_json, lines)
    return 1 if any(check.status == "fail" for check in checks) else 0


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def lab(options: tuple[str, ...]) -> None:
    """Open JupyterLab on notebooks/; OPTIONS go to JupyterLab."""
    from importlib.util import find_spec

    if find_spec("jupyterlab") is None:
        raise ExperimentError(f"JupyterLab is not installed for {sys.executable}: pip install jupyterlab")
    here = Path.cwd()
    folder = next((f / "notebooks" for f in (here, *here.parents) if (f / "notebooks").is_dir()), None)
    if folder is None:
        raise ExperimentError(f"{here}: no notebooks/ folder here or above; go to the project's folder first")
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder), *options])


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Every error a user can cause is one line and an exit status."""
    if _WINDOWS:
        print("zimage: MLX does not run on Windows itself; install zimage inside WSL2 (Ubuntu)", file=sys.stderr)
        return 2
    try:
        status = cli.main(arguments, prog_name="zimage", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # `| head` has seen enough; click makes an exit of it, and only of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "zimage"
        _complain(f"{' '.join(error.format_message().split())} (see {path} -h)")
        return 2
    except ZImageError as error:
        _complain(str(error))
        return 2
    except (KeyboardInterrupt, click.Abort):
        _complain("stopped")
        return 1
    return status if isinstance(status, int) else 0


def _execute(jobs: "list[Job]", store: "Store", fresh: bool, note: Callable[[], None]) -> int:
    """Do the jobs, build the page, say what came out."""
    from zimage.lab import dashboard, sweep
    from zimage.lab.progress import Teller, span

    name = jobs[0].experiment
    estimates = _say_beforehand(jobs, store, fresh)
    started = time.monotonic()
    note()
    try:
        with _farewells(), Teller(jobs, estimates) as teller:
            outcome = sweep.sweep(jobs, store, teller, fresh)
    except KeyboardInterrupt:
        done = len(jobs) - len(sweep.missing(jobs, store))
        _complain(
            f"stopped: {done} of {len(jobs)} runs are done; the same command {'without --fresh ' * fresh}picks up there"
        )
        return 1
    except StoreError as error:
        _complain(str(error))
        return 1
    failed = len(outcome.failed)
    took = f" in {span(time.monotonic() - started)}" if outcome.completed or failed else ""
    already = f", {len(outcome.found)} done before" if outcome.found else ""
    pages = dashboard.build(store, [name])  # before anything is printed: whoever reads may have closed the pipe
    click.echo(f"{name}: {len(outcome.completed)} completed, {failed} failed{already}{took}")
    click.echo(dashboard.findings(store, name))
    click.echo(f"page: {_link(pages[0])}")
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


def _say_beforehand(jobs: "list[Job]", store: "Store", fresh: bool) -> Any:
    from zimage.lab import sweep
    from zimage.lab.progress import forecast

    estimates = sweep.Estimates(store)
    to_do = sweep.missing(jobs, store, fresh)
    runs = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"
    what = (
        f"{len(to_do)} to do, {forecast(estimates, to_do)}" if to_do else "all done already (--fresh runs them again)"
    )
    done = f"{len(jobs) - len(to_do)} done already, " if to_do and len(to_do) < len(jobs) else ""
    click.echo(f"{jobs[0].experiment}: {runs}, {done}{what}")
    return estimates


def _once(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, text in pairs:
        if name in values:
            raise ExperimentError(f"{option} {name} is given twice; keep one")
        values[name] = text
    return values


def _source(what: str, no_run: StoreError) -> Any:
    from zimage import sources

    try:
        return sources.describe(what)
    except ZImageError as error:
        looks_like_run = "/" not in what and set(what) <= set("0123456789abcdef")
        raise (no_run if looks_like_run else error) from None


def _print(content: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    click.echo(json.dumps(content, indent=2, ensure_ascii=False) if as_json else "\n".join(lines()))


def _skipped(problems: Sequence[str]) -> None:
    for problem in problems:
        _complain(f"skipped: {problem}")


def _link(page: Path) -> str:
    """A path, or on a terminal an address to click on."""
    return page.resolve().as_uri() if sys.stdout.isatty() else str(page)


def _complain(line: str) -> None:
    click.echo(f"zimage: {' '.join(line.splitlines())}", err=True)


if __name__ == "__main__":
    sys.exit(main())
