"""The operations of a block: all of it, bit for bit, at its own shapes; a planted time is found where it is."""

import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import zimage
from tests.synthetic import synthetic
from zimage import arms, inputs, launching, operations, transforms
from zimage.analysis import cost, roofline
from zimage.config import TransformerConfig
from zimage.errors import InputError, MeasurementError
from zimage.measure.samples import Timed
from zimage.operations import BlockOperation, perform
from zimage.transformer import State, Transformer
from zimage.transforms import blocks

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

Model = tuple[Transformer, inputs.Inputs]
PLAIN = [
    *("adaln", "attention_norm1", "to_q", "to_k", "to_v", "qk_norm", "rope", "sdpa", "to_out", "attention_residual"),
    *("ffn_norm1", "w1", "w3", "swiglu", "w2", "ffn_residual"),
]
FUSED = [
    *("adaln", "attention_norm1", "to_qkv", "qk_norm", "rope", "sdpa", "to_out", "attention_residual"),
    *("ffn_norm1", "w13", "swiglu", "w2", "ffn_residual"),
]


def _fused(model: Transformer) -> Transformer:
    return transforms.fuse_gate_up(transforms.fuse_qkv(model))


TRANSFORMS: dict[str, Callable[[Transformer], Transformer]] = {
    "plain": lambda model: model,
    "fused": _fused,
    "4bit": lambda model: transforms.quantize(model, "4bit-g32"),
    "fused 8bit": lambda model: _fused(transforms.quantize(model, "8bit-g32")),
    "rounded input": transforms.quantize_input,
}
CONFIGS = {
    "tiny": TransformerConfig.tiny(n_layers=3),
    "without qk_norm": TransformerConfig.tiny(qk_norm=False),
    "grouped queries": TransformerConfig.tiny(n_kv_heads=1),
}


def _tiny(config: TransformerConfig, dtype: mx.Dtype = mx.float32) -> Model:
    """A synthetic model with a ragged batch, whose captions need a mask."""
    model = synthetic(config, dtype=dtype)
    keys = mx.random.split(mx.random.key(5), 3)
    latents = mx.random.normal((2, config.in_channels, 6, 8), key=keys[0])
    captions = [mx.random.normal((n, config.cap_feat_dim), key=keys[i]) for i, n in ((1, 5), (2, 40))]
    return model, inputs.Inputs(latents, mx.array([0.3, 0.7]), captions)


@pytest.fixture(scope="module")
def digits() -> Model:
    """The model that ships with the package, and what it is called with."""
    model = zimage.load_transformer("digits")
    return model, inputs.example(model, "digits", 8, 8, 2, 1, 0)


def _states(model: Transformer, example: inputs.Inputs) -> dict[str, State]:
    """The state after each stage."""
    state, found = State(*example), {}
    for stage in model.stages(*example):
        state = found[stage.name] = stage(state)
    return found


def _check_all_blocks(model: Transformer, example: inputs.Inputs) -> None:
    """The operations of every block, each computed before the next, give what its stage gives in the forward pass."""
    states = _states(model, example)
    for name, block in blocks(model):
        values = operations._inputs_of(model, example, name)
        for operation in operations.operations(block):
            values = perform([operation], block, values)
            mx.eval([array for array in values.values() if array is not None])
        part = {"noise_refiner": "image", "context_refiner": "caption", "layers": "joint"}[name.partition(".")[0]]
        wanted = getattr(states[name], part)
        assert values["x"] is not None and values["x"].dtype == wanted.dtype
        assert mx.array_equal(values["x"], wanted), name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_operations_are_the_whole_block_on_digits(transform: str, digits: Model) -> None:
    """One after the other the operations give every block's output bit for bit: plain, fused, quantized, both."""
    _check_all_blocks(TRANSFORMS[transform](digits[0]), digits[1])


