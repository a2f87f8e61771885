"""Peaks are measured with the project's timer, kept for the runs to come, and read in every form they have had."""

import json
from pathlib import Path
from typing import Any

from zimage import backend
from zimage.errors import MeasurementError
from zimage.measure import peaks, timing

import mlx.core as mx
import pytest

OLD = {
    "dtype": "bfloat16", "matmul_flops_per_s": 7e14, "matmul_size": 8192, "float32_matmul_flops_per_s": 4e14,
    "float32_matmul_size": 4096, "copy_bytes_per_s": 3e12, "copy_bytes": 2**30,
}  # fmt: skip


def _new(**changes: Any) -> dict[str, Any]:
    """Peaks as a quick look gives them."""
    return {
        "matmul": {"float32": {"burst": 2e11, "sustained": None, "size": 1024}},
        "quantized_matmul": {},
        "dequantize": {"4bit": {"burst": 1e9, "bytes": 100}},
        "copy": {"burst": 1e10, "sustained": None, "bytes": 100},
        "under_load": {"power_w": None, "temperature_c": None, "throttle": []},
        "measured": "2026-02-02", "mlx": "0.32.4", "driver": "580", "blas": "x",
    } | changes  # fmt: skip


def _full(**changes: Any) -> dict[str, Any]:
    """Peaks as a full look gives them, taken earlier and a little lower."""
    return _new(
        matmul={"float32": {"burst": 1e11, "sustained": 9e10, "size": 512, "sustained_size": 512}},
        quantized_matmul={"4bit": {"burst": 5e10, "sustained": 4e10, "size": 4096, "rows": 4096}},
        copy={"burst": 9e9, "sustained": 8e9, "bytes": 100},
        under_load={"power_w": 650.0, "temperature_c": 60.0, "throttle": ["power cap"]},
        measured="2026-01-01", measured_full="2026-01-01",
    ) | changes  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def quick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which every operation takes a tenth of a second, whatever its size."""
    monkeypatch.setattr(timing, "timed", lambda work: lambda: 0.1 * len(work()))


def test_peaks_are_the_best_of_synchronised_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst leaves the first call out, however fast, and is the fastest of samples that `timed` takes."""
    times = iter([0.5, *([3.0, 1.0, 2.0] * 3)])
    monkeypatch.setattr(timing, "timed", lambda _work: lambda: next(times))
    assert peaks._burst(lambda: mx.ones(1), 10.0, lambda _: None) == (10.0, 1.0)


def test_short_operations_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation of a millisecond is timed eight to a call, so that submitting a call hardly counts."""
    overhead, each = 0.0008, 0.001
    monkeypatch.setattr(timing, "timed", lambda work: lambda: overhead + each * len(work()))
    rate, time_s = peaks._burst(lambda: None, 1.0, lambda _: None)
    assert time_s == pytest.approx(each + overhead / 8)
    assert rate == pytest.approx(1 / time_s)


@pytest.mark.usefixtures("quick_device")
def test_rates_follow_from_times() -> None:
    """A product of size n counts 2 n^3 operations; copies and unpacking the bytes they read and write."""
    told: list[float] = []
    matmul = peaks._matmul("float32", False, told.append)
    assert matmul == {"burst": 2 * 256**3 / 0.1, "sustained": None, "size": 256}  # a call that long ends the search
    assert told == [0.1] * 8
    copy = peaks._copy(False, False, told.append)
    assert copy["burst"] == 2 * copy["bytes"] / 0.1
    packed = peaks._dequantize(4, False, told.append)
    weights = 2**23
    assert packed["bytes"] == weights // 2 + 2 * 4 * weights // 64 + 4 * weights
    assert packed["burst"] == packed["bytes"] / 0.1


@pytest.mark.usefixtures("quick_device")
def test_packed_products_have_many_rows() -> None:
    """A packed product counts 2 n^2 operations for each of its 4096 rows, in a burst and sustained."""
    found = peaks._quantized_matmul(4, False, lambda _: None)
    rate = 2 * 4096 * 256**2 / 0.1
    assert found == {"burst": rate, "sustained": pytest.approx(rate), "size": 256, "rows": 4096}


def test_sustained_is_the_rate_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that slows down after five of ten seconds has the sustained rate of its last half, not of the whole."""
    spent: list[float] = []

    def slowing(_work: Any) -> Any:
        def call() -> float:
            spent.append(0.5 if sum(spent) < 5 else 1.0)
            return spent[-1]

        return call

    monkeypatch.setattr(timing, "timed", slowing)
    monkeypatch.setattr(peaks, "_in_a_call", lambda _time_s: 1)
    monkeypatch.setattr(peaks, "_fastest_s", lambda _call: 0.5)
    assert peaks._sustained(lambda: None, 3.0, lambda _: None) == 3.0
    assert sum(spent) >= peaks.SUSTAINED_S == 10.0
    assert peaks.second_half_mean_s([8.0, 1.0, 1.0]) == pytest.approx(10 / 3)
    assert peaks.second_half_mean_s([2.0, 1.0, 1.0]) == 1.0


