"""A notebook's parameters, read without running it."""

import json
from pathlib import Path
from typing import Any

from tests.lab.making import write_notebook
from zimage.errors import ExperimentError
from zimage.lab import notebook

import pytest


def test_types_and_defaults(tmp_path: Path) -> None:
    """Annotations, type comments (with papermill's help text) and bare defaults give the type."""
    path = write_notebook(
        tmp_path / "n.ipynb",
        parameters='"""Text."""\na: int = 1\nb = 2.0  # type: float  # more\nc = "x"\nd = -1  # type: int the depth\n'
        "e: 'list[str] | None' = None\nf: Optional[int] = None\ng: Literal['p', 'q'] = 'p'\nh: dict[str, int] = {}\n",
    )
    found = notebook.read(path).parameters
    assert {name: (one.type, one.default) for name, one in found.items()} == {
        "a": ("int", 1), "b": ("float", 2.0), "c": ("str", "x"), "d": ("int", -1),
        "e": ("'list[str] | None'", None), "f": ("Optional[int]", None), "g": ("Literal['p', 'q']", "p"),
        "h": ("dict[str, int]", {}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [("int", [0, -3], [True, 1.0, "1", None]), ("float", [1.5, 2], [True, "1", None]), ("bool", [True], [1, "true"]),
     ("list[float]", [[], [1.0]], [["x"], 1.0, [True]]), ("Optional[int]", [None, 3], ["x", False]),
     ("Union[int, str]", [1, "x"], [1.5, None]), ("Literal[1, 'a']", [1, "a"], [True, 2, "b"]),
     ("dict[str, int]", [{}, {"a": 1}], [{"a": "b"}, []]), ("list", [[1, "x"]], [(), "x"]), ("Any", [None, 1], [])],
)  # fmt: skip
def test_accept(tmp_path: Path, type_: str, good: list[Any], bad: list[Any]) -> None:
    """A parameter takes values of its type only; an int is taken for a float."""
    default = repr(good[0])
    found = notebook.read(write_notebook(tmp_path / "n.ipynb", parameters=f"x: {type_} = {default}")).parameters["x"]
    for value in good:
        assert found.accept(value) == value
    for value in bad:
        with pytest.raises(ExperimentError, match="parameter 'x' takes"):
            found.accept(value)


def test_int_becomes_float(tmp_path: Path) -> None:
    """Where a float is wanted 2 and 2.0 are the same parameter, so that they make the same run."""
    found = notebook.read(write_notebook(tmp_path / "n.ipynb", parameters="x: float = 1")).resolve({"x": 2})
    assert repr(found) == "{'x': 2.0}"


BAD = {
    "a call": ("a = print(1)", "line 1: the default of 'a' is not a plain value"),
    "an import": ("import os", "line 1: the parameters cell holds assignments only"),
    "two on a line": ("a = 1; b = 2", "line 1: give each parameter once, one a line"),
    "twice": ("a = 1\na = 2", "line 2: give each parameter once"),
    "chained": ("a = b = 1", "assignments only"),
    "unpacked": ("a, b = 1, 2", "assignments only"),
    "no value": ("a: int", "assignments only"),
    "not Python": ("a = = 1", "line 1: not Python"),
    "strange type": ("a: Decimal = 1", "type 'Decimal' is not one of"),
    "strange type comment": ("a = 1  # type: ???", "is not a type"),
    "tuple": ("a = (1, 2)", "the default of 'a' is a tuple"),
    "default of another type": ("a: int = 'x'", "the default does not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_cell(tmp_path: Path, case: str) -> None:
    """A parameters cell that cannot be read gives one line with the notebook, cell and line."""
    source, message = BAD[case]
    with pytest.raises(ExperimentError) as caught:
        notebook.read(write_notebook(tmp_path / "n.ipynb", parameters=source))
    assert "n.ipynb, cell 1" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "x", '{"nbformat": 3, "cells": []}', '{"nbformat": 4, "cells": [1]}', "[" * 100000]
)
def test_no_notebook(tmp_path: Path, content: str) -> None:
    """A file that is no notebook gives one line."""
    path = tmp_path / "n.ipynb"
    path.write_text(content)
    with pytest.raises(ExperimentError, match="not a notebook"):
        notebook.read(path)


def test_paths_that_cannot_be_followed(tmp_path: Path) -> None:
    """A link to itself and a name that is too long have a project folder, and are refused in one line."""
    loop = tmp_path / "loop.ipynb"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / ("x" * 5000), tmp_path / ("x" * 5000) / "n.ipynb"):
        assert isinstance(notebook.project_root(path), Path)
        with pytest.raises(ExperimentError) as caught:
            notebook.read(path, tmp_path)
        assert "\n" not in str(caught.value)


def test_the_tag_is_needed_once(tmp_path: Path) -> None:
    """No tagged cell, or two, is refused."""
    with pytest.raises(ExperimentError, match="no cell is tagged 'parameters'"):
        notebook.read(write_notebook(tmp_path / "n.ipynb", "x = 1", tag="other"))
    path = write_notebook(tmp_path / "n.ipynb", "x = 1")
    content = json.loads(path.read_text())
    content["cells"] = [content["cells"][0]] * 2
    path.write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match="cells 1, 2 are tagged 'parameters'"):
        notebook.read(path)
