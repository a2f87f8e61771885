"""A notebook's code and its parameters, read without running anything.

The cell tagged `parameters` has one assignment a line. The type of a parameter is its annotation (`batch: int = 1`),
its type comment (`batch = 1  # type: int`) or else the type of its default. The notebook's metadata may hold
`"zimage": {"models": 2.25}`: how many models' weights it holds at once, counted in whole models; 1 if left out.
"""

import ast
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.errors import ExperimentError, ZImageError, unknown
from zimage.lab.values import Check, anything, check_of

MAX_NOTEBOOK_BYTES = 64 * 2**20
MAX_MODELS = 1000
_PLAIN: dict[str, type] = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "List": list, "dict": dict, "Dict": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook: its default, its type as written, a test of that type and a check of what fits."""

    name: str
    default: Any
    type: str
    fits: Callable[[Any], bool]
    check: Check = anything

    def accept(self, value: Any) -> Any:
        """`value` as the notebook gets it: an int becomes a float where a float is wanted. Raises ExperimentError."""
        if isinstance(value, int) and not isinstance(value, bool) and not self.fits(value):
            try:
                if self.fits(float(value)):
                    value = float(value)
            except OverflowError:
                pass
        if not self.fits(value):
            hint = f"; write [{value}]" if isinstance(value, (str, int, float)) and self.fits([value]) else ""
            raise ExperimentError(
                f"parameter {self.name!r} takes {self.type}, not {type(value).__name__} {value!r:.60}{hint}"
            )
        if not _storable(value):
            raise ExperimentError(f"parameter {self.name!r}: {value!r:.60} is not finite, or no valid text")
        try:
            self.check(value)
        except ZImageError as error:
            raise ExperimentError(str(error)) from None
        return value


@dataclass(frozen=True)
class Notebook:
    """A notebook file: the sources of its code cells and its parameters by name."""

    path: Path
    name: str  # relative to its project, as recorded with a run
    code: tuple[str, ...]
    parameters: dict[str, Parameter]
    title: str = ""  # its first heading
    models: float = 1  # whose weights it holds at once; a fraction where arms share arrays

    def resolve(self, given: dict[str, Any]) -> dict[str, Any]:
        """All parameters: `given` over the defaults. Raises ExperimentError for an unknown name or a wrong type."""
        for name in given:
            if name not in self.parameters:
                raise ExperimentError(unknown(f"{self.name} has no parameter", name, self.parameters))
        return {
            name: parameter.accept(given.get(name, parameter.default)) for name, parameter in self.parameters.items()
        }


def project_root(start: Path) -> Path:
    """The nearest folder around the file `start` that holds `notebooks/`, else the file's own folder."""
    # pathlib's own resolve and is_dir raise for loops of links, names too long and folders nobody may enter.
    folder = Path(os.path.realpath(start)).parent
    return next((parent for parent in (folder, *folder.parents) if os.path.isdir(parent / "notebooks")), folder)


def read(path: Path, root: Path | None = None) -> Notebook:
    """The notebook in `path`, named relative to `root`. Raises ExperimentError, one line, if it is not usable."""
    name = path
    if root is not None:
        whole, base = (Path(os.path.realpath(one)) for one in (path, root))
        name = whole.relative_to(base) if whole.is_relative_to(base) else path
    content = _content(path)
    cells = content["cells"]
    code = [cell for cell in cells if cell.get("cell_type") == "code"]
    tagged = [(index + 1, cell) for index, cell in enumerate(cells) if "parameters" in _tags(cell)]
    tagged = [(number, cell) for number, cell in tagged if cell.get("cell_type") == "code"]
    if len(tagged) != 1:
        found = "no cell is" if not tagged else f"cells {', '.join(str(number) for number, _ in tagged)} are"
        raise ExperimentError(f"{path}: {found} tagged 'parameters'; tag the one code cell that holds the defaults")
    number, cell = tagged[0]
    parameters = _parameters(_source(cell), f"{path}, cell {number}", path.stem)
    sources = tuple(_source(cell) for cell in code)
    return Notebook(path, name.as_posix(), sources, parameters, _title(cells), _models(content, path))


def _models(content: dict[str, Any], path: Path) -> float:
    metadata = content.get("metadata")
    own = metadata.get("zimage", {}) if isinstance(metadata, dict) else {}
    if not isinstance(own, dict) or own.keys() - {"models"}:
        raise ExperimentError(f'{path}: metadata zimage is {own!r:.60}, expected {{"models": NUMBER}}')
    models = own.get("models", 1)
    number = isinstance(models, (int, float)) and not isinstance(models, bool)
    if not number or not 0 < models <= MAX_MODELS:
        raise ExperimentError(
            f"{path}: metadata zimage.models is {models!r:.60}, expected how many models' weights it holds at once: a "
            f"number above 0, at most {MAX_MODELS}"
        )
    return float(models)


def _title(cells: list[dict[str, Any]]) -> str:
    texts = (_source(cell) for cell in cells if cell.get("cell_type") == "markdown")
    headings = (line.lstrip("#").strip() for text in texts for line in text.splitlines() if line.startswith("# "))
    return next(headings, "")


