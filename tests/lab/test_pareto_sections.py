"""The front of time, memory and error on a page: what charts, table and finding say, and where they lead."""

import json
import math
from pathlib import Path
from typing import Any

from tests.lab import fabricated
from tests.lab.test_dashboard import HOSTILE, Page
from zimage.analysis import pareto, pareto_plots, units
from zimage.analysis.findings import findings
from zimage.lab import dashboard, pareto_sections
from zimage.lab.store import Store

import pandas as pd
import pytest


@pytest.fixture
def table() -> pd.DataFrame:
    return fabricated.arrow("pareto", fabricated.pareto().assign(run_key="a1b2")).to_pandas()


def arm_of(data: list[str]) -> str:
    """The arm that a point's hover names first."""
    return data[0].partition("</b>")[0].removeprefix("<b>")


def points(figure: Any) -> dict[str, dict[str, tuple[float, float]]]:
    """By category and arm: x and y."""
    return {
        trace.name: {arm_of(data): (x, y) for data, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)}
        for trace in figure.data
    }


def test_the_front_comes_first_in_the_table(table: pd.DataFrame) -> None:
    """Rows are ordered by category, then by time, and hold what the points held; unknown ends are missing."""
    categories = list(table["category"])
    assert categories == sorted(categories, key=pareto.CATEGORIES.index)
    front = table[table["category"] == "front"]
    assert list(front["time_ratio"]) == sorted(front["time_ratio"]) and front["dominated_by"].isna().all()
    assert dict(zip(table["arm"], table["dominated_by"], strict=True))["bfloat16"] == "bfloat16 + fast"
    point = pareto.Point("a", *(pareto.Quantity.of(2.0, None, None) for _ in range(3)))
    (row,) = pareto.rows([point])
    assert (row["time_ratio"], row["time_ratio_low"], row["error_high"]) == (2.0, None, None)


def test_a_category_has_a_colour_and_a_marker_of_its_own(table: pd.DataFrame) -> None:
    """Every arm is drawn once in each chart, under its category, and no two categories share colour or marker."""
    for draw, column, scale in ((pareto_plots.by_time, "time_ratio", 1), (pareto_plots.by_bytes, "bytes", 1e9)):
        figure = draw(table)
        drawn = points(figure)
        assert len(drawn) == 3 and sum(len(arms) for arms in drawn.values()) == len(table)
        assert len({(t.marker.color) for t in figure.data}) == len({t.marker.symbol for t in figure.data}) == 3
        rows = table.set_index("arm")
        for arms in drawn.values():
            assert {arm: x for arm, (x, _) in arms.items()} == pytest.approx({a: rows[column][a] / scale for a in arms})
    assert drawn["on the front"]["8bit + fast"][1] == rows["error"]["8bit + fast"]


