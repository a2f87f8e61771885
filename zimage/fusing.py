"""Transforms that put kernels of our own in the place of several operations.

Each kernel is checked on the user's device when its transform puts it in (`kernels.native`); where it fails, and on a
CPU, its plain composed form runs, which is what the model does without the transform. They may come in any order with
the other transforms, but after `transforms.cast` and `float16`: a kernel is checked for the dtype of the blocks.
"""

from collections.abc import Callable, Iterable

from zimage.errors import InputError
from zimage.kernels import QuantizedLinear
from zimage.kernels.flash import FLASH_ATTENTION, HEAD_DIM
from zimage.kernels.gate import SWIGLU
from zimage.kernels.heads import QK_NORM_ROPE
from zimage.kernels.native import Kernel, dtype_name
from zimage.kernels.packed import DEQUANTIZE
from zimage.kernels.stream import RESIDUAL_NORM_MODULATE
from zimage.layers import clone
from zimage.transformer import Transformer, TransformerBlock
from zimage.transforms import RoundedTransformerBlock, blocks

import mlx.nn as nn


def fuse_norm_rope(model: Transformer) -> Transformer:
    """QK norm and RoPE in one kernel, which reads queries and keys where the projections left them.

    Covers the operations qk_norm and rope of each block. Nothing changes in a model without QK norm.
    """
    QK_NORM_ROPE.install({"dtype": _dtype(model), "head_dim": model.config.head_dim})
    return _with(model, lambda block: [block.attention], norm_then_rotate=QK_NORM_ROPE)


def flash_attention(model: Transformer) -> Transformer:
    """Attention in a kernel of our own where it has no mask, on NVIDIA's Hopper processors (H100, H200) in bfloat16.

    Elsewhere, in other dtypes, for heads of another size than 128 and with a mask it stays MLX's. Covers sdpa.
    """
    if _dtype(model) == "bfloat16" and model.config.head_dim == HEAD_DIM:
        FLASH_ATTENTION.install({"dtype": "bfloat16", "head_dim": HEAD_DIM})
    return _with(model, lambda block: [block.attention], attend_to_all=FLASH_ATTENTION)


def fuse_residual_norm(model: Transformer) -> Transformer:
    """The residual stream's norms, gates, sums and modulations, each time in one pass over it.

    Covers attention_residual and ffn_norm1 of each block in one, attention_norm1 and ffn_residual alone: the first and
    the last operation of a block stay in its own stage.
    """
    RESIDUAL_NORM_MODULATE.install({"dtype": _dtype(model), "width": model.config.dim})
    return _with(model, lambda block: [block], residual_norm_modulate=RESIDUAL_NORM_MODULATE)


def fuse_swiglu(model: Transformer) -> Transformer:
    """silu(gate) * up in one kernel with wide loads, from one fused product or two arrays. Covers swiglu."""
    SWIGLU.install({"dtype": _dtype(model)})
    return _with(model, lambda block: [block.feed_forward], swiglu=SWIGLU)


def wide_dequantize(model: Transformer) -> Transformer:
    """Packed weights unpacked by a kernel near the memory's bandwidth, where they are unpacked before a product.

    Covers a part of each linear operation. Only layers that are quantized already change.
    """
    layers = [layer for _, block in blocks(model) for layer in _packed(block)]
    for mode, bits, group in sorted({(layer.mode, layer.bits, layer.group_size) for layer in layers}):
        DEQUANTIZE.install({"dtype": _dtype(model), "mode": mode, "bits": bits, "group_size": group})
    return _with(model, _packed, unpack=DEQUANTIZE)


def without_kernels(model: Transformer) -> Transformer:
    """The model with all plain operations again, its weights as they are."""
    plain = clone(model)
    for _, block in blocks(plain):
        for module in block.modules():
            for name in [n for n, value in module.__dict__.items() if isinstance(value, Kernel)]:
                delattr(module, name)
    return plain


def _with(
    model: Transformer, parts: Callable[[TransformerBlock], Iterable[nn.Module]], **kernel: Kernel
) -> Transformer:
    """The model whose blocks' `parts` call a kernel in the place of what they call by that name."""
    new = clone(model)
    for path, block in blocks(new):
        for part in parts(block):
            for name in kernel:
                if not isinstance(part.__dict__.get(name), Kernel | None):
                    raise InputError(
                        f"{path} computes {name} as one of zimage.details or zimage.execution has it, which the kernel "
                        "would undo; leave one of the two out"
                    )
            part.__dict__.update(kernel)
    return new


def _packed(block: TransformerBlock) -> list[QuantizedLinear]:
    return [layer for layer in block.modules() if isinstance(layer, QuantizedLinear)]


def _dtype(model: Transformer) -> str:
    """What the products of the blocks are computed in: not the stream's dtype in a float16 model."""
    block = model.layers[0]
    dtype = block.gives if isinstance(block, RoundedTransformerBlock) else model.dtype
    return dtype_name(dtype)
