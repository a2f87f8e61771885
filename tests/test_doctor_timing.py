"""Timings come from the one timer of the project."""

import ast
from pathlib import Path

import zimage

PACKAGE = Path(zimage.__file__).parent


def test_nothing_else_takes_a_timing() -> None:
    """Only measure reads the precise clock, calls in timing and whole loads, in processes of their own, in reporting.

    Besides, blas does before MLX may load, training for its progress, and peers in interpreters without zimage.
    """
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("perf_counter", "perf_counter_ns")
    }
    assert readers == {"measure/timing.py", "measure/reporting.py", "blas.py", "digits/train.py", "peers/step.py"}
