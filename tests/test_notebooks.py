"""Every notebook, and every experiment file of this repository: what they say, that they run, and what they record."""

import ast
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zimage
from tests.sweeping import EXPERIMENTS, LEAST, ROOT, SUITES, Command, Sweep, environment, on_digits, quick
from zimage import arms, backend, cli, ladder, measure, orders, practices, scheduler, sources
from zimage.analysis import cost, crossover, fitting
from zimage.analysis.findings import KNOWN_VERDICTS, families
from zimage.analysis.reading import best_scope
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError, ZImageError
from zimage.lab import notebook as notebooks
from zimage.lab.store import Run, Store
from zimage.transformer import Transformer

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
WITHOUT_KERNEL = pytest.mark.usefixtures("in_process")
# What means the same everywhere: type and default.
SHARED: dict[str, tuple[str, Any]] = {
    "source": ("str", "digits"),
    "dtype": ("str | None", None),
    "height": ("int", 8),
    "width": ("int", 8),
    "batch": ("int", 1),
    "caption_tokens": ("int", 1),
    "seed": ("int", 0),
    "device": ("str", "auto"),
}
WITHOUT_VERDICT = {"loading", "profile_layers", "train_digits"}  # they show what is there and compare no arms
UNANSWERED = {"loading", "train_digits"}  # docs/findings.md says nothing of their questions
# Those that compare what one may do to a model, and whose answers are tempting to carry over from a small one.
ABLATIONS = {"details", "memory", "pareto", "qkv_fusion", "quantization", "scaling", "sensitivity", "step_caching"}
SO_FAR = "**So far:** [what the results say](../docs/findings.md): "  # and then the answer, in a clause
TIME = re.compile(r"\d s\b|\b(second|minute|hour)s?\b")  # how long something takes, in words or digits
# Those whose arms draw digits, and how many rows that is with little work, what they are judged against among them.
DRAWING = {"details": 2, "pareto": 5, "quantization": 4, "sensitivity": 4, "step_caching": 3}
PLAIN = {"steps", "learning_rate", "weight_decay"}  # names that need no comment


def cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, their source as one text."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def parameter_lines(path: Path) -> dict[str, str]:
    """The lines of the parameters cell by the parameter's name."""
    tagged = next(cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", []))
    return {line.split(":")[0].split("=")[0].strip(): line for line in tagged["source"].splitlines() if line.strip()}


def zimage_run(path: Path, results: Path, **parameters: Any) -> int:
    """The exit status of `zimage run` of a notebook, called in this process, with the parameters that it knows."""
    known = notebooks.read(path, ROOT).parameters
    given = [text for name, value in parameters.items() if name in known for text in ("-p", name, str(value))]
    return cli.main(["run", str(path), *given, "--results", str(results)])


@pytest.fixture(scope="session")
def ran(swept: Callable[[Command], Sweep]) -> Callable[[Path], Run]:
    """A run of a notebook on digits: one that a quick sweep did, else one with the least work."""

    def _ran(path: Path) -> Run:
        store, name = swept(on_digits(path)).store, str(path.relative_to(ROOT))
        return next(run for kept in store.experiments() for run in store.runs(kept) if run.notebook == name)

    return _ran


def test_there_are_notebooks_and_experiments() -> None:
    """The lists that the tests below go through are not empty."""
    assert {path.stem for path in NOTEBOOKS} >= {"profile_layers", "qkv_fusion", "quantization"}
    assert {path.stem for path in EXPERIMENTS} >= {"quickstart"}


@EACH
def test_a_notebook_opens_with_its_question(path: Path) -> None:
    """The first cell is text whose heading is the question, with the command that runs it and how long that takes.

    The code follows.
    """
    first, *rest = cells(path)
    assert first["cell_type"] == "markdown"
    heading = first["source"].splitlines()[0]
    assert re.fullmatch(r"# .+\?", heading), heading
    (command,) = (part for part in first["source"].split("\n\n") if part.startswith("**Command** "))
    assert f"zimage run notebooks/{path.name}" in command and TIME.search(command), command
    assert any(cell["cell_type"] == "code" for cell in rest)


@EACH
def test_a_notebook_says_what_is_known_so_far(path: Path) -> None:
    """Its first cell leads to the findings with a short answer, of which weights, and whose numbers are all there."""
    said = [part for part in cells(path)[0]["source"].split("\n\n") if part.startswith("**So far:**")]
    assert len(said) == (path.stem not in UNANSWERED)
    for line in said:
        assert line.startswith(SO_FAR) and 30 < len(line) - len(SO_FAR) < 260 and line.endswith(".")
        assert "synthetic weights" in line or "trained digits" in line
        found = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("findings", "evidence"))
        numbers = re.findall(r"(?<![\w.,])\d[\d.,]*(?<![.,])", line.removeprefix(SO_FAR))
        assert [one for one in numbers if not re.search(rf"(?<![\d.,]){re.escape(one)}(?![\d]|[.,]\d)", found)] == []


def test_an_ablation_warns_of_carrying_over() -> None:
    """The eight ablations say at their head that what the digits show need not hold for the published model."""
    assert {path.stem for path in NOTEBOOKS} >= ABLATIONS and len(ABLATIONS) == 8
    words = "What the digits show need not transfer to the 6-billion-parameter model"
    first = {path.stem: cells(path)[0]["source"] for path in NOTEBOOKS}
    assert [name for name in sorted(ABLATIONS) if words not in first[name]] == []


@EACH
def test_a_notebook_ends_with_its_verdict(path: Path) -> None:
    """Its last heading is the verdict, and its last cell is the one of code that gives it."""
    headings = [line for cell in cells(path) if cell["cell_type"] == "markdown" for line in headings_of(cell["source"])]
    assert (headings[-1] == "## Verdict") == (path.stem not in WITHOUT_VERDICT), headings
    if path.stem not in WITHOUT_VERDICT:
        assert [cell["cell_type"] for cell in cells(path)[-2:]] == ["markdown", "code"]


def headings_of(text: str) -> list[str]:
    """The lines of a cell that are headings."""
    return [line for line in text.splitlines() if line.startswith("#")]


@EACH
def test_shared_parameters_are_the_same_everywhere(path: Path) -> None:
    """A shared name has one type, and one default where a model is loaded; other names are explained beside."""
    found, lines = notebooks.read(path, ROOT).parameters, parameter_lines(path)
    assert {"seed", "device"} <= set(found)
    if "source" in found:  # a notebook that never runs its model has no use for the sizes of a step
        shared = [name for name in SHARED if "height" in found or name in ("source", "seed", "device")]
        assert list(found)[: len(shared)] == shared
    for name, parameter in found.items():
        if name in SHARED:
            default = SHARED[name][1] if "source" in found else parameter.default
            assert (parameter.type, parameter.default) == (SHARED[name][0], default), f"{path.name}: {name}"
        else:
            assert "#" in lines[name] or name in PLAIN, f"{path.name}: say in a comment what {name} is"


def test_one_parameter_name_has_one_meaning() -> None:
    """A shared name is explained in the same words, and any name that several notebooks have is of one type."""
    types: dict[str, set[str]] = {}
    words: dict[str, set[str]] = {}
    for path in NOTEBOOKS:
        for name, line in parameter_lines(path).items():
            types.setdefault(name, set()).add(ast.unparse(ast.parse(line).body[0].annotation))  # type: ignore[attr-defined]
            words.setdefault(name, set()).add(line.partition("#")[2].strip())
    assert {name: found for name, found in types.items() if len(found) > 1} == {}
    assert {name: words[name] for name in SHARED if len(words.get(name, ())) > 1} == {}


