"""Blocks compiled once, and a step handed over in parts: the plain model's output, what is kept, and what waits."""

import gc
import random
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.synthetic import synthetic
from tests.test_operations import _states, _tiny
from tests.test_transforms import CONFIGS, error, every_config, run
from zimage import arms, details, inputs, launching, operations, transforms
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.launching import ALIVE, Submission
from zimage.layers import clone
from zimage.measure.memory import peak_bytes
from zimage.transformer import State, Transformer, TransformerBlock

import mlx.core as mx
import mlx.nn as nn
import pytest

PLAIN = CONFIGS["plain"]


def _compiles() -> bool:
    """Whether MLX compiles here: on a CPU it needs a C++ compiler, and calls the function every time without one."""
    runs: list[int] = []
    call = mx.compile(lambda x: runs.append(1) or x + 1)
    call(mx.zeros(2))
    call(mx.zeros(2))
    return len(runs) == 1


needs_compiler = pytest.mark.skipif(not _compiles(), reason="MLX finds no compiler here")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[TransformerBlock]:
    """The blocks whose `forward` is run, in order: for compiled ones, each time that they are traced."""
    seen: list[TransformerBlock] = []
    forward = TransformerBlock.forward

    def spied(self: TransformerBlock, *arguments: Any) -> mx.array:
        seen.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(TransformerBlock, "forward", spied)
    return seen


def two_blocks() -> Transformer:
    """A compiled model, small, with no refiners."""
    fields = vars(TransformerConfig.tiny()) | {"n_refiner_layers": 0, "n_layers": 2}
    return transforms.compile_blocks(Transformer(TransformerConfig(**fields)))  # whose arrays no other model has


@every_config
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_compiled_blocks_compute_the_same(config: TransformerConfig, dtype: str, most: float) -> None:
    """Of a ragged batch a compiled model gives the plain one's velocity up to rounding, again and again."""
    model = transforms.cast(synthetic(config), dtype)
    fast = transforms.compile_blocks(model)
    assert {block.compiled for _, block in transforms.blocks(fast)} == {True}
    assert {block.compiled for _, block in transforms.blocks(model)} == {False}
    for seed in (3, 4):
        assert error(run(fast, seed), run(model, seed)) <= most


@needs_compiler
def test_a_block_is_traced_once(traced: list[TransformerBlock]) -> None:
    """Each block is traced at its first call, and at no later one of the same shapes."""
    model = synthetic(PLAIN)
    fast = transforms.compile_blocks(model)
    run(fast)
    assert traced == [block for _, block in transforms.blocks(fast)]
    run(fast, seed=4)
    assert len(traced) == len(list(transforms.blocks(fast)))


@needs_compiler
def test_other_shapes_are_traced_too(traced: list[TransformerBlock]) -> None:
    """A batch of another size is traced once more, is right, and does not displace the first."""
    fast = two_blocks()
    plain = clone(fast)
    for block in plain.layers:
        block.compiled = False
    small, large = (inputs.example(fast, "synthetic:tiny", size, size, 1, 3, 0) for size in (32, 128))
    for example, count in ((small, 2), (large, 4), (small, 4), (large, 4)):
        found = fast(*example)
        assert sum(block.compiled for block in traced) == count
        assert error(found, plain(*example)) <= 1e-6


def _packed(block: TransformerBlock) -> None:
    transforms.pack(block, lambda path, _: transforms.Quantization.parse("8bit-g32") if path.endswith("w2") else None)


def _new_weight(block: TransformerBlock) -> None:
    block.attention.to_v.weight = block.attention.to_v.weight + 1


def _updated(block: TransformerBlock) -> None:
    block.update({"ffn_norm1": {"weight": 3 * block.ffn_norm1.weight}})


def _new_child(block: TransformerBlock) -> None:
    wider = nn.RMSNorm(block.ffn_norm1.weight.shape[0], eps=0.5)
    wider.weight = block.ffn_norm1.weight
    block.ffn_norm1 = wider


@pytest.mark.parametrize("change", [_new_weight, _updated, _packed, _new_child])
def test_a_changed_block_is_compiled_again(change: Callable[[TransformerBlock], None]) -> None:
    """After a weight or a layer of a block was replaced its output is that of the changed block, uncompiled."""
    model = transforms.clone(synthetic(CONFIGS["plain"]))
    fast = transforms.compile_blocks(model)
    before = run(fast)
    for one in (model, fast):
        change(one.layers[0])
    assert error(run(fast), run(model)) <= 1e-6
    assert error(run(fast), before) > 1e-4


