"""The module tree of a step: what every module holds and computes, and what it was measured to take."""

from collections.abc import Mapping, Sequence
from typing import Any

from zimage.analysis import cost
from zimage.analysis.cost import Operation
from zimage.analysis.roofline import Interval


def rows(
    operations: Sequence[Operation],
    stages: Mapping[str, Interval],
    times: Mapping[tuple[str, str], Interval],
    whole_s: float | None = None,
) -> list[dict[str, Any]]:
    """Rows of the `modules` table, each module before what is in it; the whole step's path is ''.

    stages: a stage's name -> seconds and their interval. times: (stage, operation) -> the same. A stage's module has
    the stage's time, a module above it the sum of its stages, one below it the sum of its operations where all of them
    were timed; sums have no interval. share: of `whole_s`, the measured time of the step and so of ''.
    """
    found = []
    names = {o.stage for o in operations}
    for total in cost.by_module(operations):
        path = total.path
        time_s, low_s, high_s = (whole_s, None, None) if not path else _time(path, operations, names, stages, times)
        found.append(
            {
                "path": path, "parameters": total.parameters, "bytes": total.weight_bytes, "flops": float(total.flops),
                "time_s": time_s, "time_low_s": low_s, "time_high_s": high_s,
                "share": time_s / whole_s if time_s is not None and whole_s else None,
            }
        )  # fmt: skip
    return found


def _time(
    path: str,
    operations: Sequence[Operation],
    names: set[str],
    stages: Mapping[str, Interval],
    times: Mapping[tuple[str, str], Interval],
) -> tuple[float | None, float | None, float | None]:
    if path in stages:
        return stages[path]
    inside = [name for name in names if name.startswith(f"{path}.")]
    if inside:
        known = [stages[name][0] for name in inside if name in stages]
        return (sum(known), None, None) if len(known) == len(inside) else (None, None, None)
    own = [o for o in operations if (o.module == path or o.module.startswith(f"{path}.")) and o.bytes]
    timed = [times.get((o.stage, o.operation)) for o in own]
    if not timed or None in timed:
        return None, None, None
    if len(timed) == 1 and timed[0] is not None:
        return timed[0]
    return sum(t[0] for t in timed if t is not None), None, None
