"""The hyper-parameters of a Z-Image transformer."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from zimage.errors import ConfigError

SEQUENCE_MULTIPLE = 32  # image and caption tokens of every item are padded to a multiple of this
TIMESTEP_WIDTH = 256  # width of the sinusoids, and the most a timestep embedding has
TIMESTEP_HIDDEN = 1024
QK_NORM_EPS = 1e-5  # fixed in the published model, independent of norm_eps
FINAL_NORM_EPS = 1e-6
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class TransformerConfig:
    """Every size and constant of a Z-Image transformer, named as in the published `transformer/config.json`.

    Raises ConfigError when a value has the wrong type or the sizes do not fit together.
    """

    all_patch_size: tuple[int, ...]
    all_f_patch_size: tuple[int, ...]
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    qk_norm: bool
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, int, int]
    axes_lens: tuple[int, int, int]
    siglip_feat_dim: int | None = None
    pixels_per_latent: int = 8

    def __post_init__(self) -> None:
        for name in ("all_patch_size", "all_f_patch_size", "axes_dims", "axes_lens"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        smallest = {"n_refiner_layers": 0}
        for name in (
            *("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim"),
            "pixels_per_latent",
        ):
            _integer(name, getattr(self, name), smallest.get(name, 1))
        for name in ("norm_eps", "rope_theta", "t_scale"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if not isinstance(self.qk_norm, bool):
            raise ConfigError(f"qk_norm must be true or false, found {self.qk_norm!r}")
        if self.siglip_feat_dim is not None:
            raise ConfigError(
                f"siglip_feat_dim is {self.siglip_feat_dim!r}: this is the omni variant of Z-Image, "
                "which zimage does not support; use a checkpoint where it is null"
            )
        self._check_fit()

    def _check_fit(self) -> None:
        if self.dim % self.n_heads:
            raise ConfigError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3:
            raise ConfigError(
                "axes_dims and axes_lens need three values each (frame, row, column), "
                f"found {list(self.axes_dims)} and {list(self.axes_lens)}"
            )
        if any(d % 2 for d in self.axes_dims):
            raise ConfigError(f"axes_dims must be even, found {list(self.axes_dims)}")
        if sum(self.axes_dims) != self.head_dim:
            raise ConfigError(
                f"axes_dims {list(self.axes_dims)} sum to {sum(self.axes_dims)}, "
                f"but dim / n_heads = {self.dim} / {self.n_heads} = {self.head_dim}"
            )
        if len(set(self.all_patch_size)) != len(self.all_patch_size):
            raise ConfigError(f"all_patch_size names a patch size twice: {list(self.all_patch_size)}")
        if self.all_f_patch_size != (1,) * len(self.all_patch_size):
            raise ConfigError(
                f"all_f_patch_size must be 1 for each of the {len(self.all_patch_size)} patch sizes "
                f"(images have one frame), found {list(self.all_f_patch_size)}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the SwiGLU feed-forward."""
        return int(self.dim / 3 * 8)

    @property
    def temb_dim(self) -> int:
        """Width of the timestep embedding that modulates the blocks."""
        return min(self.dim, TIMESTEP_WIDTH)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of an image of `height` x `width` pixels. Raises ConfigError if they don't divide."""
        step = self.pixels_per_latent
        for name, pixels in (("height", height), ("width", width)):
            if not isinstance(pixels, int) or pixels < 1 or pixels % step:
                raise ConfigError(f"{name} {pixels!r} is not a positive multiple of {step} pixels per latent")
        return height // step, width // step

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from a mapping such as a published `config.json`.

        Keys that start with `_` and the loader's `quantization` entries are ignored. Raises ConfigError for unknown or
        missing keys and for bad values.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config is a mapping of names to values, found {type(values).__name__}")
        ignored = ("quantization", "quantization_config")
        given = {k: v for k, v in values.items() if not str(k).startswith("_") and k not in ignored}
        names = [f.name for f in fields(cls)]
        unknown = [str(k) for k in given if k not in names]
        if unknown:
            raise ConfigError(f"unknown config key {', '.join(unknown)}; known are {', '.join(names)}")
        missing = [n for n in names if n not in given and n not in ("siglip_feat_dim", "pixels_per_latent")]
        if missing:
            raise ConfigError(f"missing config key {', '.join(missing)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values, readable by `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def turbo(cls) -> Self:
        """The published Z-Image-Turbo shape: 6,154,908,736 parameters in 521 tensors."""
        return cls(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2,
            n_heads=30, n_kv_heads=30, norm_eps=1e-5, qk_norm=True, cap_feat_dim=2560, rope_theta=256.0, t_scale=1000.0,
            axes_dims=(32, 48, 48), axes_lens=(1536, 512, 512),
        )  # fmt: skip

    @classmethod
    def block(cls) -> Self:
        """The published shape with one block of each kind, 551 million parameters, for small machines."""
        return replace(cls.turbo(), n_layers=1, n_refiner_layers=1)

    @classmethod
    def small(cls) -> Self:
        """The turbo architecture at a size for CPUs: 24 million parameters, the same patches and latents."""
        return replace(
            cls.turbo(), dim=384, n_layers=6, n_heads=6, n_kv_heads=6, cap_feat_dim=256, axes_dims=(16, 24, 24)
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """A model for tests that runs in milliseconds; `changes` replace single values."""
        values: dict[str, Any] = dict(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=48, rope_theta=256.0, t_scale=1000.0,
            axes_dims=(8, 12, 12), axes_lens=(256, 64, 64),
        )  # fmt: skip
        values.update(changes)
        if "n_kv_heads" not in changes:
            values["n_kv_heads"] = values["n_heads"]
        return cls(**values)


def _integer(name: str, value: Any, smallest: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= _LARGEST:
        raise ConfigError(f"{name} must be an integer of at least {smallest}, found {value!r}")
    return value


def _integers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{name} must be a list of integers, found {value!r}")
    return tuple(_integer(name, v) for v in value)


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or value > sys.float_info.max:
        raise ConfigError(f"{name} must be a positive number, found {value!r}")
    return float(value)
