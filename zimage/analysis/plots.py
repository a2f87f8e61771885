"""Figures: a result table in, a plotly figure out. Used by notebooks and by the dashboard alike."""

from zimage.analysis import tables, units
from zimage.analysis.drawing import (
    ARM_COLORS,
    BAND,
    INK,
    PART_COLORS,
    VERDICTS,
    Panel,
    finish,
    log_ticks,
    plain,
    side_by_side,
    whiskers,
    wrapped,
)
from zimage.analysis.reading import (
    DRIFT,
    ablation_labels,
    best_scope,
    headline,
    is_fraction,
    loads,
    memory_groups,
    metric_name,
    metric_value,
    part_of,
    profile,
    records,
)
from zimage.measure.loading import PLAIN_READ

import pandas as pd
import plotly.graph_objects as go

MAX_POINTS = 400  # points drawn of one arm's samples
LINE_SYMBOLS = ("circle", "square", "diamond", "cross", "x")  # of lines that share a colour
MAX_SERIES = 48  # arms and scopes whose samples are drawn


def stages(frame: pd.DataFrame) -> go.Figure:
    """Time of every stage in forward order, with its interval and its share of the whole step.

    `frame` is a `stages` table of one run. Negative times, which differences of prefixes can give, are shown as they
    are. Several arms stand beside each other in colours of their own; one arm is coloured by part of the model.
    """
    frame = tables.complete("stages", frame)
    rows, whole = profile(frame)
    arms = list(dict.fromkeys(rows["arm"].fillna("")))
    scale, unit = units.time_unit(rows["time_s"].abs().max() if len(rows) else float("nan"))
    names = list(dict.fromkeys(rows["stage"]))
    rows = rows.assign(
        part=rows["stage"].map(part_of),
        low=((rows["time_s"] - rows["time_low_s"]).clip(lower=0) / scale),
        high=((rows["time_high_s"] - rows["time_s"]).clip(lower=0) / scale),
    )
    figure = go.Figure()
    several = len(arms) > 1
    groups = [(a, rows[rows["arm"].fillna("") == a]) for a in arms] if several else _by_part(rows)
    for place, (name, group) in enumerate(groups):
        color = ARM_COLORS[place % len(ARM_COLORS)] if several else PART_COLORS[name]
        figure.add_bar(
            y=plain(group["stage"]),
            x=(group["time_s"] / scale).tolist(),
            name=plain([name])[0],
            orientation="h",
            marker={"color": color, "line": {"width": 0}, "cornerradius": 2},
            error_x=whiskers(group["low"], group["high"]),
            customdata=[_stage_facts(row, whole) for row in records(group)],
            hovertemplate="<b>%{y}</b><br>%{customdata[0]}<extra></extra>",
        )
    label = f"time ({unit})" + (f", whole step {units.seconds(whole)}" if whole is not None else "")
    # About 30 px a bar; long profiles pack closer so that a whole model still fits a screen or two.
    pitch = 28 if len(names) <= 16 else 20
    finish(figure, height=92 + pitch * max(len(names), 1) * (len(arms) if several else 1))
    figure.update_layout(barmode="group" if several else "overlay", bargap=0.28, margin={"r": 64})
    figure.update_xaxes(title_text=label, zeroline=True)
    figure.update_yaxes(categoryorder="array", categoryarray=plain(names)[::-1], showgrid=False)
    if whole and not several:
        shares = [
            {"y": plain([row["stage"]])[0], "text": units.percent(row["time_s"] / whole), "font": {"size": 12},
             "x": 1, "xref": "paper", "xanchor": "left", "xshift": 10, "showarrow": False}
            for row in records(rows)
        ]  # fmt: skip
        figure.update_layout(annotations=shares)
    return figure


