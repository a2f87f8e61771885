"""Clocks made of numbers: what machines with known noise, drift and effects would have measured.

A model gives a whole array of calls at once, and a replay hands out the same times call by call, to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

from zimage.measure.samples import Timed
from zimage.measure.statistics import Floats

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.signal import lfilter

Bools = NDArray[np.bool_]
BASE_S = 1e-3  # one call of the baseline, without noise


@dataclass(frozen=True)
class ClockModel:
    """A clock: `weather` [R, calls] are the factors that any arm's calls meet in R runs, whichever arm it is.

    after_switch: by how much longer a call takes that follows one of another arm. tick_s: times are multiples of it.
    """

    name: str
    parameters: str
    weather: Callable[[Generator, int, int], Floats]
    after_switch: float = 0.0
    tick_s: float = 0.0

    def times(self, weather: Floats, ratio: float, is_arm: Bools, switched: Bools) -> Floats:
        """Seconds of calls, the arm's taking `ratio` times as long as the baseline's."""
        times = BASE_S * weather * np.where(is_arm, ratio, 1.0) * np.where(switched, 1 + self.after_switch, 1.0)
        return np.rint(times / self.tick_s) * self.tick_s if self.tick_s else times


class Replay:
    """One run of a clock, call by call: `weather` [calls] is used up by the calls in their order."""

    def __init__(self, model: ClockModel, weather: Floats, ratio: float = 1.0) -> None:
        self.baseline, self.arm = self._call(False), self._call(True)
        self._model, self._weather, self._ratio = model, iter(weather), ratio
        self._last: bool | None = None

    def _call(self, is_arm: bool) -> Timed:
        def call() -> float:
            switched = self._last not in (None, is_arm)
            self._last = is_arm
            return float(self._model.times(next(self._weather), self._ratio, np.bool_(is_arm), np.bool_(switched)))

        return call

    def canary(self) -> float:
        """A call of something else, in the same weather."""
        return float(self._model.times(next(self._weather), 1.0, np.bool_(False), np.bool_(False)))


def white(sigma: float) -> Callable[[Generator, int, int], Floats]:
    """Independent noise, the logs normal."""
    return lambda random, runs, calls: np.exp(sigma * random.standard_normal((runs, calls)))


def autoregressive(sigma: float, phi: float = 0.9) -> Callable[[Generator, int, int], Floats]:
    """AR(1) noise of the logs, stationary, `sigma` its marginal standard deviation."""

    def weather(random: Generator, runs: int, calls: int) -> Floats:
        steps = random.standard_normal((runs, calls)) * sigma * (1 - phi**2) ** 0.5
        steps[:, 0] /= (1 - phi**2) ** 0.5
        return np.exp(lfilter([1.0], [1.0, -phi], steps, axis=1))

    return weather


def _drift(random: Generator, runs: int, calls: int) -> Floats:
    return autoregressive(0.01)(random, runs, calls) * (1 + 0.05 * np.linspace(0, 1, calls))


def _spikes(random: Generator, runs: int, calls: int) -> Floats:
    return white(0.01)(random, runs, calls) * np.where(random.random((runs, calls)) < 0.03, 1.5, 1.0)


def _throttle(random: Generator, runs: int, calls: int) -> Floats:
    slow = np.arange(calls) >= random.integers(0, calls, (runs, 1))
    return white(0.01)(random, runs, calls) * np.where(slow, 1 / 0.8, 1.0)


CLOCKS = (
    ClockModel("iid 1 %", "independent noise of 1 %", white(0.01)),
    ClockModel("iid 2 %", "independent noise of 2 %", white(0.02)),
    ClockModel("drift", "5 % slower by the end of the run, and AR(1) noise of 1 %, phi 0.9", _drift),
    ClockModel("AR(1)", "AR(1) noise of 3 %, phi 0.9", autoregressive(0.03)),
    ClockModel("spikes", "3 % of the calls take 50 % longer; noise of 1 %", _spikes),
    ClockModel("throttle", "at a random call the clock falls by 20 % and stays there; noise of 1 %", _throttle),
    ClockModel("quantized", "ticks of 1 % of a call, the baseline on a tick; noise of 1 %", white(0.01), 0.0, 1e-5),
    ClockModel("carry-over", "a call after a switch of arms takes 1 % longer; noise of 1 %", white(0.01), 0.01),
)
BY_NAME = {clock.name: clock for clock in CLOCKS}
NOISIER = ClockModel("iid 3 %", "independent noise of 3 %", white(0.03))
