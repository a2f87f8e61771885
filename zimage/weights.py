"""Strict loading of a checkpoint into a model, layer by layer, and turning one checkpoint into another.

Files are read straight into the arrays that the model keeps. What is cast, merged or packed is let go as soon as its
result is there, so a model that is packed while it loads needs little more memory than its packed size.
"""

import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from zimage import adapters, backend, layers, recipes, transforms
from zimage.errors import InputError, WeightsError
from zimage.measure import memory
from zimage.recipes import Asked, Packing
from zimage.saving import Advance, config_of, require_free, save_tensors, save_transformer
from zimage.sources import SourceInfo, TensorInfo, describe, plain
from zimage.transformer import Transformer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

__all__ = ["Unread", "check_values", "convert", "describe", "load_transformer", "require_free", "save_transformer"]

Lora = Sequence[tuple[str | Path, float]]
# Streams that read at once, on CUDA only. Into unified memory 12 GB took an H100's host 6.5 s with one, 1.8 with four
# and with eight; two CPU cores take a sixth longer with four than with one.
_LANES = 4
_GROUP_BYTES = 2**29
_OWN = threading.local()  # MLX's streams belong to the thread that made them
_NAN_BYTES = {"mxfp8": (0x7F, 0xFF), "nvfp4": (0x7F, 0xFF), "mxfp4": (0xFF,)}  # of scales: fp8 e4m3, and e8m0 for mxfp


def load_transformer(
    source: str | Path,
    dtype: str | None = None,
    quantization: Asked | None = None,
    lora: Lora = (),
    check_values: bool = False,
    advance: Advance = lambda _: None,
) -> Transformer:
    """The transformer stored at `source`, evaluated and ready to run.

    source: whatever `describe` finds: a diffusers folder (its root or its transformer/), one .safetensors file,
    "ollama:NAME[:TAG]", "org/name" in the Hugging Face cache, "digits" (ships with the package), or "synthetic:turbo",
    "synthetic:block" (one block of each kind), "synthetic:small", "synthetic:tiny" (seeded, no files).
    dtype: "bfloat16", "float32", or None for what suits the device; a checkpoint that is quantized keeps its own then.
    quantization: a name or recipe that `transforms.quantize` takes, or None.
    lora: adapters as (file, scale) pairs; merged into floating-point weights before they are packed, and kept beside
    weights that are stored packed.
    check_values: look at every stored value first, and refuse NaN and infinity.
    advance: told of the bytes of the model that are ready.

    Raises WeightsError for a missing, unexpected or wrongly shaped tensor, ConfigError for a bad config and InputError
    for a dtype, quantization or recipe that cannot be used, and, before anything is allocated, for weights that are
    more than the device's whole memory, unless the environment variable ZIMAGE_FORCE is 1.
    """
    info = describe(source)
    wanted, target = _asked(info, dtype, quantization)
    _require_room(info, wanted, target)
    model = _lazy(info, wanted, target, lora)
    if check_values:
        _check_values(info)
    with _named(info):
        # What is packed or cast leaves something behind, and goes layer by layer; what is only read, in larger groups.
        for part in _parts(model, _GROUP_BYTES if not wanted and not lora else 0):
            mx.eval(part)
            advance(sum(array.nbytes for array in part))
            if wanted:
                mx.clear_cache()
    return transforms.adapt(model, lora) if lora and info.packing else model


def convert(
    source: str | Path,
    directory: str | Path,
    dtype: str | None = None,
    quantization: Asked | None = None,
    lora: Lora = (),
    check_values: bool = False,
    progress: Callable[[int], Advance] = lambda _: lambda _: None,
) -> Path:
    """Load `source` as `load_transformer` does and save it as a folder, a tensor at a time; give the folder's path.

    A digits model stays one: its label embeddings are copied. progress is told how many bytes will be written, and what
    it gives is told of those that are. Raises InputError too for adapters beside weights that are stored packed.
    """
    require_free(directory)
    info = describe(source)
    if lora and info.packing:
        raise InputError(
            f"{info.source} is quantized, and no checkpoint can hold a LoRA beside packed weights; convert its "
            "floating-point weights with --lora and --quantization"
        )
    model = _lazy(info, *_asked(info, dtype, quantization), lora)
    if check_values:
        _check_values(info)
    config, tensors = config_of(model, info.kind), transforms.tensors(model)
    del model  # the tensors are then the only ones to hold what they need, and are let go one by one
    with _named(info):
        advance = progress(sum(array.nbytes for array in tensors.values()))
        return save_tensors(tensors, config, directory, info.captions, advance)


