"""A step taken apart to be profiled: its stages as chains to evaluate, and a block's operations one by one.

The operations of a block are the same calls as the block itself makes, at the shapes and memory layouts that they have
in it; performed one after the other they give the block's output bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zimage.errors import InputError
from zimage.kernels.heads import rotate
from zimage.kernels.stream import residual
from zimage.layers import clone
from zimage.measure import profile
from zimage.measure.profile import Clock, Time
from zimage.measure.timing import timed
from zimage.transformer import Captions, State, Transformer, TransformerBlock
from zimage.transforms import blocks

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Example = tuple[mx.array, mx.array, Captions]  # what a model is called with
Values = Mapping[str, mx.array | None]  # a block's activations by name
_Run = Callable[[TransformerBlock, Values], list[mx.array]]
_Make = Callable[[], tuple[TransformerBlock, Values]]
ROTATED_BYTES = 2**28  # several times the last-level cache of any device this runs on (an H100's L2 has 50 MB)


class Operation(NamedTuple):
    """One kernel-sized piece of a block: which values it takes and gives, and how a block computes it.

    covers: the plain operations that a fused kernel does at once, empty where it is a plain one itself. All of them lie
    in the same block, so that no work moves to another stage.
    """

    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    run: Callable[..., Any]  # block, values -> value, or values where it gives several
    covers: tuple[str, ...] = ()


def operations(block: TransformerBlock) -> list[Operation]:
    """The operations of a block in order, from `x`, `rotation`, `mask` and `temb` to the new `x`.

    A kernel that does several is one operation under its own name: `qk_norm_rope`, and `attention_residual_norm` for
    `attention_residual` and `ffn_norm1`. Kernels that do one operation alone keep its name.
    """
    attention, feed_forward = block.attention, block.feed_forward
    found = []
    if "adaLN_modulation" in block:
        gives = ("scale_msa", "gate_msa", "scale_mlp", "gate_mlp")
        found.append(Operation("adaln", ("temb",), gives, lambda b, temb: b.modulation(temb)))
    found.append(
        Operation("attention_norm1", ("x", "scale_msa"), ("normed",), lambda b, x, s: b.before_attention(x, s))
    )
    if "to_qkv" in attention:
        found.append(Operation("to_qkv", ("normed",), ("q", "k", "v"), lambda b, x: b.attention.project(x)))
    else:
        found += [_projection("q"), _projection("k"), _projection("v")]
    if "norm_q" in attention and _replaced(attention, "norm_then_rotate"):
        taken, turn = ("q", "k", "rotation"), lambda b, q, k, r: b.attention.turned(q, k, r)
        found.append(Operation("qk_norm_rope", taken, ("q", "k"), turn, ("qk_norm", "rope")))
    else:
        if "norm_q" in attention:
            found.append(Operation("qk_norm", ("q", "k"), ("q", "k"), lambda b, q, k: b.attention.norm(q, k)))
        found.append(
            Operation("rope", ("q", "k", "rotation"), ("q", "k"), lambda _b, q, k, r: (rotate(q, r), rotate(k, r)))
        )
    found += [
        Operation("sdpa", ("q", "k", "v", "mask"), ("attended",), lambda b, *qkv: b.attention.attend(*qkv)),
        Operation("to_out", ("attended",), ("change",), lambda b, x: b.attention.to_out[0](x)),
        *_between(block),
    ]
    if "w13" in feed_forward:
        found.append(Operation("w13", ("normed",), ("gate", "up"), lambda b, x: b.feed_forward.gate_and_up(x)))
    else:
        found.append(Operation("w1", ("normed",), ("gate",), lambda b, x: b.feed_forward.w1(x)))
        found.append(Operation("w3", ("normed",), ("up",), lambda b, x: b.feed_forward.w3(x)))
    return [
        *found,
        Operation("swiglu", ("gate", "up"), ("hidden",), lambda b, gate, up: b.feed_forward.swiglu(gate, up)),
        Operation("w2", ("hidden",), ("change",), lambda b, x: b.feed_forward.w2(x)),
        Operation(
            "ffn_residual", ("x", "change", "gate_mlp"), ("x",), lambda b, x, y, g: b.after_feed_forward(x, y, g)
        ),
    ]


_FUSIONS = {"to_qkv": "qkv", "w13": "gate_up", "qk_norm_rope": "norm_rope", "attention_residual_norm": "residual_norm"}


def fused(model: Transformer) -> tuple[str, ...]:
    """What the model's blocks do in one operation, in the names that `cost.step` takes as `fused`."""
    found = [{operation.name for operation in operations(block)} for _, block in blocks(model)]
    return tuple(fusion for name, fusion in _FUSIONS.items() if all(name in names for names in found))


