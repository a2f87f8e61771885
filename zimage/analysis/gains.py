"""How much time an arm saves in scopes that hold one another, and so where on the way a gain is lost.

A row of a `gains` table is an arm in one scope: the median time of its baseline there, and what the arm takes less,
from the time ratio and the ends of its interval. A step's is shared out among its `blocks`, so that it stands beside
that of one block. Negative is time lost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zimage.analysis import tables, units
from zimage.analysis.reading import records

import pandas as pd

NAMES = {  # of scopes, as what each has beside the one before it; in their order
    "qkv": "QKV products",
    "qkv_norm": "with QK norm",
    "qkv_norm_rope": "with RoPE",
    "attention": "whole attention",
    "gate_up": "gate and up products",
    "gate_up_swiglu": "with SwiGLU",
    "feed_forward": "whole feed-forward",
    "block": "whole block",
    "step": "step, a block's share",
}
LADDERS = (  # scopes that hold one another
    ("qkv", "qkv_norm", "qkv_norm_rope", "attention", "block", "step"),
    ("gate_up", "gate_up_swiglu", "feed_forward", "block", "step"),
)
_COSTS = {  # what a scope has beside the one before it
    "qkv_norm": "QK norm",
    "qkv_norm_rope": "RoPE",
    "attention": "attention with its output product",
    "gate_up_swiglu": "SwiGLU",
    "feed_forward": "the down product",
    "block": "the rest of the block",
    "step": "the rest of the step",
}
PRODUCTS = ("qkv", "gate_up")


def table(ablation: pd.DataFrame, samples: pd.DataFrame, blocks: int) -> pd.DataFrame:
    """The `gains` table of an `ablation` whose row number is the `trial` of its samples; `blocks` share a step's time.

    Burst comparisons only.
    """
    kept = samples[(samples["kind"] == "sample") & ~samples["dropped"].astype(bool)]
    rows = []
    for trial, row in enumerate(records(ablation)):
        if row["regime"] != "burst":
            continue
        own = kept[(kept["trial"] == trial) & (kept["arm"] == row["baseline"])]
        share = blocks if row["scope"] == "step" else 1
        time_s = float(own["time_s"].median()) / share
        floor = row["noise_floor"]
        rows.append(
            {
                **{name: row[name] for name in ("arm", "baseline", "scope")},
                "blocks": share,
                "time_s": time_s,
                "saved_s": time_s * (1 - row["ratio"]),
                "saved_low_s": time_s * (1 - row["ratio_high"]),
                "saved_high_s": time_s * (1 - row["ratio_low"]),
                "floor_s": math.nan if units.missing(floor) else time_s * math.expm1(float(floor)),
            }
        )
    return pd.DataFrame(rows)


def nested(frame: pd.DataFrame | None) -> bool:
    """Whether a `gains` table has narrower scopes beside the step, which holds them all and is what counts."""
    return frame is not None and {"step"} < set(frame["scope"].dropna())


def has_ladder(frame: pd.DataFrame | None) -> bool:
    """Whether a `gains` table has scopes between a product and the block, so that it can say where a gain goes."""
    return frame is not None and bool(set(frame["scope"]) & (set(_COSTS) - {"block", "step"}))


def by_ladder(frame: pd.DataFrame) -> list[tuple[tuple[str, ...], list[str]]]:
    """The LADDERS that a `gains` table has, each with its arms; those of shared scopes alone stand with the last."""
    shared = set(LADDERS[0]) & set(LADDERS[1])
    found: list[tuple[tuple[str, ...], list[str]]] = [(ladder, []) for ladder in LADDERS]
    rest: list[str] = []
    for arm in dict.fromkeys(frame["arm"].dropna()):
        places = range(len(LADDERS))
        place = next((place for place in places if _has(frame, arm, set(LADDERS[place]) - shared)), None)
        (rest if place is None else found[place][1]).append(arm)
    kept = [(ladder, arms) for ladder, arms in found if arms] or [(LADDERS[0], [])]
    kept[-1][1].extend(rest)
    return [(ladder, arms) for ladder, arms in kept if arms]


def rungs(frame: pd.DataFrame, arm: str, ladder: Sequence[str]) -> list[dict[str, Any]]:
    """An arm's rows with an estimate in the scopes of a ladder, from the narrowest on."""
    rows = [row for row in records(frame[frame["arm"] == arm]) if row["scope"] in ladder]
    return sorted(
        (row for row in rows if not units.missing(row["saved_s"])), key=lambda row: ladder.index(row["scope"])
    )


def the_step(ablation: pd.DataFrame) -> pd.DataFrame:
    """Of an `ablation` in scopes that hold one another the rows that count in the end: those of the step."""
    return ablation[ablation["scope"] == "step"]


