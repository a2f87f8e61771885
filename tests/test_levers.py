"""Arms made from their names: what is shared, what is packed, and what is refused before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.sweeping import LEAST, ROOT, Command, Sweep, quick
from zimage import cli, inputs, levers, load_transformer, recipes, sources
from zimage.analysis import pareto
from zimage.analysis.findings import findings
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.lab import notebook as notebooks
from zimage.lab.store import Store
from zimage.levers import Lever
from zimage.transformer import Transformer, weight_bytes
from zimage.weights import convert

import mlx.core as mx
import pytest


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_transformer("digits", "float32")


def test_a_name_says_what_the_arm_is(model: Transformer) -> None:
    """The precision packs the baseline's weights or loads them anew, the transforms follow, the baseline stays."""
    example = inputs.example(model, "digits", 8, 8, 2, 1, 0)
    wanted = model(*example)
    made = {
        name: levers.made(Lever.parse(name), model, "digits", example)
        for name in ("float32", "float32 + fuse_qkv", "bfloat16", "4bit", "4bit+fuse_qkv")
    }
    assert mx.array_equal(made["float32"](*example), wanted)
    assert mx.allclose(made["float32 + fuse_qkv"](*example), wanted, atol=1e-4)
    assert made["bfloat16"].dtype == mx.bfloat16
    assert weight_bytes(made["4bit"]) == weight_bytes(made["4bit+fuse_qkv"]) < 0.4 * weight_bytes(model)
    assert "to_qkv" in made["4bit+fuse_qkv"].layers[0].attention and "to_qkv" not in model.layers[0].attention
    assert mx.array_equal(model(*example), wanted)
    assert str(Lever.parse("4bit+fuse_qkv")) == "4bit + fuse_qkv"
    assert str(Lever.parse("recipes/mixed.yaml+fuse_qkv")) == "mixed + fuse_qkv"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "arms must be a list of names, one at least"),
        ("8bit", "arms must be a list"),
        ([3], "found 3"),
        (["8bit + "], "a precision and transforms"),
        (["9bit"], "unknown quantization '9bit'"),
        (["8bit + fat"], "transform 'fat' is not known"),
        (["8bit", "4bit", "8bit"], "arm '8bit' is there twice"),
        (["4bit", "float32"], "arm 'float32' is there twice; the baseline is 'float32'"),
        (["8bit+fast", "8bit + fast"], "there twice"),
        (["a/mixed.yaml", "b/mixed.yaml"], "arm 'mixed' is there twice"),
        (["lost.yaml + fast"], "lost.yaml: no such file"),
        (["4bit-g128"], "not divisible by the group size 128"),
    ],
)
def test_arms_that_cannot_be_are_refused(names: Any, words: str) -> None:
    """Names that are none, unknown, twice there or of packings that do not fit are one clear line."""
    config: TransformerConfig = sources.describe("digits").config
    with pytest.raises(InputError, match=words) as caught:
        levers.named(names, config, "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("in_process")
def test_the_notebook_takes_other_models(tmp_path: Path) -> None:
    """Synthetic weights in bfloat16, in a batch, one draw: every arm is placed, none surely, and nothing is trained."""
    given = {
        "source": "synthetic:small",
        "dtype": "bfloat16",
        "height": 32,
        "width": 64,
        "batch": 2,
        "caption_tokens": 3,
    }
    given |= {"arms": json.dumps(["float32", "8bit + fuse_qkv", "4bit"])}
    path = ROOT / "notebooks" / "pareto.ipynb"
    known = notebooks.read(path, ROOT).parameters
    asked = {name: value for name, value in (LEAST | given).items() if name in known}
    line = [text for name, value in asked.items() for text in ("-p", name, f"{value}")]
    assert cli.main(["run", str(path), *line, "--results", str(tmp_path)]) == 0
    (run,) = Store(tmp_path).runs("pareto")
    table = run.table("pareto").set_index("arm")
    assert set(table.index) == {"bfloat16", "float32", "8bit + fuse_qkv", "4bit"}
    assert set(table["weights_kind"]) == {"synthetic"} and set(table["baseline"]) == {"bfloat16"}
    assert table["error_low"].isna().all() and not (table["category"] == "dominated").any()
    assert table["error"]["float32"] == 0 < table["error"]["bfloat16"]
    (found, *_) = findings({"pareto": run.table("pareto")})
    assert "could not be decided" in found.text and "no arm surely dominates another" in found.text


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["pareto", "quantization", "memory"])
def test_a_recipe_is_an_arm(name: str, tmp_path: Path) -> None:
    """A recipe's file is an arm like a packing, alone and in a fast step, under its name without folder and ending."""
    file, label = ROOT / "experiments" / "recipes" / "as_small_as_4bit.yaml", "as_small_as_4bit"
    given: dict[str, Any] = {"modes": json.dumps([f"{file}"]), "draws": 6, "steps": 2, "quads": 1}
    given |= {"arms": json.dumps(["4bit", f"{file}", f"{file} + fast"]), "streams": "[[0.0, 1]]"}
    given |= {"unload": '["pack while loading, step"]', "sizes": "[[8, 8, 1, 1]]"}
    path = ROOT / "notebooks" / f"{name}.ipynb"
    known = notebooks.read(path, ROOT).parameters
    line = [text for key, value in given.items() if key in known for text in ("-p", key, f"{value}")]
    assert cli.main(["run", str(path), *line, "--results", str(tmp_path)]) == 0
    (run,) = Store(tmp_path).runs(name)
    assert run.meta["recipes"] == {label: recipes.read(file).content}
    arms = {
        "pareto": {"4bit", label, f"{label} + fast"},
        "quantization": {label},
        "memory": {"chunked", "submit_early", "streamed 0/1", label, f"{label} streamed 0/1"},
    }[name]
    assert set(run.table("ablation")["arm"]) == arms
    errors = run.table("quality")
    error = errors[errors["metric"].str.contains("relative_l2") & (errors["arm"] == label)]["value"]
    assert error.between(0.001, 0.1).all() and len(error)
    sizes = run.table("memory")
    weights = sizes[(sizes["metric"] == "weight_bytes") & (sizes["stage"] == "weights")].set_index("arm")["bytes"]
    assert weights[label] < 0.4 * weights.max()
    if name == "pareto":
        assert weights[label] <= weights["4bit"]