@pytest.mark.parametrize("transform", ["plain", "fused"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_the_operations_are_the_whole_block_of_any_config(dtype: mx.Dtype, config: str, transform: str) -> None:
    """So they do with masks, without QK norm, with grouped queries, and in bf16."""
    model, example = _tiny(CONFIGS[config], dtype)
    _check_all_blocks(TRANSFORMS[transform](model), example)


@pytest.mark.parametrize(
    ("stage", "transform", "names"),
    [
        ("layers.0", "plain", PLAIN),
        ("noise_refiner.0", "4bit", PLAIN),
        ("layers.1", "fused", FUSED),
        ("context_refiner.0", "plain", PLAIN[1:]),
        ("context_refiner.0", "fused 8bit", FUSED[1:]),
    ],
)
def test_operations_have_their_names(stage: str, transform: str, names: list[str], digits: Model) -> None:
    """Each operation has its name, in order: no adaln without modulation, to_qkv and w13 where they are fused."""
    found = operations.of_block(TRANSFORMS[transform](digits[0]), digits[1], stage)
    assert [one.name for one in found] == names
    assert {(one.stage, one.count) for one in found} == {(stage, 1)}


def test_a_config_without_qk_norm_has_no_such_operation() -> None:
    """qk_norm is left out where the model has none."""
    found = operations.of_block(*_tiny(CONFIGS["without qk_norm"]))
    assert [one.name for one in found] == [name for name in PLAIN if name != "qk_norm"]


def _one(found: list[BlockOperation], name: str) -> BlockOperation:
    return next(one for one in found if one.name == name)


def _sets(one: BlockOperation) -> list[Any]:
    return [make() for make in one._make]


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        ("layers.1", ["layers.1", "layers.2", "noise_refiner.0", "layers.0"]),
        ("context_refiner.0", ["context_refiner.0", "layers.0", "layers.1", "layers.2", "noise_refiner.0"]),
    ],
)
def test_inputs_and_weights_go_round(stage: str, order: list[str], digits: Model) -> None:
    """Every set has the weights of another block, its own first, and other activations, finite and of one scale."""
    model, example = digits
    named = dict(blocks(model))
    for one in operations.of_block(model, example, stage):
        sets = _sets(one)
        assert one.sets == len(sets) == len(order)
        for (block, _), name in zip(sets, order, strict=True):
            assert block.feed_forward.w1.weight is named[name].feed_forward.w1.weight
            assert block.attention.to_q.weight is named[name].attention.to_q.weight
        for name in set(sets[0][1]) - {"temb", "rotation", "mask", "scale_msa", "gate_msa", "scale_mlp", "gate_mlp"}:
            arrays = [np.array(values[name]) for _, values in sets]
            assert all(np.isfinite(array).all() for array in arrays)
            spreads = [array.std() for array in arrays]
            assert 0 < max(spreads) < 100 * min(spreads), (one.name, name)
            assert len({array.tobytes() for array in arrays}) == len(order), (one.name, name)


def test_as_many_sets_as_exceed_the_caches(digits: Model) -> None:
    """The sets' activations exceed what was asked for, with two sets at least, or are all alike blocks'."""
    found = operations.of_block(*digits, "layers.0", rotate_bytes=1)
    assert {one.sets for one in found} == {2}
    x = digits[1].latents.shape[0] * 96 * 192 * 4  # 64 image tokens and 32 of the caption, in fp32
    w2 = _one(operations.of_block(*digits, "layers.0", rotate_bytes=3 * x), "to_q")
    assert (w2.sets, w2.rotated_bytes) == (3, 3 * x)


def test_blocks_of_another_kind_do_not_go_round(digits: Model) -> None:
    """A block that is packed differently takes no part in another's rotation."""
    model = transforms.clone(digits[0])
    transforms.pack(model.layers[1], lambda _path, _layer: transforms.Quantization.parse("4bit"))
    named = dict(blocks(model))
    assert list(operations._alike(model, "layers.0")) == [named[n] for n in ("layers.0", "layers.2", "noise_refiner.0")]
    assert list(operations._alike(model, "layers.1")) == [named["layers.1"]]
    assert {one.sets for one in operations.of_block(model, digits[1], "layers.1")} == {1}


def test_a_repetition_is_performed_every_time(digits: Model) -> None:
    """r repetitions give r results, of the sets in turn, each what the operation gives, and compute nothing else."""
    model, example = digits
    one = _one(operations.of_block(model, example), "to_q")
    sets = _sets(one)
    results = one.repeat(6)()
    assert len(results) == 6
    for i, result in enumerate(results):
        block, values = sets[i % len(sets)]
        assert mx.array_equal(result, block.attention.heads(block.attention.to_q(values["normed"])))
    assert len(_one(operations.of_block(model, example), "adaln").repeat(3)()) == 3 * 4
    work = one.prepare()(5)
    mx.clear_cache()
    before = mx.get_active_memory()
    held = work()
    mx.eval(held)
    assert mx.get_active_memory() - before == pytest.approx(5 * held[0].nbytes, rel=0.01)  # inputs were there before


