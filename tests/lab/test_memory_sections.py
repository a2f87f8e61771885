"""The part of a page about memory, and what its tables say in words."""

from typing import Any

from zimage.analysis import memory_plots, memory_reading
from zimage.analysis.findings import findings
from zimage.lab.cases import case
from zimage.lab.sections import of_weights

import pandas as pd
import pytest

MB = 10**6


def size(arm: str, pixels: int, predicted: int, measured: int | None = None) -> dict[str, Any]:
    """A row of a `footprint` table."""
    row = {"arm": arm, "model": "synthetic:turbo", "kind": "cuda", "height": pixels, "width": pixels, "batch": 1}
    row |= {"caption_tokens": 32, "weight_bytes": 5 * MB, "predicted_bytes": predicted, "measured_bytes": measured}
    return row | {"error": None if measured is None else predicted / measured - 1}


def held(arm: str, stage: str, metric: str, size_bytes: int) -> dict[str, Any]:
    """A row of a `memory` table."""
    return {"arm": arm, "stage": stage, "metric": metric, "bytes": size_bytes}


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    """What a run of the notebook memory records, with an arm that holds half and one order that holds twice."""
    footprint = [size("bfloat16", 512, 20 * MB), size("bfloat16", 1024, 30 * MB), size("4bit", 1024, 12 * MB)]
    footprint += [size("float32", 8, 11 * MB, 10 * MB), size("float32", 16, 19 * MB, 20 * MB)]
    memory = [held("plain", name, "peak_bytes", n * MB) for name, n in (("t_embedder", 6), ("layers.0", 10))]
    memory += [held("plain", "layers.1", "peak_bytes", 10 * MB), held("plain", "weights", "weight_bytes", 5 * MB)]
    memory += [held("plain", "step", "peak_bytes", 10 * MB), held("streamed", "weights", "weight_bytes", 2 * MB)]
    memory += [held("streamed", "step", "peak_bytes", 5 * MB)]
    for arm, n in (("load, step", 10), ("load, fuse, step", 20)):
        memory += [held(arm, "process", "peak_bytes", n * MB), held(arm, "process", "allocated_bytes", 2 * n * MB)]
    ablation = {"arm": "streamed", "baseline": "plain", "scope": "step", "regime": "burst", "ratio": 3.0}
    ablation |= {"ratio_low": 2.9, "ratio_high": 3.1, "p_value": 0.001, "verdict": "slower", "reason": ""}
    ablation |= {"noise_floor": 0.01, "quads": 12, "dropped_quads": 0}
    quality = {"arm": "streamed", "metric": "relative_l2_error", "baseline": "plain", "value": 0.0}
    return {
        "footprint": pd.DataFrame(footprint),
        "memory": pd.DataFrame(memory),
        "ablation": pd.DataFrame([ablation]),
        "quality": pd.DataFrame([quality]),
    }


def test_the_page_answers_in_the_order_of_the_question(tables: dict[str, pd.DataFrame]) -> None:
    """Needs, predictions beside measurements, arms and orders come before the verdicts, and nothing comes twice."""
    titles = [section.title for section in case(tables, [], "x")[0]]
    assert titles == [
        "What a step of the published model needs",
        "Predicted and measured",
        "What a step holds at most",
        "What the order of loading and dropping costs",
        "What the arms cost in time",
    ]


def test_a_section_shows_bytes_shares_and_outputs(tables: dict[str, pd.DataFrame]) -> None:
    """An arm's row has its bytes, its share of plain and whether its output is the same; peaks are named by stage."""
    shown = {section.title: section for section in case(tables, [], "x")[0]}
    arms = shown["What a step holds at most"].table
    assert arms is not None
    assert [cell.text for cell in arms.rows[1]] == ["streamed", "2.00 MB", "5.00 MB", "50 %", "plain's bit for bit"]
    assert "The most of a step is held from layers.0 on, 10.0 MB (6.00 MB before it)." in (
        shown["Predicted and measured"].note
    )
    orders = shown["What the order of loading and dropping costs"].table
    assert orders is not None
    assert [cell.text for cell in orders.rows[1]] == ["load, fuse, step", "20.0 MB", "40.0 MB"]


