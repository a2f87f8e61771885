"""Levers an ablation pulls: functions model -> model.

Each returns a new model that shares the arrays it did not touch, and leaves its argument as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from zimage import adapters, caching, launching, recipes, rounding
from zimage.errors import InputError, require_integer
from zimage.layers import (
    LINEAR,
    AdaptedLinear,
    adopt,
    as_class,
    clone,
    input_width,
    packed,
    split_rows,
    stack_rows,
)
from zimage.modulation import Modulation, Stacked
from zimage.quantization import Quantization, entry
from zimage.recipes import Asked
from zimage.transformer import Attention, FeedForward, TimestepEmbedder, Transformer, TransformerBlock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


class FusedQKVAttention(Attention):
    """Attention whose three projections are one matrix product: `to_qkv` holds the rows of to_q, to_k and to_v."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        adopt(self, attention, without=("to_q", "to_k", "to_v"))
        self.to_qkv = stack_rows([attention.to_q, attention.to_k, attention.to_v])

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        B, L, _ = x.shape
        heads = self.to_qkv(x).reshape(B, L, self.n_heads + 2 * self.n_kv_heads, self.head_dim)
        q, k, v = mx.split(heads, [self.n_heads, self.n_heads + self.n_kv_heads], axis=2)
        return q, k, v

    def unfused(self) -> Attention:
        """The same attention with three projections again."""
        plain = Attention.__new__(Attention)
        adopt(plain, self, without=("to_qkv",))
        rows = [self.n_heads * self.head_dim, *[self.n_kv_heads * self.head_dim] * 2]
        plain.to_q, plain.to_k, plain.to_v = split_rows(self.to_qkv, rows)
        return plain


class CopiedQKVAttention(FusedQKVAttention):
    """Fused QKV whose queries, keys and values are copied out of the joint product into arrays of their own."""

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().project(x)
        return mx.contiguous(q), mx.contiguous(k), mx.contiguous(v)