def test_inputs_have_the_layout_they_have_in_the_block(digits: Model) -> None:
    """After a fused projection the queries are a view with gaps, as they are in the block, and not a copy."""
    model, example = digits
    strides = {}
    for name, transform in (("plain", model), ("fused", transforms.fuse_qkv(model))):
        _, values = _sets(_one(operations.of_block(transform, example), "qk_norm"))[0]
        strides[name] = memoryview(values["q"]).strides
    assert strides["plain"] == (96 * 192 * 4, 192 * 4, 64 * 4, 4)
    assert strides["fused"] == (96 * 576 * 4, 576 * 4, 64 * 4, 4)


class _Slow(nn.Module):
    """A linear layer that costs more."""

    def __init__(self, layer: nn.Module, cost: Callable[[], None]) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "cost", cost)

    def __call__(self, x: mx.array) -> mx.array:
        self.cost()
        return self.layer(x)


def _with_slow_w2(model: Transformer, cost: Callable[[], None]) -> Transformer:
    """A transform that plants a cost in one operation of every block."""
    new = transforms.clone(model)
    for _, block in blocks(new):
        block.feed_forward.w2 = _Slow(block.feed_forward.w2, cost)
    return new


class _Counted:
    """A clock on which everything takes 50 us an evaluation, 20 us an array, and what was spent meanwhile."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._random = np.random.default_rng(0)

    def spend(self) -> None:
        """A planted millisecond."""
        self.spent_s += 1e-3

    def __call__(self, work: Callable[[], Any]) -> Timed:
        """A timed call of `work`, with 2 % of noise."""

        def call() -> float:
            before = self.spent_s
            arrays = work()
            mx.eval(arrays)
            true = 50e-6 + 20e-6 * len(arrays) + self.spent_s - before
            return float(true * np.exp(0.02 * self._random.standard_normal()))

        return call


def test_a_planted_time_is_found_in_its_operation_and_nowhere_else(digits: Model) -> None:
    """1 ms more in w2 is in the interval of w2 and of the block, and no other operation's; the rest is signed."""
    model, example = digits
    clock = _Counted()
    found = operations.times(_with_slow_w2(model, clock.spend), example, "layers.0", 12, 0, clock=clock)
    assert [one.name for one in found.operations] == PLAIN
    arrays = {"adaln": 4, "qk_norm": 2, "rope": 2}
    for one in found.operations:
        wanted = 20e-6 * arrays.get(one.name, 1)
        assert one.low_s <= wanted + 1e-3 * (one.name == "w2") <= one.high_s, one
        assert not one.low_s <= wanted + 1e-3 * (one.name != "w2") <= one.high_s
    assert found.block.low_s <= 20e-6 + 1e-3 <= found.block.high_s
    # On this clock the block gives one array and its operations 21: they cost more alone, so the rest is negative.
    assert found.unattributed.low_s <= -20 * 20e-6 <= found.unattributed.high_s < 0
    total = sum(one.samples_s[3] for one in found.operations) + found.unattributed.samples_s[3]
    assert total == pytest.approx(found.block.samples_s[3])
    rows = found.by_operation()
    assert list(rows) == [("layers.0", name) for name in [*PLAIN, "unattributed"]]
    assert rows["layers.0", "w2"] == (
        found.operations[14].time_s,
        found.operations[14].low_s,
        found.operations[14].high_s,
    )


def test_a_sleeping_operation_is_found(digits: Model) -> None:
    """On the real clock an operation that sleeps 20 ms shows in itself, in the block, and in no other operation."""
    model = _with_slow_w2(digits[0], lambda: time.sleep(0.020))
    found = operations.times(model, digits[1], "layers.0", 4, 0, repeats=(1, 3))
    for one in found.operations:
        if one.name == "w2":
            assert one.time_s == pytest.approx(0.020, rel=0.4)
        else:
            assert abs(one.time_s) < 0.008, one
    assert found.block.time_s > 0.015
    assert abs(found.unattributed.time_s) < 0.020
    assert found.note == "no intervals: 4 rounds are too few at this level, it takes 10"


