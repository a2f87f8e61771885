"""How much of a step is computed: the products of the first main block, what follows them one by one, the block, all.

Every scope is given what really reaches the first main block on an example, evaluated, and builds its graph anew at
each call. From `qkv` to `step` every scope holds the one before it, and so does `step` hold `gate_up`.
"""

from collections.abc import Callable
from typing import Any

from zimage.inputs import Inputs
from zimage.layers import clone
from zimage.transformer import State, Transformer

import mlx.core as mx
import mlx.nn as nn

Work = Callable[[], Any]  # builds its graph anew and returns the arrays to compute
FIRST_BLOCK = "layers.0"


def _qkv(model: Transformer, example: Inputs) -> Work:
    attention, x, *_ = _reaching(model, example, "attention")
    return lambda: attention.project(x)


def _qkv_norm(model: Transformer, example: Inputs) -> Work:
    attention, x, *_ = _reaching(model, example, "attention")

    def work() -> tuple[mx.array, ...]:
        q, k, v = attention.project(x)
        return *attention.norm(q, k), v

    return work


def _qkv_norm_rope(model: Transformer, example: Inputs) -> Work:
    attention, x, rotation, *_ = _reaching(model, example, "attention")

    def work() -> tuple[mx.array, ...]:
        q, k, v = attention.project(x)
        return *attention.turned(q, k, rotation), v

    return work


def _attention(model: Transformer, example: Inputs) -> Work:
    attention, *given = _reaching(model, example, "attention")
    return lambda: attention(*given)


def _gate_up(model: Transformer, example: Inputs) -> Work:
    feed_forward, x = _reaching(model, example, "feed_forward")
    return lambda: feed_forward.gate_and_up(x)


def _gate_up_swiglu(model: Transformer, example: Inputs) -> Work:
    feed_forward, x = _reaching(model, example, "feed_forward")
    return lambda: feed_forward.swiglu(*feed_forward.gate_and_up(x))


def _feed_forward(model: Transformer, example: Inputs) -> Work:
    feed_forward, x = _reaching(model, example, "feed_forward")
    return lambda: feed_forward(x)


def _block(model: Transformer, example: Inputs) -> Work:
    state = State(*example)
    for stage in model.stages(*example):
        if stage.name == FIRST_BLOCK:
            break
        state = stage(state)
    mx.eval(state.arrays())
    return lambda: stage(state).arrays()


def _step(model: Transformer, example: Inputs) -> Work:
    return lambda: model(*example)


SCOPES: dict[str, Callable[[Transformer, Inputs], Work]] = {
    "qkv": _qkv,  # queries, keys and values as the projections leave them
    "qkv_norm": _qkv_norm,  # with QK norm
    "qkv_norm_rope": _qkv_norm_rope,  # with RoPE too, as attention takes them
    "attention": _attention,  # the whole attention, output projection included
    "gate_up": _gate_up,  # the two halves of SwiGLU's input
    "gate_up_swiglu": _gate_up_swiglu,  # with SwiGLU
    "feed_forward": _feed_forward,  # the whole feed-forward
    "block": _block,
    "step": _step,
}


def _reaching(model: Transformer, example: Inputs, part: str) -> tuple[Any, ...]:
    """The first main block's module called `part` and, evaluated, what it is called with in a step."""
    seen: list[tuple[Any, ...]] = []
    watched = clone(model)
    block = watched.layers[0]
    block.compiled = False  # a trace would be seen instead of values
    module: nn.Module = model.layers[0][part]

    def watch(*given: Any) -> Any:
        seen.append(given)
        return module(*given)

    setattr(block, part, watch)
    state = State(*example)
    for stage in watched.stages(*example):
        state = stage(state)
        if stage.name == FIRST_BLOCK:
            break
    mx.eval([value for value in seen[0] if value is not None])
    return module, *seen[0]
