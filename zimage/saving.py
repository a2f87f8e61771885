"""Writing a checkpoint folder, one tensor in memory at a time, whole or not at all."""

import glob
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage import transforms
from zimage.errors import InputError, WeightsError
from zimage.sources import plain, read_header
from zimage.transformer import Transformer

import mlx.core as mx

_NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32", mx.uint8: "U8"}
_FILE = "diffusion_pytorch_model.safetensors"
Advance = Callable[[int], None]


def save_transformer(
    model: Transformer, directory: str | Path, kind: str = "trained", captions: Path | None = None
) -> Path:
    """Save `model` as a folder with `config.json` and safetensors under the published names, unfused; give its path.

    kind says whether the weights are "trained" or "synthetic"; `captions` is a digits model's file of label embeddings,
    which is copied beside them. Nothing is left behind when saving fails. Raises
    WeightsError when the folder exists and is not empty, or cannot be written.
    """
    return save_tensors(transforms.tensors(model), config_of(model, kind), directory, captions)


def config_of(model: Transformer, kind: str) -> dict[str, Any]:
    """The content of the config.json of a saved model. Raises InputError for a kind that is not one of the two."""
    if kind not in ("trained", "synthetic"):
        raise InputError(f"kind must be 'trained' or 'synthetic', found {kind!r}")
    quantization = transforms.quantization_of(model)
    return {
        **({"_weights_kind": kind} if kind == "synthetic" else {}),
        "_class_name": "ZImageTransformer2DModel",
        **model.config.to_dict(),
        **({} if quantization is None else {"quantization": quantization}),
    }


def save_tensors(
    tensors: dict[str, mx.array],
    config: Mapping[str, Any],
    directory: str | Path,
    captions: Path | None = None,
    advance: Advance = lambda _: None,
) -> Path:
    """Save tensors by published name, computed one after the other and taken out of `tensors` as they are written.

    advance is told of the bytes written. Raises as `save_transformer` does.
    """
    target = Path(directory)
    require_free(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        _write(target, tensors, config, captions, advance)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, (OSError, RuntimeError)):  # MLX raises RuntimeError
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


def _write(
    target: Path, tensors: dict[str, mx.array], config: Mapping[str, Any], captions: Path | None, advance: Advance
) -> None:
    """Build the folder beside `target`, then put it in place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(array.nbytes for array in tensors.values()), shutil.disk_usage(target.parent).free
    if needed > free:
        raise WeightsError(f"{target}: needs {needed:,} bytes, and its disk has {free:,} free; choose another disk")
    _remove_abandoned(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        write_safetensors(partial / _FILE, tensors, advance)
        read_header(partial / _FILE)  # a full disk can cut a file short without an error
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if captions is not None:
            shutil.copyfile(captions, partial / "captions.safetensors")
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_safetensors(path: Path, tensors: dict[str, mx.array], advance: Advance = lambda _: None) -> None:
    """A safetensors file of `tensors`, which is empty afterwards: each is computed, written and let go."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]
        }  # fmt: skip
        end += array.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # tensors then begin at a multiple of eight bytes
    with path.open("wb", buffering=0) as f:
        _write_all(f.write, len(raw).to_bytes(8, "little") + raw)
        for name in list(tensors):
            array = mx.contiguous(tensors.pop(name)).view(mx.uint8)
            mx.eval(array)
            _write_all(f.write, memoryview(array).cast("B"))  # type: ignore[arg-type]
            advance(array.nbytes)
            del array
            mx.clear_cache()
        os.fsync(f.fileno())


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    """Write all of `data`, however little the system takes at a time."""
    view = memoryview(data)
    while view:
        view = view[write(view[: 1 << 26]) or 0 :]


def _remove_abandoned(target: Path) -> None:
    """Remove what a save to the same place left behind when its process was killed."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = folder.name.removesuffix(".partial").rpartition(".")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
