"""What one step of a denoising trajectory may take over from the step before, because it would come out the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from zimage.contents import Contents

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class _Entry:
    given: tuple[mx.array, ...]
    weights: Contents
    caption: mx.array


class KeptCaptions:
    """The refined captions of a model's last call, for calls with the same caption arrays.

    Captions are the same where they are the same array objects: what an assignment to a part of one changes is not
    seen. They are refined anew after a weight of the caption branch was replaced.
    """

    PARTS = ("cap_embedder", "cap_pad_token", "context_refiner")

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, features: mx.array | Sequence[mx.array]) -> mx.array | None:
        """The refined captions [B, L, D] of these features, or None."""
        entry, given = self._entry, _as_tuple(features)
        if entry is None or len(given) != len(entry.given) or not entry.weights.same():
            return None
        return entry.caption if all(a is b for a, b in zip(given, entry.given, strict=True)) else None

    def keep(self, features: mx.array | Sequence[mx.array], model: nn.Module, caption: mx.array) -> None:
        """Keep the refined captions of these features in the place of others."""
        self._entry = _Entry(_as_tuple(features), Contents(model, self.PARTS), caption)


def _as_tuple(features: mx.array | Sequence[mx.array]) -> tuple[mx.array, ...]:
    return (features,) if isinstance(features, mx.array) else tuple(features)
