"""Experiment files: what they mean, and what is refused with its line."""

from pathlib import Path
from typing import Any

from tests.lab.making import write_experiment, write_notebook
from zimage.errors import ExperimentError
from zimage.lab import experiment
from zimage.lab.experiment import Experiment

import pytest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_notebook(tmp_path / "notebooks" / "a.ipynb")
    write_notebook(tmp_path / "notebooks" / "b.ipynb", parameters="batch: int = 7\nother: str = 'x'")
    return tmp_path


def read(project: Path, text: str) -> Experiment:
    return experiment.read(write_experiment(project, text))


def shown(found: Experiment, *names: str, **options: Any) -> list[tuple[Any, ...]]:
    return [tuple(run.parameters[name] for name in names) for run in found.plan(**options)]


def test_defaults_alone_are_one_run(project: Path) -> None:
    """A file without parameters asks for one run with all the notebook's defaults."""
    (run,) = read(project, "").plan()
    assert run.parameters == {
        "batch": 1, "scale": 1.0, "dtype": "float32", "heavy": False, "sizes": [8, 16], "label": None,
    }  # fmt: skip


def test_expansion_order(project: Path) -> None:
    """The zipped axis varies slowest, then the grid in its order; include comes last; exclude drops what matches."""
    found = read(
        project,
        "zip: {batch: [1, 2], dtype: [a, b]}\ngrid: {scale: [1, 2]}\n"
        "exclude: [{batch: 2, scale: 2}]\ninclude: [{batch: 9}]\n",
    )
    names = ("batch", "dtype", "scale")
    assert shown(found, *names) == [(1, "a", 1.0), (1, "a", 2.0), (2, "b", 1.0), (9, "float32", 1.0)]


def test_duplicates_are_dropped(project: Path) -> None:
    """A combination asked for twice, also as 1 and 1.0 where a float is wanted, runs once."""
    found = read(project, "grid: {scale: [1, 1.0, 2]}\ninclude: [{scale: 2}]\n")
    assert shown(found, "scale") == [(1.0,), (2.0,)]


def test_true_is_not_one(project: Path) -> None:
    """A notebook whose untyped parameter takes anything keeps True and 1 apart."""
    write_notebook(project / "notebooks" / "a.ipynb", parameters="x = None")
    assert shown(read(project, "grid: {x: [1, true, null]}\n"), "x") == [(1,), (True,), (None,)]


def test_quick_merges_parameters_and_replaces_axes(project: Path) -> None:
    """--quick keeps the other parameters and replaces each of zip, grid, exclude, include that it names."""
    found = read(
        project,
        "parameters: {dtype: big, label: x}\ngrid: {batch: [1, 2], scale: [1, 2]}\ninclude: [{batch: 5}]\n"
        "quick:\n  parameters: {dtype: small}\n  grid: {batch: [3]}\n  include: []\n",
    )
    assert shown(found, "batch", "dtype", "label", "scale", quick=True) == [(3, "small", "x", 1.0)]
    assert len(found.plan()) == 5


def test_quick_needs_a_quick_part(project: Path) -> None:
    """--quick for a file that has none is refused instead of running it all."""
    with pytest.raises(ExperimentError, match="has no 'quick'"):
        read(project, "grid: {batch: [1, 2]}\n").plan(quick=True)


def test_quick_axis_wins_over_wide_parameter(project: Path) -> None:
    """An axis that quick brings wins over a parameter of the wide file."""
    found = read(project, "parameters: {batch: 1}\nquick: {grid: {batch: [3, 4]}}\n")
    assert shown(found, "batch", quick=True) == [(3,), (4,)]


def test_overrides_win_and_take_axes_away(project: Path) -> None:
    """A forced parameter wins over parameters, axes and include, and what it makes equal runs once."""
    found = read(
        project, "zip: {batch: [1, 2], scale: [3, 4]}\ngrid: {dtype: [a, b]}\ninclude: [{batch: 8, dtype: a}]\n"
    )
    assert shown(found, "batch", "scale", "dtype", overrides={"batch": 5}) == [
        (5, 3.0, "a"), (5, 3.0, "b"), (5, 4.0, "a"), (5, 4.0, "b"), (5, 1.0, "a"),
    ]  # fmt: skip
    assert shown(found, "dtype", overrides={"batch": 5, "scale": 1, "dtype": "c"}) == [("c",)]


@pytest.mark.parametrize(
    "forced", [{"bacth": 1}, {"batch": "x"}, {"batch": 1.5}, {"batch": True}, {"scale": float("inf")}]
)
def test_bad_overrides(project: Path, forced: dict[str, Any]) -> None:
    """An override that no notebook accepts is refused."""
    with pytest.raises(ExperimentError, match=r"batch|scale"):
        read(project, "").plan(overrides=forced)


