"""What `zimage doctor` checks: is this machine ready, how fast is it, and what would mend what is missing."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zimage import backend, blas
from zimage.errors import BackendError

Status = Literal["ok", "warn", "fail"]

LEAST_FREE_BYTES = 2e9
LEAST_CPU_FLOPS = 6e9  # for each core; the reference BLAS stays below 6 GFLOP/s in all
_LONGEST_CALL_S = 0.1
_REPEATS = 7


@dataclass(frozen=True)
class Check:
    """One finding. `advice` says what to do about it, and is empty when `status` is ok."""

    name: str
    status: Status
    value: str
    advice: str = ""


def checks(results: Path = Path("results")) -> list[Check]:
    """Check this machine, taking a few seconds to measure it; `results` is the folder whose disk is looked at.

    Never raises for what it finds: a broken MLX is a failed check, and the measurements are then left out.
    """
    found = [_python()]
    try:
        prepared = backend.prepare()
        facts = backend.device_facts()
        found += [_mlx(facts), _device(facts), _import_order(prepared), _blas(prepared, facts)]
        peaks = measure_peaks()
        keep_peaks(facts["device"], peaks)
        found += _speed(peaks, prepared, facts)
        found += [_memory(facts), _power(facts), _variables(facts)]
    except BackendError as error:
        what, _, advice = str(error).partition(": ")
        found.append(Check("MLX", "fail", what, advice))
    return [*found, _disk(results), _kernel(), _git()]


def measure_peaks() -> dict[str, float | str]:
    """Measure what MLX reaches on this device: matrix products and copies, medians of synchronised calls.

    Returns `dtype` (the device's default), `matmul_flops_per_s` and `matmul_size` in it (a square product, the largest
    that stays short), the same for fp32 with the prefix `float32_`, and `copy_bytes_per_s` (read plus written) over
    `copy_bytes`. Raises BackendError when MLX cannot be used.
    """
    dtype = backend.default_dtype()
    flops_per_s, size = _matmul_peak(dtype)
    exact_flops_per_s, exact_size = (flops_per_s, size) if dtype == "float32" else _matmul_peak("float32")
    bytes_per_s, copied = _copy_peak()
    return {
        "dtype": dtype,
        "matmul_flops_per_s": flops_per_s,
        "matmul_size": size,
        "float32_matmul_flops_per_s": exact_flops_per_s,
        "float32_matmul_size": exact_size,
        "copy_bytes_per_s": bytes_per_s,
        "copy_bytes": copied,
    }


def keep_peaks(device: str, peaks: dict[str, float | str]) -> None:
    """Keep the peaks measured on `device` in the user's cache folder, where there is one, for the runs to come."""
    folder = blas.cache_folder()
    if folder is None:
        return
    with suppress(OSError):  # a full disk costs the runs to come their peaks, and nothing else
        blas.write_atomically(folder / f"peaks-{device}.json", lambda draft: draft.write_text(json.dumps(peaks)))


def kept_peaks(device: str) -> dict[str, float | str] | None:
    """The peaks last measured on `device`; None if there are none that can be read."""
    folder = blas.cache_folder()
    try:
        peaks = None if folder is None else json.loads((folder / f"peaks-{device}.json").read_text())
    except (OSError, ValueError):
        return None
    return peaks if isinstance(peaks, dict) else None


def _median_time_s(call: Callable[[], Any]) -> float:
    from zimage.measure.timing import timed, trial  # here, because where MLX is broken its import fails

    return trial(timed(call), samples=_REPEATS, warm_up=0).median_s


def _matmul_peak(dtype: str) -> tuple[float, int]:
    """The best rate in FLOP/s over growing square products, and the size that reached it."""
    import mlx.core as mx

    best, best_size = 0.0, 0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        left, right = (mx.random.normal((size, size)).astype(getattr(mx, dtype)) for _ in range(2))
        mx.eval(left, right)
        time_s = _median_time_s(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        if 2 * size**3 / time_s > best:
            best, best_size = 2 * size**3 / time_s, size
        if 8 * time_s > _LONGEST_CALL_S:
            break
    return best, best_size


def _copy_peak() -> tuple[float, int]:
    import mlx.core as mx

    size = 2**28 if backend.default_dtype() == "bfloat16" else 2**25  # elements of 4 bytes: well beyond any cache
    array = mx.random.normal((size // 2**12, 2**12))
    mx.eval(array)
    time_s = _median_time_s(lambda: mx.negative(array))
    return 2 * 4 * size / time_s, 4 * size


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("Python", "ok", f"{version} at {sys.executable}")


def _mlx(facts: dict[str, str]) -> Check:
    driver = "" if facts["driver"] == backend.UNKNOWN else f", driver {facts['driver']}, CUDA {facts['cuda']}"
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


def _speed(peaks: dict[str, float | str], prepared: backend.Prepared, facts: dict[str, str]) -> list[Check]:
    slow = facts["device_type"] == "cpu" and float(peaks["float32_matmul_flops_per_s"]) < LEAST_CPU_FLOPS
    advice = ""
    if slow:
        advice = (
            "see BLAS above" if prepared.blas is None else "far too slow for an optimised BLAS: is the machine busy?"
        )
    lines = [
        Check(
            "Matmul float32",
            "warn" if slow else "ok",
            f"{_rate(peaks['float32_matmul_flops_per_s'], 'FLOP/s')} at {peaks['float32_matmul_size']} cubed",
            advice,
        )
    ]
    if peaks["dtype"] != "float32":
        rate = _rate(peaks["matmul_flops_per_s"], "FLOP/s")
        lines.append(Check(f"Matmul {peaks['dtype']}", "ok", f"{rate} at {peaks['matmul_size']} cubed"))
    copied = (
        f"{_rate(peaks['copy_bytes_per_s'], 'B/s')} read and written, one array of {_rate(peaks['copy_bytes'], 'B')}"
    )
    return [*lines, Check("Copy bandwidth", "ok", copied)]


def _rate(value: float | str, unit: str) -> str:
    number = float(value)
    scale, letter = next((s, x) for s, x in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, "")) if number >= s or s == 1.0)
    return f"{number / scale:.3g} {letter}{unit}"


def _memory(facts: dict[str, str]) -> Check:
    total = facts["memory_bytes"]
    value = f"{int(total) / 1e9:.1f} GB" if total.isdigit() else total
    if facts["recommended_memory_bytes"].isdigit():
        value += f", {int(facts['recommended_memory_bytes']) / 1e9:.1f} GB recommended at most"
    return Check("Memory", "ok", value)


def _power(facts: dict[str, str]) -> Check:
    value = f"{facts['power_source']}, low-power mode {facts['low_power_mode']}"
    if facts["low_power_mode"] == "on" or facts["power_source"] == "Battery Power":
        return Check("Power", "warn", value, "timings sag: plug in and turn low-power mode off before measuring")
    return Check("Power", "ok", value)


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
    if free < LEAST_FREE_BYTES:
        return Check("Disk", "warn", value, "free some, or choose another folder with --results")
    return Check("Disk", "ok", value)


def _kernel() -> Check:
    missing = [name for name in ("ipykernel", "papermill", "jupyterlab") if importlib.util.find_spec(name) is None]
    if missing:
        return Check("Notebooks", "fail", f"{', '.join(missing)} missing", f"pip install {' '.join(missing)}")
    return Check("Notebooks", "ok", "ipykernel, papermill and jupyterlab are here")


def _git() -> Check:
    if shutil.which("git") is None:
        return Check("git", "warn", "not found", "without it, runs do not record a checkout's commit")
    return Check("git", "ok", "found: runs record the commit of a checkout")
