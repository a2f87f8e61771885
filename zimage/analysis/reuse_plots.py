"""The figure about reusing earlier steps: what the time that is saved costs in error, beside runs of fewer steps."""

from zimage.analysis import tables
from zimage.analysis.answers import PLAIN_RUN
from zimage.analysis.drawing import ARM_COLORS, BASELINE_COLOR, along, finish, plain, sides_of_names, whiskers
from zimage.analysis.reading import DRIFT, final_step

import pandas as pd
import plotly.graph_objects as go


def time_against_error(ablation: pd.DataFrame, quality: pd.DataFrame) -> go.Figure:
    """Error at the end over time: a line through plain runs, all steps first, and the ways to reuse steps beside it.

    ablation, quality: tables of step_caching. What lies below the line errs less than fewer steps in the same time.
    """
    times = tables.complete("ablation", ablation).drop_duplicates("arm").set_index("arm")
    errors = final_step(quality)
    errors = errors[errors["metric"] == DRIFT].set_index("arm")[["value", "low", "high"]].astype(float)
    joined = times[["ratio", "ratio_low", "ratio_high"]].astype(float).join(errors, how="inner")
    rows = joined.dropna(subset=["ratio", "value"]).sort_values("ratio", ascending=False)
    fewer = pd.Series([str(arm).startswith(PLAIN_RUN) for arm in rows.index], rows.index, dtype=bool)
    itself = pd.DataFrame([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], index=["all steps"], columns=rows.columns)
    figure = go.Figure()
    plain_runs, ways = pd.concat([itself, rows[fewer]]), rows[~fewer]
    places = pd.concat([ways, plain_runs])  # names of ways find theirs first
    sides = sides_of_names(places.index, along(places["ratio"]), along(places["value"]))
    for own, name, mode, color, symbol in (
        (plain_runs, "plain runs of fewer steps", "lines+markers+text", BASELINE_COLOR, "circle"),
        (ways, "reusing steps", "markers+text", ARM_COLORS[0], "diamond"),
    ):
        figure.add_scatter(
            x=own["ratio"].tolist(), y=(100 * own["value"]).tolist(), name=name, mode=mode, hovertext=plain(own.index),
            text=[plain([arm])[0] if str(arm) in sides else "" for arm in own.index],
            marker={"color": color, "symbol": symbol, "size": 11}, line={"color": color, "width": 1.5},
            textposition=[sides.get(str(arm), "top right") for arm in own.index], textfont={"size": 11},
            cliponaxis=False,
            error_x=whiskers(own["ratio"] - own["ratio_low"], own["ratio_high"] - own["ratio"], color),
            error_y=whiskers(100 * (own["value"] - own["low"]), 100 * (own["high"] - own["value"]), color),
            hovertemplate="<b>%{hovertext}</b><br>time ratio %{x:.3f}, error %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    finish(figure, height=420)
    figure.update_layout(legend={"xref": "paper"}, margin={"r": 90})  # of which the rightmost names need some
    figure.update_xaxes(title_text="time of a trajectory beside the plain run's", zeroline=False)
    highest = 100 * float(rows[["value", "high"]].max().max()) if len(rows) else 1.0
    ends = [-0.08 * highest, 1.1 * highest]  # room for the names below what changes nothing
    figure.update_yaxes(type="linear", range=ends, title_text="error at the end (%)", title_font={"size": 12})
    return figure
