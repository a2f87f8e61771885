"""Figures of what operations cost: their times, the roofline they stand under, and times predicted beside measured.

As in `plots`, a result table goes in and a plotly figure comes out.
"""

import math
from dataclasses import dataclass

from zimage.analysis import tables, units
from zimage.analysis.cost import UNATTRIBUTED
from zimage.analysis.drawing import ARM_COLORS, BASELINE_COLOR, INK, finish, log_ticks, plain, whiskers
from zimage.analysis.reading import records

import pandas as pd
import plotly.graph_objects as go

BOUNDS = {  # what holds an operation back, and how it is drawn
    "compute": ("#3f7fc1", "square"),
    "memory": ("#cf8a14", "circle"),
    "": ("#8f97a3", "circle-open"),
}
_BOUND_NAMES = {"compute": "bound by arithmetic", "memory": "bound by memory", "": "not placed"}
_LONGEST_NAMES = 48  # characters beside a point
_USES = {"calibration": (BASELINE_COLOR, "circle-open"), "held out": ("#3f7fc1", "circle")}


def operations(frame: pd.DataFrame) -> go.Figure:
    """Time of every operation of one stage in order, with its interval; the rest of the stage keeps its sign.

    `frame` is an `operations` table of one stage. Beside each bar stands the share of the roof that it attains.
    """
    frame = tables.complete("operations", frame).dropna(subset=["time_s"])
    scale, unit = units.time_unit(frame["time_s"].abs().max() if len(frame) else float("nan"))
    bounds = frame["bound"].where(frame["bound"].isin([*BOUNDS]), "")
    figure = go.Figure()
    for bound, (color, _) in BOUNDS.items():
        group = frame[bounds == bound]
        if group.empty:
            continue
        low, high = (group["time_s"] - group["time_low_s"]) / scale, (group["time_high_s"] - group["time_s"]) / scale
        figure.add_bar(
            y=plain(group["operation"]),
            x=(group["time_s"] / scale).tolist(),
            name=_BOUND_NAMES[bound],
            orientation="h",
            marker={"color": color, "line": {"width": 0}, "cornerradius": 2},
            error_x=whiskers(low, high),
            customdata=[[_facts(row)] for row in records(group)],
            hovertemplate="<b>%{y}</b><br>%{customdata[0]}<extra></extra>",
        )
    finish(figure, height=92 + 26 * max(len(frame), 1))
    figure.update_layout(barmode="overlay", bargap=0.28, margin={"r": 64})
    figure.update_xaxes(title_text=f"time ({unit}); right: share of the roof that is attained", zeroline=True)
    names = list(dict.fromkeys(frame["operation"]))
    figure.update_yaxes(categoryorder="array", categoryarray=plain(names)[::-1], showgrid=False)
    figure.update_layout(
        annotations=[
            {"y": plain([row["operation"]])[0], "text": units.percent(row["attained_fraction"], 0), "x": 1,
             "xref": "paper", "xanchor": "left", "xshift": 10, "showarrow": False, "font": {"size": 12}}
            for row in records(frame)
            if not units.missing(row["attained_fraction"])
        ]
    )  # fmt: skip
    return figure


def roofline(frame: pd.DataFrame) -> go.Figure:
    """Every operation by its arithmetic intensity and the rate it reaches, under the roof it was placed by.

    `frame` is an `operations` table of one stage. The roof is read off the placements themselves, so it is the one
    that was measured on the device; without any placement there is none to draw.
    """
    frame = tables.complete("operations", frame)
    rows = frame[(frame["time_s"] > 0) & (frame["flops"] > 0) & (frame["bytes"] > 0)]
    rows = rows[rows["operation"] != UNATTRIBUTED]
    rows = rows.assign(rate=rows["flops"] / rows["time_s"], x=rows["flops"] / rows["bytes"])
    figure = go.Figure()
    corners = _roof(figure, rows)
    points = _clusters(rows.assign(bound=rows["bound"].where(rows["bound"].isin([*BOUNDS]), "")))
    for bound, (color, symbol) in BOUNDS.items():
        group = [point for point in points if point.bound == bound]
        if not group:
            continue
        figure.add_scatter(
            x=[p.x for p in group], y=[p.rate for p in group], mode="markers+text", name=_BOUND_NAMES[bound],
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 1.5, "color": color}},
            text=plain(_named(p) for p in group), textposition=[p.side for p in group],
            textfont={"size": 11, "color": INK}, customdata=[[p.facts] for p in group],
            hovertemplate="%{customdata[0]}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    finish(figure, height=420)
    figure.update_layout(margin={"l": 8, "r": 24, "t": 36, "b": 48})
    rates = [p.rate for p in points] + [y for _, y in corners]
    reach = [x for x, _ in corners] or [p.x for p in points]
    if rates:
        figure.update_xaxes(**log_ticks(min(reach), max(reach)))
        figure.update_yaxes(**log_ticks(min(rates) / 2, max(rates) * 2))
    figure.update_xaxes(title_text="arithmetic intensity (FLOP per byte)")
    figure.update_yaxes(title_text="FLOP/s", title_font={"size": 12})
    return figure


