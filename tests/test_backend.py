"""What MLX is here, how it is prepared, and what is recorded about the machine."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

from zimage import backend, blas, doctor, machine
from zimage.errors import BackendError, MeasurementError

import pytest


def _site(folder: Path, *distributions: str, library: bool = True) -> Path:
    """A site-packages folder that holds MLX's bindings, these distributions, and its library or not."""
    (folder / "mlx" / "lib").mkdir(parents=True)
    (folder / "mlx" / "core.cpython-311-x86_64-linux-gnu.so").touch()
    if library:
        (folder / "mlx" / "lib" / "libmlx.so").touch()
    for name in distributions:
        (folder / f"{name}.dist-info").mkdir()
    return folder


def _only(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(sys, "platform", "linux")
    sys.path_importer_cache.pop(str(site), None)


@pytest.mark.parametrize("kind", ["cpu", "cuda_12", "cuda_13", "metal"])
def test_build_is_read_from_the_installed_distributions(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build and version come from the distributions beside MLX, without importing it."""
    _only(monkeypatch, _site(tmp_path, "mlx-0.32.4", f"mlx_{kind}-0.32.4"))
    build = backend.find_build()
    assert (build.kind, build.version, build.folder) == (kind.replace("_", "-"), "0.32.4", tmp_path / "mlx")


def test_two_builds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-cpu beside mlx-cuda is one line that names both and the commands that mend it."""
    _only(monkeypatch, _site(tmp_path, "mlx-0.32.4", "mlx_cpu-0.32.4", "mlx_cuda_13-0.32.4"))
    with pytest.raises(BackendError, match=r"mlx-cpu and mlx-cuda-13 are both installed.*pip uninstall.*zimage\[cpu\]"):
        backend.find_build()


def test_bindings_without_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain `pip install mlx` on Linux is one line with the command that brings the library."""
    _only(monkeypatch, _site(tmp_path, "mlx-0.32.4", library=False))
    with pytest.raises(BackendError, match=r'without its library libmlx: pip install "zimage\[cpu\]"'):
        backend.find_build()


def test_missing_mlx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MLX there is one line with the command that brings it."""
    _only(monkeypatch, tmp_path)
    with pytest.raises(BackendError, match=r'not installed for .*: pip install "zimage\[cpu\]"'):
        backend.find_build()


def test_windows_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the one line says WSL2."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BackendError, match="WSL2"):
        backend.find_build()


def _prepare_as(kind: str, monkeypatch: pytest.MonkeyPatch, late: bool) -> backend.Prepared:
    monkeypatch.setattr(backend, "find_build", lambda: backend.MLXBuild(kind, "0.32.4", None))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "load", lambda: blas.Outcome(None, ("none",)))
    monkeypatch.setattr(blas, "in_global_scope", lambda: None)
    modules = {name: module for name, module in sys.modules.items() if not name.startswith("mlx")}
    if late:
        modules["mlx.core"] = types.ModuleType("mlx.core")
    monkeypatch.setattr(sys, "modules", modules)
    return backend._prepare()


def test_cuda_caches_are_enlarged_but_not_over_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA build gets large graph and attention caches; a variable the user set stays."""
    for name in backend.CUDA_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set below is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLX_CUDA_SDPA_CACHE_SIZE", "99")
    prepared = _prepare_as("cuda-13", monkeypatch, late=False)
    assert os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"] == "20000"
    assert os.environ["MLX_CUDA_SDPA_CACHE_SIZE"] == "99"
    assert "MLX_CUDA_GRAPH_CACHE_SIZE" in prepared.variables_set
    assert "MLX_CUDA_SDPA_CACHE_SIZE" not in prepared.variables_set


def test_cpu_build_sets_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU build needs none of the CUDA variables and gets none."""
    before = dict(os.environ)
    assert _prepare_as("cpu", monkeypatch, late=False).variables_set == ()
    assert dict(os.environ) == before


def test_mlx_imported_first_is_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """When MLX was imported before, prepare() warns and remembers it instead of being slow in silence."""
    monkeypatch.delenv("ZIMAGE_BLAS", raising=False)
    with pytest.warns(RuntimeWarning, match="mlx was imported before zimage"):
        prepared = _prepare_as("cpu", monkeypatch, late=True)
    assert prepared.late
    assert doctor._import_order(prepared).status == "warn"


def test_late_import_with_a_loaded_blas_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS that LD_PRELOAD brought serves MLX whoever imported it, so there is nothing to warn of."""
    preloaded = blas.Loaded("OpenBLAS", "0.3", 2, Path("libopenblas.so.0"))
    monkeypatch.setattr(backend, "find_build", lambda: backend.MLXBuild("cpu", "0.32.4", None))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "in_global_scope", lambda: preloaded)
    monkeypatch.setitem(sys.modules, "mlx.core", types.ModuleType("mlx.core"))
    prepared = backend._prepare()
    assert (prepared.blas, prepared.late) == (preloaded, False)


def test_importing_backend_does_not_import_mlx() -> None:
    """`import zimage.backend` loads neither MLX nor pandas."""
    code = "import sys, zimage.backend; print([n for n in ('mlx', 'mlx.core', 'pandas') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("device_type", "name", "short"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("gpu", "Apple M3 Max", "apple-m3-max"),
        ("cpu", "AMD EPYC", "cpu-amd-epyc-2c"),
        ("cpu", "AMD EPYC 7B13 64-Core Processor", "cpu-amd-epyc-7b13-2c"),
        ("cpu", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c-2c"),
        ("cpu", "11th Gen Intel(R) Core(TM) i7-1185G7 @ 3.00GHz", "cpu-intel-core-i7-1185g7-2c"),
    ],
)
def test_short_device_name(device_type: str, name: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device names become short, stable file names."""
    monkeypatch.setattr(machine, "cpu_name", lambda: name)
    assert backend.short_device_name(device_type, name, cores=2) == short


def test_facts_are_strings_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact is a non-empty string, `MLX_*` variables are among them, and `device` is a file name."""
    monkeypatch.setenv("MLX_SOMETHING", "7")
    facts = backend.device_facts()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert json.loads(json.dumps(facts)) == facts
    assert facts["MLX_SOMETHING"] == "7"
    assert facts["device"] == facts["device"].lower().replace(" ", "-")
    assert {"mlx", "driver", "blas", "os", "python", "memory_bytes", "commit", "zimage", "clock"} <= facts.keys()


def test_module_prints_the_facts() -> None:
    """`python -m zimage.backend` prints the same facts as JSON, but for those that change from minute to minute."""
    done = subprocess.run([sys.executable, "-m", "zimage.backend"], capture_output=True, text=True, check=True)
    printed, ours = json.loads(done.stdout), backend.device_facts()
    assert printed.keys() == ours.keys()
    own = {*machine.MOMENTARY, "blas_threads"}  # as many threads as there are free cores at the moment
    assert {k: v for k, v in printed.items() if k not in own} == {k: v for k, v in ours.items() if k not in own}


def test_module_says_in_one_line_that_mlx_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a usable MLX the command exits with 2 and one line."""

    def missing() -> dict[str, str]:
        raise BackendError("MLX is not installed: pip install it")

    monkeypatch.setattr(backend, "device_facts", missing)
    assert backend.main() == 2
    assert capsys.readouterr().err == "zimage: MLX is not installed: pip install it\n"


def test_commit_tells_a_changed_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is read from the package's own checkout, marked when changed; elsewhere it is unknown."""
    package = tmp_path / "zimage"
    package.mkdir()
    monkeypatch.setattr(backend, "__file__", str(package / "backend.py"))
    (package / "errors.py").write_text("a = 1\n")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    assert backend._commit() == "unknown"  # a repository around the package that does not hold it
    git("add", "zimage/errors.py")
    git("commit", "-q", "-m", "one")
    clean = backend._commit()
    assert len(clean) >= 12
    assert "-dirty" not in clean
    (package / "errors.py").write_text("a = 2\n")
    assert backend._commit() == f"{clean}-dirty"


def test_default_dtype_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a CPU, bfloat16 on a GPU."""
    monkeypatch.setattr(backend, "device_type", lambda: "cpu")
    assert backend.default_dtype() == "float32"
    monkeypatch.setattr(backend, "device_type", lambda: "gpu")
    assert backend.default_dtype() == "bfloat16"


def test_doctor_of_this_machine(tmp_path: Path) -> None:
    """The doctor measures this machine: every check has a value, and advice exactly when it is not ok."""
    found = {check.name: check for check in backend.doctor(tmp_path / "not" / "yet")}
    assert {"MLX", "Device", "BLAS", "Matmul float32", "Copy bandwidth", "Memory", "Disk", "Notebooks"} <= found.keys()
    assert all(check.value and (check.advice == "") == (check.status == "ok") for check in found.values())
    assert "FLOP/s" in found["Matmul float32"].value
    assert not list(tmp_path.iterdir())


def test_doctor_looks_at_the_results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that lie in a file, or where nothing may be written, are warned of; a folder that is not there is not."""
    (tmp_path / "file").touch()
    assert [doctor._disk(tmp_path / name).status for name in ("file", "new", ".")] == ["warn", "ok", "ok"]
    assert doctor._disk(tmp_path / "file").value == f"{tmp_path / 'file'} is not a folder"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor._disk(tmp_path / "new").value == f"{tmp_path} cannot be written to"


def test_doctor_mends_the_reference_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference BLAS the doctor warns, says why and gives the command that mends it."""
    build = backend.MLXBuild("cpu", "0.32.4", None)
    prepared = backend.Prepared(build, None, ("openblas: it does not run on this CPU",), False, ())
    monkeypatch.setattr(sys, "platform", "linux")
    check = doctor._blas(prepared, {"blas": " ".join(backend._blas(prepared)).strip()})
    assert check.status == "warn"
    assert "does not run on this CPU" in check.value
    assert "zimage[cpu]" in check.advice


@pytest.mark.parametrize(("threads", "words"), [("1", "1 thread,"), ("2", "2 threads,")])
def test_doctor_counts_threads(threads: str, words: str) -> None:
    """One thread is not called threads."""
    loaded = blas.Loaded("OpenBLAS", "0.3", int(threads), Path("libopenblas.so.0"))
    prepared = backend.Prepared(backend.MLXBuild("cpu", "0.32.4", None), loaded, (), False, ())
    assert words in doctor._blas(prepared, {"blas": "OpenBLAS 0.3", "blas_threads": threads}).value


def test_doctor_of_a_broken_mlx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broken MLX is a failed check with its advice, and the other checks still run."""

    def broken() -> backend.Prepared:
        raise BackendError('MLX is installed without its library libmlx: pip install "zimage[cpu]"')

    monkeypatch.setattr(backend, "prepare", broken)
    found = {check.name: check for check in doctor.checks(tmp_path)}
    assert found["MLX"].status == "fail"
    assert found["MLX"].advice == 'pip install "zimage[cpu]"'
    assert "Disk" in found


def test_doctor_finds_a_cuda_build_without_gpu() -> None:
    """A CUDA build that runs on the CPU is a failure with the way out."""
    facts = {"device_name": "AMD EPYC", "device": "cpu-amd-epyc-2c", "cores": "2"}
    check = doctor._device(facts | {"device_type": "cpu", "mlx_build": "cuda-13"})
    assert check.status == "fail"
    assert "nvidia-smi" in check.advice


def test_doctor_warns_of_slow_products() -> None:
    """A matmul rate on a CPU that only a reference BLAS has is a warning."""
    prepared = backend.Prepared(backend.MLXBuild("cpu", "0.32.4", None), None, (), False, ())
    measured = {
        "matmul": {"float32": {"burst": 3e9, "sustained": None, "size": 512}},
        "quantized_matmul": {},
        "dequantize": {},
        "copy": {"burst": 1e10, "sustained": None, "bytes": 2**27},
        "under_load": {"throttle": []},
    }
    slow = {check.name: check for check in doctor.judge(measured, prepared, {"device_type": "cpu"})}
    assert slow["Matmul float32"].status == "warn"
    assert slow["Matmul float32"].value == "3 GFLOP/s at 512 cubed"
    assert slow["Copy bandwidth"].status == "ok"
    fine = doctor.judge(measured, prepared, {"device_type": "gpu"})
    assert {check.status for check in fine} == {"ok"}


@pytest.mark.parametrize(
    ("reasons", "status"), [([], None), (["power cap"], "ok"), (["power cap", "thermal slowdown"], "warn")]
)
def test_doctor_tells_of_reduced_clocks(reasons: list[str], status: str | None) -> None:
    """Clocks that were reduced while measuring are told; heat is a warning, a power cap under load is not."""
    prepared = backend.Prepared(backend.MLXBuild("cuda-13", "0.32.4", None), None, (), False, ())
    measured = {"matmul": {"float32": {"burst": 1e13, "sustained": None, "size": 512}}}
    measured |= {"under_load": {"throttle": reasons}}  # type: ignore[dict-item]
    found = {c.name: c.status for c in doctor.judge(measured, prepared, {"device_type": "gpu"})}
    assert found.get("Clocks") == status


CALM = {
    "power_source": "AC Power", "low_power_mode": "off", "thermal_state": "nominal", "gpu_power_limit_w": "unknown",
    "other_busy_cores": "0.1", "machine_cores": "8", "cores": "8", "load_average": "0.10 0.20 0.30",
    "memory_pressure": "normal", "device_type": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, set()),
        ({"power_source": "Battery Power"}, {"Power"}),
        ({"low_power_mode": "on"}, {"Power"}),
        ({"thermal_state": "heavy"}, {"Heat"}),
        ({"other_busy_cores": "4.0"}, {"Other work"}),
        ({"power_source": "unknown", "thermal_state": "unknown", "other_busy_cores": "unknown"}, set()),
    ],
)
def test_doctor_warns_of_conditions(changed: dict[str, str], warned: set[str]) -> None:
    """Battery, low-power mode, heat and other work are warnings with advice; what is unknown is none."""
    found = doctor._conditions(CALM | changed)
    assert {check.name for check in found if check.status == "warn"} == warned
    assert all((check.advice != "") == (check.status == "warn") for check in found)


def test_doctor_goes_on_when_the_device_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measurements that fail for want of memory are a warning with advice, and the other checks still run."""

    def fails(*_: object) -> dict[str, object]:
        raise MeasurementError("the peaks could not be measured: out of memory")

    monkeypatch.setattr(doctor.peaks, "measure", fails)
    found = {check.name: check for check in doctor.checks(tmp_path)}
    assert found["Peaks"].status == "warn"
    assert {"Power", "Disk"} <= found.keys()


@pytest.mark.parametrize(
    ("device_type", "cuda", "kind"), [("gpu", True, "cuda"), ("gpu", False, "metal"), ("cpu", True, "cpu")]
)
def test_what_computes_is_what_mlx_says(
    device_type: str, cuda: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a GPU is CUDA's is asked of MLX itself: one that was built from source has no name that says it."""
    mlx = types.SimpleNamespace(
        default_device=lambda: types.SimpleNamespace(type=f"DeviceType.{device_type}"),
        cuda=types.SimpleNamespace(is_available=lambda: cuda),
    )
    monkeypatch.setattr(backend, "_mlx", lambda: mlx)
    monkeypatch.setattr(backend, "build_kind", lambda: "source")
    assert backend.kind() == kind