def _replaced(module: nn.Module, name: str) -> bool:
    """Whether a kernel, or another way to compute the same, stands in the place of the module's own operations."""
    return name in module.__dict__


def _between(block: TransformerBlock) -> list[Operation]:
    """From the attention's output to the feed-forward's input."""
    if _replaced(block, "residual_norm_modulate"):
        takes, covers = ("x", "change", "gate_msa", "scale_mlp"), ("attention_residual", "ffn_norm1")
        run = lambda b, x, y, g, s: b.after_attention(x, y, g, s)  # noqa: E731
        return [Operation("attention_residual_norm", takes, ("x", "normed"), run, covers)]
    return [
        Operation(
            "attention_residual",
            ("x", "change", "gate_msa"),
            ("x",),
            lambda b, x, y, g: residual(x, b.attention_norm2(y), g),
        ),
        Operation("ffn_norm1", ("x", "scale_mlp"), ("normed",), lambda b, x, s: b.before_feed_forward(x, s)),
    ]


def _projection(letter: str) -> Operation:
    def run(block: TransformerBlock, x: mx.array) -> mx.array:
        return block.attention.heads(block.attention[f"to_{letter}"](x))

    return Operation(f"to_{letter}", ("normed",), (letter,), run)


def perform(done: Sequence[Operation], block: TransformerBlock, values: Values) -> Values:
    """The values of a block after some of its operations, not yet computed; those that no operation gave are kept."""
    found = dict(values)
    for operation in done:
        result = operation.run(block, *(found.get(name) for name in operation.takes))
        found.update(zip(operation.gives, result if len(operation.gives) > 1 else (result,), strict=True))
    return found


@dataclass(frozen=True)
class BlockOperation:
    """One operation of a block, or the whole `block`, to be timed alone, its inputs and weights going round.

    sets: how many different ones there are, each with the activations and the weights of another block of the model;
    rotated_bytes: what the activations of all sets take. Fewer than asked for where the model has no more alike blocks:
    then they are what goes round in the model itself.
    """

    stage: str
    name: str
    rotated_bytes: int
    count: int
    _run: _Run
    _make: tuple[_Make, ...]

    @property
    def sets(self) -> int:
        """How many different inputs and weights go round."""
        return len(self._make)

    def prepare(self) -> Callable[[int], Callable[[], list[mx.array]]]:
        """Compute the inputs of all sets, and give what `profile.slope` takes: r -> work that does it r times.

        The inputs are held as long as what is given.
        """
        calls = [self._call(*make()) for make in self._make]

        def repeat(r: int) -> Callable[[], list[mx.array]]:
            return lambda: [array for i in range(r) for array in calls[i % len(calls)]()]

        return repeat

    def _call(self, block: TransformerBlock, values: Values) -> Callable[[], list[mx.array]]:
        """One set's call, compiled where the block is: what is timed should not be the host that builds it."""
        given = {name: array for name, array in values.items() if array is not None}
        if not block.compiled or self.name == "block":  # which compiles itself
            return lambda: self._run(block, values)

        def run(*arrays: mx.array) -> list[mx.array]:
            return self._run(block, {**values, **dict(zip(given, arrays, strict=True))})

        call = mx.compile(run)
        return lambda: list(call(*given.values()))

    def repeat(self, r: int) -> Callable[[], list[mx.array]]:
        """Work that performs the operation r times in one evaluation and returns all that has to be computed."""
        return self.prepare()(r)


def of_block(
    model: Transformer, example: Example, stage: str = "layers.0", rotate_bytes: int = ROTATED_BYTES
) -> list[BlockOperation]:
    """The operations of the block that is the stage called `stage`, in order, as it is called in model(*example).

    Inputs are the block's own activations, computed again in each set: from its input, turned along its tokens, with
    the weights of another alike block. Sets are as many as it takes for the activations to exceed `rotate_bytes`, but
    no more than there are alike blocks. Raises InputError for a stage that is no block of the model.
    """
    found, _ = _taken_apart(model, example, stage, rotate_bytes)
    return found


