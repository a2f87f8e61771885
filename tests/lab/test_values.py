"""Values of parameters that no notebook can do anything with."""

from pathlib import Path
from typing import Any

from tests.lab.making import write_notebook
from tests.sweeping import EXPERIMENTS
from zimage import arms, names, orders, scopes, transform_names
from zimage.errors import ExperimentError, MeasurementError
from zimage.lab import experiment, notebook, values
from zimage.measure import compare

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("seed", [0, 2**64 - 1], [-1, 2**64], "seed must be an integer from 0 to 2^64 - 1, found "),
        ("quads", [1, 40], [0, -3, 41], "quads must be an integer from 1 to 40, found "),
        ("rounds", [1, 10**6], [0, -1], "rounds must be an integer of at least 1, found "),
        ("draws", [0, 500], [-1], "draws must be an integer of at least 0, found "),
        ("steps", [1, 50_000], [0, -8], "steps must be an integer of at least 1, found "),
        ("rows", [1, 4096], [0], "rows must be an integer of at least 1, found "),
        ("batch", [1, 64], [0, -1], "batch must be an integer of at least 1, found "),
        ("sustained_s", [0.0, 10], [-0.1], "sustained_s must be a number of at least 0, found "),
        ("shift", [0.5, 3], [0.0, -1.0], "shift must be positive and finite, found "),
        ("modes", [[], ["8bit", "mine.yaml"]], [["8bits"], [None], ["x" * 9]], "unknown quantization "),
        ("transforms", [[], ["fast", "fuse_qkv"]], [["fuse_qvk"], ["fast", 1]], "transform .* is not known; "),
    ],
)
def test_a_name_tells_what_fits(tmp_path: Path, name: str, good: list[Any], bad: list[Any], words: str) -> None:
    """A value that nothing can be done with is refused by the parameter's name, with what would fit."""
    path = write_notebook(tmp_path / "n.ipynb", parameters=f"{name} = {good[0]!r}")
    parameter = notebook.read(path).parameters[name]
    for value in good:
        assert parameter.accept(value) == value
    for value in bad:
        with pytest.raises(ExperimentError, match=f"^{words.replace('^', '.')}") as caught:
            parameter.accept(value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ["quads: int = 0", "steps: float = 0.5", "seed: int | None = None", "rows: list = []", "modes = 3"]
)
def test_a_default_tells_what_else_a_name_means(tmp_path: Path, line: str) -> None:
    """A notebook whose default would not fit means something else by the name: any value of the type is taken."""
    (parameter,) = notebook.read(write_notebook(tmp_path / "n.ipynb", parameters=line)).parameters.values()
    assert parameter.check is values.anything and parameter.accept(parameter.default) == parameter.default


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_projects_notebooks_are_judged(path: Path) -> None:
    """None of them means something else by one of these names, and a notebook has what it says to take less of."""
    parameters, own = notebook.read(path).parameters, values.OWN.get(path.stem, {})
    for name, parameter in parameters.items():
        assert parameter.check is own.get(name, values.COMMON.get(name, values.anything))
    assert own.keys() <= parameters.keys()
    assert f'require_values("{path.stem}"' in " ".join("".join(notebook.read(path).code).split()).replace("( ", "(")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_ask_for_nothing_that_is_refused(path: Path, quick: bool) -> None:
    """Every value of an experiment's file passes, quick or not."""
    assert experiment.read(path).plan(quick=quick)


@pytest.mark.parametrize(
    ("default", "good", "bad"),
    [
        (["8bit + fast"], ["4bit"], ["fused_qkv"]),
        (["fused_qkv", "fused_both"], ["fused_qkv"], ["4bit"]),
        (["mine"], ["fused_qkv"], None),
    ],
)
def test_a_copy_under_another_name_is_judged_by_its_default(tmp_path: Path, default: Any, good: Any, bad: Any) -> None:
    """Where notebooks mean different things by a name, a copy of one of them means what its default does."""
    path = write_notebook(tmp_path / "mine.ipynb", parameters=f"arms: list = {default!r}")
    parameter = notebook.read(path).parameters["arms"]
    assert parameter.accept(good) == good
    if bad is None:
        assert parameter.check is values.anything
    else:
        with pytest.raises(ExperimentError):
            parameter.accept(bad)


def test_names_that_are_known_without_mlx() -> None:
    """Those of transforms, scopes and orders are those that there are."""
    assert transform_names.KNOWN == tuple(arms.TRANSFORMS)
    assert names.SCOPES == tuple(scopes.SCOPES)
    assert (names.ORDERS, names.ORDERS_OF_PACKED) == (tuple(orders.ORDERS), tuple(orders.OF_PACKED))


@pytest.mark.parametrize("quads", [0, 41])
def test_a_comparison_takes_no_other_quads(quads: int) -> None:
    """What is refused before a run starts would be refused in it."""
    with pytest.raises(MeasurementError, match="max_quads must be an integer between 1 and 40"):
        compare(lambda: 1.0, lambda: 1.0, seed=0, max_quads=quads)
