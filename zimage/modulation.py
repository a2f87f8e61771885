"""The AdaLN modulation of all blocks from one product, in the place of one for each block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zimage.layers import split_rows, stack_rows

import mlx.core as mx
import mlx.nn as nn

Modulation = tuple[mx.array, mx.array, mx.array, mx.array]  # scale and gate of attention and of feed-forward


@dataclass(frozen=True, eq=False)
class Stacked:
    """One linear layer whose output is that of every modulated block's, and the rows of it that are each block's.

    parts: the blocks' own layers in order. They share the stacked layer's arrays, so that nothing is stored twice.
    """

    layer: nn.Module
    parts: Sequence[nn.Module]

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "Stacked":
        """Of blocks' modulating layers. Raises InputError where they are stored in different ways."""
        joint = stack_rows(list(layers))
        parts = split_rows(joint, [_rows(layer) for layer in layers])
        mx.eval(joint.parameters(), [part.parameters() for part in parts])
        return cls(joint, parts)

    def at(self, temb: mx.array) -> "Modulations":
        """All modulations for temb [B, temb_dim]."""
        product: Any = self.layer(temb)
        pieces: Any = mx.split(product[:, None, :], len(self.parts), axis=-1)
        return Modulations(self, pieces)

    def holds(self, place: int, layer: nn.Module) -> bool:
        """Whether `layer` is still the one that was stacked at this place: of its kind, with the same arrays."""
        part = self.parts[place]
        return type(layer) is type(part) and layer.keys() == part.keys() and all(layer[k] is part[k] for k in part)


@dataclass(frozen=True)
class Modulations:
    """Those of one step: for each place of `stacked` scale, gate, scale and gate side by side, [B, 1, 4 D]."""

    stacked: Stacked
    pieces: Sequence[mx.array]

    def of(self, place: int, layer: nn.Module) -> Modulation | None:
        """That of the block at this place with this layer; None where its arrays were replaced since."""
        if not self.stacked.holds(place, layer):
            return None
        scale_msa, gate_msa, scale_mlp, gate_mlp = mx.split(self.pieces[place], 4, axis=-1)
        return scale_msa, gate_msa, scale_mlp, gate_mlp


def _rows(layer: Any) -> int:
    return int(getattr(layer, "scales", layer.weight).shape[0])
