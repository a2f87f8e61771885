"""The part of a page about quality, and what a quality table's headlines are."""

import math
from typing import Any

from zimage.analysis import plots, reading
from zimage.lab import quality_sections
from zimage.lab.cases import case
from zimage.lab.sections import Shown

import pandas as pd
import pytest


def rows(arm: str, scale: float) -> list[dict[str, Any]]:
    """What a run of two steps records of one arm."""
    error = {"metric": "relative_l2_error", "value": scale, "low": 0.9 * scale, "high": 1.1 * scale, "count": 5}
    return [
        {"arm": arm, **error, "baseline": "float32"},
        {"arm": arm, **error, "baseline": "bfloat16", "value": 1.05 * scale},
        {"arm": arm, "metric": "snr_db", "value": math.inf, "baseline": "float32", "low": 3.0, "high": math.inf},
        *({"arm": arm, **error, "metric": "drift_relative_l2", "step": i, "value": i * scale, "baseline": "float32"}
          for i in (1, 2)),
        {"arm": arm, "metric": "digit_accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "count": 50},
        {"arm": arm, "metric": "repeat_difference", "value": 0.0},
    ]  # fmt: skip


@pytest.fixture
def table() -> pd.DataFrame:
    frame = pd.DataFrame([*rows("8bit", 0.01), *rows("4bit", 0.1)])
    return frame.assign(weights_kind="trained")


def test_headlines_are_few_and_against_one_baseline(table: pd.DataFrame) -> None:
    """An arm is judged by its error against the first baseline, its last drift and its accuracy, in words."""
    found = reading.headline(table)
    assert list(found[found["arm"] == "4bit"]["metric"]) == ["relative_l2_error", "drift_relative_l2", "digit_accuracy"]
    assert set(found["baseline"].dropna()) == {"float32"}
    texts = reading.quality_by_arm(table).loc["4bit"].to_dict()
    assert texts["drift (relative L2)"] == "0.200 (0.0900 to 0.110)"
    assert texts["digit accuracy"] == "90.0 % (80.0 % to 95.0 %)"
    assert len(texts) == 3


def test_the_drift_is_drawn_step_by_step(table: pd.DataFrame) -> None:
    """One line an arm with every step's drift and interval; one that never drifts has none."""
    still = pd.DataFrame([{**row, "arm": "same", "value": 0.0} for row in rows("same", 0.0)])
    figure = plots.drift(pd.concat([table, still]))
    assert [line.name for line in figure.data] == ["8bit", "4bit"]
    assert list(figure.data[1].x) == [1, 2]
    assert list(figure.data[1].y) == pytest.approx([0.1, 0.2])
    assert figure.data[1].error_y.array[0] == pytest.approx(0.01)
    assert len(plots.drift(table.iloc[:0]).data) == 0


def test_the_section_holds_every_number(table: pd.DataFrame) -> None:
    """The table has a row for each measure and what it is against, with interval and seeds."""
    section = quality_sections.quality(table, "x")
    assert section.table is not None and len(section.table.rows) == 12
    texts = [[cell.text for cell in row] for row in section.table.rows]
    assert ["4bit", "relative L2 error", "bfloat16", "0.105", "0.0900 to 0.110", "5"] in texts
    assert ["8bit", "SNR (dB)", "float32", "\N{INFINITY}", "3.00 to \N{INFINITY}", "\N{EN DASH}"] in texts
    assert "float32" in section.note and section.note.endswith("as a share of their length.")
    assert len(section.charts) == 1 and "4bit 0.200" in section.charts[0].alt
    synthetic = quality_sections.quality(table[table["step"].isna()].assign(weights_kind="synthetic"), "x")
    assert synthetic.charts == [] and "says nothing of pictures" in synthetic.note


def test_a_page_has_the_section_where_there_is_more_to_say(table: pd.DataFrame) -> None:
    """It stands below the pictures, of which the one of all arms comes first; headlines alone need none."""
    pictures = [Shown(name, "", "") for name in ("digits_4bit", "digits_8bit", "digits_side_by_side")]
    shown, _ = case({"quality": table}, pictures, "x")
    assert [part.title for part in shown] == ["Quality", "Pictures", "Quality along the denoising run"]
    assert [picture.name for picture in shown[1].pictures] == ["digits_side_by_side", "digits_8bit", "digits_4bit"]
    assert [picture.wide for picture in shown[1].pictures] == [True, False, False]
    few, _ = case({"quality": table[table["metric"] == "digit_accuracy"]}, [], "x")
    assert [part.title for part in few] == ["Quality"]
