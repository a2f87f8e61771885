"""docs/findings.md: every number stands beside the run it came from, and names the commit that measured it."""

import json
import re
from pathlib import Path

from tests.sweeping import ROOT
from zimage.lab.store import Store

import pytest

PAGE = ROOT / "docs" / "findings.md"
TEXT = PAGE.read_text(encoding="utf-8")
REFERENCE = ROOT / "results" / "reference"
LINKS = re.findall(r"\[`([0-9a-f]{7})`\]\((\.\./results/reference/[^)]+)\)", TEXT)
DEVICES = sorted(path for path in REFERENCE.iterdir() if path.is_dir())
RUNS = sorted(path.parent for path in REFERENCE.glob("*/*/*/run.json"))


@pytest.mark.parametrize(("commit", "link"), sorted(set(LINKS)))
def test_a_commit_leads_to_its_run(commit: str, link: str) -> None:
    """What stands behind a number is a completed run in results/reference, measured by the commit that is named."""
    folder = (PAGE.parent / link).resolve()
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "completed"
    assert run["environment"]["commit"].startswith(commit)


def test_every_paragraph_with_numbers_names_a_run() -> None:
    """Each item of the page's lists has a link to a run."""
    items = re.findall(r"^- (.+?)(?=^- |^#|^$|\Z)", TEXT, re.M | re.S)
    assert len(items) > 10
    assert [item for item in items if not re.search(r"\]\(\.\./results/reference/", item)] == []


def test_each_device_that_was_measured_is_told() -> None:
    """The page speaks of every device of results/reference, and what that has is whole and by a clean checkout."""
    for device in DEVICES:
        assert f"../results/reference/{device.name}/" in TEXT
    assert RUNS
    for folder in RUNS:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert re.fullmatch(r"[0-9a-f]{12}", run["environment"]["commit"]), folder


def test_the_stores_read() -> None:
    """Every run of results/reference is read with all its tables by this version."""
    for device in DEVICES:
        store = Store(device)
        for name in store.experiments():
            runs, problems = store.scan(name)
            assert runs and not problems
            for run in runs:
                assert all(len(run.table(table)) for table in run.tables())


def test_nothing_of_a_machine_is_left_in_the_runs() -> None:
    """Executed notebooks and run.json name no folder of the machine that they ran on."""
    for folder in RUNS:
        for path in (folder / "run.json", folder / "notebook.ipynb"):
            assert not re.search(r"(?<![\w.])/(root|home|Users|opt)/", Path(path).read_text(encoding="utf-8")), path