def scaling(frame: pd.DataFrame) -> go.Figure:
    """Measured time of a step over predicted, on the diagonal where the prediction is right.

    `frame` is a `scaling` table; sizes that the prediction was calibrated with are drawn hollow.
    """
    frame = tables.complete("scaling", frame)
    rows = frame[(frame["time_s"] > 0) & (frame["predicted_s"] > 0)]
    scale, unit = units.time_unit(rows["time_s"].median() if len(rows) else float("nan"))
    figure = go.Figure()
    ends = [float(v) / scale for c in ("time_s", "predicted_s") for v in rows[c]]
    if ends:
        line = [min(ends) / 1.3, max(ends) * 1.3]
        figure.add_scatter(
            x=line, y=line, mode="lines", showlegend=False, hoverinfo="skip", line={"color": INK, "width": 1.5}
        )
    for use, (color, symbol) in _USES.items():
        group = rows[rows["use"] == use]
        if group.empty:
            continue
        figure.add_scatter(
            x=(group["predicted_s"] / scale).tolist(), y=(group["time_s"] / scale).tolist(), mode="markers", name=use,
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            customdata=[[_size_facts(row)] for row in records(group)],
            hovertemplate="%{customdata[0]}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=380)
    axis = log_ticks(min(ends) / 1.3, max(ends) * 1.3) if ends else {}
    figure.update_xaxes(title_text=f"predicted time of a step ({unit})", **axis)
    figure.update_yaxes(title_text=f"measured ({unit})", title_font={"size": 12}, **axis)
    return figure


def throughput(frame: pd.DataFrame) -> go.Figure:
    """Measured time of a step for every size of a `scaling` table, as bars with intervals."""
    frame = tables.complete("scaling", frame).dropna(subset=["time_s"])
    scale, unit = units.time_unit(frame["time_s"].median() if len(frame) else float("nan"))
    low, high = (frame["time_s"] - frame["time_low_s"]) / scale, (frame["time_high_s"] - frame["time_s"]) / scale
    labels = plain(size_name(row) for row in records(frame))
    figure = go.Figure()
    figure.add_bar(
        y=labels, x=(frame["time_s"] / scale).tolist(), orientation="h", error_x=whiskers(low, high), showlegend=False,
        marker={"color": ARM_COLORS[0], "line": {"width": 0}, "cornerradius": 2},
        customdata=[[_size_facts(row)] for row in records(frame)], hovertemplate="%{customdata[0]}<extra></extra>",
    )  # fmt: skip
    finish(figure, height=92 + 26 * max(len(labels), 1))
    figure.update_xaxes(title_text=f"time of a step ({unit})", zeroline=True)
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1], showgrid=False)
    return figure


def by_rows(frame: pd.DataFrame) -> go.Figure:
    """Time of one product over its number of rows, a line an arm, both on logarithmic axes.

    `frame` has the columns `rows`, `arm` and `time_s`.
    """
    rows = frame[frame["time_s"] > 0].sort_values("rows")
    scale, unit = units.time_unit(rows["time_s"].max() if len(rows) else float("nan"))
    figure = go.Figure()
    for place, (arm, group) in enumerate(rows.groupby("arm", sort=False)):
        figure.add_scatter(
            x=group["rows"].tolist(),
            y=(group["time_s"] / scale).tolist(),
            mode="lines+markers",
            name=plain([arm])[0],
            line={"color": ARM_COLORS[place % len(ARM_COLORS)], "width": 2},
            marker={"size": 8, "color": ARM_COLORS[place % len(ARM_COLORS)]},
            customdata=[[units.seconds(value)] for value in group["time_s"]],
            hovertemplate="<b>" + plain([arm])[0] + "</b><br>%{x} rows: %{customdata[0]}<extra></extra>",
        )
    finish(figure, height=380)
    figure.update_layout(legend_xref="paper")  # over a plot with short ticks
    if len(rows):
        low, high = float(rows["rows"].min()), float(rows["rows"].max())
        figure.update_xaxes(**log_ticks(low / 1.2, high * 1.2))
        times = rows["time_s"] / scale
        figure.update_yaxes(**log_ticks(float(times.min()) / 1.5, float(times.max()) * 1.5), showgrid=True)
    figure.update_xaxes(title_text="rows")
    figure.update_yaxes(title_text=f"time ({unit})", title_font={"size": 12})
    return figure


