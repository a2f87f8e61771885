"""Writes models as they lie in an Ollama store: a manifest, and a blob for each of its layers."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.config import TransformerConfig
from zimage.sources import describe

import numpy as np
from numpy.typing import NDArray

TENSOR = "application/vnd.ollama.image.tensor"
JSON = "application/vnd.ollama.image.json"
GGUF = "application/vnd.ollama.image.model"
PLACE = "registry.ollama.ai/library/tiny/latest"


@dataclass(frozen=True)
class Stored:
    """A tensor as safetensors stores it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Layer:
    """A layer of a manifest and the content of its blob."""

    kind: str
    name: str
    content: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def entry(self) -> dict[str, Any]:
        """As the manifest lists it."""
        digest = f"sha256:{self.digest}"
        return {"mediaType": self.kind, "name": self.name, "digest": digest, "size": len(self.content)}


def stored(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Stored]:
    """Arrays of fp32 as they are stored."""
    return {name: Stored("F32", array.shape, array.tobytes()) for name, array in arrays.items()}


def stored_in(source: Path) -> dict[str, Stored]:
    """The tensors of another source, byte for byte."""
    tensors = describe(source).tensors.items()
    return {n: Stored(t.dtype, t.shape, t.file.read_bytes()[t.start : t.end]) for n, t in tensors}


def blob(tensors: Mapping[str, Stored], metadata: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(tensor.data for tensor in tensors.values())


def config_layer(config: TransformerConfig) -> Layer:
    """The transformer's config.json."""
    values = {"_class_name": "ZImageTransformer2DModel", **config.to_dict()}
    return Layer(JSON, "transformer/config.json", json.dumps(values).encode())


def tensor_layers(
    tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None, prefix: str = ""
) -> list[Layer]:
    """A layer a tensor, its scale and bias in the same blob; `metadata` goes to those that have a scale."""
    layers = []
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")):
            continue
        path, key = name.removesuffix(".weight"), f"{prefix}{name}"
        content = {key: tensor}
        for old, new in (("scales", "scale"), ("biases", "bias")):
            if f"{path}.{old}" in tensors:
                content[f"{key}.{new}"] = tensors[f"{path}.{old}"]
        layers.append(Layer(TENSOR, f"transformer/{name}", blob(content, metadata if len(content) > 1 else None)))
    return layers


def separate_layers(tensors: Mapping[str, Stored]) -> list[Layer]:
    """As the older generation has it: a layer a tensor, scales and biases too, each keyed `data`."""
    layers = []
    for name, tensor in tensors.items():
        told = name.replace(".scales", ".weight_scale").replace(".biases", ".weight_qbias")
        layers.append(Layer(TENSOR, f"transformer/{told}", blob({"data": tensor})))
    return layers


def write_blobs(root: Path, layers: Iterable[Layer]) -> None:
    """The blobs of layers."""
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for layer in layers:
        (root / "blobs" / f"sha256-{layer.digest}").write_bytes(layer.content)


def write_manifest(root: Path, content: Any, place: str = PLACE) -> Path:
    """A manifest with any content."""
    path = root / "manifests" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_model(root: Path, layers: Iterable[Layer], place: str = PLACE) -> Path:
    """A model's blobs and its manifest, whose path is given."""
    layers = list(layers)
    write_blobs(root, layers)
    return write_manifest(root, {"schemaVersion": 2, "layers": [layer.entry for layer in layers]}, place)