@dataclass(frozen=True)
class Unread:
    """A source with files, found well, of which nothing was read yet; it is read as often as wanted.

    target: what floating-point values are cast to; None for not at all.
    """

    info: SourceInfo
    target: mx.Dtype | None

    @classmethod
    def of(cls, source: str | Path, dtype: str | None = None) -> "Unread":
        """Of a source as `load_transformer` takes it, which must have files. Raises as that does, but for memory."""
        info = describe(source)
        if not info.tensors:
            raise InputError(f"{info.source} has no files to read; write them first: zimage convert {info.source} DIR")
        _, target = _asked(info, dtype, None)
        return cls(info, target)

    def model(self) -> Transformer:
        """A new model of it, not read."""
        return _lazy(self.info, {}, self.target, ())

    def files(self, path: str) -> list[Path]:
        """The files that hold the module at `path`, such as "layers.0"."""
        return self._part(path).files

    def arrays(self, path: str) -> dict[str, mx.array]:
        """New arrays of the module at `path`, by their names below it, not read before they are used."""
        found = _stored(self._part(path), self.target)
        return {name.removeprefix(f"{path}."): array for name, array in found.items()}

    def read(self, arrays: Sequence[mx.array]) -> None:
        """Read these arrays now. Raises WeightsError where a file cannot be read."""
        with _named(self.info):
            mx.eval(arrays)

    def _part(self, path: str) -> SourceInfo:
        tensors = {name: tensor for name, tensor in self.info.tensors.items() if name.startswith(f"{path}.")}
        return replace(self.info, tensors=tensors)


def check_values(source: str | Path) -> None:
    """Read every stored value of `source` and raise WeightsError for the first tensor with NaN or infinity."""
    info = describe(source)
    info.check()
    _check_values(info)


def _asked(info: SourceInfo, dtype: str | None, quantization: Asked | None) -> tuple[Packing, mx.Dtype | None]:
    """How to pack each layer, and what to cast to, None for not at all, of a source whose tensors are found well."""
    recipe = None if quantization is None else recipes.read(quantization)
    if recipe is not None and info.packing:
        raise InputError(f"{info.source} is quantized already; quantize the floating-point weights instead")
    if dtype is None and not info.keeps_dtype:
        dtype = backend.default_dtype()
    target = None if dtype is None else transforms.parse_dtype(dtype)
    info.check()
    return recipes.packing(info.config, recipe), target


def _require_room(info: SourceInfo, wanted: Packing, target: mx.Dtype | None) -> None:
    way = "" if wanted or info.packing else 'pack them (quantization="4bit"), or '
    require_room(f"{info.source}: its weights", info.loaded_bytes(None if target is None else target.size, wanted), way)


def require_room(what: str, need_bytes: int, way: str) -> None:
    """Raise InputError where weights alone are more than the device has in all, unless ZIMAGE_FORCE is 1.

    What is free at the moment is no measure: caches take it and give it back. what, way: words of the line.
    """
    total = memory.device()["memory_bytes"]
    if total is not None and need_bytes > total and os.environ.get("ZIMAGE_FORCE") != "1":
        raise InputError(
            f"{what} take {need_bytes:,} bytes, more than the device's {total:,}; {way}set ZIMAGE_FORCE=1 to try all "
            "the same"
        )


def _lazy(info: SourceInfo, wanted: Packing, target: mx.Dtype | None, lora: Lora) -> Transformer:
    """The model that was asked for, nothing of it read or computed yet."""
    info.verify()
    updates = {} if info.packing else adapters.read_all(lora, info.config)
    if not info.tensors:
        model = Transformer(info.config, dtype=target or mx.float32)
    else:
        model = Transformer(info.config)
        transforms.pack(model, lambda path, _: info.packing.get(path))
        model.load_weights(list(_stored(info).items()))

    def made(path: str, layer: nn.Module) -> nn.Module:
        if path in updates:  # in fp32, to be rounded once, to the dtype that was asked for
            layer.weight = transforms.merged(layer.weight.astype(mx.float32), updates[path])
        if target is not None:
            _cast(layer, target)
        if path not in wanted:
            return layer
        packed = layers.packed(layer, wanted[path])
        dict.clear(layer)  # MLX's modules are dicts; the weights must not outlive their packing
        return packed

    model.update_modules(tree_map_with_path(made, model.leaf_modules(), is_leaf=nn.Module.is_module))
    if target is not None:
        _cast(model, target)
    return model


def _cast(module: nn.Module, target: mx.Dtype) -> None:
    """Cast the module's own floating-point arrays, lazily and in place."""
    for name, array in module.items():
        if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating) and array.dtype != target:
            module[name] = array.astype(target)


