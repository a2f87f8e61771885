"""What hardware reports of itself: an NVIDIA GPU through NVML, processor packages on Linux through RAPL.

Nothing here raises for what a machine lacks: what cannot be read, or might be another device's, is None.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")

POWERCAP = Path("/sys/class/powercap")
# NVML's reasons for a clock below the highest, without those that are no fault: idle, and a display's own setting.
THROTTLE_REASONS = {
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x200: "board limit",
    0x400: "reliability",
}
# Those that make timings doubtful whatever the load; a power cap under full load is a GPU's ordinary state.
ALARMING = ("hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake", "reliability")


@dataclass(frozen=True)
class Reading:
    """One look at a meter: watts, joules since some time in the past, clocks in Hz, degrees Celsius.

    throttle: why clocks are reduced; empty where nothing reduces them, None where that is not told.
    """

    power_w: float | None = None
    energy_j: float | None = None
    clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    throttle: tuple[str, ...] | None = None


class Meter(Protocol):
    """What can be read again and again while something runs."""

    name: str

    def read(self) -> Reading:
        """The state at this moment."""


class NvidiaGpu:
    """One whole NVIDIA GPU as NVML sees it."""

    name = "NVML"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def _ask(self, function: str, *arguments: Any) -> Any:
        return _quietly(lambda: getattr(self._nvml, function)(self._handle, *arguments))

    def _number(self, function: str, *arguments: Any, scale: float) -> float | None:
        value = self._ask(function, *arguments)
        return None if value is None else float(value) * scale

    def read(self) -> Reading:
        """Power, energy since the driver was loaded, SM and memory clock, temperature, throttle reasons."""
        return Reading(
            self._power_w(),
            self._number("nvmlDeviceGetTotalEnergyConsumption", scale=1e-3),
            self._number("nvmlDeviceGetClockInfo", 1, scale=1e6),  # NVML_CLOCK_SM
            self._number("nvmlDeviceGetClockInfo", 2, scale=1e6),  # NVML_CLOCK_MEM
            self._number("nvmlDeviceGetTemperature", 0, scale=1.0),  # NVML_TEMPERATURE_GPU
            self.throttle(),
        )

    def _power_w(self) -> float | None:
        """The power of this moment where the GPU tells it, else NVML's own figure, on many GPUs a mean of a second."""

        def instant() -> float:
            (field,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
            if field.nvmlReturn != 0 or not field.value.uiVal:
                raise ValueError("not told")
            return float(field.value.uiVal) * 1e-3

        found: float | None = _quietly(instant)
        return self._number("nvmlDeviceGetPowerUsage", scale=1e-3) if found is None else found

    def throttle(self) -> tuple[str, ...] | None:
        """Why the clocks are below their highest, without idleness; None if NVML does not tell."""
        for word in ("Event", "Throttle"):  # the second is the name in drivers before 535
            mask = self._ask(f"nvmlDeviceGetCurrentClocks{word}Reasons")
            if mask is not None:
                return tuple(name for bit, name in THROTTLE_REASONS.items() if int(mask) & bit)
        return None

    def power_limits_w(self) -> tuple[float | None, float | None]:
        """The power limit in force and the one the GPU came with."""
        return (
            self._number("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
            self._number("nvmlDeviceGetPowerManagementDefaultLimit", scale=1e-3),
        )

    def highest_clocks_hz(self) -> tuple[float | None, float | None]:
        """The highest SM and memory clock."""
        return (
            self._number("nvmlDeviceGetMaxClockInfo", 1, scale=1e6),
            self._number("nvmlDeviceGetMaxClockInfo", 2, scale=1e6),
        )

    def versions(self) -> tuple[str | None, str | None]:
        """The driver's version, and the CUDA version that it supports."""
        driver = _quietly(lambda: _text(self._nvml.nvmlSystemGetDriverVersion()))
        cuda = _quietly(lambda: int(self._nvml.nvmlSystemGetCudaDriverVersion()))
        return driver, None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"

    def memory_used_bytes(self) -> int | None:
        """Bytes that all processes together hold on the GPU."""
        return _quietly(lambda: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used))

    def other_processes(self, holds_one: bool) -> int | None:
        """How many other processes compute on the GPU.

        holds_one: this process may be among them. In a container NVML may know it by another number: then a single
        process may or may not be this one, and the answer is None.
        """
        pids = _quietly(lambda: [int(p.pid) for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)])
        if pids is None or not pids:
            return None if pids is None else 0
        if os.getpid() in pids:
            return len(pids) - 1
        if not holds_one:
            return len(pids)
        return None if len(pids) == 1 else len(pids) - 1


