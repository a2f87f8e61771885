"""Checkpoints in a folder or in one file, as diffusers, ComfyUI, mflux and zimage itself leave them."""

import os
from pathlib import Path
from typing import Any, Literal

from zimage.config import TransformerConfig
from zimage.errors import ConfigError, WeightsError
from zimage.quantization import MODES
from zimage.sources import layouts, published
from zimage.sources.files import TensorInfo, inside, plain, read_header, read_json
from zimage.sources.info import SourceInfo, packing_of

_SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_BESIDE = ("captions.safetensors", "adapter_model.safetensors")  # .safetensors that are never the weights
_LARGEST_GROUP = 2**16
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLE = "a pickle can run code when it is opened, so zimage reads none; take the checkpoint's .safetensors instead"
_NO_GGUF = (
    "zimage reads no GGUF; take the .safetensors it was made from (Tongyi-MAI/Z-Image-Turbo) and pack it with "
    "--quantization 4bit"
)


def read_folder(source: str, folder: Path) -> SourceInfo:
    """A diffusers folder, its root or its transformer/; mflux's and our own have the same form.

    Raises WeightsError and ConfigError.
    """
    root = folder
    if not (folder / "config.json").is_file() and not _weights_in(folder) and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    inside(folder, root)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        if len(indexes) > 1:
            raise WeightsError(f"{folder}: two indexes, {indexes[0].name} and {indexes[1].name}; keep one")
        return _info(source, root, folder, _sharded(inside(indexes[0], root)))
    found = _weights_in(folder)
    if not (folder / "config.json").is_file() and not found:
        _refuse_others(folder)
        raise WeightsError(f"{folder}: no config.json here or in transformer/; give a diffusers folder of Z-Image")
    if len(found) != 1:
        _refuse_others(folder)
        names = ", ".join(path.name for path in found) or "none"
        raise WeightsError(
            f"{folder}: expected one .safetensors file or an index of several, found {plain(names)}; "
            "name the file that is meant"
        )
    return _info(source, root, folder, read_header(inside(found[0], root)))


def read_file(source: str, path: Path) -> SourceInfo:
    """One .safetensors file, with a config.json beside it unless its sizes are the published model's."""
    if path.suffix != ".safetensors":
        reason = {".gguf": _NO_GGUF, **dict.fromkeys(_PICKLES, _NO_PICKLE)}.get(
            path.suffix.lower(), "zimage reads no other format"
        )
        raise WeightsError(f"{path}: not a .safetensors file; {reason}")
    return _info(source, path.parent, path.parent, read_header(path))


def _weights_in(folder: Path) -> list[Path]:
    """The .safetensors file of a folder without an index; several where it is not clear which is meant."""
    found = [folder / name for name in _SINGLE_FILES if (folder / name).is_file()]
    return found or sorted(p for p in folder.glob("*.safetensors") if p.is_file() and p.name not in _BESIDE)


def _refuse_others(folder: Path) -> None:
    """Say of a folder that holds pickles or GGUF only why they are not read."""
    if any(folder.glob("*.safetensors")):
        return
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise WeightsError(f"{folder}: found {plain(path.name)}: {_NO_PICKLE}")
        if path.suffix.lower() == ".gguf":
            raise WeightsError(f"{folder}: found {plain(path.name)}: {_NO_GGUF}")


def _info(source: str, root: Path, folder: Path, stored: dict[str, TensorInfo]) -> SourceInfo:
    path = folder / "config.json"
    values = read_json(inside(path, root)) if path.is_file() else None
    config, entries = config_of(path, values) if values is not None else (None, None)
    layouts.refuse_foreign(folder, stored)
    tensors = layouts.published(stored)
    if config is None:
        try:
            config = published.implied_config(tensors)
        except ConfigError as error:
            files = {tensor.file for tensor in stored.values()}
            where = next(iter(files)) if len(files) == 1 else folder
            raise WeightsError(
                f"{where}: no config.json beside it, and its tensors do not tell the config: {plain(error)}; put "
                "the transformer's published config.json there"
            ) from None
    kind: Literal["trained", "synthetic"] = "trained"
    if values is not None and values.get("_weights_kind") == "synthetic":
        kind = "synthetic"
    captions = folder / "captions.safetensors"
    labels = inside(captions, root) if os.path.isfile(captions) else None
    return SourceInfo(source, kind, config, tensors, packing_of(config, tensors, entries), folder, labels)


def config_of(path: Path, values: Any) -> tuple[TransformerConfig, dict[str, Any] | None]:
    """The config and the `quantization` entry that `values`, the content of `path`, holds."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    other = values.get("quantization_config")
    if isinstance(other, dict) and "quant_method" in other:
        raise WeightsError(
            f"{path}: the weights were packed by {plain(repr(other['quant_method']))}, which zimage does not read; use "
            "the bf16 weights and pack them here with --quantization"
        )
    entries = values.get("quantization")
    if entries is not None and not isinstance(entries, dict):
        raise ConfigError(f"{path}: quantization must be an object, found {plain(repr(entries))}")
    _check_entries(path, entries or {})
    try:
        return TransformerConfig.from_dict(values), entries
    except ConfigError as error:
        raise ConfigError(f"{path}: {plain(error)}") from None


def _check_entries(path: Path, entry: dict[str, Any], where: str = "quantization") -> None:
    """Refuse a quantization entry, or that of a single layer in it, whose values could not be MLX's."""
    for name, value in entry.items():
        shown = f"{path}: {where}.{plain(name)}"
        if name in ("group_size", "bits"):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_GROUP:
                raise WeightsError(f"{shown} must be a positive integer, found {plain(repr(value))}")
        elif name == "mode":
            if not isinstance(value, str) or value not in ("affine", *MODES):
                raise WeightsError(f"{shown} must be one of affine, {', '.join(MODES)}, found {plain(repr(value))}")
        elif isinstance(value, dict) and where == "quantization":
            _check_entries(path, value, f"{where}.{plain(name)}")


def _sharded(index: Path) -> dict[str, TensorInfo]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map from tensor names to files; download it again")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise WeightsError(
                f"{index}: tensor {plain(name)} lies in {plain(repr(file))}, which is not a .safetensors file name"
            )
        if file not in headers:
            if not (index.parent / file).is_file():
                raise WeightsError(f"{index}: names {plain(file)}, which is not there; download the missing shard")
            headers[file] = read_header(inside(index.parent / file, index.parent))
        if name not in headers[file]:
            raise WeightsError(
                f"{index.parent / file}: tensor {plain(name)} is missing, though {index.name} says it is here"
            )
        tensors[name] = headers[file][name]
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                raise WeightsError(
                    f"{index.parent / file}: tensor {plain(name)} is not listed for this file in {index.name}"
                )
    return tensors
