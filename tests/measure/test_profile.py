"""The prefix, depth and slope views: a planted time is found where it was planted, in its size, and nowhere else."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import zimage
from zimage import inputs, operations, transforms
from zimage.errors import MeasurementError
from zimage.measure import profile
from zimage.measure.profile import Time
from zimage.measure.samples import Timed
from zimage.measure.statistics import analyse
from zimage.measure.timing import timed
from zimage.transformer import Transformer

import numpy as np
import pytest

NAMES = tuple(f"stage {k}" for k in range(8))
DELAY_S = 0.010
SLEEP_S = 0.050


class Machine:
    """A clock for work that returns how many seconds it would take: with noise, waves of drift, and a floor.

    Noise and drift are relative; the floor is what evaluating nothing takes.
    """

    def __init__(self, seed: int = 0, noise: float = 0.01, drift: float = 0.0, floor_s: float = 1e-4) -> None:
        self._random = np.random.default_rng(seed)
        self._noise, self._drift, self._floor_s, self._calls = noise, drift, floor_s, 0

    def __call__(self, work: Callable[[], Any]) -> Timed:
        """A timed call of `work` on this machine."""

        def call() -> float:
            self._calls += 1
            seconds = work()
            true = self._floor_s + (seconds if isinstance(seconds, float) else 0.0)
            return float(
                true * np.exp(self._noise * self._random.standard_normal() + self._drift * np.sin(self._calls / 10))
            )

        return call


def _chain(costs: list[float]) -> Callable[[int], float]:
    return lambda k: float(sum(costs[:k]))


def _holds(found: Time, seconds: float, slack: float = 0.0) -> bool:
    return found.low_s - slack <= seconds <= found.high_s + slack


@pytest.mark.parametrize("planted", range(len(NAMES)))
def test_a_planted_delay_is_found_there_and_nowhere_else(planted: int) -> None:
    """On a noisy, drifting clock 10 ms more in one of eight stages are in its interval, and in no other's."""
    costs = [1e-3] * 8
    costs[planted] += DELAY_S
    found = profile.prefix(NAMES, _chain(costs), 20, planted, clock=Machine(planted, drift=0.025))
    for i, stage in enumerate(found.stages):
        assert _holds(stage, costs[i]), stage
        assert not _holds(stage, costs[i] - DELAY_S if i == planted else costs[i] + DELAY_S)
    assert found.stages[planted].low_s > 0.9 * DELAY_S
    assert not found.note


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_all_stages_hold_their_times_together(noise: float) -> None:
    """In 95 % of 300 profiles every one of eight intervals holds its stage's true time; without correction fewer do."""
    costs = [1e-3, 1e-3, 11e-3, 1e-3, 0.5e-3, 2e-3, 1e-3, 1e-3]
    together = dict.fromkeys((0.05, 0.4), 0)  # 0.4 over eight stages is 0.05 for each
    for seed in range(300):
        for alpha in together:
            found = profile.prefix(NAMES, _chain(costs), 12, seed, alpha=alpha, clock=Machine(seed, noise))
            together[alpha] += all(_holds(s, c) for s, c in zip(found.stages, costs, strict=True))
    assert together[0.05] / 300 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)
    assert together[0.4] / 300 < 0.85


def test_a_planted_sleep_is_found_there_and_nowhere_else() -> None:
    """10 ms of sleep in one of eight stages of 1 ms, on the real clock, appear there in full and in no other stage."""

    def run(k: int) -> None:
        for i in range(k):
            time.sleep(0.001 + (DELAY_S if i == 5 else 0))

    found = profile.prefix(NAMES, run, 10, 0)
    for i, stage in enumerate(found.stages):
        wanted = 0.001 + (DELAY_S if i == 5 else 0)
        assert _holds(stage, wanted, slack=0.0008), stage  # a sleep is never shorter than asked, and a bit longer
        assert abs(stage.time_s - wanted) < 0.005
    assert found.whole.low_s >= 8 * 0.001 + DELAY_S


class _Costly(Transformer):
    """A model whose stages also do something by name, before they run."""

    before: Callable[[str], None]

    def stages(self, *args: Any, **options: Any) -> list[Any]:
        def costly(stage: Any) -> Any:
            def run(state: Any) -> Any:
                self.before(stage.name)
                return stage.run(state)

            return replace(stage, run=run)

        return [costly(stage) for stage in super().stages(*args, **options)]


