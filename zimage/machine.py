"""Facts about the machine around MLX, and what of it makes timings doubtful. Needs no MLX.

Facts are strings by name; what a machine does not tell is "unknown". Those in `MOMENTARY` change from minute to minute:
they are recorded with every run, and never decide whether two runs are the same.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zimage import blas, sensors

UNKNOWN = "unknown"
MOMENTARY = (
    "power_source",
    "low_power_mode",
    "thermal_state",
    "memory_pressure",
    "load_average",
    "other_busy_cores",
    "cpu_clock_hz",
    "gpu_clock_hz",
    "gpu_memory_clock_hz",
    "gpu_power_w",
    "gpu_temperature_c",
    "gpu_throttle",
    "gpu_memory_used_bytes",
    "gpu_other_processes",
)
SYSTEM = Path("/sys")
_COMMAND_TIMEOUT_S = 10.0
_LOOK_S = 0.1  # at how busy the cores are: ten ticks of Linux's clock
_THERMAL_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")  # macOS's OSThermalPressureLevel, in order


@dataclass(frozen=True)
class Concern:
    """Something about the machine that makes timings doubtful, in a few words, and what to do about it."""

    topic: Literal["power", "thermal", "others"]
    words: str
    advice: str


def output(*command: str, folder: Path | None = None) -> str:
    """A command's output, or "" when it is not there, fails or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False, cwd=folder
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):  # ValueError: it printed something that is no text
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def lasting_facts() -> dict[str, str]:
    """Processor, memory and system: what stays as it is while the machine runs."""
    facts = {
        "cpu": cpu_name(),
        "cores": str(blas.usable_cores()),
        "machine_cores": str(os.cpu_count() or UNKNOWN),
        "host_memory_bytes": host_memory_bytes(),
        "os": _os_name(),
    }
    if sys.platform == "darwin":
        facts |= {
            "model": _sysctl("hw.model"),
            "performance_cores": _sysctl("hw.perflevel0.physicalcpu"),
            "efficiency_cores": _sysctl("hw.perflevel1.physicalcpu"),
            "gpu_cores": _found(r'"gpu-core-count"\s*=\s*(\d+)', output("ioreg", "-rc", "AGXAccelerator", "-d", "1")),
            "system_wired_limit_mb": _sysctl("iogpu.wired_limit_mb"),  # 0: the system's own choice
        }
    else:
        facts["cpu_governor"] = _read(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return facts


def gpu_facts(gpu: sensors.NvidiaGpu | None, uuid: str = "") -> dict[str, str]:
    """Driver, CUDA version, power limit and highest clocks of an NVIDIA GPU; from nvidia-smi where NVML is not there.

    uuid: which GPU nvidia-smi should speak of where there are several.
    """
    facts = dict.fromkeys(
        ("driver", "cuda", "gpu_power_limit_w", "gpu_default_power_limit_w", "gpu_max_clock_hz",
         "gpu_max_memory_clock_hz"), UNKNOWN,
    )  # fmt: skip
    if gpu is not None:
        driver, cuda = gpu.versions()
        numbers = (_number(value) for value in (*gpu.power_limits_w(), *gpu.highest_clocks_hz()))
        return dict(zip(facts, (driver or UNKNOWN, cuda or UNKNOWN, *numbers), strict=True))
    which = ("-i", uuid) if uuid else ()
    asked = "driver_version,power.limit,power.default_limit,clocks.max.sm,clocks.max.mem"
    rows = output("nvidia-smi", *which, f"--query-gpu={asked}", "--format=csv,noheader,nounits").splitlines()
    if rows:
        driver, *rest = (part.strip() for part in rows[0].split(","))
        facts["driver"] = driver or UNKNOWN
        if len(rows) == 1:  # of several GPUs, it isn't known which one these would be
            names = ("gpu_power_limit_w", "gpu_default_power_limit_w", "gpu_max_clock_hz", "gpu_max_memory_clock_hz")
            for name, value in zip(names, rest, strict=False):
                with suppress(ValueError):  # "[N/A]"
                    facts[name] = _number(float(value) * (1e6 if name.endswith("_hz") else 1))
    facts["cuda"] = _found(r"CUDA Version\s*:\s*([\d.]+)", output("nvidia-smi"))
    return facts


def momentary_facts(
    gpu: sensors.NvidiaGpu | None = None, has_gpu: bool = False, holds_gpu: bool = False
) -> dict[str, str]:
    """What changes from minute to minute: power, heat, load, clocks. Looks at the cores for a tenth of a second.

    has_gpu: the device is an NVIDIA GPU, so that its facts are named even if they are unknown (gpu is None).
    holds_gpu: this process may itself compute on it.
    """
    facts = {
        "power_source": power_source(),
        "low_power_mode": low_power_mode(),
        "thermal_state": thermal_state(),
        "memory_pressure": _memory_pressure(),
        "load_average": _load_average(),
        "other_busy_cores": other_busy_cores(),
        "cpu_clock_hz": _cpu_clock_hz(),
    }
    if not has_gpu:
        return facts
    reading = sensors.Reading() if gpu is None else gpu.read()
    throttle = None if gpu is None else gpu.throttle()
    return facts | {
        "gpu_clock_hz": _number(reading.clock_hz),
        "gpu_memory_clock_hz": _number(reading.memory_clock_hz),
        "gpu_power_w": _number(reading.power_w),
        "gpu_temperature_c": _number(reading.temperature_c),
        "gpu_throttle": UNKNOWN if throttle is None else ", ".join(throttle) or "none",
        "gpu_memory_used_bytes": _number(None if gpu is None else gpu.memory_used_bytes()),
        "gpu_other_processes": _number(None if gpu is None else gpu.other_processes(holds_gpu)),
    }


def facts_now(facts: Mapping[str, str]) -> dict[str, str]:
    """`facts` about a device, as `backend.device_facts` gave them, with the momentary ones read again.

    For a process that does not compute on the device itself.
    """
    has_gpu = "gpu_clock_hz" in facts
    address = facts.get("gpu_pci_bus_id", UNKNOWN)
    gpu = sensors.nvidia_gpu(address) if has_gpu and address != UNKNOWN else None
    return dict(facts) | momentary_facts(gpu, has_gpu)


def concerns(facts: Mapping[str, str]) -> list[Concern]:
    """What in these facts makes timings doubtful, worst first. What is unknown is of no concern."""
    return [*_power_concerns(facts), *_thermal_concerns(facts), *_other_work(facts)]


def warning(facts: Mapping[str, str]) -> str:
    """One line before something is measured, or "" if nothing speaks against it."""
    found = [concern.words for concern in concerns(facts)]
    return f"timings may be off: {'; '.join(found)} (zimage doctor says more)" if found else ""


def doubts(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """What makes the times of runs doubtful that recorded these facts as they started, a sentence a topic."""
    found: dict[str, list[str]] = {}  # the runs' worst concern by topic, in the order of the runs
    for facts in runs:
        for concern in concerns(facts)[:1]:
            found.setdefault(concern.topic, []).append(concern.words)
    total = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    return [f"Times may be off: at the start of {len(words)} of {total} {words[0]}." for words in found.values()]


def _power_concerns(facts: Mapping[str, str]) -> list[Concern]:
    found = []
    if facts.get("power_source") == "Battery Power":
        found.append(Concern("power", "on battery power", "plug in before measuring"))
    if facts.get("low_power_mode") == "on":
        found.append(Concern("power", "low-power mode is on", "turn low-power mode off before measuring"))
    limit, default = (_value(facts, f"gpu_{kind}power_limit_w") for kind in ("", "default_"))
    if limit is not None and default is not None and limit < 0.995 * default:
        words = f"the GPU's power limit is {limit:g} W, {default:g} W by default"
        found.append(Concern("power", words, f"nvidia-smi -pl {default:g} restores it, if you may"))
    return found


def _thermal_concerns(facts: Mapping[str, str]) -> list[Concern]:
    found = []
    state = facts.get("thermal_state", UNKNOWN)
    if state not in (UNKNOWN, "nominal", "no warning"):
        found.append(Concern("thermal", f"thermal state: {state}", "let the machine cool down before measuring"))
    reasons = [reason for reason in facts.get("gpu_throttle", "").split(", ") if reason in sensors.ALARMING]
    if reasons:
        words = f"the GPU slows itself down ({', '.join(reasons)})"
        found.append(Concern("thermal", words, "check its cooling and power supply: nvidia-smi -q -d PERFORMANCE"))
    if facts.get("memory_pressure") in ("warning", "critical"):
        words = f"memory pressure: {facts['memory_pressure']}"
        found.append(Concern("others", words, "close what holds memory, or measurements swap"))
    return found


def _other_work(facts: Mapping[str, str]) -> list[Concern]:
    found = []
    others = _value(facts, "gpu_other_processes")
    if others:
        words = f"{others:g} other process{'es use' if others > 1 else ' uses'} the GPU"
        found.append(Concern("others", words, "nvidia-smi lists them; measure when they are done"))
    busy, all_cores, ours = (_value(facts, name) for name in ("other_busy_cores", "machine_cores", "cores"))
    if busy is None or all_cores is None or ours is None:
        return found
    # On a CPU every core that MLX would use has to be free; beside a GPU the host only has to keep up.
    most = all_cores - ours + 0.5 if facts.get("device_type") == "cpu" else all_cores / 2
    if busy > most:
        words = f"other work keeps {busy:.1f} of {all_cores:g} CPU cores busy"
        found.append(Concern("others", words, "measure when it is done"))
    return found


def cpu_name() -> str:
    """The processor, such as "AMD EPYC 7B13 64-Core Processor" or "Apple M3 Max"."""
    return _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else blas.cpu_model()


def host_memory_bytes() -> str:
    """Bytes of the machine's memory."""
    try:
        return str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return UNKNOWN


def power_source() -> str:
    """ "AC Power", "Battery Power", or on macOS "UPS Power"."""
    if sys.platform == "darwin":
        return _found(r"drawing from '(.+?)'", output("pmset", "-g", "batt"))
    for online in sorted((SYSTEM / "class/power_supply").glob("*/online")):
        if _read(online.parent / "type") == "Mains" and (plugged := _read(online)) in ("0", "1"):
            return "AC Power" if plugged == "1" else "Battery Power"
    return UNKNOWN


def low_power_mode() -> str:
    """ "on", "off", or on macOS "high power"; on Linux the firmware's platform profile."""
    if sys.platform == "darwin":
        mode = _found(r"(?m)^\s*(?:lowpowermode|powermode)\s+(\d)", output("pmset", "-g"))
        return {"0": "off", "1": "on", "2": "high power"}.get(mode, UNKNOWN)
    profile = _read(SYSTEM / "firmware/acpi/platform_profile")
    return profile if profile == UNKNOWN else "on" if profile in ("low-power", "quiet", "cool") else "off"


def thermal_state() -> str:
    """macOS's thermal pressure: nominal, moderate, heavy, trapping or sleeping; else what pmset's record says of it."""
    if sys.platform != "darwin":
        return UNKNOWN
    level = _found(r"thermalpressurelevel\s+(\d+)", output("notifyutil", "-g", "com.apple.system.thermalpressurelevel"))
    if level.isdigit() and int(level) < len(_THERMAL_LEVELS):
        return _THERMAL_LEVELS[int(level)]
    record = output("pmset", "-g", "therm")
    speed = _found(r"CPU_Speed_Limit\s*=\s*(\d+)", record)
    if speed.isdigit():
        return "no warning" if int(speed) >= 100 else f"CPU speed limit {speed} %"
    warned = _found(r"(?i)thermal warning level\s*(?:=|:)\s*(\d+)", record)
    if warned.isdigit():
        return "no warning" if int(warned) == 0 else f"thermal warning level {warned}"
    return "no warning" if "No thermal warning level" in record else UNKNOWN


def other_busy_cores() -> str:
    """How many cores everything but this process keeps busy; on macOS from what `ps` says of the last moments."""
    if sys.platform != "darwin":
        try:
            return f"{max(0.0, blas.others_busy(_LOOK_S)):.1f}"
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            return UNKNOWN
    rows = re.findall(r"(?m)^\s*(\d+)\s+(\d+(?:[.,]\d+)?)\s*$", output("ps", "-A", "-o", "pid=,%cpu="))
    shares = [float(share.replace(",", ".")) for pid, share in rows if int(pid) != os.getpid()]
    return f"{sum(shares) / 100:.1f}" if shares else UNKNOWN


def _memory_pressure() -> str:
    if sys.platform != "darwin":
        return UNKNOWN
    levels = {"1": "normal", "2": "warning", "4": "critical"}
    return levels.get(_sysctl("kern.memorystatus_vm_pressure_level"), UNKNOWN)


def _load_average() -> str:
    try:
        return " ".join(f"{load:.2f}" for load in os.getloadavg())
    except OSError:
        return UNKNOWN


def _cpu_clock_hz() -> str:
    """The first core's clock; Apple's processors do not tell theirs."""
    if sys.platform == "darwin":
        return UNKNOWN
    kilohertz = _read(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    if kilohertz.isdigit():
        return _number(float(kilohertz) * 1e3)
    with suppress(OSError):
        megahertz = _found(r"(?m)^cpu MHz\s*:\s*([\d.]+)", blas.CPU_INFO.read_text(errors="replace"))
        if megahertz != UNKNOWN:
            return _number(float(megahertz) * 1e6)
    return UNKNOWN


def _os_name() -> str:
    if sys.platform == "darwin":
        build = output("sw_vers", "-buildVersion")
        return f"macOS {platform.mac_ver()[0]}{f' ({build})' if build else ''}"
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        distribution = platform.system()
    return f"{distribution} (kernel {platform.release()})"


def _sysctl(name: str) -> str:
    return output("sysctl", "-n", name) or UNKNOWN


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else UNKNOWN


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip() or UNKNOWN
    except OSError:
        return UNKNOWN


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.12g}"


def _value(facts: Mapping[str, str], name: str) -> float | None:
    try:
        return float(facts[name])
    except (KeyError, ValueError):
        return None


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from going to sleep meanwhile, which a sweep over night would else do; elsewhere this does nothing."""
    holder: subprocess.Popen[bytes] | None = None
    if sys.platform == "darwin":
        with suppress(OSError):  # not there: then the system decides
            quiet = subprocess.DEVNULL
            command = ["caffeinate", "-i", "-m", "-w", str(os.getpid())]  # it also ends when this process does
            holder = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        if holder is not None:
            holder.terminate()
            holder.wait()
