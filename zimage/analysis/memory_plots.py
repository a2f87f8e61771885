"""Figures about memory: what a step is predicted to need, and what less of it costs in time."""

from zimage.analysis import memory_reading, reading, tables, units
from zimage.analysis.drawing import Panel, finish, plain, side_by_side

import pandas as pd
import plotly.graph_objects as go

_SCALE, _ON_SCALE = [[0.0, "#edf2f8"], [1.0, "#6ba0d8"]], "#1d2733"  # light enough for one colour of text


def needs(footprint: pd.DataFrame) -> go.Figure:
    """Heat map of the rows of a `footprint` table that are only predicted: precisions by sizes, the bytes written."""
    rows = memory_reading.predicted(footprint)
    rows = rows.assign(size=[memory_reading.size_name(row) for row in reading.records(rows)])
    grid = rows.pivot_table(index="arm", columns="size", values="predicted_bytes", sort=False)
    scale, _ = units.size_unit(float(rows["predicted_bytes"].max()) if len(rows) else 1.0)
    names = plain(grid.index)
    figure = go.Figure(
        go.Heatmap(
            x=plain(grid.columns), y=names, z=(grid.to_numpy() / scale).tolist(), colorscale=_SCALE, zmin=0, xgap=2,
            text=[[units.size(value) for value in line] for line in grid.to_numpy()], texttemplate="%{text}", ygap=2,
            textfont={"color": _ON_SCALE}, showscale=False, hovertemplate="<b>%{y}</b>, %{x}<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    finish(figure, height=60 + 30 * max(len(names), 1))
    figure.update_layout(showlegend=False, margin={"b": 8})
    figure.update_xaxes(side="top", showgrid=False, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure


def trade(memory: pd.DataFrame, ablation: pd.DataFrame) -> go.Figure:
    """Bars of the most that every arm's step holds, beside its time ratio with the interval; the plain one first."""
    held = memory_reading.peaks_of_arms(tables.complete("memory", memory))
    times = {str(row["arm"]): row for row in reading.records(ablation.dropna(subset=["ratio"]))}
    names = [name for name in held if name == memory_reading.PLAIN or name in times]
    one = {"ratio": 1.0, "ratio_low": float("nan"), "ratio_high": float("nan")}
    found = [times.get(name, one) for name in names]
    scale, unit = units.size_unit(max(held.values(), default=1.0))
    sizes, texts = [held[name] / scale for name in names], [units.size(held[name]) for name in names]
    ratios, low, high = ([row[key] for row in found] for key in ("ratio", "ratio_low", "ratio_high"))
    panels: list[Panel] = [
        (f"held at most in a step ({unit})", names, sizes, [], [], texts),
        ("time ratio", names, ratios, low, high, [units.ratio(value) for value in ratios]),
    ]
    return side_by_side(panels, memory_reading.PLAIN)
