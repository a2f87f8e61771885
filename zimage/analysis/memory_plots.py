"""Figures about memory: what a step is predicted to need, and what less of it costs in time."""

from zimage.analysis import memory_reading, reading, tables, units
from zimage.analysis.drawing import ARM_COLORS, BASELINE_COLOR, finish, log_ticks, plain, whiskers

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
    finish(figure, height=80 + 30 * max(len(names), 1))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(side="top", showgrid=False, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure


def trade(memory: pd.DataFrame, ablation: pd.DataFrame) -> go.Figure:
    """Time ratio of every arm over the most that its step holds, the plain one at 1; times on a logarithmic axis."""
    held = memory_reading.arms(tables.complete("memory", memory))["peak_bytes"].dropna()
    times = ablation.dropna(subset=["ratio"]).drop_duplicates("arm").set_index("arm")
    names = [name for name in held.index if name == memory_reading.PLAIN or name in times.index]
    scale, unit = units.size_unit(float(held.max()) if len(held) else 1.0)
    figure = go.Figure()
    ratios = {name: 1.0 if name == memory_reading.PLAIN else float(times["ratio"][name]) for name in names}
    order = sorted(names, key=lambda name: held[name])
    for place, name in enumerate(order):
        ends = [float(times[end].get(name, float("nan"))) for end in ("ratio_low", "ratio_high")]
        color = BASELINE_COLOR if name == memory_reading.PLAIN else ARM_COLORS[0]
        figure.add_scatter(
            x=[held[name] / scale], y=[ratios[name]], mode="markers+text", text=plain([name]), cliponaxis=False,
            textposition="top center" if place % 2 else "bottom center", marker={"color": color, "size": 11},
            error_y=whiskers([ratios[name] - ends[0]], [ends[1] - ratios[name]]),
            hovertemplate="<b>%{text}</b><br>%{x:.4g} " + unit + ", time ratio %{y:.3f}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=380)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title_text=f"held at most in a step ({unit})", rangemode="tozero")
    low, high = (min(ratios.values(), default=1.0) / 1.4, max(ratios.values(), default=1.0) * 1.4)
    figure.update_yaxes(
        title_text="time ratio to plain", title_font={"size": 12}, showgrid=True, **log_ticks(low, high)
    )
    return figure
