"""Arms as data: what a step, a block or a QKV projection of some model computes, from names and numbers alone.

In this process a notebook calls `scopes` on models it has loaded. In another process the same arm is
`measure.Program("zimage.arms:step", {"source": ..., ...})`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from zimage import backend, details, execution, fusing, half, inputs, step_caching, tuning
from zimage.errors import InputError
from zimage.inputs import Inputs
from zimage.layers import alike, clone
from zimage.low_memory import chunk_feed_forward
from zimage.recipes import Asked
from zimage.rounding import INPUT_MODES
from zimage.scopes import SCOPES, Work
from zimage.transform_names import FAST, require_known
from zimage.transformer import Transformer
from zimage.transforms import (
    blocks,
    fuse_gate_up,
    fuse_modulation,
    fuse_qkv,
    fuse_qkv_copied,
    join_blocks,
    keep_captions,
    quantize_input,
)
from zimage.weights import load_transformer

import mlx.core as mx

_STACKED = {  # transforms that make new weights, in which part of a block
    "fuse_qkv": "attention",
    "fuse_gate_up": "feed_forward",
    "fuse_modulation": "adaLN_modulation",
}


def fast(model: Transformer) -> Transformer:
    """The model with the fastest step there is here, its output the same up to rounding: FAST and wide_dequantize.

    Where a kernel is not to be had its plain operations run, and projections that are packed differently stay
    separate. Blocks are not compiled on a CPU, where MLX's compiled loops are slower than its own (on two cores the
    digits model took a third more time). Captions are refined anew when other arrays hold them, not when a part of an
    array is assigned to: see `caching.KeptCaptions`. Stacked weights are new arrays, two thirds of a published model's
    bytes: drop the model it was made from unless both are wanted.
    """
    for name in (*FAST, "wide_dequantize"):
        if name == "compile_blocks" and mx.default_device().type == mx.DeviceType.cpu:
            continue
        try:
            model = TRANSFORMS[name](model)
        except InputError:
            if name not in _STACKED:
                raise
    return model


# By the names in `transform_names`; `transforms.float16` and `quantize` need more and are called on a loaded model.
TRANSFORMS: dict[str, Callable[..., Transformer]] = {
    "fuse_qkv": fuse_qkv,
    "fuse_gate_up": fuse_gate_up,
    "fuse_modulation": fuse_modulation,
    "fuse_norm_rope": fusing.fuse_norm_rope,
    "flash_attention": fusing.flash_attention,
    "fuse_residual_norm": fusing.fuse_residual_norm,
    "fuse_swiglu": fusing.fuse_swiglu,
    "wide_dequantize": fusing.wide_dequantize,
    "fuse_qkv_copied": fuse_qkv_copied,
    "join_blocks": join_blocks,
    "keep_captions": keep_captions,
    "chunk_feed_forward": chunk_feed_forward,
    **execution.TRANSFORMS,
    **details.TRANSFORMS,
    # These three reuse within a trajectory, as `scheduler.sample` has it, and leave a step alone as it is.
    "tea_cache_flux": step_caching.tea_cache,
    "reuse_by_timestep": step_caching.reuse_by_timestep,
    "reuse_every_2nd": step_caching.reuse_change,
    "fast": fast,
    "tuned": tuning.tuned,
    **{f"quantize_input_{mode}_emulated": partial(quantize_input, mode=mode) for mode in INPUT_MODES},
}
NEED_EXAMPLES = ("tuned",)  # of what the model will be called with


def step(
    source: str,
    dtype: str | None = None,
    quantization: Asked | None = None,
    transforms: Sequence[str] = (),
    height: int = 1024,
    width: int = 1024,
    batch: int = 1,
    caption_tokens: int = 32,
    seed: int = 0,
    device: str = "auto",
    scope: str = "step",
) -> Work:
    """What one arm computes: `source` loaded, the named `transforms` applied in order, and one of its `SCOPES`.

    The other arguments are those of `load_transformer`, `inputs.example` and `backend.use_device`, and it raises what
    they raise, and InputError for a transform or scope that is not known.
    """
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r} is not known; known are {', '.join(SCOPES)}")
    require_known(transforms)
    backend.use_device(device)
    model = load_transformer(source, dtype, quantization)
    example = inputs.example(model, source, height, width, batch, caption_tokens, seed)
    return SCOPES[scope](transformed(model, transforms, example), example)


def transformed(model: Transformer, names: Sequence[str], *examples: Inputs) -> Transformer:
    """The model after the transforms of these names, in order.

    examples: what it will be called with, which "tuned" has to know. Raises InputError for a name that is not known.
    """
    require_known(names)
    for name in names:
        model = TRANSFORMS[name](model, *examples) if name in NEED_EXAMPLES else TRANSFORMS[name](model)
    return model


def changed(model: Transformer, name: str, *examples: Inputs) -> Transformer:
    """`transformed` by one name. Raises InputError also where that changes nothing, for the model is so already."""
    new = transformed(model, [name], *examples)
    if alike(new, model):
        raise InputError(f"{name}: the model is so already, which nothing can be compared with")
    return new


def variants(model: Transformer, wanted: Mapping[str, Sequence[str]], *examples: Inputs) -> dict[str, Transformer]:
    """The model after each of several lists of transforms, by the names of the lists.

    All share the model's arrays and one copy of the weights that _STACKED transforms make, which therefore come first
    in every list. Raises InputError as `transformed`.
    """
    for names in wanted.values():
        require_known(names)
    used = {arm: {*names, *(FAST if "fast" in names else ())} for arm, names in wanted.items()}
    stacked = transformed(model, [name for name in _STACKED if any(name in names for names in used.values())])
    found = {}
    for arm, names in wanted.items():
        start = clone(stacked)
        for (_, block), (_, plain) in zip(blocks(start), blocks(model), strict=True):
            for part in [part for name, part in _STACKED.items() if name not in used[arm] and part in plain]:
                block[part] = clone(plain[part])
        if "fuse_modulation" not in used[arm]:
            start.stacked_modulation = None
        found[arm] = transformed(start, names, *examples)
    return found


def scopes(model: Transformer, example: Inputs, names: Iterable[str] = SCOPES) -> dict[str, Work]:
    """The work of some of the SCOPES, or all, for a loaded model and its inputs, by their names."""
    return {name: SCOPES[name](model, example) for name in names}


def velocity_errors(
    reference: Callable[..., mx.array],
    models: Mapping[str, Callable[..., mx.array]],
    example: Inputs,
    weights_kind: str,
) -> list[dict[str, Any]]:
    """Rows of a `quality` table: relative L2 error of each model's velocity against the reference's on one example.

    reference: a model, or what gives its velocity; models: such too, by the name of their arm; weights_kind: "trained"
    or "synthetic", as `sources.describe` says it.
    """
    wanted = reference(*example)
    return [
        {
            "arm": arm,
            "metric": "relative_l2_error",
            "value": half.relative_l2(model(*example), wanted),
            "weights_kind": weights_kind,
        }
        for arm, model in models.items()
    ]
