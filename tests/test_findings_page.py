"""docs/findings.md and docs/evidence.md: numbers stand beside the run they came from, and name what measured it."""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.sweeping import ROOT
from tests.test_notebooks import ABLATIONS

import numpy as np
import pandas as pd
import pytest

PAGES = [ROOT / "docs" / name for name in ("findings.md", "evidence.md")]
REFERENCE = ROOT / "results" / "reference"
LINK = re.compile(r"\[`([0-9a-f]{7})`\]\((\.\./results/reference/[^)]+)\)")
LINKS = sorted({pair for page in PAGES for pair in LINK.findall(page.read_text(encoding="utf-8"))})
DEVICES = sorted(path for path in REFERENCE.iterdir() if path.is_dir())


EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.mark.parametrize(("commit", "link"), LINKS)
def test_a_commit_leads_to_its_run(commit: str, link: str) -> None:
    """What stands behind a number is a completed run in results/reference, measured by the commit that is named."""
    folder = (ROOT / "docs" / link).resolve()
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "completed"
    assert run["environment"]["commit"].startswith(commit)


@EACH
def test_every_paragraph_with_numbers_names_a_run(page: Path) -> None:
    """Each item of a page's lists has a link to a run."""
    items = re.findall(r"^- (.+?)(?=^- |^#|^$|\Z)", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(items) > 10
    assert [item for item in items if not re.search(r"\]\(\.\./results/reference/", item)] == []


def test_the_findings_are_one_page() -> None:
    """No more than a page of words, which lead to what stands behind them."""
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(re.sub(r"\]\([^)]*\)", "]", text).split()) < 900 and "](evidence.md)" in text


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


def before_links(page: Path) -> Iterator[tuple[str, str, Path]]:
    """What stands before each link to a run, after the one before it; the link, and the run's folder."""
    text, place = " ".join(page.read_text(encoding="utf-8").split()), 0
    for link in LINK.finditer(text):
        yield text[place : link.start()], link[2], (page.parent / link[2]).resolve()
        place = link.end()


@EACH
def test_intervals_are_those_of_the_runs(page: Path) -> None:
    """Every interval in brackets, or behind its ratio, is in the tables of the run whose link comes next."""
    seen = 0
    for text, link, run in before_links(page):
        for pattern in (r"\(([\d.,]+) to ([\d.,]+)(?: %)?[;)]", r"\d\.\d{3},? \(?(\d\.\d{3}) to (\d\.\d{3})"):
            for found in re.finditer(pattern, text):
                seen += 1
                assert told_of(run, *(end.replace(",", "") for end in found.groups())), f"{found[0]} is not in {link}"
    assert seen > {"findings": 5, "evidence": 50}[page.stem]


@cache
def numbers(run: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every number in a run's tables."""
    frames = [pd.read_parquet(path).select_dtypes("number") for path in (run / "tables").glob("*.parquet")]
    found = np.concatenate([frame.astype(float).to_numpy().ravel() for frame in frames])
    return found[np.isfinite(found)]


@EACH
def test_numbers_are_those_of_the_runs(page: Path) -> None:
    """Ratios of three decimals, and decimals with a unit, are rounded from the tables of the run that comes next."""
    units = {"": (), "%": (lambda v: 100 * v, lambda v: 100 * abs(1 - v)), "GB": (lambda v: v / 1e9,)}
    units |= {"MB": (lambda v: v / 1e6,), "ms": (lambda v: v * 1e3,), "J": ()}
    seen, missing = 0, []
    for text, link, run in before_links(page):
        known = numbers(run)
        for found in re.finditer(r"(?<![\w.,])(?:(\d+\.\d+) (%|GB|MB|ms|J)|(\d\.\d{3}))(?!\w)", text):
            said, unit = found[1] or found[3], found[2] or ""
            value, places = float(said), len(said.partition(".")[2])
            forms = [known, 1 / known[known > 0], *(form(known) for form in units[unit])]
            seen += 1
            if not any((abs(np.round(form, places) - value) < 1e-9).any() for form in forms):
                missing.append(f"{found[0]} is not in {link}")
    assert missing == [] and seen > {"findings": 8, "evidence": 100}[page.stem]


@EACH
def test_each_device_that_was_measured_is_told(page: Path) -> None:
    """A page speaks of every device of results/reference."""
    text = page.read_text(encoding="utf-8")
    assert [device.name for device in DEVICES if f"../results/reference/{device.name}/" not in text] == []


def test_every_question_is_answered() -> None:
    """The findings have a link to a run of each of the eight ablations."""
    text = PAGES[0].read_text(encoding="utf-8")
    assert [name for name in sorted(ABLATIONS) if not re.search(rf"/{name}/[0-9a-f]{{16}}\)", text)] == []


def test_every_surprise_says_where_and_of_which_weights() -> None:
    """Each item under "What surprised" begins with its device and the kind of its weights, as its run has them."""
    section = PAGES[0].read_text(encoding="utf-8").partition("## What surprised")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.+?)(?=^- |\Z)", section, re.M | re.S)
    assert len(items) >= 5
    for item in items:
        told = re.match(r"\((H100|H200|CPU), (?:(synthetic) weights|the (trained) digits)\)", item)
        assert told, item
        device, *kinds = told.groups()
        for _, link in LINK.findall(item):
            run = json.loads(((ROOT / "docs" / link).resolve() / "run.json").read_text(encoding="utf-8"))
            assert device.lower() in run["device"] and run["weights"]["kind"] in kinds