def _costly(model: Transformer, before: Callable[[str], None]) -> Transformer:
    """A transform that plants something in the stages."""
    new = transforms.clone(model)
    new.__class__ = _Costly
    object.__setattr__(new, "before", before)
    return new


def _sleepy(model: Transformer, *slow: str) -> Transformer:
    """A transform that plants a long sleep in some stages: neighbours on this machine cost milliseconds."""
    return _costly(model, lambda name: time.sleep(SLEEP_S) if name in slow else None)


class _Counted:
    """A clock that counts what the stages of a model say they take, 1 ms and a planted delay, while they really run."""

    def __init__(self, model: Transformer, *slow: str) -> None:
        self.spent_s = 0.0
        self.model = _costly(model, lambda name: self._spend(1e-3 + DELAY_S * (name in slow)))
        self._machine = Machine(drift=0.005)

    def _spend(self, seconds: float) -> None:
        self.spent_s += seconds

    def __call__(self, work: Callable[[], Any]) -> Timed:
        def spent() -> float:
            before = self.spent_s
            timed(work)()
            return self.spent_s - before

        return self._machine(spent)


@pytest.fixture(scope="module")
def digits() -> Transformer:
    """The model that ships with the package."""
    return zimage.load_transformer("digits")


@pytest.fixture(scope="module")
def example(digits: Transformer) -> inputs.Inputs:
    """What it is called with."""
    return inputs.example(digits, "digits", 8, 8, 1, 1, 0)


@pytest.mark.parametrize("slow", ["t_embedder", "context_refiner.0", "layers.1", "final_layer"])
def test_a_transform_that_slows_one_stage_is_found(slow: str, digits: Transformer, example: inputs.Inputs) -> None:
    """Of the digits model's stages, the one that a transform gave 10 ms more has them in its interval, and no other."""
    clock = _Counted(digits, slow)
    found = profile.prefix(*operations.stage_prefix(clock.model, example), 12, 0, clock=clock)
    assert len(found.stages) == 9
    for stage in found.stages:
        assert _holds(stage, 1e-3 + DELAY_S * (stage.name == slow)), stage
        assert not _holds(stage, 1e-3 + DELAY_S * (stage.name != slow)), stage


def test_a_sleep_in_a_stage_of_the_model_is_found(digits: Transformer, example: inputs.Inputs) -> None:
    """On the real clock, a transform that lets one stage sleep shows there and in no other stage."""
    found = profile.prefix(*operations.stage_prefix(_sleepy(digits, "layers.1"), example), 9, 0)
    for stage in found.stages:
        if stage.name == "layers.1":
            assert stage.time_s == pytest.approx(SLEEP_S, rel=0.4)
            assert 0.5 * SLEEP_S < stage.low_s and stage.high_s > SLEEP_S
        else:
            assert abs(stage.time_s) < 0.4 * SLEEP_S, stage


def test_every_prefix_has_its_turn_in_every_round() -> None:
    """The whole comes first, then an untimed round; each round calls every prefix and the plain call twice in a row."""
    asked: list[int] = []
    found = profile.prefix(NAMES, asked.append, 6, 1, plain=lambda: asked.append(-1))
    assert asked[0] == 8
    assert sorted(asked[1:10]) == [-1, *range(1, 9)]
    untimed, timed_ones = np.array(asked[10:]).reshape(6, 9, 2).transpose(2, 0, 1)
    assert (untimed == timed_ones).all()
    assert (np.sort(timed_ones, axis=1) == [-1, *range(1, 9)]).all()
    assert len({tuple(row) for row in timed_ones.tolist()}) == 6
    assert [stage.name for stage in found.stages] == list(NAMES)
    assert {len(t.samples_s) for t in (*found.stages, found.whole, found.start)} == {6}
    again: list[int] = []
    profile.prefix(NAMES, again.append, 6, 1, plain=lambda: again.append(-1))
    assert again == asked


def test_a_stage_costs_the_difference_of_neighbouring_prefixes() -> None:
    """Without noise stage k is T(k) - T(k-1), the first without the start; the whole has all of them and the start."""
    costs = [k * 1e-3 for k in range(1, 9)]
    found = profile.prefix(NAMES, _chain(costs), 9, 0, clock=Machine(noise=0.0, floor_s=5e-4))
    assert [stage.time_s for stage in found.stages] == pytest.approx(costs)
    assert found.start.time_s == pytest.approx(5e-4)
    assert found.whole.time_s == pytest.approx(36e-3 + 5e-4)
    assert np.array(found.prefixes_s) == pytest.approx(np.tile(np.cumsum([5e-4, *costs]), (9, 1)))
    for r in range(9):
        assert sum(s.samples_s[r] for s in found.stages) + found.start.samples_s[r] == pytest.approx(
            found.whole.samples_s[r]
        )


