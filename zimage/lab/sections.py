"""The parts of an experiment's page: result tables in, charts and compact tables out. Knows no store and no HTML."""

import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from zimage.analysis import plots, reading, units
from zimage.analysis.findings import Tables, baseline_arm, baselines, verdict_of

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

_GLYPHS = {
    "triangle-left": "\u25c0", "triangle-right": "\u25b6", "circle": "\u25cf", "circle-open": "\u25cb",
    "diamond-open": "\u25c7", "x-thin-open": "\u2715",
}  # fmt: skip
DELTA = 0.01  # the equivalence margin drawn as a band


@dataclass(frozen=True)
class Link:
    """A link to a file beside the page."""

    text: str
    href: str


@dataclass(frozen=True)
class Cell:
    """One cell. `kind` is "" for text, "num", "free" (wraps) or "verdict"."""

    text: str
    kind: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Head:
    """A column's head; a numeric column is set flush right."""

    text: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table and what it is called for who cannot see it."""

    label: str
    heads: list[Head]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a colour, a glyph for the marker, and what it stands for."""

    name: str
    color: str
    glyph: str


@dataclass(frozen=True)
class Chart:
    """A figure as JSON that is safe within a script element, and the words for who cannot see it."""

    id: str
    json: Markup
    alt: str
    height: int
    title: str = ""
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    name: str
    href: str
    caption: str

    @property
    def wide(self) -> bool:
        """Whether it shows all arms beside each other, and so needs the page's width."""
        return self.name.endswith("side_by_side")

    @property
    def alt(self) -> str:
        """The words for who cannot see it."""
        return self.caption or f"Picture {self.name}"


@dataclass(frozen=True)
class Section:
    """A headed part of a page: charts, a table or pictures, and a note above them."""

    title: str
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    pictures: list[Shown] = field(default_factory=list)
    folded: bool = False  # the table says what the charts say, and lies folded below them
    stacked: bool = False  # charts below each other at full width, not beside each other
    weights: str | None = None  # the kind that it is of, "" for none; None until `of_weights` has said it


def of_weights(sections: Iterable[Section], kind: str) -> list[Section]:
    """The sections, each with the kind of weights that its numbers are of: "trained", "synthetic", both, or "".

    A section that says itself what it is of, as a prediction that is of no weights at all, is left as it is.
    """
    return [one if one.weights is not None else replace(one, weights=kind) for one in sections]


