"""Figures of trends: time ratios, and as context a step's time, by version."""

from collections.abc import Mapping, Sequence

from zimage.analysis import trends, units
from zimage.analysis.drawing import ARM_COLORS, BAND, INK, finish, plain, whiskers
from zimage.analysis.trends import Trend

import plotly.graph_objects as go

MOST = len(ARM_COLORS)  # lines that can be told apart


def ratios(found: Trend, delta: float = 0.01) -> go.Figure:
    """A line an arm: its time ratio in every version with its interval, and the band of +-delta about 1.

    Of more than MOST arms those are drawn that changed most.
    """
    figure = go.Figure()
    for place, about in enumerate(drawn(found)):
        points = [point for point in found.points if point.about == about]
        color = ARM_COLORS[place]
        values = [point.ratio.value for point in points]
        figure.add_scatter(
            x=wrapped([point.version for point in points]),
            y=values,
            mode="lines+markers",
            name=plain([trends.name(about)])[0],
            line={"color": color, "width": 2},
            marker={"color": color, "size": 9},
            error_y=whiskers(
                [value - point.ratio.low for value, point in zip(values, points, strict=True)],
                [point.ratio.high - value for value, point in zip(values, points, strict=True)],
                color,
            ),
            customdata=[[f"{units.ratio(p.ratio.low)} to {units.ratio(p.ratio.high)}"] for p in points],
            hovertemplate="<b>%{x}</b><br>ratio %{y:.3f}, %{customdata[0]}<extra></extra>",
        )
    _finish(figure, found.versions, "time ratio to the baseline", 360)
    figure.add_hrect(y0=1 - delta, y1=1 + delta, fillcolor=BAND, line_width=0, layer="below")
    figure.add_hline(y=1, line={"color": INK, "width": 1.5})
    return figure


def steps(found: Trend) -> go.Figure:
    """A line a baseline: the median time of its step in every version."""
    figure = go.Figure()
    times = found.steps_s
    scale, unit = units.time_unit(max((time_s for step in times for time_s in step.values()), default=float("nan")))
    for place, arm in enumerate(list(dict.fromkeys(arm for step in times for arm in step))[:MOST]):
        known = [(version, step[arm]) for version, step in zip(found.versions, times, strict=True) if arm in step]
        figure.add_scatter(
            x=wrapped([version for version, _ in known]),
            y=[time_s / scale for _, time_s in known],
            mode="lines+markers",
            name=plain([f"{arm}, a step"])[0],
            line={"color": ARM_COLORS[place], "width": 2, "dash": "dot"},
            marker={"color": ARM_COLORS[place], "size": 9, "symbol": "circle-open"},
            hovertemplate=f"<b>%{{x}}</b><br>%{{y:.3g}} {unit}<extra></extra>",
        )
    _finish(figure, found.versions, f"time of a step ({unit})", 260)
    figure.update_yaxes(rangemode="tozero")
    return figure


def drawn(found: Trend) -> list[tuple[str, ...]]:
    """The ratios that are drawn, at most MOST of them."""
    about = trends.best(found)
    moved: Mapping[tuple[str, ...], float] = {
        key: abs(change.interval.value - 1) for key, change in found.since_first.items()
    }
    kept = sorted(about, key=lambda key: -moved.get(key, 0.0))[:MOST]
    return [key for key in about if key in kept]


def wrapped(versions: Sequence[str]) -> list[str]:
    """Names of versions as labels, a part a line."""
    return [version.replace(", ", "<br>") for version in plain(versions)]


def _finish(figure: go.Figure, versions: Sequence[str], title: str, height: int) -> None:
    finish(figure, height=height)
    figure.update_layout(margin={"l": 8, "r": 24, "t": 36, "b": 40})
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=wrapped(versions), range=[-0.5, len(versions) - 0.5],
        showgrid=False, zeroline=False, tickangle=None,  # plotly leaves out labels that have no room
    )  # fmt: skip
    figure.update_yaxes(type="linear", title_text=title, title_font={"size": 12}, showgrid=True, nticks=7)