def test_the_profilers_own_overhead_is_a_paired_difference() -> None:
    """What the staged whole takes longer than the plain call is found on a clock whose drift is far larger."""
    staged = lambda k: 1e-3 * k + (2e-4 if k == 8 else 0.0)  # noqa: E731
    found = profile.prefix(NAMES, staged, 30, 0, plain=lambda: 8e-3, clock=Machine(noise=0.002, drift=0.025))
    assert found.overhead is not None
    assert _holds(found.overhead, 2e-4)
    assert found.overhead.high_s < 1e-3
    assert profile.prefix(NAMES, staged, 9, 0, clock=Machine()).overhead is None


def test_first_call_and_kernel_build_are_rows_of_their_own() -> None:
    """A first call that takes 50 ms longer is in no sample: it is `first call`, and 50 ms of it are `kernel build`."""
    calls: list[int] = []

    def run(k: int) -> float:
        calls.append(k)
        return 1e-3 * k + (50e-3 if len(calls) == 1 else 0.0)

    found = profile.prefix(NAMES, run, 9, 0, plain=lambda: 8e-3, clock=Machine(noise=0.0))
    assert found.first_call_s == pytest.approx(58.1e-3)
    rows = {(row["view"], row["stage"]): row for row in found.rows()}
    assert [key for key in rows if key[0] == "prefix"] == [("prefix", name) for name in NAMES]
    assert rows["whole", "whole step"]["time_s"] == pytest.approx(8.1e-3)
    profiler = {stage: row for (view, stage), row in rows.items() if view == "profiler"}
    assert {stage: row["time_s"] for stage, row in profiler.items()} == pytest.approx(
        {"evaluation start": 1e-4, "profiler overhead": 0, "first call": 58.1e-3, "kernel build": 50e-3}, abs=1e-12
    )
    assert profiler["first call"]["time_low_s"] is None  # happened once


def test_negative_times_are_shown() -> None:
    """A stage that makes the whole shorter has a negative time, with an interval below zero."""
    costs = [1e-3] * 8
    costs[3] = -0.5e-3
    found = profile.prefix(NAMES, _chain(costs), 20, 0, clock=Machine())
    assert found.stages[3].high_s < 0
    assert _holds(found.stages[3], -0.5e-3)


def test_few_rounds_give_no_interval_and_say_so() -> None:
    """One round too few for the corrected level gives times without intervals and a note; one more gives both ends."""
    needed = profile.fewest_rounds(8)
    few, enough = (profile.prefix(NAMES, _chain([1e-3] * 8), n, 0, clock=Machine()) for n in (needed - 1, needed))
    assert all(math.isnan(s.low_s) and math.isnan(s.high_s) and s.time_s > 0 for s in few.stages)
    assert few.rows()[0]["time_low_s"] is None
    assert few.note == f"no intervals: {needed - 1} rounds are too few at this level, it takes {needed}"
    assert all(s.low_s < s.time_s < s.high_s for s in enough.stages)
    assert enough.note == ""


@pytest.mark.parametrize("n", [4, 9, 20])
@pytest.mark.parametrize("level", [0.5, 0.05, 0.05 / 39])
def test_intervals_are_those_of_a_comparison(n: int, level: float) -> None:
    """On the same values the estimate and its interval are the logarithms of what a comparison gives."""
    values = np.random.default_rng(n).normal(0.01, 0.02, n)
    found, ratio = profile.estimate("x", values, level), analyse(values, level)
    assert found.time_s == pytest.approx(math.log(ratio.ratio))
    if ratio.low == 0:
        assert math.isnan(found.low_s) and math.isnan(found.high_s)
        assert n < profile.fewest_rounds(1, level)
    else:
        assert (found.low_s, found.high_s) == pytest.approx((math.log(ratio.low), math.log(ratio.high)))
        assert n >= profile.fewest_rounds(1, level)