def test_quick_peaks_of_this_machine() -> None:
    """The quick form measures this device: finite positive rates that JSON holds, and nothing that takes long."""
    told: list[float] = []
    found = peaks.measure(advance=told.append)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"float32", "bfloat16"} <= found["matmul"].keys()
    assert found["matmul"]["float32"]["burst"] > 1e8
    assert found["copy"]["burst"] > 1e8
    assert found["dequantize"].keys() == {"4bit", "8bit"}
    assert found["quantized_matmul"] == {}
    assert found["copy"]["sustained"] is None
    assert found["mlx"] == backend.prepare().build.version
    assert min(told) > 0
    assert len(peaks.lines(found)) == len(found["matmul"]) + 3


def test_full_peaks_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full form fills in sustained rates and packed products, and gives MLX its cache limit back."""
    monkeypatch.setattr(timing, "timed", lambda work: lambda: 4.0 if work() is not None else 0.0)
    before = mx.set_cache_limit(2**20)
    found = peaks.measure(full=True)
    assert mx.set_cache_limit(before) == 2**20
    assert all(peak["sustained"] == pytest.approx(peak["burst"]) for peak in found["matmul"].values())
    assert found["quantized_matmul"]["8bit"]["sustained"] > 0
    assert found["copy"]["sustained"] > 0
    assert found["measured_full"] == found["measured"]


@pytest.mark.parametrize(
    ("kind", "build", "dtypes"),
    [
        ("gpu", "metal", {"float32", "bfloat16", "float16"}),
        ("gpu", "cuda-13", {"float32", "bfloat16"}),
        ("cpu", "cpu", {"float32", "bfloat16"}),
    ],
)
def test_dtypes_of_a_device(kind: str, build: str, dtypes: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has both dtypes of the models measured, and Metal float16 too."""
    facts = backend.device_facts() | {"device_type": kind, "mlx_build": build}
    monkeypatch.setattr(backend, "device_facts", lambda: facts)
    for part in ("_matmul", "_copy", "_dequantize"):
        monkeypatch.setattr(peaks, part, lambda *_: {"burst": 1.0})
    assert peaks.measure()["matmul"].keys() == dtypes