def _parts(model: Transformer, group_bytes: int) -> Iterator[list[mx.array]]:
    """The model's arrays, a layer at a time, or as many layers as have `group_bytes`."""
    group, size = [model.x_pad_token, model.cap_pad_token], 0
    for _, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        arrays = [array for _, array in tree_flatten(layer.parameters())]
        group += arrays
        size += sum(array.nbytes for array in arrays)
        if size > group_bytes:
            yield group
            group, size = [], 0
    yield group


def _stored(info: SourceInfo, target: mx.Dtype | None = None) -> dict[str, mx.array]:
    """The source's tensors, not read before they are used, and then several at a time.

    target: what floating-point ones are cast to, on the stream that reads them: on the device's own, what is computed
    there meanwhile would come after the cast, and wait for the disk.
    """
    _allow_open_files(len(info.files) + _LANES**2)
    lanes = _LANES if mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available() else 1
    streams, lane_of = _streams(), {path: i for i, path in enumerate(info.files)}
    contents: dict[tuple[Path, int], dict[str, mx.array]] = {}
    arrays: dict[tuple[Path, str], tuple[mx.array, mx.Stream]] = {}
    found = {}
    for name, tensor in info.tensors.items():
        stored = (tensor.file, tensor.stored)
        if stored not in arrays:
            lane = (lane_of[tensor.file] if len(info.files) >= lanes else len(arrays)) % lanes
            content = contents.get((tensor.file, lane))
            if content is None:
                content = contents[tensor.file, lane] = _load(tensor.file, streams[lane])
            arrays[stored] = content[tensor.stored], streams[lane]
        array, stream = arrays[stored]
        with mx.stream(stream):
            own = _rows(array, tensor)
            if target is not None and mx.issubdtype(own.dtype, mx.floating):
                own = own.astype(target)
            found[name] = own
    return found


def _streams() -> list[mx.Stream]:
    """This thread's streams to read files in: fresh memory is handed out faster to several at a time."""
    if not hasattr(_OWN, "streams"):
        _OWN.streams = [mx.new_stream(mx.cpu) for _ in range(_LANES)]
    return list(_OWN.streams)


def _load(path: Path, stream: mx.Stream | None = None) -> dict[str, mx.array]:
    try:
        content = mx.load(str(path), format="safetensors", stream=stream)
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read: {plain(error)}") from None
    assert isinstance(content, dict)
    return content


def _rows(array: mx.array, tensor: TensorInfo) -> mx.array:
    """The tensor's own rows of the array that is stored, without a copy."""
    if array.shape == tensor.shape:
        return array
    return array[tensor.first_row : tensor.first_row + tensor.shape[0]]


def _allow_open_files(count: int) -> None:
    """Let this process have as many files open as a store of single tensors needs; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class _named:
    """Turn MLX's error at a file that cannot be read into one that names the source."""

    def __init__(self, info: SourceInfo) -> None:
        self.info = info

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and "[read]" in str(error):
            raise WeightsError(
                f"{self.info.place}: cannot be read: {plain(error)}; did a file change while it was loaded?"
            ) from None


def _check_values(info: SourceInfo) -> None:
    """Raise WeightsError for NaN or infinity in any stored tensor; one is in memory at a time."""
    _allow_open_files(len(info.files))
    names = {(tensor.file, tensor.stored): name for name, tensor in info.tensors.items()}
    for path in info.files:
        content = _load(path)
        for stored in list(content):
            array = content.pop(stored)  # or what was read would stay
            bad = _not_finite(info, names[path, stored], array) if (path, stored) in names else None
            if bad is None:
                continue
            with _named(info):
                count = bad.sum().tolist()
            if count:
                first = int(np.flatnonzero(np.array(bad))[0])
                raise WeightsError(
                    f"{path}: tensor {plain(stored)} has {count:,} of {bad.size:,} values that are NaN or infinite, "
                    f"the first at {_index(first, bad.shape)}, expected none; download it again"
                )


def _not_finite(info: SourceInfo, name: str, array: mx.array) -> mx.array | None:
    """Where a tensor is NaN or infinite; None for packed weights, whose values their scales decide."""
    if mx.issubdtype(array.dtype, mx.floating):
        return ~mx.isfinite(array)
    path, _, leaf = name.rpartition(".")
    if leaf != "scales" or path not in info.packing:
        return None
    nans = _NAN_BYTES.get(info.packing[path].mode, ())
    return mx.any(mx.stack([array == byte for byte in nans]), axis=0) if nans else None


def _index(flat: int, shape: tuple[int, ...]) -> list[int]:
    index = []
    for length in reversed(shape):
        flat, at = divmod(flat, length)
        index.append(at)
    return index[::-1]
