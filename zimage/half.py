"""Z-Image in float16, for GPUs that have no fast bfloat16 (Apple's M1 and M2).

float16 holds 65504 at most, and the published weights exceed that in the attention's output and in the feed-forward.
Both are followed by an RMS norm, and a norm doesn't see the scale of what it is given but for its eps: of a block's
attention divided by 2^a, the norm with eps / 4^a is the same to the last bit, as powers of two round nothing away. So

- the weights of attention_norm1 are divided by 2^a and those of ffn_norm1 by 2^f, which divides all that is computed
  from them: queries, keys, values, what attention finds, to_out; w3, the product of gate and up, w2;
- attention_norm2 and ffn_norm2 divide their eps by 4^a and 4^f, and give the values of the plain model again, in fp32;
- so do the norms of queries and keys; a model without these has to_q and to_k multiplied by 2^a instead;
- w1 is multiplied by 2^f, because SiLU does see the scale of a gate.

Linear weights stay as they are but for that, so none gets too small for float16. The residual stream is in fp32, and
so are embedders, the norms that read the stream or add to it, and the final layer; RoPE is computed in fp32 as ever. a
and f are chosen block by block, from what the plain model computes for examples. That values have to be scaled down,
and that V and w3 are enough, is known from mflux, which divides them by 4 and 32 in all blocks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zimage.errors import InputError
from zimage.fusing import without_kernels
from zimage.layers import clone
from zimage.transformer import Transformer, TransformerBlock
from zimage.transforms import RoundedTimestepEmbedder, RoundedTransformerBlock, blocks, require_unscaled, unfuse

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_map_with_path

LARGEST = 65504.0  # of float16
HEADROOM = 8  # other prompts, seeds and timesteps than the examples may reach so many times as far
LIMIT = LARGEST / HEADROOM
MOST_ERROR = 0.01
_SMALLEST_STEP = 2.0**-24  # of float16: what is nearer to zero than its normal numbers is rounded to multiples of it
_BLOCKS = ("noise_refiner", "context_refiner", "layers")


class Exponents(NamedTuple):
    """By which powers of two a block's attention and its feed-forward are divided."""

    attention: int
    feed_forward: int


class Reach(NamedTuple):
    """The largest magnitude of the values at some place of a block, and their root mean square."""

    largest: float
    rms: float


# Linear layers of a block: the operation that gives what they take, unless another layer has that, and their own.
_LAYERS: dict[str, tuple[str | None, str]] = {
    "adaLN_modulation.0": ("t_embedder", "adaln"),
    "attention.to_q": ("attention_norm1", "to_q"),
    "attention.to_k": (None, "to_k"),
    "attention.to_v": (None, "to_v"),
    "attention.to_out.0": ("sdpa", "to_out"),
    "feed_forward.w1": ("ffn_norm1", "w1"),
    "feed_forward.w3": (None, "w3"),
    "feed_forward.w2": ("swiglu", "w2"),
}
_ATTENTION = ("attention_norm1", "to_q", "to_k", "to_v", "sdpa", "to_out")  # what 2^a divides
_FEED_FORWARD = ("ffn_norm1", "w3", "swiglu", "w2")  # what 2^f divides
_QUERIES_AND_KEYS = ("to_q", "to_k")  # which it doesn't divide where the model has no QK norm


def float16(model: Transformer, examples: Sequence[Sequence[Any]], most_error: float = MOST_ERROR) -> Transformer:
    """`transforms.float16`, which see, with its examples as one argument."""
    require_unscaled(model, "transform")
    for path, block in blocks(model):
        if type(block) is not TransformerBlock:
            raise InputError(f"{path} is a {type(block).__name__}, and float16 takes blocks that no transform replaced")
    if not examples or not all(isinstance(one, (tuple, list)) and len(one) in (3, 4) for one in examples):
        raise InputError(
            "float16 is checked on examples of what the model is called with, each (latents, timestep, captions): give "
            "one at least, of real captions"
        )
    if isinstance(most_error, bool) or not isinstance(most_error, (int, float)) or not most_error > 0:
        raise InputError(f"most_error must be a positive number, found {most_error!r}")
    reached, wanted = measure(model, examples)
    chosen = {stage: choose(stage, reached[stage], most_error) for stage, _ in blocks(model)}
    new = converted(model, chosen)
    error = max(relative_l2(new(*one), velocity) for one, velocity in zip(examples, wanted, strict=True))
    if not error <= most_error:  # NaN too
        raise InputError(
            f"in float16 the velocity's relative L2 error on the examples is {error:.3g}, and {most_error:.3g} is the "
            "most; use bfloat16 or float32"
        )
    return new


