"""What all figures share: colours, fonts and axes, plain labels, whiskers, and panels beside each other.

Backgrounds are transparent and text is a mid grey, so that a figure reads on white and on black; the dashboard sets
exact colours to the reader's scheme. Colours follow Okabe and Ito and never carry a meaning alone.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from zimage.analysis import units

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

INK = "#7b828c"
GRID = "rgba(128,136,148,0.22)"
BAND = "rgba(128,136,148,0.16)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

PART_COLORS = {
    "embedders": "#8f97a3",
    "noise refiner": "#cf8a14",
    "context refiner": "#a45fa0",
    "main layers": "#3f7fc1",
    "final layer": "#1c9a78",
    "other": "#b5793f",
}
VERDICTS = {  # colour and marker: the marker points to where the time went
    "faster": ("#1c9a78", "triangle-left"),
    "slower": ("#d4622a", "triangle-right"),
    "equivalent": ("#3f7fc1", "circle"),
    "inconclusive": ("#8f97a3", "circle-open"),
}
BASELINE_COLOR = "#8f97a3"
ARM_COLORS = ("#3f7fc1", "#cf8a14", "#1c9a78", "#a45fa0", "#d4622a", "#5aa9d6", "#b5793f", "#c2a500")

_SIDES = ("top right", "bottom right", "middle right", "top left", "bottom left")  # of a point, for its name
_CHARACTER, _LINE, _MARK = 0.0095, 0.055, 0.012  # a name's size and half a marker's, in shares of a chart's
_ROOM = 0.09  # beyond the outermost values of an axis, in shares of what they span
_BEYOND = 0.12  # the margin right of a chart into which names reach, in shares of it
_Box = tuple[float, float, float, float]  # left, bottom, right, top
Panel = tuple[str, Sequence[str], Sequence[float], Sequence[float], Sequence[float], Sequence[str]]


def side_by_side(panels: Sequence[Panel], baseline: str | None) -> go.Figure:
    """Small multiples beside each other: one panel a quantity, one bar a label, its value written at the bar."""
    titles = [f"<b>{plain([panel[0]])[0]}</b>" for panel in panels]
    several = len(panels) > 1
    # A panel's labels stand in the gap before it: 0.009 of a page's width is one of their characters. A page may set
    # panels three in its width, where a long name leaves no room for its value beside it.
    sizes = [[(len(n), len(t)) for n, t in zip(p[1], p[5], strict=True)] for p in panels]
    joint = "<br>" if max((sum(size) for panel in sizes for size in panel), default=0) > 26 else "  "
    widest = max((max(size) if joint == "<br>" else sum(size) for panel in sizes[1:] for size in panel), default=0)
    figure = make_subplots(
        rows=1, cols=max(len(panels), 1), subplot_titles=titles if several else None,
        horizontal_spacing=min(max(0.1, 0.03 + 0.009 * widest), 0.5 / max(len(panels) - 1, 1)),
    )  # fmt: skip
    longest = 1
    for place, (_, labels, values, low, high, texts) in enumerate(panels, start=1):
        longest = max(longest, len(labels))
        figure.add_bar(
            y=plain(labels), x=list(values), orientation="h", row=1, col=place, showlegend=False,
            marker={
                "color": [BASELINE_COLOR if n == baseline else ARM_COLORS[0] for n in labels],
                "line": {"width": 0}, "cornerradius": 2,
            },
            error_x=whiskers(_below(values, low), _below(high, values)),
            customdata=[[t] for t in plain(texts)],
            hovertemplate="<b>%{y}</b><br>%{customdata[0]}<extra></extra>",
        )  # fmt: skip
        ticks = 4 if max((abs(v) for v in values if not units.missing(v)), default=1) >= 1e-3 else 2  # as 2e-7 is wide
        # The value stands left of the axis with the label, where no whisker can cross it.
        figure.update_yaxes(
            categoryorder="array", categoryarray=plain(dict.fromkeys(labels))[::-1], showgrid=False, row=1, col=place,
            tickmode="array", tickvals=plain(labels),
            ticktext=[f"{n}{joint}<b>{t}</b>" for n, t in zip(plain(labels), plain(texts), strict=True)],
        )  # fmt: skip
        figure.update_xaxes(zeroline=True, rangemode="tozero", nticks=ticks, exponentformat="e", row=1, col=place)
    finish(figure, height=64 + 34 * longest)
    figure.update_layout(bargap=0.34, margin={"t": 34, "b": 22}, showlegend=False)
    figure.update_annotations(font={"size": 13})
    if titles and not several:
        corner = {"x": 0, "xref": "container", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 8, "l": 0}}
        figure.update_layout(title={"text": titles[0], "font": {"size": 13}, **corner})
    return figure


def log_ticks(low: float, high: float) -> dict[str, object]:
    """A logarithmic axis over [low, high]: ticks at powers of ten, and at twice and five times those where few fit."""
    if not 0 < low <= high < math.inf:
        return {"type": "log"}
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    shown = [v for v in values if 0.999 * low <= v <= 1.001 * high]
    texts = [re.sub(r"\.0+(?=\D|$)", "", units.count(v)) if v >= 1e4 else f"{v:g}" for v in shown]
    return {"type": "log", "tickmode": "array", "tickvals": shown, "ticktext": texts,
            "range": [math.log10(low), math.log10(high)]}  # fmt: skip


def finish(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        height=height,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 8, "r": 12, "t": 36, "b": 40},
        showlegend=True,
        legend={
            "orientation": "h",
            "x": 0,
            "xref": "container",
            "y": 1,
            "yanchor": "bottom",
            "xanchor": "left",
            "title": {"text": ""},
        },
        hoverlabel={"align": "left", "font": {"family": FONT, "size": 13}},
        dragmode=False,
    )
    figure.update_xaxes(
        gridcolor=GRID, zerolinecolor=INK, zerolinewidth=1, tickangle=0, showline=False, automargin=True,
        fixedrange=True, title_font={"size": 12}, title_standoff=10, tickfont={"size": 12},
    )  # fmt: skip
    figure.update_yaxes(
        gridcolor=GRID, zeroline=False, showline=False, automargin=True, fixedrange=True, type="category",
        ticks="outside", ticklen=6, tickcolor="rgba(0,0,0,0)",
    )  # fmt: skip


def whiskers(below: Iterable[float], above: Iterable[float], color: str = INK) -> dict[str, object]:
    """Asymmetric error bars; an interval with an end that is missing or infinite has none, and no caps either."""
    ends = [(float(a), float(b)) if not (units.missing(a) or units.missing(b)) else (0.0, 0.0)
            for a, b in zip(above, below, strict=True)]  # fmt: skip
    array, arrayminus = ([max(end[side], 0.0) for end in ends] for side in (0, 1))
    return {
        "type": "data",
        "symmetric": False,
        "array": array,
        "arrayminus": arrayminus,
        "visible": any(array) or any(arrayminus),
        "color": color,
        "thickness": 1.5,
        "width": 3,
    }


def _below(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    """upper - lower, element by element; missing where either side is, or has no elements."""
    pairs = zip_longest(upper, lower)
    return [math.nan if units.missing(a) or units.missing(b) else float(a) - float(b) for a, b in pairs]


def along(
    values: "pd.Series[float]", logarithmic: bool = False, ends: tuple[float, float] | None = None
) -> "pd.Series[float]":
    """Where values stand on an axis from its first end, 0, to the other, 1; ends: the least and largest if left out."""
    low, high = (values.min(), values.max()) if ends is None else ends
    places = values.map(math.log) if logarithmic else values
    if logarithmic and len(values):
        low, high = math.log(low), math.log(high)
    return (places - low) / ((high - low) or 1.0)


def spread(values: Iterable[float], logarithmic: bool = False) -> tuple[float, float]:
    """The ends of an axis that shows all of these values: beyond the outermost ones lies some room for a name.

    What is missing counts for nothing, on a logarithmic axis what is not above 0 either; (0, 1) or (0.1, 1) for none.
    """
    shown = [float(v) for v in values if not units.missing(v) and math.isfinite(v) and (v > 0 or not logarithmic)]
    if not shown:
        return (0.1, 1.0) if logarithmic else (0.0, 1.0)
    if logarithmic:
        low, high = math.log(min(shown)), math.log(max(shown))
        return math.exp(low - max(_ROOM * (high - low), 0.1)), math.exp(high + max(_ROOM * (high - low), 0.1))
    low, high = min(shown), max(shown)
    room = _ROOM * (high - low or abs(high) or 1.0)
    return low - room, high + room


def sides_of_names(names: Iterable[object], x: Iterable[float], y: Iterable[float]) -> dict[str, str]:
    """At which side of its point each name stands, the first ones first; none for one that would cover another.

    x, y: places along the axes, from 0 to 1.
    """
    points = list(zip(map(str, names), x, y, strict=True))
    taken: list[_Box] = [(a - _MARK, b - _MARK, a + _MARK, b + _MARK) for _, a, b in points]
    found: dict[str, str] = {}
    for name, at, up in points:
        width = _CHARACTER * (len(name) + 1)  # and room before the next
        for side in _SIDES:
            bottom = up + {"top": 0.5, "middle": -0.5, "bottom": -1.5}[side.split()[0]] * _LINE
            left = at + _MARK if side.endswith("right") else at - _MARK - width
            box = (left, bottom, left + width, bottom + _LINE)
            if left > -_MARK and left + width < 1 + _BEYOND and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found[name] = side
                break
    return found


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plain(texts: Iterable[object]) -> list[str]:
    """Texts that plotly draws as they are written: it reads a small HTML in labels, which data must not reach."""
    return [html.escape(str(text), quote=False).replace("$", "&#36;") for text in texts]


def wrapped(label: str) -> str:
    """A label of several parts on two lines where it is long."""
    head, joint, tail = label.rpartition(" · ")
    return f"{head}<br>{tail}" if joint and len(label) > 20 else label