@dataclass(frozen=True)
class BlockTimes:
    """The operation view of a block: each operation's time, the block's by the same method, and their difference.

    The intervals of operations and block hold together. unattributed is block - sum of operations in each round,
    signed, at alpha. Repetitions don't depend on each other while a block's operations do: where one alone doesn't fill
    the device its repetitions overlap, and the rest is positive. It is negative where a block's operations overlap or
    find their inputs in a cache. Where the block is compiled each operation is too, by itself. note: why there are no
    intervals, or "".
    """

    stage: str
    operations: list[Time]
    block: Time
    unattributed: Time
    sets: dict[str, int]
    note: str

    def by_operation(self) -> dict[tuple[str, str], tuple[float, float, float]]:
        """(stage, operation) -> (time, low, high) in seconds, with `unattributed` at the end."""
        times = [*self.operations, self.unattributed]
        return {(self.stage, t.name): (t.time_s, t.low_s, t.high_s) for t in times}


def times(
    model: Transformer,
    example: Example,
    stage: str,
    rounds: int,
    seed: int,
    *,
    repeats: Sequence[int] = (1, 2, 4, 8),
    alpha: float = 0.05,
    rotate_bytes: int = ROTATED_BYTES,
    clock: Clock = timed,
) -> BlockTimes:
    """Time every operation of a block, and the block, each as the slope over `repeats`, in turns.

    The inputs of all are held together, each a little more than `rotate_bytes`, or two sets. Raises InputError as
    `of_block` and MeasurementError as `profile.slopes` does.
    """
    found, whole = _taken_apart(model, example, stage, rotate_bytes)
    every = [*found, whole]
    taken = profile.slopes({one.name: one.prepare() for one in every}, rounds, seed, repeats, alpha=alpha, clock=clock)
    block = taken.pop(whole.name)
    rest = np.array(block.samples_s) - np.sum([time.samples_s for time in taken.values()], axis=0)
    unattributed = profile.estimate("unattributed", rest, alpha)
    return BlockTimes(
        stage,
        list(taken.values()),
        block,
        unattributed,
        {one.name: one.sets for one in every},
        profile.note(rounds, alpha / len(every)),
    )


def require_blocks(model: Transformer, stages: Sequence[object]) -> None:
    """Raise InputError unless there is at least one, and each is the name of one of the model's blocks."""
    known = [name for name, _ in blocks(model)]
    for stage in stages or ["nothing"]:
        if stage not in known:
            raise InputError(f"{stage!r} is no block of this model; it has {', '.join(known)}")


def stage_prefix(model: Transformer, example: Example) -> tuple[list[str], Callable[[int], list[mx.array]]]:
    """Names of the model's stages, and `run(k)` that builds the first k: what the prefix view and memory take.

    A model that submits early hands over the stages of a prefix as it does those of the whole step.
    """
    stages = model.stages(*example)

    def run(k: int) -> list[mx.array]:
        return model.through(stages[:k], State(*example)).arrays()

    return [stage.name for stage in stages], run


def with_main_blocks(model: Transformer, example: Example) -> Callable[[int], list[mx.array]]:
    """`run(m)` that builds a step with only the first m >= 1 of the main blocks, as the depth view takes."""
    stages = model.stages(*example)
    last = len(model.layers)

    def run(m: int) -> list[mx.array]:
        if not 1 <= m <= last:
            raise InputError(f"a step has 1 to {last} main blocks here, found {m}")
        left_out = {f"layers.{i}" for i in range(m, last)}
        return model.through([stage for stage in stages if stage.name not in left_out], State(*example)).arrays()

    return run


def stage_steps(model: Transformer, example: Example) -> tuple[list[str], Callable[[int], list[mx.array]]]:
    """Names of the model's stages, and `step(k)` that continues from step k - 1, as an NVTX capture takes."""
    stages = model.stages(*example)
    states = {0: State(*example)}

    def step(k: int) -> list[mx.array]:
        states[k] = stages[k - 1](states.pop(k - 1) if k > 1 else states[0])
        return states[k].arrays()

    return [stage.name for stage in stages], step


