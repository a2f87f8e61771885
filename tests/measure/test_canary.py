"""The canary: which quads it drops, how they are counted, when a comparison ends, and the work of the default one."""

import random
from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from types import SimpleNamespace
from typing import Any

from tests.measure.clock import Clock
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import canary, default_canary
from zimage.measure.comparison import Comparison, compare, compare_many
from zimage.measure.quads import Quads, in_step, schedule
from zimage.measure.samples import Timed
from zimage.measure.statistics import analyse

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest


def plays(times: Iterator[float]) -> Timed:
    """A canary that returns these times."""
    return lambda: next(times)


def test_a_quad_is_in_step_within_five_percent_of_the_median_of_nine() -> None:
    """The last canary is held against the median of the last nine, itself included, or of fewer at the start."""
    assert in_step(np.array([1.0]))
    assert in_step(np.array([1.0] * 8 + [1.0499])) and not in_step(np.array([1.0] * 8 + [1.0501]))
    assert in_step(np.array([1.0] * 8 + [0.9501])) and not in_step(np.array([1.0] * 8 + [0.9499]))
    assert not in_step(np.array([1.0, 1.2]))  # of two, both are far from their middle
    assert list(in_step(np.array([[1.0, 1.0, 1.2], [1.0, 1.2, 1.2]]))) == [False, True]


def test_a_step_of_the_clock_drops_four_quads() -> None:
    """After a step the canaries are out of step until they are the majority of nine: four quads, then none."""
    clock = Clock(noise=0.05)
    found = compare(
        clock.arm("a"), clock.arm("b"), seed=0, max_quads=20, canary=plays(chain([0.02] * 15, repeat(0.025)))
    )
    dropped = {s.quad for s in found.samples if s.dropped}
    assert dropped == {15, 16, 17, 18}
    assert found.quads == 20 and found.dropped_quads == 4


def test_the_canary_is_called_once_before_each_quad() -> None:
    """One call of the canary stands before the untimed call that begins a quad, and nowhere else."""
    clock = Clock()
    compare(clock.arm("a"), clock.arm("b"), seed=3, max_quads=6, canary=clock.arm("canary"))
    rng = random.Random(3)
    planned = [["canary", *("b" if arm else "a" for arm, _ in schedule(rng))] for _ in range(6)]
    assert clock.calls == list(chain.from_iterable(planned))


def test_a_drop_is_blind_to_the_arms() -> None:
    """With the same canaries the same quads are dropped, whatever the arms' times are, and the orders stay the same."""

    def run(clock: Clock, ratio: float) -> tuple[list[bool], list[str]]:
        quads = Quads(("a", clock.arm("a")), ("b", clock.arm("b", ratio)), plays(iter(canaries)))
        rng = random.Random(0)
        for _ in canaries:
            quads.take(rng)
        return quads.kept, clock.calls

    canaries = list(np.random.default_rng(0).normal(0.02, 0.001, 40))
    kept, calls = run(Clock(1), 1.0)
    assert 0 < sum(kept) < 40
    assert run(Clock(2, noise=0.3), 3.0) == (kept, calls)


def test_drops_are_counted_by_the_arm_that_ran_before_the_canary() -> None:
    """A dropped quad is put down to the last call before its canary, over several arms to that of another's quad."""
    clock = Clock(noise=0.05)
    canaries = np.random.default_rng(0).normal(0.02, 0.001, 400)
    given = iter(canaries)
    before: list[str] = []

    def call() -> float:
        before.append(clock.calls[-1] if clock.calls else "")
        return next(given)

    arms = {name: clock.arm(name) for name in ("x", "y")}
    found = compare_many(clock.arm("plain"), arms, seed=1, canary=call, max_quads=10, baseline_name="plain")
    times = {c.time_s: (name, c) for name, f in found.items() for c in f.samples if c.kind == "canary"}
    for name, comparison in found.items():
        wanted: dict[str, int] = {}
        for time_s, last in zip(canaries, before, strict=False):
            owner, sample = times[time_s]
            if owner == name and sample.dropped:
                wanted[last] = wanted.get(last, 0) + 1
        assert dict(comparison.dropped) == wanted
        assert comparison.dropped_quads > 0
    others = {"x": "y", "y": "x"}
    assert any(others[name] in comparison.dropped for name, comparison in found.items())


