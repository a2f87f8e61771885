"""Whether a model and a step of it fit a device, said before anything is allocated.

Judged by what the device has in all and what it recommends to use; what is free at the moment is no measure, caches
take it and give it back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage import recipes
from zimage.analysis import cost, footprint
from zimage.analysis.footprint import DeviceKind, Footprint, Verdict
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.quantization import AFFINE_BITS, MODES, NAMES, Quantization
from zimage.recipes import Asked
from zimage.sources import SourceInfo, describe

# The dtypes and packings there are, each affine one in its own groups of 64, from many bits to few.
PRECISIONS = ("float32", "bfloat16", *(f"{bits}bit" for bits in reversed(AFFINE_BITS)), *reversed(MODES))


@dataclass(frozen=True)
class Device:
    """What decides whether something fits a device: its kind, and its bytes in all and as recommended, if known."""

    kind: DeviceKind
    total_bytes: int | None = None
    recommended_bytes: int | None = None

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> "Device | None":
        """From the facts that `backend.device_facts` gives; None where they don't say what computes."""
        kind = kind_of(facts.get("device_type") or "", facts.get("mlx_build") or "")
        total, recommended = (facts.get(name, "") for name in ("memory_bytes", "recommended_memory_bytes"))
        if kind is None:
            return None
        known = recommended.isdecimal() and kind != "cpu"  # a GPU's, where the CPU is to compute beside one
        return cls(kind, int(total) if total.isdecimal() else None, int(recommended) if known else None)

    @classmethod
    def here(cls) -> "Device":
        """The device that MLX computes on in this process. Raises BackendError when MLX cannot be used."""
        from zimage import backend

        kind = backend.kind()
        from zimage.measure import memory

        found = memory.device()
        return cls(kind, found["memory_bytes"], found["recommended_bytes"])

    @property
    def dtype(self) -> str:
        """The dtype that suits it, as `load_transformer` chooses."""
        return "float32" if self.kind == "cpu" else "bfloat16"


def kind_of(device_type: str, mlx_build: str) -> DeviceKind | None:
    """What computes, from MLX's name for the type of device and the kind of its build."""
    if device_type == "gpu":
        return "cuda" if mlx_build.startswith("cuda") else "metal"
    return "cpu" if device_type == "cpu" else None


@dataclass(frozen=True)
class Fit:
    """The verdict on a step and the models held beside it, and what it was judged by; prints as one sentence.

    verdict: "fits"; "tight", above the recommended working set; "cannot fit", above all there is; or "unknown".
    """

    verdict: Verdict
    reason: str
    step: Footprint  # with one model
    models: float
    dtype: str
    device: Device

    @property
    def need_bytes(self) -> int:
        """Bytes of all models and of what a step has alive besides."""
        return needed(self.step, self.models)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def needed(step: Footprint, models: float) -> int:
    """Bytes of `models` times the weights and of what a step has alive besides."""
    return round(models * step.weight_bytes) + step.activation_bytes


def fits(
    source: str | Path | TransformerConfig | SourceInfo,
    height: int,
    width: int,
    batch: int = 1,
    caption_tokens: int | Sequence[int] = 32,
    dtype: str | None = None,
    quantization: Asked | None = None,
    models: float = 1,
    patch_size: int | None = None,
    device: Device | None = None,
) -> Fit:
    """Whether a step of `source`, or of a model with a config, on `height` x `width` pixels fits a device.

    dtype and quantization are those of `load_transformer`; models says how many models' weights are held at once, and
    may be a fraction where arms share arrays; device is this process's if left out. Raises WeightsError, ConfigError or
    InputError for a source that cannot be loaded, sizes that the model does not take, and models of 0 or less.
    """
    if not 0 < models < math.inf:
        raise InputError(f"models says how many models' weights are held at once, above 0; found {models!r}")
    info = source if isinstance(source, SourceInfo) else _described(source)
    info.check()
    on = Device.here() if device is None else device
    cast = on.dtype if dtype is None and not info.keeps_dtype else dtype
    shown = cast or ("bfloat16" if "BF16" in info.dtypes else "float32")
    packing = (info.packing if quantization is None else recipes.packing(info.config, quantization)) or None
    alive = footprint.step_bytes(
        info.config, height, width, batch, caption_tokens, shown, packing, patch_size, on.kind
    ).activation_bytes
    item = None if cast is None else cost.item_bytes(cast)
    step = Footprint(info.loaded_bytes(item, packing), alive)
    verdict, reason = footprint.verdict(needed(step, models), on.recommended_bytes, on.total_bytes, models)
    return Fit(verdict, reason, step, models, shown, on)


def precisions(asked: Sequence[str]) -> list[str]:
    """The dtypes and packings that these names stand for, "all" for PRECISIONS.

    Raises InputError for others; a recipe's file is not looked at.
    """
    found = [name for one in asked for name in (PRECISIONS if one == "all" else [one])]
    for name in found:
        try:
            if name not in list(cost.BYTES) and not recipes.is_file(name):
                Quantization.parse(name)
        except InputError:
            known = f"all, {', '.join(cost.BYTES)}, {NAMES}, and recipes' files"
            raise InputError(f"precision {name!r:.80} is not known; known are {known}") from None
    return found


def squares(pixels: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Sizes of steps of the published model, for one square image each and captions of 32 tokens, by their pixels.

    Raises InputError or ConfigError for what it does not take.
    """
    found = [(px, px, 1, 32) for px in pixels]
    for size in found:
        cost.token_lengths(TransformerConfig.turbo(), *size, None)
    return found


def footprints(
    source: str | Path,
    precisions: Sequence[str],
    sizes: Sequence[Sequence[int]],
    dtype: str | None = None,
    device: Device | None = None,
) -> list[dict[str, Any]]:
    """Rows of a `footprint` table: what a step of `source` is predicted to need at each precision and size.

    precisions: names of dtypes, or of quantizations or recipes' files, whose floating-point values are of `dtype`; each
    row's `arm`, a recipe's without its folder.
    sizes: (height, width, batch, caption tokens). Raises as `fits`.
    """
    info = describe(source)
    on = Device.here() if device is None else device
    rows = []
    for precision in precisions:
        for height, width, batch, caption_tokens in sizes:
            name, packing = (precision, None) if precision in cost.BYTES else (dtype, precision)
            step = fits(info, height, width, batch, caption_tokens, name, packing, device=on).step
            rows.append(
                {
                    "arm": recipes.label(precision), "model": info.source, "kind": on.kind, "height": height,
                    "width": width, "batch": batch, "caption_tokens": caption_tokens, "weight_bytes": step.weight_bytes,
                    "predicted_bytes": step.peak_bytes,
                }
            )  # fmt: skip
    return rows


def _described(source: str | Path | TransformerConfig) -> SourceInfo:
    if isinstance(source, TransformerConfig):
        return SourceInfo("a config", "synthetic", source, {})
    return describe(source)
