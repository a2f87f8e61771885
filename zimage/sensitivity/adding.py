"""How well the squared errors of single changes add up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from zimage.errors import MeasurementError
from zimage.mixing import Choice, Choices, Mix
from zimage.sensitivity.reference import Damage, Reference, block_of, linears, packed
from zimage.sensitivity.singles import Advance, Single

import numpy as np

RANDOM, WITHIN, TOGETHER, OVER_STEPS = "random mixes", "layers of a block", "blocks of the model", "steps of a block"


@dataclass(frozen=True)
class Sum:
    """How well single changes add up: the error that their squared errors sum to, and that of all of them at once."""

    what: str
    of: str  # "velocity" or "end"
    changes: int
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Squared error of all at once / the sum of the single ones: 1 where they add up."""
        return (self.measured / self.predicted) ** 2 if self.predicted else math.nan

    def row(self, arm: str, weights_kind: str) -> dict[str, Any]:
        """The row of an `additivity` table; weights_kind: "trained" or "synthetic"."""
        return {
            "arm": arm, "what": self.what, "metric": self.of, "changes": self.changes, "predicted": self.predicted,
            "measured": self.measured, "ratio": self.ratio, "weights_kind": weights_kind,
        }  # fmt: skip


def choices(reference: Reference, singles: Sequence[Single], unpacked: bool = True) -> Choices:
    """What each layer may be stored as: in every way it was measured in and, with `unpacked`, as it is."""
    found: dict[str, list[Choice]] = {
        path: [reference.choice(path, None, 0.0)] if unpacked else [] for path in linears(reference.model)
    }
    for single in singles:
        if single.kind == "layer" and single.step is None:
            found[single.unit].append(reference.choice(single.unit, single.quantization, single.velocity.squared_error))
    return found


def sums(singles: Sequence[Single], whole: Damage | None = None, end: Damage | None = None) -> list[Sum]:
    """How the single changes of one packing add up: a block's layers and steps to the block, the blocks to the model.

    whole, end: the velocity's and the end's damage where all blocks are packed. What was not measured has no row.
    """
    found: list[Sum] = []
    single_blocks = [single for single in singles if single.kind == "block" and single.step is None]
    for block in single_blocks:
        inside = [
            s for s in singles if s.kind == "layer" and block_of(s.unit) == block.unit
            and s.quantization == block.quantization
        ]  # fmt: skip
        steps = [s for s in singles if s.kind == "block" and s.unit == block.unit and s.step is not None]
        found += _sums(WITHIN, inside, block.velocity, block.end)
        found += _sums(OVER_STEPS, steps, None, block.end)  # of the velocity they add up by definition
    found += _sums(TOGETHER, single_blocks, whole, end)
    return sorted(found, key=lambda row: (WITHIN, TOGETHER, OVER_STEPS).index(row.what))


def _sums(what: str, parts: Sequence[Single], velocity: Damage | None, end: Damage | None) -> list[Sum]:
    found = []
    if parts and velocity is not None:
        squared = sum(part.velocity.squared_error for part in parts)
        found.append(Sum(what, "velocity", len(parts), math.sqrt(squared), velocity.error))
    ends = [part.end for part in parts if part.end is not None]
    if parts and len(ends) == len(parts) and end is not None:
        found.append(Sum(what, "end", len(parts), math.sqrt(sum(one.squared_error for one in ends)), end.error))
    return found


def random_mixes(
    reference: Reference, available: Choices, count: int, seed: int = 0, advance: Advance = lambda: None
) -> list[Sum]:
    """`count` recipes that draw one of the choices for every layer: what is predicted for them, and what they do."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        mix = Mix({path: some[int(random.integers(len(some)))] for path, some in available.items()})
        changes = sum(quantization is not None for quantization in mix.packing.values())
        measured = reference.velocity(packed(reference.model, mix.recipe)).error
        found.append(Sum(RANDOM, "velocity", changes, mix.error, measured))
        advance()
    return found


def factor(found: Sequence[Sum]) -> float:
    """What the sum of squared errors is to be multiplied with: the median over the random mixes.

    Raises MeasurementError where there are none whose ratio is known.
    """
    ratios = [row.ratio for row in found if row.what == RANDOM and math.isfinite(row.ratio) and row.ratio > 0]
    if not ratios:
        raise MeasurementError("additivity was measured on no random mix that made an error; ask for at least one")
    return median(ratios)