def test_the_numbers_come_from_the_kept_quads() -> None:
    """Ratio and interval are those of the kept quads; with the dropped ones, the verdict is given beside it."""
    clock, calls = Clock(noise=0.002), 0

    def canary() -> float:
        nonlocal calls
        calls += 1
        return 0.03 if calls in (4, 7) else 0.02

    def arm() -> float:  # in the quads that are dropped it takes twice as long
        return clock.arm("b", 2.0 if calls in (4, 7) else 1.05)()

    found = compare(clock.arm("a"), arm, seed=0, canary=canary, names=("a", "b"))
    assert (found.verdict, found.quads, found.dropped_quads) == ("slower", 10, 2)
    frame = pd.DataFrame([vars(s) for s in found.samples if s.kind == "sample"])
    for dropped in (False, True):
        assert frame[frame["dropped"] == dropped]["quad"].nunique() == (2 if dropped else 10)
    means = frame[~frame["dropped"]].assign(log=lambda f: np.log(f["time_s"])).groupby(["quad", "arm"])["log"].mean()
    differences = (means.unstack()["b"] - means.unstack()["a"]).to_numpy()
    assert found.ratio == pytest.approx(analyse(differences, found.level).ratio)
    assert found.verdict_without_drops == "slower"


def test_the_verdict_without_drops_may_be_another() -> None:
    """Where the dropped quads say the opposite, the line says what they would have made of it."""
    clock, calls = Clock(noise=0.001), 0

    def canary() -> float:
        nonlocal calls
        calls += 1
        return 0.03 if 10 <= calls <= 13 else 0.02

    def arm() -> float:
        return clock.arm("b", 0.5 if 10 <= calls <= 13 else 1.05)()

    found = compare(clock.arm("a"), arm, seed=0, canary=canary)
    assert (found.verdict, found.verdict_without_drops, found.dropped_quads) == ("slower", "inconclusive", 4)
    assert str(found).endswith("; inconclusive if none were dropped")
    assert found.row("step")["verdict_without_drops"] == "inconclusive"


def test_at_most_twice_as_many_quads_are_taken() -> None:
    """With a canary that is always out of step a comparison ends after 2 * max_quads quads, and the reason says so."""
    clock = Clock()
    restless = (0.02 * 1.5**i for i in count())
    found = compare(clock.arm("a"), clock.arm("b"), seed=0, max_quads=12, canary=plays(restless))
    assert len(clock.calls) == 24 * 7
    assert (found.quads, found.dropped_quads, found.looks) == (1, 23, 1)
    assert found.reason.endswith("; only 1 of 24 quads were kept")


def test_looks_count_kept_quads() -> None:
    """The first look comes when ten quads were kept, however many were taken."""
    clock = Clock()
    canaries = chain([0.02, 0.02, 0.03, 0.02, 0.03], repeat(0.02))
    found = compare(clock.arm("a"), clock.arm("b", 1.1), seed=0, canary=plays(canaries))
    assert (found.quads, found.dropped_quads, found.looks) == (10, 2, 1)
    assert len(clock.calls) == 12 * 7


def test_a_budget_also_ends_what_keeps_nothing() -> None:
    """When the time is spent a comparison ends after four quads, even if most of them were dropped."""
    clock = Clock()
    canaries = plays(iter([0.02, 0.03, 0.04, 0.05]))
    found = compare(clock.arm("a"), clock.arm("b"), seed=0, budget_s=1e-9, canary=canaries)
    assert found.quads + found.dropped_quads == 4 and found.quads < 4
    assert found.reason.endswith("the budget of 1e-09 s was spent")


