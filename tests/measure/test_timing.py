"""One timed call, and trials of them."""

import time
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.timing import Trial, timed, trial, untimed

import mlx.core as mx
import pytest


def test_a_timed_call_computes_every_output() -> None:
    """All arrays that the work returns are computed within the sample, however deep they lie in lists and dicts."""
    kept: dict[str, mx.array] = {}

    def evaluated(name: str) -> mx.array:
        """An array that stays lazy until somebody evaluates it, and notes that in the peak of memory."""
        kept[name] = mx.ones((256, 256)) + len(kept)
        return kept[name]

    def work() -> Any:
        return [evaluated("a"), {"b": (evaluated("c"), [evaluated("d")])}]

    mx.clear_cache()
    before = mx.get_active_memory()
    time_s = timed(work)()
    held = mx.get_active_memory() - before
    assert time_s > 0
    assert held == pytest.approx(3 * 4 * 256**2, rel=0.1)
    mx.eval(list(kept.values()))  # costs nothing more: they are there
    assert mx.get_active_memory() - before == held


def test_a_timed_call_builds_its_work_anew() -> None:
    """Each call does the work again and returns its seconds."""
    calls = []
    call = timed(lambda: calls.append(time.sleep(0.003)))
    assert all(0.003 <= call() < 1 for _ in range(3))
    assert len(calls) == 3


@pytest.mark.parametrize("result", [object(), "x", [mx.ones(1), object()], {"a": {1}}, iter([mx.ones(1)])])
def test_what_mlx_would_leave_uncomputed_is_refused(result: Any) -> None:
    """Work that hides its arrays in something MLX doesn't look into is a MeasurementError, not a short time."""
    with pytest.raises(MeasurementError, match="which MLX cannot evaluate; return arrays"):
        timed(lambda: result)()


def test_a_trial_keeps_the_first_call_and_the_warm_up_apart() -> None:
    """The first call, which compiles, and the warm-up are no samples, and none of them moves median or quartiles."""
    times = iter([9.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    found = trial(lambda: next(times), samples=5, warm_up=2)
    assert found == Trial(9.0, [7.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.median_s == 3.0
    assert found.quartiles_s == (2.0, 4.0)


@pytest.mark.parametrize("counts", [{"samples": 0}, {"samples": -1}, {"warm_up": -1}])
def test_impossible_trials_are_refused(counts: dict[str, int]) -> None:
    """A trial without a sample is a MeasurementError, and nothing is called."""
    with pytest.raises(MeasurementError, match="at least one sample"):
        trial(lambda: 1 / 0, **counts)


def test_nothing_is_timed_while_something_would_be_in_the_time() -> None:
    """Within `untimed`, also nested, a timed call is a MeasurementError that says what is in the way; after it, not."""
    call = timed(lambda: mx.ones(1))
    with untimed("an outer capture"):
        with untimed("a capture"), pytest.raises(MeasurementError, match="a capture is under way"):
            call()
        with pytest.raises(MeasurementError, match="an outer capture is under way"):
            call()
    assert call() > 0
