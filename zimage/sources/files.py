"""Reading what checkpoint files say about themselves: JSON, safetensors headers, and where a name may lead."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from zimage.errors import WeightsError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The published header has 60 kB, one of ComfyUI's full checkpoints 200 kB. The format allows 100 MB, which as JSON
# can take gigabytes of memory.
LARGEST_JSON = 4_000_000
_LARGEST_OFFSET = 2**48
_MOST_AXES = 16


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: in `file` from byte `start` to `end`, there called `stored`.

    `first_row` is not zero, or `shape` has fewer rows than what is stored, where it is a part of a fused tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stored: str
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return self.end - self.start

    def rows(self, first: int, count: int) -> "TensorInfo":
        """The tensor's rows from `first` on, `count` of them."""
        size = self.nbytes // self.shape[0]
        start = self.start + first * size
        shape = (count, *self.shape[1:])
        return TensorInfo(self.file, self.dtype, shape, start, start + count * size, self.stored, first)


@dataclass(frozen=True)
class Header:
    """A safetensors file's tensors by name, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]


@contextmanager
def readable(source: object) -> Iterator[None]:
    """Turn what the operating system refuses into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{plain(error.filename or source)}: cannot be read: {error.strerror or error}") from None


def plain(name: object) -> str:
    """A name out of a file, fit for a line of text: without line breaks or odd characters, and not endless."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 500 else f"{text[:500]}..."


def inside(path: Path, root: Path) -> Path:
    """`path`, unless a link leads it out of the folder `root`: then WeightsError.

    In a snapshot of the Hugging Face cache files are links into the repository's own blobs; where those lie, for
    instance in a store that several repositories share, is the library's affair.
    """
    real = root.resolve()
    snapshot = next((f for f in (real, *real.parents) if f.parent.name == "snapshots"), None)
    if snapshot is not None and snapshot.parent.parent.name.startswith("models--") and path.is_symlink():
        blobs, target = snapshot.parent.parent / "blobs", Path(os.path.realpath(path.parent)) / os.readlink(path)
        if Path(os.path.normpath(target)).parent == blobs:
            return path
    if not path.resolve().is_relative_to(real):
        raise WeightsError(
            f"{plain(path)}: a link out of the checkpoint's folder, to {plain(path.resolve())}; "
            "name that file itself or its folder, or copy it here"
        )
    return path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises WeightsError where the header or the file's length is wrong."""
    return read_whole_header(path).tensors


def read_whole_header(path: Path) -> Header:
    """The tensors and the metadata of a safetensors file. Raises WeightsError where it is not a sound one."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > size - 8:
            raise WeightsError(
                f"{path}: not a safetensors file, or cut short ({size} bytes, a header of {length if size >= 8 else 0} "
                f"announced){_resembles(head)}; download it again"
            )
        if length > LARGEST_JSON:
            raise WeightsError(
                f"{path}: a header of {length} bytes, expected at most {LARGEST_JSON}; not a checkpoint of this model"
            )
        raw = f.read(length)
    if len(raw) < length:
        raise WeightsError(f"{path}: cut short while it was read; try again")
    header = parse_json(raw, path)
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is not a JSON object; download the file again")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise WeightsError(
                f"{path}: tensor {plain(name)} starts at byte {tensor.start}, expected {end}: an overlap or a gap; "
                "download the file again"
            )
        end = tensor.end
    if end != size:
        raise WeightsError(f"{path}: {size} bytes long, expected {end}; download it again")
    return Header(tensors, metadata if isinstance(metadata, dict) else {})


def _resembles(head: bytes) -> str:
    """What else a file that begins with `head` may be."""
    if head[:4] == b"GGUF":
        return ", it is a GGUF file"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return ", it looks like a pickle"
    return ""


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    where = f"{path}: tensor {plain(name)}"
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise WeightsError(f"{where} has the unknown dtype {plain(repr(dtype))}; download the file again")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise WeightsError(
            f"{where} has shape {plain(repr(shape))} and data_offsets {plain(repr(offsets))}; the header is damaged, "
            "download the file again"
        )
    found, expected = offsets[1] - offsets[0], prod(shape) * ITEM_BYTES[dtype]
    if found != expected:
        raise WeightsError(
            f"{where} takes {found} bytes, expected {expected} for {dtype} {shape}; download the file again"
        )
    return TensorInfo(path, dtype, tuple(shape), base + offsets[0], base + offsets[1], name)


def _naturals(values: Any) -> bool:
    """Whether a header's list holds sizes or offsets that a real file can have."""
    return (
        isinstance(values, list)
        and len(values) <= _MOST_AXES
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _LARGEST_OFFSET for v in values)
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises WeightsError where it is none, names something twice or is far too long."""
    with path.open("rb") as f:
        raw = f.read(LARGEST_JSON + 1)
    if len(raw) > LARGEST_JSON:
        raise WeightsError(f"{path}: longer than {LARGEST_JSON} bytes, which no checkpoint's JSON is")
    return parse_json(raw, path)


def parse_json(raw: bytes, path: Path) -> Any:
    """JSON as it stands in `path`. Raises WeightsError where it is none or names something twice in one object."""

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
        raise WeightsError(f"{path}: not valid JSON: {plain(error)}") from None