def _taken_apart(
    model: Transformer, example: Example, stage: str, rotate_bytes: int
) -> tuple[list[BlockOperation], BlockOperation]:
    """The operations of a block, and the block itself."""
    inputs = _inputs_of(model, example, stage)
    peers = list(_alike(model, stage))
    parts = operations(peers[0])

    def one(name: str, before: Sequence[Operation], takes: Sequence[str], run: _Run) -> BlockOperation:
        """What `run` does with the values there are after the operations `before`."""

        def make(i: int) -> _Make:
            return lambda: (peers[i], _computed(perform(before, peers[i], _turned(inputs, i)), takes))

        given = perform(before, peers[0], inputs)
        moving = sum(a.nbytes for n in takes if n not in _SHARED and (a := given.get(n)) is not None)
        sets = min(len(peers), max(2, math.ceil(rotate_bytes / max(moving, 1))))
        return BlockOperation(stage, name, moving * sets, 1, run, tuple(make(i) for i in range(sets)))

    def performing(part: Operation) -> _Run:
        def run(block: TransformerBlock, values: Values) -> list[mx.array]:
            after = perform([part], block, values)
            return [array for name in part.gives if (array := after[name]) is not None]

        return run

    def whole(block: TransformerBlock, values: Values) -> list[mx.array]:
        arguments: Any = [values.get(name) for name in _ARGUMENTS]
        return [block(*arguments)]

    found = [one(part.name, parts[:i], part.takes, performing(part)) for i, part in enumerate(parts)]
    return found, one("block", [], _ARGUMENTS, whole)


_ARGUMENTS = ("x", "rotation", "mask", "temb")  # of a block
_SHARED = _ARGUMENTS[1:]  # the same arrays in every block of the model too


def _computed(values: Values, names: Sequence[str]) -> Values:
    """Some of the values, computed."""
    kept = {name: values.get(name) for name in names}
    mx.eval([array for array in kept.values() if array is not None])
    return kept


def _turned(inputs: Values, i: int) -> Values:
    """A block's inputs with other values of the same kind at every place: its tokens moved on by i."""
    x = inputs["x"]
    assert x is not None
    return {**inputs, "x": mx.roll(x, i, 1)} if i else inputs


def _inputs_of(model: Transformer, example: Example, stage: str) -> Values:
    """The arrays that the block which is the stage called `stage` is called with in model(*example), computed."""
    require_blocks(model, [stage])
    part, _, index = stage.partition(".")
    given: list[mx.array | None] = []

    def record(*arguments: mx.array | None) -> mx.array | None:
        given.extend(arguments)
        return arguments[0]

    watched = clone(model)
    watched.joined, watched.stacked_modulation = False, None  # a block is given no more than its own input
    watched[part][int(index)] = record
    names, run = stage_prefix(watched, example)
    run(names.index(stage) + 1)
    return _computed(dict(zip(_ARGUMENTS, given, strict=False)), _ARGUMENTS)


def _alike(model: Transformer, stage: str) -> Iterator[TransformerBlock]:
    """The block called `stage`, then the blocks whose weights are of the same kinds, those after it first.

    Where it has no modulation, theirs is left out.
    """
    named = list(blocks(model))
    at = [name for name, _ in named].index(stage)
    own = named[at][1]
    modulated = "adaLN_modulation" in own
    wanted = _kinds(own, modulated)
    for _, block in named[at:] + named[:at]:
        if _kinds(block, modulated) == wanted:
            yield block if modulated or "adaLN_modulation" not in block else _unmodulated(block)


def _unmodulated(block: TransformerBlock) -> TransformerBlock:
    """The same weights in a block that is called without a timestep."""
    plain = clone(block)
    del plain["adaLN_modulation"]
    return plain


def _kinds(block: TransformerBlock, modulated: bool) -> dict[str, Any]:
    """The type of every module of a block, and its arrays' shapes and dtypes; modulation only where it is used."""

    def kind(module: nn.Module) -> Any:
        arrays = {n: (a.shape, a.dtype) for n, a in module.items() if isinstance(a, mx.array)}
        own = [n for n, v in module.__dict__.items() if callable(v)]
        return type(module), arrays, own, module.__dict__.get("mode"), module.__dict__.get("bits")

    found = {path: kind(module) for path, module in block.named_modules()}
    return {path: k for path, k in found.items() if modulated or not path.startswith("adaLN_modulation")}