def is_known(row: Mapping[str, Any]) -> bool:
    """Whether what a row says is saved, or lost, is known: not none by its interval, and beyond the noise floor."""
    if units.missing(row["saved_low_s"]) or units.missing(row["saved_high_s"]):
        return False
    beyond = units.missing(row["floor_s"]) or abs(row["saved_s"]) > row["floor_s"]
    return beyond and (row["saved_low_s"] > 0 or row["saved_high_s"] < 0)


@dataclass(frozen=True)
class Loss:
    """What of a saving is gone from one scope to the next that was measured: seconds, and the interval of that.

    `to` says in words what lies between the two.
    """

    to: str
    time_s: float
    low_s: float
    high_s: float

    @property
    def known(self) -> bool:
        """Whether the interval excludes none."""
        return self.low_s > 0 or self.high_s < 0


def losses(rows: Sequence[Mapping[str, Any]]) -> list[Loss]:
    """What of the first row's saving is gone at each later one that was still there at the row before.

    Intervals are combined as independent. Of a saving that had grown since the product only what goes beyond that is
    lost of the product's.
    """
    found = []
    for before, after in zip(rows, rows[1:], strict=False):
        steps = [_loss(before, after), _loss(rows[0], after)]
        found.append(replace(min(steps, key=lambda loss: loss.time_s), to=steps[0].to))
    return found


def largest_loss(frame: pd.DataFrame, arm: str) -> Loss | None:
    """The largest known loss of what an arm is known to save in its product; None where there is no such."""
    rows = _of(tables.complete("gains", frame), arm)
    if not rows or rows[0]["scope"] not in PRODUCTS or not is_known(rows[0]) or rows[0]["saved_s"] < 0:
        return None
    known = [loss for loss in losses(rows) if loss.known and loss.time_s > 0]
    return max(known, key=lambda loss: loss.time_s, default=None)


def clause(frame: pd.DataFrame | None, arm: str) -> str:
    """Where an arm's gain in its product goes, in one clause; "" for an arm without a product or a table without rungs.

    Only what is known beyond its interval is said to be lost.
    """
    rows = [] if frame is None or not has_ladder(frame) else _of(tables.complete("gains", frame), arm)
    if frame is None or len(rows) < 3 or rows[0]["scope"] not in PRODUCTS:
        return ""
    product = rows[0]
    what = "the product alone" if product["scope"] == "qkv" else "the gate and up product alone"
    if not is_known(product):
        return f"{what} is not known to save any time"
    if product["saved_s"] < 0:
        return f"{what} costs {units.seconds(-product['saved_s'])} a block"
    text = f"{what} saves {units.seconds(product['saved_s'])} a block"
    worst = largest_loss(frame, arm)
    kept = [row["scope"] for row in rows[1:] if is_known(row) and row["saved_s"] > 0]
    if worst is not None:
        lost = (
            "all of which is" if worst.time_s >= product["saved_s"] else f"of which {units.seconds(worst.time_s)} are"
        )
        rest = f"{lost} lost in {worst.to}"
    elif kept:
        rest = f"and none of that is known to be lost up to the {kept[-1].replace('_', '-')}"
    else:
        rest = "which is within the noise of all around it"
    return f"{text}, {rest}"


def _of(frame: pd.DataFrame, arm: str) -> list[dict[str, Any]]:
    """An arm's rows with an estimate on the ladder of its product, from the narrowest scope on."""
    return rungs(frame, arm, next((ladder for ladder in LADDERS if _has(frame, arm, ladder[:1])), LADDERS[0]))


def _has(frame: pd.DataFrame, arm: str, scopes: Iterable[str]) -> bool:
    return bool(frame.loc[frame["arm"] == arm, "scope"].isin(list(scopes)).any())


def _loss(before: Mapping[str, Any], after: Mapping[str, Any]) -> Loss:
    """The difference of two savings; each noise floor widens its interval where that is narrower."""
    time_s = before["saved_s"] - after["saved_s"]
    below, above = 0.0, 0.0
    for row, down, up in ((before, "saved_low_s", "saved_high_s"), (after, "saved_high_s", "saved_low_s")):
        floor = 0.0 if units.missing(row["floor_s"]) else row["floor_s"]
        below += max(abs(row["saved_s"] - row[down]), floor) ** 2
        above += max(abs(row["saved_s"] - row[up]), floor) ** 2
    return Loss(_between(before["scope"], after["scope"]), time_s, time_s - math.sqrt(below), time_s + math.sqrt(above))


def _between(before: str, after: str) -> str:
    """What a scope has beside a narrower one, in words."""
    ladder = next(ladder for ladder in LADDERS if before in ladder and after in ladder)
    return " and ".join(_COSTS[scope] for scope in ladder[ladder.index(before) + 1 : ladder.index(after) + 1])
