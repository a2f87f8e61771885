"""Steps that reuse earlier ones: which ones they are, what they compute, and that nothing outlives its trajectory."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.sweeping import ROOT, Command, Sweep, quick
from zimage import arms, digits, scheduler, step_caching, transforms
from zimage.caching import Report
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.layers import clone
from zimage.step_caching import InputDistance, Memory, StepCached, TimestepDistance
from zimage.transformer import State, Transformer
from zimage.weights import load_transformer

import mlx.core as mx
import pytest

Lever = Callable[[Transformer], Transformer]
CONFIG = TransformerConfig.tiny(n_layers=3)
STEPS, SHIFT = 6, 3.0
LEVERS: dict[str, Lever] = {
    "tea cache": lambda model: step_caching.tea_cache(model, 0.4, "none"),
    "timestep": lambda model: step_caching.reuse_by_timestep(model, 0.2),
    "change": lambda model: step_caching.reuse_change(model, 2),
    "change of one block": lambda model: step_caching.reuse_change(model, 3, first=1, count=1),
}
every_lever = pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def captions() -> list[mx.array]:
    """A ragged batch of two, whose captions need a mask."""
    keys = mx.random.split(mx.random.key(1), 2)
    return [mx.random.normal((n, CONFIG.cap_feat_dim), key=key) for n, key in zip((5, 9), keys, strict=True)]


def path(model: Transformer, captions: Any, steps: int = STEPS, shift: float = SHIFT, **given: Any) -> list[mx.array]:
    """The latents after every step of a trajectory."""
    found: list[mx.array] = []
    scheduler.sample(model, captions, (4, 6), steps, shift, on_step=lambda _, latents: found.append(latents), **given)
    return found


def same(a: list[mx.array], b: list[mx.array]) -> bool:
    return len(a) == len(b) and all(bool(mx.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def report(model: Transformer) -> Report:
    assert isinstance(model, StepCached)
    return model.report


@pytest.mark.parametrize(
    "lever",
    [
        lambda model: step_caching.tea_cache(model, 0),
        lambda model: step_caching.tea_cache(model, 0.0, "none"),
        lambda model: step_caching.tea_cache(model, 0.0, [-1.0]),
        lambda model: step_caching.reuse_by_timestep(model, 0),
        lambda model: step_caching.reuse_change(model, 1),
    ],
    ids=["flux", "none", "negative", "timestep", "change"],
)
def test_nothing_reused_is_the_plain_trajectory(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """A threshold of 0 and an interval of 1 compute every step, and every step has the bits of the plain one."""
    cached = lever(model)
    assert same(path(cached, captions), path(model, captions))
    assert report(cached) == Report(STEPS, [*range(STEPS)], STEPS * 5, 0, 0)


@pytest.mark.parametrize(("steps", "shift", "computed"), [(9, math.exp(1.15), [0, 3, 5, 7, 8]), (8, 3.0, [0, 3, 5, 7])])
def test_the_go_rule_computes_the_steps_it_does_there(
    steps: int, shift: float, computed: list[int], model: Transformer, captions: list[mx.array]
) -> None:
    """At the Go threshold, 5 of its 9 steps at 1024 px are computed, and 4 of the published pipeline's 8."""
    cached = arms.transformed(model, ["reuse_by_timestep"])
    path(cached, captions, steps, shift)
    blocks = 5 * steps
    assert report(cached) == Report(steps, computed, blocks, 5 * (steps - len(computed)), 0)


def test_a_reused_velocity_is_the_kept_one(model: Transformer, captions: list[mx.array]) -> None:
    """Euler steps with the velocity of the last computed step, by hand, have the bits of the cached trajectory."""
    cached = step_caching.reuse_by_timestep(model)
    found = path(cached, captions, 8)
    levels = scheduler.sigmas(8, SHIFT)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    for i in range(8):
        if i in (0, 3, 5, 7):
            velocity = model(latents, mx.full((2,), 1 - levels[i], dtype=mx.float32), captions)
        latents = latents + (levels[i] - levels[i + 1]) * velocity
        assert mx.array_equal(found[i], latents), i