def test_a_device_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own error while measuring becomes one line."""

    def fails(*_: object) -> Any:
        raise RuntimeError("[malloc] Unable to allocate\n 4 GB")

    monkeypatch.setattr(peaks, "_matmul", fails)
    with pytest.raises(MeasurementError, match=r"could not be measured: \[malloc\] Unable to allocate 4 GB"):
        peaks.measure()


def test_peaks_are_kept_by_device(tmp_path: Path) -> None:
    """Peaks kept for a device are read again for it, whole; for another device, or damaged, there are none."""
    assert peaks.kept("cpu-test") is None
    assert peaks.keep("cpu-test", _new()) == _new()
    assert peaks.kept("cpu-test") == _new()
    assert peaks.kept("another") is None
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "zimage" / "peaks-cpu-test.json").write_text(text)
        assert peaks.kept("cpu-test") is None


def test_a_quick_look_keeps_what_only_a_full_one_finds() -> None:
    """After a full and a quick measurement, burst rates are the new ones and sustained ones stay."""
    peaks.keep("cpu-test", _full())
    both = peaks.keep("cpu-test", _new())
    assert both == peaks.kept("cpu-test")
    assert both["matmul"]["float32"] == {"burst": 2e11, "sustained": 9e10, "size": 1024, "sustained_size": 512}
    assert both["quantized_matmul"] == _full()["quantized_matmul"]
    assert (both["copy"]["burst"], both["copy"]["sustained"]) == (1e10, 8e9)
    assert (both["measured"], both["measured_full"]) == ("2026-02-02", "2026-01-01")
    assert both["under_load"] == _new()["under_load"]  # of the last measurement alone


def test_a_busy_look_lowers_no_roof() -> None:
    """A lower rate is given as measured, and the higher one of before kept for the runs to come, with its size."""
    quiet = _new()
    busy = _new(matmul={"float32": {"burst": 1.0, "sustained": None, "size": 256}}, copy={"burst": 2.0})
    quiet["conditions"] = {"gpu_power_limit_w": "unknown", "blas_threads": "2"}
    busy["conditions"] = quiet["conditions"] | {"blas_threads": "1"}
    peaks.keep("cpu-x", quiet)
    given = peaks.keep("cpu-x", busy)
    assert (given["matmul"]["float32"]["burst"], given["copy"]["burst"]) == (1.0, 2.0)
    found = peaks.kept("cpu-x")
    assert found is not None
    assert found["matmul"]["float32"] == quiet["matmul"]["float32"]
    assert found["copy"]["burst"] == quiet["copy"]["burst"]


def test_another_power_limit_has_its_own_roof() -> None:
    """Rates under another power limit replace those of before, higher or lower."""
    peaks.keep("gpu-x", _new())
    peaks.keep("gpu-x", _new(copy={"burst": 2.0}, conditions={"gpu_power_limit_w": "300"}))
    found = peaks.kept("gpu-x")
    assert found is not None
    assert found["copy"]["burst"] == 2.0


@pytest.mark.parametrize("changed", ["mlx", "driver", "blas"])
def test_a_changed_machine_forgets(changed: str) -> None:
    """With another MLX, driver or BLAS nothing of before is kept, and runs get no peaks of before."""
    peaks.keep("cpu-test", _full())
    facts = {name: _full()[name] for name in ("mlx", "driver", "blas")}
    assert peaks.kept("cpu-test", facts) == _full()
    assert peaks.kept("cpu-test", facts | {changed: "other"}) is None
    assert peaks.keep("cpu-test", _new(**{changed: "other"})) == _new(**{changed: "other"})


def test_peaks_of_older_runs_are_read() -> None:
    """The flat form that runs held before is read as what it says, and never merged into new peaks."""
    new = peaks.upgraded(OLD)
    assert new["matmul"]["bfloat16"] == {"burst": 7e14, "sustained": None, "size": 8192}
    assert new["matmul"]["float32"] == {"burst": 4e14, "sustained": None, "size": 4096}
    assert new["copy"] == {"burst": 3e12, "sustained": None, "bytes": 2**30}
    assert dict(peaks.lines(OLD))["Matmul bfloat16"] == "700 TFLOP/s at 8192 cubed"
    only = peaks.upgraded({k: v for k, v in OLD.items() if "float32" not in k} | {"dtype": "float32"})
    assert only["matmul"].keys() == {"float32"}
    peaks.keep("cpu-test", dict(OLD))
    assert peaks.keep("cpu-test", _new()) == _new()


@pytest.mark.parametrize("damaged", [None, [], "x", {}, {"matmul": 3}, {"matmul": {"float32": {"burst": "fast"}}}])
def test_damaged_peaks_show_nothing(damaged: Any) -> None:
    """Peaks that a run does not have, or that someone has changed, are no lines and no crash."""
    assert peaks.lines(damaged) == []


@pytest.mark.parametrize(
    ("value", "words"), [(9.996e8, "1 GB"), (9.99e8, "999 MB"), (1.26e11, "126 GB"), (7e14, "700 TB"), (512, "512 B")]
)
def test_scaled_numbers(value: float, words: str) -> None:
    """Numbers have three digits and the prefix that fits them after rounding."""
    assert peaks.scaled(value, "B") == words


def test_lines_show_both_regimes() -> None:
    """A sustained rate stands beside the burst one."""
    assert dict(peaks.lines(_full()))["Matmul float32"] == "100 GFLOP/s (90 GFLOP/s sustained) at 512 cubed"
    assert dict(peaks.lines(_full()))["Matmul 4bit"].endswith("at 4096 rows by 4096 squared")


def test_a_full_look_says_how_long_it_takes() -> None:
    """The time told beforehand grows with what is measured, and on CUDA with what is compiled."""
    assert peaks.expected_s(False, "cpu") < peaks.expected_s(True, "cpu") < peaks.expected_s(True, "cuda-13")


def test_peaks_of_here_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without kept peaks they are measured and kept, and the next call measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = backend.device_facts()
    made = {"matmul": {}, **{name: facts[name] for name in ("mlx", "driver", "blas")}}
    calls: list[int] = []
    monkeypatch.setattr(peaks, "measure", lambda: calls.append(1) or dict(made))
    assert peaks.here() == peaks.here() == made
    assert len(calls) == 1


def test_a_device_in_the_place_of_kept_peaks_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A link to an endless device is no kept peaks, and costs no memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "zimage").mkdir()
    (tmp_path / "zimage" / "peaks-x.json").symlink_to("/dev/zero")
    assert peaks.kept("x") is None


@pytest.mark.parametrize(
    ("then", "again"),
    [
        ({"blas_threads": "1", "other_busy_cores": "0.0"}, True),
        ({"blas_threads": "2", "other_busy_cores": "1.4"}, True),
        ({"blas_threads": "2", "other_busy_cores": "0.1"}, False),
        ({"blas_threads": "unknown", "other_busy_cores": "unknown"}, False),
        (None, False),
    ],
)
def test_peaks_that_were_held_back_are_measured_again(
    then: Any, again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Peaks taken with fewer threads or beside other work are no roof: the next look counts where it is higher."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = {"device": "cpu-test", "mlx": "0.32.4", "driver": "580", "blas": "x", "blas_threads": "2"}
    monkeypatch.setattr(backend, "device_facts", lambda: facts)
    peaks.keep("cpu-test", _new(conditions=then))
    quiet = {"blas_threads": "2", "other_busy_cores": "0.0"}
    better = _new(conditions=quiet, matmul={"float32": {"burst": 4e11, "sustained": None, "size": 2048}})
    monkeypatch.setattr(peaks, "measure", lambda: better)
    assert peaks.here()["matmul"]["float32"]["burst"] == (4e11 if again else 2e11)
    assert peaks.here()["copy"]["burst"] == 1e10
