"""The default canary: a fixed piece of work whose time stands for the device's clock, whatever is being compared."""

from functools import partial

from zimage.errors import MeasurementError
from zimage.measure.samples import Timed
from zimage.measure.timing import timed

import mlx.core as mx

LEAST_S = {"gpu": 0.020, "cpu": 0.005}
_SIZE = {"gpu": 2048, "cpu": 256}
_MOST_REPEATS = 1 << 14


def default_canary() -> Timed:
    """A canary for `compare`: products and elementwise work on normal data, the same data everywhere.

    Sized once, here, so that a call takes at least 20 ms on a GPU and 5 ms on a CPU. Raises MeasurementError on a
    device that is too quick for any reasonable size.
    """
    kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    size = _SIZE[kind]
    x, weight = _data(size)
    repeats = 1
    while repeats <= _MOST_REPEATS:
        canary = timed(partial(_work, x, weight, repeats))
        canary()  # compiles
        if min(canary() for _ in range(3)) >= 1.25 * LEAST_S[kind]:  # a warmer device may be quicker
            return canary
        repeats *= 2
    raise MeasurementError(f"{_MOST_REPEATS} products of size {size} are too short for a canary on this {kind}")


def _data(size: int) -> tuple[mx.array, mx.array]:
    x, weight = (mx.random.normal((size, size), key=mx.random.key(seed)) for seed in (0, 1))
    # A gain of 2 before the sine keeps the values at a root mean square of about 0.7 however often it is repeated.
    weight *= 2 / size**0.5
    mx.eval(x, weight)
    return x, weight


def _work(x: mx.array, weight: mx.array, repeats: int) -> mx.array:
    for _ in range(repeats):
        x = mx.sin(x @ weight)
    return x