def test_depth_tells_a_slower_block_from_a_slower_rest() -> None:
    """10 % more time in every block moves the slope only, as much in an embedder moves the intercept only."""
    block, rest = 3e-3, 10e-3

    def found(block_s: float, rest_s: float, seed: int) -> profile.Depth:
        machine = Machine(seed, noise=0.002, drift=0.005, floor_s=0.0)
        return profile.depth(lambda m: rest_s + m * block_s, (1, 2, 4, 8), 20, seed, clock=machine)

    for seed, (block_s, rest_s) in enumerate([(block, rest), (1.1 * block, rest), (block, 1.2 * rest)]):
        depth = found(block_s, rest_s, seed)
        assert _holds(depth.block, block_s)
        assert _holds(depth.rest, rest_s)
        assert _holds(depth.block, block) == (block_s == block)
        assert _holds(depth.rest, rest) == (rest_s == rest)
        assert {m: len(times) for m, times in depth.times_s.items()} == dict.fromkeys((1, 2, 4, 8), 20)


@pytest.mark.parametrize("slow", ["blocks", "t_embedder"])
def test_depth_finds_a_slowed_stage_of_the_model(slow: str, digits: Transformer, example: inputs.Inputs) -> None:
    """On digits, 10 ms in every main block are in the slope alone, and 10 ms in the embedder in the intercept alone."""
    stages = [f"layers.{i}" for i in range(3)] if slow == "blocks" else [slow]
    clock = _Counted(digits, *stages)
    found = profile.depth(operations.with_main_blocks(clock.model, example), (1, 2, 3), 12, 0, clock=clock)
    assert _holds(found.block, 1e-3 + DELAY_S * (slow == "blocks"))
    assert _holds(found.rest, 6e-3 + 1e-4 + DELAY_S * (slow == "t_embedder"))  # six other stages, and the start
    assert found.block.high_s - found.block.low_s < DELAY_S / 2
    assert found.rest.high_s - found.rest.low_s < DELAY_S / 2


def test_depth_finds_sleeping_blocks(digits: Transformer, example: inputs.Inputs) -> None:
    """On the real clock, blocks that sleep show in the slope, and not in the intercept."""
    model = _sleepy(digits, "layers.0", "layers.1", "layers.2")
    found = profile.depth(operations.with_main_blocks(model, example), (1, 2, 3), 8, 0)
    assert found.block.time_s == pytest.approx(SLEEP_S, rel=0.4)
    assert found.rest.time_s < 0.7 * SLEEP_S


def test_the_slope_leaves_out_what_every_evaluation_costs() -> None:
    """2 ms a repetition and 30 ms an evaluation give a slope of 2 ms, with its interval around it."""
    found = profile.slope(lambda r: lambda: 30e-3 + 2e-3 * r, 20, 0, name="matmul", clock=Machine(noise=0.002))
    assert _holds(found, 2e-3)
    assert found.high_s - found.low_s < 0.5e-3
    assert (found.name, len(found.samples_s)) == ("matmul", 20)


def test_slopes_are_taken_in_turns() -> None:
    """A round takes the operations in a new order, all repeats of one before the next; intervals hold together."""
    asked: list[tuple[str, int]] = []

    def make(name: str) -> Callable[[int], Callable[[], float]]:
        def work(r: int) -> float:
            asked.append((name, r))
            return {"a": 1e-3, "b": 2e-3, "c": 3e-3}[name] * r

        return lambda r: lambda: work(r)

    found = profile.slopes({n: make(n) for n in "abc"}, 12, 0, (1, 2), clock=Machine(noise=0.001, drift=0.025))
    assert all(_holds(found[name], seconds) for name, seconds in (("a", 1e-3), ("b", 2e-3), ("c", 3e-3)))
    assert asked[6::2] == asked[7::2]  # the untimed call before each timed one
    timed_ones = asked[7::2]
    rounds = [timed_ones[i : i + 6] for i in range(0, len(timed_ones), 6)]
    assert len(rounds) == 12
    orders = [tuple(name for name, _ in taken[::2]) for taken in rounds]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 3
    assert all({r for _, r in taken[i : i + 2]} == {1, 2} for taken in rounds for i in (0, 2, 4))
    few = profile.slopes({n: make(n) for n in "abc"}, 6, 0, (1, 2), clock=Machine())  # enough for one, not for three
    assert all(math.isnan(time.low_s) for time in few.values())
    _refused(lambda: profile.slopes({}, 3, 0), "at least one operation")


def test_the_slope_finds_a_sleep() -> None:
    """Work that sleeps 2 ms a repetition has a slope of 2 ms on the real clock."""
    found = profile.slope(lambda r: lambda: time.sleep(0.002 * r), 8, 0)
    assert abs(found.time_s - 0.002) < 0.001


