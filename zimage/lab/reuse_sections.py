"""The part of a page about reusing earlier steps: each way beside a plain run of no more blocks."""

from zimage.analysis import reuse_plots, units
from zimage.analysis.answers import beside_fewer_steps
from zimage.analysis.findings import Tables
from zimage.lab.sections import Cell, Head, Section, Table, chart, some

_WORDS = {"less": "errs less", "more": "errs more", "undecided": "undecided"}


def sections(tables: Tables, id: str) -> list[Section]:
    """What the tables of step_caching say as a whole; nothing for other experiments."""
    quality, ablation = some(tables, "quality"), some(tables, "ablation")
    judged = {} if quality is None else beside_fewer_steps(quality)
    if quality is None or not judged:
        return []
    title = "What the time saved costs"
    heads = [
        Head("Way to reuse steps"),
        Head("Error at the end", True),
        Head("Plain run", True),
        Head("Its error", True),
    ]
    heads.append(Head("Verdict"))
    cells = [
        [
            Cell(arm),
            Cell(units.percent(one.error), "num"),
            Cell(f"{one.steps} steps", "num"),
            Cell(units.percent(one.plain_error), "num"),
            Cell(_WORDS[one.word]),
        ]
        for arm, one in judged.items()
    ]
    note = (
        "Leaving out work always saves time, and so do fewer steps: each way to reuse earlier steps stands beside the "
        "plain run that computes no more blocks, rounded down to whole steps: of two steps, a way that skips 30 % "
        "beside one step, which skips 50 %. Below the line it errs less than fewer steps in the same time."
    )
    charts = []
    if ablation is not None:
        alt = "Error at the end over time: " + "; ".join(
            f"{arm} {units.percent(one.error)}" for arm, one in judged.items()
        )
        charts.append(chart(reuse_plots.time_against_error(ablation, quality), f"{id}-reuse", alt))
    return [Section(title, note, charts, Table(title, heads, cells))]
