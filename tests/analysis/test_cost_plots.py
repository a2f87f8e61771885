"""Figures of operations, rooflines and predictions show what their tables hold."""

import json
import math
from collections.abc import Callable

from tests.lab import fabricated
from zimage.analysis import cost_plots

import pandas as pd
import plotly.graph_objects as go
import pytest

FIGURES = {
    "operations": (cost_plots.operations, cost_plots.roofline),
    "scaling": (cost_plots.scaling, cost_plots.throughput),
}
NAMES = {"adaln", "attention_norm1", "to_q", "qk_norm", "rope", "sdpa", "to_out", "swiglu", "w2"}
CASES = [(name, draw) for name, draws in FIGURES.items() for draw in draws]


def stored(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    return fabricated.arrow(name, frame).to_pandas()


def test_every_operation_has_its_bar_and_the_rest_its_sign() -> None:
    """Operations stand in order with their times, and what is unattributed may be negative."""
    figure = cost_plots.operations(stored("operations", fabricated.operations()))
    bars = {y: x for trace in figure.data for y, x in zip(trace.y, trace.x, strict=True)}
    assert list(figure.layout.yaxis.categoryarray)[::-1][0] == "adaln"
    assert bars["unattributed"] == pytest.approx(-40)  # microseconds
    assert bars["sdpa"] == pytest.approx(2.6e11 / 8e14 / 0.51 * 1e6)
    assert len(bars) == 10


def test_the_roof_is_the_one_the_operations_were_placed_by() -> None:
    """Bandwidth and peak read off the placements give back the roof that made them, with its ridge."""
    figure = cost_plots.roofline(stored("operations", fabricated.operations()))
    roof = next(trace for trace in figure.data if trace.name == "roof")
    assert max(roof.y) == pytest.approx(8e14)
    assert roof.y[0] / roof.x[0] == pytest.approx(3e12)
    assert roof.x[1] == pytest.approx(8e14 / 3e12)
    assert {
        n for t in figure.data if t.name != "roof" for label in t.text for n in label.split(", ")
    } == NAMES  # all but the rest


def test_without_placements_there_is_no_roof() -> None:
    """Where no peak was measured the operations are drawn and no roof is made up."""
    frame = fabricated.operations().assign(attained_fraction=math.nan, bound="")
    figure = cost_plots.roofline(stored("operations", frame))
    assert [trace.name for trace in figure.data] == ["not placed"]


def test_predictions_keep_calibration_apart() -> None:
    """Sizes that were calibrated with are a series of their own, and all points are (predicted, measured)."""
    figure = cost_plots.scaling(stored("scaling", fabricated.scaling()))
    named = {trace.name: trace for trace in figure.data if trace.name}
    assert {name: len(trace.x) for name, trace in named.items()} == {"calibration": 3, "held out": 3}
    held = named["held out"]
    assert held.x[0] / held.y[0] == pytest.approx(1.04)


@pytest.mark.parametrize(("name", "draw"), CASES)
def test_empty_and_null_tables_give_figures(name: str, draw: Callable[[pd.DataFrame], go.Figure]) -> None:
    """A table without rows, or with nothing in them, is drawn as an empty figure and not refused."""
    make = getattr(fabricated, name)
    for frame in (make().iloc[:0], make().assign(time_s=math.nan)):
        content = json.loads(draw(stored(name, frame)).to_json())
        assert not [x for trace in content["data"] for x in trace.get("x", [])] and content["layout"]["height"] > 0


def test_a_size_without_a_side_has_a_name() -> None:
    """A row that does not say how large the picture was is named all the same."""
    row = {"height": 64.0, "width": math.nan, "batch": 2.0, "caption_tokens": None}
    assert cost_plots.size_name(row) == "64 x ? px, batch 2"  # type: ignore[arg-type]


def test_labels_are_plain_text() -> None:
    """Names out of a table never become markup."""
    hostile = "<b>x</b>"
    for draw in (cost_plots.operations, cost_plots.roofline):
        figure = draw(stored("operations", fabricated.operations().assign(operation=hostile)))
        assert "<b>x</b>" not in figure.to_json().replace("\\u003c", "<")


def test_a_product_over_its_rows_has_a_line_a_way() -> None:
    """Every way is a line in order of rows; what took no time is left out, and no rows at all are an empty figure."""
    frame = pd.DataFrame(
        {"rows": [64, 1, 64, 1], "arm": ["packed", "packed", "unpacked", "unpacked"], "time_s": [4e-3, 1e-4, 1e-3, 0]}
    )
    figure = cost_plots.by_rows(frame)
    assert {trace.name: (trace.x, trace.y) for trace in figure.data} == {
        "packed": ((1, 64), (0.1, 4.0)),
        "unpacked": ((64,), (1.0,)),
    }
    assert figure.layout.yaxis.title.text == "time (ms)"
    assert len(cost_plots.by_rows(frame[:0]).data) == 0
