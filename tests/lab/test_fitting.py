"""Whether runs fit their device: what a run is judged by, and what a notebook says about itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.lab.making import FACTS, write_notebook
from zimage import sources, weights
from zimage.analysis.fitting import fits
from zimage.errors import ExperimentError, InputError
from zimage.lab import fitting, keys, notebook, sweep, terminal
from zimage.lab.experiment import Planned
from zimage.lab.runner import Job

import pytest

SHARED = """source: str = "digits"
dtype: str | None = None
height: int = 8
width: int = 8
batch: int = 1
caption_tokens: int = 1
quantization: str | None = None
"""
MB = 10**6
CPU = FACTS | {"device_type": "cpu", "mlx_build": "cpu", "memory_bytes": str(64 * MB)}
METAL = CPU | {"device_type": "gpu", "mlx_build": "metal", "recommended_memory_bytes": str(48 * MB)}


def job_of(tmp_path: Path, facts: dict[str, str] = CPU, parameters: str = SHARED, **given: Any) -> Job:
    """The run of a notebook with the shared parameters on a device with these facts."""
    found = notebook.read(write_notebook(tmp_path / "notebooks" / "a.ipynb", parameters=parameters), tmp_path)
    (job,) = sweep.jobs_of("demo", [Planned(found, found.resolve(given))], tmp_path, 60)
    return replace(job, identity=replace(job.identity, facts=facts))


def declare(path: Path, metadata: Any) -> Path:
    """Put `metadata` into a notebook's own, under `zimage`."""
    content = json.loads(path.read_text())
    content["metadata"]["zimage"] = metadata
    path.write_text(json.dumps(content))
    return path


def test_a_run_is_judged_by_its_parameters_and_device(tmp_path: Path) -> None:
    """Sizes, batch, dtype and quantization of a run all count, in the dtype that suits the device if none is given."""
    digits = sources.describe("digits")
    one = fitting.of_job(job_of(tmp_path))
    assert one is not None
    assert (one.verdict, one.dtype, one.models) == ("fits", "float32", 1)
    assert one.step.weight_bytes == digits.loaded_bytes(4)
    needs = [
        fit.need_bytes
        for given in ({}, {"dtype": "bfloat16"}, {"height": 64}, {"batch": 4}, {"quantization": "4bit"})
        if (fit := fitting.of_job(job_of(tmp_path, **given)))
    ]
    assert len(set(needs)) == 5
    on_metal = fitting.of_job(job_of(tmp_path, METAL))
    assert on_metal is not None
    assert (on_metal.dtype, on_metal.step.weight_bytes) == ("bfloat16", digits.loaded_bytes(2))


def test_models_held_at_once_multiply_the_weights(tmp_path: Path) -> None:
    """A notebook that declares 2.5 models needs their weights, and one step's activations."""
    job = job_of(tmp_path)
    one = fitting.of_job(job)
    several = fitting.of_job(replace(job, notebook=replace(job.notebook, models=2.5)))
    assert one is not None and several is not None
    assert several.need_bytes - one.need_bytes == round(1.5 * one.step.weight_bytes)
    assert "2.5 models and a step need" in str(several)


@pytest.mark.parametrize(
    ("facts", "given"),
    [
        (FACTS, {}),  # not even which kind of device it is
        (CPU | {"memory_bytes": "unknown"}, {}),
        (CPU, {"height": -8}),
        (CPU, {"dtype": "float16"}),
        (CPU, {"quantization": "7bit"}),
        (CPU, {"caption_tokens": 0}),
    ],
)
def test_what_cannot_be_judged_gets_no_verdict(tmp_path: Path, facts: dict[str, str], given: dict[str, Any]) -> None:
    """Unknown devices and parameters that the model refuses get no verdict."""
    assert fitting.of_job(job_of(tmp_path, facts, **given)) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": -8}, "height"),
        ({"source": "synthetic:turbo", "height": 8, "width": 8}, "images are multiples of 16, found 8 x 8"),
        ({"batch": 10**8}, "batch must be an integer"),
        ({"caption_tokens": 0}, "caption_tokens"),
        ({"dtype": "int3"}, "dtype"),
        ({"quantization": "7bit"}, "7bit"),
    ],
)
def test_what_the_model_does_not_take_is_refused_at_once(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    """Sizes, dtypes and packings that no run could compute start none, forced or not."""
    for force in (False, True):
        with pytest.raises(InputError, match=message) as caught:
            fitting.check([job_of(tmp_path), job_of(tmp_path, **given)], force)
        assert str(caught.value).endswith("nothing was started") and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["source", "height", "batch", "caption_tokens"])
