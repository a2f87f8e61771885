"""The parts of a page about scopes that hold one another: the step first, and what was saved on the way to it."""

from collections.abc import Sequence
from dataclasses import replace

from zimage.analysis import gain_plots, gains, reading, units
from zimage.analysis.findings import Tables, verdict_of
from zimage.lab.sections import DELTA, Cell, Head, Section, Table, chart, some, verdicts

import pandas as pd


def narrowed(tables: Tables, ablation: pd.DataFrame) -> pd.DataFrame:
    """What a forest plot of one run shows: of a run with rungs those of the step, else all of it."""
    return gains.the_step(ablation) if gains.has_ladder(some(tables, "gains")) else ablation


def sections(tables: Tables, id: str) -> list[Section]:
    """What each arm of a run with rungs saves, scope by scope."""
    frame = some(tables, "gains")
    if frame is None or not gains.has_ladder(frame):
        return []
    title = "Where the gain goes"
    heads = [Head("Arm"), Head("Scope"), Head("Against"), Head("Its time", True), Head("Saved", True)]
    heads += [Head("Interval", True), Head("Noise floor", True), Head("Known")]
    rows = reading.records(frame)
    cells = [
        [
            Cell(str(row["arm"])),
            Cell(gains.NAMES.get(row["scope"], row["scope"])),
            Cell(str(row["baseline"])),
            Cell(units.seconds(row["time_s"]), "num"),
            Cell(units.seconds(row["saved_s"]), "num"),
            Cell(_interval(row["saved_low_s"], row["saved_high_s"]), "num"),
            Cell(units.seconds(row["floor_s"]), "num"),
            Cell("yes" if gains.is_known(row) else "no"),
        ]
        for row in rows
    ]
    said = {str(arm): gains.clause(frame, str(arm)) for arm in dict.fromkeys(frame["arm"].dropna())}
    alt = "Time saved a block, from the product to the step: "
    alt += "; ".join(f"{arm}, {text}" for arm, text in said.items() if text)
    note = (
        "What each arm saves, from the product on top to the step: every scope holds the one above, so that what is "
        "missing from one to the next is lost there. A step's is shared out among its blocks. Grey bars are noise "
        "floors; a hollow point is not known to differ from nothing."
    )
    return [
        Section(
            title, note, [chart(gain_plots.ladder(frame), f"{id}-ladder", alt)], Table(title, heads, cells), folded=True
        )
    ]


def folds(tables: Tables, id: str, compared: bool = True) -> list[Section]:
    """All comparisons of a run where the page shows those of the step: of one with rungs, or in an overview of several.

    `compared` as in `cases.case`, which is False there.
    """
    ablation, frame = some(tables, "ablation"), some(tables, "gains")
    if ablation is None or not (gains.nested(frame) and (gains.has_ladder(frame) or not compared)):
        return []
    return [replace(verdicts(ablation, f"{id}-every"), title="Every comparison")]


def overview(several: Sequence[Tables], compared: pd.DataFrame, id: str) -> Section:
    """The verdicts of several runs beside each other; `compared` is their ablations, a column `case` tells them apart.

    Of scopes that hold one another it is the step's, arm by arm, and the table has a row a case.
    """
    if not all(gains.nested(some(tables, "gains")) for tables in several if some(tables, "ablation") is not None):
        return verdicts(compared, id)
    step = gains.the_step(compared)
    burst = step[step["regime"].fillna("burst") == "burst"]
    title = "The step, over all runs"
    note = (
        "Time of a step of each arm divided by that of its baseline, run by run. The band is the margin of "
        f"{units.percent(DELTA, 0)} within which two count as equivalent; a hollow point is inconclusive."
    )
    alt = "Time ratio of the step: " + "; ".join(
        f"{row['arm']}, {row['case']}: {units.ratio(row['ratio'])}, {verdict_of(row)}" for row in reading.records(burst)
    )
    return Section(title, note, [chart(gain_plots.cases(burst, DELTA), f"{id}-cases", alt)], by_case(burst, title))


def by_case(burst: pd.DataFrame, label: str) -> Table:
    """A row a case, a column an arm: the step's verdict, its ratio and the interval."""
    arms = list(dict.fromkeys(burst["arm"]))
    found = {(row["case"], row["arm"]): row for row in reading.records(burst)}
    heads = [Head("Run"), *(Head(str(arm)) for arm in arms)]
    rows = []
    for case in dict.fromkeys(burst["case"]):
        cells = [Cell(str(case))]
        for arm in arms:
            row = found.get((case, arm))
            text = units.MISSING
            if row is not None:
                text = f"{verdict_of(row)}, {units.ratio(row['ratio'])}"
                if not (units.missing(row["ratio_low"]) or units.missing(row["ratio_high"])):
                    text += f" ({units.ratio(row['ratio_low'])} to {units.ratio(row['ratio_high'])})"
            cells.append(Cell(text, "free"))
        rows.append(cells)
    return Table(label, heads, rows)


def _interval(low: float, high: float) -> str:
    if units.missing(low) or units.missing(high):
        return units.MISSING
    return f"{units.seconds(low)} to {units.seconds(high)}"