@pytest.mark.parametrize("file", [*EXPERIMENTS, *SUITES], ids=lambda path: path.stem)
def test_an_experiment_says_how_long_it_takes(file: Path) -> None:
    """The cost at its head names a time that is not --quick's, and one on a GPU for the published shape."""
    head, _, rest = file.read_text(encoding="utf-8").partition("\nkind: ")
    words = " ".join(line.lstrip("# ") for line in head.partition("\n# Cost: ")[2].splitlines())
    said = [one for one in re.split(r"(?<=[.;:]) ", words) if "--quick" not in one]
    assert any(TIME.search(one) for one in said), said
    if '"synthetic:turbo"' in re.sub("#.*", "", rest) or file in SUITES:
        assert any("H100" in one and TIME.search(one) for one in said), said


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_runs_quickly(experiment: Path, swept: Callable[[Command], Sweep]) -> None:
    """Every experiment file opens with its command and cost, has a quick version, and that completes without a word.

    What it compares is known to an interval: no comparison has too few quads for one.
    """
    text = experiment.read_text(encoding="utf-8")
    assert text.startswith(f"# Command: zimage sweep experiments/{experiment.name}\n# Cost: ")
    done = swept(quick(experiment))
    assert (done.status, done.err) == (0, ""), done.out
    runs = done.store.runs(experiment.stem)
    assert runs and all(run.completed for run in runs)
    for run in runs:
        assert "too few for any interval" not in (run.path / "notebook.ipynb").read_text(encoding="utf-8")
        compared = run.table("ablation").dropna(subset=["ratio"]) if "ablation" in run.tables() else pd.DataFrame()
        if len(compared):
            widest = compared[compared["scope"] == best_scope(compared)]
            bounded = (widest["ratio_low"] > 0) & np.isfinite(widest["ratio_high"])
            dropped = widest["reason"].str.contains("quads were kept", na=False)  # as on a machine with other work
            assert bounded.any() or dropped.all(), run.notebook


@EACH
def test_what_a_notebook_records_fits(path: Path, ran: Callable[[Path], Run]) -> None:
    """A run completes, on digits if it loads a model, and keeps tables that conform, with key and arm in every row."""
    run = ran(path)
    assert run.completed, run.meta["error"]
    if "source" in run.parameters:
        assert (run.parameters["source"], run.meta["weights"]["kind"]) == ("digits", "trained")
    assert set(run.tables()) - {"environment"}
    for name in run.tables():
        frame = run.table(name)
        conform(name, frame)
        assert len(frame) and set(frame["run_key"]) == {run.key} and set(frame["experiment"]) == {run.experiment}
        assert name == "environment" or frame["arm"].notna().all()
        if "time_s" in frame and name == "samples":
            assert (frame["time_s"] > 0).all()
        if name == "ablation":
            assert set(frame["verdict"]) <= set(KNOWN_VERDICTS)
            holds_one = (frame["ratio_low"] <= 1) & (frame["ratio_high"] >= 1)
            assert ((frame["p_value"] > 0.05) == holds_one).all()


@EACH
def test_an_executed_notebook_is_not_crowded(path: Path, ran: Callable[[Path], Run]) -> None:
    """Executed it has at most three charts; its verdict is a table, shown last, that names the weights."""
    outputs = [cell.get("outputs", []) for cell in cells(ran(path).path / "notebook.ipynb")]
    charts = sum("application/vnd.plotly.v1+json" in one.get("data", {}) for some in outputs for one in some)
    assert charts <= 3
    if path.stem not in WITHOUT_VERDICT:
        assert "<table" in "".join(outputs[-1][-1]["data"]["text/html"])
        assert "trained" in json.dumps(outputs[-1])  # the verdict says of which weights it is


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("details", "relative L2 error against fp32"),
        ("details", "first call"),
        ("details", "recognised"),
        ("qkv_fusion", "relative_l2_error"),
        ("scaling", "predicted_s"),
        ("scaling", "predicted_ratio"),
        ("memory", "predicted"),
        ("memory", "<th>value</th>"),
        ("sensitivity", "damage_per_byte"),
        ("sensitivity", "50%"),
        ("step_caching", "steps computed in full"),
    ],
)
def test_tables_on_the_way_name_their_weights(name: str, words: str, ran: Callable[[Path], Run]) -> None:
    """A table that is shown before the verdict has the kind of weights in it."""
    (shown,) = (table for table in tables_of(ran(ROOT / "notebooks" / f"{name}.ipynb")) if words in table)
    assert "<td>trained</td>" in shown


def tables_of(run: Run) -> list[str]:
    """The tables that an executed notebook shows, as HTML."""
    outputs = [output for cell in cells(run.path / "notebook.ipynb") for output in cell.get("outputs", [])]
    shown = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    return [table for table in shown if "<table" in table]


def test_the_verdict_of_scaling_has_every_axis(ran: Callable[[Path], Run]) -> None:
    """scaling ends with the verdict on each pair of sizes, then the crossings, each below a line with the weights."""
    run = ran(ROOT / "notebooks" / "scaling.ipynb")
    last = cells(run.path / "notebook.ipynb")[-1]["outputs"]
    said = [line for output in last for line in "".join(output.get("text", "")).splitlines() if "trained" in line]
    assert [line.partition("; ")[2] for line in said] == [
        *("one thing at a time", "where attention overtakes the linear layers")
    ]
    first, second = tables_of(run)[-2:]
    verdicts = re.findall(rf"<td>({'|'.join(KNOWN_VERDICTS)})</td>", first)
    assert verdicts == list(run.table("axes")["verdict"]) and len(verdicts) > 3
    assert all(f"<th>{head}</th>" in first for head in ("size", "beside", "ratio", "95 % interval", "verdict"))
    assert "calibrated rates" in second and "calibrated rates" not in first


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in DRAWING], ids=lambda path: path.stem)
def test_arms_are_shown_side_by_side(path: Path, ran: Callable[[Path], Run]) -> None:
    """Where arms draw digits from the same noise, a grid with a row for each is kept, and is on the page."""
    run = ran(path)
    found = next(picture for picture in run.pictures() if picture.name == "digits_side_by_side")
    with Image.open(found.path) as image:
        assert image.height >= DRAWING[path.stem] * 40 and len(np.unique(np.asarray(image))) > 10
    page = (run.path.parent / "index.html").read_text(encoding="utf-8")
    assert found.caption in page and "digits_side_by_side.png" in page


def test_every_loader_gives_the_model(ran: Callable[[Path], Run]) -> None:
    """loading records every loader of the digits model in every round, and all but the packing one give its bytes."""
    run = ran(ROOT / "notebooks" / "loading.ipynb")
    rows = run.table("loading")
    rounds = [*range(1, run.parameters["rounds"] + 1)]
    found = {arm: list(group["round"]) for arm, group in rows.groupby("arm", sort=False)}
    assert found == dict.fromkeys(("plain read", "zimage", "zimage 4bit", "mlx"), rounds)
    whole = sources.describe("digits").bytes
    assert set(rows.loc[rows["arm"] != "zimage 4bit", "result_bytes"]) == {whole}
    assert (rows.loc[rows["arm"] == "zimage 4bit", "result_bytes"] < 0.5 * whole).all()
    assert (rows["peak_bytes"] >= 0.9 * rows["result_bytes"]).all()


