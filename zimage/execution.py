"""Small decisions about when and how a step reaches the device, each a function model -> model, the output the same.

`transforms.compile_blocks` and `transforms.submit_early` are two more. `practices` says who makes which.
"""

from collections.abc import Callable
from functools import partial

from zimage import launching
from zimage.errors import InputError, require_integer
from zimage.kernels import heads, stream, swiglu
from zimage.layers import clone
from zimage.transformer import Transformer
from zimage.transforms import blocks, compile_blocks, submit_early

import mlx.core as mx

_COMPILED = {  # made once, for MLX keeps what it traced with the compiled function
    "residual_norm_modulate": mx.compile(stream.residual_norm_modulate),
    "norm_then_rotate": mx.compile(heads.norm_then_rotate),
    "swiglu": mx.compile(swiglu),
}


def compile_operations(model: Transformer) -> Transformer:
    """The model whose norms with modulation, RoPE and SwiGLU are compiled by MLX, each by itself, between the products.

    Raises InputError where kernels compute these.
    """
    new = clone(model)
    for path, block in blocks(new):
        for module, name in (
            (block, "residual_norm_modulate"),
            (block.attention, "norm_then_rotate"),
            (block.feed_forward, "swiglu"),
        ):
            if name in module.__dict__:
                raise InputError(
                    f"compile_operations: {path} computes {name} by a kernel or another transform; leave that one out, "
                    "or take the kernels out with zimage.fusing.without_kernels"
                )
            module.__dict__[name] = _COMPILED[name]
    return new


def compile_step(model: Transformer) -> Transformer:
    """The model whose whole call is compiled by MLX; `stages` are as ever.

    Traced at the first call of each set of shapes. A call raises InputError where the model computes something before
    the step's end: hands over parts, waits, keeps captions, reuses steps, streams weights.
    """
    new = clone(model)
    new.compiled = True
    return new


def submit_every(model: Transformer, blocks: int | None = None) -> Transformer:
    """The model that hands over what it has built after every `blocks`-th block, in the place of any other such rule.

    All blocks at once, after the last one, where none is said. Raises InputError for a number below 1.
    """
    count = sum(len(model[part]) for part in ("noise_refiner", "context_refiner", "layers"))
    if blocks is None:
        blocks = count
    require_integer("blocks", blocks, 1)
    return _launched(model, launching.Every(blocks))


def eval_every(model: Transformer, stages: bool = False) -> Transformer:
    """The model that waits for the device after every block, or every stage, in the place of any other such rule."""
    return _launched(model, launching.Barrier(stages))


TRANSFORMS: dict[str, Callable[[Transformer], Transformer]] = {
    "compile_operations": compile_operations,
    "compile_blocks": compile_blocks,
    "compile_step": compile_step,
    "submit_every_block": partial(submit_every, blocks=1),
    "submit_every_2nd": partial(submit_every, blocks=2),
    "submit_every_4th": partial(submit_every, blocks=4),
    "submit_at_the_end": submit_every,
    "submit_early": submit_early,
    "eval_every_block": eval_every,
    "eval_every_stage": partial(eval_every, stages=True),
}


def _launched(model: Transformer, policy: launching.Policy) -> Transformer:
    new = clone(model)
    new.submission = policy
    return new
