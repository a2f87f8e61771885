"""The commands and `load_transformer` on devices that are too small: refusals, warnings, and going on all the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zimage
from tests.lab.making import FACTS, RECORDS, fake_kernels, write_experiment, write_notebook
from tests.lab.test_fitting import CPU, METAL, SHARED, declare
from tests.test_cli import zimage as command
from zimage import backend, machine, recipes, sources, weights
from zimage.analysis.fitting import Device, fits
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, InputError, WeightsError
from zimage.lab import keys, terminal
from zimage.measure import memory
from zimage.transformer import Transformer

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

SWEEP = ("sweep", "experiments/demo.yaml")
RUN = ("run", "notebooks/a.ipynb")
MB = 10**6
SMALL = CPU | {"memory_bytes": str(MB)}
MIXED = CPU | {"memory_bytes": str(36 * MB)}  # two of the sweep's three runs fit
Have = Callable[[dict[str, str]], None]


@pytest.fixture
def have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Have:
    """Be in a project of a notebook with the shared parameters, on a device with the given facts."""
    monkeypatch.setenv("ZIMAGE_FORCE", "")  # so that what --force sets is undone
    write_notebook(tmp_path / "notebooks" / "a.ipynb", RECORDS, parameters=f"{SHARED}scale: float = 1.0\n")
    write_experiment(tmp_path, "grid: {height: [8, 64, 128]}\n")
    monkeypatch.chdir(tmp_path)

    def on(facts: dict[str, str]) -> None:
        monkeypatch.setattr(keys, "device_facts", lambda _device="auto": facts)

    on(CPU)
    return on


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was noted on the terminal before the runs."""
    lines: list[str] = []
    monkeypatch.setattr(terminal, "note", lines.append)
    return lines


