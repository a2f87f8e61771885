"""Strict loading of a checkpoint into a model, and saving one under the published tensor names."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage import backend, transforms
from zimage.errors import InputError, WeightsError
from zimage.sources import SourceInfo, describe, plain, read_header
from zimage.transformer import Transformer

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

__all__ = ["convert", "describe", "load_transformer", "require_free", "save_transformer"]

# What may be stored where the model has a tensor of the dtype on the left.
_STORED = {mx.uint32: ("U32",), mx.uint8: ("U8",)}
_STORED_FLOATS = ("F32", "BF16", "F16")


def load_transformer(source: str | Path, dtype: str | None = None, quantization: str | None = None) -> Transformer:
    """The transformer stored at `source`, evaluated and ready to run.

    source: a diffusers folder (its root or its transformer/), one .safetensors file with a config.json beside it,
    "digits" (ships with the package), or "synthetic:turbo", "synthetic:small", "synthetic:tiny" (seeded, no files).
    dtype: "bfloat16", "float32", or None for what suits the device; a checkpoint that is quantized keeps its own then.
    quantization: a name that `transforms.quantize` takes, or None.

    Raises WeightsError for a missing, unexpected or wrongly shaped tensor, ConfigError for a bad config and InputError
    for a dtype or quantization that is not known.
    """
    info = describe(source)
    if quantization is not None:
        transforms.Quantization.parse(quantization)
        if info.quantization is not None:
            raise InputError(f"{source} is quantized already; quantize the floating-point weights instead")
    if dtype is None and (info.quantization is None or "F16" in info.dtypes):
        dtype = backend.default_dtype()
    target = None if dtype is None else transforms.parse_dtype(dtype)
    if info.folder is None:
        model = Transformer(info.config, dtype=target or mx.float32)
    else:
        model = _stored(info)
        if dtype is not None:
            model = transforms.cast(model, dtype)
    if quantization is not None:
        model = transforms.quantize(model, quantization)
    mx.eval(model.parameters())
    return model


def _stored(info: SourceInfo) -> Transformer:
    """The model that `info` stores, its arrays not yet read."""
    _check_sizes(info)
    model = Transformer(info.config)
    if info.quantization is not None:
        _quantize_like(model, info)
    expected = dict(tree_flatten(model.parameters()))
    _check(info, expected)
    loaded: dict[str, mx.array] = {}
    for path in info.files:
        try:
            content = mx.load(str(path))
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"{path}: cannot be read: {plain(error)}") from None
        assert isinstance(content, dict)
        loaded.update(content)
    model.load_weights([(name, loaded[name]) for name in expected])
    return model


def _check_sizes(info: SourceInfo) -> None:
    """Refuse a config whose sizes are not those of the tensors, before a model of such sizes is built."""
    config = info.config
    wanted: dict[str, tuple[int, ...]] = {"x_pad_token": (1, config.dim)}
    wanted["cap_embedder.1.weight"] = (config.dim, config.cap_feat_dim)
    for patch in config.all_patch_size:
        wanted[f"all_x_embedder.{patch}-1.weight"] = (config.dim, patch**2 * config.in_channels)
    counts = {
        "noise_refiner": config.n_refiner_layers,
        "context_refiner": config.n_refiner_layers,
        "layers": config.n_layers,
    }
    for part, count in counts.items():
        if count:
            wanted[f"{part}.{count - 1}.attention_norm1.weight"] = (config.dim,)
    for name, shape in wanted.items():
        if name not in info.tensors:
            raise WeightsError(f"{_place(info)}: tensor {name} is missing, expected shape {list(shape)}")
        _check_shape(info, name, shape)


def _check(info: SourceInfo, expected: Mapping[str, mx.array]) -> None:
    """Refuse tensors whose names, shapes or dtypes are not those of `expected`."""
    missing = [name for name in expected if name not in info.tensors]
    if missing:
        shape = list(expected[missing[0]].shape)
        raise WeightsError(f"{_place(info)}: tensor {_first(missing)} is missing, expected shape {shape}")
    extra = [name for name in info.tensors if name not in expected]
    if extra:
        reason = "this config has no such tensor"
        if extra[0].endswith((".scales", ".biases")) and info.quantization is None:
            reason = "config.json has no quantization entry that says how the weights are packed"
        raise WeightsError(f"{info.tensors[extra[0]].file}: tensor {_first(extra)} is unexpected: {reason}")
    for name, wanted in expected.items():
        _check_shape(info, name, wanted.shape)
        tensor, known = info.tensors[name], _STORED.get(wanted.dtype, _STORED_FLOATS)
        if tensor.dtype not in known:
            raise WeightsError(f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, expected {' or '.join(known)}")


def _check_shape(info: SourceInfo, name: str, shape: tuple[int, ...]) -> None:
    tensor = info.tensors[name]
    if tensor.shape != shape:
        raise WeightsError(f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _place(info: SourceInfo) -> Path | None:
    return info.files[0] if len(info.files) == 1 else info.folder


def _quantize_like(model: Transformer, info: SourceInfo) -> None:
    """Give `model` the quantized layers that `info` stores, their values still to be loaded."""
    entry = info.quantization or {}
    common = {"mode": "affine", **_packing(entry)}

    def stored(path: str, _linear: nn.Linear) -> transforms.Quantization | None:
        if f"{path}.scales" not in info.tensors:
            return None
        own = entry.get(path)
        return transforms.Quantization(**{**common, **(_packing(own) if isinstance(own, dict) else {})})

    try:
        transforms.pack(model, stored)
    except (ValueError, TypeError) as error:
        shown = plain(f"{entry} does not fit: {error}")
        raise WeightsError(f"{info.folder}: config.json's quantization {shown}") from None
    if transforms.quantization_of(model) is None:
        raise WeightsError(f"{_place(info)}: no tensor has scales, though config.json has a quantization entry")


def _packing(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("group_size", "bits", "mode") if name in entry}


def _first(names: list[str]) -> str:
    return plain(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def save_transformer(
    model: Transformer, directory: str | Path, kind: str = "trained", captions: Path | None = None
) -> Path:
    """Save `model` as a folder with `config.json` and safetensors under the published names, unfused; give its path.

    kind says whether the weights are "trained" or "synthetic"; `captions` is a digits model's file of label embeddings,
    which is copied beside them. Nothing is left behind when saving fails. Raises
    WeightsError when the folder exists and is not empty, or cannot be written.
    """
    if kind not in ("trained", "synthetic"):
        raise InputError(f"kind must be 'trained' or 'synthetic', found {kind!r}")
    quantization = transforms.quantization_of(model)
    config = {
        **({"_weights_kind": kind} if kind == "synthetic" else {}),
        "_class_name": "ZImageTransformer2DModel",
        **model.config.to_dict(),
        **({} if quantization is None else {"quantization": quantization}),
    }
    target = Path(directory)
    require_free(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        _write(target, transforms.tensors(model), config, captions)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, (OSError, RuntimeError)):  # MLX's own writer raises RuntimeError
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise WeightsError(f"{target}: cannot be saved: {plain(reason)}") from None
        raise
    return target


def require_free(directory: str | Path) -> None:
    """Raise WeightsError unless a checkpoint may be saved at `directory`: nothing there, or an empty folder."""
    target = Path(directory)
    try:
        taken = target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir())))
    except OSError as error:
        raise WeightsError(f"{target}: cannot be saved: {error.strerror or error}") from None
    if taken:
        raise WeightsError(f"{target} exists and is not an empty folder; choose another or remove it")


def _write(target: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any], captions: Path | None) -> None:
    """Build the folder beside `target`, then put it in place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        file = partial / "diffusion_pytorch_model.safetensors"
        mx.save_safetensors(str(file), dict(tensors), {"format": "mlx"})
        read_header(file)  # a full disk can cut a file short without an error
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if captions is not None:
            shutil.copyfile(captions, partial / "captions.safetensors")
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def convert(
    source: str | Path, directory: str | Path, dtype: str | None = None, quantization: str | None = None
) -> Path:
    """Load `source`, as `dtype` and quantized where asked, and save it as a folder; give the folder's path.

    A digits model stays one: its label embeddings are copied.
    """
    require_free(directory)
    info = describe(source)
    return save_transformer(load_transformer(source, dtype, quantization), directory, info.kind, info.captions)
