"""The way of a gain from the product to the step: what every arm saves, scope by scope."""

from collections.abc import Sequence
from typing import Any

from zimage.analysis import tables, units
from zimage.analysis.drawing import ARM_COLORS, BAND, INK, finish, plain, whiskers
from zimage.analysis.gains import NAMES, by_ladder, is_known, rungs
from zimage.analysis.reading import records

import pandas as pd
import plotly.graph_objects as go

_ROOM = 0.72  # of a row that its arms share
_LEGEND = {"xref": "paper"}  # beside the labels, which a wide legend would push away


def ladder(frame: pd.DataFrame) -> go.Figure:
    """What arms of a `gains` table save in each scope, the product on top and the step below, right of 0 less time.

    Whiskers are intervals, the grey bar about 0 at every point is its noise floor; a hollow point is not known to
    differ from 0.
    """
    frame = tables.complete("gains", frame)
    frame = frame[frame["scope"].isin(list(NAMES))].dropna(subset=["arm", "saved_s"])
    columns = ["saved_s", "saved_low_s", "saved_high_s"]
    ends = [0.0, *(v for v in frame[columns].to_numpy().ravel().tolist() if not units.missing(v))]
    scale, unit = units.time_unit(max(map(abs, ends)))
    figure = go.Figure()
    row_of: dict[tuple[str, str], int] = {}  # what is drawn in which row, by ladder and scope
    every = list(dict.fromkeys(frame["arm"]))
    most = 1
    for ladder, arms in by_ladder(frame):
        start = max(row_of.values(), default=-2) + 2  # a row is left between two ladders
        scopes = [scope for scope in ladder if (frame.loc[frame["arm"].isin(arms), "scope"] == scope).any()]
        row_of |= {(ladder[0], scope): start + place for place, scope in enumerate(scopes)}
        most = max(most, len(arms))
        room = _ROOM / len(arms)
        for number, arm in enumerate(arms):
            rows = rungs(frame, arm, scopes)
            middle = room * (number - (len(arms) - 1) / 2)
            places = [row_of[ladder[0], row["scope"]] + middle for row in rows]
            _draw(figure, rows, places, ARM_COLORS[every.index(arm) % len(ARM_COLORS)], scale, room)
    finish(figure, height=110 + (max(row_of.values(), default=0) + 1) * max(30, 15 * most))
    figure.update_layout(legend=_LEGEND)
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    pad = 0.06 * (max(ends) - min(ends)) or scale  # a noise floor may reach beyond what is drawn
    figure.update_xaxes(title_text=f"time saved a block ({unit}), right of 0 is less time", zeroline=False, nticks=7)
    figure.update_xaxes(range=[(min(ends) - pad) / scale, (max(ends) + pad) / scale])
    _rows(figure, [NAMES[scope] for _, scope in row_of], [*row_of.values()])
    return figure


def cases(frame: pd.DataFrame, delta: float = 0.01) -> go.Figure:
    """Time ratios of the step: a row a `case`, in it the arms of an `ablation` in colours of their own.

    Hollow is what is inconclusive; the band is +-delta about 1, left of which is less time.
    """
    frame = tables.complete("ablation", frame).dropna(subset=["arm", "ratio"])
    names, arms = list(dict.fromkeys(frame["case"])), list(dict.fromkeys(frame["arm"]))
    room = _ROOM / max(len(arms), 1)
    figure = go.Figure()
    for number, arm in enumerate(arms):
        color, middle = ARM_COLORS[number % len(ARM_COLORS)], room * (number - (len(arms) - 1) / 2)
        for symbol, wanted in (("circle", True), ("circle-open", False)):
            own = frame[(frame["arm"] == arm) & ((frame["verdict"] != "inconclusive") == wanted)]
            words = [f"{row['verdict']}, {units.ratio(row['ratio'])}" for row in records(own)]
            figure.add_scatter(
                x=own["ratio"].tolist(), y=[names.index(case) + middle for case in own["case"]], mode="markers",
                name=plain([arm])[0], legendgroup=arm, showlegend=wanted,
                marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 2, "color": color}},
                error_x=whiskers(own["ratio"] - own["ratio_low"], own["ratio_high"] - own["ratio"], color),
                customdata=[*zip(plain(own["case"]), plain(words), strict=True)],
                hovertemplate="<b>%{fullData.name}</b>, %{customdata[0]}<br>%{customdata[1]}<extra></extra>",
            )  # fmt: skip
    finish(figure, height=110 + max(len(names), 1) * max(34, 15 * len(arms)))
    figure.update_layout(legend=_LEGEND)
    figure.add_vrect(x0=1 - delta, x1=1 + delta, fillcolor=BAND, line_width=0, layer="below")
    figure.add_vline(x=1, line={"color": INK, "width": 1.5})
    figure.update_xaxes(title_text="step time ratio, left of 1 is less time", zeroline=False, nticks=7)
    _rows(figure, plain(names), [*range(len(names))])
    return figure


def _rows(figure: go.Figure, labels: Sequence[str], places: Sequence[int]) -> None:
    """A vertical axis of rows from the top, with a label each."""
    figure.update_yaxes(
        type="linear", range=[max(places, default=0) + 0.6, -0.6], showgrid=False, tickmode="array",
        tickvals=[*places], ticktext=[*labels],
    )  # fmt: skip


def _draw(
    figure: go.Figure, rows: list[dict[str, Any]], places: list[float], color: str, scale: float, room: float
) -> None:
    """One arm: its points from the product to the step, a line through them, and its noise floors."""
    for row, y in zip(rows, places, strict=True):
        if not units.missing(row["floor_s"]):
            ends = {"x0": -row["floor_s"] / scale, "x1": row["floor_s"] / scale}
            sides = {"y0": y - room / 3, "y1": y + room / 3}
            figure.add_shape(type="rect", layer="below", line_width=0, fillcolor=BAND, **ends, **sides)
    name = plain([rows[0]["arm"]])[0]
    figure.add_scatter(
        x=[row["saved_s"] / scale for row in rows], y=places, mode="lines", name=name, hoverinfo="skip",
        line={"color": color, "width": 1}, marker={"color": color, "symbol": "circle"}, opacity=0.6,
    )  # fmt: skip
    for symbol, wanted in (("circle", True), ("circle-open", False)):
        chosen = [(row, y) for row, y in zip(rows, places, strict=True) if is_known(row) is wanted]
        below = [(row["saved_s"] - row["saved_low_s"]) / scale for row, _ in chosen]
        above = [(row["saved_high_s"] - row["saved_s"]) / scale for row, _ in chosen]
        figure.add_scatter(
            x=[row["saved_s"] / scale for row, _ in chosen], y=[y for _, y in chosen], mode="markers", name=name,
            marker={"color": color, "symbol": symbol, "size": 9, "line": {"width": 2, "color": color}},
            error_x=whiskers(below, above, color), showlegend=False,
            customdata=[[NAMES[row["scope"]], in_words(row)] for row, _ in chosen],
            hovertemplate=f"<b>{name}</b>, %{{customdata[0]}}<br>%{{customdata[1]}}<extra></extra>",
        )  # fmt: skip


def in_words(row: dict[str, Any]) -> str:
    """What an arm saves, with its interval."""
    text = f"{units.seconds(row['saved_s'])} saved"
    if not (units.missing(row["saved_low_s"]) or units.missing(row["saved_high_s"])):
        text += f" ({units.seconds(row['saved_low_s'])} to {units.seconds(row['saved_high_s'])})"
    return text
