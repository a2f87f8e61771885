"""What a page says of how a step scales: one axis at a time, where attention overtakes, images an hour."""

import json
from pathlib import Path

from tests.lab import fabricated
from zimage.analysis import scaling_plots, scaling_words
from zimage.analysis.findings import findings
from zimage.lab import cost_sections
from zimage.lab.cases import case
from zimage.lab.store import Store

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


def stored(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    return fabricated.arrow(name, frame).to_pandas()


@pytest.fixture
def crossings() -> pd.DataFrame:
    return stored("crossover", fabricated.crossover())


@pytest.fixture
def alone() -> pd.DataFrame:
    return stored("axes", fabricated.axes())


@pytest.fixture
def held() -> pd.DataFrame:
    hours = {"steps": 8, "images_per_hour": 4800.0}
    frame = fabricated.scaling().assign(**hours)
    hot = {
        "sustained_s": 0.14,
        "sustained_low_s": 0.139,
        "sustained_high_s": 0.142,
        "sustained_images_per_hour": 3214.0,
    }
    frame.loc[2, list(hot)] = list(hot.values())
    return stored("scaling", frame)


def test_the_crossing_is_drawn_where_it_was_found(crossings: pd.DataFrame) -> None:
    """Both times are drawn at every size, a line stands at each method's tokens, and intervals are bands."""
    figure = scaling_plots.crossing(crossings)
    drawn = {trace.name: list(trace.x) for trace in figure.data}
    assert drawn == {name: [1056, 4128, 9248, 16416] for name in ("linear layers", "attention")}
    lines = sorted(shape.x0 for shape in figure.layout.shapes if shape.type == "line")
    assert lines == [18000, 23040, 31000]
    assert sum(shape.type == "rect" for shape in figure.layout.shapes) == 2
    assert len({shape.line.dash for shape in figure.layout.shapes if shape.type == "line"}) == 3
    far = crossings.assign(tokens=crossings["tokens"].where(crossings["note"] != "", 1e9))
    assert max(shape.x0 for shape in scaling_plots.crossing(far).layout.shapes) == 18000
    for empty in (crossings[:0], crossings.assign(tokens=float("nan"))):
        assert json.loads(scaling_plots.crossing(empty).to_json())["data"] == []


def test_other_resolutions_are_left_out_of_the_chart_of_ratios(alone: pd.DataFrame) -> None:
    """Shapes, batches and captions are drawn with what was predicted; resolutions are in the table alone."""
    figure = scaling_plots.axes(alone)
    assert {trace.name: list(trace.x) for trace in figure.data} == {
        "predicted": [1.0, 1.0, 0.9, 1.13], "measured": [1.001, 1.03, 0.86, 1.14]
    }  # fmt: skip
    section = cost_sections.axes(alone, "x")
    assert section.table is not None and section.table.rows[0][0].text == "resolution"
    only = cost_sections.axes(alone[alone["axis"] == "resolution"], "x")
    assert only.charts == [] and only.table is not None and not only.folded


def test_every_axis_has_its_verdict_in_words(alone: pd.DataFrame) -> None:
    """The notebook's verdict is a row for each pair: axis, both sizes, ratio, interval and verdict."""
    shown = scaling_plots.verdicts(alone)
    assert list(shown.index) == ["resolution", "aspect", "aspect", "batch", "caption"]
    assert list(shown["verdict"]) == ["slower", "equivalent", "slower", "faster", "slower"]
    assert list(shown.iloc[3]) == [
        *("512 x 512 px, batch 8, 32 tokens", "512 x 512 px, batch 1, 32 tokens", "0.860", "0.857 to 0.863", "faster")
    ]
    unknown = scaling_plots.verdicts(alone.assign(ratio_high=float("nan"), verdict="inconclusive"))
    assert set(unknown["95 % interval"]) == {"none"} and set(unknown["verdict"]) == {"inconclusive"}
    assert len(scaling_plots.verdicts(alone[:0])) == 0


def test_sentences_claim_what_the_tables_say(alone: pd.DataFrame, crossings: pd.DataFrame, held: pd.DataFrame) -> None:
    """The crossing, the shapes, the largest batch, the longest caption and images an hour are a sentence each."""
    found = findings({"axes": alone, "crossover": crossings, "scaling": held})
    texts = [one.text for one in found[1:]]  # the first is of the predictions
    assert texts == [
        "attention takes more time than the linear layers of a block from 18,000 tokens (17,460 to 18,540) on",
        "of 2 shapes beside a squarer one of as many tokens 1 takes the same time to 1 %, 1 does not",
        "an image in a batch of 8 takes 14.0 % less time than in one of 1",
        "a step with 512 caption tokens takes 14.0 % more time than one with 32",
        "4,800 images an hour (4,692 to 4,875) of 1024 x 1024 px, batch 1, 8 steps each, in bursts, "
        "3,214 (3,169 to 3,237) sustained",
    ]
    assert found[1].evidence == (
        "a square of 2147 px",
        "extrapolated beyond the sizes that were measured",
        "from 31,000 tokens (29,450 to 32,550) on beside all else of a step, by the calibrated rates",
        "by FLOPs alone from 23,040 tokens on",
    )


def test_sentences_say_what_is_undecided(alone: pd.DataFrame, crossings: pd.DataFrame) -> None:
    """Without verdicts, without a crossing and with one that never comes nothing is claimed; old tables say nothing."""
    texts = [text for text, _ in scaling_words.axes(alone.assign(verdict="inconclusive"))]
    assert texts[0] == "whether 2 other shapes take as long as a squarer one of as many tokens is undecided"
    some = alone.assign(verdict=alone["verdict"].mask(alone["verdict"] == "equivalent", "inconclusive"))
    assert scaling_words.axes(some)[0][0].endswith("0 take the same time to 1 %, 1 does not, 1 undecided")
    assert findings({"axes": some})[0].verdict == ""
    assert {one.verdict for one in findings({"axes": alone.assign(verdict="inconclusive")})} == {"inconclusive"}
    assert texts[1] == "whether an image in a batch of 8 takes as long as in one of 1 is undecided"
    ((same, _), *_) = scaling_words.axes(alone[alone["axis"] == "batch"].assign(verdict="equivalent"))
    assert same == "an image in a batch of 8 takes the same time to 1 % as in one of 1"
    answers = crossings[crossings["note"] != "measured"]
    ((never, _),) = scaling_words.crossing(answers.assign(note="never", tokens=None))
    assert never.endswith("however many tokens there are")
    ((untold, _),) = scaling_words.crossing(answers.assign(note="not told", tokens=None, side_px=None))
    assert untold.endswith("is undecided")
    ((rates, numbers),) = scaling_words.crossing(answers[answers["method"] != "operations of a block"])
    assert "from 31,000 tokens" in rates and numbers[-1] == "by FLOPs alone from 23,040 tokens on"
    assert scaling_words.said({"scaling": stored("scaling", fabricated.scaling())}) == []
    assert scaling_words.crossing(answers[answers["method"] == "FLOPs alone"]) == []


def test_few_rounds_give_estimates(crossings: pd.DataFrame, held: pd.DataFrame) -> None:
    """Where rounds were too few for an interval, each sentence and each section says so, and of how many they are."""
    ends = ["tokens_low", "tokens_high"], ["time_low_s", "time_high_s"]
    few = {"crossover": crossings.assign(**dict.fromkeys(ends[0])), "scaling": held.assign(**dict.fromkeys(ends[1]))}
    row = {"arm": "float32", "scope": "a", "kind": "sample", "regime": "burst", "time_s": 1.0}
    hot = [row | {"regime": "sustained"}] * 9
    found = findings({**few, "samples": stored("samples", pd.DataFrame([row, row, *hot]))})
    assert len(found) == 3 and all("an estimate without an interval (2 rounds)" in one.text for one in found)
    assert found[1].text.startswith("attention takes more time than the linear layers of a block from 18,000 tokens on")
    assert found[1].evidence[2].endswith("by the calibrated rates, an estimate without an interval (2 rounds)")
    assert "3,214 (3,169 to 3,237) sustained; that of bursts is an estimate without" in found[2].text
    assert all(one.text.count("an estimate without") == 1 for one in findings(few))
    sections = [cost_sections.scaling(few["scaling"], "x"), cost_sections.crossover(few["crossover"], "x")]
    assert all("an estimate without an interval" in one.note for one in sections)
    whole = {"crossover": crossings, "scaling": held}
    assert not any("an estimate" in one.text for one in findings(whole))
    assert not any("an estimate" in one.note for one in case(whole, [], "x")[0])


def test_sections_stand_below_the_predictions(alone: pd.DataFrame, crossings: pd.DataFrame, held: pd.DataFrame) -> None:
    """A page has images an hour, one thing at a time and the crossing, in this order; a table of old has none of it."""
    shown, _ = case({"axes": alone, "crossover": crossings, "scaling": held}, [], "x")
    titles = ["Time over sizes", "Images an hour", "One thing at a time", "Where attention overtakes the linear layers"]
    assert [section.title for section in shown] == titles
    hours = shown[1].table
    assert hours is not None and [cell.text for cell in hours.rows[2][1:6]] == ["8", "4800", "136 ms", "3214", "140 ms"]
    old, _ = case({"scaling": stored("scaling", fabricated.scaling())}, [], "x")
    assert [section.title for section in old] == titles[:1]


def test_reference_tables_of_before_still_read() -> None:
    """Runs recorded without the newer columns read as nulls in them, and their page is made of the rest."""
    store = Store(ROOT / "results" / "reference" / "nvidia-h100-80gb-hbm3")
    frame = store.table("scaling", "scaling")
    assert len(frame) and cost_sections.scaling(frame, "x").table is not None
    if frame["images_per_hour"].isna().all():
        assert cost_sections.images(frame) is None
