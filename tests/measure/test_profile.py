"""The prefix view: a planted time is found where it was planted, in its size, and nowhere else."""

import time

from tests.measure.clock import Clock
from zimage.errors import MeasurementError
from zimage.measure import profile

import mlx.core as mx
import numpy as np
import pytest

NAMES = ("embed", "block 0", "block 1", "block 2", "final")


@pytest.mark.parametrize("planted", range(len(NAMES)))
def test_a_planted_delay_is_found_there_and_nowhere_else(planted: int) -> None:
    """5 ms of sleep in one step of five appear there, in full and not much more; every other step stays near zero."""

    def run(k: int) -> None:
        if k > planted:
            time.sleep(0.005)

    steps, whole = profile.prefix(NAMES, run, rounds=9, seed=0)
    for i, step in enumerate(steps):
        if i == planted:
            assert step.low_s <= step.time_s <= step.high_s
            assert 0.004 < step.time_s < 0.0075
        else:
            assert abs(step.time_s) < 0.001
    assert 0.005 <= whole.time_s < 0.0075


def test_steps_have_their_names_and_every_prefix_its_turn() -> None:
    """Each round runs every prefix once, in a new order; one round before them warms up and is not counted."""
    asked: list[int] = []
    steps, whole = profile.prefix(NAMES, asked.append, rounds=6, seed=1)
    assert [step.name for step in steps] == list(NAMES)
    assert whole.name == "whole step"
    assert {len(step.samples_s) for step in [*steps, whole]} == {6}
    rounds = np.array(asked).reshape(7, 5)
    assert (np.sort(rounds, axis=1) == np.arange(1, 6)).all()
    assert len({tuple(row) for row in rounds[1:].tolist()}) > 3
    again: list[int] = []
    profile.prefix(NAMES, again.append, rounds=6, seed=1)
    assert again == asked


def test_a_step_costs_the_difference_of_neighbouring_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where prefix k takes 1 + 2 + ... + k ms, step k takes k ms and the whole is their sum."""
    clock = Clock(noise=0.0)
    arms = {k: clock.arm(str(k), k * (k + 1) / 2) for k in range(1, 6)}
    monkeypatch.setattr(profile, "timed", lambda work: arms[work()])
    steps, whole = profile.prefix(NAMES, lambda k: k, rounds=3, seed=0)
    assert [step.time_s for step in steps] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])
    assert whole.time_s == pytest.approx(15e-3)
    assert all(step.low_s == pytest.approx(step.high_s) for step in steps)


@pytest.mark.parametrize(("names", "rounds"), [((), 3), (NAMES, 0), (NAMES, -1)])
def test_impossible_profiles_are_refused(names: tuple[str, ...], rounds: int) -> None:
    """No steps or no rounds give a MeasurementError."""
    with pytest.raises(MeasurementError, match="steps and at least one round"):
        profile.prefix(names, lambda _k: None, rounds, 0)


def test_peak_bytes_count_what_is_held_and_what_is_added() -> None:
    """The peak is what was held before and all that the work holds at once; after it nothing more is held."""
    held = mx.ones((512, 1024))
    mx.eval(held)
    before = mx.get_active_memory()
    one = profile.peak_bytes(lambda: held + 1)
    assert before >= 2 * 2**20
    assert one - before == pytest.approx(2 * 2**20, rel=0.05)
    several = profile.peak_bytes(lambda: [held + 1, held + 2, held + 3])
    assert several - before == pytest.approx(3 * 2 * 2**20, rel=0.05)
    assert profile.peak_bytes(lambda: None) == mx.get_active_memory() == before
