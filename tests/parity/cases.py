"""Configs and inputs chosen to hurt: what the parity tests and the golden tensors are made from. Needs NumPy only."""

from dataclasses import dataclass, field
from typing import Any

from zimage.config import TransformerConfig

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A tiny config with one batch: latent rows and columns, caption token counts, patch size."""

    name: str
    size: tuple[int, int]
    captions: tuple[int, ...]
    patch: int = 2
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> TransformerConfig:
        """The case's config."""
        return TransformerConfig.tiny(**self.config)


CASES = (
    Case("plain", (8, 8), (32,)),
    Case("odd_token_count", (6, 14), (7,)),
    Case("non_square", (4, 24), (33,)),
    Case("patch_1", (5, 9), (20,), patch=1, config={"all_patch_size": (1,)}),
    Case(
        "two_patch_sizes", (6, 6), (3, 3), patch=1,
        config={"all_patch_size": (1, 2), "all_f_patch_size": (1, 1)},
    ),
    Case("one_head", (8, 8), (32,), config={"dim": 32, "n_heads": 1}),
    Case("many_heads", (8, 8), (11,), config={"dim": 128, "n_heads": 8, "axes_dims": (4, 6, 6)}),
    Case("no_refiners", (8, 10), (9,), config={"n_refiner_layers": 0}),
    Case("deep", (8, 8), (9,), config={"n_layers": 6, "n_refiner_layers": 2}),
    Case("no_qk_norm", (8, 8), (17,), config={"qk_norm": False}),
    Case("norm_eps", (8, 8), (17,), config={"norm_eps": 0.05}),
    Case("rope_theta", (8, 12), (17,), config={"rope_theta": 10000.0}),
    Case("t_scale", (8, 8), (17,), config={"t_scale": 37.0}),
    Case("ragged_batch_of_3", (8, 10), (1, 33, 70)),
    Case("caption_of_1", (8, 8), (1,)),
    Case("batch_of_2_equally_padded", (6, 8), (5, 30)),
    Case("wide", (8, 8), (12,), config={"dim": 384, "n_heads": 6, "axes_dims": (16, 24, 24), "in_channels": 16}),
    Case("grouped_queries", (8, 6), (5, 40), config={"n_heads": 4, "n_kv_heads": 2, "axes_dims": (4, 6, 6)}),
    Case("one_kv_head", (8, 8), (9,), config={"n_heads": 4, "n_kv_heads": 1, "axes_dims": (4, 6, 6)}),
)  # fmt: skip
# Heads as wide as the published model's and enough depth for rounding to add up. Only for bf16: too big for a golden.
MID_SIZED = Case(
    "mid_sized", (16, 24), (40,),
    config={"dim": 512, "n_heads": 4, "n_layers": 6, "axes_dims": (32, 48, 48), "in_channels": 16, "cap_feat_dim": 256},
)  # fmt: skip

BOUND_AT_A_STAGE = 3e-5  # relative L2 in fp32
BOUND_AT_THE_OUTPUT = 1e-5


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Seeded fp32 tensors for every name; norms and pad tokens too, because their initial values hide errors."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = shapes[name]
        noise = rng.standard_normal(shape)
        if name.endswith("pad_token"):
            value = noise
        elif len(shape) == 2:
            value = noise * shape[1] ** -0.5
        elif name.endswith("bias"):
            value = noise * 0.1
        else:
            value = 1 + 0.3 * noise
        tensors[name] = value.astype(np.float32)
    return tensors


def inputs(case: Case, seed: int = 1) -> tuple[Array, Array, list[Array]]:
    """Seeded latents [B, C, H, W], timesteps [B] and captions [L_i, F]."""
    rng = np.random.default_rng(seed)
    config = case.transformer
    B = len(case.captions)
    latents = rng.standard_normal((B, config.in_channels, *case.size)).astype(np.float32)
    timestep = rng.uniform(0.02, 0.98, B).astype(np.float32)
    captions = [rng.standard_normal((n, config.cap_feat_dim)).astype(np.float32) for n in case.captions]
    return latents, timestep, captions


def repeat_kv(tensors: dict[str, Array], config: TransformerConfig) -> dict[str, Array]:
    """The same tensors with the rows of K and V repeated, for a model with as many of their heads as query heads."""
    times = config.n_heads // config.n_kv_heads

    def repeated(value: Array) -> Array:
        heads = value.reshape(config.n_kv_heads, config.head_dim, -1)
        return np.repeat(heads, times, axis=0).reshape(config.dim, -1)

    kv = (".to_k.weight", ".to_v.weight")
    return {name: repeated(value) if name.endswith(kv) else value for name, value in tensors.items()}


def to_bfloat16(values: Array) -> Array:
    """`values` rounded to the nearest bfloat16 (ties to even), still held in fp32."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def relative_l2(found: Array, wanted: Array) -> float:
    """||found - wanted|| / ||wanted|| in fp64."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def first_beyond(found: dict[str, Array], wanted: dict[str, Array]) -> str | None:
    """The first stage, in the order of `found`, whose relative L2 error exceeds its bound, in words; None if none."""
    for name, array in found.items():
        bound = BOUND_AT_THE_OUTPUT if name == "velocity" else BOUND_AT_A_STAGE
        error = relative_l2(array, wanted[name]) if array.shape == wanted[name].shape else np.inf
        if not error <= bound:
            return f"{name}: relative L2 error {error:.2e}, at most {bound:.0e} allowed"
    return None