def test_notebooks_of_other_parameters_are_not_judged(tmp_path: Path, missing: str) -> None:
    """A notebook without one of the shared parameters, or with one of another type, gets no verdict."""
    lines = SHARED.splitlines(keepends=True)
    without = "".join(line for line in lines if not line.startswith(missing))
    assert fitting.of_job(job_of(tmp_path, parameters=without)) is None
    listed = without + f"{missing} = [1, 2]\n"
    assert fitting.of_job(job_of(tmp_path, parameters=listed)) is None


LISTED = """source: str = "digits"
dtype: str | None = None
quantization: str | None = None
sizes: list = [[8, 8, 1, 1], [64, 64, 2, 1], [16, 16, 1, 1]]
"""


def test_a_run_of_several_sizes_is_judged_by_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook whose `sizes` lists height, width, batch and caption tokens needs what the largest of them needs."""
    found = fitting.of_job(job_of(tmp_path, parameters=LISTED))
    alone = fitting.of_job(job_of(tmp_path, height=64, width=64, batch=2))
    assert found is not None and found == alone
    monkeypatch.delenv("ZIMAGE_FORCE", raising=False)
    with pytest.raises(InputError, match=r"a\.ipynb: digits at 64 x 64 px, batch 2 cannot fit"):
        fitting.check([job_of(tmp_path, CPU | {"memory_bytes": str(MB)}, LISTED)], force=False)


@pytest.mark.parametrize("sizes", [[], [[8, 8, 1]], [8, 8, 1, 1], [["8", 8, 1, 1]], [[8, 8, 1, 0]], [[True] * 4]])
def test_what_is_no_size_is_left_to_the_run(tmp_path: Path, sizes: list[Any]) -> None:
    """Sizes of another form, or that the model refuses, get no verdict: such a notebook means others by the name."""
    assert fitting.of_job(job_of(tmp_path, parameters=f"{SHARED}\nsizes: list = {sizes}\n")) is None


def test_sizes_far_beyond_the_device_are_judged_at_once(tmp_path: Path) -> None:
    """An image of billions of pixels gets its verdict by arithmetic, however large."""
    found = fitting.of_job(job_of(tmp_path, height=8 * 10**9))
    assert found is not None
    assert found.verdict == "cannot fit"


def test_a_source_whose_config_claims_too_much_gets_no_verdict(tmp_path: Path) -> None:
    """A config that claims a billion layers costs nothing: the tensors are compared with it first."""
    source = tmp_path / "model"
    shutil.copytree(str(sources.describe("digits").folder), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_layers": 10**9}))
    assert fitting.of_job(job_of(tmp_path, source="model")) is None


def test_a_relative_source_is_the_runs(tmp_path: Path) -> None:
    """A relative source is looked for in the folder that the run works in."""
    shutil.copytree(str(sources.describe("digits").folder), tmp_path / "here")
    found = fitting.of_job(job_of(tmp_path, source="here"))
    assert found is not None
    assert found.step.weight_bytes == sources.describe("digits").loaded_bytes(4)


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is silent, what is tight is noted, what cannot fit is refused in one line, and noted if forced."""
    noted: list[str] = []
    monkeypatch.setattr(terminal, "note", noted.append)
    fitting.check([job_of(tmp_path)], False)
    assert noted == []
    tight = METAL | {"recommended_memory_bytes": str(4 * MB)}
    fitting.check([job_of(tmp_path, tight)], False)
    (line,) = noted
    assert line.startswith("notebooks/a.ipynb: digits at 8 x 8 px, batch 1: a step needs about ")
    assert "more than the recommended working set of 4.00 MB" in line
    small = CPU | {"memory_bytes": str(MB)}
    jobs = [job_of(tmp_path), job_of(tmp_path, small, height=16), job_of(tmp_path, small, height=24)]
    with pytest.raises(InputError) as refused:
        fitting.check(jobs, False)
    said = str(refused.value)
    assert said.startswith("notebooks/a.ipynb: digits at 16 x 8 px, batch 1 (and 1 more of 3 runs) cannot fit: a step")
    assert said.endswith("take dtype bfloat16, or a quantization, or --force to try all the same")
    assert "\n" not in said and len(noted) == 1
    fitting.check(jobs, True)
    assert len(noted) == 2
    assert "more than the device's 1.00 MB" in noted[1]