@needs_compiler
def test_only_the_changed_block_is_traced_again(traced: list[TransformerBlock]) -> None:
    """Others keep what was compiled, and what was compiled of the old block is kept no longer."""
    fast = transforms.compile_blocks(synthetic(PLAIN))
    run(fast)
    held = len(launching._calls)
    traced.clear()
    _new_weight(fast.layers[1])
    run(fast)
    assert traced == [fast.layers[1]]
    assert len(launching._calls) == held


def test_nothing_is_kept_of_a_dropped_model() -> None:
    """A block, its weights and its compiled call go when its model goes."""
    gc.collect()
    held = len(launching._calls)
    fast = two_blocks()
    mx.eval(fast(*inputs.example(fast, "synthetic:tiny", 32, 32, 1, 3, 0)))
    assert len(launching._calls) == held + 2
    gone = [weakref.ref(fast), *(weakref.ref(block) for block in fast.layers)]
    mx.clear_cache()
    before, weights = mx.get_active_memory(), fast.layers[0].feed_forward.w1.weight.nbytes
    del fast
    gc.collect()
    assert [one() for one in gone] == [None] * 3
    assert len(launching._calls) == held
    assert mx.get_active_memory() <= before - 2 * weights


def test_a_copy_has_compiled_calls_of_its_own() -> None:
    """A weight replaced in a clone of a compiled model, after both have run, changes the clone alone."""
    fast = transforms.compile_blocks(synthetic(PLAIN))
    before = run(fast)
    other = clone(fast)
    assert mx.array_equal(run(other), before)
    _new_weight(other.layers[0])
    assert error(run(other), before) > 1e-4
    assert mx.array_equal(run(fast), before)
    ids = {id(block) for model in (fast, other) for _, block in transforms.blocks(model)}
    assert ids <= {module for module, _ in launching._calls}


def test_lazy_weights_are_computed_once(tmp_path: Path) -> None:
    """Weights that nothing had computed before, as `cast` leaves them, are not computed again in every call."""
    model = synthetic(PLAIN)
    mx.eval(model.parameters())
    computed = transforms.cast(model, "bfloat16")
    mx.eval(computed.parameters())
    casts = []
    for wide in (computed, transforms.cast(model, "bfloat16")):
        fast = transforms.compile_blocks(wide)
        mx.eval(run(fast))
        mx.export_to_dot(str(tmp_path / "graph.dot"), run(fast))
        casts.append((tmp_path / "graph.dot").read_text().count("AsType"))
    assert casts[1] == casts[0]