def test_findings_say_what_is_needed_and_what_it_is_traded_for(tables: dict[str, pd.DataFrame]) -> None:
    """One sentence each for the need, the predictions' error, the peak, the leanest arm and the hungriest order."""
    texts = [(found.text, found.evidence) for found in findings(tables) if found.short]
    assert texts == [
        (
            "a step of the published shape at 1024 x 1024 px is predicted to need 30.0 MB in bfloat16 and 12.0 MB in "
            "4bit on cuda, handed over at once",
            ("predicted before anything is allocated; zimage.fast holds less",),
        ),
        ("predicted peaks are 7.5 % off in the median of 2 measured", ("from 5.0 % below to 10.0 % above",)),
        ("the most of a step is held from layers.0 on, 10.0 MB (6.00 MB before it)", ()),
        (
            "of the arms streamed holds the least in a step, 50 % of what plain does",
            ("5.00 MB against 10.0 MB", "3.000 times its time, slower"),
        ),
        ("of the orders 'load, fuse, step' holds the most, 2.00 times 'load, step'", ("20.0 MB against 10.0 MB",)),
    ]


def test_where_no_arm_holds_less_that_is_said(tables: dict[str, pd.DataFrame]) -> None:
    """Arms that all hold more than plain are not told as one that holds the least."""
    memory = tables["memory"]
    memory.loc[(memory["arm"] == "streamed") & (memory["stage"] == "step"), "bytes"] = 12 * MB
    texts = [found.text for found in findings(tables)]
    assert "no arm holds less in a step than plain; streamed, the next, holds 120 % of what plain does" in texts
    assert not [text for text in texts if "holds the least" in text]


def test_less_for_a_larger_image_is_explained(tables: dict[str, pd.DataFrame]) -> None:
    """On CUDA, where packed weights may need less at a larger size, the note says why; elsewhere they do not."""
    told = "the fewer unpacked weights wait at once"
    assert told in case(tables, [], "x")[0][0].note
    elsewhere = tables | {"footprint": tables["footprint"].assign(kind="metal")}
    assert told not in case(elsewhere, [], "x")[0][0].note


def test_predictions_are_of_no_run_s_weights(tables: dict[str, pd.DataFrame]) -> None:
    """What is predicted for the published shape takes on no kind of weights, what was measured has the run's."""
    needs, *measured = of_weights(case(tables, [], "x")[0], "trained")
    assert needs.weights == "" and "of the published shape" in needs.note and "synthetic" not in needs.note
    assert measured and {section.weights for section in measured} == {"trained"}


def test_what_was_not_recorded_is_left_out(tables: dict[str, pd.DataFrame]) -> None:
    """Predictions alone make one section and one finding; without a footprint table memory is shown as elsewhere."""
    alone = {"footprint": tables["footprint"].head(3)}
    assert [section.title for section in case(alone, [], "x")[0]] == ["What a step of the published model needs"]
    assert len(findings(alone)) == 1
    del tables["footprint"]
    assert memory_reading.statements(tables) == []
    assert "What a step holds at most" not in [section.title for section in case(tables, [], "x")[0]]


def test_figures_write_every_number(tables: dict[str, pd.DataFrame]) -> None:
    """The heat map has a cell for each prediction, empty where there is none, and bars have each arm's bytes."""
    cells = memory_plots.needs(tables["footprint"]).data[0]
    assert list(cells.x) == ["512 x 512 px", "1024 x 1024 px"] and list(cells.y) == ["bfloat16", "4bit"]
    assert [list(line) for line in cells.text] == [["20.0 MB", "30.0 MB"], ["\N{EN DASH}", "12.0 MB"]]
    sizes, ratios = memory_plots.trade(tables["memory"], tables["ablation"]).data
    assert (list(sizes.x), list(ratios.x)) == ([10.0, 5.0], [1.0, 3.0])


def test_the_verdict_table_has_arms_and_orders(tables: dict[str, pd.DataFrame]) -> None:
    """The notebook's last table has a row for each arm, with time and output, and for each order."""
    found = memory_reading.verdicts(tables["memory"], tables["ablation"], tables["quality"])
    assert list(found.index) == ["plain", "streamed", "order: load, step", "order: load, fuse, step"]
    assert list(found.loc["streamed"]) == ["5.00 MB", "50 %", "slower, ratio 3.000", "plain's bit for bit"]
    assert found.loc["order: load, fuse, step", "of plain"] == "200 %"
