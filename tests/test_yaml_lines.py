"""YAML: safe, bounded, with lines."""

import os
from pathlib import Path
from typing import Any

from zimage.errors import ExperimentError
from zimage.yaml_lines import load, parse_value

import pytest


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("5", 5), ("010", 10), ("0x1F", 31), ("no", "no"), ("true", True), ("~", None), ("1:30", "1:30"),
     ("2024-01-01", "2024-01-01"), ("'1'", "1"), (".5", 0.5), ("-3.", -3.0), ("1_000", "1_000"), ("", None)],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    """Scalars are what YAML 1.2 makes of them."""
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_lines(tmp_path: Path) -> None:
    """Every key and item knows its line; an unknown place has the line of what is around it."""
    path = tmp_path / "x.yaml"
    path.write_text("# c\na:\n  b:\n  - 1\n  - 2\n")
    found = load(path)
    assert [found.line(place) for place in [("a",), ("a", "b"), ("a", "b", 1), ("a", "b", 1, "z")]] == [2, 3, 5, 5]


def test_alias_bomb(tmp_path: Path) -> None:
    """Aliases that expand without end are refused quickly, and aliases as such work."""
    path = tmp_path / "x.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ExperimentError, match="more than 20000 values"):
        load(path)
    path.write_text("a: &x [1]\nb: *x\n")
    assert load(path).value == {"a": [1], "b": [1]}


BAD = {
    "alias to itself": (b"a: &a [*a]", "nested deeper"),
    "deep": (b"[" * 5000, "nested too deeply|not valid YAML"),
    "deep block": (b"".join(b" " * i + b"a:\n" for i in range(400)), "nested"),
    "binary": (b"\x00\xff\xfe\x01", "not valid YAML"),
    "latin-1": ("a: \xe9".encode("latin-1"), "not valid YAML"),
    "long number": (b"a: " + b"9" * 10000, "not a usable number"),
    "too big": (b"#" * (2**20 + 1), "larger than 1 MiB"),
    "unknown alias": (b"a: *b", "undefined alias"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path: Path, case: str) -> None:
    """Hostile or broken files give one line."""
    content, message = BAD[case]
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    """A folder, a pipe and nothing at all are named as what they are not."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in [(".", "not a file"), ("pipe", "not a file"), ("none", "no such file")]:
        with pytest.raises(ExperimentError, match=message):
            load(tmp_path / name)