def test_a_reused_velocity_is_a_longer_euler_step(model: Transformer, captions: list[mx.array]) -> None:
    """The timestep rule ends where plain Euler steps do that leave the reused noise levels out, up to rounding."""
    (*_, found) = path(step_caching.reuse_by_timestep(model), captions, 8)
    levels = scheduler.sigmas(8, SHIFT)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    for sigma, lower in itertools.pairwise([levels[i] for i in (0, 3, 5, 7, 8)]):
        latents = scheduler.step(model, latents, captions, sigma, lower)
    assert mx.allclose(found, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "count", "skipped"), [(0, None, 3), (1, 2, 2), (0, 1, 1)])
def test_a_reused_change_is_added_to_the_steps_own_input(
    first: int, count: int | None, skipped: int, model: Transformer, captions: list[mx.array]
) -> None:
    """In every other step the chosen blocks' joint change is that of the step before, and all else is computed."""
    cached = step_caching.reuse_change(model, 2, first, count)
    found = path(cached, captions, 4)
    assert report(cached) == Report(4, [0, 2], 4 * 5, 2 * skipped, 0)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    change = mx.array(0.0)
    for i, (sigma, lower) in enumerate(itertools.pairwise(scheduler.sigmas(4, SHIFT))):
        state = State(latents, mx.full((2,), 1 - sigma, dtype=mx.float32), captions)
        stages = model.stages(state.latents, state.timestep, captions)
        start = next(n for n, stage in enumerate(stages) if stage.name == f"layers.{first}")
        for n, stage in enumerate(stages):
            if n == start:
                state = step_caching._joined(state)
                before = state.joint
            if i % 2 == 0 or not start <= n < start + skipped:
                state = stage(state)
            if n == start + skipped - 1:
                assert state.joint is not None and before is not None
                if i % 2 == 0:
                    change = state.joint - before
                else:
                    state = replace(state, joint=before + change)
        assert state.velocity is not None
        latents = latents + (sigma - lower) * state.velocity
        assert mx.array_equal(found[i], latents), i


@pytest.mark.parametrize(
    ("coefficients", "threshold", "computed"),
    [
        ((1.0, 0.0), 0.15, [0, 2, 4, 6, 7]),  # each step is 0.1 from the one before
        ((1.0, 0.0), 0.25, [0, 3, 6, 7]),
        ((2.0, 0.0), 0.25, [0, 2, 4, 6, 7]),
        ((1.0, 0.0, 0.1), 0.25, [0, 3, 6, 7]),  # 0.01 + 0.1
        ((-1.0,), 0.05, [0, 7]),  # below zero counts as none
        ((1.0, 0.0), 100.0, [0, 7]),
    ],
)
def test_known_inputs_skip_known_steps(coefficients: tuple[float, ...], threshold: float, computed: list[int]) -> None:
    """Inputs that grow by a tenth each step are 0.1 apart: what is computed follows from polynomial and threshold."""
    rule, memory, found = InputDistance(threshold, coefficients), Memory(8, timesteps=[0.0]), []
    for step in range(8):
        memory.step = step
        if step == 0:
            memory.compute()
        memory.entered, memory.entering = memory.entering, mx.full((1, 2, 3), 1.1**step)
        if not rule.reuses(memory):
            memory.compute()
            found.append(step)
    assert found == computed


def test_a_batch_reuses_no_more_than_its_most_demanding_item() -> None:
    """Distances are those of single items, and one item beyond the threshold has all of them computed."""
    now, before = (
        mx.array([[[1.0, 1.0]], [[2.0, 4.0]], [[0.0, 0.0]]]),
        mx.array([[[1.0, 1.0]], [[1.0, 3.0]], [[0.0, 0.0]]]),
    )
    assert step_caching.relative_l1(now, before) == [0.0, 0.5, 0.0]
    for threshold, reuses in ((0.51, True), (0.5, False)):
        memory = Memory(8, step=1, timesteps=[0.1] * 3, entering=now, entered=before)
        memory.compute()
        assert InputDistance(threshold, (1.0, 0.0)).reuses(memory) is reuses
    memory = Memory(8, step=0, timesteps=[0.0, 0.5])
    memory.compute()
    memory.timesteps = [0.125, 0.75]
    assert not TimestepDistance(0.2).reuses(memory) and memory.accumulated == [0.125, 0.25]


