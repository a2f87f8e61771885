"""Sensitivity: what single changes are found to do, how they add up, and the recipes that are made of that."""

import itertools
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.sweeping import ROOT, Command, Sweep, quick
from tests.test_weights import arrays, same_bits
from zimage import inputs, mixing, recipe_files, recipes, sensitivity, transforms, weights
from zimage.analysis import answers, sensitivity_plots
from zimage.config import TransformerConfig
from zimage.errors import InputError, MeasurementError
from zimage.lab.store import Run
from zimage.mixing import Choice, Mix, fewest_bytes, least_error
from zimage.quantization import Quantization
from zimage.recipes import Recipe
from zimage.sensitivity import Damage, Reference, Single
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), n_layers=2)
FOUR, EIGHT, TWO = (Quantization.parse(name) for name in ("4bit", "8bit", "2bit"))


def reference(model: Transformer, steps: int = 2, count: int = 2, seed: int = 0, batch: int = 2) -> Reference:
    captions = mx.random.normal((count, 3, model.config.cap_feat_dim), key=mx.random.key(1))
    return Reference(model, captions, (4, 4), steps, 1.0, seed, batch)


@pytest.fixture(scope="module")
def plain() -> Reference:
    return reference(Transformer(CONFIG))


@pytest.fixture(scope="module")
def singles(plain: Reference) -> list[Single]:
    found = [*sensitivity.layers(plain, [FOUR, EIGHT], [FOUR]), *sensitivity.blocks(plain, FOUR)]
    return [*found, *sensitivity.block_steps(plain, found)]


def test_a_layer_alone_does_what_the_packed_model_does(plain: Reference, singles: list[Single]) -> None:
    """Velocities computed from the packed block on, and ends from there, are those of a model with that packed."""
    of_four = [s for s in singles if s.quantization == FOUR and s.step is None]
    assert [s.unit for s in of_four if s.kind == "layer"] == list(sensitivity.linears(plain.model))
    for single in (of_four[1], of_four[-1]):
        rule = {"pattern": single.unit + ".*" * (single.kind == "block"), "quantization": "4bit"}
        packed = transforms.quantize(plain.model, {"rules": [rule]})
        assert np.allclose(plain.velocity(packed).squared, single.velocity.squared, rtol=1e-3)
        assert single.end is not None and math.isclose(plain.end(packed).error, single.end.error, rel_tol=1e-3)
        held = [sum(array.nbytes for array in arrays(model).values()) for model in (plain.model, packed)]
        assert single.bytes_saved == held[0] - held[1] > 0


def test_more_bits_do_less_damage(singles: list[Single]) -> None:
    """Every layer errs less at 8 bits than at 4."""
    errors = {(s.unit, s.quantization): s.velocity.error for s in singles if s.kind == "layer"}
    assert all(errors[unit, EIGHT] < errors[unit, FOUR] for unit, _ in errors)


def test_a_block_in_one_step(plain: Reference, singles: list[Single]) -> None:
    """Squared errors of the velocity in single steps sum up to the block's, and an end is that of a run with one step

    drawn by the packed model.
    """
    for block in (s for s in singles if s.kind == "block" and s.step is None):
        steps = [s for s in singles if s.unit == block.unit and s.step is not None]
        assert [s.step for s in steps] == [0, 1]
        assert math.isclose(sum(s.velocity.squared_error for s in steps), block.velocity.squared_error)
    packed = transforms.quantize(plain.model, {"rules": [{"pattern": "layers.0.*", "quantization": "4bit"}]})
    (last,) = (s.end for s in singles if (s.unit, s.step) == ("layers.0", 1))
    assert last is not None and math.isclose(plain.end(packed, step=1).error, last.error, rel_tol=1e-3)
    (first,) = (s.end for s in singles if (s.unit, s.step) == ("layers.0", 0))
    velocity = mx.concatenate([packed(*point) for point in plain.points[:1]])
    assert first is not None and math.isclose(plain.end(first=velocity).error, first.error, rel_tol=1e-3)


