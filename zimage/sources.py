"""Where weights come from: finding a checkpoint, and reading what its files say about themselves.

Nothing here imports MLX or reads tensor values, except to compute a digest.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, Literal

from zimage.config import TransformerConfig
from zimage.errors import ConfigError, WeightsError

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST_OFFSET = 2**48
_MOST_AXES = 16
_LARGEST_GROUP = 2**16
_PACKING_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
_SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PRESETS = {
    "turbo": TransformerConfig.turbo,
    "small": TransformerConfig.small,
    "tiny": TransformerConfig.tiny,
}
KNOWN_SOURCES = (
    "a diffusers folder (its root or its transformer/), a .safetensors file with a config.json beside it, "
    f"'digits', or {', '.join(repr(f'synthetic:{name}') for name in _PRESETS)}"
)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `start` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return self.end - self.start


@dataclass(frozen=True)
class SourceInfo:
    """A checkpoint source: its config, its tensors by published name (none for a synthetic source), what it is.

    kind says whether the weights were trained or are synthetic; quantization is the `quantization` entry of its config.
    """

    source: str
    kind: Literal["trained", "synthetic"]
    config: TransformerConfig
    tensors: dict[str, TensorInfo] = field(repr=False)
    quantization: dict[str, Any] | None = None
    folder: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def captions(self) -> Path | None:
        """The file beside the config that holds label embeddings, as a digits model has it; None without one."""
        path = None if self.folder is None else self.folder / "captions.safetensors"
        return path if path is not None and os.path.isfile(path) else None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored; 0 for a synthetic source, which stores none."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes, as safetensors names them."""
        return sorted({t.dtype for t in self.tensors.values()})

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config and every tensor's name, dtype, shape and bytes, whichever files hold them.

        Label embeddings beside them are part of it.

        Raises WeightsError where a file can no longer be read.
        """
        total = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        if self.quantization is not None:
            total.update(json.dumps(self.quantization, sort_keys=True).encode())
        if not self.tensors:
            total.update(self.source.encode())
        with _readable(self.source):
            digests = sorted(_tensor_digests(self.tensors))
        for name, digest in digests:
            line = f"\n{name} {self.tensors[name].dtype} {list(self.tensors[name].shape)} {digest}"
            total.update(line.encode("utf-8", "surrogatepass"))
        if self.captions is not None:
            with _readable(self.source):
                total.update(b"\ncaptions " + hashlib.sha256(self.captions.read_bytes()).digest())
        return total.hexdigest()


def describe(source: str | Path) -> SourceInfo:
    """Find `source` and read its config and headers. Raises WeightsError or ConfigError when it is not a checkpoint.

    "digits" and the synthetic sources are what they say in every folder; a folder called digits is "./digits".
    """
    text = str(source)
    with _readable(text):
        scheme, _, preset = text.partition(":")
        if scheme == "synthetic" and preset in _PRESETS:
            return SourceInfo(text, "synthetic", _PRESETS[preset](), {})
        if text == "digits":
            return _folder(text, Path(str(files("zimage") / "digits" / "weights")))
        path = Path(os.path.expanduser(text))
        if text.strip() and path.is_dir():
            return _folder(text, path)
        if path.is_file():
            return _file(text, path)
    raise WeightsError(f"no checkpoint at {text!r}: a source is {KNOWN_SOURCES}")


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn what the operating system refuses into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{plain(error.filename or source)}: cannot be read: {error.strerror or error}") from None


def plain(name: object) -> str:
    """A name out of a file, fit for a line of text: without line breaks or odd characters, and not endless."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _folder(source: str, folder: Path) -> SourceInfo:
    if not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: no config.json here or in transformer/; give a diffusers folder of Z-Image")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        if len(indexes) > 1:
            raise WeightsError(f"{folder}: two indexes, {indexes[0].name} and {indexes[1].name}; keep one")
        return _info(source, folder, _sharded(indexes[0]))
    found = [folder / n for n in _SINGLE_FILES if (folder / n).is_file()]
    found = found or sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(found) != 1:
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
        names = ", ".join([path.name for path in found] or others) or "none"
        hint = "; zimage reads no pickles and no GGUF" if others and not found else ""
        raise WeightsError(
            f"{folder}: expected one .safetensors file or an index of several, found {plain(names)}{hint}"
        )
    return _info(source, folder, read_header(found[0]))


