"""Strict loading of a checkpoint into a model, and saving one under the published tensor names."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage import backend, transforms
from zimage.errors import InputError, WeightsError
from zimage.sources import SourceInfo, describe
from zimage.transformer import Transformer

__all__ = ["convert", "describe", "load_transformer", "save_transformer"]


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
    if dtype is None and info.quantization is None:
        dtype = backend.default_dtype()
    target = None if dtype is None else transforms.parse_dtype(dtype)
    if info.folder is None:
        model = Transformer(info.config, dtype=target or mx.float32)
    else:
        model = Transformer(info.config)
        if info.quantization is not None:
            _quantize_like(model, info)
        model.load_weights(list(_read(info, model).items()))
        if dtype is not None:
            model = transforms.cast(model, dtype)
    if quantization is not None:
        model = transforms.quantize(model, quantization)
    mx.eval(model.parameters())
    return model


def _read(info: SourceInfo, model: Transformer) -> dict[str, mx.array]:
    """All tensors of `info`, unevaluated, after checking names, shapes and dtypes against `model`."""
    expected = dict(tree_flatten(model.parameters()))
    where = ", ".join(path.name for path in info.files) or "no file"
    place = info.folder if len(info.files) != 1 else info.files[0]
    missing = [name for name in expected if name not in info.tensors]
    if missing:
        raise WeightsError(f"{place}: tensor {_first(missing)} is missing, expected {_form(expected[missing[0]])}")
    for name, tensor in info.tensors.items():
        if name not in expected:
            extra = [n for n in info.tensors if n not in expected]
            raise WeightsError(
                f"{tensor.file}: tensor {_first(extra)} is unexpected: this config has no such tensor ({where})"
            )
        wanted = expected[name]
        packed = wanted.dtype == mx.uint32
        if tensor.shape != wanted.shape:
            raise WeightsError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(wanted.shape)}"
            )
        known = ("U32",) if packed else ("F32", "BF16", "F16", "U8")
        if tensor.dtype not in known:
            raise WeightsError(f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, expected {' or '.join(known)}")
    loaded: dict[str, mx.array] = {}
    for path in info.files:
        content = mx.load(str(path))
        assert isinstance(content, dict)
        loaded.update(content)
    return {name: loaded[name] for name in expected}


def _quantize_like(model: Transformer, info: SourceInfo) -> None:
    """Give `model` the quantized layers that `info` stores, their values still to be loaded."""
    entry = dict(info.quantization or {})
    own = {path: values for path, values in entry.items() if isinstance(values, dict)}
    common = {k: entry[k] for k in ("group_size", "bits", "mode") if k in entry}

    def stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(module, nn.Linear) or f"{path}.scales" not in info.tensors:
            return False
        return {"mode": "affine", **common, **own.get(path, {})}

    try:
        nn.quantize(model, class_predicate=stored)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{info.folder}: config.json's quantization {entry} does not fit: {error}") from None


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _form(array: mx.array) -> str:
    return f"shape {list(array.shape)}"


def save_transformer(model: Transformer, directory: str | Path, kind: str = "trained") -> Path:
    """Save `model` as a folder with `config.json` and safetensors under the published names, unfused; give its path.

    kind says whether the weights are "trained" or "synthetic". Nothing is left behind when saving fails. Raises
    WeightsError when the folder exists and is not empty.
    """
    return _save(
        Path(directory),
        transforms.tensors(model),
        {
            **({"_weights_kind": "synthetic"} if kind == "synthetic" else {}),
            "_class_name": "ZImageTransformer2DModel",
            **model.config.to_dict(),
            "quantization": transforms.quantization_of(model),
        },
    )


def _save(target: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target} exists and is not an empty folder; choose another or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            mx.save_safetensors(str(partial / "diffusion_pytorch_model.safetensors"), dict(tensors), {"format": "mlx"})
            values = {k: v for k, v in config.items() if v is not None or k == "siglip_feat_dim"}
            (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            partial.chmod(0o755)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise WeightsError(f"cannot save to {target}: {error.strerror or error}") from None
    return target


def convert(
    source: str | Path, directory: str | Path, dtype: str | None = None, quantization: str | None = None
) -> Path:
    """Load `source`, as `dtype` and quantized where asked, and save it as a folder; give the folder's path."""
    info = describe(source)
    return save_transformer(load_transformer(source, dtype, quantization), directory, info.kind)