def exact(model: Transformer, but: tuple[str, ...]) -> Transformer:
    """The model with weights that 4 bits hold exactly, those of the layers `but` excepted."""
    new = transforms.cast(model, "float32")
    random = np.random.default_rng(0)
    for path, block in transforms.blocks(new):
        for name, layer in block.named_modules():
            if hasattr(layer, "weight") and layer.weight.ndim == 2 and f"{path}.{name}" not in but:
                rows, width = layer.weight.shape
                levels = random.integers(0, 16, (rows, width // 64, 64))
                levels[..., 0], levels[..., 1] = 0, 15  # so that a group's range is all of it
                layer.weight = mx.array(((levels - 8) / 64).reshape(rows, width).astype(np.float32))
    return new


def test_damage_is_found_where_it_was_planted() -> None:
    """Of layers that 4 bits hold exactly none errs; the one that is not held is last in the ranking, and its error is

    its block's and the whole model's: squared errors add up to a ratio of 1.
    """
    planted = "layers.1.feed_forward.w2"
    own = reference(exact(Transformer(CONFIG), (planted,)), steps=1, count=1)
    found = [*sensitivity.layers(own, [FOUR], [FOUR]), *sensitivity.blocks(own, FOUR)]
    errors = {s.unit: s.velocity.error for s in found if s.kind == "layer"}
    assert errors.pop(planted) > 1e-3 > 100 * max(errors.values())
    assert sensitivity.ranked([s for s in found if s.kind == "layer"])[-1].unit == planted
    whole = sensitivity.packed(own.model, Recipe(FOUR))
    rows = sensitivity.sums(found, own.velocity(whole), own.end(whole))
    (inside,) = (r for r in rows if r.what == sensitivity.WITHIN and r.of == "velocity" and r.predicted > 1e-3)
    (together,) = (r for r in rows if r.what == sensitivity.TOGETHER and r.of == "velocity")
    assert (inside.changes, together.changes) == (8, 4)
    assert abs(inside.ratio - 1) < 0.02 and abs(together.ratio - 1) < 0.02


def test_errors_that_are_alike_in_every_step_add_up_to_more() -> None:
    """Where a velocity depends on neither latents nor timestep, a block's S equal errors make S times their sum."""
    model = Transformer(CONFIG)
    model.all_x_embedder["2-1"].weight = mx.zeros_like(model.all_x_embedder["2-1"].weight)
    model.t_embedder.mlp[2].weight = mx.zeros_like(model.t_embedder.mlp[2].weight)
    own = reference(model, steps=3, count=1)
    (block, *_) = (s for s in sensitivity.blocks(own, FOUR) if s.unit == "layers.0")
    rows = sensitivity.sums([block, *sensitivity.block_steps(own, [block])])
    (over_steps,) = (r for r in rows if r.what == sensitivity.OVER_STEPS)
    assert over_steps.changes == 3 and abs(over_steps.ratio - 3) < 0.01


def test_ranking() -> None:
    """What is ranked by is squared error a byte saved."""

    def single(unit: str, saved: int, error: float) -> Single:
        return Single(unit, "layer", FOUR, None, saved, Damage(np.array([error**2]), np.array([1.0])), None)

    found = sensitivity.ranked([single("a", 100, 0.2), single("b", 1000, 0.4), single("c", 10, 0.05)])
    assert [s.unit for s in found] == ["b", "c", "a"]
    assert [s.damage_per_byte for s in found] == pytest.approx([1.6e-4, 2.5e-4, 4e-4])


def test_one_layer_is_packed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is packed, no other is still there, and all other arrays are the reference's own."""
    model = Transformer(CONFIG)
    mine = {id(array) for array in arrays(model).values()}
    alive: list[weakref.ref[Any]] = []
    quantize = transforms.quantize

    def watched(model: Transformer, recipe: Any) -> Transformer:
        assert [one for one in alive if one() is not None] == []
        made = quantize(model, recipe)
        new = [name for name, array in arrays(made).items() if id(array) not in mine]
        assert {name.rpartition(".")[0] for name in new} == {rule.pattern for rule in recipe.rules}
        alive.extend(weakref.ref(layer) for layer in made.modules() if hasattr(layer, "scales"))
        return made

    monkeypatch.setattr(transforms, "quantize", watched)
    sensitivity.layers(reference(model, steps=1, count=1), [FOUR], [FOUR])
    assert len(alive) == len(PATHS)


def test_what_is_refused(plain: Reference) -> None:
    """Packed models, a batch of none, no random mixes and errors of nothing are each one line."""
    with pytest.raises(InputError, match="packed"):
        reference(transforms.quantize(plain.model, "4bit"))
    with pytest.raises(InputError, match="batch"):
        reference(plain.model, batch=0)
    with pytest.raises(MeasurementError, match="random mix"):
        sensitivity.factor([])
    nothing = plain.velocity(plain.model)
    assert nothing.error == 0.0
    with pytest.raises(MeasurementError, match="ratio of errors"):
        sensitivity.compare(nothing, nothing)


def test_a_recipe_is_corrected_until_it_fits_the_budget(plain: Reference, singles: list[Single]) -> None:
    """A factor that promises too little or too much error is corrected by what is measured; a budget that nothing meets

    is one line.
    """
    available = sensitivity.choices(plain, singles, unpacked=False)
    budget = 1.05 * plain.velocity(sensitivity.packed(plain.model, Recipe(EIGHT))).error + 0.02
    for wrong in (0.1, 10.0):
        found = sensitivity.within_error(plain, available, budget, factor=wrong)
        assert found.rounds > 0 and 0.8 * budget < found.velocity.error <= budget
    assert set(sensitivity.counted(found.mix)) == {"4bit", "8bit"}
    with pytest.raises(
        InputError, match=r"^error budget 1e-06 can't be met: .* allow that, or offer packings"
    ) as caught:
        sensitivity.within_error(plain, available, 1e-6)
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="error budget must be a positive number, found nan"):
        sensitivity.within_error(plain, available, math.nan)
    bytes_of_four = sensitivity.block_bytes(plain, FOUR)
    assert sensitivity.within_bytes(plain, available, bytes_of_four).mix.bytes == bytes_of_four
    with pytest.raises(InputError, match=r"^byte budget [\d,]+ can't be met: .* packings of fewer bits"):
        sensitivity.within_bytes(plain, available, bytes_of_four - 1)


LADDER = (None, EIGHT, FOUR, TWO)
COSTS = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).map(sorted)


