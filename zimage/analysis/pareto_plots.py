"""Figures of arms by time, memory and error, their place beside the front told by colour and by marker."""

from collections.abc import Callable, Mapping
from typing import Any

from zimage.analysis import units
from zimage.analysis.drawing import INK, along, finish, log_ticks, plain, sides_of_names, spread, whiskers
from zimage.analysis.pareto import CATEGORIES, usable
from zimage.analysis.reading import records

import pandas as pd
import plotly.graph_objects as go

STYLES = {  # colour and marker
    "front": ("#1c9a78", "circle"),
    "indistinguishable": ("#cf8a14", "diamond-open"),
    "unknown": ("#7a5fb5", "square-open"),
    "dominated": ("#8f97a3", "x-thin-open"),
}
_NAMES = {
    "front": "on the front",
    "indistinguishable": "indistinguishable from it",
    "unknown": "unknown: no interval of the time",
    "dominated": "dominated",
}
_NO_ERROR = 4  # times below the smallest error lies the place of arms without any, on a logarithmic axis


def by_time(frame: pd.DataFrame, links: Mapping[str, str] | None = None) -> go.Figure:
    """Error over time ratio of every arm of a `pareto` table, with both intervals.

    links: where a click on an arm leads, by its name.
    """
    rows = usable(frame)
    ends = {"x_low": rows["time_ratio_low"], "x_high": rows["time_ratio_high"]}
    figure = _figure(rows.assign(x=rows["time_ratio"], **ends), links or {}, logarithmic=True)
    figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="time by the baseline's")
    return figure


def by_bytes(frame: pd.DataFrame, links: Mapping[str, str] | None = None) -> go.Figure:
    """Error over the bytes that every arm of a `pareto` table needs, down to the least of its runs.

    `links` as in `by_time`.
    """
    rows = usable(frame)
    scale, unit = units.size_unit(float(rows["bytes"].max()) if len(rows) else 1.0)
    x = rows["bytes"] / scale
    figure = _figure(
        rows.assign(x=x, x_low=(rows["bytes_low"] / scale).fillna(x), x_high=x), links or {}, logarithmic=False
    )
    figure.update_xaxes(title_text=f"memory ({unit})")
    return figure


def facts(row: Mapping[str, Any]) -> list[str]:
    """All that a row of a `pareto` table says, a line each."""
    place = _NAMES[str(row["category"])]
    if isinstance(row["dominated_by"], str):
        joint = " by " if row["category"] == "dominated" else "; by its estimate beaten by "
        place += joint + row["dominated_by"]
    return [
        f"time {_interval(units.ratio, row, 'time_ratio')} of {row['baseline'] or 'the baseline'}'s",
        f"memory {_interval(units.size, row, 'bytes')}",
        f"error {_interval(units.significant, row, 'error')}",
        place,
    ]


def _interval(text: Callable[[Any], str], row: Mapping[str, Any], name: str) -> str:
    between = units.ends(text, row[f"{name}_low"], row[f"{name}_high"])
    return text(row[name]) if between == units.MISSING else f"{text(row[name])} ({between})"


def _figure(rows: pd.DataFrame, links: Mapping[str, str], logarithmic: bool) -> go.Figure:
    """Points at x with whiskers to `x_low` and `x_high`, their error upwards, a trace a category.

    The axes hold every whisker to its end.
    """
    positive = rows.loc[rows["error"] > 0, "error"]
    ground = float(positive.min()) / _NO_ERROR if len(positive) else 1.0  # where what has no error is drawn
    rows = rows.assign(y=rows["error"].clip(lower=ground), low=rows["error_low"].clip(lower=ground))
    across = spread([*rows["x"], *rows["x_low"], *rows["x_high"]], logarithmic)
    upwards = spread([*rows["y"], *rows["low"], *rows["error_high"]], logarithmic=True)
    rows = rows.assign(along=along(rows["x"], logarithmic, across), up=along(rows["y"], True, upwards))
    ranked = rows.sort_values(["category", "along", "up"], ascending=[True, True, False], key=_rank)
    sides = sides_of_names(ranked["arm"], ranked["along"], ranked["up"])
    figure = go.Figure()
    for category in CATEGORIES:
        own = rows[rows["category"] == category]
        if own.empty:
            continue
        color, symbol = STYLES[category]
        told = [f"<b>{plain([row['arm']])[0]}</b><br>" + "<br>".join(plain(facts(row))) for row in records(own)]
        figure.add_scatter(
            x=own["x"].tolist(), y=own["y"].tolist(), mode="markers+text", name=_NAMES[category],
            text=[plain([arm])[0] if arm in sides else "" for arm in own["arm"]],
            textposition=[sides.get(arm, "top right") for arm in own["arm"]], textfont={"size": 11},
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            error_x=whiskers(own["x"] - own["x_low"], own["x_high"] - own["x"], color), cliponaxis=False,
            error_y=whiskers(own["y"] - own["low"], own["error_high"] - own["y"], color),
            customdata=[[text, links.get(str(arm), "")] for text, arm in zip(told, own["arm"], strict=True)],
            hovertemplate="%{customdata[0]}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=400)
    figure.update_layout(margin={"r": 90}, hovermode="closest", meta={"link": 1} if links else None)
    figure.update_xaxes(zeroline=False, **(log_ticks(*across) if logarithmic else {"range": across}))
    figure.update_yaxes(title_text="error at the end of a run", title_font={"size": 12}, title_standoff=10)
    if len(positive):
        figure.update_yaxes(**_error_axis(rows, ground, upwards), showgrid=True)
    else:
        figure.update_yaxes(type="linear", showgrid=True)
    return figure


def _rank(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Categories in their order, so that names of the front find a place before others do."""
    return values.map(CATEGORIES.index) if values.name == "category" else values


def _error_axis(rows: pd.DataFrame, ground: float, ends: tuple[float, float]) -> dict[str, Any]:
    """A logarithmic axis of the errors above 0 with these ends, and a tick for 0 at `ground` where an arm has none."""
    axis: dict[str, Any] = log_ticks(*ends)
    if (rows["error"] == 0).any():
        kept = [(v, t) for v, t in zip(axis["tickvals"], axis["ticktext"], strict=True) if v > 2.5 * ground]
        axis["tickvals"], axis["ticktext"] = [ground, *(v for v, _ in kept)], ["0", *(t for _, t in kept)]
    return axis
