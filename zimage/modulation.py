"""The AdaLN modulation of all blocks from one product, in the place of one for each block."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zimage.layers import split_rows, stack_rows

import mlx.core as mx
import mlx.nn as nn

Modulation = tuple[mx.array, mx.array, mx.array, mx.array]  # scale and gate of attention and of feed-forward


@dataclass(frozen=True, eq=False)
class Stacked:
    """One linear layer whose output is that of every modulated block's, and which rows of it are whose.

    parts: the blocks' own layers by path, in order. They share the stacked layer's arrays, so that nothing is stored
    twice.
    """

    layer: nn.Module
    parts: Mapping[str, nn.Module]

    @classmethod
    def of(cls, layers: Mapping[str, Any]) -> "Stacked":
        """Of blocks' modulating layers by path. Raises InputError where they are stored in different ways."""
        joint = stack_rows(list(layers.values()))
        rows = [_rows(layer) for layer in layers.values()]
        parts = dict(zip(layers, split_rows(joint, rows), strict=True))
        mx.eval(joint.parameters(), [part.parameters() for part in parts.values()])
        return cls(joint, parts)

    def of_blocks(self, blocks: Iterable[tuple[str, Any]], temb: mx.array) -> dict[int, Modulation]:
        """The modulation of `blocks`, pairs of path and block, by the blocks' ids; of temb [B, temb_dim].

        A block is left out where it has none, and where its layer's arrays were replaced since.
        """
        places = {path: 4 * place for place, path in enumerate(self.parts)}
        wanted = {id(block): places[path] for path, block in blocks if path in places and self.holds(path, block)}
        if not wanted:
            return {}
        product: Any = self.layer(temb)[:, None, :]
        pieces = mx.split(product, 4 * len(places), axis=-1)
        return {block: (pieces[at], pieces[at + 1], pieces[at + 2], pieces[at + 3]) for block, at in wanted.items()}

    def holds(self, path: str, block: Any) -> bool:
        """Whether the block called `path` still modulates by the arrays that were stacked."""
        own = block.adaLN_modulation[0]
        part = self.parts[path]
        return type(own) is type(part) and own.keys() == part.keys() and all(own[k] is part[k] for k in part)


def _rows(layer: Any) -> int:
    return int(getattr(layer, "scales", layer.weight).shape[0])
