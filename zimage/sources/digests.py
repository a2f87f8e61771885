"""Digests of weights: computed from their bytes, and kept in the user's cache folder until a file changes."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage import blas
from zimage.errors import WeightsError
from zimage.sources.files import TensorInfo, plain, readable

if TYPE_CHECKING:
    from zimage.sources.info import SourceInfo

_FORMAT = 1  # of what is kept; raise it when what it means changes
_CHUNK = 4 << 20
_SETTLED_S = 2.0  # a file changed since might change again without its times showing it
_THREADS = min(4, os.cpu_count() or 1)


def of_source(info: "SourceInfo") -> str:
    """The digest of a source, see `SourceInfo.digest`."""
    meaning = {
        "config": info.config.to_dict(),
        "packing": {path: str(packed) for path, packed in sorted(info.packing.items())},
        **({} if info.tensors else {"source": info.source}),
    }
    captions = [] if info.captions is None else [info.captions]
    ranges = {n: [str(t.file), t.start, t.end, t.dtype, list(t.shape)] for n, t in sorted(info.tensors.items())}

    def compute() -> str:
        total = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
        names = sorted(info.tensors)
        with readable(info.source), ThreadPoolExecutor(_THREADS) as pool:
            for name, digest in zip(names, pool.map(_tensor_digest, map(info.tensors.__getitem__, names)), strict=True):
                tensor = info.tensors[name]
                total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {digest}".encode("utf-8", "surrogatepass"))
            for path in captions:
                total.update(b"\ncaptions " + _file_digest(path).encode())
        return total.hexdigest()

    if not info.tensors:
        return compute()
    return _kept([*info.files, *captions], [meaning, ranges], compute)


def verify(hashes: Mapping[Path, str]) -> None:
    """Raise WeightsError for the first file whose SHA-256 is not the one that `hashes` has for it."""

    def found(path: Path) -> str:
        with readable(path):
            return _kept([path], "file", lambda: _file_digest(path))

    with ThreadPoolExecutor(_THREADS) as pool:
        for path, digest in zip(hashes, pool.map(found, hashes), strict=True):
            if digest != hashes[path]:
                raise WeightsError(
                    f"{path}: its SHA-256 is {digest}, expected {hashes[path]}; the file is damaged, pull the model "
                    "again"
                )


def _tensor_digest(tensor: TensorInfo) -> str:
    return _range_digest(tensor.file, tensor.start, tensor.end)


def _file_digest(path: Path) -> str:
    return _range_digest(path, 0, path.stat().st_size)


def _range_digest(path: Path, start: int, end: int) -> str:
    """SHA-256 of a part of a file, read in pieces: a mapped file that shrinks would end the process."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        f.seek(start)
        buffer = memoryview(bytearray(min(_CHUNK, max(end - start, 1))))
        left = end - start
        while left:
            count = f.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise WeightsError(f"{plain(path)}: cut short while it was read; try again")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _kept(files: Iterable[Path], about: Any, compute: Callable[[], str]) -> str:
    """What `compute` gives, or gave before for the same files, unchanged since, and the same `about`."""
    files = list(files)
    folder = blas.cache_folder()
    with readable(files[0] if files else "the checkpoint"):
        before = [_state(path) for path in files]
    key = hashlib.sha256(json.dumps([_FORMAT, before, about], sort_keys=True).encode("utf-8", "replace")).hexdigest()
    place = None if folder is None else folder / "digests" / key
    if place is not None:
        with suppress(OSError, ValueError):
            text = place.read_text(encoding="ascii")
            if len(text) == 64 and set(text) <= set("0123456789abcdef"):
                return text
    digest = compute()
    settled = all(changed / 1e9 < time.time() - _SETTLED_S for state in before for changed in state[-2:])
    if place is not None and settled:
        with suppress(OSError):
            if [_state(path) for path in files] == before:
                _write(place, digest)
    return digest


def _state(path: Path) -> tuple[str, int, int, int, int, int]:
    """What changes when a file does."""
    found = path.stat()
    return str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(handle, "w", encoding="ascii") as f:
        f.write(text)
    os.replace(draft, place)
