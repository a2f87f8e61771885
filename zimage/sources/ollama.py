"""Models in the local Ollama store: a manifest that names blobs by their SHA-256, each a small safetensors file.

Names resolve as Ollama's x/imagegen did (Ollama 0.14 to 0.24). A quantized blob holds a weight with .scale and .bias
beside it; older ones are separate layers <tensor>_scale and <tensor>_qbias. How weights are packed is read off the
shapes, which both generations have.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zimage.errors import WeightsError
from zimage.quantization import Quantization
from zimage.sources import layouts
from zimage.sources.files import Header, TensorInfo, inside, plain, read_json, read_whole_header
from zimage.sources.folders import config_of
from zimage.sources.info import SourceInfo, packing_of

SCHEME = "ollama:"
_TENSOR = "application/vnd.ollama.image.tensor"
_JSON = "application/vnd.ollama.image.json"
_MODEL = "application/vnd.ollama.image.model"  # GGUF, of a language model
_COMPONENT = "transformer/"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(:\d{1,5})?")
_SUFFIXES = {"_scale": ".scale", "_qbias": ".bias"}
_BITS = {
    "int4": ("affine", 4), "int8": ("affine", 8), "nvfp4": ("nvfp4", 4), "mxfp8": ("mxfp8", 8), "mxfp4": ("mxfp4", 4),
}  # fmt: skip


def read_model(source: str) -> SourceInfo:
    """The transformer of "ollama:NAME[:TAG]", its blobs' digests still to be verified (`SourceInfo.verify`).

    Raises WeightsError where the model is not there or not of this kind, ConfigError for its config.
    """
    root, manifest = _find(source)
    layers = list(_layers(manifest))
    config_layer = next((layer for layer in layers if layer[:2] == (_JSON, "transformer/config.json")), None)
    if config_layer is None:
        reason = "it is a language model" if any(layer[0] == _MODEL for layer in layers) else "it has no such layer"
        raise WeightsError(f"{manifest}: no transformer/config.json: {reason}; the documented model is x/z-image-turbo")
    hashes: dict[Path, str] = {}
    config_blob = _blob(root, manifest, config_layer, hashes)
    config, _ = config_of(config_blob, read_json(config_blob))
    stored: dict[str, TensorInfo] = {}
    headers: dict[Path, Header] = {}
    for layer in layers:
        if layer[0] == _TENSOR and layer[1].startswith(_COMPONENT):
            blob = _blob(root, manifest, layer, hashes)
            if blob not in headers:  # equal tensors share one
                headers[blob] = read_whole_header(blob)
            for name, tensor in _tensors(blob, headers[blob].tensors, layer[1].removeprefix(_COMPONENT)).items():
                if name in stored:
                    raise WeightsError(f"{manifest}: tensor {plain(name)} stands in two layers; pull the model again")
                stored[name] = tensor
    stored = _with_published_suffixes(manifest, stored)  # before other tools' names: one of them is weight_scale
    layouts.refuse_foreign(manifest, stored)
    tensors = layouts.published(stored)
    packing = packing_of(config, tensors, None)
    for path, packed in packing.items():
        weight = tensors[f"{path}.weight"]
        _check_type(weight, packed, headers[weight.file].metadata)
    return SourceInfo(source, "trained", config, tensors, packing, manifest.parent, hashes=hashes)


def roots() -> list[Path]:
    """Where Ollama keeps models, as its environment variable says or by default; those to look in first come first."""
    given = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'").strip()
    if given:
        return [Path(os.path.expanduser(given))]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _find(source: str) -> tuple[Path, Path]:
    """The store and the manifest of a model."""
    name = source.removeprefix(SCHEME)
    place, tag = name, "latest"
    head, slash, last = name.rpartition("/")
    if ":" in last:  # a colon before the last slash belongs to a host's port
        last, _, tag = last.partition(":")
        place = f"{head}{slash}{last}"
    parts = place.split("/")
    host, namespace = "registry.ollama.ai", "library"
    if len(parts) == 3:
        host, namespace, model = parts
    elif len(parts) == 2:
        namespace, model = parts
    else:
        model = place
    if len(parts) > 3 or not _HOST.fullmatch(host) or not all(map(_PART.fullmatch, (namespace, model, tag))):
        raise WeightsError(
            f"{plain(repr(source))} is no name of an Ollama model; write ollama:NAME[:TAG], as ollama:x/z-image-turbo"
        )
    for root in roots():
        manifest = root / "manifests" / host / namespace / model / tag
        if manifest.is_file():
            return root, inside(manifest, root)
    looked = ", ".join(str(root) for root in roots())
    raise WeightsError(
        f"no model {plain(name)} in the Ollama store ({plain(looked)}); `ollama pull {plain(name)}` gets it, or set "
        "OLLAMA_MODELS to where the store is"
    )


def _layers(manifest: Path) -> Iterator[tuple[str, str, str, int | None]]:
    """Media type, name, hex digest and size of each layer."""
    content = read_json(manifest)
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, list):
        raise WeightsError(f"{manifest}: no list of layers; pull the model again")
    for layer in layers:
        values: dict[str, Any] = layer if isinstance(layer, dict) else {}
        kind, name, digest, size = (values.get(key) for key in ("mediaType", "name", "digest", "size"))
        name = "" if name is None else name
        if not isinstance(kind, str) or not isinstance(name, str):
            raise WeightsError(f"{manifest}: a layer has no media type or an odd name; pull the model again")
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if match is None:
            shown = plain(repr(digest))
            raise WeightsError(
                f"{manifest}: layer {plain(name)} has the digest {shown}, expected sha256 and 64 hex digits"
            )
        yield kind, name, match[1], size if isinstance(size, int) and not isinstance(size, bool) else None


def _blob(root: Path, manifest: Path, layer: tuple[str, str, str, int | None], hashes: dict[Path, str]) -> Path:
    """A layer's file, its length found right; its hash is noted."""
    _, name, digest, size = layer
    path = root / "blobs" / f"sha256-{digest}"
    if not path.is_file():
        raise WeightsError(f"{manifest}: layer {plain(name)} is {path.name}, which is not there; pull the model again")
    found = inside(path, root).stat().st_size
    if size is not None and found != size:
        raise WeightsError(f"{path}: {found} bytes long, expected {plain(size)}; pull the model again")
    hashes[path] = digest
    return path


