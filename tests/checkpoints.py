"""Small checkpoints on disk, made without MLX, for tests of sources and weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.parity.cases import weights
from zimage.config import TransformerConfig

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

CONFIG = TransformerConfig.tiny(n_layers=1, n_refiner_layers=1)
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
Tensors = dict[str, NDArray[np.float32]]


def tensors(config: TransformerConfig = CONFIG) -> Tensors:
    """Seeded fp32 values for every tensor of the config's model."""
    from zimage.transformer import Transformer

    from mlx.utils import tree_flatten

    return weights({name: array.shape for name, array in tree_flatten(Transformer(config).parameters())})


def write_config(folder: Path, config: TransformerConfig = CONFIG, **changes: Any) -> None:
    """config.json as diffusers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.42.1", **config.to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def write_single(folder: Path, values: Mapping[str, NDArray[Any]], name: str = SINGLE) -> Path:
    """A checkpoint folder with one file."""
    write_config(folder)
    save_file(dict(values), folder / name)
    return folder


def write_sharded(folder: Path, values: Mapping[str, NDArray[Any]], shards: int = 3) -> Path:
    """A checkpoint folder whose tensors are dealt out to several files, with an index."""
    write_config(folder)
    files = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(values)}
    for file in files:
        save_file({name: values[name] for name in values if where[name] == file}, folder / file)
    write_index(folder, where)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """The index of a sharded checkpoint."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header, also an impossible one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
