"""A clock made of numbers: calls that return what a machine with known noise, drift and effects would have measured."""

from zimage.measure.timing import Timed

import numpy as np


class Clock:
    """Times of about 1 ms that grow with every call of any arm, plus independent noise, in relative units."""

    def __init__(self, seed: int = 0, noise: float = 0.01, drift_per_call: float = 0.0) -> None:
        self.calls: list[str] = []
        self._random = np.random.default_rng(seed)
        self._noise, self._drift = noise, drift_per_call

    def arm(self, name: str, ratio: float = 1.0) -> Timed:
        """A call of the arm `name`, which takes `ratio` times as long as it would."""

        def call() -> float:
            self.calls.append(name)
            relative = self._drift * len(self.calls) + self._noise * float(self._random.standard_normal())
            return 1e-3 * ratio * float(np.exp(relative))

        return call
