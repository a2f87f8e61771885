"""experiments/overnight.yaml: it lists what there is, and its quick half runs."""

from collections.abc import Callable
from pathlib import Path

from tests.sweeping import EXPERIMENTS, SUITES, Command, Sweep, quick
from zimage.lab import suite
from zimage.yaml_lines import load

import pytest


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_opens_with_its_command(path: Path) -> None:
    """A suite file opens with its command and cost, and can be read in full and with --quick."""
    start = f"# Command: zimage sweep experiments/{path.name}\n# Cost: "
    assert path.read_text(encoding="utf-8").startswith(start)
    assert suite.read(load(path)).name == suite.read(load(path), quick=True).name == path.stem


def test_overnight_lists_every_experiment() -> None:
    """All experiments but the quickstart, which is of the digits model alone, are done overnight."""
    (overnight,) = SUITES
    listed = {one.name for one in suite.read(load(overnight)).experiments}
    assert listed == {path.stem for path in EXPERIMENTS} - {"quickstart"}


def test_overnight_runs_quickly(swept: Callable[[Command], Sweep]) -> None:
    """With --quick it completes without a word, and each experiment has its own page."""
    (overnight,) = SUITES
    done = swept(quick(overnight))
    assert (done.status, done.err) == (0, ""), done.out
    names = [one.name for one in suite.read(load(overnight), quick=True).experiments]
    assert done.store.experiments() == sorted(names)
    assert all((done.results / name / "index.html").is_file() for name in names)
    assert done.out.splitlines()[-1].startswith(f"overnight: {len(names)} completed, 0 failed in ")
