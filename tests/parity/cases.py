"""Configs and inputs chosen to hurt: what the parity tests and the golden tensors are made from. Needs NumPy only."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimage.config import TransformerConfig

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
)  # fmt: skip


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


def relative_l2(found: Array, wanted: Array) -> float:
    """||found - wanted|| / ||wanted|| in fp64."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