def _file(source: str, path: Path) -> SourceInfo:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: not a .safetensors file; zimage reads no pickles and no GGUF")
    if not (path.parent / "config.json").is_file():
        raise WeightsError(f"{path}: no config.json beside it; put the transformer's published config.json there")
    return _info(source, path.parent, read_header(path))


def _info(source: str, folder: Path, tensors: dict[str, TensorInfo]) -> SourceInfo:
    path = folder / "config.json"
    values = _json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    quantization = values.get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise ConfigError(f"{path}: quantization must be an object, found {plain(repr(quantization))}")
    _check_packing(path, quantization or {})
    try:
        config = TransformerConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {plain(error)}") from None
    kind: Literal["trained", "synthetic"] = "synthetic" if values.get("_weights_kind") == "synthetic" else "trained"
    return SourceInfo(source, kind, config, tensors, quantization, folder)


def _check_packing(path: Path, entry: dict[str, Any], where: str = "quantization") -> None:
    """Refuse a quantization entry, or that of a single layer in it, whose values could not be MLX's."""
    for name, value in entry.items():
        shown = f"{path}: {where}.{plain(name)}"
        if name in ("group_size", "bits"):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_GROUP:
                raise WeightsError(f"{shown} must be a positive integer, found {plain(repr(value))}")
        elif name == "mode":
            if not isinstance(value, str) or value not in _PACKING_MODES:
                raise WeightsError(f"{shown} must be one of {', '.join(_PACKING_MODES)}, found {plain(repr(value))}")
        elif isinstance(value, dict) and where == "quantization":
            _check_packing(path, value, f"{where}.{plain(name)}")


def _sharded(index: Path) -> dict[str, TensorInfo]:
    content = _json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map from tensor names to files")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(
                f"{index}: tensor {plain(name)} lies in {plain(repr(file))}, which is not a .safetensors file name"
            )
        if file not in headers:
            if not (index.parent / file).is_file():
                raise WeightsError(f"{index}: names {plain(file)}, which is not there; download the missing shard")
            headers[file] = read_header(index.parent / file)
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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises WeightsError where the header or the file's length is wrong."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise WeightsError(f"{path}: not a safetensors file, or cut short ({size} bytes); download it again")
        raw = f.read(length)
    header = _parse(raw, path)
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is not a JSON object; download the file again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise WeightsError(
                f"{path}: tensor {plain(name)} starts at byte {tensor.start}, expected {end}: an overlap or a gap"
            )
        end = tensor.end
    if end != size:
        raise WeightsError(f"{path}: {size} bytes long, expected {end}; download it again")
    return tensors


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    where = f"{path}: tensor {plain(name)}"
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise WeightsError(f"{where} has the unknown dtype {plain(repr(dtype))}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise WeightsError(
            f"{where} has shape {plain(repr(shape))} and data_offsets {plain(repr(offsets))}; the header is damaged"
        )
    found, expected = offsets[1] - offsets[0], prod(shape) * _ITEM_BYTES[dtype]
    if found != expected:
        raise WeightsError(f"{where} takes {found} bytes, expected {expected} for {dtype} {shape}")
    return TensorInfo(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(values: Any) -> bool:
    """Whether a header's list holds sizes or offsets that a real file can have."""
    return (
        isinstance(values, list)
        and len(values) <= _MOST_AXES
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _LARGEST_OFFSET for v in values)
    )


def _json(path: Path) -> Any:
    return _parse(path.read_bytes(), path)


def _parse(raw: bytes, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise WeightsError(f"{path}: the name {plain(name)} stands twice in one JSON object")
            values[name] = value
        return values

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON: {error}") from None


def _tensor_digests(tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    for path, names in by_file.items():
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            for name in names:
                yield name, hashlib.sha256(view[tensors[name].start : tensors[name].end]).hexdigest()
            view.release()