def test_memory_has_an_interval(table: pd.DataFrame) -> None:
    """Where runs of an arm did not hold the same, whiskers lead to the least of them, and the page tells both ends."""
    wide = table.assign(bytes_low=table["bytes"] // 2, bytes_high=table["bytes"])
    for trace in pareto_plots.by_bytes(wide).data:
        assert tuple(trace.error_x.arrayminus) == pytest.approx([x / 2 for x in trace.x], rel=1e-6)
        assert not any(trace.error_x.array)
    row = next(iter(wide.to_dict("records")))
    between = units.ends(units.size, row["bytes"] // 2, row["bytes"])
    assert pareto_plots.facts(row)[1] == f"memory {units.size(row['bytes'])} ({between})"
    both, plain = pareto.pooled([wide]).set_index("arm"), pareto.pooled([table]).set_index("arm")
    assert set(both.index) == set(plain.index) and list(both["bytes_low"]) == [b // 2 for b in both["bytes"]]
    assert (plain["category"] == table.set_index("arm")["category"][plain.index]).all()


def test_what_has_no_error_is_below_all_others(table: pd.DataFrame) -> None:
    """On the logarithmic axis an arm without error stands at a tick of its own that says 0."""
    figure = pareto_plots.by_time(table)
    height = {arm: y for arms in points(figure).values() for arm, (_, y) in arms.items()}
    axis = figure.layout.yaxis
    assert height["float32"] < 0.5 * min(y for arm, y in height.items() if arm != "float32")
    assert (axis.type, axis.ticktext[0], axis.tickvals[0]) == ("log", "0", height["float32"])
    only = pareto_plots.by_time(table[table["arm"] == "float32"])
    assert only.layout.yaxis.type == "linear" and len(only.data) == 1


def test_names_cover_neither_each_other_nor_points(table: pd.DataFrame) -> None:
    """Names of the front come first; two near arms have theirs at other sides, and one with no room for it has none."""
    front = set(table.loc[table["category"] == "front", "arm"])
    for draw in (pareto_plots.by_time, pareto_plots.by_bytes):
        shown = [text for trace in draw(table).data for text in trace.text if text]
        assert len(set(shown) & front) > len(front) / 2 and len(shown) == len(set(shown))
    crowd = {f"arm number {i}": (1 + i / 40, 9e6 - i * 1e6, 0.1) for i in range(8)} | {"far": (9.0, 5e5, 0.2)}
    many = pareto.rows([pareto.Point(name, *map(pareto.Quantity.exact, given)) for name, given in crowd.items()])
    (trace,) = pareto_plots.by_time(pd.DataFrame(many)).data
    sides = {text: side for text, side in zip(trace.text, trace.textposition, strict=True) if text}
    assert "far" in sides and 2 < len(sides) < 9 and len(set(sides.values())) > 1


def test_points_and_rows_lead_to_their_run(tmp_path: Path, table: pd.DataFrame) -> None:
    """Each point and each row of a page names the executed notebook of its own run, a file that is there."""
    fabricated.add_run(tmp_path, "e", "a1", {"pareto": fabricated.pareto()})
    (path, _) = dashboard.build(Store(tmp_path))
    page = Page(path)
    figure = page.figures()["g0-c0-by-time"]
    place = figure["layout"]["meta"]["link"]
    links = [data[place] for trace in figure["data"] for data in trace["customdata"]]
    assert len(links) == len(table) and set(links) == {"a1/notebook.ipynb"}
    assert (path.parent / links[0]).is_file() and page.links().count(links[0]) > len(table)
    hostile = pareto_sections.front(table.assign(run_key=f"javascript:{HOSTILE}/../x"), "x")
    assert hostile is not None and hostile.table is not None
    leads = {link.href for row in hostile.table.rows for cell in row for link in cell.links}
    assert len(leads) == 1 and not set(":<>\"'") & set(leads.pop())


def test_runs_of_the_same_make_one_front(tmp_path: Path) -> None:
    """Runs that differ only in their arms have one front above them, with each arm leading to its own; others none."""
    frame = fabricated.pareto()
    alike = {"source": "digits", "height": 8}
    parts = {"a1": frame.iloc[:6], "b2": frame.iloc[4:]}
    for key, part in parts.items():
        fabricated.add_run(tmp_path, "e", key, {"pareto": part}, parameters={**alike, "arms": list(part["arm"])})
    fabricated.add_run(tmp_path, "e", "c3", {"pareto": frame}, parameters={**alike, "height": 16, "arms": ["x"]})
    fabricated.add_experiment(tmp_path, "e", "Which?", ["a1", "b2", "c3"])
    page = Page(dashboard.build(Store(tmp_path))[0])
    assert "All arms of 2 runs" in page.text
    assert "arms=" + " to ".join(parts["a1"]["arm"].iloc[[0, -1]]) + " (6)" in page.text  # all of them name no case
    figure = page.figures()["g0-pool-0-by-time"]
    told = {arm_of(data): data[1] for trace in figure["data"] for data in trace["customdata"]}
    where = {arm: key for key, part in reversed(parts.items()) for arm in part["arm"]}
    assert told == {arm: f"{key}/notebook.ipynb" for arm, key in where.items()}
    assert not [name for name in page.figures() if "pool-1" in name]


def test_a_pool_keeps_what_a_run_was_sure_of(table: pd.DataFrame) -> None:
    """What is dominated in its run stays so; what another run's arm dominates becomes so, whatever the order."""
    own = table.assign(category="front", dominated_by=None)
    own.loc[own["arm"] == "6bit + fast", ["category", "dominated_by"]] = ["dominated", "8bit + fast"]
    cut = [own[own["arm"].isin(["float32", "bfloat16", "6bit + fast"])], own[~own["arm"].isin(["bfloat16"])]]
    for frames in (cut, cut[::-1]):
        found = pareto.pooled(frames).set_index("arm")
        assert sorted(found.index) == sorted(table["arm"])
        assert tuple(found.loc["6bit + fast", ["category", "dominated_by"]]) == ("dominated", "8bit + fast")
        assert found.loc["bfloat16", "category"] == "indistinguishable"  # without errors in pairs nobody knows
        assert found.loc["bfloat16", "dominated_by"] == "bfloat16 + fast"
        assert found.loc["float32", "category"] == "front"


def test_the_finding_names_front_and_dominated(table: pd.DataFrame) -> None:
    """One sentence says what is on the front; beside it stands what is not to be told from it and what is dominated."""
    (found,) = findings({"pareto": table})
    front = list(table.loc[table["category"] == "front", "arm"])
    assert found.text == f"of 11 arms {len(front)} are on the front of time, memory and error: {', '.join(front)}"
    assert "bfloat16 by bfloat16 + fast" in found.evidence[-1] and found.short == found.text
    unknown = findings({"pareto": table.assign(error_high=None)})[0]
    assert unknown.evidence[-1].startswith("11 without an interval")
    assert findings({"pareto": table.assign(category="what")}) == []


@pytest.mark.parametrize("end", ["time_ratio_high", "error_high"])
def test_a_front_without_intervals_is_none(table: pd.DataFrame, end: str) -> None:
    """Where no two arms have intervals of time and error nothing is said to be on the front: it is undecided."""
    blind = table.assign(category="front", dominated_by=None)
    blind.loc[1:, end] = None
    (found,) = findings({"pareto": blind})
    assert found.text.startswith("which of 11 arms are on the front of time, memory and error could not be decided")
    assert found.evidence == () and found.short == found.text


def test_odd_rows_are_left_out(table: pd.DataFrame) -> None:
    """Rows without a category, or whose quantities are no numbers of 0 or more, are drawn nowhere and break nothing."""
    odd = table.assign(error=-1.0)
    odd.loc[0, "error"], odd.loc[1, "category"] = float("inf"), None
    assert pareto_sections.front(odd, "x") is None
    assert json.loads(pareto_plots.by_time(odd).to_json())["data"] == []


def column(table: pd.DataFrame, head: str) -> dict[str, str]:
    """What stands in a column of a page's table, by arm."""
    section = pareto_sections.front(table, "x")
    assert section is not None and section.table is not None
    place = [one.text for one in section.table.heads].index(head)
    return {row[0].text: row[place].text for row in section.table.rows if row[place].text}


def test_only_what_is_dominated_is_said_to_be(table: pd.DataFrame) -> None:
    """One column says what beats an arm; of what is indistinguishable from the front, that the estimates alone do."""
    expected = {}
    for category, end in (("dominated", ""), ("indistinguishable", ", by its estimate")):
        own = table[table["category"] == category]
        assert len(own)
        expected |= dict(zip(own["arm"], own["dominated_by"] + end, strict=True))
    assert column(table, "Beaten by") == expected
    beaten = table[table["dominated_by"].notna()].to_dict("records")
    told = {row["category"]: pareto_plots.facts(row)[-1].removesuffix(row["dominated_by"]) for row in beaten}
    assert told["dominated"] == "dominated by "
    assert told["indistinguishable"] == "indistinguishable from it; by its estimate beaten by "


def test_a_column_that_nothing_is_in_is_left_out(table: pd.DataFrame) -> None:
    """Where all arms are on the front, and memory has no interval, the page has no empty columns for them."""
    front = table[table["category"] == "front"]
    section = pareto_sections.front(front, "x")
    assert section is not None and section.table is not None
    heads = [one.text for one in section.table.heads]
    assert heads == ["Arm", "Place", "Time", "Interval", "Memory", "Error", "Interval", "Run"]
    assert {len(row) for row in section.table.rows} == {len(heads)}


def test_axes_hold_every_whisker(table: pd.DataFrame) -> None:
    """However wide an interval is, its ends lie within the axes; above the topmost point is room for a name."""
    wide = table.assign(
        time_ratio_low=table["time_ratio"] / 3, time_ratio_high=table["time_ratio"] * 3,
        error_low=table["error"] / 3, error_high=table["error"] * 3, bytes_low=table["bytes"] // 3,
    )  # fmt: skip
    for draw, logarithmic in ((pareto_plots.by_time, True), (pareto_plots.by_bytes, False)):
        figure = draw(wide)
        for axis, value, error, log in (("xaxis", "x", "error_x", logarithmic), ("yaxis", "y", "error_y", True)):
            low, high = (10**end if log else end for end in figure.layout[axis].range)
            for trace in figure.data:
                ends = zip(trace[value], trace[error].arrayminus, trace[error].array, strict=True)
                assert all(low < v - below and v + above < high for v, below, above in ends)
    top, bottom = figure.layout.yaxis.range[1], figure.layout.yaxis.range[0]
    points_up = [math.log10(y) for trace in figure.data for y in trace.y]
    assert top - max(points_up) > 0.07 * (top - bottom)


def test_names_end_within_the_chart() -> None:
    """A long name of the rightmost point stands at its left, where there is room for it."""
    crowd = {"left": (1.0, 1e6, 0.1), "a rather long name of an arm + fast + more": (2.0, 9e6, 0.2)}
    many = pareto.rows([pareto.Point(name, *map(pareto.Quantity.exact, given)) for name, given in crowd.items()])
    sides = {t: s for trace in pareto_plots.by_bytes(pd.DataFrame(many)).data
             for t, s in zip(trace.text, trace.textposition, strict=True)}  # fmt: skip
    assert {text: side.split()[1] for text, side in sides.items()} == {
        "left": "right", "a rather long name of an arm + fast + more": "left"
    }  # fmt: skip


def test_a_time_without_an_interval_is_on_no_front(table: pd.DataFrame) -> None:
    """What a table calls the front without an interval of the time is told, drawn and listed as unknown."""
    front = list(table.loc[table["category"] == "front", "arm"])
    some = table["arm"].isin(front[:2])
    half = table.assign(time_ratio_high=table["time_ratio_high"].mask(some))
    assert {arm for arm, text in column(half, "Place").items() if text == "unknown"} == set(front[:2])
    (found,) = findings({"pareto": half})
    assert f"{len(front) - 2} are on the front" in found.text
    assert f"unknown without an interval of the time: {', '.join(front[:2])}" in found.evidence
    assert set(points(pareto_plots.by_time(half))["unknown: no interval of the time"]) == set(front[:2])
    (found,) = findings({"pareto": table.assign(time_ratio_high=None)})
    assert found.text == "of 11 arms none is known to be on the front of time, memory and error"
    assert set(pareto.pooled([half])["category"]) == set(pareto.CATEGORIES)