@pytest.mark.usefixtures("in_process")
def test_the_notebook_refuses_packed_weights(tmp_path: Path) -> None:
    """Weights that are packed already have no float32 to be measured against: one line, before they are loaded."""
    stored = convert("digits", tmp_path / "packed", "float32", "8bit")
    path = ROOT / "notebooks" / "pareto.ipynb"
    assert cli.main(["run", str(path), "-p", "source", str(stored), "--results", str(tmp_path / "results")]) == 1
    (run,) = Store(tmp_path / "results").runs("pareto")
    assert "is packed already: take its floating-point weights" in run.meta["error"]
    assert set(run.tables()) <= {"environment"}


def test_the_notebook_places_every_arm(swept: Callable[[Command], Sweep]) -> None:
    """Its quick run records time, memory, error and category of every arm and of the baseline, which agree."""
    (run,) = swept(quick(ROOT / "experiments" / "pareto.yaml")).store.runs("pareto")
    table = run.table("pareto").set_index("arm")
    arms = {"float32 + fast", "8bit", "4bit", "4bit + reuse_every_2nd"}
    assert set(table.index) == {"float32", *arms} and set(table["category"]) <= set(pareto.CATEGORIES)
    assert set(table["weights_kind"]) == {"trained"} and set(table["baseline"]) == {"float32"}
    ablation = run.table("ablation").set_index("arm")
    assert set(ablation.index) == arms
    assert (table["time_ratio"][ablation.index] == ablation["ratio"]).all()
    assert tuple(table.loc["float32", ["time_ratio", "error"]]) == (1, 0)
    sizes = run.table("memory").pivot_table(index="arm", columns="metric", values="bytes")
    assert (table["bytes"] == sizes["peak_bytes"][table.index]).all() and (
        sizes["peak_bytes"] > sizes["weight_bytes"]
    ).all()
    assert sizes["weight_bytes"]["4bit"] < sizes["weight_bytes"]["8bit"] < sizes["weight_bytes"]["float32"]
    errors = table["error"]
    assert 0 < errors["8bit"] < errors["4bit"] < errors["4bit + reuse_every_2nd"]
    assert ((table["error_low"] <= errors) & (errors <= table["error_high"])).all()