def ablation(frame: pd.DataFrame, delta: float = 0.01) -> go.Figure:
    """Forest plot: every arm's time ratio to its baseline, with its interval, and a band of +-delta about 1.

    `frame` is an `ablation` table; a column `case`, if there, is added to the labels. Left of 1 is less time. Arms that
    were not measured have no place in it.
    """
    frame = tables.complete("ablation", frame)
    frame = frame[frame["ratio"].notna()]
    labels = ablation_labels(frame)
    figure = go.Figure()
    verdicts = frame["verdict"].where(frame["verdict"].isin(list(VERDICTS)), "inconclusive")
    for verdict, (color, symbol) in VERDICTS.items():
        chosen = verdicts == verdict
        group = frame[chosen]
        if group.empty:
            continue
        figure.add_scatter(
            x=group["ratio"].tolist(),
            y=[plain([label])[0] for label, keep in zip(labels, chosen, strict=True) if keep],
            mode="markers",
            name=verdict,
            marker={"color": color, "symbol": symbol, "size": 12, "line": {"width": 2, "color": color}},
            error_x=whiskers(group["ratio"] - group["ratio_low"], group["ratio_high"] - group["ratio"], color),
            customdata=[[_interval(row)] for row in records(group)],
            hovertemplate="<b>%{y}</b><br>" + verdict + ", ratio %{x:.3f}%{customdata[0]}<extra></extra>",
        )
    finish(figure, height=104 + 38 * max(len(labels), 1))
    figure.add_vrect(x0=1 - delta, x1=1 + delta, fillcolor=BAND, line_width=0, layer="below")
    figure.add_vline(x=1, line={"color": INK, "width": 1.5})
    bounded = [row for row in records(frame) if _interval(row)]
    ends = [*frame["ratio"].dropna(), 1 - delta, 1 + delta]
    ends += [row[name] for name in ("ratio_low", "ratio_high") for row in bounded]
    pad = 0.08 * (max(ends) - min(ends))
    scopes = [str(scope) for scope in frame["scope"].dropna().unique()]
    title = f"{scopes[0]} time ratio" if len(scopes) == 1 else "time ratio to the baseline"  # one is at no label
    figure.update_xaxes(title_text=plain([title])[0], zeroline=False, nticks=6)
    figure.update_xaxes(range=[min(ends) - pad, max(ends) + pad])
    figure.update_yaxes(categoryorder="array", categoryarray=plain(labels)[::-1], showgrid=False)
    figure.update_yaxes(range=[-0.6, max(len(labels), 1) - 0.4])
    figure.update_yaxes(tickmode="array", tickvals=plain(labels), ticktext=[wrapped(label) for label in plain(labels)])
    return figure


def quality(frame: pd.DataFrame, baseline: str | None = None) -> go.Figure:
    """Bars per arm for every headline of a `quality` table, at its last step, with intervals where there are any."""
    frame = tables.complete("quality", frame)
    rows = headline(frame)
    panels = [
        (metric_name(str(metric)), [*group["arm"]], [*group["value"]], [*group["low"]], [*group["high"]],
         [metric_value(str(metric), v) for v in group["value"]])
        for metric, group in rows.groupby("metric", sort=False)
    ]  # fmt: skip
    figure = side_by_side(panels, baseline)
    for place, metric in enumerate(dict.fromkeys(rows["metric"]), start=1):
        if is_fraction(metric):
            figure.update_xaxes(tickformat=".0%", col=place)
    return figure


