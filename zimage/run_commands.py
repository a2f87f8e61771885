"""The commands that execute notebooks: `zimage run` and `zimage sweep`."""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.errors import ExperimentError, nearest
from zimage.options import AnyPath
from zimage.options import as_json as as_json_option
from zimage.options import force as force_option
from zimage.options import results as results_option

import click

if TYPE_CHECKING:
    from zimage.lab.notebook import Notebook


def _finite_timeout(_context: click.Context, _option: click.Parameter, seconds: float) -> float:
    from zimage.lab.experiment import MAX_TIMEOUT_S

    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise click.BadParameter(f"{seconds:g} is not more than 0 and at most {MAX_TIMEOUT_S:.0f} seconds (7 days)")
    return seconds


class _WithParameters(click.Command):
    """A command that tells how values are written before click tells what it could not place."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for option, text in pairwise(args):
            name, equals, value = text.partition("=")
            if option in ("-p", "--parameter") and equals:
                raise click.UsageError(f"-p {text}: write -p {name} {value or 'VALUE'}", ctx)
            if option == "--set" and not equals:
                raise click.UsageError(f"--set {text}: write --set {name}=VALUE", ctx)
        return super().parse_args(ctx, args)


_fresh = click.option("--fresh", is_flag=True, help="Run again what is done already.")


@click.command(cls=_WithParameters)
@click.argument("notebook", type=AnyPath())
@click.option("-p", "--parameter", "given", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="Set a parameter; may be repeated.")  # fmt: skip
@click.option("--timeout", type=float, callback=_finite_timeout, default=3600.0, show_default=True,
              metavar="SECONDS", help="Stop the run after that long.")  # fmt: skip
@_fresh
@force_option
@as_json_option
@results_option
def run(
    notebook: Path, given: tuple[tuple[str, str], ...], timeout: float, fresh: bool, force: bool, as_json: bool,
    results: Path,
) -> int:  # fmt: skip
    """Execute one NOTEBOOK into the results, under its own name."""
    from zimage.lab import executing, sweep
    from zimage.lab import notebook as notebooks
    from zimage.lab.experiment import Planned
    from zimage.lab.store import Store, check_name

    if notebook.suffix in (".yaml", ".yml"):
        raise ExperimentError(f"{notebook}: not a notebook; `zimage sweep {notebook}` does the runs of an experiment")
    _require_named(notebook, "notebooks", ".ipynb")
    root = notebooks.project_root(notebook)
    found = notebooks.read(notebook, root)
    values = _values("-p", given, (found,))
    name, store = check_name(notebook.stem), Store(results)
    jobs = sweep.jobs_of(name, [Planned(found, found.resolve(values))], root, timeout)
    part = executing.Part(jobs, lambda: sweep.note_single(store, jobs[0]))
    return executing.execute([part], store, fresh, as_json, force)


@click.command(cls=_WithParameters)
@click.argument("experiment", type=AnyPath(), metavar="EXPERIMENT.yaml")
@click.option("--quick", is_flag=True, help="The experiment's small version.")
@click.option("--dry-run", is_flag=True, help="Only list the runs.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE",
              help="Fix a parameter in all runs; may be repeated.")  # fmt: skip
@_fresh
@force_option
@as_json_option
@results_option
def sweep(
    experiment: Path, quick: bool, dry_run: bool, given: tuple[str, ...], fresh: bool, force: bool, as_json: bool,
    results: Path,
) -> int:  # fmt: skip
    """Execute all runs of an experiment that are not done yet.

    The same command picks up where it stopped. The file may also be a suite: several experiments, as many of their
    runs as fit its time.
    """
    from zimage.lab import executing, suite
    from zimage.lab import experiment as experiments
    from zimage.lab.store import Store
    from zimage.yaml_lines import load

    if experiment.suffix == ".ipynb":
        raise ExperimentError(f"{experiment}: not an experiment file; `zimage run {experiment}` executes a notebook")
    _require_named(experiment, "experiments", ".yaml")
    pairs = []
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ExperimentError(f"--set {text}: write NAME=VALUE")
        pairs.append((name, value))
    document, store = load(experiment), Store(results)
    asked = suite.read(document, quick) if suite.is_one(document) else None
    members = asked.experiments if asked else (experiments.read(experiment),)
    forced = _values("--set", pairs, tuple(notebook for member in members for notebook in member.notebooks))
    parts = [executing.part(member, store, quick, forced) for member in members]
    if dry_run:
        executing.plan(parts, store, fresh, as_json, asked)
        return 0
    return executing.execute(parts, store, fresh, as_json, force, asked)


def _require_named(path: Path, folder: str, ending: str) -> None:
    """Raise ExperimentError with the file that was meant where `path` is none and one beside it or in `folder` is near.

    ending: of the files' names.
    """
    if os.path.lexists(path):
        return
    files: dict[str, Path] = {}
    for place in (path.parent, Path(folder)):
        with suppress(OSError):
            files = {file.stem: file for file in sorted(place.iterdir()) if file.suffix == ending} | files
    if near := nearest(path.stem, files):
        raise ExperimentError(f"{path}: no such file; did you mean {files[near]}?")


def _values(option: str, pairs: Sequence[tuple[str, str]], notebooks: "tuple[Notebook, ...]") -> dict[str, Any]:
    """The parameters that an option gave as texts; every error names the option and the parameter."""
    from zimage.lab.experiment import value_from_text

    values: dict[str, Any] = {}
    for name, text in _once(option, pairs).items():
        try:
            values[name] = value_from_text(notebooks, name, text)
        except ExperimentError as error:
            raise ExperimentError(f"{option} {name}: {error}") from None
    return values


def _once(option: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, text in pairs:
        if name in values:
            raise ExperimentError(f"{option} {name} is given twice; keep one")
        values[name] = text
    return values
