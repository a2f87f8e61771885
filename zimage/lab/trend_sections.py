"""The part of a page about one experiment across versions of MLX and zimage."""

from urllib.parse import quote

from zimage.analysis import trend_plots, trends, units
from zimage.analysis.trends import Trend
from zimage.lab.sections import DELTA, Cell, Head, Link, Section, Table, chart


def across_versions(found: Trend, id: str) -> Section:
    """Time ratios by version with the changes between them, and a step's time as context."""
    charts = []
    drawn = trend_plots.drawn(found)
    if drawn:
        alt = f"Time ratios from {found.span}: " + "; ".join(
            f"{trends.name(about)} {', '.join(units.ratio(p.ratio.value) for p in found.points if p.about == about)}"
            for about in drawn
        )
        charts.append(chart(trend_plots.ratios(found, DELTA), f"{id}-trend", alt))
    if any(found.steps_s):
        alt = f"Time of a step from {found.span}: " + "; ".join(
            f"{version} {', '.join(f'{arm} {units.seconds(time_s)}' for arm, time_s in steps.items())}"
            for version, steps in zip(found.versions, found.steps_s, strict=True)
        )
        charts.append(chart(trend_plots.steps(found), f"{id}-trend-steps", alt))
    left = len(trends.best(found)) - len(drawn)
    note = (
        "The newest run of each version on this device, superseded ones too. Ratios are to each run's own baseline, so "
        "that one also rises where only the baseline got faster; a change is judged from the version before, intervals "
        "combined as independent. The time of a step is context: no clock links two runs."
    )
    note += f" The {len(drawn)} ratios that changed most are drawn; {left} more are in the table." if left else ""
    note += f" {found.earlier} earlier versions are left out here; `zimage trend` has them." if found.earlier else ""
    return Section("Across versions", note, charts, _table(found), folded=bool(charts), stacked=True)


def _table(found: Trend) -> Table:
    heads = [Head("Ratio"), Head("Version"), Head("Measured"), Head("Value", True), Head("Interval", True)]
    heads += [Head("Since the version before"), Head("By", True), Head("Run")]
    rows = [
        [
            Cell(trends.name(about)),
            Cell(point.version),
            Cell(units.date(point.started)),
            Cell(units.ratio(point.ratio.value), "num"),
            Cell(f"{units.ratio(point.ratio.low)} to {units.ratio(point.ratio.high)}", "num"),
            Cell("" if point.change is None else point.change.verdict, "" if point.change is None else "verdict"),
            Cell(units.MISSING if point.change is None else units.ratio(point.change.interval.value), "num"),
            _run(point.run),
        ]
        for about in found.about()
        for point in found.points
        if point.about == about
    ]
    for version, run, steps in zip(found.versions, found.runs, found.steps_s, strict=True):
        for arm, time_s in steps.items():
            cells = [f"a step of {arm}", version, units.date(run.started), units.seconds(time_s), "", "", ""]
            kinds = ["", "", "", "num", "num", "", "num"]
            named = [Cell(text, kind) for text, kind in zip(cells, kinds, strict=True)]
            rows.append([*named, _run(run.name)])
    return Table("Across versions", heads, rows)


def _run(name: str) -> Cell:
    """A run's key, which leads to what it recorded."""
    key = name.partition("/")[2]
    return Cell("", links=(Link(key[:12], f"{quote(key)}/run.json"),))