def script_json(text: str) -> Markup:
    """JSON text that cannot end or open a script element, whatever the data holds; not to be escaped again."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def chart(figure: go.Figure, id: str, alt: str) -> Chart:
    """A plotly figure made ready for a page. NaN becomes null, so that the JSON is strict.

    Title and legend leave the figure and become text of the page, which wraps on a narrow screen as plotly's does not.
    """
    content: dict[str, Any] = json.loads(figure.to_json())
    layout = content["layout"]
    layout.pop("template", None)
    title = html.unescape(re.sub(r"</?b>", "", layout.pop("title", {}).get("text", "")))
    legend: tuple[Key, ...] = ()
    if layout.get("showlegend"):
        named = [t for t in content["data"] if t.get("name") and t.get("showlegend", True)]
        legend = tuple(
            Key(html.unescape(t["name"]), t["marker"]["color"], _GLYPHS.get(t["marker"].get("symbol", ""), "\u25a0"))
            for t in named
        )
    layout["showlegend"] = False
    if title or legend:
        layout["height"] -= layout["margin"]["t"] - 8
        layout["margin"]["t"] = 8
    return Chart(id, script_json(json.dumps(content, allow_nan=False)), alt, int(layout["height"]), title, legend)


def verdicts(frame: pd.DataFrame, id: str) -> Section:
    """Forest plot and verdict table of an `ablation` table; a column `case` tells several parameter sets apart."""
    title = "What the arms cost in time"
    labels = reading.ablation_labels(frame)
    rows = reading.records(frame)
    spread = [_spread(row) for row in rows]
    alt = "Time ratio to the baseline: " + "; ".join(
        f"{label} {units.ratio(row['ratio'])}, {verdict_of(row)}" for label, row in zip(labels, rows, strict=True)
    )
    heads = [Head("Arm"), Head("Against"), Head("Verdict"), Head("Ratio", True), Head("Interval", True)]
    cells = [
        [
            Cell(label),
            Cell(_text(row["baseline"])),
            Cell(verdict_of(row), "verdict"),
            Cell(units.ratio(row["ratio"]), "num"),
            Cell(interval, "num"),
        ]
        for label, row, interval in zip(labels, rows, spread, strict=True)
    ]
    optional: list[tuple[str, str, Callable[[Any], Cell]]] = [
        ("noise_floor", "Noise floor", lambda v: Cell(units.percent(v), "num")),
        ("quads", "Quads", lambda v: Cell(units.MISSING if units.missing(v) else f"{int(v)}", "num")),
        ("dropped_quads", "Dropped", lambda v: Cell(units.MISSING if units.missing(v) else f"{int(v)}", "num")),
        ("reason", "Reason", lambda v: Cell(_text(v), "free")),
    ]
    for column, head, cell in optional:
        if frame[column].notna().any() and (frame[column] != "").any():
            heads.append(Head(head, column != "reason"))
            for line, row in zip(cells, rows, strict=True):
                line.append(cell(row[column]))
    note = (
        "Time of an arm divided by the time of its baseline: left of 1 is less time. "
        f"The band is the margin of {units.percent(DELTA, 0)} within which two arms count as equivalent."
    )
    figure = plots.ablation(frame, DELTA)
    charts = [chart(figure, f"{id}-forest", alt)] if frame["ratio"].notna().any() else []
    return Section(title, note, charts, Table(title, heads, cells))


def by_arm(tables: Tables, id: str) -> Section | None:
    """Time, size and quality of every arm side by side; None where no memory or quality was recorded.

    Ratios to different baselines are not put beside each other, and no baseline is grey among several.
    """
    memory, quality, ablation = (some(tables, name) for name in ("memory", "quality", "ablation"))
    if memory is None and quality is None:
        return None
    baseline = baseline_arm(tables)
    if len(baselines(tables)) > 1:
        baseline = ablation = None
    charts: list[Chart] = []
    columns: list[tuple[str, dict[str, str]]] = []
    several_arms = len({*reading.arms(memory), *reading.arms(quality)}) > 1
    beside = ablation if several_arms else None

    def panel(name: str, values: dict[str, str], draw: Callable[[], go.Figure]) -> None:
        columns.append((name, values))
        if len(values) > 1:
            alt = f"{name}: " + "; ".join(f"{arm} {value}" for arm, value in values.items())
            charts.append(chart(draw(), f"{id}-panel-{len(columns)}", alt))

    if beside is not None:
        scope = reading.best_scope(beside)
        timed = beside[(beside["scope"] == scope) & beside["ratio"].notna()].drop_duplicates("arm")
        values = {baseline or "baseline": units.ratio(1.0)}
        values |= {str(row["arm"]): units.ratio(row["ratio"]) for row in reading.records(timed)}
        panel(f"time ratio, {scope}", values, lambda: plots.ratios(beside))
    if memory is not None:
        key = "arm" if several_arms or memory["stage"].nunique() <= 1 else "stage"
        for name, group in reading.memory_groups(memory):
            values = {str(row[key]): units.size(row["bytes"]) for row in reading.records(group)}
            panel(name, values, lambda group=group: plots.memory(group, baseline))  # type: ignore[misc]
    if quality is not None:
        last = reading.headline(quality)
        for metric, group in last.groupby("metric", sort=False):
            values = {str(row["arm"]): reading.metric_text(row) for row in reading.records(group)}
            draw = lambda group=group: plots.quality(group, baseline)  # noqa: E731
            panel(reading.metric_name(str(metric)), values, draw)
    names = list(dict.fromkeys(name for _, values in columns for name in values))
    heads = [Head("Arm" if several_arms else ""), *(Head(name, True) for name, _ in columns)]
    cells = [[Cell(n), *(Cell(values.get(n, units.MISSING), "num") for _, values in columns)] for n in names]
    kinds = [text for text, frame in (("size", memory), ("quality", quality)) if frame is not None]
    if beside is not None:
        kinds.insert(0, "time")
    title = f"{' and '.join(kinds) if len(kinds) < 3 else 'time, size and quality'}".capitalize()
    return Section(
        title,
        "The baseline is grey." if charts and baseline and several_arms else "",
        charts,
        Table(title, heads, cells),
    )


def stages(frame: pd.DataFrame, id: str) -> Section:
    """Where the time of a step goes, stage by stage."""
    rows, whole = reading.profile(frame)
    lines = reading.records(rows)
    largest = max(lines, key=lambda r: -1.0 if units.missing(r["time_s"]) else float(r["time_s"]), default=None)
    alt = "Time per stage in forward order"
    if largest is not None:
        alt += f"; the largest is {largest['stage']} with {units.seconds(largest['time_s'])}"
    several = rows["arm"].nunique() > 1
    heads = [Head("Stage"), *([Head("Arm")] if several else []), Head("Time", True), Head("Interval", True)]
    heads += [Head("Share", True), Head("Parameters", True), Head("Bytes", True)]
    cells = [
        [
            Cell(str(row["stage"])),
            *([Cell(_text(row["arm"]))] if several else []),
            Cell(units.seconds(row["time_s"]), "num"),
            Cell(times(row), "num"),
            Cell(units.percent(row["time_s"] / whole) if whole else units.MISSING, "num"),
            Cell(units.count(row["parameters"]), "num"),
            Cell(units.size(row["bytes"]), "num"),
        ]
        for row in lines
    ]
    view = next(iter(rows["view"].dropna()), "")
    note = {
        "prefix": "A stage costs what evaluating it adds to the stages before it, so a small stage may come out "
        "slightly negative. Whiskers are intervals, percentages are shares of the whole step.",
        "depth": "From the time regressed on the number of repeated blocks.",
    }.get(view, "")
    title = "Where the time of a step goes"
    charts = [chart(plots.stages(frame), f"{id}-stages", alt)] if lines else []
    return Section(title, note, charts, Table(title, heads, cells), folded=bool(charts))


def loading(frame: pd.DataFrame, id: str) -> Section:
    """What every loader took in time and memory."""
    rows = reading.records(reading.loads(frame))
    title = "What loading costs"
    heads = [Head("Loader"), *(Head(name, True) for name in ("Time", "Fastest to slowest", "Peak memory", "Result"))]
    cells = [
        [
            Cell(str(row["arm"])),
            Cell(units.seconds(row["time_s"]), "num"),
            Cell(times(row), "num"),
            Cell(units.size(row["peak_bytes"]), "num"),
            Cell(units.size(row["result_bytes"]), "num"),
        ]
        for row in rows
    ]
    alt = "Time and peak memory: " + "; ".join(
        f"{row['arm']} {units.seconds(row['time_s'])}, {units.size(row['peak_bytes'])}" for row in rows
    )
    note = "Medians over the rounds, each load in a process of its own; whiskers reach to the fastest and the slowest."
    charts = [chart(plots.loading(frame), f"{id}-loading", alt)] if rows else []
    return Section(title, note, charts, Table(title, heads, cells), folded=bool(charts))


def samples(frame: pd.DataFrame, id: str) -> Section | None:
    """The raw timed values, for who wants to see the spread."""
    kept = frame[(frame["kind"] == "sample") & frame["time_s"].notna() & ~frame["dropped"].fillna(False).astype(bool)]
    if kept.empty:
        return None
    counts = "; ".join(f"{arm} {number}" for arm, number in kept["arm"].fillna("").value_counts(sort=False).items())
    note = f"Every timed sample with its quartiles, warm-ups left out. Samples: {counts}."
    series = len(kept.fillna({"arm": "", "scope": "", "regime": ""}).groupby(["arm", "scope", "regime"]))
    if series > plots.MAX_SERIES:
        note += f" The first {plots.MAX_SERIES} of {series} series are drawn; all are in the run's tables."
    return Section("Samples", note, [chart(plots.samples(frame), f"{id}-samples", f"Spread of samples: {counts}")])


def some(tables: Tables, name: str) -> pd.DataFrame | None:
    """A table that is there and has rows."""
    frame = tables.get(name)
    return None if frame is None or frame.empty else frame


def _spread(row: dict[str, Any]) -> str:
    if units.missing(row["ratio_low"]) or units.missing(row["ratio_high"]):
        return units.MISSING
    return f"{units.ratio(row['ratio_low'])} to {units.ratio(row['ratio_high'])}"


def times(row: dict[str, Any]) -> str:
    """The interval of a row's time in words."""
    if units.missing(row["time_low_s"]) or units.missing(row["time_high_s"]):
        return units.MISSING
    return f"{units.seconds(row['time_low_s'])} to {units.seconds(row['time_high_s'])}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
