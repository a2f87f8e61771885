"""The machine MLX runs on: prepare it before MLX is imported, and say what it is.

`import zimage` calls `prepare()`, so that it comes before any `import mlx.core`. `python -m zimage.backend [DEVICE]`
prints the device facts as JSON, for a process that must not load MLX itself. Checks are in `doctor`, measured
peaks in `measure.peaks`.
"""

import json
import os
import platform
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zimage import blas, choices, machine, sensors, trust
from zimage.errors import BackendError
from zimage.machine import UNKNOWN

if TYPE_CHECKING:
    from zimage.doctor import Check

# The CUDA backend counts cache misses over a process's life and raises past twice the capacity; prefix profiles and
# sweeps make more shapes than its default capacities (400 graphs, 256 and 64 attention plans) allow.
CUDA_VARIABLES = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "20000",
    "MLX_CUDA_SDPA_CACHE_SIZE": "20000",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "20000",
}


@dataclass(frozen=True)
class MLXBuild:
    """The MLX that `import mlx` would load. `kind` is cpu, cuda-12, cuda-13, metal, source or missing."""

    kind: str
    version: str
    folder: Path | None


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did. `late`: MLX had been imported before, so an optimised BLAS could no longer be put first."""

    build: MLXBuild
    blas: blas.Loaded | None
    blas_notes: tuple[str, ...]
    late: bool
    variables_set: tuple[str, ...]


_lock = threading.Lock()
_prepared: Prepared | None = None


def prepare() -> Prepared:
    """Make this process ready for `import mlx.core`: an optimised BLAS on Linux CPUs, and the `MLX_*` variables.

    Cheap and safe to call again. Variables that the user set are left alone. Raises BackendError when MLX is missing,
    incomplete or installed twice over; a missing BLAS is only noted.
    """
    global _prepared  # noqa: PLW0603 - it describes this process
    with _lock:
        if _prepared is None:
            _prepared = _prepare()
        return _prepared


def _prepare() -> Prepared:
    build = find_build()
    late = "mlx.core" in sys.modules
    variables = CUDA_VARIABLES if build.kind.startswith("cuda") else {}
    to_set = [name for name in variables if name not in os.environ]
    if not late:
        os.environ.update({name: variables[name] for name in to_set})
    outcome = blas.Outcome(None)
    if sys.platform == "linux" and build.kind in ("cpu", "source"):
        if not late:
            outcome = blas.load()
        else:
            already = blas.in_global_scope()
            outcome = blas.Outcome(already, () if already else ("MLX was imported before zimage",))
    too_late = late and (bool(to_set) or (build.kind == "cpu" and outcome.loaded is None and _wants_blas()))
    if too_late:
        warnings.warn(
            "mlx was imported before zimage could prepare it and stays slow in this process: import zimage first "
            "(in a notebook, then restart the kernel)",
            RuntimeWarning,
            stacklevel=3,
        )
    return Prepared(build, outcome.loaded, outcome.notes, too_late, () if late else tuple(to_set))


def _wants_blas() -> bool:
    return sys.platform == "linux" and os.environ.get(blas.VARIABLE, "").strip().lower() != "reference"


def find_build() -> MLXBuild:
    """Find the installed MLX without importing it.

    Raises BackendError when there is none, when it lacks its library, or when two builds overwrote each other.
    """
    if sys.platform == "win32":
        raise BackendError("MLX does not run on Windows itself: install zimage inside WSL2 (Ubuntu)")
    extra = "zimage[cpu]" if sys.platform == "linux" else "zimage"
    spec = PathFinder.find_spec("mlx")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    folder = next((place for place in folders if any(place.glob("core*.so"))), None)
    if folder is None:
        raise BackendError(f'MLX is not installed for {sys.executable}: pip install "{extra}"')
    versions = _distributions(folder.parent)
    kinds = sorted(name.removeprefix("mlx-") for name in versions if re.fullmatch(r"mlx-(cpu|metal|cuda.*)", name))
    if len(kinds) > 1:
        names = " and ".join(f"mlx-{kind}" for kind in kinds)
        remove = " ".join(f"mlx-{kind}" for kind in kinds)
        raise BackendError(
            f"{names} are both installed and overwrite each other: pip uninstall -y {remove} mlx, then "
            f'pip install "zimage[cpu]" or "zimage[cuda13]"'
        )
    # The wheel `mlx` brings only the bindings; the library is in mlx-cpu, mlx-metal or mlx-cuda-*.
    if not any(folder.glob("lib/libmlx.*")):
        choice = ' (or "zimage[cuda13]", "zimage[cuda12]")' if sys.platform == "linux" else ""
        raise BackendError(f'MLX is installed without its library libmlx: pip install "{extra}"{choice}')
    return MLXBuild(kinds[0] if kinds else "source", versions.get("mlx", UNKNOWN), folder)


def kind() -> Literal["cpu", "cuda", "metal"]:
    """What computes: the processor, or a GPU through CUDA or Metal."""
    if device_type() == "cpu":
        return "cpu"
    return "cuda" if _mlx().cuda.is_available() else "metal"  # an MLX built from source may be either


def build_kind() -> str:
    """The kind of `MLXBuild` that is here, "missing" where it cannot be used."""
    try:
        return prepare().build.kind
    except BackendError:
        return "missing"


def _distributions(site: Path) -> dict[str, str]:
    """Names and versions of the distributions whose metadata lies in `site`, from the folders' names alone."""
    found = {}
    for entry in site.glob("*.dist-info"):
        name, _, version = entry.name.removesuffix(".dist-info").partition("-")
        found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def default_dtype() -> Literal["float32", "bfloat16"]:
    """What suits the device: float32 on a CPU, whose 16-bit products take a slow path, else bfloat16."""
    return "bfloat16" if device_type() == "gpu" else "float32"


