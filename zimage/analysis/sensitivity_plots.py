"""Figures about sensitivity: where damage is done, what it costs a byte, and what a recipe made of that is worth."""

from zimage.analysis import tables, units
from zimage.analysis.drawing import ARM_COLORS, BASELINE_COLOR, PART_COLORS, finish, log_ticks, plain, whiskers
from zimage.analysis.reading import part_of, records

import pandas as pd
import plotly.graph_objects as go

MAX_BARS = 40  # layers drawn; of more, the first and the last of the ranking
_SCALE, _ON_SCALE = [[0.0, "#edf2f8"], [1.0, "#6ba0d8"]], "#1d2733"  # light enough for one colour of text
_LEGEND = {"xref": "paper"}  # beside the labels, which a wide legend would push away


def steps(frame: pd.DataFrame, metric: str = "velocity_error") -> go.Figure:
    """Heat map of a `sensitivity` table: blocks in forward order by steps, the error where the block is packed in that

    step alone. metric: "velocity_error" or "end_error".
    """
    frame = tables.complete("sensitivity", frame)
    rows = frame[(frame["kind"] == "block") & frame["step"].notna()]
    grid = rows.pivot_table(index="unit", columns="step", values=metric, sort=False, dropna=False)
    names = plain(grid.index)
    columns = [f"step {int(step) + 1}" for step in grid.columns]
    texts = [[units.percent(value) for value in line] for line in grid.to_numpy()]
    figure = go.Figure(
        go.Heatmap(
            x=columns, y=names, z=(100 * grid.to_numpy()).tolist(), text=texts, colorscale=_SCALE, zmin=0,
            textfont={"color": _ON_SCALE}, texttemplate="%{text}" if len(columns) <= 10 else None, xgap=2, ygap=2,
            showscale=len(columns) > 10,
            hovertemplate="<b>%{y}</b>, %{x}<br>%{text}<extra></extra>", colorbar={"ticksuffix": " %", "thickness": 12},
        )
    )  # fmt: skip
    finish(figure, height=80 + 26 * max(len(names), 1))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(side="top", showgrid=False, zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return figure


def damage(frame: pd.DataFrame) -> go.Figure:
    """Bars of squared error of the velocity per MB saved, on a logarithmic axis, the layers that pay most first.

    `frame` is a `sensitivity` table; of more than MAX_BARS layers the first and the last are drawn.
    """
    frame = tables.complete("sensitivity", frame)
    rows = frame[(frame["kind"] == "layer") & frame["step"].isna() & (frame["damage_per_byte"] > 0)]
    rows = rows.sort_values("damage_per_byte")
    if len(rows) > MAX_BARS:
        rows = pd.concat([rows.head(MAX_BARS // 2), rows.tail(MAX_BARS // 2)])
    rows = rows.assign(part=rows["unit"].map(part_of), value=1e6 * rows["damage_per_byte"])
    figure = go.Figure()
    low = rows["value"].min() / 2 if len(rows) else 1.0
    for part, color in PART_COLORS.items():
        own = rows[rows["part"] == part]
        if own.empty:
            continue
        facts = [
            f"error of the velocity {units.percent(row['velocity_error'], 2)}, {units.size(row['bytes_saved'])} saved"
            for row in records(own)
        ]
        figure.add_bar(
            y=plain(own["unit"]), x=(own["value"] - low).tolist(), base=low, name=part, orientation="h",
            marker={"color": color, "line": {"width": 0}}, customdata=[[fact] for fact in facts],
            hovertemplate="<b>%{y}</b><br>%{customdata[0]}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=100 + 19 * max(len(rows), 1))
    figure.update_layout(barmode="overlay", bargap=0.3, legend=_LEGEND)
    ticks = log_ticks(low, rows["value"].max() * 1.1) if len(rows) else {}
    figure.update_xaxes(title_text="squared error of the velocity per MB saved", zeroline=False, **ticks)
    figure.update_yaxes(categoryorder="array", categoryarray=plain(rows["unit"])[::-1], showgrid=False)
    return figure


def against_uniform(
    memory: pd.DataFrame, quality: pd.DataFrame, recipes: list[str], metric: str = "relative_l2_error"
) -> go.Figure:
    """Error over bytes of weights: a line through the uniform packings, and the recipes beside it.

    memory, quality: tables with `weight_bytes` and `metric` of every arm; recipes: which of the arms are recipes.
    """
    size = memory[memory["metric"] == "weight_bytes"].set_index("arm")["bytes"]
    rows = quality[quality["metric"] == metric].drop_duplicates("arm").set_index("arm")
    rows = tables.complete("quality", rows.reset_index()).assign(bytes=lambda f: f["arm"].map(size))
    rows = rows.dropna(subset=["bytes", "value"]).sort_values("bytes")
    scale, unit = units.size_unit(float(rows["bytes"].max()) if len(rows) else 1.0)
    figure = go.Figure()
    uniform, mixed = rows[~rows["arm"].isin(recipes)], rows[rows["arm"].isin(recipes)]
    for own, name, mode, color, symbol, place in (
        (uniform, "all layers alike", "lines+markers+text", BASELINE_COLOR, "circle", "top right"),
        (mixed, "recipe", "markers+text", ARM_COLORS[4], "diamond", "bottom left"),
    ):
        figure.add_scatter(
            x=(own["bytes"] / scale).tolist(), y=own["value"].tolist(), text=plain(own["arm"]), name=name, mode=mode,
            marker={"color": color, "symbol": symbol, "size": 11}, line={"color": color, "width": 1.5},
            textposition=place, cliponaxis=False,
            error_y=whiskers(own["value"] - own["low"], own["high"] - own["value"]),
            hovertemplate="<b>%{text}</b><br>%{x:.4g} " + unit + ", error %{y:.3%}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=380)
    figure.update_layout(legend=_LEGEND)
    figure.update_xaxes(title_text=f"weights ({unit})", zeroline=False)
    ends = (float(rows["value"].min()) / 1.5, float(rows["value"].max()) * 1.5) if len(rows) else (0.1, 1.0)
    figure.update_yaxes(title_text="relative L2 error of the velocity", zeroline=False, **log_ticks(*ends))
    figure.update_yaxes(title_font={"size": 12}, title_standoff=10)
    if len(rows) and rows["bytes"].min() > 0:  # room for the names beside the outer points
        low, high = float(rows["bytes"].min()) / scale, float(rows["bytes"].max()) / scale
        figure.update_xaxes(range=[low - 0.35 * (high - low) - 0.01 * low, high + 0.15 * (high - low) + 0.01 * low])
    return figure