@every_lever
def test_a_trajectory_leaves_nothing_to_the_next(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """Another trajectory, one in the middle of it and steps outside of any compute what they do with a new model."""
    cached = lever(model)
    first, other = path(lever(model), captions), path(lever(model), captions[:1], seed=7)
    assert report(cached).steps == 0
    assert same(path(cached, captions), first)
    kept = report(cached)
    assert kept.skipped_steps > 0 and kept.skipped_blocks > 0
    assert same(path(cached, captions[:1], seed=7), other)
    assert report(cached) is not kept
    inner: list[bool] = []

    def between(step: int, latents: mx.array) -> None:
        if step != 2:
            return
        inner.append(same(path(cached, captions), first))
        timestep = mx.full((2,), 0.9)
        inner.append(bool(mx.array_equal(cached(latents, timestep, captions), model(latents, timestep, captions))))

    last = scheduler.sample(cached, captions, (4, 6), STEPS, SHIFT, on_step=between)
    assert same([last], first[-1:]) and inner == [True, True]


@every_lever
def test_what_does_not_continue_starts_anew(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """In one trajectory, other captions, batches, sizes, dtypes and timesteps that do not grow compute plainly."""
    cached = lever(model)
    assert isinstance(cached, StepCached)
    run = step_caching.started(cached, 20)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    calls = [
        (latents, [0.10, 0.10], captions),
        (latents, [0.11, 0.11], [captions[0], captions[1] + 0]),
        (latents, [0.11, 0.12], captions),
        (latents[:1], [0.12], captions[:1]),
        (scheduler.noise(model, 1, (4, 8), 0), [0.13], captions[:1]),
        (scheduler.noise(model, 1, (4, 8), 0).astype(mx.bfloat16), [0.14], captions[:1]),
        (scheduler.noise(model, 1, (4, 8), 0).astype(mx.bfloat16), [0.14], captions[:1]),
    ]
    for place, (given, times, texts) in enumerate(calls):
        timestep = mx.array(times)
        assert mx.array_equal(run(given, timestep, texts), model(given, timestep, texts)), place
    count = len(calls)
    assert cached.report == Report(count, [*range(count)], 5 * count, 0, count - 1)
    assert f"{count - 1} times started anew" in str(cached.report)


@every_lever
def test_a_step_is_the_fold_of_its_stages(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """The stages of a reusing step have the plain names, and their fold is the call bit for bit."""
    cached = lever(model)
    by_call, by_stages = step_caching.started(cached, 6), step_caching.started(cached, 6)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    for t in (0.0, 0.02, 0.04, 0.06):
        timestep = mx.full((2,), t)
        stages = by_stages.stages(latents, timestep, captions)
        assert [stage.name for stage in stages] == [stage.name for stage in model.stages(latents, timestep, captions)]
        state = State(latents, timestep, captions)
        for stage in stages:
            state = stage(state)
        assert state.velocity is not None and mx.array_equal(state.velocity, by_call(latents, timestep, captions))
    assert report(cached).skipped_steps > 0


@every_lever
def test_other_transforms_go_with_it(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """Before or after all that makes a step fast, the same steps are reused."""
    plain = lever(model)
    wanted = path(plain, captions)
    names = list(arms.FAST)
    for cached in (lever(arms.transformed(model, names)), arms.transformed(lever(model), names)):
        found = path(cached, captions)
        assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True))
        assert report(cached) == report(plain)
        assert cached.kept_captions is not None and cached.kept_captions.hits == STEPS - 1


def test_a_copy_is_in_no_trajectory_and_has_no_report(model: Transformer, captions: list[mx.array]) -> None:
    """Copies and transformed models keep the rule, not what was kept or counted; the plain model stays plain."""
    cached = LEVERS["change"](model)
    path(cached, captions)
    run = step_caching.started(cached, 4)
    latents = scheduler.noise(model, 2, (4, 6), 0)
    mx.eval(run(latents, mx.full((2,), 0.1), captions))
    for copy in (clone(run), transforms.cast(run, "float32"), transforms.fuse_qkv(run)):
        assert isinstance(copy, StepCached) and copy.trajectory is None
        assert copy.report == Report() and (copy.rule, copy.blocks) == (cached.rule, (0, 3))
    assert step_caching.started(model, 4) is model and not isinstance(model, StepCached)


@every_lever
def test_it_cannot_be_compiled_as_a_whole(lever: Lever, model: Transformer, captions: list[mx.array]) -> None:
    """Inside mx.compile a step of a trajectory is refused in one line, before anything of it could be kept."""
    latents = scheduler.noise(model, 2, (4, 6), 0)
    cached = lever(model)
    run = step_caching.started(cached, 4)
    compiled = mx.compile(lambda latents, t: run(latents, t, captions))
    with pytest.raises(InputError, match=r"cannot be inside mx\.compile; compile its blocks") as caught:
        mx.eval(compiled(latents, mx.full((2,), 0.1)))
    assert "\n" not in str(caught.value)
    assert mx.array_equal(run(latents, mx.full((2,), 0.1), captions), model(latents, mx.full((2,), 0.1), captions))
    assert cached.report.steps == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *[(lambda m, bad=bad: step_caching.tea_cache(m, bad), f"threshold must be .* found {text}")
          for bad, text in ((-0.1, "-0.1"), (math.nan, "nan"), (math.inf, "inf"), ("0.1", "'0.1'"), (True, "True"))],
        (lambda m: step_caching.reuse_by_timestep(m, -1), "threshold must be"),
        (lambda m: step_caching.tea_cache(m, 0.1, "flex"), "'flex' is not known; known are none, flux, lumina2"),
        *[(lambda m, bad=bad: step_caching.tea_cache(m, 0.1, bad), "a name or a list of finite coefficients")
          for bad in ([], [1, math.nan], [True], {"a": 1}, 3)],
        *[(lambda m, bad=bad: step_caching.reuse_change(m, bad), "interval must be an integer of at least 1")
          for bad in (0, -2, 1.5, True, "2", None)],
        (lambda m: step_caching.reuse_change(m, 2, 3), "first must be an integer from 0 to 2, found 3"),
        (lambda m: step_caching.reuse_change(m, 2, 1, 3), "count must be an integer from 1 to 2, found 3"),
        (lambda m: step_caching.reuse_change(m, 2, 0, 0), "count must be an integer from 1 to 3, found 0"),
        (lambda m: step_caching.tea_cache(step_caching.reuse_change(m)), "reuses steps already"),
        (lambda m: step_caching.variants(m, 0.1, [], []), "thresholds must be a list of numbers, found 0.1"),
        (lambda m: step_caching.variants(m, ["x"], [], []), "threshold must be a finite number"),
        (lambda m: step_caching.variants(m, [], ["flux"], []), "tea must be a list of .* pairs"),
        (lambda m: step_caching.variants(m, [], [["fitted", 0.1]], []), "a name or a list of finite coefficients"),
        (lambda m: step_caching.variants(m, [], [[["flux"], 0.1]], []), "a list of finite coefficients"),
        (lambda m: step_caching.variants(m, [], [], [[2, 0, 1, 1]]), "every must be a list of"),
        (lambda m: step_caching.variants(m, [], [], [[2, 0.5, 0.5]]), "share of the main blocks, found 0.5, 0.5"),
        (lambda m: step_caching.variants(m, [], [], [[2, "0", 1]]), "share of the main blocks"),
        (lambda m: step_caching.variants(m, [], [], [["2", 0, 1]]), "interval must be"),
        (lambda _: step_caching.fitted([], 1), "needs 2 different finite distances at least, found 0"),
        (lambda _: step_caching.fitted([(0.1, 0.2)] * 9, 1), "found 1"),
        (lambda _: step_caching.fitted([(0.1, 0.2), (0.2, math.inf)], 1), "finite"),
        (lambda _: step_caching.fitted([(0.1, 0.2)], 11), "degree must be an integer from 0 to 10"),
    ],
)  # fmt: skip
def test_bad_numbers_are_one_clear_line(make: Callable[[Transformer], Any], words: str, model: Transformer) -> None:
    """Whatever is out of range or of another type is refused with its name and what was found."""
    with pytest.raises(InputError, match=words) as caught:
        make(model)
    assert "\n" not in str(caught.value)