def use_device(name: str) -> None:
    """Make MLX's default device "cpu", "gpu", or the best there is ("auto"). Raises BackendError if it isn't there."""
    mx = _mlx()
    if name not in ("auto", "cpu", "gpu"):
        raise BackendError(f"device {name!r} is not known; use auto, cpu or gpu")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError("no GPU that MLX can use here; use device auto or cpu, and see `zimage doctor`")
    if name != "auto":
        mx.set_default_device(mx.Device(mx.gpu if name == "gpu" else mx.cpu))


def _mlx() -> Any:
    prepare()
    try:
        import mlx.core as mx
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f'MLX cannot be loaded ({reason}): pip install "zimage[cpu]" or "zimage[cuda13]"') from None
    return mx


def device_type() -> str:
    """ "cpu" or "gpu": the kind of MLX's default device. Raises BackendError when MLX cannot be used."""
    return str(_mlx().default_device().type).rsplit(".", 1)[-1]


def _mlx_device() -> Mapping[str, str | int]:
    mx = _mlx()
    info: Mapping[str, str | int] = mx.device_info() if hasattr(mx, "device_info") else {}
    return info


def device_facts() -> dict[str, str]:
    """Everything about device, software and environment that is recorded with a run, as strings.

    What cannot be found out is "unknown". `device` is the short device name, such as `nvidia-h100-80gb-hbm3`,
    `apple-m3-max` or `cpu-amd-epyc-2c`; those in `machine.MOMENTARY` are of this moment. Raises BackendError as
    `prepare` does.
    """
    prepared = prepare()
    info, kind = _mlx_device(), device_type()
    is_nvidia = kind == "gpu" and prepared.build.kind.startswith("cuda")
    gpu = nvidia_gpu()
    blas_name, blas_version = _blas(prepared)
    lasting = machine.lasting_facts()
    nvidia = machine.gpu_facts(gpu, str(info.get("uuid", ""))) if is_nvidia else {}
    facts = {
        "device": short_device_name(kind, str(info.get("device_name", UNKNOWN)), blas.usable_cores()),
        "device_type": kind,
        "device_name": lasting["cpu"] if kind == "cpu" else str(info.get("device_name", UNKNOWN)),
        "architecture": str(info.get("architecture", UNKNOWN)),
        "memory_bytes": _device_memory(kind, info),
        "recommended_memory_bytes": str(info.get("max_recommended_working_set_size", UNKNOWN)),
        **lasting,
        "driver": UNKNOWN,
        "cuda": UNKNOWN,
        "gpu_power_limit_w": UNKNOWN,
        **nvidia,
        **({"gpu_pci_bus_id": str(info.get("pci_bus_id", UNKNOWN))} if is_nvidia else {}),
        "mlx": prepared.build.version,
        "mlx_build": prepared.build.kind,
        **_mlx_limits(),
        "blas": f"{blas_name} {blas_version}".strip(),
        "blas_threads": str(prepared.blas.threads) if prepared.blas else UNKNOWN,
        "blas_file": prepared.blas.path.name if prepared.blas else UNKNOWN,
        "python": platform.python_version(),
        "zimage": _zimage_version(),
        "commit": _commit(),
        "clock": time.get_clock_info("perf_counter").implementation,
        **machine.momentary_facts(gpu, is_nvidia, holds_gpu=True),
    }
    facts |= {"kernels": trust.in_force(facts), "tuning": choices.in_force(facts)}
    variables = (name for name in sorted(os.environ) if name.startswith("MLX_"))
    return facts | {name: os.environ[name] for name in variables}


