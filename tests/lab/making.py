"""Small projects, notebooks and runs for the lab's tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage.lab import runner
from zimage.lab.recording import append_rows

import pandas as pd
import pytest

FACTS = {"device": "cpu-test-2c", "mlx": "0.32.4", "driver": "unknown", "blas": "test", "MLX_X": "1"}
PARAMETERS = """batch: int = 1
scale: float = 1.0
dtype: str = "float32"
heavy = False  # type: bool
sizes: list[int] = [8, 16]
label: str | None = None
"""
RECORDS = """import pandas as pd
import zimage
zimage.lab.record("quality", pd.DataFrame({"arm": ["baseline"], "step": [batch], "metric": ["m"], "value": [scale]}))
"""


def write_notebook(path: Path, *cells: str, parameters: str | None = PARAMETERS, tag: str = "parameters") -> Path:
    """A notebook of format 4 with a parameters cell, a text cell and `cells`; its kernel does not exist."""
    blank: dict[str, Any] = {"metadata": {}, "outputs": [], "execution_count": None, "cell_type": "code"}
    content = [{**blank, "id": "p", "source": parameters, "metadata": {"tags": [tag]}}] if parameters else []
    content.append({"cell_type": "markdown", "id": "m", "metadata": {}, "source": ["# A question"]})
    content += [{**blank, "id": f"c{index}", "source": cell} for index, cell in enumerate(cells)]
    metadata = {"kernelspec": {"name": "no-such-kernel", "display_name": "x", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": content}))
    return path


def write_experiment(root: Path, text: str, name: str = "demo") -> Path:
    """experiments/<name>.yaml under `root`, with `text` after the four lines that every experiment has."""
    path = root / "experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"kind: experiment\nname: {name}\nquestion: Does it work?\nnotebook: notebooks/a.ipynb\n"
    path.write_text(head + text)
    return path


def meta(key: str = "aa11", **changes: Any) -> dict[str, Any]:
    """A run.json."""
    return {
        "schema": 1, "status": "completed", "experiment": "demo", "run_key": key, "notebook": "notebooks/a.ipynb",
        "parameters": {"batch": 1}, "device": "cpu-test-2c", "environment": FACTS, "weights": None, "digests": {},
        "started": "2026-01-01T00:00:00+00:00", "duration_s": 2.0, "versions": {}, "error": None, "failed_cell": None,
    } | changes  # fmt: skip


def fake_kernels(monkeypatch: pytest.MonkeyPatch, act: Callable[[runner.Job], object] | None = None) -> list[int]:
    """Let runs happen without kernels or a device; collects their batches. A ValueError of `act` is a run's error."""
    ran: list[int] = []

    def execute(job: runner.Job, partial: Path, *_: object) -> str | None:
        ran.append(job.parameters["batch"])
        frame = pd.DataFrame({"run_key": [job.key], "arm": ["x"], "step": [0], "metric": ["m"], "value": [1.0]})
        append_rows(partial, "quality", frame)
        try:
            if act is not None:
                act(job)
        except ValueError as error:
            return f"ValueError: {error}"
        return None

    monkeypatch.setattr(runner, "_execute", execute)
    return ran
