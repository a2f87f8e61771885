"""MLX's limits of a whole process as arms: set before an arm's timed call, and set back after it.

The untimed call after each switch of arms in a comparison takes what a setting leaves behind.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from zimage.errors import MeasurementError
from zimage.measure.arguments import require_integer
from zimage.measure.samples import Timed

import mlx.core as mx


@contextmanager
def cache_limit(limit_bytes: int) -> Iterator[None]:
    """At most so many bytes of freed buffers are kept for reuse; 0 keeps none. Raises MeasurementError below 0."""
    require_integer("limit_bytes", limit_bytes, 0)
    before = mx.set_cache_limit(limit_bytes)
    if not limit_bytes:
        mx.clear_cache()
    try:
        yield
    finally:
        mx.set_cache_limit(before)


@contextmanager
def wired_limit() -> Iterator[None]:
    """The recommended working set stays wired, so that the system takes no idle weights away.

    Raises MeasurementError where MLX computes on anything but Metal, which alone has that limit.
    """
    if not (mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu):
        raise MeasurementError("not measured here: Metal alone has a wired limit; use a Mac, device gpu")
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()  # nothing that is on its way may see the other limit
        mx.set_wired_limit(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "no_buffer_cache": partial(cache_limit, 0),
    "wired_limit": wired_limit,
}


def inside(setting: Callable[[], AbstractContextManager[None]], call: Timed) -> Timed:
    """`call` with the setting around it, which is no part of the time. Raises at once where it cannot be made here."""
    with setting():
        pass

    def timed_call() -> float:
        with setting():
            return call()

    return timed_call