def test_memory_predicts_measures_and_trades(ran: Callable[[Path], Run]) -> None:
    """memory records what the published model needs, peaks beside predictions, arms that hold less, and orders."""
    run = ran(ROOT / "notebooks" / "memory.ipynb")
    footprint = run.table("footprint")
    published = footprint[footprint["model"] == "synthetic:turbo"]
    assert set(published["arm"]) == set(fitting.PRECISIONS) and run.parameters["published"] == ["all"]
    assert published["measured_bytes"].isna().all()
    here = footprint[footprint["model"] == "digits"]
    assert list(here["arm"]) == [backend.default_dtype(), "4bit"] and here["error"].abs().max() < 0.5
    memory = run.table("memory")
    peaks = memory[memory["stage"] == "step"].set_index("arm")["bytes"]
    assert list(peaks.index) == ["plain", "chunked", "submit_early", "streamed 0/1", "4bit", "4bit streamed 0/1"]
    assert peaks["4bit streamed 0/1"] < peaks["streamed 0/1"] < peaks["plain"]
    orders = memory[(memory["stage"] == "process") & (memory["metric"] == "peak_bytes")].set_index("arm")["bytes"]
    assert orders["pack while loading, step"] < orders["load, step"]
    errors = run.table("quality").set_index("arm")["value"]
    assert set(errors[["submit_early", "streamed 0/1", "4bit streamed 0/1"]]) == {0.0}
    assert errors["chunked"] < 1e-3 < errors["4bit"] < 0.2
    check_samples(run.table("ablation"), run.table("samples"), floors=1)


@WITHOUT_KERNEL
def test_memory_takes_a_model_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A synthetic source is written to be streamed, without packings where its widths take none; nothing is left,

    and no model of this process lies beside those of the orders.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before, held, peaks = live_models(), [], orders.peaks

    def alone(*arguments: Any) -> list[dict[str, Any]]:
        held.extend(live_models().keys() - before.keys())
        return peaks(*arguments)

    monkeypatch.setattr(orders, "peaks", alone)
    given = {"source": "synthetic:tiny", "height": 32, "width": 32, "caption_tokens": 3, "modes": "[]"}
    given |= {"sizes": "[[32, 64, 2, 3]]", "streams": "[[0.0, 1]]", "unload": '["stream, step"]'}
    path = ROOT / "notebooks" / "memory.ipynb"
    assert zimage_run(path, tmp_path / "results", **given, **LEAST) == 0
    (run,) = Store(tmp_path / "results").runs("memory")
    assert list(run.table("ablation")["arm"]) == ["chunked", "submit_early", "streamed 0/1"]
    assert [*scratch.rglob("*.safetensors")] == [] and held == []


def test_the_profile_has_every_stage(ran: Callable[[Path], Run]) -> None:
    """profile_layers records a row for each of the nine stages of the digits model, one for the whole, and memory."""
    run = ran(ROOT / "notebooks" / "profile_layers.ipynb")
    stages = run.table("stages")
    assert set(stages["arm"]) == {backend.default_dtype()}
    prefix, whole = stages[stages["view"] == "prefix"], stages[stages["view"] == "whole"]
    embedders = ["t_embedder", "x_embedder", "cap_embedder"]
    blocks = ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1", "layers.2"]
    assert list(prefix["stage"]) == [*embedders, *blocks, "final_layer"]
    assert list(whole["stage"]) == ["whole step"]
    known = stages.dropna(subset=["time_low_s"])  # none, where it ran with too few rounds for any interval
    assert (known["time_low_s"] <= known["time_s"]).all() and (known["time_s"] <= known["time_high_s"]).all()
    assert whole["parameters"].item() == prefix["parameters"].sum()
    info = sources.describe("digits")
    assert whole["parameters"].item() == sum(np.prod(tensor.shape) for tensor in info.tensors.values())
    assert (pd.concat([prefix, whole])["peak_bytes"] > whole["bytes"].item()).all()
    assert whole["flops"].item() == prefix["flops"].sum() > 0
    assert set(stages[stages["view"] == "depth"]["stage"]) == {"one block", "the rest"}
    beside = {"evaluation start", "profiler overhead", "first call", "kernel build"}
    assert set(stages[stages["view"] == "profiler"]["stage"]) == beside
    memory = run.table("memory").set_index(["stage", "metric"])["bytes"]
    assert 0 < memory["weights", "weight_bytes"] < memory["step", "peak_bytes"]
    assert 0.5 < memory["step", "predicted_peak_bytes"] / memory["step", "peak_bytes"] < 2


def test_the_profile_takes_blocks_apart(ran: Callable[[Path], Run]) -> None:
    """profile_layers times every operation of a modulated and of a plain block, with a signed rest that adds up."""
    run = ran(ROOT / "notebooks" / "profile_layers.ipynb")
    table = run.table("operations")
    assert set(table["stage"]) == {"layers.0", "context_refiner.0"}
    for stage, group in table.dropna(subset=["time_s"]).groupby("stage"):
        names = list(group["operation"])
        assert names[-1] == "unattributed" and ("adaln" in names) == (stage == "layers.0")
        assert {"to_q", "qk_norm", "rope", "sdpa", "swiglu", "w2", "ffn_residual"} <= set(names)
    placed = table[table["operation"] != "unattributed"].dropna(subset=["time_s"])
    assert set(placed["bound"]) <= {"compute", "memory"} and (placed["attained_fraction"] > 0).any()
    modules = run.table("modules").set_index("path")
    whole = run.table("stages").set_index("stage").loc["whole step"]
    assert modules.loc["", "parameters"] == whole["parameters"] and modules.loc["", "flops"] == whole["flops"]
    assert modules.loc["", "time_s"] == whole["time_s"]
    assert modules.loc["layers.0.attention.to_q", "parameters"] == 192 * 192


def test_predictions_are_tested_on_other_sizes(ran: Callable[[Path], Run]) -> None:
    """scaling calibrates with three sizes, and states the error of every size that it held out."""
    run = ran(ROOT / "notebooks" / "scaling.ipynb")
    table = run.table("scaling")
    assert list(table["use"]).count("calibration") == 3 and set(table["use"]) == {"calibration", "held out"}
    assert np.allclose(table["error"], table["predicted_s"] / table["time_s"] - 1)
    assert (table["mfu"] > 0).all() and (table["flops"] > 0).all()


