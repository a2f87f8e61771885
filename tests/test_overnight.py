"""experiments/overnight.yaml: it lists what there is, and its quick half runs."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from tests.sweeping import EXPERIMENTS, ROOT, SUITES, Command, Sweep, quick
from zimage import quality, sources
from zimage.errors import InputError
from zimage.lab import experiment, suite
from zimage.quantization import AFFINE_BITS, AFFINE_GROUPS, MODES, Quantization
from zimage.recipes import Recipe, packing
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


def test_overnight_says_what_the_parts_sum_up_to() -> None:
    """The minutes at its head are the sum of the seconds that follow, to the nearest ten."""
    (overnight,) = SUITES
    head = " ".join(
        line.lstrip("# ") for line in overnight.read_text(encoding="utf-8").partition("\nkind: ")[0].split("\n")
    )
    listed = head.partition("published shape: ")[2].partition(". ")[0].split(", ")
    total = sum(math.prod(int(number) for number in re.findall(r"(?<!\w)\d+", part)) for part in listed)
    said = re.search(r"some (\d+) minutes and more", head)
    assert len(listed) == 12 and said is not None and abs(total - 60 * int(said[1])) <= 300


@pytest.mark.parametrize("source", ["digits", "synthetic:turbo"])
def test_every_packing_that_fits_is_compared(source: str) -> None:
    """quantization asks for all packings of MLX's that the widths of either model take, and for no others."""
    (found,) = (
        planned.parameters["modes"]
        for planned in experiment.read(ROOT / "experiments" / "quantization.yaml").plan()
        if planned.parameters["source"] == source
    )
    config, fitting = sources.describe(source).config, []
    every = [Quantization("affine", bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
    for one in [*every, *(Quantization.parse(name) for name in MODES)]:
        try:
            packing(config, Recipe(one))
            fitting.append(str(one))
        except InputError:
            pass
    assert sorted(found) == sorted(fitting) and len(found) == {"digits": 15, "synthetic:turbo": 21}[source]


def test_overnight_runs_quickly(swept: Callable[[Command], Sweep]) -> None:
    """With --quick it completes without a word, and each experiment has its own page."""
    (overnight,) = SUITES
    done = swept(quick(overnight))
    assert (done.status, done.err) == (0, ""), done.out
    names = [one.name for one in suite.read(load(overnight), quick=True).experiments]
    assert done.store.experiments() == sorted(names)
    assert all((done.results / name / "index.html").is_file() for name in names)
    assert done.out.splitlines()[-1].startswith(f"overnight: {len(names)} completed, 0 failed in ")


@pytest.mark.parametrize("source", ["digits", "synthetic:turbo"])
def test_pareto_weighs_caching_and_draws_enough(source: str) -> None:
    """Both runs of pareto have each way to reuse steps that is known by name, and draws that tell all errors apart."""
    (found,) = (
        planned.parameters
        for planned in experiment.read(ROOT / "experiments" / "pareto.yaml").plan()
        if planned.parameters["source"] == source
    )
    count = len(found["arms"]) + 1  # the baseline too
    assert found["draws"] >= quality.fewest_seeds(0.05 / (count * (count - 1) / 2))
    rules = {name.split(" + ")[-1] for name in found["arms"] if name.startswith(found["dtype"])}
    assert rules >= {"tea_cache_flux", "reuse_by_timestep", "reuse_every_2nd"}


def test_overnight_says_what_quick_leaves_out() -> None:
    """Its head names the experiments that --quick runs, and no other."""
    (overnight,) = SUITES
    head = " ".join(line.lstrip("# ") for line in overnight.read_text(encoding="utf-8").splitlines())
    told = re.search(r"With --quick only (.+?) of", head)
    assert told is not None
    assert told[1].split(" and ") == [one.name for one in suite.read(load(overnight), quick=True).experiments]
