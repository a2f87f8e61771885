"""LoRA adapters on disk, made without MLX in every tool's naming, for tests of reading and applying them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage import adapters
from zimage.config import TransformerConfig

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]  # down [rank, in], up [out, rank]
CONFIG = TransformerConfig.tiny(
    dim=192, n_heads=6, n_kv_heads=2, axes_dims=(8, 12, 12), n_layers=2, n_refiner_layers=1, cap_feat_dim=64
)
BLOCK = "layers.1"
STYLES: dict[str, Callable[[str], tuple[str, str, str]]] = {
    "diffusers": lambda m: _named(f"transformer.{m}", "lora_A", "lora_B"),
    "PEFT": lambda m: _named(f"base_model.model.{m}", "lora_A", "lora_B"),
    "PEFT of a pipeline": lambda m: _named(f"base_model.model.transformer.{m}", "lora_A.default", "lora_B.default"),
    "ComfyUI": lambda m: _named(f"diffusion_model.{m}", "lora_A", "lora_B"),
    "ComfyUI, down and up": lambda m: _named(f"diffusion_model.{m}", "lora_down", "lora_up"),
    "no prefix": lambda m: _named(m, "lora_A", "lora_B"),
    "a named adapter": lambda m: _named(m, "lora_A.default", "lora_B.default"),
    "Kohya": lambda m: _named("lora_unet_" + m.replace(".", "_"), "lora_down", "lora_up"),
    "Kohya, dots": lambda m: _named("lora_unet_" + m.replace(".", "_"), "lora.down", "lora.up"),
    "dots": lambda m: _named(f"transformer.{m}", "lora.down", "lora.up"),
}
_DTYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<u2": "BF16", "<i8": "I64", "<i4": "I32", "|i1": "I8"}


def _named(module: str, down: str, up: str) -> tuple[str, str, str]:
    return f"{module}.{down}.weight", f"{module}.{up}.weight", f"{module}.alpha"


def pairs(config: TransformerConfig = CONFIG, rank: int = 4, seed: int = 0, only: str = "") -> dict[str, Pair]:
    """Seeded fp32 pairs for every linear layer whose path has `only` in it."""
    rng = np.random.default_rng(seed)
    return {
        path: (
            rng.standard_normal((rank, width)).astype(np.float32) * np.float32(0.3 * width**-0.5),
            rng.standard_normal((rows, rank)).astype(np.float32),
        )
        for path, (rows, width) in adapters.linears(config).items()
        if only in path
    }


def named(found: Mapping[str, Pair], style: str = "diffusers", alpha: float | None = None) -> dict[str, Array]:
    """The tensors of a file in one of STYLES, with alphas or without."""
    tensors: dict[str, Array] = {}
    for module, (down, up) in found.items():
        names = STYLES[style](module)
        tensors |= {names[0]: down, names[1]: up}
        if alpha is not None:
            tensors[names[2]] = np.float32(alpha)
    return tensors


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, Any] | None = None) -> Path:
    """A safetensors file; 16-bit unsigned values are stored as the bits of bf16."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, values in tensors.items():
        array = np.asarray(values)
        end = len(data) + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.str], "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def delta(pair: Pair, factor: float = 1.0) -> NDArray[np.float64]:
    """What a pair adds to a weight, in fp64."""
    down, up = pair
    return factor * up.astype(np.float64) @ down.astype(np.float64)
