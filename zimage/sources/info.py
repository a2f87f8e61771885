"""What is known of a checkpoint source without loading it, and whether its tensors are those of its config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from zimage.config import TransformerConfig
from zimage.errors import WeightsError
from zimage.quantization import Quantization, entry
from zimage.sources import digests, published
from zimage.sources.files import TensorInfo, plain
from zimage.sources.layouts import FLOATS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SourceInfo:
    """A checkpoint source: its config, its tensors by published name (none for a synthetic source), what it is.

    kind says whether the weights were trained or are synthetic. packing says of each quantized layer, by its path, how
    it is packed. hashes are the SHA-256 that whole files must have, where the source says so.
    """

    source: str
    kind: Literal["trained", "synthetic"]
    config: TransformerConfig
    tensors: dict[str, TensorInfo] = field(repr=False)
    packing: dict[str, Quantization] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    captions: Path | None = None
    hashes: dict[Path, str] = field(default_factory=dict, repr=False)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The packing as the `quantization` entry of a config.json has it; None where nothing is quantized."""
        return entry(self.packing)

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored; 0 for a synthetic source, which stores none."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes, as safetensors names them."""
        return sorted({t.dtype for t in self.tensors.values()})

    @property
    def keeps_dtype(self) -> bool:
        """Whether it is loaded as it is stored where no dtype is asked for: packed weights are, but for float16."""
        return bool(self.packing) and "F16" not in self.dtypes

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the config, the packing and every published tensor's name, dtype, shape and bytes.

        Which files they lie in, and under which tool's names, is no part of it; label embeddings beside them are. Kept
        in the user's cache folder until a file changes. Raises WeightsError where a file can no longer be read.
        """
        return digests.of_source(self)

    def verify(self) -> None:
        """Raise WeightsError where a file has not the SHA-256 that its source says, as Ollama's manifests do."""
        digests.verify(self.hashes)

    def parameters(self) -> dict[str, int]:
        """How many parameters each part of the model has, packed ones counted unpacked."""
        counts = dict.fromkeys(published.PARTS, 0)
        for name, shape in published.shapes(self.config):
            counts[published.part_of(name)] += math.prod(shape)
        return counts

    def loaded_bytes(self, item: int | None, packing: Mapping[str, Quantization] | None = None) -> int:
        """Bytes of the model when it is loaded, without loading it; to be asked once `check` has found it well.

        item: bytes of a floating-point value, None for as they are stored. packing: how layers are packed then that are
        not packed already, by their paths.
        """
        if item is None:
            return self.bytes
        total, packings = 0, {**(packing or {}), **self.packing}
        for name, shape in published.shapes(self.config):
            path = name.removesuffix(".weight")
            size = None
            if len(shape) == 2 and path != name:
                size = packings[path].stored_bytes(*shape, item) if path in packings else None
            total += math.prod(shape) * item if size is None else size
        return total

    def check(self) -> None:
        """Raise WeightsError unless names, shapes and dtypes of the tensors are exactly those that the config asks for.

        Sizes are compared first, so that a config that claims a million layers costs nothing.
        """
        if self.folder is None and not self.tensors:
            return
        different = published.sizes_agree(self.config, self.tensors)
        if different is not None:
            name, shape = different
            if name not in self.tensors:
                raise WeightsError(f"{self.place}: tensor {name} is missing, expected shape {list(shape)}")
            self._check_one(name, shape, FLOATS)
        expected = self._expected()
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            shape = expected[missing[0]][0]
            raise WeightsError(f"{self.place}: tensor {_first(missing)} is missing, expected shape {list(shape)}")
        extra = [name for name in self.tensors if name not in expected]
        if extra:
            file, stored = self.tensors[extra[0]].file, [self.tensors[name].stored for name in extra]
            raise WeightsError(
                f"{file}: tensor {_first(stored)} is unexpected: this config has no such tensor; "
                "use the config.json that came with the weights"
            )
        for name, (shape, dtypes) in expected.items():
            self._check_one(name, shape, dtypes)

    @property
    def place(self) -> Path | None:
        """The one weight file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.folder

    def _expected(self) -> dict[str, tuple[Shape, tuple[str, ...]]]:
        """Shape and possible dtypes of every tensor, packed ones as they are packed."""
        expected: dict[str, tuple[Shape, tuple[str, ...]]] = {}
        for name, shape in published.shapes(self.config):
            path = name.removesuffix(".weight")
            packed = self.packing.get(path) if len(shape) == 2 and path != name else None
            if packed is None:
                expected[name] = (shape, FLOATS)
                continue
            stored = packed.shapes(*shape)
            if stored is None:
                raise WeightsError(
                    f"{self.tensors[name].file}: layer {path} of shape {list(shape)} cannot be packed as {packed}; "
                    "mend the quantization in config.json"
                )
            scales = FLOATS if packed.mode == "affine" else ("U8",)
            dtypes = {"weight": ("U32",), "scales": scales, "biases": scales}
            expected |= {f"{path}.{leaf}": (own, dtypes[leaf]) for leaf, own in stored.items()}
        return expected

    def _check_one(self, name: str, shape: Shape, dtypes: tuple[str, ...]) -> None:
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise WeightsError(f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in dtypes:
            raise WeightsError(f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, expected {' or '.join(dtypes)}")


def packing_of(
    config: TransformerConfig, tensors: Mapping[str, TensorInfo], entries: Mapping[str, Any] | None
) -> dict[str, Quantization]:
    """How each layer that has scales is packed: as `entries`, a config's quantization, says, else as its shapes show.

    Raises WeightsError where shapes show nothing, and where there are entries but no scales.
    """
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if entries and not paths:
        raise WeightsError(
            f"{next(iter(tensors.values())).file if tensors else 'the checkpoint'}: no tensor has scales, though "
            "config.json has a quantization entry; remove the entry"
        )
    if not paths or published.sizes_agree(config, tensors) is not None:
        return {}  # `check` says what is wrong with the sizes
    widths = published.linears(config)
    found: dict[str, Quantization] = {}
    for path in paths:
        if path not in widths or f"{path}.weight" not in tensors:
            continue  # `check` finds these unexpected
        if entries:
            own = entries.get(path)
            values = {"mode": "affine", "bits": 4, "group_size": 64, **_packing(entries)}
            found[path] = Quantization(**{**values, **(_packing(own) if isinstance(own, dict) else {})})
            continue
        weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
        shown = Quantization.of_tensors(weight.shape, scales.shape, scales.dtype, widths[path][1])
        if shown is None:
            raise WeightsError(
                f"{weight.file}: tensor {path}.weight of shape {list(weight.shape)} with scales {list(scales.shape)} "
                f"({scales.dtype}) is no packing of MLX's for a layer of shape {list(widths[path])}; download it again"
            )
        found[path] = shown
    return found


def _packing(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entries[name] for name in ("group_size", "bits", "mode") if name in entries}


def _first(names: list[str]) -> str:
    return plain(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
