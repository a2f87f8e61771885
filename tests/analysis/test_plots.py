"""Figures show what the tables hold: the right value at the right label, nothing dropped, nothing interpreted."""

import json
import math
import subprocess
import sys
from collections.abc import Callable

from tests.lab import fabricated
from zimage.analysis import plots
from zimage.analysis.drawing import BASELINE_COLOR

import pandas as pd
import plotly.graph_objects as go
import pytest

FIGURES = {
    "stages": plots.stages,
    "ablation": plots.ablation,
    "quality": plots.quality,
    "memory": plots.memory,
    "samples": plots.samples,
    "loading": plots.loading,
}
HOSTILE = "<b>x</b><a href='javascript:alert(1)'>$\\alpha$</a>"


def stored(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    return fabricated.arrow(name, frame).to_pandas()


def bars(figure: go.Figure) -> dict[str, float]:
    return {y: x for trace in figure.data for y, x in zip(trace.y, trace.x, strict=True)}


def test_stages_in_forward_order() -> None:
    """Every stage has its bar in milliseconds, the first one topmost, and negative times stay negative."""
    figure = plots.stages(stored("stages", fabricated.stages()))
    assert list(figure.layout.yaxis.categoryarray)[::-1][:4] == [
        "t_embedder",
        "x_embedder",
        "cap_embedder",
        "noise_refiner.0",
    ]
    assert bars(figure)["layers.1"] == pytest.approx(3.5)
    assert bars(figure)["x_embedder"] == pytest.approx(-0.03)
    assert "whole step" not in bars(figure)
    assert [trace.name for trace in figure.data] == [
        "embedders", "noise refiner", "context refiner", "main layers", "final layer",
    ]  # fmt: skip


def test_stages_whiskers_are_the_interval() -> None:
    """The whiskers reach from the low to the high time."""
    figure = plots.stages(stored("stages", fabricated.stages()))
    layers = next(trace for trace in figure.data if trace.name == "main layers")
    assert layers.error_x.array[1] == pytest.approx(0.16)
    assert layers.error_x.arrayminus[1] == pytest.approx(0.12)


def test_stages_of_one_view_only() -> None:
    """Rows of another view are not drawn among the prefix profile's."""
    other = fabricated.stages().assign(view="depth", stage="one block")
    figure = plots.stages(stored("stages", pd.concat([other, fabricated.stages()])))
    assert "one block" not in bars(figure)


def test_stages_of_two_arms_keep_apart() -> None:
    """Two arms give two traces with the same stages, not one bar that hides the other."""
    both = pd.concat([fabricated.stages(), fabricated.stages().assign(arm="compiled")])
    figure = plots.stages(stored("stages", both))
    assert [trace.name for trace in figure.data] == ["baseline", "compiled"]
    assert figure.layout.barmode == "group"


def test_ablation_marks_every_verdict() -> None:
    """Each row is one marker at its ratio, in the trace named after its verdict, with its interval."""
    figure = plots.ablation(stored("ablation", fabricated.qkv()))
    found = {trace.name: (list(trace.y), list(trace.x)) for trace in figure.data}
    assert found == {
        "faster": (["fused_qkv · qkv"], [0.931]),
        "equivalent": (["fused_qkv · step"], [0.998]),
        "inconclusive": (["fused_qkv · block"], [0.988]),
    }
    assert figure.data[0].error_x.array[0] == pytest.approx(0.944 - 0.931)


def test_ablation_band_and_line() -> None:
    """A line stands at 1 and the band of equivalence reaches delta to both sides, within the axis."""
    figure = plots.ablation(stored("ablation", fabricated.quantization()["ablation"]), delta=0.02)
    band, line = figure.layout.shapes
    assert (band.x0, band.x1, line.x0) == (0.98, 1.02, 1)
    low, high = figure.layout.xaxis.range
    assert low < 0.98
    assert high > 1.307


def test_ablation_of_unknown_verdict_is_inconclusive() -> None:
    """A verdict that nobody defined is not drawn as one that means something."""
    frame = fabricated.ablation(("a", "b", "step", 0.9, 0.8, 0.95, "superb"))
    assert [trace.name for trace in plots.ablation(stored("ablation", frame)).data] == ["inconclusive"]


def test_what_was_not_measured_has_no_place() -> None:
    """An arm without a ratio, such as one left out on this device, takes no row of the chart."""
    rows = [("a", "b", "step", 0.9, 0.8, 0.95, "faster"), ("left_out", "b", "step", None, None, None, None)]
    figure = plots.ablation(stored("ablation", fabricated.ablation(*rows)))
    assert list(figure.layout.yaxis.ticktext) == ["a"] and len(figure.data) == 1
    assert not plots.ablation(stored("ablation", fabricated.ablation(rows[1]))).data


def test_an_interval_without_an_end_has_no_whisker() -> None:
    """Of too few quads every ratio is in the interval: no whisker, no cap, and the axis keeps to the estimates."""
    figure = plots.ablation(stored("ablation", fabricated.ablation(("a", "b", "step", 0.9, 0.0, math.inf, "?"))))
    assert figure.data[0].error_x.visible is False
    assert figure.layout.xaxis.range[0] > 0.85


def test_equal_labels_keep_their_own_rows() -> None:
    """Two rows of one arm and scope are two places on the axis."""
    row = ("a", "b", "step", 0.9, 0.8, 0.95, "faster")
    figure = plots.ablation(stored("ablation", fabricated.ablation(row, row)))
    assert list(figure.data[0].y) == ["a", "a (2)"]
    assert figure.layout.xaxis.title.text == "step time ratio"


def test_quality_has_a_panel_a_metric() -> None:
    """Each metric is a panel of its own with all arms, the baseline in its own colour."""
    figure = plots.quality(stored("quality", fabricated.quantization()["quality"]), baseline="float32")
    error, accuracy = figure.data
    assert list(error.x) == [0.0, 0.0054, 0.0813]
    assert list(accuracy.y) == ["float32", "8bit", "4bit"]
    assert accuracy.marker.color[0] == BASELINE_COLOR != accuracy.marker.color[1]
    assert accuracy.error_x.arrayminus[0] == pytest.approx(0.012)


def test_memory_is_in_units_of_its_size() -> None:
    """Bytes are drawn in the unit that the title names."""
    figure = plots.memory(stored("memory", fabricated.quantization()["memory"]))
    assert list(figure.data[0].x) == pytest.approx([12.8, 3.72, 2.11])
    assert "weights (MB)" in figure.layout.annotations[0].text


def test_loading_has_a_panel_for_time_and_one_for_memory() -> None:
    """Every loader has its median time, with whiskers to its fastest and slowest round, and its median peak."""
    time, memory = plots.loading(stored("loading", fabricated.loading())).data
    assert list(time.y) == list(memory.y) == ["plain read", "zimage", "zimage 4bit"]
    assert list(time.x) == pytest.approx([2.0, 2.2, 3.1])
    assert list(memory.x) == pytest.approx([8.0, 8.4, 2.6])
    assert (time.error_x.arrayminus[1], time.error_x.array[1]) == pytest.approx((0.11, 0.22))


def test_samples_leave_out_warm_ups_and_drops() -> None:
    """Only samples are drawn: no warm-ups, no dropped ones."""
    frame = fabricated.samples("a")
    frame.loc[5, "dropped"] = True
    figure = plots.samples(stored("samples", frame))
    assert len(figure.data[0].x) == 40 - 2 - 1


def test_samples_are_thinned() -> None:
    """A long series is thinned to what a page can carry."""
    frame = pd.DataFrame({"arm": "a", "kind": "sample", "time_s": [0.001 + i * 1e-9 for i in range(5001)]})
    assert 200 < len(plots.samples(stored("samples", frame)).data[0].x) <= plots.MAX_POINTS


@pytest.mark.parametrize("name", FIGURES)
def test_empty_tables_give_empty_figures(name: str) -> None:
    """An empty table is an empty figure and no error."""
    figure = FIGURES[name](stored(name, pd.DataFrame()))
    assert sum(len(trace.x or ()) for trace in figure.data) == 0


@pytest.mark.parametrize("name", FIGURES)
def test_all_null_rows(name: str) -> None:
    """A row in which only the arm is known gives a figure, with no NaN in its JSON."""
    figure = FIGURES[name](stored(name, pd.DataFrame([{"arm": "a"}])))
    json.loads(figure.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("draw", "frame"),
    [
        (plots.stages, stored("stages", fabricated.stages().assign(stage=HOSTILE))),
        (plots.ablation, stored("ablation", fabricated.qkv().assign(arm=HOSTILE))),
        (plots.quality, stored("quality", fabricated.quantization()["quality"].assign(arm=HOSTILE, metric=HOSTILE))),
        (plots.memory, stored("memory", fabricated.quantization()["memory"].assign(arm=HOSTILE, metric=HOSTILE))),
        (plots.samples, stored("samples", fabricated.samples(HOSTILE))),
    ],
)
def test_labels_are_plain_text(draw: Callable[[pd.DataFrame], go.Figure], frame: pd.DataFrame) -> None:
    """Markup and formulas within names reach no label of a figure."""
    text = draw(frame).to_json().replace("\\u003c", "<")
    assert "<a href" not in text
    assert "$" not in text


def test_a_negative_ratio_of_error_is_no_whisker() -> None:
    """An interval that does not hold its estimate, or is missing, draws no whisker backwards."""
    frame = fabricated.ablation(("a", "b", "step", 0.9, 0.95, math.nan, "faster"))
    error = plots.ablation(stored("ablation", frame)).data[0].error_x
    assert (error.array[0], error.arrayminus[0]) == (0.0, 0.0)


def test_findings_need_no_plotly() -> None:
    """The sentence for the terminal costs no import of plotly."""
    code = "import sys, zimage.analysis.findings; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_profiles_many_series_make_no_endless_figure() -> None:
    """Of very many arms and scopes the first are drawn."""
    one = fabricated.samples("a").iloc[:5]
    frame = pd.concat([one.assign(scope=f"stage {i}") for i in range(plots.MAX_SERIES + 30)])
    figure = plots.samples(stored("samples", frame))
    assert [trace.name for trace in figure.data][::47] == ["a · stage 0", "a · stage 47"]
    assert figure.layout.height < 4000