def test_unknown_stages_are_refused(digits: Model) -> None:
    """A stage that is no block gives an InputError of one line with the names there are."""
    for stage in ("layers.9", "t_embedder", "", "layers", "layers.-1", "layers.x"):
        with pytest.raises(InputError, match=r"is no block of this model; it has noise_refiner.0, .*layers.2$"):
            operations.of_block(*digits, stage)
    with pytest.raises(MeasurementError, match="rounds must be"):
        operations.times(*digits, "layers.0", 0, 0)


def test_prefixes_and_steps_of_a_model(digits: Model) -> None:
    """run(k) gives the state after k stages from the start, step(k) the same from step k - 1, as often as asked."""
    model, example = digits
    names, run = operations.stage_prefix(model, example)
    steps, step = operations.stage_steps(model, example)
    wanted = _states(model, example)
    assert names == steps == list(wanted)
    for _ in range(2):
        for k, state in enumerate(wanted.values(), start=1):
            for found in (run(k), step(k)):
                assert len(found) == len(state.arrays())
                assert all(mx.array_equal(a, b) for a, b in zip(found, state.arrays(), strict=True))


def test_a_step_with_fewer_blocks(digits: Model) -> None:
    """run(m) is the step of a model that has only the first m main blocks; other counts are refused."""
    model, example = digits
    run = operations.with_main_blocks(model, example)
    for m in (1, 2, 3):
        shallow = transforms.clone(model)
        shallow.layers = shallow.layers[:m]
        (velocity,) = run(m)
        assert mx.array_equal(velocity, shallow(*example))
    for m in (0, 4):
        with pytest.raises(InputError, match=f"1 to 3 main blocks here, found {m}"):
            run(m)


def test_a_block_without_modulation_is_timed_among_others_without_theirs() -> None:
    """A context refiner's inputs go round among all blocks, and those with modulation are called without."""
    model = zimage.load_transformer("digits")
    example = inputs.example(model, "digits", 8, 8, 1, 1, 0)
    found = operations.times(
        model, example, "context_refiner.0", 1, 0, clock=lambda work: lambda: mx.eval(work()) or 1.0
    )
    assert found.sets["block"] > len(model.context_refiner)
    assert ("context_refiner.0", "adaln") not in found.by_operation()


@pytest.mark.parametrize("stages", [[], ["layers.9"], ["layers.0", "layes.1"], [1], ["final_layer"]])
def test_what_is_no_block_is_refused(stages: list[object]) -> None:
    """One wrong name among others, no name at all and what is no name are refused with the names there are."""
    model = zimage.load_transformer("digits")
    with pytest.raises(
        InputError, match=r"no block of this model; it has noise_refiner\.0, context_refiner\.0, layers\.0"
    ):
        operations.require_blocks(model, stages)
    operations.require_blocks(model, ["layers.2", "context_refiner.0"])


STEP_TRANSFORMS = (*arms.FAST, "wide_dequantize")


@pytest.mark.parametrize("config", CONFIGS)
def test_every_operation_has_its_cost(config: str) -> None:
    """Whatever transforms are combined, a block's operations are the rows of its stage in the cost model, in order."""
    model = synthetic(CONFIGS[config])
    combined = [[*chosen] for n in range(len(STEP_TRANSFORMS) + 1) for chosen in combinations(STEP_TRANSFORMS, n)]
    found = arms.variants(model, {" ".join(names): names for names in combined})
    assert len(found) == 2 ** len(STEP_TRANSFORMS)
    for name, one in found.items():
        fused = operations.fused(one)
        assert set(fused) <= set(cost.FUSIONS)
        rows = cost.step(one.config, 64, 64, dtype="float32", fused=fused)
        for stage, block in blocks(one):
            costs = [o for o in rows if o.stage == stage and o.operation != "join"]
            assert [o.operation for o in costs] == [o.name for o in operations.operations(block)], (name, stage)
            assert all(o.bytes > 0 and o.flops > 0 for o in costs)
            assert len({o.operation for o in costs}) == len(costs)