def test_scaling_changes_one_thing_at_a_time(ran: Callable[[Path], Run]) -> None:
    """scaling records a shape of as many tokens, batches, images an hour, sustained times, and the crossing."""
    run = ran(ROOT / "notebooks" / "scaling.ipynb")
    table, alone, crossings = (run.table(name) for name in ("scaling", "axes", "crossover"))
    assert set(alone["axis"]) == {"resolution", "aspect", "batch"}  # a caption of the digits model has one token
    (shape,) = alone[alone["axis"] == "aspect"].to_dict("records")
    assert (shape["height"], shape["width"], shape["beside_height"], shape["beside_width"]) == (8, 32, 16, 16)
    assert shape["predicted_ratio"] == 1 and shape["ratio"] > 0
    hour = 3600 * table["batch"] / (run.parameters["steps"] * table["time_s"])
    assert np.allclose(table["images_per_hour"], hour)
    held = table.dropna(subset=["sustained_s"])
    assert list(held["height"]) == [size[0] for size in run.parameters["sustained_sizes"]]
    assert (held["sustained_low_s"] <= held["sustained_s"]).all() and (held["sustained_images_per_hour"] > 0).all()
    samples = run.table("samples")
    assert set(samples["regime"]) == {"burst", "sustained"} and "canary" in set(samples["kind"])
    assert set(crossings["method"]) == {"FLOPs alone", "calibrated rates", "operations of a block"}
    timed = crossings[crossings["note"] == "measured"]
    assert len(timed) == len(run.parameters["block_sizes"]) and (timed[["attention_s", "linear_s"]] > 0).all(axis=None)
    config = sources.describe("digits").config
    assert crossings.set_index("method")["tokens"]["FLOPs alone"] == crossover.by_flops(config).tokens


def check_samples(ablation: pd.DataFrame, samples: pd.DataFrame, floors: int) -> None:
    """Every row of `ablation` is a trial of its own whose kept samples are four a quad, and then come noise floors."""
    assert not samples.duplicated(["arm", "scope", "trial", "quad", "position"]).any()
    assert samples["trial"].nunique() == len(ablation) + floors
    kept = samples[(samples["kind"] == "sample") & ~samples["dropped"]]
    for trial, (scope, quads) in enumerate(zip(ablation["scope"], ablation["quads"], strict=True)):
        assert set(samples.loc[samples["trial"] == trial, "scope"]) == {scope}
        assert (kept["trial"] == trial).sum() == 4 * quads
    canaries = samples[samples["kind"] == "canary"]
    assert len(canaries) == len(samples[samples["kind"] == "sample"]) / 4 and (canaries["position"] == -1).all()


def test_the_fusion_is_followed_from_the_product_to_the_step(swept: Callable[[Command], Sweep]) -> None:
    """qkv_fusion compares every arm in the scopes that it has, says what each saves there, and computes the same."""
    (run,) = swept(quick(ROOT / "experiments" / "qkv_fusion.yaml")).store.runs("qkv_fusion")
    ablation = run.table("ablation")
    arms_asked, scopes_asked = run.parameters["arms"], run.parameters["scopes"]
    families = ladder.families(arms_asked, scopes_asked)
    wanted = [(one.scope, one.baseline, name) for one in families for name in one.arms]
    assert [tuple(row) for row in ablation[["scope", "baseline", "arm"]].values] == wanted
    samples = run.table("samples")
    baselines = {one.baseline for one in families}
    assert set(samples["arm"]) == {*arms_asked, *baselines, "copy", "canary"}
    check_samples(ablation, samples, floors=len({one.floor for one in families}))
    assert (ablation["noise_floor"] > 0).all()
    saved = run.table("gains")
    assert [tuple(row) for row in saved[["scope", "baseline", "arm"]].values] == wanted
    assert np.allclose(saved["saved_s"], saved["time_s"] * (1 - ablation["ratio"]))
    assert set(saved.loc[saved["scope"] == "step", "blocks"]) == {4}  # three main layers and a noise refiner
    errors = run.table("quality").set_index("arm")["value"]
    assert set(errors.index) == set(arms_asked)
    assert (errors < (1e-5 if backend.default_dtype() == "float32" else 0.05)).all()


@WITHOUT_KERNEL
def test_packed_products_are_fused_and_claims_stay_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On packed digits the rungs are the same, in fp32 exact to rounding, and no published claim is about the run."""
    given = {"quantization": "8bit", "arms": '["fused_qkv", "fused_both"]', "scopes": '["qkv", "qkv_norm", "step"]'}
    assert zimage_run(ROOT / "notebooks" / "qkv_fusion.ipynb", tmp_path, **given, **LEAST, sustained_s=0.05) == 0
    (run,) = Store(tmp_path).runs("qkv_fusion")
    assert list(run.table("ablation")["scope"]) == ["qkv", "qkv_norm", "step", "step", "step"]
    assert list(run.table("ablation")["regime"]) == ["burst"] * 4 + ["sustained"]
    assert len(run.table("gains")) == 4
    assert (run.table("quality")["value"] < 1e-5).all()
    said = capsys.readouterr().out
    assert "not about this model: One fused QKV projection instead of three" in said
    assert (
        "it is about source synthetic:turbo or *Z-Image*, dtype bfloat16, height 1024, width 1024, quantization" in said
    )
    assert "digits: trained weights" in said


def test_a_packing_that_there_is_not_starts_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model does not take is told in one line before a kernel starts, and leaves no failed run."""
    assert zimage_run(ROOT / "notebooks" / "qkv_fusion.ipynb", tmp_path, quantization="9bit") == 2
    line = capsys.readouterr().err
    assert "unknown quantization '9bit'" in line and line.endswith("nothing was started\n") and line.count("\n") == 1
    assert not Store(tmp_path).runs("qkv_fusion")


