"""Energy and power from meters made of numbers."""

import threading
import time

from tests.fake_nvml import Card, Nvml, NVMLError
from zimage import backend, sensors
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import joules_per_step, power
from zimage.sensors import Reading

import pandas as pd
import pytest

Reasons = tuple[str, ...] | None


class Steady:
    """A meter that draws the same power all the time, with an energy counter or without."""

    name = "NVML"

    def __init__(self, watts: float | None = 100.0, counter: bool = True, throttle: Reasons = ()) -> None:
        self.throttle = throttle
        self.start, self.watts, self.counter, self.threads = time.monotonic(), watts, counter, set[str]()

    def read(self) -> Reading:
        self.threads.add(threading.current_thread().name)
        energy = self.watts * (time.monotonic() - self.start) if self.counter and self.watts else None
        return Reading(self.watts, energy, 1.5e9, 2.6e9, 40.0, self.throttle)


def test_summary_of_looks() -> None:
    """Energy is the counter's difference; clocks are medians, power and heat highest, reasons all seen."""
    looks = [
        (10.0, Reading(100.0, 50.0, 1.0e9, 2e9, 40.0)),
        (11.0, Reading(300.0, 200.0, 1.8e9, 2e9, 50.0, ("power cap",))),
        (12.0, Reading(200.0, 450.0, 1.6e9, 2e9, 60.0, ("thermal slowdown", "power cap"))),
    ]
    assert power.summary(looks, "NVML") == power.Power(
        400.0, 200.0, 300.0, 1.6e9, 2e9, 60.0, ("power cap", "thermal slowdown"), 2.0, 3, "NVML"
    )


@pytest.mark.parametrize("counter", [(None, None), (7.0, 7.0), (7.0, None), (7.0, 1.0)])
def test_power_is_integrated_without_a_counter(counter: tuple[float | None, float | None]) -> None:
    """Where the counter is missing, stands still or starts again, the sampled power is integrated over time."""
    looks = [(0.0, Reading(100.0, counter[0])), (1.0, Reading(300.0)), (3.0, Reading(100.0, counter[1]))]
    found = power.summary(looks)
    assert found.energy_j == pytest.approx(200 + 400)
    assert found.mean_power_w == pytest.approx(200)


def test_reasons_that_are_not_told_are_unknown() -> None:
    """A meter that tells no reasons for reduced clocks is not one that saw none; a look that failed hides none."""
    told = [(0.0, Reading(100.0)), (1.0, Reading(100.0, throttle=("power cap",))), (2.0, Reading(100.0, throttle=()))]
    assert power.summary(told).throttle == ("power cap",)
    assert power.summary(told[2:]).throttle == ()
    assert power.summary(told[:1]).throttle is None
    assert sensors.NvidiaGpu(Nvml(new=False), Card(throttle=NVMLError())).read().throttle is None


def test_gaps_are_filled_with_the_mean() -> None:
    """Looks whose power failed do not lose the energy of their time."""
    looks = [(0.0, Reading()), (1.0, Reading(100.0)), (2.0, Reading(100.0)), (4.0, Reading())]
    assert power.summary(looks).energy_j == pytest.approx(400)
    assert power.summary([(0.0, Reading()), (1.0, Reading(50.0)), (2.0, Reading())]).energy_j == pytest.approx(100)


def test_nothing_told_is_none() -> None:
    """A meter that tells nothing leaves everything unknown."""
    found = power.summary([(0.0, Reading()), (1.0, Reading())], note="why")
    assert (found.energy_j, found.mean_power_w, found.max_power_w, found.clock_hz) == (None, None, None, None)
    assert (found.throttle, found.seconds, found.note) == (None, 1.0, "why")


def test_sampler_watches_from_its_own_thread() -> None:
    """While the block runs, the meter is read again and again from another thread, which ends with the block."""
    meter = Steady()
    before = threading.active_count()
    with power.Sampler(meter, interval_s=0.01) as sampler:
        with pytest.raises(MeasurementError, match="after the with block"):
            _ = sampler.power
        time.sleep(0.3)
    assert threading.active_count() == before
    assert len(meter.threads) == 2
    assert sampler.power.samples > 5
    assert sampler.power.mean_power_w == pytest.approx(100.0, rel=0.1)
    assert sampler.power.energy_j == pytest.approx(100.0 * sampler.power.seconds, rel=0.1)