def test_only_ways_that_lead_out_are_named(tmp_path: Path) -> None:
    """A smaller size is offered only where the weights alone would fit, a quantization only where there is none yet."""
    with pytest.raises(InputError, match="take a smaller size, or dtype bfloat16, or a quantization, or --force"):
        fitting.check([job_of(tmp_path, height=512, width=512)], False)
    with pytest.raises(InputError, match="take a smaller size, or --force"):
        fitting.check([job_of(tmp_path, height=512, width=512, dtype="bfloat16", quantization="4bit")], False)


def test_a_notebook_says_how_many_models_it_holds(tmp_path: Path) -> None:
    """`models` comes from the notebook's metadata, is 1 without it, and is no part of the run key."""
    path = write_notebook(tmp_path / "n.ipynb", parameters=SHARED)
    plain = notebook.read(path)
    declared = notebook.read(declare(path, {"models": 2.25}))
    assert (plain.models, declared.models) == (1, 2.25)
    assert len({keys.identify(found, found.resolve({}), tmp_path).key for found in (plain, declared)}) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        *({"models": models} for models in (0, -1, True, "2", None, float("nan"), float("inf"), 10**9, [2])),
        {"model": 2},
        [2],
        "x" * 999,
        None,
    ],
)
def test_what_a_notebook_says_is_checked(tmp_path: Path, metadata: Any) -> None:
    """Anything but a number of models above 0 is refused in one line that names the file."""
    path = declare(write_notebook(tmp_path / "n.ipynb"), metadata)
    with pytest.raises(ExperimentError) as refused:
        notebook.read(path)
    assert str(refused.value).startswith(f"{path}: metadata zimage")
    assert len(str(refused.value)) < len(str(path)) + 250 and "\n" not in str(refused.value)


def test_a_packed_sources_own_packing_counts(tmp_path: Path) -> None:
    """A source that is stored packed is judged as it is loaded: packed, in its own dtype."""
    weights.convert("digits", tmp_path / "packed", "bfloat16", "4bit")
    found = fits(tmp_path / "packed", 8, 8, 1, 1, device=fitting.Device("cpu", 64 * MB))
    assert (found.dtype, found.step.weight_bytes) == ("bfloat16", sources.describe(tmp_path / "packed").bytes)


def test_a_recipe_of_a_run_counts(tmp_path: Path) -> None:
    """A run whose quantization is a recipe is judged by it, in the run's folder; without the file it is not judged."""
    (tmp_path / "r.yaml").write_text("default: 4bit\nrules: [{pattern: '*.w2', quantization: null}]\n")
    job = job_of(tmp_path, quantization="r.yaml")
    found, plain, packed = (fitting.of_job(job_of(tmp_path, quantization=q)) for q in ("r.yaml", None, "4bit"))
    assert found and plain and packed
    assert packed.step.weight_bytes < found.step.weight_bytes < plain.step.weight_bytes
    wanted = fits("digits", 8, 8, 1, 1, None, tmp_path / "r.yaml", device=found.device)
    assert found.step == wanted.step
    (tmp_path / "r.yaml").unlink()
    assert fitting.of_job(job) is None