def offered(costs: list[list[float]]) -> dict[str, list[Choice]]:
    sizes = (16, 8, 4, 2)
    return {
        f"layers.{i}.w": [Choice(*one) for one in zip(LADDER, sizes, own, strict=True)] for i, own in enumerate(costs)
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(COSTS, min_size=1, max_size=4), st.floats(0.05, 2.0))
def test_no_smaller_mix_of_the_hull_is_as_good(costs: list[list[float]], most_error: float) -> None:
    """A mix keeps to its budget, and has as few bytes as any, but for less than one step of one layer."""
    available = offered(costs)
    every = [Mix(dict(zip(available, some, strict=True))) for some in itertools.product(*available.values())]
    if min(mix.error for mix in every) > most_error:
        with pytest.raises(InputError, match="can't be met"):
            fewest_bytes(available, most_error)
        return
    found = fewest_bytes(available, most_error)
    best = min(mix.bytes for mix in every if mix.error <= most_error)
    assert found.error <= most_error + 1e-9 and best <= found.bytes < best + 16
    back = least_error(available, found.bytes)
    assert back.bytes <= found.bytes
    assert back.error <= max(mix.error for mix in every if mix.bytes <= found.bytes) + 1e-9


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "0.1"])
def test_budgets_are_positive_numbers(bad: Any) -> None:
    """A budget or factor that is no positive number is refused by its name."""
    available = offered([[0.0, 0.1, 0.2, 0.3]])
    with pytest.raises(InputError, match="error budget must be a positive number"):
        fewest_bytes(available, bad)
    with pytest.raises(InputError, match="byte budget must be a positive number"):
        least_error(available, bad)
    with pytest.raises(InputError, match="factor must be a positive number"):
        fewest_bytes(available, 1.0, bad)