def test_arms_are_made_from_names_and_numbers(model: Transformer, captions: list[mx.array]) -> None:
    """Each of several arms has a name that says what it is, and does that."""
    found = step_caching.variants(
        model, [0.15], [["flux", 0.25], ["fitted", 9]], [[2, 0, 1], [3, 0.0, 0.5], [2, 0.5, 1.0]], (1.0, 0.0)
    )
    skipped = {}
    for name, cached in found.items():
        path(cached, captions, 4)
        skipped[name] = (report(cached).computed, report(cached).skipped_blocks)
    del skipped["tea_flux_0.25"]  # which no number here foretells
    assert skipped == {
        "timestep_0.15": ([0, 2, 3], 5),
        "tea_fitted_9": ([0, 3], 6),
        "every_2": ([0, 2], 6),
        "every_3_blocks_0-1": ([0, 3], 4),
        "every_2_blocks_1-2": ([0, 2], 4),
    }


def test_a_polynomial_is_found_again() -> None:
    """Pairs of a known polynomial give its coefficients, highest power first."""
    pairs = [(x / 10, 3 * (x / 10) ** 2 - 0.5 * x / 10 + 0.25) for x in range(9)]
    assert step_caching.fitted(pairs, 2) == pytest.approx((3, -0.5, 0.25))


