"""The noise floor: what a second copy of the baseline says, and how large a block of quads may make it look."""

import math
import tracemalloc
from typing import Any

from tests.measure.clock import Clock
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import NoiseFloor, noise_floor
from zimage.measure.comparison import compare

import numpy as np
import pandas as pd
import pytest


def measured(clock: Clock, ratio: float = 1.0, **options: Any) -> NoiseFloor:
    """The floor of a baseline whose copy takes `ratio` times as long, on that clock."""
    return noise_floor(clock.arm("baseline"), clock.arm("copy", ratio), **{"seed": 0, **options})


def test_the_floor_is_that_of_fresh_runs() -> None:
    """Over 200 copies the floor at 20 quads is as large as 95 % of what fresh comparisons of 20 quads show."""
    floors = [measured(Clock(i), seed=i).at(20) for i in range(200)]
    fresh = [abs(math.log(compare_twenty(i))) for i in range(300)]
    assert np.median(floors) == pytest.approx(float(np.quantile(fresh, 0.95)), rel=0.35)


def compare_twenty(seed: int) -> float:
    """The ratio of the same and the same after 20 quads."""
    clock = Clock(1000 + seed)
    return compare(clock.arm("a"), clock.arm("b"), seed=seed, max_quads=20, delta=1e-6, alpha=1e-4).ratio


def test_more_quads_have_a_lower_floor_and_more_noise_a_higher_one() -> None:
    """The floor falls with the quads of a block and rises with the noise."""
    floor = measured(Clock())
    assert floor.at(5) > floor.at(10) > floor.at(20) > floor.at(40) > 0
    assert measured(Clock(noise=0.03)).at(20) > 2 * floor.at(20)


def test_a_floor_is_reproducible() -> None:
    """The same evidence and seed give the same floor, another seed one that is close."""
    floor, again, other = measured(Clock()), measured(Clock()), measured(Clock(), seed=-7)
    assert floor.at(20) == floor.at(20) == again.at(20) != other.at(20)
    assert other.at(20) == pytest.approx(floor.at(20), rel=0.6)


def test_copies_that_differ_are_reported() -> None:
    """Where the copy is 3 % slower for no reason, that is said in words, and the floor is no smaller than it."""
    same, different = measured(Clock()), measured(Clock(), 1.03)
    assert different.copies_differ and "the two copies differ systematically" in str(different)
    assert different.at(20) > 0.028
    assert not same.copies_differ and "differ" not in str(same)
    assert str(same) == (
        f"noise floor {100 * same.at(40):.1f} % at 40 quads: copy / baseline {same.ratio:.3f}, "
        f"95 % CI {same.low:.3f}-{same.high:.3f}"
    )


def test_a_comparison_takes_the_floor_at_its_own_quads() -> None:
    """A measured floor is read at the number of quads that a comparison kept, and bounds what is called slower."""
    floor, clock = measured(Clock(noise=0.03)), Clock()
    found = compare(clock.arm("a"), clock.arm("b", 1.03), seed=0, noise_floor=floor)
    assert found.noise_floor == floor.at(found.quads)
    assert found.row("step")["noise_floor"] == found.noise_floor
    differing = measured(Clock(), 1.05)
    within = compare(clock.arm("a"), clock.arm("b", 1.03), seed=0, noise_floor=differing)
    assert within.verdict == "inconclusive" and "within the noise floor" in within.reason


def test_the_floor_takes_all_its_quads_and_drops_by_canary() -> None:
    """It never stops early, a canary drops quads of it too, and its rows have the arms baseline, copy and canary."""
    clock = Clock(noise=1e-5)
    canaries = iter([0.02, 0.02, 0.03, *[0.02] * 20])
    floor = measured(clock, quads=12, canary=lambda: next(canaries))
    assert floor.quads == 12 and sum(floor.dropped.values()) == 1
    rows = conform("samples", pd.DataFrame(floor.sample_rows("step", trial=3))).to_pandas()
    assert set(rows["arm"]) == {"baseline", "copy", "canary"} and set(rows["trial"]) == {3}
    assert len(rows) == 13 * 5 and rows["dropped"].sum() == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quads": 5}, "quads must be an integer of at least 6, found 5"),
        ({"quads": 20.0}, "quads"),
        ({"blocks": 19}, "blocks must be an integer of at least 20"),
        ({"seed": None}, "seed must be an integer"),
        ({"canary": 1}, "canary must be a callable"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_called(options: dict[str, Any], words: str) -> None:
    """Arguments out of range give a MeasurementError, and neither copy is called."""
    clock = Clock()
    with pytest.raises(MeasurementError, match=words):
        measured(clock, **options)
    assert clock.calls == []


@pytest.mark.parametrize("quads", [0, -1, 2.5])
def test_a_floor_needs_a_number_of_quads(quads: Any) -> None:
    """The floor of no quads, or of a part of one, is a MeasurementError."""
    with pytest.raises(MeasurementError, match="quads must be an integer of at least 1"):
        measured(Clock()).at(quads)


def test_a_floor_at_any_number_of_quads_takes_bounded_memory() -> None:
    """However many quads are asked for, the floor is found in less than 300 MB, and is no higher than at 100."""
    floor = measured(Clock())
    tracemalloc.start()
    try:
        found = floor.at(10**9)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < found < floor.at(100)
    assert peak_bytes < 300e6