def relative_l2(found: mx.array, wanted: mx.array) -> float:
    """|found - wanted| / |wanted|, in fp32."""
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    error: Any = (mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)).item()
    return float(error)


def exponents(model: Transformer) -> dict[str, Exponents]:
    """The exponents of every block of a float16 model by its path; empty for another model."""
    return {
        path: Exponents(block.attention_exponent, block.feed_forward_exponent)
        for path, block in blocks(model)
        if isinstance(block, RoundedTransformerBlock)
    }


def measure(
    model: Transformer, examples: Sequence[Sequence[Any]]
) -> tuple[dict[str, dict[str, Reach]], list[mx.array]]:
    """How far values reach in the plain model: stage -> operation -> Reach, the widest over all examples.

    Computed in fp32, by plain operations, one block of it in memory at a time. The velocities of the examples come with
    it. Raises InputError for examples of other shapes and, with the first stage and operation, where values are not
    finite.
    """
    found: dict[str, dict[str, Reach]] = {}
    watched = _cast_around_blocks(without_kernels(unfuse(model)))  # kernels are not checked for fp32
    watched.compiled = False  # in a compiled step nothing is seen
    watched.joined = False  # what stands in for a block does a block's own work only
    plain = dict(blocks(watched))

    def watch(path: str) -> Any:
        def run(*arguments: Any) -> mx.array:
            seen: list[tuple[str, mx.array]] = []
            out: mx.array = _watched(plain[path], seen)(*arguments)
            mx.eval(out, [size for _, size in seen])
            _add(seen, found.setdefault(path, {}), path)
            return out

        return run

    for part in _BLOCKS:
        watched[part] = [watch(f"{part}.{i}") for i in range(len(watched[part]))]
    velocities = []
    for one in examples:
        velocities.append(watched(*one))
        mx.eval(velocities)
    return found, velocities


class _Watched(nn.Module):
    """A layer, and how far what it takes and gives reaches."""

    def __init__(self, layer: nn.Module, see: Callable[[mx.array, mx.array], None]) -> None:
        super().__init__()
        self.layer, self.see = layer, see

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.layer(x)
        self.see(x, y)
        return y


def _watched(block: TransformerBlock, seen: list[tuple[str, mx.array]]) -> TransformerBlock:
    """The block in fp32, with its layers watched."""
    wide = clone(block)
    wide.compiled = False  # in a compiled one nothing is seen
    wide.update(tree_map(_wide, wide.parameters()))

    def note(name: str, values: mx.array) -> None:
        seen.append((name, mx.stack([mx.abs(values).max(), mx.sqrt(mx.square(values).mean())])))

    if "norm_q" in wide.attention:  # whatever it is given: RoPE too keeps a head's length, at most sqrt(its size)
        for norm in (wide.attention.norm_q, wide.attention.norm_k):
            note("qk_norm", norm.weight * wide.attention.head_dim**0.5)

    def watched(path: str, layer: nn.Module) -> nn.Module:
        def see(x: mx.array, y: mx.array) -> None:
            before, own = _LAYERS[path]
            if before is not None:
                note(before, x)
            note(own, y)

        return _Watched(layer, see) if path in _LAYERS else layer

    wide.update_modules(tree_map_with_path(watched, wide.leaf_modules(), is_leaf=nn.Module.is_module))
    return wide


def _add(seen: list[tuple[str, mx.array]], reached: dict[str, Reach], stage: str) -> None:
    """Widen what is known of a stage by what was seen of it."""
    for name, values in seen:
        pair: Any = values.tolist()
        largest, rms = pair
        if not math.isfinite(largest):
            raise InputError(
                f"{stage}: {name} is not finite in float32 either; are the example's values and the weights?"
            )
        known = reached.get(name, Reach(0.0, math.inf))
        reached[name] = Reach(max(known.largest, largest), min(known.rms, rms))


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _cast_around_blocks(model: Transformer) -> Transformer:
    """A model of one's own, all but its blocks in fp32."""
    around = {name: arrays for name, arrays in model.parameters().items() if name not in _BLOCKS}
    model.update(tree_map(_wide, around))
    return model