def test_what_is_observed_is_what_decides(model: Transformer, captions: list[mx.array]) -> None:
    """The largest first distance of a batch is the threshold from which on TeaCache's second step is reused."""
    levels = scheduler.sigmas(STEPS, SHIFT)
    pairs = step_caching.observed(model, captions, scheduler.noise(model, 2, (4, 6), 0), levels)
    assert len(pairs) == 2 * (STEPS - 1) and all(x > 0 and y > 0 for x, y in pairs)
    first = max(x for x, _ in pairs[:2])
    for factor, computed in ((0.999, True), (1.001, False)):
        cached = step_caching.tea_cache(model, factor * first, "none")
        path(cached, captions)
        assert (1 in report(cached).computed) is computed


def test_digits_stay_digits() -> None:
    """With trained weights, half of 20 steps reused draws the same digits to a few per cent, in every batch anew."""
    plain = load_transformer("digits", "float32")
    cached = step_caching.reuse_change(plain)
    drawn, wanted = (digits.draw(model, [3, 1, 4], table=None) for model in (cached, plain))
    assert report(cached).computed == [*range(0, 20, 2)]
    assert 0 < abs(drawn.images - wanted.images).max() < 0.25


def test_the_notebook_judges_every_arm_beside_fewer_steps(swept: Callable[[Command], Sweep]) -> None:
    """Its quick run times and judges each way of reusing steps and a plain run of as many blocks for each of them."""
    (run,) = swept(quick(ROOT / "experiments" / "step_caching.yaml")).store.runs("step_caching")
    cached = {"keep_captions", "tea_fitted_0.5", "every_2"}
    ablation, judged = run.table("ablation"), run.table("quality")
    fewer = {arm for arm in ablation["arm"] if arm.startswith("steps_")}
    assert set(ablation["arm"]) == cached | fewer and fewer
    assert (set(ablation["baseline"]), set(ablation["scope"])) == ({"plain"}, {"trajectory"})
    assert set(judged["weights_kind"]) == {"trained"}
    steps = run.parameters["steps"]
    errors = judged[judged["metric"] == "drift_relative_l2"].set_index("arm")
    assert set(errors[errors["step"] == steps].index) == cached | fewer
    assert list(errors.loc["every_2", "step"]) == [*range(1, steps + 1)]
    assert (errors.loc["keep_captions", "value"] == 0).all() and errors.loc["every_2", "value"].iloc[0] == 0
    assert (errors.loc["every_2", "value"].iloc[1:] > 0).all()
    shares = judged[judged["metric"] == "skipped_blocks_fraction"].set_index("arm")["value"]
    assert shares["every_2"] == pytest.approx(0.5 * 3 / 5)  # of the digits model's five blocks, three are main ones
    assert set(judged.loc[judged["metric"] == "digit_accuracy", "arm"]) == cached | fewer | {"plain"}
    assert [picture.name for picture in run.pictures()] == ["digits_side_by_side"]