def test_gradients_go_through_compiled_blocks() -> None:
    """Inside another transformation of MLX's a compiled model still works: its gradients are the plain one's."""
    gradients = []
    for transform in (transforms.clone, transforms.compile_blocks):
        model = transform(synthetic(PLAIN))
        model.unfreeze()
        _, found = nn.value_and_grad(model, lambda m: run(m).square().sum())(model)
        gradients.append(found["layers"][0]["feed_forward"]["w1"]["weight"])
    assert error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("name", ["part_bytes", "waiting_bytes"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", None])
def test_submit_early_refuses_bad_numbers(name: str, value: Any) -> None:
    """Both are integers from 1; anything else is refused in one line that names it."""
    with pytest.raises(InputError, match=f"^{name} must be an integer of at least 1, found {re.escape(repr(value))}$"):
        transforms.submit_early(synthetic(TransformerConfig.tiny()), **{name: value})


@every_config
@pytest.mark.parametrize("sizes", [(1, 1), (1, 10**9), (30_000, 1), (10**9, 10**9), None])
def test_a_step_in_parts_has_the_plain_bits(config: TransformerConfig, sizes: tuple[int, int] | None) -> None:
    """However a step is cut into parts, a ragged batch comes out bit for bit, and the argument is left as it was."""
    model = synthetic(config)
    early = transforms.submit_early(model, *(sizes or ()))
    assert mx.array_equal(run(early), run(model))
    assert model.submission is None


@every_config
@pytest.mark.parametrize("change", [None, transforms.with_all_ones_mask, transforms.compile_blocks])
def test_joined_blocks_have_the_plain_bits(config: TransformerConfig, change: Any) -> None:
    """Each main block begins with what the one before it computed of it, and a ragged batch comes out as it was."""
    model = Transformer(config) if change is None else change(Transformer(config))
    joined = transforms.join_blocks(model)
    assert joined.joined and not model.joined
    assert error(run(joined), run(model)) <= (1e-6 if change is transforms.compile_blocks else 0)
    seen: list[Any] = []
    names = [f"layers.{i}" for i in range(config.n_layers)]
    example = inputs.example(joined, "synthetic:tiny", 64, 64, 2, 5, 0)
    states = _states(joined, example)
    for name in names:
        ahead = states[name].ahead
        seen.append(None if ahead is None else ahead.normed)
    assert [one is None for one in seen] == [False] * (len(names) - 1) + [True]
    for block, name, normed in zip(joined.layers[1:], names[:-1], seen[:-1], strict=True):
        state = states[name]
        assert state.joint is not None and state.temb is not None
        wanted = block.before_attention(state.joint, block.modulation(state.temb)[0])
        assert error(normed, wanted) <= 1e-6


def test_what_was_computed_ahead_is_for_one_block_and_one_input() -> None:
    """Where blocks are left out or the stream is changed between them, a joined model does what a plain one does."""
    model, example = _tiny(TransformerConfig.tiny(n_layers=4))

    def velocity(model: Transformer, left_out: str, change: bool) -> mx.array:
        state = State(*example)
        for stage in model.stages(*example):
            if stage.name == left_out:
                assert state.joint is not None
                state = replace(state, joint=state.joint * 1.5) if change else state
            else:
                state = stage(state)
        assert state.velocity is not None
        return state.velocity

    for left_out, change in (("layers.1", False), ("layers.2", True), ("layers.3", True)):
        found = [velocity(one, left_out, change) for one in (transforms.join_blocks(model), model)]
        assert mx.array_equal(*found)


def test_float16_blocks_are_joined_too() -> None:
    """A float16 model's joined blocks give each other what is rounded to float16, and its velocity bit for bit."""
    model, example = _tiny(PLAIN)
    narrow = transforms.float16(model, example)
    joined = transforms.join_blocks(narrow)
    assert mx.array_equal(joined(*example), narrow(*example))
    ahead = _states(joined, example)["layers.0"].ahead
    assert ahead is not None and ahead.normed.dtype == mx.float16


@pytest.mark.parametrize(("uses", "looks"), [([150], 0), ([400, 400, 220], 2), ([400] * 99, launching._LOOKS)])
def test_what_is_done_is_freed_before_more_is_handed_over(
    uses: list[int], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a wait the host looks until the parts that are left explain the memory in use, but not for ever."""
    device = Device()
    slept: list[float] = []
    use = iter([100, *uses])
    monkeypatch.setattr(mx, "async_eval", device.async_eval)
    monkeypatch.setattr(mx, "eval", device.eval)
    monkeypatch.setattr(mx, "get_active_memory", lambda: next(use))
    monkeypatch.setattr(launching.time, "sleep", slept.append)
    submit = Submission(1, 1).start()
    submit([Sized(0)], 100)  # type: ignore[list-item]
    submit([Sized(0)], 100)  # type: ignore[list-item]
    assert len(device.waiting) == 1 and len(slept) == looks


class Device:
    """Arrays that were handed over, and how many of them waited at most."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.parts: list[Any] = []
        self.most = 0

    def async_eval(self, arrays: Any) -> None:
        self.parts.append(arrays)
        self.waiting.append(arrays)
        self.most = max(self.most, len(self.waiting))

    def eval(self, arrays: Any) -> None:
        assert self.waiting.pop(0) is arrays  # the oldest


@dataclass(frozen=True)
class Sized:
    """An array of which only the size matters."""

    nbytes: int


@pytest.mark.parametrize(
    ("part", "room", "parts", "most"),
    [(1, 1, 17, 1), (1, 3, 17, 3), (1, 100, 17, 17), (3, 6, 6, 2), (3, 1, 6, 1), (100, 100, 1, 1)],
)
def test_no_more_waits_than_was_said(part: int, room: int, parts: int, most: int, monkeypatch: Any) -> None:
    """The first block is a part alone, the others go by size, and the oldest is waited for where too much waits."""
    device = Device()
    monkeypatch.setattr(mx, "async_eval", device.async_eval)
    monkeypatch.setattr(mx, "eval", device.eval)
    submit = Submission(part * ALIVE * 10, room * ALIVE * 10).start()
    kept = Sized(0)
    stages = [[Sized(4), kept, Sized(6)] for _ in range(17)]
    left = []
    for stage in stages:
        submit(stage)  # type: ignore[arg-type]
        left.append(len(device.waiting))
    assert len(device.parts) == parts and device.parts[0] is stages[0]
    assert all(given is stage for given, stage in zip(device.parts[1:], stages[part::part], strict=False))
    assert max(left) == most
    assert device.most <= most + 1  # one is handed over before the oldest is waited for


def test_what_a_block_leaves_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks beside a large array that they don't touch are one part until their own results are enough."""
    device = Device()
    monkeypatch.setattr(mx, "async_eval", device.async_eval)
    monkeypatch.setattr(mx, "eval", device.eval)
    submit = Submission(4 * ALIVE, 10**9).start()
    large = Sized(1000)
    for _ in range(9):
        submit([large, Sized(1)])  # type: ignore[list-item]
    assert len(device.parts) == 3


def test_weights_that_a_block_unpacks_count_as_what_it_computes_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short caption's blocks hold little but their unpacked weights, and are waited for all the same."""
    device = Device()
    monkeypatch.setattr(mx, "async_eval", device.async_eval)
    monkeypatch.setattr(mx, "eval", device.eval)
    submit = Submission(100, 250).start()
    for i in range(5):
        submit([Sized(i)], 100 - ALIVE * i)  # type: ignore[list-item]
    assert len(device.parts) == 5 and len(device.waiting) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_knows_what_it_unpacks(fused: bool) -> None:
    """Each packed layer of attention and feed-forward takes its floating-point size, the others nothing."""
    model, _ = _tiny(PLAIN)
    block = model.layers[0]
    floats = {
        f"{part}.{name}": layer.weight.size
        for part in ("attention", "feed_forward")
        for name, layer in block[part].named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert len(floats) == 7 and block.unpacked_bytes(2) == 0
    packed = transforms.quantize(model, "4bit-g32")
    packed = transforms.fuse_gate_up(transforms.fuse_qkv(packed)) if fused else packed
    assert packed.layers[0].unpacked_bytes(2) == 2 * sum(floats.values())
    rule = {"pattern": "layers.0.feed_forward.w2", "quantization": "8bit-g32"}
    only = transforms.quantize(model, {"default": None, "rules": [rule]})
    assert only.layers[0].unpacked_bytes(4) == 4 * floats["feed_forward.w2"]


def test_a_new_step_waits_for_nothing_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits belongs to one step: the next starts with an empty queue and its first block is a part."""
    device = Device()
    monkeypatch.setattr(mx, "async_eval", device.async_eval)
    monkeypatch.setattr(mx, "eval", device.eval)
    submission = Submission(1, 1)
    for _ in range(3):
        device.waiting.clear()
        submit = submission.start()
        for i in range(3):
            submit([Sized(1 + i)])  # type: ignore[list-item]
        assert len(device.waiting) == 1


def _handed_over(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    parts: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", parts.append)
        work()
    return len(parts)


def test_profiles_hand_over_as_the_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix, and a step of fewer blocks, are handed over block by block as the model's own call is; others never."""
    model, example = _tiny(PLAIN)
    early = transforms.submit_early(model, 1)
    names, prefix = operations.stage_prefix(early, example)
    depth = operations.with_main_blocks(early, example)
    assert _handed_over(monkeypatch, lambda: early(*example)) == len(names) - 4
    assert [_handed_over(monkeypatch, lambda k=k: prefix(k)) for k in (3, 4, 6)] == [0, 1, 3]  # type: ignore[misc]
    assert _handed_over(monkeypatch, lambda: depth(1)) == len(names) - 4 - len(model.layers) + 1
    assert _handed_over(monkeypatch, lambda: operations.stage_prefix(model, example)[1](4)) == 0


ALONE = ("compile_operations", "compile_step")  # not beside kernels; not beside a step in parts
EXACT: dict[str, Callable[[Transformer], Transformer]] = {
    name: transform
    for name, transform in arms.TRANSFORMS.items()
    if not name.startswith(("quantize_input", "tea_cache", "reuse_"))
    and name not in (*arms.NEED_EXAMPLES, *details.TRANSFORMS, *ALONE)
}
OTHERS: dict[str, Callable[[Transformer], Transformer]] = {
    "quantize": lambda model: transforms.quantize(model, "8bit-g32"),
    "with_all_ones_mask": transforms.with_all_ones_mask,
}


@pytest.mark.parametrize("seed", range(4))
def test_both_go_with_every_other_transform_in_any_order(seed: int) -> None:
    """Whatever the order, a ragged batch is what packing and masking alone make of it, up to rounding."""
    order = [*EXACT, *OTHERS]
    random.Random(seed).shuffle(order)
    fast = plain = synthetic(CONFIGS["grouped queries"])
    for name in order:
        fast = (EXACT | OTHERS)[name](fast)
        plain = OTHERS[name](plain) if name in OTHERS else plain
    assert all(block.compiled for _, block in transforms.blocks(fast)) and fast.submission is not None
    assert error(run(fast), run(plain)) <= 1e-5


def test_a_step_in_parts_takes_no_more_memory() -> None:
    """On a CPU the peak of a step in parts is not above the plain one's, but for the results of the parts that wait."""
    model, example = _tiny(TransformerConfig.tiny(n_layers=4))
    mx.eval(model.parameters())
    early = transforms.submit_early(model)
    peaks: Sequence[int] = [
        min(peak_bytes(lambda one=one: one(*example)) for _ in range(3))  # type: ignore[misc]
        for one in (model, early)
    ]
    joint = _states(model, example)["layers.0"].joint
    assert joint is not None and early.submission is not None
    assert peaks[1] <= peaks[0] + len(model.layers) * joint.nbytes