def size_name(row: dict[str, float]) -> str:
    """A row of a `scaling` table in words: `1024 x 768 px, batch 2, 32 tokens`."""
    sides = ("?" if units.missing(row[name]) else f"{int(row[name])}" for name in ("height", "width"))
    parts = [f"{' x '.join(sides)} px"]
    if not units.missing(row["batch"]):
        parts.append(f"batch {int(row['batch'])}")
    if not units.missing(row["caption_tokens"]):
        tokens = int(row["caption_tokens"])
        parts.append(f"{tokens} token{'s' * (tokens != 1)}")
    return ", ".join(parts)


def _roof(figure: go.Figure, rows: pd.DataFrame) -> list[tuple[float, float]]:
    """Draw what bandwidth and arithmetic allow; gives its corners, none where nothing was placed."""
    placed = rows[rows["attained_fraction"] > 0]
    if placed.empty:
        return []
    bandwidths = (placed["bytes"] / placed["time_s"] / placed["attained_fraction"])[placed["bound"] == "memory"]
    peaks = (placed["rate"] / placed["attained_fraction"])[placed["bound"] == "compute"]
    bandwidth = float(bandwidths.median()) if len(bandwidths) else math.inf
    peak = float(peaks.median()) if len(peaks) else math.inf
    ridge = peak / bandwidth if math.isfinite(peak) and math.isfinite(bandwidth) else None
    ends = [float(rows["x"].min()) / 2, float(rows["x"].max()) * 2, *([ridge] if ridge else [])]
    xs = sorted({min(ends), max(ends), *([ridge] if ridge else [])})
    corners = [(x, min(peak, bandwidth * x)) for x in xs]
    if not all(0 < y < math.inf for _, y in corners):
        return []
    figure.add_scatter(
        x=[x for x, _ in corners], y=[y for _, y in corners], mode="lines", name="roof", showlegend=False,
        hoverinfo="skip", line={"color": INK, "width": 1.5},
    )  # fmt: skip
    return corners


@dataclass
class _Point:
    """Operations that lie so close together under the roof that they share a marker and a label."""

    x: float
    rate: float
    bound: str
    names: list[str]
    facts: str
    side: str


def _clusters(rows: pd.DataFrame) -> list[_Point]:
    points: list[_Point] = []
    for row in sorted(records(rows), key=lambda row: (row["x"], row["rate"])):
        name, fact = str(row["operation"]), f"<b>{plain([row['operation']])[0]}</b><br>{_facts(row)}"
        near = next(
            (
                p
                for p in points
                if p.bound == row["bound"] and max(_apart(p.x, row["x"]), _apart(p.rate, row["rate"])) < 0.12
            ),
            None,
        )
        if near is None:
            points.append(_Point(row["x"], row["rate"], row["bound"], [name], fact, ""))
        else:  # in the middle of those that it stands for
            count = len(near.names)
            near.x = near.x ** (count / (count + 1)) * row["x"] ** (1 / (count + 1))
            near.rate = near.rate ** (count / (count + 1)) * row["rate"] ** (1 / (count + 1))
            near.names.append(name)
            near.facts = f"{near.facts}<br>{fact}"
    middle = math.sqrt(points[0].x * points[-1].x) if points else 0.0
    for point in points:  # a name has its room towards the middle
        point.side = "middle right" if point.x < middle else "middle left"
    return points


def _named(point: _Point) -> str:
    """The names at a point, those that there is room for."""
    shown = point.names if len(", ".join(point.names)) <= _LONGEST_NAMES else point.names[:1]
    return ", ".join(shown) + (f" and {len(point.names) - len(shown)} more" if len(shown) < len(point.names) else "")


def _apart(a: float, b: float) -> float:
    """How far two positive numbers lie apart, in powers of ten."""
    return abs(math.log10(a / b))


def _facts(row: dict[str, float]) -> str:
    lines = [units.seconds(row["time_s"])]
    if not (units.missing(row["time_low_s"]) or units.missing(row["time_high_s"])):
        lines[0] += f" ({units.seconds(row['time_low_s'])} to {units.seconds(row['time_high_s'])})"
    if not units.missing(row["flops"]):
        lines.append(f"{units.count(row['flops'])}FLOP")
    if not units.missing(row["bytes"]):
        lines.append(f"{units.size(row['bytes'])} moved at least")
    if not units.missing(row["attained_fraction"]):
        lines.append(f"{units.percent(row['attained_fraction'], 0)} of the roof")
    return "<br>".join(lines)


def _size_facts(row: dict[str, float]) -> str:
    lines = [f"<b>{size_name(row)}</b>", f"measured {units.seconds(row['time_s'])}"]
    if not units.missing(row["predicted_s"]):
        lines.append(f"predicted {units.seconds(row['predicted_s'])} ({units.percent(row['error'])} off)")
    if not units.missing(row["mfu"]):
        lines.append(f"MFU {units.percent(row['mfu'])}")
    return "<br>".join(lines)
