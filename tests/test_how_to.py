"""docs/ablation.md: its fifteen lines run, and so do the notebook, the experiment and the commands made of them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.sweeping import ROOT
from zimage import cli
from zimage.lab import experiment
from zimage.lab import notebook as notebooks
from zimage.lab.store import Store

import pytest

TEXT = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
MOST_LINES = 15
VERDICTS = "(faster|slower|equivalent|inconclusive)"


def blocks(language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


PROGRAM, MORE, *CELLS = blocks("python")


def test_it_is_fifteen_lines() -> None:
    """The ablation of the heading has at most fifteen lines, blank ones counted, none longer than 120 characters."""
    lines = PROGRAM.rstrip("\n").splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 120
    assert TEXT.startswith("# Write your own ablation in fifteen lines\n")


def test_the_program_prints_its_verdicts() -> None:
    """It runs as it stands, and so does what may follow; an arm a line with verdict and error, as the text shows it."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM + MORE.replace("example)", "example, quads=7)")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    floor, *lines = done.stdout.splitlines()
    assert floor.startswith("noise floor ")
    assert [line.split()[0] for line in lines] == [
        *("without_a_block:", "int8_inputs:"),
        *("rounded", "loose_norms", "mixed"),
    ]
    shown = blocks("text")[0].splitlines()
    for line, other in zip([floor, *lines[:2]], shown, strict=True):
        assert line.split()[0] == other.split()[0]
    for line in (*lines[:2], *shown[1:]):
        assert re.fullmatch(rf"\w+: {VERDICTS}, .*95 % CI .* quads.*; relative L2 error [\d.e-]+", line), line
    assert all(re.fullmatch(rf"\w+ {VERDICTS} [\d.]+ [\d.e-]+", line) for line in lines[2:])
    errors = {line.split(":")[0]: float(line.split()[-1]) for line in lines[:2]}
    assert 0 < errors["int8_inputs"] < 0.1 < errors["without_a_block"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the notebook that the text's cells make, and its experiment file."""
    root = tmp_path_factory.mktemp("how_to")
    blank: dict[str, Any] = {"metadata": {}, "outputs": [], "execution_count": None, "cell_type": "code"}
    (text,) = blocks("markdown")
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": text}]
    cells += [{**blank, "source": cell} for cell in CELLS]
    cells[1]["metadata"] = {"tags": ["parameters"]}
    for folder in ("notebooks", "experiments"):
        (root / folder).mkdir()
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    content["cells"] = [{**cell, "id": f"c{place}"} for place, cell in enumerate(cells)]
    (root / "notebooks" / "loose_norms.ipynb").write_text(json.dumps(content))
    (root / "experiments" / "loose_norms.yaml").write_text(blocks("yaml")[0])
    return root


def test_the_experiment_is_valid(project: Path) -> None:
    """The experiment asks for a run of each epsilon, and for one with --quick; the notebook has its question."""
    asked = experiment.read(project / "experiments" / "loose_norms.yaml")
    assert [len(asked.plan(quick=quick)) for quick in (False, True)] == [2, 1]
    found = notebooks.read(project / "notebooks" / "loose_norms.ipynb", project)
    assert found.title == "Does a larger epsilon in the norms change time or output?"
    assert TEXT.count("five cells") == 1 and len(CELLS) + 1 == 5


@pytest.mark.usefixtures("in_process")
def test_the_commands_make_the_page(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the text works as it stands (with fewer quads), and the page has arms, errors and pictures."""
    monkeypatch.chdir(project)
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert [words[:2] for words in lines] == [["zimage", "run"], ["zimage", "sweep"], ["zimage", "sweep"]]
    for words in lines:
        few = ["-p", "quads", "1"] if words[1] == "run" else ["--set", "quads=1"]
        assert cli.main([*words[1:], *few]) == 0
        said = capsys.readouterr().out
    assert said.splitlines()[-1] == "page: results/loose_norms/index.html"
    runs = Store(project / "results").current("loose_norms")
    assert [run.parameters["epsilon"] for run in runs if run.completed] == [1e-4, 1e-2]
    small, large = (run.table("quality").set_index(["arm", "metric"])["value"] for run in runs)
    assert small["loose_norms", "relative_l2_error"] < large["loose_norms", "relative_l2_error"]
    assert large["baseline", "digit_accuracy"] >= 0.9
    assert {row for run in runs for row in run.table("ablation")["scope"]} == {"step"}
    page = (project / "results" / "loose_norms" / "index.html").read_text(encoding="utf-8")
    for words in ("How large may the epsilon of the norms be?", "loose_norms", "relative L2 error", "same_seeds.png"):
        assert words in page
