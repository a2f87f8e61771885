"""YAML read safely, every value with the line it stands on.

Only plain data: no tags, text keys, no key twice, and sizes bounded, so that no file can run code, hide a value behind
another or expand without end. Scalars follow YAML 1.2: `1e-3` is a number, `no` is text and `010` is ten.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zimage.errors import ExperimentError, ZImageError

import yaml

MAX_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 20
Place = tuple[str | int, ...]

_SCALARS = {
    "tag:yaml.org,2002:null": (r"|~|null|Null|NULL", "~nN"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), [*_first, ""])


@dataclass(frozen=True)
class Document:
    """The value of a YAML file, and the line of each place in it; or a program's value, whose lines are None."""

    path: Path | str
    value: Any
    lines: dict[Place, int] | None
    kind: type[ZImageError] = ExperimentError  # what a mistake in it is

    def line(self, place: Place) -> int:
        """The line of `place`, or of the nearest thing around it."""
        lines = self.lines or {}
        while place and place not in lines:
            place = place[:-1]
        return lines.get(place, 1)

    def where(self, place: Place) -> str:
        """The file and the line of `place`."""
        return f"{self.path}:{self.line(place)}" if self.lines is not None else str(self.path)

    def error(self, place: Place, message: str) -> ZImageError:
        """An error of the document's kind that names the file and the line."""
        return self.kind(f"{self.where(place)}: {message}")


def load(path: Path, name: str = "an experiment file", kind: type[ZImageError] = ExperimentError) -> Document:
    """The YAML file `path`, in words `name`; a .json file is read as the YAML that it is.

    Raises an error of `kind` with file and line for anything that is not plain bounded data.
    """
    try:
        if not path.is_file():
            raise kind(f"{path}: {'not a file' if path.exists() else 'no such file'}; give {name}")
        if path.stat().st_size > MAX_BYTES:
            raise kind(f"{path}: larger than {MAX_BYTES >> 20} MiB, too large for {name}")
        text = path.read_bytes()
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror or error}") from None
    if path.suffix == ".json":
        text = text.replace(b"\t", b" ")  # YAML indents with spaces only, and no text in JSON holds a bare tab
    return _Builder(path, kind).document(text)


def parse_value(text: str) -> Any:
    """The value of a piece of YAML given on a command line. Raises ExperimentError."""
    try:
        return _Builder(Path("value"), ExperimentError).document(text.encode("utf-8", "surrogateescape")).value
    except ExperimentError as error:
        raise ExperimentError(str(error).partition(": ")[2]) from None  # a word on a command line has no file and line


class _Builder:
    def __init__(self, path: Path, kind: type[ZImageError]) -> None:
        self.path = path
        self.kind = kind
        self.lines: dict[Place, int] = {}
        self.count = 0

    def document(self, text: bytes) -> Document:
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                value = None if node is None else self.build(loader, node, ())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise self.kind(f"{self.path}:{line}: not valid YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise self.kind(f"{self.path}: not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise self.kind(f"{self.path}: nested too deeply") from None
        return Document(self.path, value, self.lines, self.kind)

    def build(self, loader: _Loader, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        self.count += 1
        if self.count > MAX_VALUES or len(place) > MAX_DEPTH:
            what = f"more than {MAX_VALUES} values" if self.count > MAX_VALUES else f"nested deeper than {MAX_DEPTH}"
            raise self.kind(f"{self.path}:{line}: {what}, aliases expanded; write less or split the file")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(loader, node, place)
        if isinstance(node, yaml.SequenceNode):
            self.plain(node, "tag:yaml.org,2002:seq")
            return [self.build(loader, item, (*place, index)) for index, item in enumerate(node.value)]
        self.plain(node, "tag:yaml.org,2002:str", *_SCALARS)
        return self.scalar(node)

    def mapping(self, loader: _Loader, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        self.plain(node, "tag:yaml.org,2002:map")
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise self.kind(f"{self.path}:{line}: key {shown} is not text; put it in quotes")
            key = str(key_node.value)
            if key in result:
                first = self.lines[(*place, key)]
                raise self.kind(f"{self.path}:{line}: key {key!r} is there twice (first on line {first})")
            self.lines[(*place, key)] = line
            result[key] = self.build(loader, value_node, (*place, key))
        return result

    def plain(self, node: yaml.Node, *tags: str) -> None:
        if node.tag not in tags:
            raise self.kind(
                f"{self.path}:{node.start_mark.line + 1}: tag {node.tag!r} is not accepted; write plain values"
            )

    def scalar(self, node: yaml.Node) -> Any:
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        line = node.start_mark.line + 1
        try:
            if kind == "int":
                return int(text, 16) if text.lower().startswith("0x") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text, flags=re.IGNORECASE))
        except ValueError:
            raise self.kind(f"{self.path}:{line}: {text[:40]!r} is not a usable number") from None
        if kind == "bool":
            return text.lower() == "true"
        return None if kind == "null" else text