def test_canaries_and_drops_are_in_the_rows() -> None:
    """Canaries are rows of kind and arm `canary`, and every row of a dropped quad is marked."""
    clock = Clock()
    found = compare(
        clock.arm("a"), clock.arm("b"), seed=0, max_quads=5, canary=plays(iter([0.02, 0.02, 0.03, 0.02, 0.02, 0.02]))
    )
    assert isinstance(found, Comparison)
    rows = conform("samples", pd.DataFrame(found.sample_rows("step"))).to_pandas()
    canaries = rows[rows["kind"] == "canary"]
    assert list(canaries["time_s"]) == [0.02, 0.02, 0.03, 0.02, 0.02, 0.02]
    assert set(canaries["arm"]) == {"canary"} and set(canaries["position"]) == {-1}
    assert set(rows.loc[rows["dropped"], "quad"]) == {2} and rows["dropped"].sum() == 5
    assert not rows.duplicated(["quad", "position"]).any()
    assert found.row("step")["dropped_quads"] == 1


@pytest.mark.parametrize("time_s", [0.0, float("nan"), None])
def test_a_broken_canary_is_named(time_s: Any) -> None:
    """A canary that returns no time gives a MeasurementError that names it."""
    with pytest.raises(MeasurementError, match="the canary returned"):
        compare(Clock().arm("a"), Clock().arm("b"), seed=0, canary=lambda: time_s)


@pytest.mark.parametrize(("per_product_s", "repeats"), [(1e-3, 8), (7e-3, 1), (0.5e-3, 16)])
def test_the_default_canary_is_sized_once(monkeypatch: pytest.MonkeyPatch, per_product_s: float, repeats: int) -> None:
    """It repeats its product until a call takes 5 ms on a CPU, with a quarter to spare, and keeps that size."""
    calls = []

    def timed(work: Callable[[], Any]) -> Timed:
        def call() -> float:
            calls.append(work.args[2])  # type: ignore[attr-defined]
            return per_product_s * calls[-1]

        return call

    monkeypatch.setattr(canary, "timed", timed)
    found = default_canary()
    assert found() >= canary.LEAST_S["cpu"]
    assert calls[-1] == repeats and found() == per_product_s * repeats


@pytest.mark.parametrize(("kind", "least_s"), [(mx.DeviceType.gpu, 0.020), (mx.DeviceType.cpu, 0.005)])
def test_a_canary_lasts_20_ms_on_a_gpu_and_5_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, kind: mx.DeviceType, least_s: float
) -> None:
    """Whatever a product takes, the first number of them that lasts long enough is taken, on either kind of device."""
    monkeypatch.setattr(canary.mx, "default_device", lambda: SimpleNamespace(type=kind))
    monkeypatch.setattr(canary, "_data", lambda _size: (0, 0))
    monkeypatch.setattr(canary, "timed", lambda work: lambda: 1e-4 * work.args[2])
    assert least_s <= default_canary()() <= 2.5 * least_s


def test_a_device_that_is_too_quick_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no size lasts long enough the search ends with a MeasurementError."""
    monkeypatch.setattr(canary, "timed", lambda _: lambda: 1e-9)
    with pytest.raises(MeasurementError, match="too short for a canary"):
        default_canary()


def test_the_canary_works_on_ordinary_numbers() -> None:
    """However often it is repeated, its values stay finite, and neither vanish nor grow; they are always the same."""
    x, weight = canary._data(256)
    for repeats in (1, 4, 64):
        values = np.array(canary._work(x, weight, repeats))
        assert np.isfinite(values).all()
        assert 0.6 < float(np.sqrt((values**2).mean())) < 0.8
        assert np.array_equal(values, np.array(canary._work(*canary._data(256), repeats)))


def test_the_default_canary_is_a_timed_call() -> None:
    """On this device it returns positive seconds, again and again."""
    call = default_canary()
    assert mx.default_device().type == mx.DeviceType.cpu
    assert all(call() > 0 for _ in range(3))
