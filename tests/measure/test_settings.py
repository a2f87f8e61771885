"""Limits of MLX as arms: what holds inside a timed call, and what is left behind."""

from zimage.errors import MeasurementError
from zimage.measure import settings
from zimage.measure.timing import timed

import mlx.core as mx
import pytest


def limit() -> int:
    """The limit of the buffer cache, which can only be read by setting it."""
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


def work() -> mx.array:
    return mx.ones((1000, 1000)) + mx.ones((1000, 1000)) * 2


def test_without_a_buffer_cache_nothing_is_kept() -> None:
    """Inside the call the limit is 0 and no freed buffer stays; after it, or after an error, the limit is as before."""
    before = limit()
    seen = []

    def call() -> float:
        time_s = timed(work)()
        seen.append((limit(), mx.get_cache_memory()))
        return time_s

    assert settings.inside(settings.SETTINGS["no_buffer_cache"], call)() > 0
    assert seen == [(0, 0)] and limit() == before
    with pytest.raises(ZeroDivisionError), settings.cache_limit(0):
        _ = 1 / 0
    assert limit() == before


def test_a_limit_is_a_size() -> None:
    """A negative limit, and one that is no integer, are refused."""
    for wrong in (-1, 0.5, "much"):
        with pytest.raises(MeasurementError, match="limit_bytes"), settings.cache_limit(wrong):  # type: ignore[arg-type]
            pass


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal has a wired limit")
def test_a_wired_limit_is_of_metal_alone() -> None:
    """Elsewhere it is refused when the arm is made, before anything is timed."""
    with pytest.raises(MeasurementError, match="Metal alone has a wired limit") as caught:
        settings.inside(settings.SETTINGS["wired_limit"], timed(work))
    assert "\n" not in str(caught.value)