def nvidia_gpu() -> sensors.NvidiaGpu | None:
    """The sensors of the NVIDIA GPU that MLX computes on here; None on other devices, and where it isn't certain."""
    if not prepare().build.kind.startswith("cuda") or device_type() != "gpu":
        return None
    return sensors.nvidia_gpu(str(_mlx_device().get("pci_bus_id", "")))


def _mlx_limits() -> dict[str, str]:
    """MLX's limits of memory and of its buffer cache. Its wired limit can only be set, not read."""
    mx = _mlx()
    limit = int(mx.get_memory_limit())
    cache = int(mx.set_cache_limit(limit))  # the only way to read it is to set it
    mx.set_cache_limit(cache)
    return {"mlx_memory_limit_bytes": str(limit), "mlx_cache_limit_bytes": str(cache), "mlx_wired_limit_bytes": UNKNOWN}


def short_device_name(kind: str, device_name: str, cores: int) -> str:
    """The device as a file name: `nvidia-h100-80gb-hbm3`, `apple-m3-max`, `cpu-amd-epyc-7b13-2c`."""
    name = machine.cpu_name() if kind == "cpu" else device_name
    name = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|\b\d+-Core\b|@.*|\b\d+(st|nd|rd|th) Gen\b", " ", name)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or UNKNOWN
    return f"cpu-{slug}-{cores}c" if kind == "cpu" else slug


def _blas(prepared: Prepared) -> tuple[str, str]:
    """Name and version of what multiplies matrices here."""
    if prepared.blas is not None:
        return prepared.blas.name, prepared.blas.version
    if sys.platform == "darwin":
        return "Accelerate", platform.mac_ver()[0]
    if prepared.build.kind.startswith("cuda"):
        site = prepared.build.folder.parent if prepared.build.folder else Path()
        versions = _distributions(site)
        return "cuBLAS", next((versions[name] for name in sorted(versions) if name.startswith("nvidia-cublas")), "")
    return ("reference", "") if prepared.build.kind == "cpu" else (UNKNOWN, "")


def _device_memory(kind: str, info: Mapping[str, str | int]) -> str:
    if kind == "cpu":
        return machine.host_memory_bytes()
    return str(info.get("total_memory", info.get("memory_size", UNKNOWN)))


def _zimage_version() -> str:
    from zimage import __version__

    return __version__


def _commit() -> str:
    """The checkout's commit, with "-dirty" when the package differs from it; "unknown" for an installed copy."""
    package = Path(__file__).parent
    if not machine.output(
        "git", "ls-files", "--", "errors.py", folder=package
    ):  # not a file of the repository around it
        return UNKNOWN
    commit = machine.output("git", "rev-parse", "--short=12", "HEAD", folder=package)
    changed = machine.output("git", "status", "--porcelain", "--", ".", folder=package)
    return (commit + ("-dirty" if changed else "")) or UNKNOWN


def doctor(
    results: Path = Path("results"), full: bool = False, advance: Callable[[float], None] = lambda _seconds: None
) -> "list[Check]":
    """The checks of `zimage doctor`, in the order to show them; they take a few seconds. See `zimage.doctor`."""
    from zimage.doctor import checks

    return checks(results, full, advance)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the facts as JSON, of the device in the first argument if any; exit 2 with one line without MLX."""
    try:
        use_device(*arguments[:1] or ["auto"])
        print(json.dumps(device_facts(), indent=2))
    except BackendError as error:
        print(f"zimage: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from zimage import backend  # noqa: PLW0406 - the module that `import zimage` prepared, not this second copy of it

    sys.exit(backend.main(sys.argv[1:]))
