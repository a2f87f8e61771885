"""Figures of how a step scales: where attention overtakes the linear layers, and one thing changed at a time.

Of the latter also a table of the verdicts, in words.
"""

import math

from zimage.analysis import tables, units
from zimage.analysis.cost_plots import size_name
from zimage.analysis.crossover import FLOPS, OPERATIONS, RATES
from zimage.analysis.drawing import ARM_COLORS, BAND, BASELINE_COLOR, INK, finish, log_ticks, plain, whiskers
from zimage.analysis.reading import records

import pandas as pd
import plotly.graph_objects as go

PARTS = {  # colour, marker
    "linear_s": ("linear layers", ARM_COLORS[0], "circle"),
    "attention_s": ("attention", ARM_COLORS[1], "diamond-open"),
}
_FARTHEST = 10  # times beyond the measured sizes, to where a crossing is drawn
_DASHES = {OPERATIONS: "solid", RATES: "dash", FLOPS: "dot"}
_HEIGHTS = {OPERATIONS: 0.05, RATES: 0.14, FLOPS: 0.23}  # of a line's name, so that near lines' names do not meet


def crossing(frame: pd.DataFrame) -> go.Figure:
    """Time of a block's attention and of its linear layers over the tokens of an item, and where each method has them

    cross: a line with its interval as a band. `frame` is a `crossover` table.
    """
    frame = tables.complete("crossover", frame)
    rows = frame[(frame["note"] == "measured") & (frame["tokens"] > 0)].sort_values("tokens")
    rows = rows[(rows["attention_s"] > 0) & (rows["linear_s"] > 0)]
    found = records(frame[(frame["note"] != "measured") & (frame["tokens"] > 0) & frame["method"].isin([*_DASHES])])
    if len(rows):  # what lies far beyond all that was measured would leave no room for it
        least, most = float(rows["tokens"].min()) / _FARTHEST, float(rows["tokens"].max()) * _FARTHEST
        found = [row for row in found if least <= row["tokens"] <= most]
    scale, unit = units.time_unit(float(rows["linear_s"].median()) if len(rows) else math.nan)
    figure = go.Figure()
    for column, (name, color, symbol) in PARTS.items():
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["tokens"].tolist(), y=(rows[column] / scale).tolist(), mode="lines+markers", name=name,
            line={"color": color, "width": 2}, marker={"size": 9, "color": color, "symbol": symbol},
            customdata=[[units.seconds(value)] for value in rows[column]],
            hovertemplate="<b>" + name + "</b><br>%{x:,.0f} tokens: %{customdata[0]}<extra></extra>",
        )  # fmt: skip
    for row in found:
        if not (units.missing(row["tokens_low"]) or units.missing(row["tokens_high"])):
            figure.add_vrect(x0=row["tokens_low"], x1=row["tokens_high"], fillcolor=BAND, line_width=0)
        figure.add_vline(x=row["tokens"], line={"color": INK, "width": 1.5, "dash": _DASHES[row["method"]]})
        figure.add_annotation(
            x=math.log10(row["tokens"]), y=_HEIGHTS[row["method"]], yref="paper", xanchor="right", showarrow=False,
            text=plain([f"{row['method']}: {row['tokens']:,.0f} "])[0], font={"size": 11},
        )  # fmt: skip
    finish(figure, height=400)
    ends = [*rows["tokens"], *(row["tokens"] for row in found)]
    if ends:
        figure.update_xaxes(**log_ticks(min(ends) / 1.3, max(ends) * 1.3))
    if len(rows):
        times = pd.concat([rows["attention_s"], rows["linear_s"]]) / scale
        figure.update_yaxes(**log_ticks(float(times.min()) / 1.5, float(times.max()) * 1.5), showgrid=True)
    figure.update_xaxes(title_text="tokens of an item, image and caption", zeroline=False)
    figure.update_yaxes(title_text=f"time in a main block ({unit})", title_font={"size": 12})
    return figure


def axes(frame: pd.DataFrame) -> go.Figure:
    """Time ratios of other shapes, batches and captions with intervals, and hollow what was predicted.

    `frame` is an `axes` table; other resolutions are left out, whose ratios are of another order.
    """
    frame = tables.complete("axes", frame)
    rows = frame[frame["axis"].isin(["aspect", "batch", "caption"]) & (frame["ratio"] > 0)]
    labels = plain(f"{row['axis']}: {size_name(row)}" for row in records(rows))
    figure = go.Figure()
    for name, column, color, symbol in (
        ("predicted", "predicted_ratio", BASELINE_COLOR, "circle-open"),
        ("measured", "ratio", ARM_COLORS[0], "circle"),
    ):
        if rows.empty:
            continue
        ends = (rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"])
        figure.add_scatter(
            x=rows[column].tolist(), y=labels, mode="markers", name=name,
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            error_x=whiskers(*ends, color) if column == "ratio" else None,
            customdata=[[beside_name(row)] for row in records(rows)],
            hovertemplate="<b>%{y}</b><br>" + name + " %{x:.3f} of %{customdata[0]}<extra></extra>",
        )  # fmt: skip
    finish(figure, height=92 + 26 * max(len(rows), 1))
    figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="time by that of the size beside it; of a batch, of an image", zeroline=False)
    figure.update_yaxes(categoryorder="array", categoryarray=list(dict.fromkeys(labels))[::-1], showgrid=True)
    return figure


def beside_name(row: dict[str, float]) -> str:
    """The size that a row of an `axes` table is beside, in words."""
    names = ("height", "width", "batch", "caption_tokens")
    return plain([size_name({name: row[f"beside_{name}"] for name in names})])[0]


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """What became of each pair of sizes, in words: a row for each of an `axes` table, in its order."""
    heads, shown = ("axis", "size", "beside", "ratio", "95 % interval", "verdict"), []
    for row in records(tables.complete("axes", frame)):
        low, high = row["ratio_low"], row["ratio_high"]
        unknown = units.missing(low) or units.missing(high)
        between = "none" if unknown else f"{units.ratio(low)} to {units.ratio(high)}"
        shown.append(
            (row["axis"], size_name(row), beside_name(row), units.ratio(row["ratio"]), between, row["verdict"])
        )
    return pd.DataFrame(shown, columns=heads).set_index("axis")