def choose(stage: str, reached: dict[str, Reach], most_error: float = MOST_ERROR) -> Exponents:
    """The smallest exponents that keep a block's values within LIMIT, an eighth of what float16 holds.

    Raises InputError where values that no exponent divides are beyond it, where dividing leaves so little of others
    that float16 would round them by more than `most_error` of their root mean square, and where some were not seen.
    """
    unscaled = () if "qk_norm" in reached else _QUERIES_AND_KEYS
    chosen = []
    divided: dict[str, int] = {}
    for operations in (_ATTENTION, _FEED_FORWARD):
        names = [name for name in operations if name not in unscaled]
        unseen = [name for name in names if name not in reached]
        if unseen:
            raise InputError(
                f"{stage}: {unseen[0]} is not computed by a layer of its own; apply float16 before transforms that "
                "compute several operations at once"
            )
        furthest = max(reached[name].largest for name in names)
        exponent = max(0, math.ceil(math.log2(furthest / LIMIT))) if furthest else 0
        chosen.append(exponent)
        divided.update(dict.fromkeys(names, exponent))
    for name, reach in reached.items():
        if name not in divided and reach.largest > LIMIT:
            raise InputError(
                f"{stage}: {name} reaches {reach.largest:.3g}, beyond {LIMIT:.0f}, the {HEADROOM}th part of what "
                "float16 holds; use bfloat16 or float32"
            )
        rms = reach.rms * 2.0 ** -divided.get(name, 0)
        error = _SMALLEST_STEP / math.sqrt(12) / rms if rms else 0.0
        if name in divided and error > most_error:
            raise InputError(
                f"{stage}: {name} has a root mean square of {rms:.3g} after a division by 2^{divided[name]}; float16 "
                f"would round that by {error:.2g} of it, and {most_error:.3g} is the most; use bfloat16 or float32"
            )
    return Exponents(*chosen)


def converted(model: Transformer, chosen: dict[str, Exponents], dtype: mx.Dtype = mx.float16) -> Transformer:
    """The model whose blocks compute in `dtype` with values divided as `chosen` says; fused parts are fused again.

    Raises InputError for weights that float16 cannot hold, and for packed ones of modes whose scales take no factor.
    """
    new = _cast_around_blocks(unfuse(model))
    new.t_embedder = RoundedTimestepEmbedder(new.t_embedder, dtype)
    for (path, plain), (_, original) in zip(list(blocks(new)), blocks(model), strict=True):
        block = RoundedTransformerBlock(plain, *chosen[path], dtype)
        _convert(path, block, chosen[path], dtype)
        for part in ("attention", "feed_forward"):
            kind = type(original[part])
            if type(block[part]) is not kind:
                block[part] = kind(block[part])
        mx.eval(block.parameters())
        stage, _, index = path.partition(".")
        new[stage][int(index)] = block
    mx.eval(new.parameters())
    return new


def _convert(path: str, block: TransformerBlock, by: Exponents, dtype: mx.Dtype) -> None:
    """Scale a block of one's own, and hold in `dtype` what its attention and feed-forward compute with."""
    attention = block.attention
    for name, exponent in (("attention_norm", by.attention), ("ffn_norm", by.feed_forward)):
        before, after = block[f"{name}1"], block[f"{name}2"]
        before.weight = before.weight.astype(mx.float32) * 2.0**-exponent
        after.weight = after.weight.astype(mx.float32)
        after.eps *= 4.0**-exponent
    factors = {"feed_forward.w1": 2.0**by.feed_forward}
    if "norm_q" in attention:
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight = norm.weight.astype(dtype)
            norm.eps *= 4.0**-by.attention
    else:
        factors |= dict.fromkeys(("attention.to_q", "attention.to_k"), 2.0**by.attention)
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear):
            _multiply(f"{path}.{name}", layer, factors.get(name, 1.0), dtype)


def _multiply(path: str, layer: Any, factor: float, dtype: mx.Dtype) -> None:
    """Multiply what a linear layer of one's own gives by a power of two, and hold its floats in `dtype`."""
    if factor != 1 and isinstance(layer, nn.QuantizedLinear) and layer.mode != "affine":
        raise InputError(
            f"{path} is packed as {layer.mode}, whose scales take no factor; pack afterwards, the float16 model of the "
            "floating-point weights"
        )
    for name, array in layer.items():
        if not isinstance(array, mx.array) or not mx.issubdtype(array.dtype, mx.floating):
            continue
        if factor == 1 and array.dtype == dtype:
            continue  # as it is, without a copy
        wide = array.astype(mx.float32) * (1.0 if name == "lora_down" else factor)
        largest: Any = mx.abs(wide).max().item()
        if dtype == mx.float16 and not largest <= LARGEST:
            raise InputError(
                f"{path}.{name} has a value of {largest:.3g}, and float16 holds {LARGEST:.0f}; use bfloat16 or float32"
            )
        layer[name] = wide.astype(dtype)
