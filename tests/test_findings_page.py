"""docs/findings.md: every number stands beside the run it came from, and names the commit that measured it."""

import json
import re

from tests.sweeping import ROOT

import pytest

PAGE = ROOT / "docs" / "findings.md"
TEXT = PAGE.read_text(encoding="utf-8")
REFERENCE = ROOT / "results" / "reference"
LINKS = re.findall(r"\[`([0-9a-f]{7})`\]\((\.\./results/reference/[^)]+)\)", TEXT)
DEVICES = sorted(path for path in REFERENCE.iterdir() if path.is_dir())


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
    """The page speaks of every device of results/reference."""
    for device in DEVICES:
        assert f"../results/reference/{device.name}/" in TEXT
