"""The commands that set results beside each other: `zimage compare` and `zimage trend`."""

import math
from pathlib import Path

from zimage.errors import ExperimentError, StoreError
from zimage.lab import terminal
from zimage.options import as_json as as_json_option
from zimage.options import results as results_option

import click


def _positive(_context: click.Context, _option: click.Parameter, percent: float | None) -> float | None:
    if percent is not None and not 0 < percent < math.inf:
        raise click.BadParameter(f"{percent:g} is no positive number of percent")
    return percent


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--require-all", is_flag=True,
              help="Exit 1 also where B lacks any of A, A cannot be read, or no time ratio is decided.")  # fmt: skip
@click.option("--times", type=float, callback=_positive, metavar="PERCENT",
              help="Exit 1 also where a step or trajectory takes over PERCENT longer in B, on one device.")  # fmt: skip
@click.option("--rerun", is_flag=True, help="Time the step of both anew, in fresh processes in turns.")
@click.option("--python", "pythons", multiple=True, metavar="PYTHON",
              help="With --rerun: the interpreter of A, and once more that of B; this one's if left out.")  # fmt: skip
@click.option("--pairs", type=int, default=8, show_default=True, help="With --rerun: processes a side.")
@click.option("--samples", type=int, default=10, show_default=True, help="With --rerun: timed steps a process.")
@as_json_option
@results_option
def compare(
    a: str, b: str, require_all: bool, times: float | None, rerun: bool, pythons: tuple[str, ...], pairs: int,
    samples: int, as_json: bool, results: Path,
) -> int:  # fmt: skip
    """Compare B with A, the reference; exit 1 on a regression.

    A and B are runs (a key or the start of it, or experiment/key), experiments, or results folders; PATH/experiment
    and PATH/experiment/key too. What has the same notebook, weights, seed and other inputs on both sides is judged:
    time ratios to each side's own baseline, bytes and quality. The rest is listed with why it is not compared. Results
    of B that cannot be read count as a regression. With --require-all it exits 1 also where a run or row of A has no
    counterpart in B, results of A cannot be read, or A has time ratios and none is decided. With --times the seconds of
    both are judged too, which no clock links: give more than what two sweeps of one version differ by. Needs no MLX but
    to rerun.
    """
    from zimage.lab import comparing, rerunning
    from zimage.lab.store import Store

    if pythons and not rerun:
        raise ExperimentError("--python says who measures again: give it with --rerun")
    if require_all and rerun:
        raise ExperimentError("--require-all is about what is recorded, and --rerun times anew: give one of them")
    if times is not None and rerun:
        raise ExperimentError("--times is about what is recorded, and --rerun times anew: give one of them")
    store = Store(results)
    sides = comparing.side(a, store), comparing.side(b, store, completed=False)
    terminal.skipped(list(dict.fromkeys(problem for one in sides for problem in one.problems)))
    if rerun:
        return rerunning.rerun(*sides, pythons, pairs, samples, as_json)
    found = comparing.compare(*sides, times, require_all)
    terminal.show(comparing.content(*sides, found), as_json, lambda: comparing.lines(*sides, found))
    if sides[1].problems and not found.worse:
        terminal.complain(f"not known to be free of regressions: {sides[1].problems[0]}")
    if comparing.unjudged(found) and not require_all:
        terminal.complain(f"--times judged nothing: {comparing.NO_TIMES}")
    lacking = comparing.incomplete(found) or next(iter(sides[0].problems), "") if require_all else ""
    if lacking:
        terminal.complain(f"--require-all: {lacking}")
    return 1 if found.worse or sides[1].problems or lacking else 0


@click.command()
@click.argument("experiment")
@as_json_option
@results_option
def trend(experiment: str, as_json: bool, results: Path) -> None:
    """Show one EXPERIMENT across versions of MLX and zimage.

    Superseded runs are included. Needs no MLX.
    """
    from zimage.lab import trends
    from zimage.lab.store import Store

    store = Store(results)
    if experiment not in store.experiments():
        raise StoreError(
            f"{results}: no experiment {experiment!r}; there are: {', '.join(store.experiments()) or 'none'}"
        )
    found, problems = trends.read(store, experiment)
    terminal.skipped(problems)
    terminal.show(trends.content(found), as_json, lambda: trends.lines(experiment, found))
