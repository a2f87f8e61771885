"""Power, energy and clocks while something runs: NVIDIA GPUs through NVML, Linux processors through RAPL.

What a machine does not tell is None: on macOS, energy needs root and stays unknown. Needs no MLX to be imported.
"""

import threading
import time
from dataclasses import dataclass
from statistics import fmean, median
from types import TracebackType
from typing import Any, Self

from zimage import backend, sensors
from zimage.errors import BackendError, MeasurementError
from zimage.measure.arguments import require_positive
from zimage.measure.quads import seconds as require_seconds
from zimage.measure.samples import Timed

_INTERVAL_S = 0.03


@dataclass(frozen=True)
class Power:
    """What was drawn from start to end; None where the meter does not tell.

    Joules in all, watts (mean and highest sample), medians of the SM and memory clock in Hz, the highest temperature
    in degrees Celsius, every reason seen for reduced clocks (empty where none was), and how long and how often was
    looked. `meter` is "NVML", "RAPL" or "unknown"; `note` says why something is unknown.
    """

    energy_j: float | None
    mean_power_w: float | None
    max_power_w: float | None
    clock_hz: float | None
    memory_clock_hz: float | None
    temperature_c: float | None
    throttle: tuple[str, ...] | None
    seconds: float
    samples: int
    meter: str = "unknown"
    note: str = ""

    def row(self, arm: str, scope: str, regime: str) -> dict[str, Any]:
        """A row of the table `power`: mean watts, clocks, temperature and throttling; of no single step."""
        return {
            "arm": arm, "scope": scope, "regime": regime, "power_w": self.mean_power_w, "clock_hz": self.clock_hz,
            "memory_clock_hz": self.memory_clock_hz, "temperature_c": self.temperature_c,
            "throttle": "unknown" if self.throttle is None else ", ".join(self.throttle) or "none",
        }  # fmt: skip


@dataclass(frozen=True)
class StepPower:
    """What one step takes: seconds as its timed calls returned them, joules, both means over `steps` steps."""

    steps: int
    time_s: float
    energy_j: float | None
    power: Power

    def row(self, arm: str, scope: str, regime: str = "sustained") -> dict[str, Any]:
        """A row of the table `power`: seconds and joules of one step, mean watts, clocks, temperature, throttling."""
        step = {"steps": self.steps, "time_s": self.time_s, "energy_j": self.energy_j}
        return {**self.power.row(arm, scope, regime), **step}


def find_meter() -> tuple[sensors.Meter | None, str]:
    """The meter of the device that MLX computes on, and ""; or None and why there is none."""
    try:
        build = backend.prepare().build.kind
        device = backend.device_type()
    except BackendError as error:
        return None, str(error)
    if device == "gpu" and build.startswith("cuda"):
        gpu = backend.nvidia_gpu()
        reason = sensors.nvml_problem() or "it is not certain which GPU NVML should speak of, or MIG divides it"
        return gpu, "" if gpu is not None else f"power is unknown: {reason}"
    if device == "gpu":
        return None, "power is unknown: macOS tells it to root only"
    packages = sensors.rapl()
    return packages, "" if packages is not None else "power is unknown: no RAPL counter that this user may read"


class Sampler:
    """Watches the meter from a thread of its own while the `with` block runs; then `power` holds what it saw.

    The default meter is that of MLX's device. interval_s: between looks. The clock is the system's monotonic one: this
    is no timing of the work itself.
    """

    def __init__(self, meter: sensors.Meter | None = None, interval_s: float = _INTERVAL_S) -> None:
        self._note = ""
        if meter is None:
            meter, self._note = find_meter()
        self._meter, self._interval_s = meter, interval_s
        self._looks: list[tuple[float, sensors.Reading]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._power: Power | None = None

    @property
    def power(self) -> Power:
        """What was seen. Raises MeasurementError before the block has ended."""
        if self._power is None:
            raise MeasurementError("the sampler is still watching: read its power after the with block")
        return self._power

    def __enter__(self) -> Self:
        self._looks, self._power = [], None
        self._stop.clear()
        self._look()
        if self._meter is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._look()
        self._power = summary(self._looks, getattr(self._meter, "name", "unknown"), self._note)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        reading = sensors.Reading() if self._meter is None else self._meter.read()
        self._looks.append((time.monotonic(), reading))


def summary(looks: list[tuple[float, sensors.Reading]], meter: str = "unknown", note: str = "") -> Power:
    """The `Power` of looks at (seconds, reading), first to last.

    Energy is the difference of the energy counter where it has moved, else the integral of the power.
    """
    seconds = looks[-1][0] - looks[0][0]
    readings = [reading for _, reading in looks]
    watts = [(at, r.power_w) for at, r in looks if r.power_w is not None]
    first, last = readings[0].energy_j, readings[-1].energy_j
    energy_j = last - first if first is not None and last is not None and last > first else _integral(watts, seconds)

    def known(name: str) -> list[float]:
        return [value for r in readings if (value := getattr(r, name)) is not None]

    told = [r.throttle for r in readings if r.throttle is not None]
    reasons = {name for one in told for name in one}
    clocks, memory_clocks, heat = known("clock_hz"), known("memory_clock_hz"), known("temperature_c")
    return Power(
        energy_j,
        energy_j / seconds if energy_j is not None and seconds > 0 else None,
        max((w for _, w in watts), default=None),
        median(clocks) if clocks else None,
        median(memory_clocks) if memory_clocks else None,
        max(heat, default=None),
        tuple(name for name in sensors.THROTTLE_REASONS.values() if name in reasons) if told else None,
        seconds,
        len(looks),
        meter,
        note,
    )


def _integral(watts: list[tuple[float, float]], seconds: float) -> float | None:
    """Joules from samples of (seconds, watts) by trapezoids; the mean of what was seen stands for the rest."""
    if not watts:
        return None
    covered = watts[-1][0] - watts[0][0]
    if covered <= 0:
        return watts[0][1] * seconds
    pairs = zip(watts, watts[1:], strict=False)
    return sum((b - a) * fmean((p, q)) for (a, p), (b, q) in pairs) * seconds / covered


def joules_per_step(call: Timed, seconds: float = 10.0, meter: sensors.Meter | None = None) -> StepPower:
    """Repeat `call`, one timed step, until its times add up to at least `seconds`, and give the joules of a step.

    One call before the first look warms up. NVML's energy counter moves about ten times a second, so that runs of less
    than some seconds tell little. Raises MeasurementError for a time that is not positive.
    """
    require_positive(seconds=seconds)
    require_seconds("the step", call())
    total, steps = 0.0, 0
    with Sampler(meter) as sampler:
        while total < seconds:
            total += require_seconds("the step", call())
            steps += 1
    energy_j = sampler.power.energy_j
    return StepPower(steps, total / steps, None if energy_j is None else energy_j / steps, sampler.power)