PATHS = list(sensitivity.linears(Transformer(CONFIG)))


@settings(max_examples=40, deadline=None)
@given(st.lists(COSTS, min_size=len(PATHS), max_size=len(PATHS)), st.floats(0.05, 2.0))
def test_fusable_recipes_pack_alike_what_fusing_joins(costs: list[list[float]], most_error: float) -> None:
    """Layers of one product share a choice; bytes and errors are those of the layers, and fusing takes the packing."""
    sizes = (16, 8, 4, 2)
    available = {
        path: [Choice(*one) for one in zip(LADDER, sizes, own, strict=True)]
        for path, own in zip(PATHS, costs, strict=True)
    }
    offered = mixing.fusable(available)
    assert len(offered) == len(PATHS) - 3 * len({path.rpartition(".")[0] for path in PATHS if path.endswith("to_q")})
    least = mixing.finest(available)
    assert math.isclose(mixing.finest(offered).error, least.error, abs_tol=1e-9)  # nothing packed is best for each
    mix = fewest_bytes(offered, least.error + most_error)
    packing = mix.packing
    assert set(packing) == set(PATHS)
    at = {path: next(c for c in available[path] if c.quantization == way) for path, way in packing.items()}
    assert mix.bytes == sum(choice.bytes for choice in at.values())
    assert math.isclose(mix.error, Mix(at).error, abs_tol=1e-9)
    found = recipes.packing(CONFIG, mix.recipe)
    for path in PATHS:
        parent, _, name = path.rpartition(".")
        if name in ("to_q", "w1"):
            recipes.of_layer(found, f"{parent}.{'to_qkv' if name == 'to_q' else 'w13'}")  # or raises


def test_what_fusing_cannot_join_stays_apart() -> None:
    """A layer without its fellows keeps its choices, and fellows offer together what all of them have."""
    one = [Choice(FOUR, 4, 0.2), Choice(EIGHT, 8, 0.1)]
    alone = {"layers.0.feed_forward.w1": one, "layers.0.feed_forward.w2": one}
    assert mixing.fusable(alone) == alone
    both = {**alone, "layers.0.feed_forward.w3": one[:1]}
    assert mixing.fusable(both) == {
        "layers.0.feed_forward.w13": [Choice(FOUR, 8, 0.4)],
        "layers.0.feed_forward.w2": one,
    }


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from([None, EIGHT, FOUR, Quantization.parse("mxfp4")]), min_size=len(PATHS), max_size=len(PATHS)
    )
)
def test_a_recipe_file_means_the_packing_it_was_made_of(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[Quantization | None]
) -> None:
    """Any packing of all layers comes back from the YAML and the JSON file of its recipe, whatever its comments say."""
    wanted = dict(zip(PATHS, chosen, strict=True))
    folder = tmp_path_factory.getbasetemp()
    for name in ("mixed.yaml", "mixed.json"):
        path = recipe_files.write(folder / name, mixing.recipe(wanted), ["why: {[\n", "\0 % &"])
        assert recipes.read(path) == mixing.recipe(wanted)
        found = recipes.packing(CONFIG, path)
        assert found == {layer: one for layer, one in wanted.items() if one is not None}