def test_sampler_ends_with_an_error() -> None:
    """An error in the block passes through, and the thread still ends."""
    before = threading.active_count()
    with pytest.raises(ValueError, match="mine"), power.Sampler(Steady()):
        raise ValueError("mine")
    assert threading.active_count() == before


def test_joules_of_a_step() -> None:
    """Steps repeat until their own times reach the seconds asked for; one before that warms up and is not counted."""
    times = iter([9.0, 0.5, 0.5, 0.5])

    def call() -> float:
        time.sleep(0.05)
        return next(times)

    found = joules_per_step(call, seconds=1.5, meter=Steady(watts=200.0))
    assert (found.steps, found.time_s) == (3, 0.5)
    assert found.energy_j is not None
    assert found.energy_j == pytest.approx(200.0 * found.power.seconds / 3, rel=0.1)
    assert found.power.seconds >= 0.15


def test_rows_fit_the_table() -> None:
    """A step's power is a row of the table `power`, with what is unknown missing from it."""
    known = joules_per_step(lambda: 1.0, 1.0, Steady()).row("baseline", "step")
    unknown = joules_per_step(lambda: 1.0, 1.0, Steady(watts=None, throttle=None)).row("arm", "step", "burst")
    table = conform("power", pd.DataFrame([known, unknown]).assign(run_key="k", experiment="e", device="d"))
    assert table.column("throttle").to_pylist() == ["none", "unknown"]
    assert table.column("energy_j").to_pylist()[1] is None
    assert table.column("steps").to_pylist() == [1, 1]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), None, True])
def test_times_that_are_none_are_refused(bad: float) -> None:
    """A call that returns no positive number of seconds would never end, and is refused."""
    with pytest.raises(MeasurementError, match="must be positive"):
        joules_per_step(lambda: bad, 1.0, Steady())
    for seconds in (float("nan"), 0.0, None):
        with pytest.raises(MeasurementError, match="seconds must be positive"):
            joules_per_step(lambda: 1.0, seconds, Steady())  # type: ignore[arg-type]


def test_device_without_a_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no meter can be read, steps still run, and everything is unknown with one line why."""
    monkeypatch.setattr(sensors, "rapl", lambda: None)
    found = joules_per_step(lambda: 1.0, 2.0)
    assert (found.steps, found.energy_j, found.power.meter) == (2, None, "unknown")
    assert "RAPL" in found.power.note
    assert found.row("baseline", "step")["throttle"] == "unknown"


def _as(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = backend.Prepared(backend.MLXBuild(kind, "0.32.4", None), None, (), False, ())
    monkeypatch.setattr(backend, "prepare", lambda: prepared)
    monkeypatch.setattr(backend, "device_type", lambda: device)


def test_nvidia_meter_is_that_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the meter is the GPU at the address that MLX names."""
    _as("cuda-13", "gpu", monkeypatch)
    cards = Card(), Card("0000:3b:00.0", energy_mj=7_000)
    monkeypatch.setattr(sensors, "_nvml", lambda: (Nvml(*cards), ""))
    monkeypatch.setattr(backend, "_mlx_device", lambda: {"pci_bus_id": "0000:3b:00.0"})
    meter, problem = power.find_meter()
    assert (problem, meter is not None and meter.read().energy_j) == ("", 7.0)
    monkeypatch.setattr(sensors, "_nvml", lambda: (None, "nvidia-ml-py is not installed"))
    assert power.find_meter() == (None, "power is unknown: nvidia-ml-py is not installed")


def test_apple_gpu_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS energy is unknown, and the line says that root alone is told."""
    _as("metal", "gpu", monkeypatch)
    assert power.find_meter() == (None, "power is unknown: macOS tells it to root only")
