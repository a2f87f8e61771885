"""Fused projections as arms, each with the scopes on its way from the product to the step: data for `qkv_fusion`.

A fused product may be faster alone and the step no faster: what comes after reads its parts with strides, or copies
them first. Every arm is compared in one scope after the other, each of which holds the one before, with a baseline that
differs from it in nothing but the fusion. What may be asked for is known without MLX.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage.errors import InputError
from zimage.names import SCOPES, require_each_once

if TYPE_CHECKING:
    from zimage.transformer import Transformer

_QKV = ("qkv", "qkv_norm", "qkv_norm_rope", "attention", "block", "step")
_GATE_UP = ("gate_up", "gate_up_swiglu", "feed_forward", "block", "step")
BASELINES: dict[str, tuple[str, ...]] = {  # and the transforms that make it of the plain model
    "separate_qkv": (),
    "separate_qkv_kernel": ("fuse_norm_rope",),
    "separate_gate_up": (),
    "separate": (),
}


@dataclass(frozen=True)
class Arm:
    """The baseline that an arm is compared with, the transforms that make the arm, and its scopes."""

    baseline: str
    transforms: tuple[str, ...]
    scopes: tuple[str, ...]


ARMS: dict[str, Arm] = {
    "fused_qkv": Arm("separate_qkv", ("fuse_qkv",), _QKV),
    "fused_qkv_copied": Arm("separate_qkv", ("fuse_qkv", "fuse_qkv_copied"), _QKV),
    # One kernel for QK norm and RoPE, which takes the parts where the product left them, on both sides.
    "fused_qkv_kernel": Arm(
        "separate_qkv_kernel", ("fuse_qkv", "fuse_norm_rope"), tuple(name for name in _QKV if name != "qkv_norm")
    ),
    "fused_gate_up": Arm("separate_gate_up", ("fuse_gate_up",), _GATE_UP),
    "fused_both": Arm("separate", ("fuse_qkv", "fuse_gate_up"), ("block", "step")),
}


@dataclass(frozen=True)
class Family:
    """Arms that are compared with one baseline in one scope."""

    scope: str
    baseline: str
    arms: tuple[str, ...]

    @property
    def floor(self) -> tuple[str, tuple[str, ...]]:
        """What its noise floor is of: baselines of the same transforms compute the same, whatever they are called."""
        return self.scope, BASELINES[self.baseline]


def require_arms(names: Sequence[str]) -> None:
    """Raise InputError unless these are names of ARMS, each once, one at least."""
    require_each_once("arms", names, ARMS)


def require_scopes(scopes: Sequence[str]) -> list[str]:
    """The scopes that these names stand for. Raises InputError for what `families` refuses."""
    scopes = list(SCOPES) if scopes == ["all"] else scopes
    require_each_once("scopes", scopes, SCOPES)
    if "step" not in scopes:
        raise InputError(f"scopes must hold 'step', which the verdict is about, found {list(scopes)}")
    return list(scopes)


def families(names: Sequence[str], scopes: Sequence[str]) -> list[Family]:
    """The comparisons of these arms in these scopes, from the narrowest scope to the step; ["all"] is every scope.

    Raises InputError for what is no list of known names, each once, for scopes without `step`, which the verdict is
    about, and for no arms.
    """
    require_arms(names)
    scopes = require_scopes(scopes)
    found = []
    for scope in [scope for scope in SCOPES if scope in scopes]:
        for baseline in BASELINES:
            own = tuple(name for name in names if ARMS[name].baseline == baseline and scope in ARMS[name].scopes)
            if own:
                found.append(Family(scope, baseline, own))
    return found


def baselines(model: "Transformer", names: Sequence[str]) -> "dict[str, Transformer]":
    """The baselines of these arms by name; they share all arrays with the model."""
    from zimage import arms  # brings MLX, which names do not need

    wanted = dict.fromkeys(ARMS[name].baseline for name in names)
    return {name: arms.transformed(model, BASELINES[name]) for name in wanted}


def fused(model: "Transformer", names: Sequence[str]) -> "dict[str, Transformer]":
    """These arms by name; they share the model's arrays and one copy of the stacked weights."""
    from zimage import arms

    return arms.variants(model, {name: ARMS[name].transforms for name in names})


def sharing(model: "Transformer") -> int:
    """How many blocks a step's time is shared out among: those that the image goes through."""
    return len(model.layers) + len(model.noise_refiner)
