"""The part of a page about small decisions in which implementations differ: what each is and does, and who makes it."""

from zimage.analysis import detail_texts
from zimage.analysis.findings import Tables
from zimage.lab.sections import Cell, Head, Section, Table, some

_TITLE = "Which details matter"
_KINDS = {"what it is": "free", "who does it": "free", "time": "verdict"}
_SHOWN = (*_KINDS, "ratio", "velocity", "end of run")  # accuracy stands with the pictures


def details(tables: Tables) -> list[Section]:
    """A table of every detail with its time and what it does to the output; nothing for tables of something else."""
    frame, quality = some(tables, "ablation"), some(tables, "quality")
    if frame is None or not detail_texts.is_of_details(frame):
        return []
    summary = detail_texts.summary(frame, quality)
    kinds = {name: _KINDS.get(name, "num") for name in _SHOWN if name in summary}
    heads = [Head("Detail"), *(Head(name.capitalize(), kind == "num") for name, kind in kinds.items())]
    cells = []
    for detail, row in summary.iterrows():
        line = [Cell(str(detail)), *(Cell(row[name], kind) for name, kind in kinds.items())]
        if reason := row.get("not measured", ""):
            line[1 + [*kinds].index("time")] = Cell(reason, "free")
        cells.append(line)
    note = (
        "Velocity and end of run are relative L2 distances from the same model without the detail, of one step and of "
        "the latents at the end of a denoising run; 0 where not a bit differs."
    )
    return [Section(_TITLE, "" if quality is None else note, table=Table(_TITLE, heads, cells))]