def test_list_of_notebooks(project: Path) -> None:
    """Each notebook of a list gets the parameters it knows, and runs of it that are then equal happen once."""
    path = write_experiment(project, "grid: {batch: [1, 2], scale: [1, 2]}\n")
    path.write_text(path.read_text().replace("notebooks/a.ipynb", "[notebooks/a.ipynb, notebooks/b.ipynb]"))
    runs = experiment.read(path).plan()
    assert [run.notebook.name for run in runs] == ["notebooks/a.ipynb"] * 4 + ["notebooks/b.ipynb"] * 2
    assert [run.parameters for run in runs[4:]] == [{"batch": 1, "other": "x"}, {"batch": 2, "other": "x"}]


def test_list_of_notebooks_refuses_what_none_knows(project: Path) -> None:
    """A parameter that no notebook of the list has is refused with its line."""
    path = write_experiment(project, "parameters: {other: y, missing: 1}\n")
    path.write_text(path.read_text().replace("notebooks/a.ipynb", "[notebooks/a.ipynb, notebooks/b.ipynb]"))
    with pytest.raises(ExperimentError, match=r"demo\.yaml:5: none of the notebooks has a parameter 'missing'"):
        experiment.read(path)


BAD = {
    "unknown key": ("grdi: {batch: [1]}", 5, "unknown key 'grdi'; did you mean 'grid'?"),
    "unknown quick key": ("quick:\n  gird: {}", 6, "unknown key 'gird'; did you mean 'grid'?"),
    "key twice": ("grid: {}\ngrid: {}", 6, "key 'grid' is there twice (first on line 5)"),
    "inner key twice": ("grid:\n  batch: [1]\n  batch: [2]", 7, "key 'batch' is there twice"),
    "unknown parameter": ("parameters:\n  bacth: 1", 6, "has no parameter 'bacth'; did you mean 'batch'?"),
    "unknown axis": ("grid:\n  batch: [1]\n  nope: [1]", 7, "has no parameter 'nope'"),
    "unknown in exclude": ("exclude:\n- {batch: 1}\n- {nope: 1}", 7, "has no parameter 'nope'"),
    "unknown in include": ("include: [{nope: 1}]", 5, "has no parameter 'nope'"),
    "unknown in quick": ("quick:\n  grid:\n    nope: [1]", 7, "has no parameter 'nope'"),
    "text for int": ("parameters: {batch: two}", 5, "'batch' takes int, not str 'two'"),
    "float for int": ("parameters: {batch: 1.5}", 5, "'batch' takes int, not float 1.5"),
    "bool for int": ("parameters: {batch: true}", 5, "'batch' takes int, not bool True"),
    "int for bool": ("parameters: {heavy: 1}", 5, "'heavy' takes bool, not int 1"),
    "int for text": ("parameters: {dtype: 16}", 5, "'dtype' takes str, not int 16"),
    "null for text": ("parameters: {dtype:}", 5, "'dtype' takes str, not NoneType None"),
    "int for text or null": ("parameters: {label: 3}", 5, "'label' takes str | None, not int 3"),
    "wrong list item": ("parameters: {sizes: [8, x]}", 5, "'sizes' takes list[int]"),
    "int beyond float": (f"parameters: {{scale: 1{'0' * 400}}}", 5, "'scale' takes float"),
    "infinite": ("parameters: {scale: .inf}", 5, "inf is not finite"),
    "no text": ('parameters: {dtype: "a\\ud800"}', 5, "no valid text"),
    "nan": ("grid:\n  scale:\n  - 1\n  - .nan", 8, "nan is not finite"),
    "wrong type on an axis": ("grid:\n  batch:\n  - 1\n  - x", 8, "'batch' takes int, not str 'x'"),
    "wrong type in quick": ("quick:\n  parameters:\n    batch: x", 7, "'batch' takes int"),
    "axis no list": ("grid: {batch: 1}", 5, "'grid.batch' takes a list, found int 1"),
    "grid no mapping": ("grid: [1]", 5, "'grid' takes names with their values, found list [1]"),
    "empty axis": ("grid: {batch: []}", 5, "'batch' is an empty list"),
    "zip lengths": ("zip: {batch: [1, 2], scale: [1]}", 5, "batch has 2, scale has 1"),
    "axis and parameter": ("parameters: {batch: 1}\ngrid: {batch: [1]}", 6, "also a parameter (line 5)"),
    "quick parameter and wide axis": (
        "grid: {batch: [1]}\nquick: {parameters: {batch: 1}}",
        5,
        "also a parameter (line 6)",
    ),
    "zip and grid": ("zip: {batch: [1]}\ngrid: {batch: [1]}", 6, "in zip and in grid"),
    "quick zip and wide grid": ("grid: {batch: [1]}\nquick: {zip: {batch: [1]}}", 5, "in zip and in grid"),
    "empty exclude": ("exclude: [{}]", 5, "exclude holds an empty entry"),
    "timeout text": ("timeout_s: soon", 5, "'timeout_s' takes a number, found str 'soon'"),
    "timeout zero": ("timeout_s: 0", 5, "'timeout_s' must be greater than 0, found int 0"),
    "timeout infinite": ("timeout_s: .inf", 5, "'timeout_s' must be at most 604800, found float inf"),
    "timeout bool": ("timeout_s: true", 5, "'timeout_s' takes a number, found bool True"),
    "quick no mapping": ("quick: 3", 5, "'quick' takes names with their values, found int 3"),
    "exclude no list": ("exclude: {batch: 1}", 5, "'exclude' takes a list, found dict"),
    "not YAML": ("grid: {batch: [1", 6, "not valid YAML"),
    "tab": ("grid:\n\tbatch: [1]", 6, "not valid YAML"),
    "python tag": ("parameters: !!python/object/apply:os.system ['true']", 5, "tag"),
    "number as key": ("grid: {1: [1]}", 5, "key 1 is not text"),
    "list as key": ("grid: {[1]: [1]}", 5, "key a list or mapping is not text"),
    "second document": ("---\nkind: x", 5, "not valid YAML"),
    "merge key": ("grid: {<<: {batch: [1]}}", 5, "'grid.<<'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_its_line(project: Path, case: str) -> None:
    """What is wrong in a file gives one line that names the file, the line and the trouble."""
    text, line, message = BAD[case]
    with pytest.raises(ExperimentError) as caught:
        read(project, text + "\n")
    said = str(caught.value)
    assert f"demo.yaml:{line}: " in said
    assert message in said
    assert "\n" not in said


HEADS = {
    "claims": ("kind: claims\nname: x\n", 1, "kind 'claims' is not an experiment"),
    "no kind": ("name: x\n", 1, "key 'kind' is missing"),
    "a list": ("- 1\n", 1, "an experiment file is a mapping"),
    "empty": ("", 1, "an experiment file is a mapping"),
    "no notebook": ("kind: experiment\nname: x\nquestion: q\n", 1, "key 'notebook' is missing"),
    "notebooks empty": ("kind: experiment\nname: x\nquestion: q\nnotebook: []\n", 4, "must not be empty"),
    "notebook absent": ("kind: experiment\nname: x\nquestion: q\nnotebook: notebooks/z.ipynb\n", 4, "not found in"),
    "notebook too long": (f"kind: experiment\nname: x\nquestion: q\nnotebook: {'x' * 5000}\n", 4, "x... not found"),
    "notebook a number": ("kind: experiment\nname: x\nquestion: q\nnotebook: 3\n", 4, "takes a list, found int 3"),
    "notebook twice": (
        "kind: experiment\nname: x\nquestion: q\nnotebook:\n- notebooks/a.ipynb\n- notebooks/a.ipynb\n", 6, "twice",
    ),
    "name a path": ("kind: experiment\nname: ../x\nquestion: q\nnotebook: notebooks/a.ipynb\n", 2, "name '../x'"),
    "name reserved": ("kind: experiment\nname: assets\nquestion: q\nnotebook: notebooks/a.ipynb\n", 2, "'assets'"),
    "name a number": ("kind: experiment\nname: 3\nquestion: q\nnotebook: notebooks/a.ipynb\n", 2, "takes text, found"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_refused_head(project: Path, case: str) -> None:
    """A file that is no experiment, or has no usable name or notebook, is refused with its line."""
    text, line, message = HEADS[case]
    path = project / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        experiment.read(path)
    assert f"x.yaml:{line}: " in str(caught.value)
    assert message in str(caught.value)


def test_several_errors(project: Path) -> None:
    """Of several errors the first is told, and how many more there are."""
    with pytest.raises(ExperimentError, match=r"demo.yaml:5: unknown key 'a'.*\(and 1 more\)"):
        read(project, "a: 1\ntimeout_s: x\n")


def test_explosion_is_refused(project: Path) -> None:
    """A grid of too many combinations is refused before it is expanded."""
    many = list(range(1, 1001))
    found = read(project, f"grid: {{batch: {many}, scale: {many}, heavy: [true, false]}}\n")
    with pytest.raises(ExperimentError, match="2000000 combinations are more than"):
        found.plan()


def test_nothing_left_to_run(project: Path) -> None:
    """A file whose exclude drops everything is refused."""
    with pytest.raises(ExperimentError, match="nothing to run"):
        read(project, "grid: {batch: [1]}\nexclude: [{batch: 1}]\n").plan()


def test_root_is_the_nearest_folder_with_notebooks(tmp_path: Path) -> None:
    """Without notebooks/ above, paths are relative to the experiment file itself."""
    write_notebook(tmp_path / "deep" / "n.ipynb")
    path = tmp_path / "deep" / "x.yaml"
    path.write_text("kind: experiment\nname: x\nquestion: q\nnotebook: n.ipynb\n")
    found = experiment.read(path)
    assert (found.root, found.notebooks[0].name) == (tmp_path / "deep", "n.ipynb")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("batch", "3", 3), ("scale", "1e-3", 1e-3), ("dtype", "16", "16"), ("label", "null", None), ("sizes", "[1]", [1]),
     ("dtype", "a: b: c", "a: b: c"), ("heavy", "true", True)],
)  # fmt: skip
def test_values_from_a_command_line(project: Path, name: str, text: str, value: Any) -> None:
    """A command line's text is YAML, or itself where only a text fits."""
    found = experiment.value_from_text(read(project, "").notebooks, name, text)
    assert found == value
    assert type(found) is type(value)
