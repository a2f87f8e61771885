"""Small decisions of other implementations that change the output, each a function model -> model.

`practices` says who makes which. What a detail replaces must be as the published model has it: a block, an embedder or
a norm that another transform or a kernel stands in for is refused, for the detail would undo it or not apply.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from zimage import half
from zimage.errors import InputError
from zimage.kernels import heads, stream
from zimage.layers import as_class, clone
from zimage.transformer import TimestepEmbedder, Transformer, TransformerBlock
from zimage.transforms import MaskedTransformerBlock, blocks, with_all_ones_mask

import mlx.core as mx

CAPTION_ROWS = 512


class AdditivelyMaskedTransformerBlock(MaskedTransformerBlock):
    """A block that gives its attention an additive mask of zeros where it would have given none."""

    def ones(self, x: mx.array) -> mx.array:
        return _zeros(x.shape[1], x.dtype)


@lru_cache(maxsize=64)  # one for all blocks and steps of a size
def _zeros(length: int, dtype: mx.Dtype) -> mx.array:
    return mx.array([[[[0.0] * length]]], dtype=dtype)


class BFloat16TimestepEmbedder(TimestepEmbedder):
    """A timestep embedder that takes its timestep, in [0, t_scale], rounded to bfloat16."""

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        return super().__call__(t.astype(mx.bfloat16), dtype)


class Float32TimestepEmbedder(TimestepEmbedder):
    """A timestep embedder whose result is in fp32 whatever the activations are in."""

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        return super().__call__(t, mx.float32 if dtype.size < mx.float32.size else dtype)


def masked(model: Transformer) -> Transformer:
    """`transforms.with_all_ones_mask`, of blocks that no other transform replaced. Raises InputError for others."""
    _require_blocks(model, "with_all_ones_mask")
    return with_all_ones_mask(model)


def with_additive_mask(model: Transformer) -> Transformer:
    """The model whose attention is given an additive mask of zeros, in the activations' dtype, where it needs none.

    Its output is the same up to the rounding of the path that attention takes for a mask. Raises InputError for blocks
    that another transform replaced.
    """
    _require_blocks(model, "with_additive_mask")
    return with_all_ones_mask(model, AdditivelyMaskedTransformerBlock)


def bf16_positions(model: Transformer) -> Transformer:
    """The model whose RoPE positions are rounded to bfloat16: from 256 on, neighbours have one position.

    Changes nothing where no position, row, column or caption row, is beyond 256. A call raises InputError where a
    rounded position lies beyond `axes_lens`.
    """
    return _laid_out(model, bf16_positions=True)


def zero_pad_tokens(model: Transformer) -> Transformer:
    """The model with zeros in place of its learned pad tokens; padding still takes part in attention."""
    new = clone(model)
    new.x_pad_token, new.cap_pad_token = mx.zeros_like(model.x_pad_token), mx.zeros_like(model.cap_pad_token)
    return new


def unpadded_image(model: Transformer) -> Transformer:
    """The model whose image tokens are not padded; nothing changes where their number is a multiple of 32 anyway."""
    return _laid_out(model, image_multiple=1)


def captions_512(model: Transformer) -> Transformer:
    """The model that gives every caption 512 rows, padding embedded as if it were of the caption and never masked.

    The encoder's output at padding is not known here: rows of zeros stand for it, so that the time is that of such an
    implementation and the change of the output only of its kind. Raises InputError where `axes_lens` has no place for
    so many rows.
    """
    length = model.config.axes_lens[0]
    if length < CAPTION_ROWS + 2:  # captions start at 1, and the image comes after them
        raise InputError(
            f"captions of {CAPTION_ROWS} rows need axes_lens[0] of {CAPTION_ROWS + 2} at least, this model has {length}"
        )
    return _laid_out(model, caption_rows=CAPTION_ROWS)


def fp32_residual(model: Transformer) -> Transformer:
    """The model whose residual stream is in fp32, with the norms on it, the embedders and the final layer.

    What blocks multiply, attention and feed-forward, stays in the model's dtype, and so do their weights, which are
    shared. Raises InputError for a model whose stream is in fp32 already, and for blocks or a stream's kernel that
    another transform put in.
    """
    if model.dtype == mx.float32:
        raise InputError("fp32_residual: the residual stream is in float32 already")
    _require_blocks(model, "fp32_residual")
    _require_embedder(model, "fp32_residual")
    _require_own(model, "fp32_residual", "residual_norm_modulate")
    return half.converted(model, {path: half.Exponents(0, 0) for path, _ in blocks(model)}, model.dtype)


def fp32_embedding(model: Transformer) -> Transformer:
    """The model whose timestep embedding is in fp32, and with it every activation that modulation reaches.

    Raises InputError for a model in fp32, and for an embedder or a stream's kernel that another transform put in.
    """
    if model.dtype == mx.float32:
        raise InputError("fp32_embedding: the timestep embedding is in float32 already")
    _require_own(model, "fp32_embedding", "residual_norm_modulate")
    return _embedded_by(Float32TimestepEmbedder, model, "fp32_embedding")


def bf16_timestep(model: Transformer) -> Transformer:
    """The model whose timestep is rounded to bfloat16 after it was scaled by t_scale: 38.1 of 1000 becomes 38.

    Raises InputError for an embedder that another transform replaced.
    """
    return _embedded_by(BFloat16TimestepEmbedder, model, "bf16_timestep")


def bf16_latents(model: Transformer) -> Transformer:
    """The model whose latents a trajectory of `scheduler` keeps in bfloat16 between the steps. A step stays as it is.

    With Euler steps in bfloat16 as well, what a step adds is rounded to it too.
    """
    new = clone(model)
    new.latents_dtype = mx.bfloat16
    return new


def norms_in_dtype(model: Transformer) -> Transformer:
    """The model whose blocks compute RMS norms by plain operations, each rounded to the activations' own dtype.

    Squares, their mean, its root and every product are rounded; MLX adds the squares up in something wider. The
    published model and `mx.fast.rms_norm` compute all of it in fp32, and round once at the end. Raises InputError for
    a model in fp32, and where kernels compute the norms.
    """
    if model.dtype == mx.float32:
        raise InputError("norms_in_dtype: the norms are in float32 already")
    return _normed_by(_rms_norm_in_dtype, model, "norms_in_dtype")


def norms_composed(model: Transformer) -> Transformer:
    """The model whose blocks compute RMS norms by plain operations in fp32, instead of by `mx.fast.rms_norm`.

    The output is the same up to rounding. Raises InputError where kernels compute the norms.
    """
    return _normed_by(_rms_norm_in_fp32, model, "norms_composed")


TRANSFORMS: dict[str, Callable[[Transformer], Transformer]] = {
    "with_all_ones_mask": masked,
    "with_additive_mask": with_additive_mask,
    "bf16_positions": bf16_positions,
    "zero_pad_tokens": zero_pad_tokens,
    "unpadded_image": unpadded_image,
    "captions_512": captions_512,
    "fp32_residual": fp32_residual,
    "fp32_embedding": fp32_embedding,
    "bf16_timestep": bf16_timestep,
    "bf16_latents": bf16_latents,
    "norms_in_dtype": norms_in_dtype,
    "norms_composed": norms_composed,
}


def _rms_norm_in_dtype(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps) * weight


def _rms_norm_in_fp32(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return _rms_norm_in_dtype(x.astype(mx.float32), weight.astype(mx.float32), eps).astype(x.dtype)


def _normed_by(rms_norm: Callable[..., mx.array], model: Transformer, name: str) -> Transformer:
    _require_own(model, name, "residual_norm_modulate", "norm_then_rotate")
    new = clone(model)
    for _, block in blocks(new):
        # MLX keeps a module's plain attributes in its __dict__, as `fusing` puts its kernels there.
        block.residual_norm_modulate = partial(stream.residual_norm_modulate, rms_norm=rms_norm)
        block.attention.norm_then_rotate = partial(heads.norm_then_rotate, rms_norm=rms_norm)
    return new


def _laid_out(model: Transformer, **changes: Any) -> Transformer:
    new = clone(model)
    new.layout = replace(model.layout, **changes)
    return new


def _embedded_by(kind: type[TimestepEmbedder], model: Transformer, name: str) -> Transformer:
    _require_embedder(model, name)
    new = clone(model)
    new.t_embedder = as_class(kind, new.t_embedder)
    return new


def _require_embedder(model: Transformer, name: str) -> None:
    if type(model.t_embedder) is not TimestepEmbedder:
        raise InputError(
            f"{name}: the timestep embedder is a {type(model.t_embedder).__name__}, and only the published one can be "
            "replaced; leave the other transform of it out"
        )


def _require_blocks(model: Transformer, name: str) -> None:
    for path, block in blocks(model):
        if type(block) is not TransformerBlock:
            raise InputError(
                f"{name}: {path} is a {type(block).__name__}, and only blocks that no other transform replaced can be; "
                "leave the other one out"
            )


def _require_own(model: Transformer, name: str, *operations: str) -> None:
    """Raise InputError where something else than the model's own operations of these names is in place."""
    for path, block in blocks(model):
        for module in (block, block.attention):
            found = [operation for operation in operations if operation in module.__dict__]
            if found:
                raise InputError(
                    f"{name}: {path} computes {found[0]} by a kernel or another transform, beside which this cannot "
                    "apply; leave that one out, or take the kernels out with zimage.fusing.without_kernels"
                )