def test_recipes_are_short(tmp_path: Path) -> None:
    """One packing for all is a default, a block that differs is one rule, and a layer in it that differs one more."""
    alike = dict.fromkeys(PATHS, FOUR)
    assert mixing.recipe(alike) == Recipe(FOUR)
    other = {path: EIGHT if path.startswith("layers.1.") else FOUR for path in PATHS}
    other["layers.1.attention.to_q"] = TWO
    assert [rule.pattern for rule in mixing.recipe(other).rules] == ["layers.1.*", "layers.1.attention.to_q"]
    text = recipe_files.text(mixing.recipe(other), ["chosen for a budget"])
    assert text.splitlines()[:2] == ["# chosen for a budget", "default: 4bit"] and len(text.splitlines()) == 5
    for name, words in (("a.txt", "no recipe's file"), ("none/a.yaml", "cannot be written")):
        with pytest.raises(InputError, match=words):
            recipe_files.write(tmp_path / name, Recipe(FOUR))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(swept: Callable[[Command], Sweep]) -> Run:
    """The quick run of the experiment, on digits."""
    (found,) = swept(quick(ROOT / "experiments" / "sensitivity.yaml")).store.runs("sensitivity")
    return found


def test_on_digits_a_recipe_beats_uniform_4_bit(run: Run) -> None:
    """On seeds it was not chosen on, the recipe has no more bytes than 4 bits for all and less error, beyond doubt."""
    quality, memory = run.table("quality"), run.table("memory")
    assert set(quality["weights_kind"]) == {"trained"} and run.parameters["packing"] == "4bit"
    sizes = memory.set_index("arm")["bytes"]
    errors = quality[quality["metric"] == "relative_l2_error"].set_index("arm")["value"]
    ends = quality[quality["metric"] == "drift_relative_l2"].set_index("arm")["value"]
    ratios = quality[quality["metric"] == "error_ratio"].set_index("arm")
    within, small = ratios.index
    assert sizes[small] <= sizes["4bit"]
    assert errors[small] < errors["4bit"] and ends[small] < ends["4bit"] and ratios.loc[small, "high"] < 1
    assert errors[within] < errors["4bit"] and sizes[within] < sizes["6bit"]


def test_recipes_are_judged_where_nothing_was_chosen(run: Run) -> None:
    """The recipe within the budget keeps to it where it was corrected; the errors of both that count are of seeds after

    those. Its file says both errors.
    """
    table = run.table("quality")
    recorded = table[table["metric"] == "relative_l2_error"].set_index("arm")["value"]
    known = run.parameters
    model = weights.load_transformer("digits", run_dtype(run.table("memory").set_index("arm")["bytes"]))
    count = known["trajectories"] + known["correcting"] + known["held_out"]
    captions = inputs.example(model, "digits", 8, 8, count, 1, known["seed"]).captions
    first, judged_from = known["trajectories"], known["trajectories"] + known["correcting"]
    for name, arm in (("within_error", "recipe within 3.0 %"), ("within_bytes", "recipe as small as 4bit")):
        recipe = recipes.read(run.path / "recipes" / f"{name}.yaml")
        errors = [
            Reference(model, captions[part], (8, 8), known["steps"], known["shift"], known["seed"] + start, 6)
            .velocity(sensitivity.packed(model, recipe))
            .error
            for start, part in ((first, slice(first, judged_from)), (judged_from, slice(judged_from, None)))
        ]
        assert math.isclose(errors[1], recorded[arm], rel_tol=1e-3)
        assert not math.isclose(errors[0], recorded[arm], rel_tol=1e-2)
        assert name == "within_bytes" or errors[0] <= known["budget"]
        said = (run.path / "recipes" / f"{name}.yaml").read_text().splitlines()[2:4]
        assert said == [f"# on 6 trajectories for that {errors[0]:.4g}", f"# judged on 6 others {errors[1]:.4g}"]


def test_a_run_says_whether_its_budget_is_kept(run: Run) -> None:
    """The verdict's table and the page say kept, missed or undecided by the interval of the error on held-out seeds."""
    quality = run.table("quality")
    (budget,) = quality[quality["metric"] == answers.BUDGET].to_dict("records")
    (error,) = quality.query("metric == 'relative_l2_error' and arm == @budget['arm']").to_dict("records")
    assert budget["value"] == run.parameters["budget"] and error["low"] <= error["value"] <= error["high"]
    said = answers.budget_verdict(error["value"], error["low"], error["high"], budget["value"])
    verdict = json.loads((run.path / "notebook.ipynb").read_text(encoding="utf-8"))["cells"][-1]["outputs"][-1]
    assert said in "".join(verdict["data"]["text/html"])
    page = (run.path.parent / "index.html").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert f"error budget of 3.00 % is {said}" in page


