"""Values of parameters that no notebook can do anything with."""

from pathlib import Path
from typing import Any

from tests.lab.making import write_notebook
from zimage import arms, transform_names
from zimage.errors import ExperimentError, MeasurementError
from zimage.lab import notebook, values
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
    """None of them means something else by one of these names."""
    for name, parameter in notebook.read(path).parameters.items():
        assert parameter.check is values.CHECKS.get(name, values.anything)


def test_names_of_transforms() -> None:
    """Those that are known without MLX are those that there are."""
    assert transform_names.KNOWN == tuple(arms.TRANSFORMS)


@pytest.mark.parametrize("quads", [0, 41])
def test_a_comparison_takes_no_other_quads(quads: int) -> None:
    """What is refused before a run starts would be refused in it."""
    with pytest.raises(MeasurementError, match="max_quads must be an integer between 1 and 40"):
        compare(lambda: 1.0, lambda: 1.0, seed=0, max_quads=quads)
