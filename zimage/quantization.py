"""How a linear layer's weights are packed: by name, as a checkpoint's config says it, and as its tensors show it.

Nothing here imports MLX.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zimage.errors import InputError

MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits and group size; affine has a choice of both
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
NAMES = "2bit, 3bit, 4bit, 5bit, 6bit, 8bit (group 64, or with -g32, -g64, -g128), mxfp4, nvfp4, mxfp8"


@dataclass(frozen=True)
class Quantization:
    """How weights are packed: MLX's `mode`, bits a weight, and how many weights of a row share one scale."""

    mode: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, name: str) -> "Quantization":
        """From a name such as "4bit", "8bit-g32" or "mxfp4". Raises InputError for any other."""
        if isinstance(name, str) and name in MODES:
            return cls(name, *MODES[name])
        match = re.fullmatch(r"([234568])bit(?:-g(32|64|128))?", name) if isinstance(name, str) else None
        if match is None:
            raise InputError(f"unknown quantization {name!r:.200}; known are {NAMES}")
        return cls("affine", int(match[1]), int(match[2] or 64))

    @classmethod
    def of_tensors(
        cls, weight: tuple[int, ...], scales: tuple[int, ...], scales_dtype: str, width: int
    ) -> "Quantization | None":
        """What the shapes of a packed weight [out, words] and of its scales say, for a layer of input width `width`.

        None where no packing of MLX's has such shapes. Affine scales are floats; the other modes' are bytes.
        """
        if len(weight) != 2 or len(scales) != 2 or not scales[1] or not width or width % scales[1]:
            return None
        bits, rest = divmod(weight[1] * 32, width)
        group = width // scales[1]
        if rest:
            return None
        if scales_dtype != "U8":
            return cls("affine", bits, group) if bits in AFFINE_BITS and group in AFFINE_GROUPS else None
        return next((cls(mode, *sizes) for mode, sizes in MODES.items() if sizes == (bits, group)), None)

    def shapes(self, rows: int, width: int) -> dict[str, tuple[int, int]] | None:
        """Shapes of `weight`, `scales` and, for affine, `biases` of a packed [rows, width] weight.

        None where the packing is not one of MLX's or does not divide the width.
        """
        if (self.bits, self.group_size) != MODES.get(self.mode, (self.bits, self.group_size)):
            return None
        if self.mode == "affine" and (self.bits not in AFFINE_BITS or self.group_size not in AFFINE_GROUPS):
            return None
        if width % self.group_size or width * self.bits % 32:
            return None
        groups = (rows, width // self.group_size)
        found = {"weight": (rows, width * self.bits // 32), "scales": groups}
        return {**found, "biases": groups} if self.mode == "affine" else found

    def require(self, path: str, rows: int, width: int) -> None:
        """Raise InputError, which names the layer at `path`, where a [rows, width] weight cannot be packed so."""
        if self.shapes(rows, width) is None:
            raise InputError(
                f"{path}: input width {width} is not divisible by the group size {self.group_size} of {self}; "
                "use a smaller group, or a recipe that leaves the layer as it is"
            )
        if rows * width % 32:  # MLX packs no fewer at once
            raise InputError(f"{path}: {rows} x {width} weights are no multiple of 32, which {self} needs")

    def stored_bytes(self, rows: int, width: int, item: int) -> int | None:
        """Bytes of a packed [rows, width] weight whose affine scales and biases have `item` each; None as `shapes`."""
        size = {"weight": 4, "scales": item if self.mode == "affine" else 1, "biases": item}
        found = self.shapes(rows, width)
        return None if found is None else sum(a * b * size[name] for name, (a, b) in found.items())

    def __str__(self) -> str:
        """As `parse` takes it."""
        if self.mode != "affine":
            return self.mode
        return f"{self.bits}bit" + ("" if self.group_size == 64 else f"-g{self.group_size}")


def entry(packing: Mapping[str, Quantization]) -> dict[str, Any] | None:
    """The `quantization` entry of a config.json, as mlx-lm writes it: one for most layers, one a layer that differs.

    packing: each quantized layer's path and how it is packed. None where there is none.
    """
    if not packing:
        return None
    (common, _), *_ = Counter(packing.values()).most_common(1)
    others = {path: _values(own) for path, own in packing.items() if own != common}
    return {**_values(common), **others}


def _values(quantization: Quantization) -> dict[str, Any]:
    values = asdict(quantization)
    return {"group_size": values["group_size"], "bits": values["bits"], "mode": values["mode"]}