def test_the_recipes_of_a_run_are_files_that_load(run: Run, tmp_path: Path) -> None:
    """A run's recipes load in the size that was recorded, `convert` saves the same bits, and fusing takes them."""
    path = run.path / "recipes" / "within_bytes.yaml"
    sizes = run.table("memory").set_index("arm")["bytes"]
    loaded = weights.load_transformer("digits", run_dtype(sizes), str(path))
    assert sum(array.nbytes for array in arrays(loaded).values()) == sizes["recipe as small as 4bit"]
    folder = weights.convert("digits", tmp_path / "mixed", dtype=run_dtype(sizes), quantization=path)
    assert same_bits(arrays(weights.load_transformer(folder, run_dtype(sizes))), arrays(loaded))
    for name in ("within_bytes", "within_error"):
        mixed = weights.load_transformer("digits", run_dtype(sizes), str(path.with_stem(name)))
        assert "w13" in transforms.fuse_gate_up(transforms.fuse_qkv(mixed)).layers[0].feed_forward
    assert (run.path / "recipes" / "within_error.yaml").read_text().startswith("# recipe within 3.0 %: digits (trained")


def run_dtype(sizes: "pd.Series[float]") -> str:
    (dtype,) = {"float32", "bfloat16"} & set(sizes.index)
    return dtype


def test_a_run_records_every_single_change_and_how_they_add_up(run: Run) -> None:
    """Each of the digits' 39 layers in each packing, each block and each of its steps have a row; so have all sums."""
    table, sums = run.table("sensitivity"), run.table("additivity")
    ladder, steps = 1 + len(run.parameters["ladder"]), run.parameters["steps"]
    whole = table[table["step"].isna()]
    assert dict(whole["kind"].value_counts()) == {"layer": 39 * ladder, "block": 5}
    assert len(table[table["step"].notna()]) == 5 * steps
    assert table.loc[table["quantization"] == "4bit", "end_error"].notna().all() and (table["bytes_saved"] > 0).all()
    counts = dict(sums["what"].value_counts())
    assert counts == {"layers of a block": 10, "steps of a block": 5, "blocks of the model": 2, "random mixes": 4}
    assert np.allclose(sums["ratio"], (sums["measured"] / sums["predicted"]) ** 2)
    assert sums.loc[sums["what"] == "random mixes", "ratio"].between(0.4, 2.5).all()


def test_the_page_shows_them(run: Run) -> None:
    """The experiment's page has the map and the ranking, and how single errors add up."""
    page = (run.path.parent / "index.html").read_text(encoding="utf-8")
    assert "Where packing does damage" in page and "How single errors add up" in page
    assert "the largest is " in page and "layers.2.attention.to_k" in page


def test_charts_show_what_the_tables_hold(run: Run) -> None:
    """The map has a cell a block and step, the bars one a layer, and recipes stand beside the uniform packings."""
    table = run.table("sensitivity")
    (heat,) = sensitivity_plots.steps(table, "end_error").data
    assert (len(heat.y), len(heat.x)) == (5, run.parameters["steps"])
    bars = sensitivity_plots.damage(table[table["quantization"] == "4bit"]).data
    assert sum(len(bar.y) for bar in bars) == 39
    quality = run.table("quality")
    names = list(quality.loc[quality["metric"] == "error_ratio", "arm"])
    alike, mixed = sensitivity_plots.against_uniform(run.table("memory"), quality, names).data
    assert (list(alike.text), list(mixed.text)) == (["3bit", "4bit", "6bit"], names)
    empty = pd.DataFrame(columns=["arm", "metric"])
    for figure in (sensitivity_plots.steps(empty), sensitivity_plots.damage(empty)):
        assert figure.layout.height > 0