NOTHING_TO_DO_WITH = [
    ("details", "transforms", "['f']", "transform 'f' is not known; known are fuse_qkv, "),
    ("details", "details", "[bf16_timestep, f]", "details: 'f' is not known; known are all, with_all_ones_mask, "),
    ("details", "details", "[all, bf16_timestep]", "details: 'bf16_timestep' is there twice"),
    ("details", "details", "[]", "details must be a list of names, at least one, found []"),
    ("details", "variables", "['PATH=/']", "a variable of MLX is \"MLX_NAME=VALUE\", found 'PATH=/'"),
    ("details", "draws", "0", "draws must be an integer of at least 1, found 0"),
    ("details", "shift", "0", "shift must be positive and finite, found 0.0"),
    ("fusions", "transforms", "[fast, fuse_qvk]", "transform 'fuse_qvk' is not known; did you mean 'fuse_qkv'?"),
    ("fusions", "transforms", "[fuse_qkv]", "transforms must be two different ones at least, found ['fuse_qkv']"),
    ("fusions", "transforms", "[fast, fuse_qkv]", "transforms must be two different ones at least"),
    ("fusions", "sustained_s", "-1", "sustained_s must be a number of at least 0, found -1.0"),
    ("loading", "rounds", "0", "rounds must be an integer of at least 1, found 0"),
    ("matmuls", "quads", "0", "quads must be an integer from 1 to 40, found 0"),
    ("matmuls", "row_counts", "[]", "row_counts must be a list of integers of at least 1, one at least, found []"),
    ("matmuls", "row_counts", "[8, 0]", "each of row_counts must be an integer of at least 1, found 0"),
    ("memory", "rows", "0", "rows must be an integer of at least 1, found 0"),
    ("memory", "modes", "[8bits]", "unknown quantization '8bits'; known are 2bit, "),
    ("memory", "sizes", "[[8, 8, 1]]", "a size is a list of height, width, batch, caption_tokens, each an integer of"),
    ("memory", "sizes", "[8]", "a size is a list of height, width, batch, caption_tokens, each an integer of"),
    ("memory", "streams", "[[0.5]]", "a stream is a list of the share of main blocks"),
    ("memory", "streams", "[[1.5, 1]]", "a stream is a list of the share of main blocks that stays in memory, from 0 "),
    ("memory", "streams", "[[0.5, -1]]", "blocks read ahead must be an integer of at least 0, found -1"),
    ("memory", "unload", "['load, stop']", "order 'load, stop' is not known; known are 'load, step', "),
    ("memory", "published", "[9bit]", "precision '9bit' is not known; known are all, bfloat16, float32, 2bit, "),
    ("memory", "published", "[[8bit]]", "precision ['8bit'] is not known; known are all, "),
    ("memory", "published_px", "[512, 24]", "height and width of this model's images are multiples of 16, found 24"),
    ("memory", "published_on", "rocm", "device must be cpu, cuda or metal, found 'rocm'"),
    ("pareto", "arms", "[]", "arms must be a list of names, one at least, found []"),
    ("pareto", "arms", "[8bit, 9bit + fast]", "unknown quantization '9bit'; known are 2bit, "),
    ("pareto", "arms", "[8bit + fat]", "transform 'fat' is not known; did you mean 'fast'?"),
    ("pareto", "arms", "[8bit+fast, 4bit, 8bit + fast]", "arm '8bit + fast' is there twice; all must differ"),
    ("pareto", "draws", "0", "draws must be an integer of at least 1, found 0"),
    ("peers", "quads", "100", "quads must be an integer from 1 to 40, found 100"),
    ("peers", "diffusers_options", "[faster]", "diffusers knows no option 'faster'; it knows compile, attention="),
    ("peers", "mflux_options", "[5bit]", "mflux knows no option '5bit'; it knows compile, 4bit, 8bit"),
    ("peers", "power_s", "-1", "power_s must be a number of at least 0, found -1.0"),
    ("profile_layers", "blocks", "[]", "blocks must not be empty; blocks are noise_refiner.N, "),
    ("profile_layers", "blocks", "[layer.0]", "'layer.0' is no block; blocks are noise_refiner.N, "),
    ("profile_layers", "capture", "step", "step: a Metal capture is a .gputrace; name it step.gputrace"),
    ("published_claims", "rows", "0", "rows must be an integer of at least 1, found 0"),
    ("qkv_fusion", "arms", "[fused_kv]", "arms: 'fused_kv' is not known; known are fused_qkv, "),
    ("qkv_fusion", "arms", "[fused_qkv, fused_qkv]", "arms: 'fused_qkv' is there twice; name each once"),
    ("qkv_fusion", "scopes", "[rope, step]", "scopes: 'rope' is not known; known are qkv, "),
    ("qkv_fusion", "scopes", "[qkv]", "scopes must hold 'step', which the verdict is about, found ['qkv']"),
    ("qkv_fusion", "processes", "3", "processes must be 0 or at least 8, found 3"),
    ("quantization", "modes", "[]", "modes must be different ones, one at least, found []"),
    ("quantization", "modes", "[4bit, a/m.yaml, b/m.yaml]", "modes must be different ones, one at least, found"),
    ("loading", "seed", "-1", "seed must be an integer from 0 to 2^64 - 1, found -1"),
    ("scaling", "sizes", "[[8]]", "a size is a list of height, width, batch, caption_tokens, each an integer of"),
    ("scaling", "sizes", "[[8, 8, 1, 1], [16, 16, 1, 1]]", "a calibration needs three different sizes, found 2"),
    ("scaling", "block_sizes", "[[8, 8, 1]]", "a size is a list of height, width, each an integer of at least 1"),
    ("scaling", "sustained_sizes", "[[8, 8]]", "a size is a list of height, width, batch, caption_tokens, each an"),
    ("scaling", "sustained_s", "-1", "sustained_s must be a number of at least 0, found -1.0"),
    ("sensitivity", "packing", "9bit", "unknown quantization '9bit'; known are 2bit, "),
    ("sensitivity", "ladder", "[8bit, 7bit]", "unknown quantization '7bit'; known are 2bit, "),
    ("sensitivity", "budget", "-1", "budget must be a positive number, found -1.0"),
    ("sensitivity", "trajectories", "0", "trajectories must be an integer of at least 1, found 0"),
    ("sensitivity", "correcting", "0", "correcting must be an integer of at least 1, found 0"),
    ("sensitivity", "held_out", "0", "held_out must be an integer of at least 1, found 0"),
    ("sensitivity", "mixes", "0", "mixes must be an integer of at least 1, found 0"),
    ("sensitivity", "recipe_file", "mixed.yam", "'mixed.yam' is no recipe's file; its name ends in .yaml, .yml, .json"),
    ("step_caching", "steps", "1", "steps must be an integer of at least 2, found 1"),
    ("step_caching", "draws", "0", "draws must be an integer of at least 1, found 0"),
    ("step_caching", "thresholds", "[-0.1]", "threshold must be a finite number of at least 0, found -0.1"),
    ("step_caching", "tea", "[[flex, 0.2]]", "polynomial 'flex' is not known; known are none, flux, lumina2, fitted"),
    ("step_caching", "tea", "[flux]", "tea must be a list of [polynomial, threshold] pairs, found ['flux']"),
    ("step_caching", "tea", "[[fitted, -1]]", "threshold must be a finite number of at least 0, found -1"),
    ("step_caching", "every", "[[2, 0.5]]", "every must be a list of [interval, start, stop] lists"),
    ("step_caching", "every", "[[2, 0.5, 0.5]]", "every takes from which to which share of the main blocks, found 0.5"),
    ("step_caching", "every", "[[0, 0, 1]]", "interval must be an integer of at least 1, found 0"),
    ("train_digits", "steps", "0", "steps must be an integer of at least 1, found 0"),
    ("train_digits", "batch", "0", "batch must be an integer of at least 1, found 0"),
    ("train_digits", "learning_rate", "0", "learning_rate must be positive and finite, found 0.0"),
    ("train_digits", "weight_decay", "-1", "weight_decay must be a number of at least 0, found -1.0"),
    ("train_digits", "reports", "-1", "reports must be an integer of at least 0, found -1"),
    ("train_digits", "judged", "19", "judged, where it is not 0, must be an integer of at least 20, found 19"),
]
REFUSED = pytest.mark.parametrize(("notebook", "name", "given", "words"), NOTHING_TO_DO_WITH)