def test_what_is_fused_is_read_off_the_model() -> None:
    """Each transform makes its own fusion, others none, and a model with one plain block among fused ones has none."""
    model = synthetic(CONFIGS["tiny"])
    found = {name: operations.fused(arms.transformed(model, [name])) for name in STEP_TRANSFORMS}
    assert {name: fused for name, fused in found.items() if fused} == {
        "fuse_qkv": ("qkv",),
        "fuse_gate_up": ("gate_up",),
        "fuse_norm_rope": ("norm_rope",),
        "fuse_residual_norm": ("residual_norm",),
    }
    assert operations.fused(arms.fast(model)) == cost.FUSIONS
    assert operations.fused(model) == ()
    mixed = transforms.fuse_qkv(model)
    mixed.layers[1] = model.layers[1]
    assert operations.fused(mixed) == ()


@pytest.mark.parametrize("source", ["quantized", "no qk_norm"])
def test_measured_operations_meet_their_costs(source: str) -> None:
    """The times of a fast model's operations find their rows, each with a time, beside a signed rest."""
    wide = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), n_layers=2)
    config = CONFIGS["without qk_norm"] if source == "no qk_norm" else wide
    model, example = _tiny(config)
    model = arms.transformed(transforms.quantize(model, "8bit-g32") if source == "quantized" else model, arms.FAST)
    packing = "8bit-g32" if source == "quantized" else None
    rows = cost.step(config, 48, 64, 2, (5, 40), "float32", packing, fused=operations.fused(model))
    taken = operations.times(model, example, "layers.1", rounds=1, seed=0, rotate_bytes=1)
    table = roofline.operation_rows(rows, taken.by_operation(), roofline.Peaks(), "float32")
    assert [row["operation"] for row in table] == [*(time.name for time in taken.operations), "unattributed"]
    assert all(np.isfinite(row["time_s"]) for row in table)
    assert all(row["flops"] > 0 and row["bytes"] > 0 for row in table[:-1])
    wanted = {"to_qkv", "w13", "attention_residual_norm", *({"qk_norm_rope"} if config.qk_norm else ())}
    assert wanted <= {row["operation"] for row in table}


def test_the_block_of_a_view_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block and step of a compiled model run compiled, in the operation view and by depth.

    Its operations are compiled each by itself, traced once for each set, and one after the other they still give the
    block's output, up to rounding. A plain model's are not.
    """
    model, example = _tiny(CONFIGS["tiny"])
    model = transforms.compile_blocks(model)
    ran: list[nn.Module] = []
    compiled = launching.compiled

    def spied(module: nn.Module, method: str) -> Callable[..., Any]:
        ran.append(module)
        return compiled(module, method)

    monkeypatch.setattr(launching, "compiled", spied)
    found, whole = operations._taken_apart(model, example, "layers.1", rotate_bytes=1)
    work = whole.prepare()
    ran.clear()
    output = work(1)()[0]
    assert ran == [model.layers[1]]
    traced: list[Any] = []

    def compile_too(function: Any) -> Any:
        traced.append(function)
        return mx_compile(function)

    mx_compile = mx.compile
    monkeypatch.setattr(mx, "compile", compile_too)
    parts = [one.prepare() for one in found]
    assert len(traced) == sum(one.sets for one in found)
    ran.clear()
    mx.eval([part(3)() for part in parts])
    assert ran == []
    traced.clear()
    for one in operations.of_block(_tiny(CONFIGS["tiny"])[0], example, "layers.1", rotate_bytes=1):
        one.prepare()
    assert traced == []
    last = parts[-1](1)()[0]
    assert np.allclose(np.array(last), np.array(output), rtol=1e-4, atol=1e-5)
    operations.with_main_blocks(model, example)(2)
    refiners = [*model.noise_refiner, *model.context_refiner]
    assert ran == [*refiners, *model.layers[:2]]


def test_a_block_without_modulation_is_compiled_beside_modulated_ones() -> None:
    """Where modulated blocks' weights go round in one without modulation, they are compiled without it."""
    model, example = _tiny(CONFIGS["tiny"])
    plain = operations._taken_apart(model, example, "context_refiner.0", rotate_bytes=2**30)[1]
    fast = operations._taken_apart(transforms.compile_blocks(model), example, "context_refiner.0", 2**30)[1]
    assert fast.sets == plain.sets > 1
    for found, wanted in zip(fast.repeat(fast.sets)(), plain.repeat(plain.sets)(), strict=True):
        assert np.allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-5)
