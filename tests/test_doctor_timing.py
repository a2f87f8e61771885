"""The doctor's peaks come from the one timer of the project."""

import ast
from pathlib import Path

import zimage
from zimage import doctor
from zimage.measure import timing

import mlx.core as mx
import pytest

PACKAGE = Path(zimage.__file__).parent


def test_peaks_are_medians_of_synchronised_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's median leaves the first call out and is that of samples that `timed` takes."""
    times = iter([100.0, *([3.0, 1.0, 2.0] * 3)])
    monkeypatch.setattr(timing, "timed", lambda _work: lambda: next(times))
    assert doctor._median_time_s(lambda: mx.ones(1)) == 2.0


def test_rates_follow_from_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of size n counts 2 n^3 operations and a copy its bytes read and written, over the median time."""
    monkeypatch.setattr(doctor, "_median_time_s", lambda _call: 0.5)
    assert doctor._matmul_peak("float32") == (2 * 256**3 / 0.5, 256)  # one call that long ends the search
    rate, size = doctor._copy_peak()
    assert rate == 2 * size / 0.5


def test_nothing_else_takes_a_timing() -> None:
    """Only measure reads the precise clock, calls in timing and whole loads, in processes of their own, in reporting.

    Besides, blas does before MLX may load, and training for its progress.
    """
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("perf_counter", "perf_counter_ns")
    }
    assert readers == {"measure/timing.py", "measure/reporting.py", "blas.py", "digits/train.py"}


def test_measured_peaks_are_kept_for_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Peaks kept for a device are read again for it, whole; for another device, or damaged, there are none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peaks: dict[str, float | str] = {"dtype": "float32", "matmul_flops_per_s": 1.5e11}
    assert doctor.kept_peaks("cpu-test") is None
    doctor.keep_peaks("cpu-test", peaks)
    assert doctor.kept_peaks("cpu-test") == peaks
    assert doctor.kept_peaks("another") is None
    (tmp_path / "zimage" / "peaks-cpu-test.json").write_text("{")
    assert doctor.kept_peaks("cpu-test") is None