class FusedGateUpFeedForward(FeedForward):
    """SwiGLU whose gate and up projections are one matrix product: `w13` holds the rows of w1 and w3."""

    def __init__(self, feed_forward: FeedForward) -> None:
        nn.Module.__init__(self)
        adopt(self, feed_forward, without=("w1", "w3"))
        self.w13 = stack_rows([feed_forward.w1, feed_forward.w3])

    def gate_and_up(self, x: mx.array) -> tuple[mx.array, mx.array]:
        gate, up = mx.split(self.w13(x), 2, axis=-1)
        return gate, up

    def unfused(self) -> FeedForward:
        """The same feed-forward with separate gate and up projections again."""
        plain = FeedForward.__new__(FeedForward)
        adopt(plain, self, without=("w13",))
        plain.w1, plain.w3 = split_rows(self.w13, [self.w13.weight.shape[0] // 2] * 2)
        return plain


class MaskedTransformerBlock(TransformerBlock):
    """A block that gives its attention a boolean mask of ones where it would have given none."""

    def ones(self, x: mx.array) -> mx.array:
        """The mask that hides nothing of x."""
        return _all_ones(x.shape[1])

    def forward(
        self, x: mx.array, rotation: mx.array, mask: mx.array | None, temb: mx.array | Modulation | None
    ) -> mx.array:
        return super().forward(x, rotation, self.ones(x) if mask is None else mask, temb)

    def forward_joined(
        self, x: mx.array, normed: mx.array, rotation: mx.array, mask: mx.array | None, *others: Any
    ) -> list[mx.array]:
        return super().forward_joined(x, normed, rotation, self.ones(x) if mask is None else mask, *others)


@lru_cache(maxsize=64)  # one for all blocks and steps of a size, as libraries have it that build such a mask
def _all_ones(length: int) -> mx.array:
    return mx.array(np.ones((1, 1, 1, length), dtype=np.bool_))


class RoundedTransformerBlock(TransformerBlock):
    """A block whose attention and feed-forward get their input rounded to `gives`, beside a wider residual stream.

    The exponents say by which powers of two their values are divided, see `half`.
    """

    def __init__(self, block: TransformerBlock, attention: int, feed_forward: int, gives: mx.Dtype) -> None:
        nn.Module.__init__(self)
        adopt(self, block, without=())
        self.attention_exponent, self.feed_forward_exponent, self.gives = attention, feed_forward, gives

    def before_attention(self, x: mx.array, scale: mx.array | None) -> mx.array:
        return super().before_attention(x, scale).astype(self.gives)

    def before_feed_forward(self, x: mx.array, scale: mx.array | None) -> mx.array:
        return super().before_feed_forward(x, scale).astype(self.gives)

    def after_attention(
        self, x: mx.array, change: mx.array, gate: mx.array | None, scale: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        x, normed = super().after_attention(x, change, gate, scale)
        return x, normed.astype(self.gives)

    def after_block(
        self, x: mx.array, change: mx.array, gate: mx.array | None, weight: mx.array, scale: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        x, normed = super().after_block(x, change, gate, weight, scale)
        return x, normed.astype(self.gives)


class RoundedTimestepEmbedder(TimestepEmbedder):
    """A timestep embedder whose result is rounded to `gives`, and with it all modulation."""

    def __init__(self, embedder: TimestepEmbedder, gives: mx.Dtype) -> None:
        nn.Module.__init__(self)
        adopt(self, embedder, without=())
        self.gives = gives

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        return super().__call__(t, dtype).astype(self.gives)


def adapt(model: Transformer, files: Sequence[tuple[str | Path, float]]) -> Transformer:
    """The model with LoRA adapters, (file, scale) pairs whose effects add up.

    Floating-point weights take the update in, and cost what they did; beside quantized ones it stays as two thin
    matrices of the model's dtype. Raises WeightsError for a file that is no LoRA of this model and InputError for a
    scale that is not finite.
    """
    require_unscaled(model, "adapt")
    updates = adapters.read_all(files, model.config)
    new = clone(model)
    to_fuse = []
    for path, block in blocks(new):
        for part, fused, names in (
            ("attention", FusedQKVAttention, ("to_q", "to_k", "to_v")),
            ("feed_forward", FusedGateUpFeedForward, ("w1", "w3")),
        ):
            if isinstance(block[part], fused) and any(f"{path}.{part}.{name}" in updates for name in names):
                to_fuse.append((block, part, type(block[part])))
                block[part] = block[part].unfused()

    def adapted(path: str, layer: nn.Module) -> nn.Module:
        if path not in updates:
            return layer
        if isinstance(layer, nn.QuantizedLinear):
            return _beside(layer, updates[path], model.dtype)
        changed = clone(layer)
        changed.weight = merged(layer.weight, updates[path])
        mx.eval(changed.weight)  # now, or all layers' updates would be in memory at once
        return changed

    new.update_modules(tree_map_with_path(adapted, new.leaf_modules(), is_leaf=nn.Module.is_module))
    for block, part, fused in to_fuse:
        block[part] = fused(block[part])
    mx.eval(new.parameters())
    return new


def merged(weight: mx.array, updates: Sequence[adapters.Update]) -> mx.array:
    """A weight [out, in] with updates added in fp32 and rounded once to its dtype, not yet computed.

    The updates' values are read when this is called.
    """
    wide = weight.astype(mx.float32)
    for update in updates:
        down, up = update.values()
        wide = mx.addmm(wide, mx.array(up), mx.array(down))
    return wide.astype(weight.dtype) if updates else weight


def _beside(layer: Any, updates: Sequence[adapters.Update], dtype: mx.Dtype) -> AdaptedLinear:
    """A quantized layer with these updates beside it, after those that it has."""
    old, downs, ups = layer, [], []
    if isinstance(layer, AdaptedLinear):
        downs, ups, layer = [layer.lora_down], [layer.lora_up], layer.without_update()
    for update in updates:
        down, up = update.values()
        downs.append(mx.array(down).astype(dtype))
        ups.append(mx.array(up).astype(dtype))
    return rounding.like(old, AdaptedLinear(layer, mx.concatenate(downs, axis=0), mx.concatenate(ups, axis=1)))


def fuse_qkv(model: Transformer) -> Transformer:
    """One QKV projection in every block instead of three. Exact up to rounding, also on quantized weights.

    Raises InputError where the three projections are quantized differently.
    """
    return _fuse(model, "attention", FusedQKVAttention)


def fuse_qkv_copied(model: Transformer) -> Transformer:
    """`fuse_qkv`, with queries, keys and values copied after the split: the same values, at the price of the copies.

    For kernels that take no strided input the copies are needed; those of MLX take it. Raises InputError as `fuse_qkv`.
    """
    new = fuse_qkv(model)
    for _, block in blocks(new):
        block.attention = as_class(CopiedQKVAttention, block.attention)
    return new


def with_all_ones_mask(model: Transformer, kind: type[MaskedTransformerBlock] = MaskedTransformerBlock) -> Transformer:
    """The model whose attention is always given a mask, one that hides nothing where no caption is padded.

    Its output is the same; the time differs by what a device's attention pays for a mask. kind: the blocks that make
    the mask, a boolean one. Raises InputError for a float16 model.
    """
    require_unscaled(model, "mask")
    new = clone(model)
    for part in ("noise_refiner", "context_refiner", "layers"):
        new[part] = [as_class(kind, block) for block in new[part]]
    return new


def fuse_gate_up(model: Transformer) -> Transformer:
    """One gate-and-up projection in every SwiGLU instead of two. Exact up to rounding, also on quantized weights.

    Raises InputError where the two projections are quantized differently.
    """
    return _fuse(model, "feed_forward", FusedGateUpFeedForward)


def fuse_modulation(model: Transformer) -> Transformer:
    """The AdaLN modulation of all blocks from one product at the step's start, instead of one in each block.

    It depends on the timestep alone. Covers the operation adaln of every block, whose work is then in the stage
    t_embedder. Blocks keep their own layers, as parts of the stacked arrays, and one whose weights are replaced
    afterwards computes its own modulation again: apply it after what makes new weights. Exact up to rounding, also on
    quantized weights. Raises InputError where the blocks' layers are quantized differently.
    """
    require_loaded(model, "fuse")
    new = clone(model)
    modulated = [block for _, block in blocks(new) if "adaLN_modulation" in block]
    layers = [block.adaLN_modulation[0] for block in modulated]
    known = new.stacked_modulation
    if known is not None and all(known.holds(place, layer) for place, layer in enumerate(layers)):
        return new
    try:
        new.stacked_modulation = Stacked.of(layers)
    except InputError as error:
        raise InputError(f"adaLN_modulation: {error}") from None
    for place, block in enumerate(modulated):
        block.modulation_place = place
        block.adaLN_modulation = [clone(new.stacked_modulation.parts[place])]  # whose arrays may be replaced
    return new


def compile_blocks(model: Transformer) -> Transformer:
    """The model whose blocks are compiled by MLX: each is traced once, and what is left between its kernels is fused.

    Traced again for other shapes, and after an array of it was replaced; not after an assignment to a part of one.
    """
    new = clone(model)
    for _, block in blocks(new):
        block.compiled = True
    return new


def join_blocks(model: Transformer) -> Transformer:
    """The model whose main blocks end with the first norm of the next one, so that both pass over the stream at once.

    With `fusing.fuse_residual_norm` that is one kernel instead of two. ffn_residual of a block and attention_norm1 of
    the next are then both in the stage of the former, and so is the next one's modulation.
    """
    new = clone(model)
    new.joined = True
    return new


def keep_captions(model: Transformer) -> Transformer:
    """The model that refines a call's captions once and keeps the result for calls with the same caption arrays.

    Nothing in the caption branch depends on the timestep or the image, so that all steps of a trajectory but the first
    go without it; the output is the same bit for bit. See `caching.KeptCaptions` for what counts as the same.
    """
    new = clone(model)
    new.kept_captions = caching.KeptCaptions()
    return new


def submit_early(model: Transformer, part_bytes: int = 2**27, waiting_bytes: int = 2**29) -> Transformer:
    """The model that hands its blocks to the device in parts while it builds the rest, and bounds what waits there.

    The device is busy from the first block on, and holds the temporary arrays of the parts that wait instead of those
    of the whole step: see `launching.Submission`. A call computes at once what it would else leave to `mx.eval`, and so
    cannot be inside `mx.compile`. Raises InputError for numbers below 1.
    """
    require_integer("part_bytes", part_bytes, 1)
    require_integer("waiting_bytes", waiting_bytes, 1)
    new = clone(model)
    new.submission = launching.Submission(part_bytes, waiting_bytes)
    return new


def _fuse(model: Transformer, part: str, fused: type[FusedQKVAttention] | type[FusedGateUpFeedForward]) -> Transformer:
    """The model with the module called `part` of every block in its fused form."""
    require_loaded(model, "fuse")
    new = clone(model)
    for path, block in blocks(new):
        if isinstance(block[part], fused):
            continue
        try:
            block[part] = fused(block[part])
        except InputError as error:
            raise InputError(f"{path}.{part}: {error}") from None
    mx.eval(new.parameters())
    return new


def unfuse(model: Transformer) -> Transformer:
    """The model with the published, separate projections again, bit for bit."""
    plain = clone(model)
    for _, block in blocks(plain):
        if isinstance(block.attention, FusedQKVAttention):
            block.attention = block.attention.unfused()
        if isinstance(block.feed_forward, FusedGateUpFeedForward):
            block.feed_forward = block.feed_forward.unfused()
    plain.stacked_modulation = None
    return plain


def quantize(model: Transformer, recipe: Asked) -> Transformer:
    """The linear layers of the blocks with packed weights; embedders, norms and the final layer stay as they are.

    `recipe` is a name, which packs all of them alike: "2bit" to "6bit" or "8bit" (affine, group 64; "4bit-g32" and
    "4bit-g128" for other groups), "mxfp4", "nvfp4" or "mxfp8"; or it says layer by layer: a recipe's file or dict, see
    `zimage.recipes`. Raises InputError for other names and bad recipes, for layers that are quantized already, where
    a layer's sizes do not allow its packing, and where the parts of a fused layer are to be packed differently.
    """
    require_loaded(model, "quantize")
    wanted = recipes.packing(model.config, recipes.read(recipe))
    quantized = clone(model)
    chosen = {}
    for path, block in blocks(quantized):
        for name, layer in block.named_modules():
            found = recipes.of_layer(wanted, f"{path}.{name}") if isinstance(layer, LINEAR) else None
            if found is not None and isinstance(layer, nn.QuantizedLinear):
                raise InputError(f"{path}.{name} is quantized already; quantize the floating-point weights instead")
            chosen[f"{path}.{name}"] = found
    for path, block in blocks(quantized):
        pack(block, lambda name, _, path=path: chosen[f"{path}.{name}"])  # type: ignore[misc]
        mx.eval(block.parameters())
    return quantized


def pack(module: nn.Module, choose: Callable[[str, nn.Linear], Quantization | None]) -> None:
    """Put quantized layers, unevaluated, in the place of those linear ones below `module` for which `choose` has one.

    `choose` is given a layer's path below `module` and the layer. Raises ValueError where MLX cannot pack it so.
    """

    def chosen(path: str, layer: nn.Module) -> nn.Module:
        wanted = choose(path, layer) if isinstance(layer, nn.Linear) else None
        return layer if wanted is None else packed(layer, wanted)

    module.update_modules(tree_map_with_path(chosen, module.leaf_modules(), is_leaf=nn.Module.is_module))


def quantize_input(model: Transformer, mode: str = "int8") -> Transformer:
    """The model whose linear layers in blocks round the activations that enter them; emulated on every device.

    mode: "int8" (symmetric) or "fp8" (E4M3) with a scale a token, or MLX's "mxfp8" or "nvfp4"; `rounding` says how. The
    rounding error is faithful, the time is not that of a device with such products. Weights stay as they are, packed or
    not, and so does what is saved. Raises InputError for other modes, for layers that round their input already, and
    where a format does not divide a layer's input width.
    """
    rounding.require_mode(mode)
    new = clone(model)
    for path, block in blocks(new):
        for name, layer in block.named_modules():
            if not isinstance(layer, LINEAR):
                continue
            if rounding.mode_of(layer) is not None:
                raise InputError(f"{path}.{name} rounds its input already, to {rounding.mode_of(layer)}")
            rounding.require_width(f"{path}.{name}", input_width(layer), mode)
        block.update_modules(
            tree_map_with_path(
                lambda _, layer: rounding.rounded(layer, mode) if isinstance(layer, LINEAR) else layer,
                block.leaf_modules(),
                is_leaf=nn.Module.is_module,
            )
        )
    return new


def input_quantization_of(model: Transformer) -> dict[str, Any] | None:
    """How activations that enter linear layers are rounded, and that this is emulated; None where they are not."""
    modes = sorted({mode for layer in model.modules() if (mode := rounding.mode_of(layer)) is not None})
    return {"mode": ", ".join(modes), "emulated": rounding.EMULATED} if modes else None


def cast(model: Transformer, dtype: str) -> Transformer:
    """The model with every floating-point array in `dtype`, "bfloat16" or "float32". Raises InputError for another.

    The new arrays are computed when they are first used. float16 is refused: the published weights overflow in it, in
    the feed-forward and in the attention's output. `float16` keeps them in range.
    """
    target = parse_dtype(dtype)
    require_unscaled(model, "cast")

    def converted(array: mx.array) -> mx.array:
        wanted = mx.issubdtype(array.dtype, mx.floating) and array.dtype != target
        return array.astype(target) if wanted else array

    changed = clone(model)
    changed.update(tree_map(converted, model.parameters()))
    return changed


def parse_dtype(name: str) -> mx.Dtype:
    """The MLX dtype called `name`. Raises InputError unless it is "bfloat16" or "float32"."""
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    if isinstance(name, str) and name == "float16":
        raise InputError(
            "dtype 'float16' is not supported: Z-Image's activations overflow in it; use bfloat16 or float32, or "
            "zimage.transforms.float16 on the loaded model, which keeps them in range"
        )
    raise InputError(f"dtype {name!r} is not supported; use bfloat16 or float32")


def float16(model: Transformer, *examples: Sequence[Any], most_error: float = 0.01) -> Transformer:
    """The model with blocks that compute in float16 and a residual stream in fp32, for GPUs without fast bfloat16.

    examples: what it will be called with, each (latents [B, C, H, W], timestep [B], captions); real captions, and
    timesteps all over [0, 1], as a batch or as several examples. The plain model is run on them in fp32, a block at a
    time, and every block's attention and feed-forward are divided by the powers of two that keep eight times their
    largest values in range. `half` says how that changes nothing but the rounding. It works on fused, adapted and
    affine-packed weights, and what it gives can be fused and packed.

    Raises InputError, with the block and the operation, where values would overflow all the same or vanish, and where
    the velocity's relative L2 error on an example exceeds `most_error`. What later reaches more than eight times as far
    as on the examples overflows, and the velocity is NaN. Weights are copied, but for packed ones.
    """
    from zimage import half  # which builds on this module

    return half.float16(model, examples, most_error)


def require_loaded(model: Transformer, doing: str) -> None:
    """Raise InputError for a model with blocks on disk (`low_memory.streamed`): no new weights can be made of those."""
    if any(block.streamed for _, block in blocks(model)):
        raise InputError(
            f"blocks of this model stay on disk; {doing} a loaded model, or convert its source (zimage convert) and "
            "stream what that gives"
        )


def require_unscaled(model: Transformer, doing: str) -> None:
    """Raise InputError for a float16 model: its weights and norms are scaled, and new ones would not be.

    And for one whose weights are not in memory, as `require_loaded`.
    """
    require_loaded(model, doing)
    if any(isinstance(block, RoundedTransformerBlock) for _, block in blocks(model)):
        raise InputError(f"a float16 model's weights are scaled to compute in it; {doing} the model it was made from")


def blocks(model: Transformer) -> Iterator[tuple[str, TransformerBlock]]:
    """Every transformer block with its module path."""
    for part in ("noise_refiner", "context_refiner", "layers"):
        for i, block in enumerate(model[part]):
            yield f"{part}.{i}", block


def quantization_of(model: Transformer) -> dict[str, Any] | None:
    """The `quantization` entry of a saved model's config, as mlx-lm writes it: one for all layers, or an entry a layer.

    Layers have the paths under which they are saved, unfused. None where no layer is quantized.
    """
    return entry(packing_of(model))


def packing_of(model: Transformer) -> dict[str, Quantization]:
    """How each quantized layer is packed, by its published path; the parts of a fused layer are each there."""
    return {
        part: Quantization(layer.mode, layer.bits, layer.group_size)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.QuantizedLinear)
        for part in recipes.published_paths(path)
    }


def tensors(model: Transformer) -> dict[str, mx.array]:
    """The model's arrays by published name; quantized layers add `.scales` and `.biases`.

    Raises InputError for a model with LoRA updates beside its quantized weights, which no checkpoint can hold, and for
    a float16 model, whose weights are scaled for what it computes in.
    """
    require_unscaled(model, "save")
    adapted = [path for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)]
    if adapted:
        raise InputError(
            f"{adapted[0]} has a LoRA update beside its quantized weights, which no checkpoint can hold; merge it into "
            "floating-point weights first: zimage convert SOURCE DIR --lora FILE --quantization NAME"
        )
    return dict(tree_flatten(unfuse(model).parameters()))
