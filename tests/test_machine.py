"""Facts about macOS, Linux and NVIDIA machines, from faked answers of theirs, and what is made of them."""

import os
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path

from tests.fake_nvml import Card, Nvml, NVMLError
from zimage import blas, machine, sensors

import pytest

FAILS = NVMLError("Not Supported")
THERMAL = "com.apple.system.thermalpressurelevel"
MAC = {
    "sysctl -n machdep.cpu.brand_string": "Apple M3 Max",
    "sysctl -n hw.model": "Mac15,9",
    "sysctl -n hw.perflevel0.physicalcpu": "12",
    "sysctl -n hw.perflevel1.physicalcpu": "4",
    "sysctl -n iogpu.wired_limit_mb": "0",
    "sysctl -n kern.memorystatus_vm_pressure_level": "1",
    "ioreg -rc AGXAccelerator -d 1": '+-o AGXAcceleratorG15X\n    "gpu-core-count" = 40\n    "model" = "Apple M3 Max"',
    "sw_vers -buildVersion": "24G84",
    "pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t81%; discharging",
    "pmset -g": "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n sleep 1",
    "pmset -g therm": "Note: No thermal warning level has been recorded\nNote: No CPU power status has been recorded",
    f"notifyutil -g {THERMAL}": f"{THERMAL} 2",
    "ps -A -o pid=,%cpu=": f"    1   0.5\n  301  149.5\n{os.getpid()}  98.0",
}