def _content(path: Path) -> dict[str, Any]:
    """What the file holds; its `cells` are a list of dicts."""
    try:
        if not path.is_file():
            raise ExperimentError(f"{path}: {'not a file; name a notebook' if path.exists() else 'no such notebook'}")
        if path.stat().st_size > MAX_NOTEBOOK_BYTES:
            raise ExperimentError(f"{path}: larger than {MAX_NOTEBOOK_BYTES >> 20} MiB; clear its outputs")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: not a notebook: {str(error).splitlines()[0]}") from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells) or content.get("nbformat") != 4:
        raise ExperimentError(f"{path}: not a notebook of format 4; open and save it in JupyterLab")
    return content


def _tags(cell: dict[str, Any]) -> list[Any]:
    metadata = cell.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    return tags if isinstance(tags, list) else []


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", "")
    return "".join(map(str, source)) if isinstance(source, list) else str(source)


def _parameters(source: str, where: str, notebook: str) -> dict[str, Parameter]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about literals in the user's code
            body = ast.parse(source, type_comments=True).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise ExperimentError(f"{where}, line {line or 1}: not Python: {str(error).splitlines()[0]}") from None
    parameters: dict[str, Parameter] = {}
    lines: set[int] = set()
    for statement in body:
        place = f"{where}, line {statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        target, value = _assignment(statement, place)
        if target in parameters or statement.lineno in lines:
            raise ExperimentError(f"{place}: give each parameter once, one a line")
        lines.add(statement.lineno)
        try:
            default = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ExperimentError(f"{place}: the default of {target!r} is not a plain value") from None
        check = check_of(notebook, target, default)
        parameters[target] = _parameter(target, default, _annotation(statement, place), place, check)
    return parameters


def _assignment(statement: ast.stmt, place: str) -> tuple[str, ast.expr]:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None:
        return statement.target.id, statement.value
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    raise ExperimentError(f"{place}: the parameters cell holds assignments only, as in 'batch: int = 1'")


def _annotation(statement: ast.stmt, place: str) -> ast.expr | None:
    if isinstance(statement, ast.AnnAssign):
        return statement.annotation
    comment = (getattr(statement, "type_comment", None) or "").partition("#")[0].strip()
    if not comment:
        return None
    for text in (comment, comment.split()[0]):  # papermill lets a help text follow the type
        try:
            return ast.parse(text, mode="eval").body
        except SyntaxError:
            continue
    raise ExperimentError(f"{place}: type comment {comment!r} is not a type")


def _parameter(name: str, default: Any, annotation: ast.expr | None, place: str, check: Check) -> Parameter:
    if annotation is not None:
        fits, text = _test(annotation, place), ast.unparse(annotation)
    elif default is None:
        fits, text = (lambda _: True), "any value"
    elif type(default) in (int, float, str, bool, list, dict):
        fits, text = _instance(type(default)), type(default).__name__
    else:
        raise ExperimentError(
            f"{place}: the default of {name!r} is a {type(default).__name__}; use int, float, str, ..."
        )
    parameter = Parameter(name, default, text, fits, check)
    try:
        parameter.accept(default)
    except ExperimentError as error:
        raise ExperimentError(f"{place}: the default does not fit: {error}") from None
    return parameter


def _test(node: ast.expr, place: str) -> Callable[[Any], bool]:  # noqa: PLR0911 - one return a form
    """A test of whether a value has the type that `node` writes."""
    match node:
        case ast.Constant(value=None):
            return lambda value: value is None
        case ast.Constant(value=str() as quoted):
            try:
                return _test(ast.parse(quoted, mode="eval").body, place)
            except SyntaxError:
                pass
        case ast.Name(id="Any"):
            return lambda _: True
        case ast.Name(id=name) if name in _PLAIN:
            return _instance(_PLAIN[name])
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _either([_test(left, place), _test(right, place)])
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _either([_test(inner, place), lambda value: value is None])
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return _either([_test(member, place) for member in members])
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            allowed = [member.value for member in members if isinstance(member, ast.Constant)]
            return lambda value: any(type(value) is type(one) and value == one for one in allowed)
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            item = _test(inner, place)
            return lambda value: isinstance(value, list) and all(map(item, value))
        case ast.Subscript(value=ast.Name(id="dict" | "Dict"), slice=ast.Tuple(elts=[keys, values])):
            key_test, value_test = _test(keys, place), _test(values, place)
            return lambda value: (
                isinstance(value, dict) and all(map(key_test, value)) and all(map(value_test, value.values()))
            )
    raise ExperimentError(f"{place}: type {ast.unparse(node)!r} is not one of int, float, str, bool, list, dict, None")


def _instance(kind: type) -> Callable[[Any], bool]:
    # bool is a subclass of int, and True is no count
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _either(tests: list[Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: any(test(value) for test in tests)


def _storable(value: Any) -> bool:
    """Whether strict JSON in UTF-8 can hold it: no NaN, no infinity, no lone surrogate."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(map(_storable, value)) and all(map(_storable, value.values()))
    return not isinstance(value, list) or all(map(_storable, value))
