"""LoRA adapters: which linear layers an adapter file changes and by what, whichever tool wrote it.

A file holds a low-rank pair for some layers, and a layer's weight becomes W + scale * alpha / rank * up @ down (Hu et
al. 2021, LoRA). Names are those of PEFT and diffusers (lora_A is down, lora_B is up), of Kohya's sd-scripts
(lora_unet_..., lora_down, lora_up), and of ComfyUI's single file, where one attention.qkv stands for three projections.
Nothing here imports MLX.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage.adapters.settings import Settings, is_number, read_settings
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError
from zimage.sources import TensorInfo, linears, plain, read_header, readable

import numpy as np
from numpy.typing import NDArray

_ROLES = {
    f".{name}.weight": role
    for role, names in {
        "down": ("lora_A", "lora_A.default", "lora_down", "lora.down"),
        "up": ("lora_B", "lora_B.default", "lora_up", "lora.up"),
    }.items()
    for name in names
} | {".alpha": "alpha"}
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_")
_PLAIN_ONLY = "zimage applies plain LoRA only; merge it with the tool that made it and load the merged checkpoint"
_OTHER_KINDS = {  # a part of a tensor's name, and what it tells
    "dora_scale": "is of a DoRA adapter",
    "lora_magnitude_vector": "is of a DoRA adapter",
    ".lokr_": "is of a LoKr adapter",
    ".hada_": "is of a LoHa adapter",
    ".oft_": "is of an OFT adapter",
    ".lora_mid.": "is of a LoRA adapter for convolutions",
}
_OTHER_ENDINGS = {
    **dict.fromkeys((".diff", ".diff_b"), "is a full difference of weights"),
    **dict.fromkeys((f"{suffix.removesuffix('.weight')}.bias" for suffix in _ROLES), "is a bias of a LoRA"),
}
_TEXT_ENCODERS = ("text_encoder", "lora_te")
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one layer's weight [rows, width]: factor * up @ down.

    down is stored as [rank, width], up as [rows, rank]; an up of a fused projection has the rows of all its parts, of
    which this layer's are `rows` from `first_row` on.
    """

    down: TensorInfo
    up: TensorInfo
    first_row: int
    rows: int
    factor: float

    def values(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """down [rank, width] and up [rows, rank] in fp32, read now, with the factor in up.

        Raises WeightsError where the file has changed, InputError where the factor takes a value out of fp32's range.
        """
        with readable(self.up.file), np.errstate(over="ignore", invalid="ignore"):
            down, up = _values(self.down), _values(self.up)[self.first_row : self.first_row + self.rows]
            scaled = up.astype(np.float32) * np.float32(self.factor)
        if not np.isfinite(scaled).all():
            raise InputError(f"{plain(self.up.file)}: times {self.factor:g} it overflows fp32; use a smaller scale")
        return down.astype(np.float32), scaled


@dataclass(frozen=True)
class _Module:
    """A linear layer as an adapter may call it, and the layers of the model that it stands for, with their rows."""

    name: str
    parts: tuple[tuple[str, int], ...]
    width: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


def parse(text: str) -> tuple[Path, float]:
    """FILE[:SCALE] as a path and a scale, 1 if left out.

    A colon starts a scale only before a number, and never in the name of a file that exists. Raises InputError for an
    empty name and a scale that is not finite.
    """
    name, scale = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not os.path.isfile(os.path.expanduser(text)):
        try:
            name, scale = head, float(tail)
        except ValueError:
            name = text
    if not name:
        raise InputError(f"--lora {plain(text)!r} names no file; write FILE or FILE:SCALE")
    return Path(os.path.expanduser(name)), _finite(scale, text)


def read_all(files: Sequence[tuple[str | Path, float]], config: TransformerConfig) -> dict[str, list[Update]]:
    """What several (file, scale) pairs add to the layers of `config`'s model, by module path; factors have the scales.

    Raises as `read` does, and InputError for what are no such pairs and for a scale that is not a finite number.
    """
    found: dict[str, list[Update]] = {}
    for pair in files:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
            raise InputError(f"adapters are (file, scale) pairs, found {plain(repr(pair))}")
        path, times = pair[0], _finite(pair[1], pair[0])
        for module, update in read(path, config).items():
            found.setdefault(module, []).append(replace(update, factor=update.factor * times))
    return found


def read(path: str | Path, config: TransformerConfig) -> dict[str, Update]:
    """What the adapter at `path` adds to the layers of `config`'s model, by module path; the factor is alpha / rank.

    alpha is the layer's own tensor, or from the file's metadata as diffusers writes it, or from the
    adapter_config.json beside it as PEFT writes it, or equal to the rank. Raises WeightsError for what is not a LoRA of
    this model: other kinds of adapters, text encoders, unknown layers, half a pair, wrong shapes or dtypes, a layer
    named twice, values that are not finite.
    """
    file = Path(os.path.expanduser(path))
    where = plain(file)
    if os.path.isdir(file):
        raise WeightsError(f"{where} is a folder; name the adapter's .safetensors file in it")
    if not os.path.isfile(file):
        raise WeightsError(f"no adapter at {where}: name a .safetensors file")
    if file.suffix != ".safetensors":
        raise WeightsError(f"{where}: not a .safetensors file; zimage reads no pickles, save it as safetensors")
    with readable(file):
        tensors = read_header(file)
        named = _pairs(where, tensors, modules(config))
        settings = None if all("alpha" in roles for _, roles in named) else read_settings(file)
        found: dict[str, Update] = {}
        owner: dict[str, str] = {}
        for module, roles in named:
            update = _update(where, module, {role: (n, tensors[n]) for role, n in roles.items()}, settings)
            first = 0
            for part, rows in module.parts:
                if part in found:
                    raise WeightsError(
                        f"{where}: tensors {plain(owner[part])} and {plain(roles['up'])} are both for {part}; keep one"
                    )
                found[part], owner[part] = replace(update, first_row=first, rows=rows), roles["up"]
                first += rows
    return found


def modules(config: TransformerConfig) -> dict[str, _Module]:
    """Every name that an adapter may have for a linear layer: published, ComfyUI's, and both with underscores for dots.

    Whole names are looked up, so an underscore is never guessed to be a dot.
    """
    found = {path: _Module(path, ((path, rows),), width) for path, (rows, width) in linears(config).items()}
    for path, module in list(found.items()):
        if path.endswith(".attention.to_q"):
            attention = path.removesuffix(".to_q")
            parts = [part for projection in "qkv" for part in found[f"{attention}.to_{projection}"].parts]
            found[f"{attention}.qkv"] = _Module(f"{attention}.qkv", tuple(parts), module.width)
            found[f"{attention}.out"] = replace(found[f"{attention}.to_out.0"], name=f"{attention}.out")
        elif path.startswith(("all_x_embedder.", "all_final_layer.")) and len(config.all_patch_size) == 1:
            key = f"{config.all_patch_size[0]}-1"
            name = path.removeprefix("all_").replace(f".{key}", "")
            found[name] = replace(module, name=name)
    return {**{name.replace(".", "_"): module for name, module in found.items()}, **found}


def _pairs(
    where: str, tensors: Mapping[str, TensorInfo], known: Mapping[str, _Module]
) -> list[tuple[_Module, dict[str, str]]]:
    """Each module that the file names, with the names of its tensors by role: down, up and perhaps alpha."""
    if not tensors:
        raise WeightsError(f"{where}: holds no tensors; download it again")
    _refuse_other_kinds(where, tensors)
    split = {name: _split(name) for name in tensors}
    if not any(role in ("down", "up") for _, role in split.values()):
        whole = any(_bare(name).removesuffix(".weight") in known for name in tensors)
        told = "a whole checkpoint; give it as the source" if whole else "no LoRA: no tensor is a lora_A or lora_down"
        raise WeightsError(f"{where}: {told}")
    unexpected = [name for name, (_, role) in split.items() if role is None]
    if unexpected:
        raise WeightsError(f"{where}: tensor {_first(unexpected)} is not part of a LoRA; {_PLAIN_ONLY}")
    strange = [name for name, (module, _) in split.items() if module not in known]
    if strange:
        raise WeightsError(
            f"{where}: tensor {_first(strange)} is for a layer that this model does not have; "
            "use an adapter that was made for it"
        )
    found: dict[str, tuple[_Module, dict[str, str]]] = {}
    for name, (path, role) in split.items():
        assert role is not None
        module = known[path]
        _, roles = found.setdefault(module.name, (module, {}))
        if role in roles:
            both = f"tensors {plain(roles[role])} and {plain(name)} are both"
            raise WeightsError(f"{where}: {both} the {role} of {module.name}; keep one")
        roles[role] = name
    for module, roles in found.values():
        for role in ("down", "up"):
            if role not in roles:
                raise WeightsError(
                    f"{where}: tensor {plain(next(iter(roles.values())))} has no {role} beside it for {module.name}; "
                    "download the adapter again"
                )
    return list(found.values())


def _refuse_other_kinds(where: str, tensors: Mapping[str, TensorInfo]) -> None:
    for name in tensors:
        told = next((told for part, told in _OTHER_KINDS.items() if part in name), None)
        told = told or next((told for ending, told in _OTHER_ENDINGS.items() if name.endswith(ending)), None)
        if told:
            raise WeightsError(f"{where}: tensor {plain(name)} {told}; {_PLAIN_ONLY}")
        if _bare(name).startswith(_TEXT_ENCODERS):
            raise WeightsError(
                f"{where}: tensor {plain(name)} is for the text encoder, and zimage adapts the transformer only; "
                "save the adapter without its text encoder"
            )


def _split(name: str) -> tuple[str, str | None]:
    """The module that a tensor is for, without prefixes, and its role; the whole name and None where it has none."""
    for suffix, role in _ROLES.items():
        if name.endswith(suffix):
            return _bare(name.removesuffix(suffix)), role
    return name, None


def _bare(name: str) -> str:
    """A name without the prefixes that tools put before the model's own."""
    start = 0
    while prefix := next((p for p in _PREFIXES if name.startswith(p, start)), ""):
        start += len(prefix)
    return name[start:]


def _update(
    where: str, module: _Module, stored: Mapping[str, tuple[str, TensorInfo]], settings: Settings | None
) -> Update:
    """One module's pair, its shapes, dtypes and values found right; the rows are still those of the whole module."""
    down, up = stored["down"][1], stored["up"][1]
    rank = down.shape[0] if len(down.shape) == 2 else None
    for (name, tensor), expected in (
        (stored["down"], ["rank" if rank is None else rank, module.width]),
        (stored["up"], [module.rows, "rank" if rank is None else rank]),
    ):
        label = f"{where}: tensor {plain(name)}"
        if list(tensor.shape) != expected:
            wanted = ", ".join(map(str, expected))
            raise WeightsError(
                f"{label} has shape {list(tensor.shape)}, expected [{wanted}] for {module.name}; "
                "use an adapter that was made for this model"
            )
        if tensor.dtype not in _FLOATS:
            raise WeightsError(
                f"{label} has dtype {tensor.dtype}, expected {' or '.join(_FLOATS)}; save the adapter in one of these"
            )
    if not rank:
        raise WeightsError(f"{where}: tensor {plain(stored['down'][0])} has rank 0; download the adapter again")
    for name, tensor in (stored["down"], stored["up"]):
        if not np.isfinite(_values(tensor)).all():
            raise WeightsError(f"{where}: tensor {plain(name)} holds NaN or Inf; its training failed, use another")
    if "alpha" in stored:
        factor = _alpha(where, *stored["alpha"]) / rank
    else:
        factor = 1.0 if settings is None else settings.factor(module.name, rank)
    return Update(down, up, 0, module.rows, factor)


def _alpha(where: str, name: str, tensor: TensorInfo) -> float:
    if math.prod(tensor.shape) == 1 and tensor.dtype in _NUMPY:
        value = float(_values(tensor).reshape(()))
        if math.isfinite(value):
            return value
        found = str(value)
    else:
        found = f"{tensor.dtype} {list(tensor.shape)}"
    raise WeightsError(f"{where}: tensor {plain(name)} must be one finite number, found {found}")


def _values(tensor: TensorInfo) -> NDArray[Any]:
    """A tensor's values as they are stored, bf16 as fp32. Raises WeightsError where the file has become shorter."""
    kind = np.dtype(_NUMPY[tensor.dtype])
    values = np.fromfile(tensor.file, kind, tensor.nbytes // kind.itemsize, offset=tensor.start)
    if values.nbytes != tensor.nbytes:
        raise WeightsError(f"{plain(tensor.file)}: cut short while it was read; try again")
    if tensor.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(tensor.shape)


def _finite(scale: Any, of: object) -> float:
    if not is_number(scale):
        raise InputError(f"--lora {plain(of)}: the scale must be a finite number, found {plain(repr(scale))}")
    return float(scale)


def _first(names: Sequence[str]) -> str:
    return plain(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