def nvidia_gpu(pci_bus_id: str = "") -> NvidiaGpu | None:
    """The GPU at this address, as MLX names it, such as "0000:18:00.0"; without one, the first that CUDA would take.

    None where NVML is missing or refuses, where it isn't certain which GPU is meant, and for a GPU divided by MIG,
    whose sensors speak of the whole.
    """
    nvml = _nvml()[0]
    if nvml is None:
        return None
    handle = _quietly(lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id) if pci_bus_id else _first(nvml))
    if handle is None:
        return None
    mode = _quietly(lambda: list(nvml.nvmlDeviceGetMigMode(handle)))  # GPUs that cannot be divided raise here
    return None if mode and mode[0] else NvidiaGpu(nvml, handle)


def _first(nvml: Any) -> Any:
    """The handle of CUDA's first device, or None where CUDA's order cannot be told from here."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = None if chosen is None else chosen.partition(",")[0].strip()
    if name == "" or (name or "").startswith("MIG"):
        return None
    if name and name.startswith("GPU-"):
        return next(
            (handle for handle in _handles(nvml) if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(name)), None
        )
    index = int(name or 0)
    count = int(nvml.nvmlDeviceGetCount())
    # CUDA numbers the fastest GPU first and says nothing of the rest; only this setting makes it NVML's order.
    known = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or count == 1
    return nvml.nvmlDeviceGetHandleByIndex(index) if known and 0 <= index < count else None


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(int(nvml.nvmlDeviceGetCount()))]


def nvml_problem() -> str:
    """Why NVML cannot be asked, in one line, or "" if it can."""
    return _nvml()[1]


@functools.cache
def _nvml() -> tuple[Any, str]:
    """NVML's bindings, started, and ""; or None and why there are none."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except Exception as error:  # NVML's own errors, and what a foreign module of that name may raise
        return None, f"NVML does not start: {' '.join(str(error).split()) or type(error).__name__}"
    return pynvml, ""


def _quietly(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except Exception:  # NVMLError has dozens of children, and an old library lacks functions: all mean unknown
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class Rapl:
    """The energy of all processor packages, from Linux's powercap files, which only root may read on most machines."""

    name = "RAPL"

    def __init__(self, packages: Sequence[Path]) -> None:
        self._packages = list(packages)
        self._ranges = [_microjoules(package / "max_energy_range_uj") for package in packages]
        self._last = [0] * len(packages)
        self._turns = [0] * len(packages)

    def read(self) -> Reading:
        """The energy, with the turns of the counters that happened since the first look; nothing else is known."""
        try:
            now = [_microjoules(package / "energy_uj") for package in self._packages]
        except (OSError, ValueError):
            return Reading()
        for index, value in enumerate(now):
            self._turns[index] += value < self._last[index]
            self._last[index] = value
        total = sum(v + t * r for v, t, r in zip(now, self._turns, self._ranges, strict=True))
        return Reading(energy_j=total * 1e-6)


def rapl() -> Rapl | None:
    """The processor packages' meter, where this user may read it."""
    try:
        zones = sorted(zone for zone in POWERCAP.glob("intel-rapl:*") if zone.name.count(":") == 1)
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        meter = Rapl(packages)
    except (OSError, ValueError):
        return None
    return meter if packages and meter.read().energy_j is not None else None


def _microjoules(file: Path) -> int:
    return int(file.read_text())
