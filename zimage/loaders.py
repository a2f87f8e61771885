"""Loaders of a checkpoint's files to compare: ours, and others that make arrays of the same bytes.

`python -m zimage.loaders NAME SOURCE DEVICE` runs one of them in a process of its own and reports what it cost;
`commands` gives these command lines. Every loader ends with all its arrays evaluated.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage import backend
from zimage.errors import InputError, ZImageError
from zimage.measure import reporting
from zimage.measure.loading import PLAIN_READ
from zimage.quantization import Quantization
from zimage.sources import SourceInfo, describe, linears, plain

_DTYPES = {"BF16": "bfloat16", "F32": "float32"}
_PACKED_PARTS = ("noise_refiner.", "context_refiner.", "layers.")
# In an interpreter that has no zimage. mflux 0.24 reads a folder with this class, before it renames what it read.
_MFLUX = """
from mflux.models.common.weights.loading.safetensors_reader import SafetensorsReader
import mlx.core as mx


def load():
    arrays = SafetensorsReader.read_directory(sys.argv[1])
    mx.eval(arrays)
    return arrays


report(load, lambda arrays: sum(array.nbytes for array in arrays.values()), mx.get_peak_memory)
"""


def commands(source: str | Path, device: str = "auto", mflux_python: str = "") -> dict[str, list[str]]:
    """The command line of every loader that can load `source`, by name; the plain read comes first.

    mflux_python: the path of an interpreter that has mflux, whose reader is then compared too; it needs one folder.
    Raises InputError for a source that has no files.
    """
    info = describe(source)
    if not info.tensors:
        raise InputError(f"{info.source} has no files that could be loaded; convert it to a folder first")
    info.check()
    own = [sys.executable, "-m", "zimage.loaders"]
    found = {PLAIN_READ: [sys.executable, "-m", "zimage.measure.plain_read", *_ranges(info)]}
    found |= {name: [*own, name, str(source), device] for name in LOADERS if _can(name, info)}
    folders = {file.parent for file in info.files}
    if mflux_python and len(folders) == 1 and all(file.suffix == ".safetensors" for file in info.files):
        code = Path(reporting.__file__).read_text(encoding="utf-8") + _MFLUX
        found["mflux"] = [mflux_python, "-E", "-c", code, str(folders.pop())]
    return found


def _ranges(info: SourceInfo) -> list[str]:
    """Where the tensors' bytes lie, as FILE START END over and over; what touches is one."""
    merged: list[tuple[Path, int, int]] = []
    for file, start, end in sorted({(t.file, t.start, t.end) for t in info.tensors.values()}):
        if merged and merged[-1][0] == file and merged[-1][2] == start:
            merged[-1] = (file, merged[-1][1], end)
        else:
            merged.append((file, start, end))
    return [str(word) for one in merged for word in one]


def _can(name: str, info: SourceInfo) -> bool:
    """Whether the loader called `name` can load the source."""
    if name == "safetensors":
        return "BF16" not in info.dtypes  # its arrays pass through NumPy, which has no bf16
    if name != "zimage 4bit":
        return True
    widths = [shape for path, shape in linears(info.config).items() if path.startswith(_PACKED_PARTS)]
    return not info.packing and all(Quantization.parse("4bit").shapes(*shape) is not None for shape in widths)


def _zimage(source: str, quantization: str | None = None) -> dict[str, Any]:
    from zimage.weights import load_transformer

    from mlx.utils import tree_flatten

    stored = describe(source).dtypes
    dtype = _DTYPES.get(stored[0]) if len(stored) == 1 else None
    return dict(tree_flatten(load_transformer(source, dtype, quantization).parameters()))


def _mlx(source: str) -> dict[str, Any]:
    import mlx.core as mx

    arrays: dict[str, Any] = {}
    for path in describe(source).files:
        content = mx.load(str(path), format="safetensors")
        assert isinstance(content, dict)
        arrays.update({f"{path}/{name}": array for name, array in content.items()})
    mx.eval(arrays)
    return arrays


def _safetensors(source: str) -> dict[str, Any]:
    import mlx.core as mx
    from safetensors.mlx import load_file

    arrays: dict[str, Any] = {}
    for path in describe(source).files:
        arrays.update({f"{path}/{name}": array for name, array in load_file(path).items()})
    mx.eval(arrays)
    return arrays


LOADERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "zimage": _zimage,
    "zimage 4bit": lambda source: _zimage(source, "4bit"),
    "mlx": _mlx,
    "safetensors": _safetensors,
}


def main(arguments: list[str]) -> int:
    """Run the loader and report; the exit status."""
    name, source, device = arguments
    try:
        backend.use_device(device)
        import zimage.weights  # noqa: F401 - what a loader imports is no part of its time

        import mlx.core as mx
        import safetensors.mlx  # noqa: F401

        def size(arrays: dict[str, Any]) -> int:
            return sum(array.nbytes for array in arrays.values())

        mx.eval(mx.zeros(1) + 1)  # nor is starting the device
        mx.reset_peak_memory()
        reporting.report(lambda: LOADERS[name](source), size, mx.get_peak_memory)
    except (ZImageError, ImportError) as error:
        print(plain(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
