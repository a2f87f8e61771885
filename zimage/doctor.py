"""What `zimage doctor` checks: is this machine ready, how fast is it, and what would mend what is missing."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zimage import backend, choices, machine, sensors, trust
from zimage.errors import BackendError, MeasurementError
from zimage.measure import peaks, power

Status = Literal["ok", "warn", "fail"]

LEAST_FREE_BYTES = 2e9
LEAST_CPU_FLOPS = 6e9  # for each core; the reference BLAS stays below 6 GFLOP/s in all


@dataclass(frozen=True)
class Check:
    """One finding. `advice` says what to do about it, and is empty when `status` is ok."""

    name: str
    status: Status
    value: str
    advice: str = ""


def checks(
    results: Path = Path("results"), full: bool = False, advance: Callable[[float], None] = lambda _seconds: None
) -> list[Check]:
    """Check this machine, taking a few seconds to measure it; `results` is the folder whose disk is looked at.

    full: measure sustained rates and packed products too; advance is told of the seconds that pass. Never raises for
    what it finds: a broken MLX is a failed check, and the measurements are then left out.
    """
    found = [_python()]
    try:
        prepared = backend.prepare()
        facts = backend.device_facts()  # before anything is measured: what makes the device busy now is other work
        found += [_mlx(facts), _device(facts), _import_order(prepared), _blas(prepared, facts)]
        found += _speed(prepared, facts, full, advance)
        found += [
            *_kernels(facts),
            *_linear_layers(facts),
            _memory(facts),
            *_conditions(facts),
            _energy(),
            _variables(facts),
        ]
    except BackendError as error:
        what, _, advice = str(error).partition(": ")
        found.append(Check("MLX", "fail", what, advice))
    return [*found, _disk(results), _notebooks(), _git()]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("Python", "ok", f"{version} at {sys.executable}")


def _mlx(facts: dict[str, str]) -> Check:
    driver = "" if facts["driver"] == machine.UNKNOWN else f", driver {facts['driver']}, CUDA {facts['cuda']}"
    return Check("MLX", "ok", f"{facts['mlx']}, {facts['mlx_build']} build{driver}")


def _device(facts: dict[str, str]) -> Check:
    value = f"{facts['device_name']} ({facts['device']}), {facts['cores']} CPU cores"
    if facts["device_type"] == "cpu" and facts["mlx_build"].startswith("cuda"):
        advice = 'no GPU answers: check nvidia-smi, or install "zimage[cpu]" instead of the CUDA build'
        return Check("Device", "fail", value, advice)
    return Check("Device", "ok", value)


def _import_order(prepared: backend.Prepared) -> Check:
    if prepared.late:
        advice = "import zimage before mlx"
        return Check("Import order", "warn", "mlx was imported before zimage could prepare it", advice)
    return Check("Import order", "ok", "zimage prepared MLX before its import")


def _blas(prepared: backend.Prepared, facts: dict[str, str]) -> Check:
    if prepared.blas is not None:
        threads = f"{facts['blas_threads']} thread{'' if facts['blas_threads'] == '1' else 's'}"
        return Check("BLAS", "ok", f"{facts['blas']}, {threads}, {prepared.blas.path}")
    if facts["blas"] != "reference":
        return Check("BLAS", "ok", facts["blas"])
    value = "; ".join(("MLX's reference BLAS, about 30 times slower", *prepared.blas_notes))
    return Check("BLAS", "warn", value, "pip install 'zimage[cpu]', or set ZIMAGE_BLAS to an OpenBLAS or MKL library")


def _speed(
    prepared: backend.Prepared, facts: dict[str, str], full: bool, advance: Callable[[float], None]
) -> list[Check]:
    """Measure the peaks and keep them for the runs to come."""
    try:
        measured = peaks.measure(full, advance)
    except MeasurementError as error:
        return [Check("Peaks", "warn", str(error), "end what else uses the device or its memory, then try again")]
    return judge(peaks.keep(facts["device"], measured), prepared, facts)


def judge(measured: Mapping[str, Any], prepared: backend.Prepared, facts: Mapping[str, str]) -> list[Check]:
    """A check for each peak, and one for clocks that were reduced meanwhile."""
    flops_per_s = measured["matmul"]["float32"]["burst"]
    slow = facts["device_type"] == "cpu" and flops_per_s < LEAST_CPU_FLOPS
    advice = ""
    if slow:
        advice = (
            "see BLAS above" if prepared.blas is None else "far too slow for an optimised BLAS: is the machine busy?"
        )
    found = [
        Check(name, "warn", value, advice) if slow and name == "Matmul float32" else Check(name, "ok", value)
        for name, value in peaks.lines(measured)
    ]
    reasons = measured["under_load"]["throttle"] or ()
    if set(reasons) & set(sensors.ALARMING):
        advice = "timings sag: check its cooling and power supply: nvidia-smi -q -d PERFORMANCE"
        found.append(Check("Clocks", "warn", f"reduced while measuring: {', '.join(reasons)}", advice))
    elif reasons:
        found.append(Check("Clocks", "ok", f"reduced while measuring, as is usual under load: {', '.join(reasons)}"))
    return found


def _kernels(facts: Mapping[str, str]) -> list[Check]:
    """A check for each kernel of our own: those the published model needs are tried where there is no verdict."""
    if facts["device_type"] != "gpu":
        return [Check("Kernels", "ok", "plain operations: a CPU has no others")]
    if doubt := trust.doubt():
        value, _, advice = doubt.partition("; ")
        return [Check("Kernels", "warn", value, advice)]
    if trust.off():
        return [Check("Kernels", "ok", f"off: {trust.VARIABLE} says so")]
    settled = trust.settle(facts, trust.needed(facts))
    found = []
    for name, reason in sorted((trust.kept(facts) | settled).items()):
        request = json.loads(name)
        sizes = ", ".join(f"{what} {value}" for what, value in request.items() if what not in ("kernel", "dtype"))
        value = f"{request['kernel']} ({request['dtype']}{', ' if sizes else ''}{sizes}): "
        if reason:
            advice = "the plain operations are used in its place; report this with the lines above"
            found.append(Check("Kernels", "warn", f"{value}falls back, {reason}", advice))
        else:
            found.append(Check("Kernels", "ok", f"{value}right"))
    return found


def _linear_layers(facts: Mapping[str, str]) -> list[Check]:
    """A check for each product that the autotuner found another way for, and one for those that stay as they are."""
    kept = choices.kept(facts)
    if not kept:
        how = "zimage run notebooks/matmuls.ipynb measures it, and so does the transform `tuned`"
        return [Check("Linear layers", "ok", f"not tuned on this device and MLX yet; {how}")]
    changed = {product: choice for product, choice in sorted(kept.items()) if choice.way != choice.baseline}
    found = [Check("Linear layers", "ok", f"{product}: {choice}") for product, choice in changed.items()]
    same = f"{len(kept) - len(changed)} of {len(kept)} products measured are fastest as they are without tuning"
    return [*found, Check("Linear layers", "ok", same)]


def _memory(facts: dict[str, str]) -> Check:
    total = facts["memory_bytes"]
    value = f"{int(total) / 1e9:.1f} GB" if total.isdigit() else total
    if facts["recommended_memory_bytes"].isdigit():
        value += f", {int(facts['recommended_memory_bytes']) / 1e9:.1f} GB recommended at most"
    limit = facts.get("mlx_memory_limit_bytes", "")
    if limit.isdigit():
        value += f"; MLX's limit {int(limit) / 1e9:.1f} GB"
    return Check("Memory", "ok", value)


def _conditions(facts: Mapping[str, str]) -> list[Check]:
    """Power, heat and other work, with what machine.concerns has to say on each."""
    supply = f"{facts['power_source']}, low-power mode {facts['low_power_mode']}"
    if facts["gpu_power_limit_w"] != machine.UNKNOWN:
        supply += f", GPU limit {facts['gpu_power_limit_w']} W ({facts['gpu_default_power_limit_w']} W by default)"
    heat = f"thermal state {facts['thermal_state']}"
    if "gpu_throttle" in facts:
        heat += f", GPU at {facts['gpu_temperature_c']} degrees C, clocks reduced: {facts['gpu_throttle']}"
    others = f"{facts['other_busy_cores']} of {facts['machine_cores']} CPU cores busy, load {facts['load_average']}"
    if facts["memory_pressure"] != machine.UNKNOWN:
        others += f", memory pressure {facts['memory_pressure']}"
    if "gpu_other_processes" in facts:
        others += f", other processes on the GPU: {facts['gpu_other_processes']}"
    concerns = machine.concerns(facts)
    found = []
    for topic, name, value in (("power", "Power", supply), ("thermal", "Heat", heat), ("others", "Other work", others)):
        advice = "; ".join(dict.fromkeys(concern.advice for concern in concerns if concern.topic == topic))
        found.append(Check(name, "warn" if advice else "ok", value, f"timings may be off: {advice}" if advice else ""))
    return found


def _energy() -> Check:
    meter, problem = power.find_meter()
    if meter is not None:
        return Check("Energy", "ok", f"joules a step through {meter.name}")
    if "nvidia-ml-py" in problem:
        return Check("Energy", "warn", problem, "pip install nvidia-ml-py")
    return Check("Energy", "ok", problem)


def _variables(facts: dict[str, str]) -> Check:
    found = [f"{name}={value}" for name, value in sorted(facts.items()) if name.startswith("MLX_")]
    return Check("MLX variables", "ok", ", ".join(found) or "none set")


def _disk(results: Path) -> Check:
    folder = next((place for place in (results.absolute(), *results.absolute().parents) if place.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("Disk", "warn", f"{folder}: {error.strerror}", "choose another folder with --results")
    value = f"{free / 1e9:.1f} GB free for {results}"
    if results.exists() and not results.is_dir():
        return Check("Disk", "warn", f"{results} is not a folder", "choose one with --results")
    if not os.access(folder, os.W_OK):
        return Check("Disk", "warn", f"{folder} cannot be written to", "choose another folder with --results")
    if free < LEAST_FREE_BYTES:
        return Check("Disk", "warn", value, "free some, or choose another folder with --results")
    return Check("Disk", "ok", value)


def _notebooks() -> Check:
    missing = [name for name in ("ipykernel", "papermill", "jupyterlab") if importlib.util.find_spec(name) is None]
    if missing:
        return Check("Notebooks", "fail", f"{', '.join(missing)} missing", f"pip install {' '.join(missing)}")
    return Check("Notebooks", "ok", "ipykernel, papermill and jupyterlab are here")


def _git() -> Check:
    if shutil.which("git") is None:
        return Check("git", "warn", "not found", "without it, runs do not record a checkout's commit")
    return Check("git", "ok", "found: runs record the commit of a checkout")
