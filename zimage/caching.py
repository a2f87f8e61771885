"""What one step of a denoising trajectory may take over from the step before.

Refined captions, because they would come out the same; `step_caching` takes over what would come out differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zimage.contents import Contents

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class _Entry:
    given: tuple[mx.array, ...]
    weights: Contents
    caption: mx.array


class OfOneModel:
    """What a model has kept or counted for itself; a copy of the model has `fresh()` in its place."""

    def fresh(self) -> Any:
        """The same of a model that has not been called yet."""
        return type(self)()


@dataclass
class Report(OfOneModel):
    """What one trajectory took over from its earlier steps instead of computing it.

    steps: calls of the model so far; computed: the numbers of those that computed everything, from 0; blocks: blocks
    that they would have run, skipped_blocks: those of them that they did not; restarts: how often a call did not
    continue the one before, so that what was kept was dropped.
    """

    steps: int = 0
    computed: list[int] = field(default_factory=list)
    blocks: int = 0
    skipped_blocks: int = 0
    restarts: int = 0

    @property
    def skipped_steps(self) -> int:
        """How many steps took something over."""
        return self.steps - len(self.computed)

    def __str__(self) -> str:
        text = (
            f"{self.skipped_steps} of {self.steps} steps reused, {self.skipped_blocks} of {self.blocks} blocks skipped"
        )
        return text + (f", {self.restarts} times started anew" if self.restarts else "")


class KeptCaptions(OfOneModel):
    """The refined captions of a model's last call, for calls with the same caption arrays.

    Captions are the same where they are the same array objects: what an assignment to a part of one changes is not
    seen. They are refined anew after a weight of the caption branch was replaced. `hits` counts the calls that were
    spared the branch.
    """

    PARTS = ("cap_embedder", "cap_pad_token", "context_refiner")

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self.hits = 0

    def get(self, features: mx.array | Sequence[mx.array]) -> mx.array | None:
        """The refined captions [B, L, D] of these features, or None."""
        entry, given = self._entry, as_tuple(features)
        if entry is None or len(given) != len(entry.given) or not entry.weights.same():
            return None
        if not all(a is b for a, b in zip(given, entry.given, strict=True)):
            return None
        self.hits += 1
        return entry.caption

    def keep(self, features: mx.array | Sequence[mx.array], model: nn.Module, caption: mx.array) -> None:
        """Keep the refined captions of these features in the place of others."""
        self._entry = _Entry(as_tuple(features), Contents(model, self.PARTS), caption)


def as_tuple(features: mx.array | Sequence[mx.array]) -> tuple[mx.array, ...]:
    """The arrays that a call was given as captions."""
    return (features,) if isinstance(features, mx.array) else tuple(features)
