"""The published checkpoint: its tensor names and shapes for any config, and the config that tensors imply."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zimage.config import TIMESTEP_HIDDEN, TIMESTEP_WIDTH, TransformerConfig
from zimage.errors import ConfigError, InputError
from zimage.sources.files import TensorInfo

Shape = tuple[int, ...]
PARTS = ("t_embedder", "x_embedder", "cap_embedder", "noise_refiner", "context_refiner", "layers", "final_layer")
BLOCKS = ("noise_refiner", "context_refiner", "layers")  # the parts whose linear layers are packed on request


def shapes(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    """Every tensor's name and shape, in the order of the forward pass."""
    D = config.dim
    yield from _linear("t_embedder.mlp.0", TIMESTEP_HIDDEN, TIMESTEP_WIDTH)
    yield from _linear("t_embedder.mlp.2", config.temb_dim, TIMESTEP_HIDDEN)
    for patch in config.all_patch_size:
        yield from _linear(f"all_x_embedder.{patch}-1", D, patch * patch * config.in_channels)
    yield "x_pad_token", (1, D)
    yield "cap_embedder.0.weight", (config.cap_feat_dim,)
    yield from _linear("cap_embedder.1", D, config.cap_feat_dim)
    yield "cap_pad_token", (1, D)
    for part, count in _depths(config).items():
        for i in range(count):
            for name, shape in _block(config, modulation=part != "context_refiner"):
                yield f"{part}.{i}.{name}", shape
    for patch in config.all_patch_size:
        yield from _linear(f"all_final_layer.{patch}-1.linear", patch * patch * config.in_channels, D)
        yield from _linear(f"all_final_layer.{patch}-1.adaLN_modulation.1", D, config.temb_dim)


def require_block_names(names: Sequence[str]) -> None:
    """Raise InputError unless these are names that blocks have, in whatever model, one at least."""
    known = f"blocks are {', '.join(f'{part}.N' for part in BLOCKS)} with N from 0, one at least"
    if not names:
        raise InputError(f"blocks must not be empty; {known}")
    for name in names:
        part, _, number = name.partition(".") if isinstance(name, str) else ("", "", "")
        if part not in BLOCKS or not re.fullmatch("0|[1-9][0-9]*", number):
            raise InputError(f"{name!r:.80} is no block; {known}")


def linears(config: TransformerConfig) -> dict[str, Shape]:
    """Path and weight shape [rows, width] of every linear layer."""
    return {
        name.removesuffix(".weight"): shape for name, shape in shapes(config) if len(shape) == 2 and name[-1] == "t"
    }


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, one of PARTS."""
    first = name.split(".")[0]
    renamed = {"all_x_embedder": "x_embedder", "x_pad_token": "x_embedder", "cap_pad_token": "cap_embedder"}
    return {**renamed, "all_final_layer": "final_layer"}.get(first, first)


def sizes_agree(config: TransformerConfig, tensors: Mapping[str, TensorInfo]) -> tuple[str, Shape] | None:
    """The first tensor, of those that bound a model's size, that is missing or of another shape; None where all fit.

    A look at these comes before the list of all names is made, which a config out of a file could make endless.
    """
    wanted: dict[str, Shape] = {"x_pad_token": (1, config.dim), "cap_embedder.0.weight": (config.cap_feat_dim,)}
    for patch in config.all_patch_size:
        wanted[f"all_x_embedder.{patch}-1.bias"] = (config.dim,)
        wanted[f"all_final_layer.{patch}-1.linear.bias"] = (patch * patch * config.in_channels,)
    for part, count in _depths(config).items():
        found = _count(tensors, part)
        if found < count:
            wanted[f"{part}.{found}.attention_norm1.weight"] = (config.dim,)
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            return name, shape
    return None


def implied_config(tensors: Mapping[str, TensorInfo]) -> TransformerConfig:
    """The config of a checkpoint that comes without one, from the shapes of its tensors.

    Rows of matrices and lengths of vectors are used, which packing leaves as they are. What shapes don't show
    (norm_eps, RoPE's constants, how a head's 128 values are shared out to the three axes) is the published model's.
    Raises ConfigError where the sizes cannot be had or the heads are not those of the published model.
    """

    def length(name: str) -> int:
        if name not in tensors or not tensors[name].shape:
            raise ConfigError(f"tensor {name} is missing, from which the size would be known")
        return tensors[name].shape[0]

    turbo = TransformerConfig.turbo()
    head_dim = length("layers.0.attention.norm_q.weight")
    if head_dim != turbo.head_dim:
        raise ConfigError(f"its attention heads are {head_dim} wide, not {turbo.head_dim} as in the published model")
    patches = sorted({int(m[1]) for m in map(re.compile(r"all_final_layer\.(\d{1,4})-1\.").match, tensors) if m})
    if not patches or not patches[0]:
        raise ConfigError("tensor all_final_layer.2-1.linear.bias is missing, from which the patch size would be known")
    return replace(
        turbo,
        all_patch_size=tuple(patches),
        all_f_patch_size=(1,) * len(patches),
        in_channels=length(f"all_final_layer.{patches[0]}-1.linear.bias") // patches[0] ** 2,
        dim=length("layers.0.attention_norm1.weight"),
        n_layers=_count(tensors, "layers"),
        n_refiner_layers=_count(tensors, "noise_refiner"),
        n_heads=length("layers.0.attention.to_q.weight") // head_dim,
        n_kv_heads=length("layers.0.attention.to_k.weight") // head_dim,
        cap_feat_dim=length("cap_embedder.0.weight"),
    )


def _depths(config: TransformerConfig) -> dict[str, int]:
    refiners = config.n_refiner_layers
    return {"noise_refiner": refiners, "context_refiner": refiners, "layers": config.n_layers}


def _count(tensors: Mapping[str, Any], part: str) -> int:
    """How many blocks of `part` there are, without a gap."""
    count = 0
    while f"{part}.{count}.attention_norm1.weight" in tensors:
        count += 1
    return count


def _linear(path: str, rows: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.weight", (rows, width)
    yield f"{path}.bias", (rows,)


def _block(config: TransformerConfig, modulation: bool) -> Iterator[tuple[str, Shape]]:
    D, queries, keys = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if modulation:
        yield from _linear("adaLN_modulation.0", 4 * D, config.temb_dim)
    yield "attention_norm1.weight", (D,)
    for name, rows in (("to_q", queries), ("to_k", keys), ("to_v", keys)):
        yield f"attention.{name}.weight", (rows, D)
    if config.qk_norm:
        yield "attention.norm_q.weight", (config.head_dim,)
        yield "attention.norm_k.weight", (config.head_dim,)
    yield "attention.to_out.0.weight", (D, queries)
    yield "attention_norm2.weight", (D,)
    yield "ffn_norm1.weight", (D,)
    for name, shape in (("w1", (config.hidden_dim, D)), ("w3", (config.hidden_dim, D)), ("w2", (D, config.hidden_dim))):
        yield f"feed_forward.{name}.weight", shape
    yield "ffn_norm2.weight", (D,)