def _tensors(blob: Path, header: dict[str, TensorInfo], name: str) -> dict[str, TensorInfo]:
    """The tensors of a layer called `name`: one alone, one with scale and bias, or a group under their own names."""
    key = next((key for key in (name, f"{_COMPONENT}{name}", "data") if key in header), None)
    if key is None:
        found = {key.removeprefix(_COMPONENT): tensor for key, tensor in header.items()}
        if len(found) < len(header) or all(key.endswith((".scale", ".bias")) for key in found):
            raise WeightsError(f"{blob}: no tensor {plain(name)}; pull the model again")
        return found
    unknown = [other for other in header if other not in (key, f"{key}.scale", f"{key}.bias")]
    if unknown:
        raise WeightsError(f"{blob}: tensor {plain(unknown[0])} is unexpected in the layer of {plain(name)}")
    return {f"{name}{stored.removeprefix(key)}": tensor for stored, tensor in header.items()}


def _check_type(weight: TensorInfo, packed: Quantization, metadata: dict[str, Any]) -> None:
    """Refuse a quantization type that is not known, or that the shapes contradict."""
    told = metadata.get(f"{weight.stored}.quant_type", metadata.get("quant_type"))
    group = metadata.get(f"{weight.stored}.group_size", metadata.get("group_size"))
    if told is None:
        return
    if not isinstance(told, str) or told not in _BITS:
        raise WeightsError(
            f"{weight.file}: quant_type {plain(repr(told))} is not known; known are {', '.join(_BITS)}; pull another "
            "tag"
        )
    if _BITS[told] != (packed.mode, packed.bits) or (group is not None and str(group) != str(packed.group_size)):
        raise WeightsError(
            f"{weight.file}: quant_type {told} with group_size {plain(repr(group))} is not what it stores: "
            f"{plain(weight.stored)} is packed as {packed}; pull the model again"
        )


def _with_published_suffixes(manifest: Path, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with scales and biases of packed weights under the names that saved checkpoints have."""
    found: dict[str, TensorInfo] = {}
    for stored_name, tensor in stored.items():
        name = stored_name
        for old, new in _SUFFIXES.items():
            if name.endswith(old) and name.removesuffix(old) in stored:
                name = name.removesuffix(old) + new
        for old, new in ((".weight.scale", ".scales"), (".weight.bias", ".biases")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in found:
            raise WeightsError(f"{manifest}: tensor {plain(name)} stands in two layers; pull the model again")
        found[name] = tensor
    return found