@pytest.fixture
def total(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let this process's device have only so many bytes in all, and no recommended working set."""
    monkeypatch.setenv("ZIMAGE_FORCE", "")
    real = memory.device

    def of(count: int | None) -> None:
        monkeypatch.setattr(memory, "device", lambda: real() | {"memory_bytes": count, "recommended_bytes": None})

    return of


@pytest.mark.parametrize("line", [RUN, SWEEP])
def test_what_cannot_fit_is_refused(
    line: tuple[str, ...], have: Have, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` and `sweep` exit with 2 and one line that says what, how much and the ways out; the store is untouched."""
    ran = fake_kernels(monkeypatch)
    have(SMALL)
    status, out, err = command(capsys, *line)
    assert (status, out, ran, Path("results").exists()) == (2, "", [], False)
    assert err.startswith("zimage: notebooks/a.ipynb: digits at 8 x 8 px, batch 1") and err.count("\n") == 1
    assert "more than the device's 1.00 MB; nothing was started; take " in err and "--force" in err


@pytest.mark.parametrize("line", [RUN, SWEEP])
def test_force_goes_on(
    line: tuple[str, ...],
    have: Have,
    noted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --force, or ZIMAGE_FORCE=1, the same is a note, and loading in the kernel is told to go on too."""
    told: list[str | None] = []
    ran = fake_kernels(monkeypatch, lambda _job: told.append(os.environ.get("ZIMAGE_FORCE")))
    have(SMALL)
    assert command(capsys, *line, "--force")[0] == 0
    assert len(ran) == (1 if line == RUN else 3)
    assert set(told) == {"1"}
    assert len(noted) == 1 and "more than the device's 1.00 MB" in noted[0]
    monkeypatch.setenv("ZIMAGE_FORCE", "1")
    assert command(capsys, *line, "--fresh")[0] == 0


@pytest.mark.usefixtures("have")
def test_what_fits_is_silent(
    noted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep that fits says nothing about memory, and one on an unknown device neither."""
    fake_kernels(monkeypatch)
    for facts in (CPU | {"memory_bytes": str(10**12)}, FACTS):
        monkeypatch.setattr(keys, "device_facts", lambda _device="auto", facts=facts: facts)
        status, out, err = command(capsys, *SWEEP, "--fresh")
        assert (status, err, noted) == (0, "", [])
        assert "step needs" not in out


def test_tight_runs_are_noted_once(
    have: Have, noted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above the recommended working set a sweep runs, after one line with the first such run and their number."""
    ran = fake_kernels(monkeypatch)
    have(METAL | {"memory_bytes": str(10**12), "recommended_memory_bytes": str(4 * MB)})
    assert command(capsys, *SWEEP)[0] == 0
    assert len(ran) == 3
    (line,) = noted
    assert line.startswith("notebooks/a.ipynb: digits at 8 x 8 px, batch 1 (and 2 more of 3 runs): a step needs about ")
    assert "recommended working set of 4.00 MB" in line
    assert command(capsys, *SWEEP)[0] == 0
    assert len(noted) == 1  # nothing was left to do


def test_a_mixed_sweep(have: Have, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where some runs fit and others don't, none is started; runs that are done already are not judged again."""
    ran = fake_kernels(monkeypatch)
    have(MIXED)
    status, _, err = command(capsys, *SWEEP)
    assert (status, ran, Path("results").exists()) == (2, [], False)
    assert "digits at 128 x 8 px, batch 1 cannot fit" in err
    assert command(capsys, *SWEEP, "--set", "height=64")[0] == 0
    assert command(capsys, *SWEEP, "--force")[0] == 0
    assert command(capsys, *SWEEP)[0] == 0
    assert len(ran) == 3


def test_dry_run_lists_verdicts(have: Have, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run writes each run's verdict beside it, as text and as JSON, and refuses nothing."""
    have(MIXED)
    status, out, err = command(capsys, *SWEEP, "--dry-run")
    lines = out.splitlines()[1:]
    assert (status, err) == (0, "")
    assert ["(fits: a step needs about" in line for line in lines] == [True, True, False]
    assert "(cannot fit: a step needs about" in lines[2]
    runs = json.loads(command(capsys, *SWEEP, "--dry-run", "--json")[1])["runs"]
    assert [run["fit"]["verdict"] for run in runs] == ["fits", "fits", "cannot fit"]
    assert runs[2]["fit"]["need_bytes"] > runs[2]["fit"]["memory_bytes"] == 36 * MB
    have(FACTS)
    runs = json.loads(command(capsys, *SWEEP, "--dry-run", "--json")[1])["runs"]
    assert [run["fit"] for run in runs] == [None] * 3


def test_what_the_notebook_holds_counts(have: Have, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook that declares ten models does not fit where one does."""
    have(CPU)
    assert "(fits: a step" in command(capsys, *SWEEP, "--dry-run")[1]
    declare(Path("notebooks/a.ipynb"), {"models": 10})
    assert "(cannot fit: 10 models and a step need" in command(capsys, *SWEEP, "--dry-run")[1]


def test_shipped_notebooks_declare_what_they_hold() -> None:
    """Notebooks that hold several models cover what their copies and arms add at the published size in bf16."""
    root = Path(__file__).parent.parent / "notebooks"
    config = TransformerConfig.turbo()
    info = sources.SourceInfo("turbo", "synthetic", config, {})
    whole = info.loaded_bytes(2)
    fused = 34 * 3 * config.dim**2 * 2 / whole
    # qkv_fusion drops its copy before it stacks weights of its model, and its models before it starts processes.
    # published_claims fuses its model and its copy, for the noise floor of what is fused.
    needed = {"qkv_fusion": 2, "published_claims": 2 + 2 * fused}
    # fusions stacks the weights of its model and, for a noise floor too, those of a copy that it then drops.
    needed["fusions"] = 2 + fused + 34 * 2 * config.dim * config.hidden_dim * 2 / whole
    # quantization does the same with transforms that stack weights, and then holds one packed model at a time.
    needed["quantization"] = needed["fusions"]
    # matmuls fuses four blocks, and loads its model once more for the noise floor of a step.
    needed["matmuls"] = 2 + 4 * (3 * config.dim**2 + 2 * config.dim * config.hidden_dim) * 2 / whole
    needed["details"] = 4  # processes at once for the two variables that its experiment compares
    for name, least in needed.items():
        declared = json.loads((root / f"{name}.ipynb").read_text())["metadata"]["zimage"]["models"]
        assert least <= declared <= least + 0.02, name


def test_loading_is_refused_before_anything_is_allocated(total: Callable[[int | None], None]) -> None:
    """`load_transformer` refuses weights that are more than the device has in one line, and has made no array."""
    total(MB)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_peak_memory(), mx.get_active_memory()
    with pytest.raises(InputError) as refused:
        zimage.load_transformer("synthetic:turbo", "float32")
    with pytest.raises(InputError, match="set ZIMAGE_FORCE=1"):
        zimage.load_transformer("digits", "float32")
    assert (mx.get_peak_memory(), mx.get_active_memory()) == before
    assert str(refused.value) == (
        "synthetic:turbo: its weights take 24,619,634,944 bytes, more than the device's 1,000,000; "
        'pack them (quantization="4bit"), or set ZIMAGE_FORCE=1 to try all the same'
    )


def test_loading_is_judged_by_what_was_asked_for(
    total: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dtype and quantization count; ZIMAGE_FORCE=1, and a device that tells nothing, let everything through."""
    total(8 * MB)
    with pytest.raises(InputError):
        zimage.load_transformer("digits", "float32")
    zimage.load_transformer("digits", "bfloat16")
    zimage.load_transformer("digits", "float32", "4bit")
    total(None)
    zimage.load_transformer("digits", "float32")
    total(MB)
    monkeypatch.setenv("ZIMAGE_FORCE", "1")
    zimage.load_transformer("digits", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "4bit", "8bit-g32", "mxfp4"])
def test_predicted_weights_are_those_that_are_loaded(dtype: str, quantization: str | None, tmp_path: Path) -> None:
    """`loaded_bytes` is exact, for floating-point, packed while loading and stored packed."""

    def held(model: Transformer) -> int:
        return sum(array.nbytes for _, array in tree_flatten(model.parameters()))

    item = {"float32": 4, "bfloat16": 2}
    info = sources.describe("digits")
    predicted = info.loaded_bytes(item[dtype], recipes.packing(info.config, quantization))
    assert predicted == held(zimage.load_transformer("digits", dtype, quantization))
    stored = weights.convert("digits", tmp_path / "stored", "bfloat16", quantization)
    assert sources.describe(stored).loaded_bytes(item[dtype]) == held(zimage.load_transformer(stored, dtype))


def test_convert_is_not_refused(total: Callable[[int | None], None], tmp_path: Path) -> None:
    """`convert` holds one tensor at a time, so that the whole model need not fit."""
    total(MB)
    assert weights.convert("digits", tmp_path / "d", "float32").is_dir()


def test_generate(
    total: Callable[[int | None], None],
    noted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`generate` refuses with exit 2 before it loads and writes nothing; --force draws; tight is noted."""
    monkeypatch.chdir(tmp_path)
    total(MB)
    status, out, err = command(capsys, "generate", "7", "--steps", "1")
    assert (status, out, err.count("\n"), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert err.startswith("zimage: drawing with digits cannot fit: a step needs about ") and "--quantization" in err
    assert command(capsys, "generate", "7", "--steps", "1", "--force")[0] == 0
    assert len(noted) == 1
    real = memory.device()
    monkeypatch.setattr(memory, "device", lambda: real | {"memory_bytes": 10**12, "recommended_bytes": MB})
    assert command(capsys, "generate", "7", "--steps", "1")[0] == 0
    assert "recommended working set of 1.00 MB" in noted[1]


def test_fits_is_one_call_and_one_sentence() -> None:
    """`zimage.fits` takes a source or a config and prints as one sentence; this device is the default."""
    turbo = zimage.fits("synthetic:turbo", 1024, 1024, device=Device("metal", 16 * 10**9, 12 * 10**9))
    assert turbo.verdict == "tight"
    assert str(turbo).startswith("tight: a step needs about 1") and "\n" not in str(turbo)
    assert zimage.fits(TransformerConfig.turbo(), 1024, 1024, device=turbo.device) == turbo
    here = zimage.fits("digits", 8, 8)
    assert here.verdict == "fits"
    assert here.device.total_bytes == memory.device()["memory_bytes"]
    assert here.dtype == backend.default_dtype()


def test_fits_refuses_what_the_model_does_not_take() -> None:
    """Bad sizes, dtypes, quantizations and sources are errors here, where there is no run to tell of them."""
    device = Device("cpu", 10**9)
    for arguments, kind in (
        ((7, 512), ConfigError),
        ((512, 512, 0), InputError),
        ((512, 512, 1, 32, "float16"), InputError),
        ((512, 512, 1, 32, None, "7bit"), InputError),
        ((512, 512, 1, 32, None, None, 0), InputError),
        ((512, 512, 1, 32, None, None, -1), InputError),
        ((512, 512, 1, 32, None, None, float("nan")), InputError),
    ):
        given: tuple[Any, ...] = arguments
        with pytest.raises(kind):
            fits("synthetic:tiny", *given, device=device)
    with pytest.raises(WeightsError):
        fits("nowhere/at/all", 8, 8, device=device)


def test_a_device_is_known_by_its_facts() -> None:
    """Facts give kind and limits; a CPU has no recommended working set, also beside a GPU; unknown stays unknown."""
    facts = {"memory_bytes": "100", "recommended_memory_bytes": "75"}
    assert Device.of(facts | {"device_type": "gpu", "mlx_build": "metal"}) == Device("metal", 100, 75)
    assert Device.of(facts | {"device_type": "cpu", "mlx_build": "metal"}) == Device("cpu", 100)
    unknown = {"memory_bytes": "unknown", "recommended_memory_bytes": "unknown"}
    assert Device.of(unknown | {"device_type": "gpu", "mlx_build": "cuda-13"}) == Device("cuda")
    assert Device.of(facts) is None


def test_show_says_what_a_step_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`show` of a source with 8 pixels a latent tells what steps at 512 and 1024 px take, a verdict only on CPUs."""
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: str(27 * 10**9))
    monkeypatch.setattr(backend, "build_kind", lambda: "cpu")
    (line,) = [part for part in command(capsys, "show", "synthetic:turbo")[1].splitlines() if "a step" in part]
    assert line.startswith("  a step      512 px about 25.") and line.endswith("(cannot fit here), in float32")
    assert "GB (fits here), 1024 px about" in line
    monkeypatch.setattr(backend, "build_kind", lambda: "cuda-13")
    (line,) = [part for part in command(capsys, "show", "synthetic:turbo")[1].splitlines() if "a step" in part]
    assert line.endswith("in bfloat16") and "here" not in line
    steps = json.loads(command(capsys, "show", "synthetic:turbo", "--json")[1])["steps"]
    assert [(step["height"], step["dtype"], step["fit"]["verdict"]) for step in steps] == [
        (512, "bfloat16", "unknown"),
        (1024, "bfloat16", "unknown"),
    ]
    for build, source in (("cpu", "digits"), ("missing", "synthetic:turbo")):
        monkeypatch.setattr(backend, "build_kind", lambda build=build: build)
        assert "a step" not in command(capsys, "show", source)[1]
