"""docs/findings.md: every number stands beside the run it came from, and names the commit that measured it."""

import json
import math
import re
from functools import cache
from pathlib import Path

from tests.sweeping import ROOT

import pandas as pd
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


@cache
def intervals(run: Path) -> frozenset[tuple[float, float]]:
    """Both ends of every interval in a run's tables."""
    found: set[tuple[float, float]] = set()
    for path in (run / "tables").glob("*.parquet"):
        frame = pd.read_parquet(path)
        for low in [name for name in frame.columns if re.search("(^|_)low(_|$)", name)]:
            ends = frame[[low, re.sub("(^|_)low(_|$)", r"\1high\2", low)]].astype(float)
            found |= {(a, b) for a, b in ends.itertuples(index=False) if math.isfinite(a) and math.isfinite(b)}
    return frozenset(found)


def told_of(run: Path, low: str, high: str) -> bool:
    """Whether an interval of the run reads like this: as it is, or as how many per cent from 1, or of 1."""
    forms = [
        sorted(form)
        for ends in intervals(run)
        for form in (ends, [100 * abs(1 - end) for end in ends], [100 * end for end in ends])
    ]
    digits = [len(text.partition(".")[2]) for text in (low, high)]
    return any([f"{end:.{places}f}" for end, places in zip(form, digits, strict=True)] == [low, high] for form in forms)


def test_intervals_are_those_of_the_runs() -> None:
    """Every interval in brackets, or behind its ratio, is in the tables of the run whose link comes next."""
    text, place, seen = " ".join(TEXT.split()), 0, 0
    for link in re.finditer(r"\[`[0-9a-f]{7}`\]\((\.\./results/reference/[^)]+)\)", text):
        run = (PAGE.parent / link[1]).resolve()
        for pattern in (r"\(([\d.,]+) to ([\d.,]+)(?: %)?[;)]", r"\d\.\d{3},? \(?(\d\.\d{3}) to (\d\.\d{3})"):
            for found in re.finditer(pattern, text[place : link.start()]):
                seen += 1
                assert told_of(run, *(end.replace(",", "") for end in found.groups())), (
                    f"{found[0]} is not in {link[1]}"
                )
        place = link.end()
    assert seen > 50


def test_each_device_that_was_measured_is_told() -> None:
    """The page speaks of every device of results/reference."""
    for device in DEVICES:
        assert f"../results/reference/{device.name}/" in TEXT


def test_every_surprise_says_where_and_of_which_weights() -> None:
    """Each item under "What surprised" begins with its device and the kind of its weights, as its run has them."""
    section = TEXT.partition("## What surprised")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.+?)(?=^- |\Z)", section, re.M | re.S)
    assert len(items) > 5
    for item in items:
        told = re.match(r"\((H100|H200|CPU), (?:(synthetic) weights|the (trained) digits)\)", item)
        assert told, item
        device, *kinds = told.groups()
        for _, link in re.findall(r"\[`([0-9a-f]{7})`\]\((\.\./results/reference/[^)]+)\)", item):
            run = json.loads(((PAGE.parent / link).resolve() / "run.json").read_text(encoding="utf-8"))
            assert device.lower() in run["device"] and run["weights"]["kind"] in kinds
