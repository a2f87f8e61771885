"""Files that are written whole or not at all, and strict JSON."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage.errors import StoreError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of an experiment or a picture, each a file name
MAX_JSON_BYTES = 16 * 2**20


ELSEWHERE = "choose another folder with --results"


def refused(path: Path, what: str, error: OSError, advice: str = ELSEWHERE) -> StoreError:
    """What the operating system said about `path`, in one line that says how to go on."""
    return StoreError(f"{path}: {what}: {error.strerror or error}; {advice}")


def write_atomically(path: Path, write: Callable[[Path], object], advice: str = ELSEWHERE) -> None:
    """Let `write` fill a temporary sibling of `path`, then put it in place in one step, synced to disk.

    Raises StoreError, with `advice` at its end, if the place cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    except OSError as error:
        raise refused(path, "cannot be written", error, advice) from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force the file or folder `path` onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under `folder` onto the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as strict JSON (NaN and infinities are refused) in one step."""
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path}: not writable as JSON: {error}") from None
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises StoreError, one line, for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StoreError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, which is no file of this store")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return content


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