def _refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(MeasurementError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def _nothing(_k: int) -> None:
    pytest.fail("nothing may run")


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True, "3", None])
def test_impossible_rounds_are_refused(rounds: Any) -> None:
    """Rounds that are no integer of at least 1 give a MeasurementError of one line in all views, and nothing runs."""
    _refused(lambda: profile.prefix(NAMES, _nothing, rounds, 0), "rounds must be an integer of at least 1")
    _refused(lambda: profile.depth(_nothing, (1, 2), rounds, 0), "rounds must be")
    _refused(lambda: profile.slope(lambda r: lambda: _nothing(r), rounds, 0), "rounds must be")


def test_other_impossible_profiles_are_refused() -> None:
    """No stages, one count, counts that are none, an impossible alpha or time: each is one line."""
    _refused(lambda: profile.prefix((), _nothing, 3, 0), "at least one stage")
    _refused(lambda: profile.prefix(NAMES, _nothing, 3, 0, alpha=1.0), "alpha must lie between 0 and 1")
    _refused(lambda: profile.prefix(NAMES, _nothing, 3, 0, alpha=None), "found None")  # type: ignore[arg-type]
    _refused(lambda: profile.depth(_nothing, (2, 2), 3, 0), "two different counts")
    _refused(lambda: profile.depth(_nothing, (1, -2), 3, 0), "integers of 0 or more")
    _refused(lambda: profile.slope(lambda r: lambda: _nothing(r), 3, 0, repeats=()), "two different counts")
    for seconds in (math.nan, -1.0, "1", None):
        clock: Any = lambda _work, seconds=seconds: lambda: seconds  # noqa: E731
        _refused(lambda clock=clock: profile.prefix(NAMES, _nothing, 1, 0, clock=clock), "a timed call returned")
    first: Any = iter([math.nan])  # and what the rounds never see
    _refused(
        lambda: profile.prefix(NAMES, _nothing, 1, 0, clock=lambda _work: lambda: next(first, 1.0)),
        "a timed call returned nan",
    )


def test_work_that_cannot_be_evaluated_is_refused() -> None:
    """A profile of work that hides its arrays is a MeasurementError, not a short time."""
    _refused(lambda: profile.prefix(NAMES, lambda _k: object(), 1, 0), "which MLX cannot evaluate")


def test_a_slope_keeps_what_was_timed() -> None:
    """Every T(r) of every round is there, and the slope of a round is that of the line through them."""
    found = profile.slope(lambda r: lambda: 0.002 * r, 6, 0, (1, 2, 4), clock=Machine(noise=0.01))
    assert {r: len(times) for r, times in found.repeated_s.items()} == {1: 6, 2: 6, 4: 6}
    first = np.polyfit([1, 2, 4], [found.repeated_s[r][0] for r in (1, 2, 4)], 1)
    assert found.samples_s[0] == pytest.approx(first[0])


def test_works_are_timed_in_turns() -> None:
    """Each of several works has its own time, with an interval that holds it, under drift that all of them share."""
    works = {name: (lambda seconds=seconds: seconds) for name, seconds in (("a", 0.01), ("b", 0.02), ("c", 0.04))}
    found = profile.in_turns(works, 20, 0, clock=Machine(noise=0.005, drift=0.02, floor_s=0.0))
    assert list(found) == ["a", "b", "c"]
    for name, seconds in (("a", 0.01), ("b", 0.02), ("c", 0.04)):
        assert _holds(found[name], seconds, slack=0.01 * seconds)
        assert found[name].high_s - found[name].low_s < 0.05 * seconds
    with pytest.raises(MeasurementError, match="nothing to time"):
        profile.in_turns({}, 5, 0)


def test_what_ran_before_is_not_in_the_time() -> None:
    """A call that follows another one and pays for it is not the timed one: switching costs nothing in the views."""
    last: list[str] = [""]

    def clock(work: Callable[[], Any]) -> Timed:
        def call() -> float:
            name, seconds = work()
            switched, last[0] = last[0] != name, name
            return float(seconds) + (0.005 if switched else 0.0)

        return call

    found = profile.in_turns({n: (lambda n=n: (n, 0.01)) for n in "abc"}, 12, 0, clock=clock)  # type: ignore[misc]
    assert all(time.samples_s == [0.01] * 12 for time in found.values())
