"""Whether a verdict can be trusted: 20,000 simulated runs on each of eight clocks, and wrong methods that must fail.

The clocks and their parameters are in clocks.py, the simulation in study.py. The runs' seeds are fixed: a change of a
number is a change of the method.
"""

import random
import re
from itertools import zip_longest

from tests.measure import study
from tests.measure.clocks import BASE_S, BY_NAME, CLOCKS, ClockModel, Replay
from tests.measure.honesty_table import (
    MUTANTS,
    WITH_CANARY,
    Mutant,
    mutated,
    noisier,
    studied,
    tables,
    with_canary,
    written,
)
from zimage.measure.comparison import Comparison, compare
from zimage.measure.quads import schedule
from zimage.measure.statistics import LOOKS

import numpy as np
import pytest
from scipy.stats import binom

each_clock = pytest.mark.parametrize("clock", CLOCKS, ids=lambda clock: clock.name)
PLAYED = 25  # real comparisons on each of the eight clocks, with at most 20 quads and with 40
CANARIED = 20  # on each of two, with a canary


def test_the_bound_is_three_sigma_above_alpha() -> None:
    """A method of exactly alpha = 0.05 would pass the bound on rejections in 99.9 % of such studies."""
    assert binom.ppf(0.998, study.RUNS, 0.05) / study.RUNS < 0.0548 < binom.ppf(0.9995, study.RUNS, 0.05) / study.RUNS


@each_clock
def test_the_same_is_rarely_called_different(clock: ClockModel) -> None:
    """Of an arm like its baseline at most 5.48 % of the runs exclude 1, at one look of 20 quads, at two and at four."""
    found = studied(clock)
    assert len(found.same.p) == len(found.same_two.p) == len(found.same_four.p) == 20_000
    assert study.rarely_rejects(found.same)
    assert study.rarely_rejects(found.same_two)
    assert study.rarely_rejects(found.same_four)


@each_clock
def test_intervals_hold_the_truth(clock: ClockModel) -> None:
    """A true ratio of 1.00 or 1.02 lies in the interval in at least 94.5 % of the runs, at one look, two and four."""
    found = studied(clock)
    assert all(study.covers_truth(same, 1.0) for same in (found.same, found.same_two, found.same_four))
    planted = (found.two_percent, found.two_percent_two, found.two_percent_four)
    assert all(study.covers_truth(outcome, 1.02) for outcome in planted)


@each_clock
def test_the_sign_is_right(clock: ClockModel) -> None:
    """An arm that takes 2 % more time is hardly ever called faster, and half of the estimates lie close to 2 %."""
    found = studied(clock)
    assert study.has_right_sign(found.two_percent, 1.02)
    assert study.has_right_sign(found.two_percent_two, 1.02)
    assert study.has_right_sign(found.two_percent_four, 1.02)


@pytest.mark.parametrize("name", ["iid 1 %", "drift"])
def test_one_percent_is_found(name: str) -> None:
    """In noise of 1 %, drifting or not, a planted 1 % is found with 95 % power at 20 quads."""
    assert study.has_power(studied(BY_NAME[name]).one_percent)


def test_power_falls_with_noise() -> None:
    """A planted 1 % is found less often in noise of 2 %, and less again in 3 %: printed, not promised."""
    powers = [float(o.rejected.mean()) for o in (studied(BY_NAME["iid 2 %"]).one_percent, noisier())]
    print(f"1 % found at 20 quads: {powers[0]:.1%} in noise of 2 %, {powers[1]:.1%} in noise of 3 %")
    assert 0.95 > powers[0] > powers[1] > 0.05


@each_clock
def test_test_and_interval_agree(clock: ClockModel) -> None:
    """In every run of every kind the interval holds 1 exactly when p exceeds alpha, ties included."""
    assert {study.disagreements(outcome) for outcome in vars(studied(clock)).values()} == {0}


@pytest.mark.parametrize("name", WITH_CANARY)
def test_dropping_by_canary_rejects_no_more(name: str) -> None:
    """With the quads dropped whose canary is out of step, the same is still rejected within the bound."""
    for outcome in with_canary(name):
        assert study.rarely_rejects(outcome)
        assert study.disagreements(outcome) == 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_wrong_methods_fail(mutant: Mutant) -> None:
    """A method with a known fault does not pass the check that the real one passes on the same clock."""
    assert not mutant.passes(mutated(mutant.name))
    assert mutant.passes(getattr(studied(BY_NAME[mutant.clock]), mutant.beside))


def test_a_carried_cost_falls_on_untimed_calls() -> None:
    """Where the call after a switch costs more, no timed call ever follows a switch, so nothing of it is measured."""
    is_arm = study.orders()[:50]
    timed = np.tile([t for _, t in schedule(random.Random(0))], is_arm.shape[1] // study.CALLS)
    switched = study.switches(is_arm)
    assert switched.any() and not (switched & timed).any()
    clock = BY_NAME["carry-over"]
    times = clock.times(np.ones(is_arm.shape), 1.0, is_arm, switched)
    assert times.max() > 1.009 * BASE_S and set(times[:, timed].ravel()) == {BASE_S}


def _same(real: Comparison, run: int, simulated: study.Outcome) -> bool:
    return (real.quads, real.ratio, real.low, real.high, real.p) == (
        simulated.quads[run], simulated.ratio[run], simulated.low[run], simulated.high[run], simulated.p[run]
    )  # fmt: skip


@pytest.mark.parametrize("looks", [study.TWO_LOOKS, LOOKS], ids=len)
@each_clock
def test_compare_is_what_was_simulated(clock: ClockModel, looks: tuple[int, ...]) -> None:
    """Real runs of `compare` end as the simulated ones: same quads, ratio, interval and p, to the last bit."""
    factors = study.weather(clock, looks[-1] * study.CALLS, 0)
    simulated = study.run(clock, 1.01, looks, runs=study.CHUNK)
    for run in range(PLAYED):
        play = Replay(clock, factors[run], 1.01)
        real = compare(play.baseline, play.arm, seed=run, max_quads=looks[-1])
        assert _same(real, run, simulated)
        assert real.level == 0.05 / len(looks) and real.looks == real.quads // 10


@pytest.mark.parametrize("name", WITH_CANARY)
def test_compare_with_a_canary_is_what_was_simulated(name: str) -> None:
    """Real runs of `compare` with a canary drop the quads that the simulation drops, and end with its numbers."""
    clock = BY_NAME[name]
    factors = study.weather(clock, 2 * LOOKS[-1] * (study.CALLS + 1), 0)
    simulated = study.run(clock, 1.01, LOOKS, taken=study.with_canary, runs=study.CHUNK)
    dropped = 0
    for run in range(CANARIED):
        play = Replay(clock, factors[run], 1.01)
        real = compare(play.baseline, play.arm, seed=run, canary=play.canary)
        assert _same(real, run, simulated)
        dropped += real.dropped_quads
    assert dropped > 0


def test_the_committed_tables_are_those_of_this_method() -> None:
    """docs/honesty.md has every row of the tables, its numbers no further off than a new draw of the noise would be."""
    number = r"\d+(?:\.\d+)?"
    for old, new in zip_longest(written().splitlines(), tables().splitlines(), fillvalue=""):
        assert re.sub(number, "#", old) == re.sub(number, "#", new)
        assert [float(x) for x in re.findall(number, old)] == pytest.approx(
            [float(x) for x in re.findall(number, new)], abs=1.0, rel=0.3 if "disagree" in new else 0.0
        )