def drift(frame: pd.DataFrame) -> go.Figure:
    """Lines of how far every arm has drifted after each step of a denoising run, with intervals over the seeds.

    `frame` is a `quality` table; an arm that has not drifted at all after a step has no point there.
    """
    frame = tables.complete("quality", frame)
    rows = frame[(frame["metric"] == DRIFT) & (frame["value"] > 0)].dropna(subset=["step"])
    figure = go.Figure()
    for place, arm in enumerate(arms := list(dict.fromkeys(rows["arm"]))):
        group = rows[rows["arm"] == arm].sort_values("step")
        color = ARM_COLORS[place % len(ARM_COLORS)]
        symbol = LINE_SYMBOLS[place // len(ARM_COLORS) % len(LINE_SYMBOLS)]
        figure.add_scatter(
            x=group["step"].tolist(),
            y=group["value"].tolist(),
            mode="lines+markers",
            name=plain([arm])[0],
            line={"color": color, "width": 1.5},
            marker={"color": color, "symbol": symbol, "size": 6},
            error_y=whiskers(group["value"] - group["low"], group["high"] - group["value"], color),
            hovertemplate="<b>%{fullData.name}</b>, after step %{x}: %{y:.3g}<extra></extra>",
        )
    finish(figure, height=420)
    figure.update_layout(showlegend=len(arms) > 0)
    figure.update_xaxes(title_text="steps taken", zeroline=False)
    ends = pd.concat([rows["value"], rows["low"], rows["high"]])
    ends = ends[ends > 0]
    low, high = (float(ends.min()) / 1.2, float(ends.max()) * 1.2) if len(ends) else (0.0, 0.0)
    figure.update_yaxes(
        title_text="relative L2 error of the latents", title_font={"size": 12}, showgrid=True, **log_ticks(low, high)
    )
    return figure


def memory(frame: pd.DataFrame, baseline: str | None = None) -> go.Figure:
    """Bars of bytes for every metric of a `memory` table: per arm, or per stage where there is one arm only."""
    frame = tables.complete("memory", frame)
    panels: list[Panel] = []
    kept = frame.dropna(subset=["bytes"])
    for name, group in memory_groups(kept):
        labels = group["stage"] if kept["arm"].nunique() <= 1 and group["stage"].nunique() > 1 else group["arm"]
        scale, unit = units.size_unit(float(group["bytes"].abs().max()))
        values = [float(v) / scale for v in group["bytes"]]
        texts = [units.size(float(v)) for v in group["bytes"]]
        panels.append((f"{name} ({unit})", [*labels.fillna("")], values, [], [], texts))
    return side_by_side(panels, baseline)


def loading(frame: pd.DataFrame) -> go.Figure:
    """Bars of the median time, with its fastest and slowest round, and of the median peak memory of every loader."""
    rows = loads(tables.complete("loading", frame))
    long, time_unit = units.time_unit(rows["time_s"].max() if len(rows) else float("nan"))
    large, size_unit = units.size_unit(rows["peak_bytes"].max() if len(rows) else float("nan"))
    times = [rows[name] / long for name in ("time_s", "time_low_s", "time_high_s")]
    seconds, sizes = [units.seconds(v) for v in rows["time_s"]], [units.size(v) for v in rows["peak_bytes"]]
    panels: list[Panel] = [
        (f"time ({time_unit})", [*rows["arm"]], [*times[0]], [*times[1]], [*times[2]], seconds),
        (f"peak memory ({size_unit})", [*rows["arm"]], [*(rows["peak_bytes"] / large)], [], [], sizes),
    ]
    return side_by_side(panels, PLAIN_READ)


def ratios(frame: pd.DataFrame) -> go.Figure:
    """Bars of the time ratio per arm for one scope of an `ablation` table, its baseline first at 1."""
    scope = best_scope(frame)
    rows = frame[frame["scope"] == scope].dropna(subset=["ratio"]).drop_duplicates("arm")
    baseline = next(iter(rows["baseline"].dropna()), "baseline")
    missing = float("nan")
    return side_by_side(
        [
            (
                f"time ratio, {scope}",
                [baseline, *rows["arm"]],
                [1.0, *rows["ratio"]],
                [missing, *rows["ratio_low"]],
                [missing, *rows["ratio_high"]],
                [units.ratio(1.0), *(units.ratio(v) for v in rows["ratio"])],
            )
        ],
        baseline,
    )


def samples(frame: pd.DataFrame) -> go.Figure:
    """Every timed value of a `samples` table, one row an arm and scope: a box of quartiles and the points themselves.

    Only rows of kind `sample` that were not dropped. Long series are thinned evenly to MAX_POINTS a row, and the first
    MAX_SERIES rows are drawn.
    """
    frame = tables.complete("samples", frame)
    rows = frame[(frame["kind"] == "sample") & frame["dropped"].isin([True]).eq(False)].dropna(subset=["time_s"])
    scale, unit = units.time_unit(rows["time_s"].median() if len(rows) else float("nan"))
    figure = go.Figure()
    labels = rows["arm"].fillna("")
    for column in ("scope", "regime"):
        if rows[column].nunique() > 1:
            labels = labels + " · " + rows[column].fillna("")
    arms = list(dict.fromkeys(labels))[:MAX_SERIES]
    for place, arm in enumerate(arms):
        values = rows.loc[labels == arm, "time_s"] / scale
        thin = values.iloc[:: -(-len(values) // MAX_POINTS)]
        figure.add_box(
            x=thin.tolist(),
            y=plain([arm]) * len(thin),
            name=plain([arm])[0],
            orientation="h",
            boxpoints="all",
            jitter=0.6,
            pointpos=0,
            fillcolor="rgba(0,0,0,0)",
            line={"width": 1.5, "color": ARM_COLORS[place % len(ARM_COLORS)]},
            marker={"size": 4, "opacity": 0.45, "color": ARM_COLORS[place % len(ARM_COLORS)]},
            hovertemplate="%{y}: %{x:.4g} " + unit + "<extra></extra>",
        )
    spread = rows["time_s"].max() / rows["time_s"].min() if len(rows) and rows["time_s"].min() > 0 else 1.0
    finish(figure, height=110 + 64 * max(len(arms), 1))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(
        title_text=f"time of one sample ({unit})", zeroline=False, type="log" if spread > 20 else "linear"
    )
    figure.update_yaxes(categoryorder="array", categoryarray=plain(arms)[::-1], showgrid=False)
    return figure


def _by_part(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(part, rows[rows["part"] == part]) for part in PART_COLORS if (rows["part"] == part).any()]


def _interval(row: dict[str, float]) -> str:
    if units.missing(row["ratio_low"]) or units.missing(row["ratio_high"]):
        return ""
    return f", interval {units.ratio(row['ratio_low'])} to {units.ratio(row['ratio_high'])}"


def _stage_facts(row: dict[str, float], whole: float | None) -> list[str]:
    lines = [units.seconds(row["time_s"])]
    if not (units.missing(row["time_low_s"]) or units.missing(row["time_high_s"])):
        lines[0] += f" ({units.seconds(row['time_low_s'])} to {units.seconds(row['time_high_s'])})"
    if whole:
        lines.append(f"{units.percent(row['time_s'] / whole)} of the whole step")
    if not units.missing(row["parameters"]):
        lines.append(f"{units.count(row['parameters'])} parameters")
    if not units.missing(row["bytes"]):
        lines.append(f"{units.size(row['bytes'])} moved")
    if not units.missing(row["flops"]):
        lines.append(f"{units.count(row['flops'])}FLOP")
    return ["<br>".join(lines)]