@REFUSED
def test_a_value_that_nothing_can_be_done_with_starts_no_run(
    notebook: str, name: str, given: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told in one line that names the parameter, before a kernel starts, and leaves no failed run."""
    assert zimage_run(ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path, **{name: given}) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"zimage: -p {name}: notebooks/{notebook}.ipynb: {words}") and line.count("\n") == 1
    assert not Store(tmp_path).runs(notebook)


@REFUSED
def test_a_notebook_refuses_it_too(
    notebook: str, name: str, given: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs a notebook without zimage is told the same before anything is loaded."""
    monkeypatch.setattr(zimage, "load_transformer", lambda *_: pytest.fail("it was loaded"))
    read = notebooks.read(ROOT / "notebooks" / f"{notebook}.ipynb", ROOT)
    value = yaml.safe_load(given)
    variables = {one: parameter.default for one, parameter in read.parameters.items()}
    variables[name] = float(value) if type(variables[name]) is float else value
    with pytest.raises(ZImageError, match=f"^{re.escape(words)}") as refused:
        exec(read.code[1], variables)
    assert "\n" not in str(refused.value)


def test_every_change_is_compared_alone_and_left_out(ran: Callable[[Path], Run]) -> None:
    """fusions compares each change and all of them with plain, and all but one with all; each has a first call,

    memory and an error, and in fp32 computes the same to rounding.
    """
    run = ran(ROOT / "notebooks" / "fusions.ipynb")
    ablation = run.table("ablation")
    changes = run.parameters["transforms"]
    wanted = [(name, "plain") for name in (*changes, "together")]
    wanted += [(f"without_{name}", "together") for name in changes]
    assert [tuple(row) for row in ablation[["arm", "baseline"]].values] == wanted
    assert set(ablation["scope"]) == {"step"} and (ablation["noise_floor"] > 0).all()
    samples = run.table("samples")
    first = samples["kind"] == "first call"
    check_samples(ablation, samples[~first], floors=2)
    every = {"plain", *(arm for arm, _ in wanted)}
    assert set(samples.loc[first, "arm"]) == every | {"plain copy", "together copy"}
    sizes = run.table("memory").pivot_table(index="arm", columns="metric", values="bytes")
    assert set(sizes.index) == every and (sizes["peak_bytes"] > sizes["weight_bytes"]).all()
    assert sizes["weight_bytes"].nunique() == 1
    errors = run.table("quality").set_index("arm")["value"]
    assert set(errors.index) == every
    assert (errors < (1e-5 if backend.default_dtype() == "float32" else 0.05)).all()
    assert len(families(ablation)) == 3


def test_every_detail_is_compared_or_left_out_with_its_reason(ran: Callable[[Path], Run]) -> None:
    """details has a row for each, and says of each that changes the output by how much; of the others by none."""
    run = ran(ROOT / "notebooks" / "details.ipynb")
    ablation = run.table("ablation").set_index("arm")
    assert set(ablation.index) == {*run.parameters["details"], *run.parameters["variables"]}
    left = ablation[ablation["ratio"].isna()]
    assert {"captions_512"} <= set(left.index) and left["reason"].str.startswith("left out: ").all()
    timed = ablation.dropna(subset=["ratio"])
    assert (timed["noise_floor"] > 0).all() and set(ablation["baseline"]) == {"plain", "plain process"}
    check_samples(timed[timed["baseline"] == "plain"].reset_index(), of_this_process(run), floors=1)
    quality = run.table("quality")
    errors = quality[(quality["metric"] == "relative_l2_error") & (quality["baseline"] == "plain")].set_index("arm")
    assert set(errors.index) == {*timed.index} & {*practices.ALL} >= {"no_buffer_cache"}
    compiled = errors.index.str.startswith("compile_")
    waits = errors.index.isin(practices.EXECUTION | practices.SETTINGS) & ~compiled
    assert (errors.loc[waits, "value"] == 0).all()
    assert (errors.loc[compiled, "value"] < (1e-5 if backend.default_dtype() == "float32" else 0.05)).all()
    assert errors.loc["zero_pad_tokens", "value"] > 0.1 and errors.loc["bf16_positions", "value"] == 0
    drifted = quality[quality["metric"] == "drift_relative_l2"].groupby("arm")["value"].last()
    assert drifted["bf16_latents"] > 0 and drifted["bf16_positions"] == 0
    assert "plain" in set(quality.loc[quality["baseline"] == "float32", "arm"])


def of_this_process(run: Run) -> pd.DataFrame:
    """The samples of a run of details but for those of the comparison between processes, which come last."""
    samples = run.table("samples")
    others = samples.loc[samples["arm"].isin(["plain process", *run.parameters["variables"]]), "trial"]
    return samples[samples["trial"] < others.min()]


@WITHOUT_KERNEL
def test_orders_of_packed_models_need_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packings, orders that packed models are needed for end the run before anything is loaded."""
    monkeypatch.setattr(zimage, "load_transformer", lambda *_: pytest.fail("it was loaded"))
    given = LEAST | {"modes": "[]", "unload": "['load, pack, step']"}
    assert zimage_run(ROOT / "notebooks" / "memory.ipynb", tmp_path, **given) == 1
    (run,) = Store(tmp_path).runs("memory")
    assert "order 'load, pack, step' is not known" in run.meta["error"] and "\n" not in run.meta["error"]
    assert set(run.tables()) <= {"environment"}


@WITHOUT_KERNEL
def test_some_details_on_the_fast_step(tmp_path: Path) -> None:
    """Details are compared beside other transforms, and those that these rule out are left out with the reason."""
    given = {"details": '["norms_composed", "bf16_timestep", "submit_early"]', "transforms": '["fast"]', **LEAST}
    assert zimage_run(ROOT / "notebooks" / "details.ipynb", tmp_path, **given) == 0
    (run,) = Store(tmp_path).runs("details")
    reasons = run.table("ablation").set_index("arm")["reason"]
    assert "computes residual_norm_modulate by a kernel" in reasons["norms_composed"]
    assert reasons["submit_early"] == (
        "left out: submit_early: the model is so already, which nothing can be compared with"
    )


def live_models() -> dict[int, Transformer]:
    """The models that something still holds, by their ids."""
    gc.collect()
    return {id(found): found for found in gc.get_objects() if isinstance(found, Transformer)}


@pytest.mark.parametrize(
    ("name", "started", "given"),
    [
        ("details", "Resident", {"variables": '["MLX_MAX_OPS_PER_BUFFER=10"]', "details": '["submit_early"]'}),
        ("qkv_fusion", "in_fresh_processes", {"processes": 8, "arms": '["fused_qkv"]', "scopes": '["step"]'}),
    ],
)
@WITHOUT_KERNEL
def test_what_was_measured_is_kept_when_a_process_fails(
    name: str, started: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of their own start when this one holds no model any more, and what they end in loses no table."""
    before, held = live_models(), []

    def failing(*_: Any, **__: Any) -> None:
        held.extend(live_models().keys() - before.keys())
        raise MeasurementError("no room for another process")

    monkeypatch.setattr(measure, started, failing)
    assert zimage_run(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, **given, **LEAST) == 1
    (run,) = Store(tmp_path).runs(name)
    assert "no room for another process" in run.meta["error"] and held == []
    assert len(run.table("ablation")) == 1 and len(run.table("samples")) and len(run.table("quality"))


@WITHOUT_KERNEL
def test_details_draws_in_batches_of_the_timed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many trajectories are judged, no call of a model has more items than the step that is timed."""
    largest, velocity = [0], scheduler.velocity

    def watched(model: Transformer, latents: Any, *others: Any) -> Any:
        largest.append(latents.shape[0])
        return velocity(model, latents, *others)

    monkeypatch.setattr(scheduler, "velocity", watched)
    given = LEAST | {"details": '["bf16_positions"]', "draws": 3, "batch": 2}
    assert zimage_run(ROOT / "notebooks" / "details.ipynb", tmp_path, **given) == 0
    assert max(largest) == 2
    (run,) = Store(tmp_path).runs("details")
    errors = run.table("quality").query("baseline == 'plain' and metric == 'relative_l2_error'")
    assert list(errors["count"]) == [3] and list(errors["value"]) == [0]


@WITHOUT_KERNEL
def test_fusions_takes_packed_models_and_a_hot_device(tmp_path: Path) -> None:
    """A packed model, other sizes and transforms of one's own are compared too, and sustained where asked for."""
    given = {"quantization": "8bit", "sustained_s": 0.05, "height": 8, "width": 16, "batch": 2}
    given |= {"transforms": '["fuse_qkv", "wide_dequantize"]'}
    assert zimage_run(ROOT / "notebooks" / "fusions.ipynb", tmp_path, **given, **LEAST) == 0
    (run,) = Store(tmp_path).runs("fusions")
    ablation = run.table("ablation")
    assert list(ablation["arm"]) == [
        *("fuse_qkv", "wide_dequantize", "together", "without_fuse_qkv", "without_wide_dequantize", "together")
    ]
    assert list(ablation["regime"]) == ["burst"] * 5 + ["sustained"]
    assert len(families(ablation)) == 3


@WITHOUT_KERNEL
def test_a_transformed_model_is_profiled(ran: Callable[[Path], Run], tmp_path: Path) -> None:
    """With transforms a profile's operations are the fused ones, the arm says so, and the FLOPs are the plain ones."""
    changes = [*arms.FAST, "wide_dequantize"]
    path = ROOT / "notebooks" / "profile_layers.ipynb"
    assert zimage_run(path, tmp_path, transforms=json.dumps(changes), power_s=0, **LEAST) == 0
    (run,) = Store(tmp_path).runs(path.stem)
    found = run.table("operations")
    assert set(found["arm"]) == {" + ".join([backend.default_dtype(), *changes])}
    own = {"to_qkv", "w13", "qk_norm_rope", "attention_residual_norm"}
    assert own <= set(found["operation"]) and not {"to_q", "w1", "rope", "ffn_norm1"} & set(found["operation"])
    timed = found[~found["operation"].isin(["unattributed", "join"])]  # the two sequences are joined by no block
    assert timed["time_s"].notna().all() and (timed["flops"] > 0).all() and (timed["bytes"] > 0).all()
    flops = [one.table("stages").set_index("stage").loc["whole step", "flops"] for one in (run, ran(path))]
    assert flops[0] == flops[1]


@WITHOUT_KERNEL
def test_a_transformed_model_scales(tmp_path: Path) -> None:
    """scaling takes transforms too: the arm says which, and FLOPs are those of the plain model."""
    sizes = [[8, 8, 1, 1], [16, 16, 1, 1], [16, 16, 2, 1]]
    path = ROOT / "notebooks" / "scaling.ipynb"
    changes = '["fuse_qkv", "fuse_norm_rope", "submit_early"]'
    assert zimage_run(path, tmp_path, transforms=changes, sizes=str(sizes), **LEAST) == 0
    (run,) = Store(tmp_path).runs(path.stem)
    table = run.table("scaling")
    assert set(table["arm"]) == {f"{backend.default_dtype()} + fuse_qkv + fuse_norm_rope + submit_early"}
    config = sources.describe("digits").config
    assert list(table["flops"]) == [cost.whole(cost.step(config, *size)).flops for size in sizes]


def test_absent_peers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a peer each has a row with its reason, and one line says that none was found and how to name one."""
    given = {"diffusers_python": "/nowhere/python", "power_s": 0, **LEAST}
    assert zimage_run(ROOT / "notebooks" / "peers.ipynb", tmp_path, **given) == 0
    (run,) = Store(tmp_path).runs("peers")
    rows = run.table("ablation").set_index("arm")
    assert rows["ratio"].isna().all() and dict(rows["reason"]) == {
        "diffusers": "left out: /nowhere/python does not have it",
        "mflux": "left out: no mflux_python was given",
    }
    line = "no peer was found to compare zimage with; name an interpreter that has one: "
    line += "--set diffusers_python=PYTHON or --set mflux_python=PYTHON"
    assert line in capsys.readouterr().out
    assert line.removeprefix("n") in (run.path.parent / "index.html").read_text(encoding="utf-8")


def test_published_claims_compares_what_they_are_about(ran: Callable[[Path], Run]) -> None:
    """published_claims compares the arms that qkv_fusion doesn't; only quantized products compute other values."""
    run = ran(ROOT / "notebooks" / "published_claims.ipynb")
    ablation = run.table("ablation")
    assert [tuple(row) for row in ablation[["arm", "baseline", "scope"]].values] == [
        ("no_mask", "all_ones_mask", "step"),
        ("fused_qkv", "fused_qkv_copied", "step"),
        ("quantized_matmul_4bit", "matmul", "matmul"),
        ("quantized_matmul_8bit", "matmul", "matmul"),
    ]
    check_samples(ablation, run.table("samples"), floors=3)
    assert (ablation["noise_floor"] > 0).all()
    errors = run.table("quality").set_index("arm")["value"]
    assert errors["all_ones_mask"] < (1e-6 if backend.default_dtype() == "float32" else 0.02)
    assert errors["fused_qkv_copied"] == 0
    assert 0 < errors["quantized_matmul_8bit"] < 0.02 < errors["quantized_matmul_4bit"] < 0.2


def test_matmuls_compares_the_ways_of_every_layer(ran: Callable[[Path], Run]) -> None:
    """matmuls times each layer of a block in three precisions and over rows, compares ways with the plainest one."""
    run = ran(ROOT / "notebooks" / "matmuls.ipynb")
    full = backend.default_dtype()
    operations = run.table("operations")
    layers = ["to_q", "to_qkv", "to_out", "w1", "w13", "w2"]
    for packing in (full, "8bit", "4bit"):
        stages = operations[(operations["arm"] == packing) & operations["stage"].str.startswith(packing)]
        assert list(dict.fromkeys(stages["operation"].str.split(":").str[0])) == layers
        swept_rows = operations.loc[operations["stage"] == f"w1, {packing}, by rows", "operation"].str.split(" ").str[0]
        counts = [str(count) for count in run.meta["parameters"]["row_counts"]]
        assert list(dict.fromkeys(swept_rows)) == ([] if packing == "8bit" else counts)
    assert (operations["time_s"] > 0).all() and (operations["attained_fraction"] > 0).any()
    ablation = run.table("ablation")
    products = ablation[~ablation["scope"].str.startswith("step")]
    whole = products[products["scope"].str.contains(full)]
    assert set(whole["scope"]) == {f"w1, {full}, 1056 rows"}
    assert set(whole["arm"]) == {"rows split", "padded"} and set(whole["baseline"]) == {"whole"}
    assert len(set(products.loc[products["scope"].str.contains("bit"), "baseline"])) == 1
    samples = run.table("samples")
    check_samples(ablation, samples, floors=ablation["scope"].nunique())
    assert (ablation["noise_floor"] > 0).all()
    if "quality" in run.tables():
        assert (run.table("quality")["value"] < (1e-5 if full == "float32" else 0.05)).all()
    assert set(run.meta["choices"])


def test_quantization_weighs_speed_size_and_pictures(ran: Callable[[Path], Run]) -> None:
    """quantization records time, bytes, error and recognised digits of 8 and 4 bits, and a picture of every arm."""
    run = ran(ROOT / "notebooks" / "quantization.ipynb")
    full = backend.default_dtype()
    ablation = run.table("ablation")
    assert (list(ablation["arm"]), set(ablation["baseline"])) == (["8bit", "4bit"], {full})
    assert set(ablation["scope"]) == {"step"}
    sizes = run.table("memory").pivot_table(index="arm", columns="metric", values="bytes")
    weights, peaks = sizes["weight_bytes"], sizes["peak_bytes"]
    assert set(sizes.index) == {full, "8bit", "4bit"}
    assert weights["4bit"] < weights["8bit"] < weights[full]
    assert (peaks >= weights).all()
    table = run.table("quality")
    assert set(table["weights_kind"]) == {"trained"}
    quality = table.pivot_table(index="arm", columns="metric", values="value")
    assert 0 < quality["relative_l2_error"]["8bit"] < quality["relative_l2_error"]["4bit"] < 0.5
    assert quality["digit_accuracy"][full] >= 0.9
    assert quality["digit_accuracy"].between(0, 1).all()
    assert (quality["repeat_difference"] == 0).all()
    assert quality["frechet_distance"].between(0, 20).all()
    assert 0 < quality["drift_relative_l2"]["8bit"] < quality["drift_relative_l2"]["4bit"] < 0.5
    pictures = {picture.name: picture for picture in run.pictures()}
    side_by_side = pictures.pop("digits_side_by_side")
    with Image.open(side_by_side.path) as image:
        assert image.width > 500 and image.height > 4 * 32
    assert set(pictures) == {f"digits_{arm}" for arm in ("float32", "bfloat16", "8bit", "4bit")}
    for picture in pictures.values():
        assert f"of {run.parameters['draws']} recognised" in picture.caption
        with Image.open(picture.path) as image:
            assert len(np.unique(np.asarray(image))) > 10


def test_quantization_says_what_errors_are_against(ran: Callable[[Path], Run]) -> None:
    """Velocities are judged against float32 and bfloat16, drift after every step; what has seeds has an interval."""
    run = ran(ROOT / "notebooks" / "quantization.ipynb")
    table = run.table("quality")
    errors = table[table["metric"].isin(["relative_l2_error", "cosine_similarity", "snr_db"])]
    against = errors.groupby("arm")["baseline"].apply(set).to_dict()
    assert against == {"bfloat16": {"float32"}, "8bit": {"float32", "bfloat16"}, "4bit": {"float32", "bfloat16"}}
    drift = table[table["metric"].str.startswith("drift_")]
    assert set(drift["baseline"]) == {"float32"}
    assert set(drift["step"]) == set(range(1, run.parameters["steps"] + 1))
    sure = table[~table["metric"].isin(["repeat_difference"])]
    assert ((sure["low"] <= sure["high"]) & (sure["count"] > 1)).all()


@pytest.mark.parametrize(
    ("name", "source", "pixels"),
    [
        ("profile_layers", "synthetic:tiny", 32),
        ("qkv_fusion", "synthetic:tiny", 32),
        ("quantization", "synthetic:small", 32),
        ("published_claims", "synthetic:small", 32),
        ("matmuls", "synthetic:small", 32),
    ],
)
@WITHOUT_KERNEL
def test_notebooks_take_other_models(name: str, source: str, pixels: int, tmp_path: Path) -> None:
    """On synthetic weights, non-square and in a batch, each notebook completes, records the same tables, draws none."""
    sizes = {"source": source, "height": pixels, "width": 2 * pixels, "batch": 2, "caption_tokens": 3}
    assert zimage_run(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, **sizes, **LEAST) == 0
    (run,) = Store(tmp_path).runs(name)
    assert run.meta["weights"]["kind"] == "synthetic"
    wanted = {"profile_layers": {"stages", "memory"}, "quantization": {"ablation", "memory", "quality"}}
    wanted["matmuls"] = {"operations", "ablation"}
    assert set(run.tables()) >= wanted.get(name, {"ablation", "quality"}) | {"samples", "environment"}
    assert run.pictures() == []
    if "quality" in run.tables():
        quality = run.table("quality")
        assert "relative_l2_error" in set(quality["metric"]) and set(quality["weights_kind"]) == {"synthetic"}
        assert not quality["metric"].str.startswith(("digit", "frechet")).any()


@WITHOUT_KERNEL
def test_the_profile_refuses_before_it_measures(tmp_path: Path) -> None:
    """A block that the model lacks ends the run before any time was taken."""
    path = ROOT / "notebooks" / "profile_layers.ipynb"
    assert zimage_run(path, tmp_path, blocks='["layers.9"]', **LEAST) == 1
    (run,) = Store(tmp_path).runs("profile_layers")
    assert "no block" in run.meta["error"]
    assert "stages" not in run.tables()


@WITHOUT_KERNEL
def test_scaling_refuses_before_it_measures(tmp_path: Path) -> None:
    """Sustained sizes that are none of the sizes end the run before a model is loaded."""
    given = {**LEAST, "sustained_sizes": "[[9, 9, 1, 1]]"}
    assert zimage_run(ROOT / "notebooks" / "scaling.ipynb", tmp_path, **given) == 1
    (run,) = Store(tmp_path).runs("scaling")
    assert "sustained_sizes must be among the sizes" in run.meta["error"] and set(run.tables()) <= {"environment"}


@WITHOUT_KERNEL
def test_three_sizes_are_calibrated_with_and_none_is_held_out(tmp_path: Path) -> None:
    """scaling completes with the three sizes that it needs, and says nothing of errors that it has not measured."""
    path = ROOT / "notebooks" / "scaling.ipynb"
    assert zimage_run(path, tmp_path, sizes="[[8, 8, 1, 1], [16, 16, 1, 1], [16, 16, 2, 1]]", **LEAST) == 0
    (run,) = Store(tmp_path).runs("scaling")
    assert list(run.table("scaling")["use"]) == ["calibration"] * 3


def test_loading_writes_a_synthetic_model_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without files is written as bfloat16 and loaded from there; nothing of it is left behind."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    results = tmp_path / "results"
    assert zimage_run(ROOT / "notebooks" / "loading.ipynb", results, source="synthetic:tiny", **LEAST) == 0
    (run,) = Store(results).runs("loading")
    rows = run.table("loading")
    assert list(rows["arm"]) == ["plain read", "zimage", "mlx"]
    parameters = sum(sources.describe("synthetic:tiny").parameters().values())
    assert set(rows["result_bytes"]) == {2 * parameters}
    assert [*scratch.rglob("*.safetensors")] == []


def test_what_cannot_be_quantized_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model's widths don't fit groups of 64: the run fails with a line that names layer, width and group."""
    path = ROOT / "notebooks" / "quantization.ipynb"
    assert zimage_run(path, tmp_path, source="synthetic:tiny", height=32, width=32, **LEAST) == 1
    (run,) = Store(tmp_path).runs("quantization")
    said = capsys.readouterr()
    assert run.meta["error"].startswith("InputError: ")
    assert "input width 170 is not divisible by the group size 64 of 8bit; use a smaller group" in run.meta["error"]
    assert "\n" not in run.meta["error"]
    assert run.meta["error"] in said.out + said.err


def test_papermill_alone_runs_a_notebook_from_anywhere(tmp_path: Path) -> None:
    """papermill without zimage's runner, in another folder, executes a notebook; its tables are shown in the output."""
    variables = {**environment(), "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jp")}
    line = [sys.executable, "-W", "ignore", "-m", "papermill", str(ROOT / "notebooks" / "profile_layers.ipynb")]
    line += ["out.ipynb", "-p", "rounds", "1", "-k", "python3", "--no-progress-bar"]
    done = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.get("outputs", [])]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    shown = "".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert "noise_refiner.0" in shown and "whole step" in shown
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["out.ipynb"]
    assert not (tmp_path / "results").exists()