def _mac(monkeypatch: pytest.MonkeyPatch, replies: Mapping[str, str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "output", lambda *command, **_: replies.get(" ".join(command), ""))


def test_mac_facts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS chip, model, cores, limits, power, heat, pressure and load are read without root."""
    _mac(monkeypatch, MAC)
    lasting, now = machine.lasting_facts(), machine.momentary_facts()
    assert lasting["cpu"] == "Apple M3 Max"
    assert (lasting["model"], lasting["gpu_cores"], lasting["system_wired_limit_mb"]) == ("Mac15,9", "40", "0")
    assert (lasting["performance_cores"], lasting["efficiency_cores"]) == ("12", "4")
    assert lasting["os"].endswith("(24G84)")
    assert (now["power_source"], now["low_power_mode"]) == ("Battery Power", "on")
    assert (now["thermal_state"], now["memory_pressure"]) == ("heavy", "normal")
    assert now["other_busy_cores"] == "1.5"  # this process's own share is not other work
    assert "gpu_clock_hz" not in now  # Apple's GPU tells none of it


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ("Note: No thermal warning level has been recorded", "no warning"),
        ("CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 100", "no warning"),
        ("CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 62", "CPU speed limit 62 %"),
        ("Thermal Warning Level = 2", "thermal warning level 2"),
        ("", "unknown"),
        ("something else", "unknown"),
    ],
)
def test_heat_from_the_record_of_pmset(record: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the thermal pressure level, pmset's record of warnings and of the speed limit is read."""
    _mac(monkeypatch, {"pmset -g therm": record, f"notifyutil -g {THERMAL}": f"{THERMAL} 99"})
    assert machine.thermal_state() == state


def test_a_silent_mac_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no command answers, every fact is there and unknown, and of no concern."""
    _mac(monkeypatch, {})
    facts = machine.lasting_facts() | machine.momentary_facts()
    told = {"cores", "machine_cores", "host_memory_bytes", "os", "load_average"}  # Python itself knows these
    assert {name for name, value in facts.items() if value != "unknown"} <= told
    assert machine.concerns(facts | {"device_type": "gpu"}) == []


def _linux(root: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "SYSTEM", root)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_linux_facts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux power source, platform profile, governor and clock come from the kernel's files."""
    files = {
        "class/power_supply/AC/type": "Mains\n",
        "class/power_supply/AC/online": "0\n",
        "class/power_supply/BAT0/type": "Battery\n",
        "firmware/acpi/platform_profile": "low-power\n",
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
    }
    _linux(tmp_path, monkeypatch, files)
    now = machine.momentary_facts()
    assert (now["power_source"], now["low_power_mode"]) == ("Battery Power", "on")
    assert now["cpu_clock_hz"] == "2400000000"
    assert machine.lasting_facts()["cpu_governor"] == "powersave"
    assert [c.words for c in machine.concerns({"power_source": "Battery Power"})] == ["on battery power"]


def test_a_bare_linux_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without those files says unknown."""
    _linux(tmp_path, monkeypatch, {})
    monkeypatch.setattr(blas, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(blas, "CPU_TIMES", tmp_path / "none")
    now = machine.momentary_facts()
    assert {name for name, value in now.items() if value != "unknown"} <= {"load_average"}


def test_names_of_momentary_facts() -> None:
    """`MOMENTARY` names exactly the facts that are read again for every run."""
    assert set(machine.MOMENTARY) == machine.momentary_facts(has_gpu=True).keys()


def test_commands_that_fail_give_nothing() -> None:
    """A command that is missing, exits with an error or prints no text is no output, not an exception."""
    assert machine.output("zimage-has-no-such-command") == ""
    assert machine.output(sys.executable, "-c", "print('text'); raise SystemExit(3)") == ""
    assert machine.output(sys.executable, "-c", "import sys; sys.stdout.buffer.write(b'\\xff\\xfe')") == ""


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"gpu_power_limit_w": "400", "gpu_default_power_limit_w": "700"}, "power limit is 400 W, 700 W by default"),
        ({"gpu_throttle": "power cap, thermal slowdown"}, "slows itself down (thermal slowdown)"),
        ({"gpu_other_processes": "2"}, "2 other processes use the GPU"),
        ({"gpu_other_processes": "1"}, "1 other process uses the GPU"),
        ({"memory_pressure": "critical"}, "memory pressure: critical"),
        ({"device_type": "cpu", "other_busy_cores": "1.0", "machine_cores": "2", "cores": "2"}, "1.0 of 2 CPU cores"),
    ],
)
def test_concerns(facts: dict[str, str], words: str) -> None:
    """What spoils timings is a concern with advice, and part of the one line of warning."""
    (concern,) = machine.concerns(facts)
    assert words in concern.words
    assert concern.advice
    assert words in machine.warning(facts)
    assert "\n" not in machine.warning(facts)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"gpu_power_limit_w": "700", "gpu_default_power_limit_w": "700"},
        {"gpu_throttle": "power cap"},
        {"gpu_other_processes": "0"},
        {"gpu_other_processes": "unknown", "thermal_state": "unknown", "power_source": "unknown"},
        {"device_type": "cpu", "other_busy_cores": "30.0", "machine_cores": "64", "cores": "2"},  # a container's share
        {"device_type": "gpu", "other_busy_cores": "1.0", "machine_cores": "4", "cores": "4"},
    ],
)
def test_what_is_no_concern(facts: dict[str, str]) -> None:
    """Ordinary states, unknown ones, and work elsewhere on a large machine give no warning."""
    assert machine.warning(facts) == ""


def _with(monkeypatch: pytest.MonkeyPatch, *cards: Card, new: bool = True) -> None:
    monkeypatch.setattr(sensors, "_nvml", lambda: (Nvml(*cards, new=new), ""))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


def test_gpu_is_read_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's milliwatts, millijoules and megahertz become watts, joules and hertz; idleness is no throttling."""
    _with(monkeypatch, Card())
    gpu = sensors.nvidia_gpu()
    assert gpu is not None
    assert gpu.read() == sensors.Reading(350.0, 5.0, 1.755e9, 2.619e9, 45.0, ())
    facts = machine.gpu_facts(gpu) | machine.momentary_facts(gpu, has_gpu=True, holds_gpu=True)
    assert (facts["driver"], facts["cuda"]) == ("580.95.05", "13.0")
    assert (facts["gpu_power_limit_w"], facts["gpu_default_power_limit_w"]) == ("700", "700")
    assert (facts["gpu_clock_hz"], facts["gpu_max_clock_hz"]) == ("1755000000", "1980000000")
    assert (facts["gpu_throttle"], facts["gpu_other_processes"]) == ("none", "0")
    assert facts["gpu_memory_used_bytes"] == str(3 * 2**30)


def test_answers_that_fail_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of NVML that fails makes its own fact unknown, and no other."""
    fields = ("energy_mj", "sm_mhz", "memory_mhz", "temperature", "throttle", "limit_mw", "pids")
    _with(monkeypatch, Card(power_mw=250_000, instant_mw=FAILS, **dict.fromkeys(fields, FAILS)))  # type: ignore[arg-type]
    gpu = sensors.nvidia_gpu()
    assert gpu is not None
    assert gpu.read() == sensors.Reading(power_w=250.0)  # the mean, where the moment's is not told
    facts = machine.gpu_facts(gpu) | machine.momentary_facts(gpu, has_gpu=True)
    unknown = {name for name, value in facts.items() if name.startswith("gpu_") and value == "unknown"}
    assert unknown == {
        "gpu_power_limit_w", "gpu_clock_hz", "gpu_memory_clock_hz", "gpu_temperature_c", "gpu_throttle",
        "gpu_other_processes",
    }  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
def test_throttle_reasons_have_names(new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of reduced clocks become words, also where an older driver calls them throttle reasons."""
    _with(monkeypatch, Card(throttle=0x4 | 0x20 | 0x1), new=new)
    gpu = sensors.nvidia_gpu()
    assert gpu is not None
    assert gpu.throttle() == ("power cap", "thermal slowdown")


FIRST, SECOND = Card(), Card("0000:3b:00.0", "GPU-bbbb-2")


@pytest.mark.parametrize(
    ("address", "environment", "found"),
    [
        ("0000:3b:00.0", {}, SECOND),
        ("0000:3b:00.0", {"CUDA_VISIBLE_DEVICES": "0"}, SECOND),  # what MLX says beats what the variable seems to say
        ("0000:99:00.0", {}, None),
        ("", {}, None),  # two, in an order that CUDA does not promise
        ("", {"CUDA_VISIBLE_DEVICES": "1"}, None),
        ("", {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, SECOND),
        ("", {"CUDA_VISIBLE_DEVICES": "7", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, None),
        ("", {"CUDA_VISIBLE_DEVICES": "GPU-bbbb,GPU-aaaa"}, SECOND),
        ("", {"CUDA_VISIBLE_DEVICES": "MIG-1234"}, None),
        ("", {"CUDA_VISIBLE_DEVICES": ""}, None),
        ("", {"CUDA_VISIBLE_DEVICES": "first"}, None),
    ],
)
def test_the_right_gpu_or_none(
    address: str, environment: dict[str, str], found: Card | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several GPUs the one that MLX uses is read; where that is not certain, none."""
    _with(monkeypatch, FIRST, SECOND)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    gpu = sensors.nvidia_gpu(address)
    assert (gpu._handle if gpu else None) is found


@pytest.mark.parametrize(("mode", "known"), [(1, False), (0, True), (FAILS, True)])
def test_a_divided_gpu_is_unknown(mode: int | Exception, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensors of a GPU that MIG divides speak of the whole, so they are not read; those that cannot be divided are."""
    _with(monkeypatch, Card(mig=mode))
    assert (sensors.nvidia_gpu() is not None) == known


@pytest.mark.parametrize(
    ("pids", "holds", "others"),
    [([], True, 0), ([os.getpid()], True, 0), ([os.getpid(), 1], True, 1), ([1], True, None), ([1, 2], True, 1),
     ([1], False, 1), (FAILS, True, None)],
)  # fmt: skip
def test_other_processes(
    pids: list[int] | Exception, holds: bool, others: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes other than this one are counted, also in a container where this one has another number."""
    _with(monkeypatch, Card(pids=pids))
    gpu = sensors.nvidia_gpu()
    assert gpu is not None
    assert gpu.other_processes(holds) == others


def test_facts_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each run the momentary facts are read anew, of the GPU that the lasting ones name, and the rest stays."""
    _with(monkeypatch, FIRST, Card("0000:3b:00.0", sm_mhz=900))
    before = {"device": "nvidia-h100", "gpu_pci_bus_id": "0000:3b:00.0", "gpu_clock_hz": "1", "driver": "580"}
    now = machine.facts_now(before)
    assert (now["gpu_clock_hz"], now["driver"], now["device"]) == ("900000000", "580", "nvidia-h100")
    assert "gpu_clock_hz" not in machine.facts_now({"device": "cpu-test"})
    assert machine.facts_now(before | {"gpu_pci_bus_id": "unknown"})["gpu_clock_hz"] == "unknown"


def test_missing_bindings_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-ml-py, or without a driver, there is no GPU to read and one line why."""
    sensors._nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert sensors.nvidia_gpu("0000:18:00.0") is None
    assert sensors.nvml_problem() == "nvidia-ml-py is not installed"

    def refuses() -> None:
        raise NVMLError("NVML Shared Library\nNot Found")

    broken = types.ModuleType("pynvml")
    broken.nvmlInit = refuses  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    sensors._nvml.cache_clear()
    assert sensors.nvml_problem() == "NVML does not start: NVML Shared Library Not Found"
    sensors._nvml.cache_clear()


def test_nvidia_smi_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML, driver, CUDA version, limits and clocks come from nvidia-smi; of several GPUs only two of these."""
    row = "580.95.05, 700.00, 700.00, 1980, 2619"
    header = "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |"
    rows = [row]

    def output(*command: str, **_: object) -> str:
        return "\n".join(rows) if len(command) > 1 else header

    monkeypatch.setattr(machine, "output", output)
    found = machine.gpu_facts(None)
    assert (found["driver"], found["cuda"], found["gpu_power_limit_w"]) == ("580.95.05", "13.0", "700")
    assert found["gpu_max_clock_hz"] == "1980000000"
    rows.append(row)
    assert machine.gpu_facts(None)["gpu_power_limit_w"] == "unknown"
    rows[:] = ["580.95.05, [N/A], [N/A], [N/A], [N/A]"]
    found = machine.gpu_facts(None)
    assert (found["driver"], found["gpu_power_limit_w"]) == ("580.95.05", "unknown")
    monkeypatch.setattr(machine, "output", lambda *_, **__: "")
    assert set(machine.gpu_facts(None).values()) == {"unknown"}


def _package(root: Path, name: str, label: str, energy: int) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "name").write_text(label)
    (root / name / "energy_uj").write_text(str(energy))
    (root / name / "max_energy_range_uj").write_text("1000000")
    return root / name


def test_rapl_counts_packages_and_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages' energy is added up, other domains are left out, and a counter that starts again loses nothing."""
    monkeypatch.setattr(sensors, "POWERCAP", tmp_path)
    first = _package(tmp_path, "intel-rapl:0", "package-0\n", 900_000)
    _package(tmp_path, "intel-rapl:1", "package-1\n", 100_000)
    _package(tmp_path, "intel-rapl:0:0", "core\n", 500_000)
    _package(tmp_path, "intel-rapl:2", "psys\n", 500_000)
    meter = sensors.rapl()
    assert meter is not None
    assert meter.read().energy_j == pytest.approx(1.0)
    (first / "energy_uj").write_text("200000")
    assert meter.read().energy_j == pytest.approx(1.3)
    (first / "energy_uj").unlink()
    assert meter.read() == sensors.Reading()


def test_no_rapl_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no counters, or unreadable ones, there is no meter."""
    monkeypatch.setattr(sensors, "POWERCAP", tmp_path)
    assert sensors.rapl() is None
    package = _package(tmp_path, "intel-rapl:0", "package-0\n", 1)
    (package / "energy_uj").unlink()
    assert sensors.rapl() is None


def test_a_mac_stays_awake_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On macOS caffeinate runs for this process until the work is done; elsewhere nothing is started."""
    said = tmp_path / "said"
    fake = tmp_path / "caffeinate"
    fake.write_text(f'#!/bin/sh\necho "$@" > {said}\nexec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with machine.awake():
        pass
    assert not said.exists()
    monkeypatch.setattr(sys, "platform", "darwin")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with machine.awake():
        deadline = time.monotonic() + 10
        while not said.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert started[0].poll() is None
    assert said.read_text().split() == ["-i", "-m", "-w", str(os.getpid())]
    assert started[0].poll() is not None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with machine.awake():
        pass
