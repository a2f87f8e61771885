"""Stores made by hand, compared: what is paired, what is a regression, what is left out and why."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

from tests.lab import fabricated
from tests.lab.fabricated import ablation, add_experiment, add_run, qkv, quantization
from zimage import cli
from zimage.analysis.combining import WORSE
from zimage.analysis.comparing import Compared, Pair
from zimage.errors import StoreError
from zimage.lab import comparing
from zimage.lab.store import Store

import pandas as pd
import pytest

NOTEBOOK = "notebooks/qkv_fusion.ipynb"
INPUTS = {"source": "digits", "dtype": None, "height": 8, "width": 8, "seed": 0, "quads": 40}
PAIR = ("fused_qkv", "separate_qkv", "step")


def put(root: Path, key: str = "aa11", tables: dict[str, pd.DataFrame] | None = None, **meta: Any) -> Path:
    """A run of qkv_fusion; `meta` overrides what its run.json says, `parameters` what it was given."""
    given = {"notebook": NOTEBOOK, **meta, "parameters": INPUTS | meta.get("parameters", {})}
    return add_run(root, "qkv", key, {"ablation": qkv()} if tables is None else tables, **given)


def compared(a: Path, b: Path) -> Compared:
    store = Store(a / "none")
    return comparing.compare(comparing.side(str(a), store), comparing.side(str(b), store))


def said(a: Path, b: Path) -> str:
    store = Store(a / "none")
    sides = comparing.side(str(a), store), comparing.side(str(b), store)
    return "\n".join(comparing.lines(*sides, comparing.compare(*sides)))


def verdicts(pair: Pair) -> dict[tuple[str, ...], str]:
    return {row.about: row.change.verdict for row in pair.rows}


def both(tmp_path: Path, **meta: Any) -> tuple[Path, Path]:
    """Two stores with a run each; `meta` is of B's."""
    put(tmp_path / "a")
    put(tmp_path / "b", **meta)
    return tmp_path / "a", tmp_path / "b"


def refusal(a: Path, b: Path) -> str:
    with pytest.raises(StoreError) as caught:
        compared(a, b)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_beside_itself(tmp_path: Path) -> None:
    """Nothing is worse, nothing is left out, times are equivalent or inconclusive at a ratio of exactly 1."""
    root = fabricated.quickstart(tmp_path)
    found = compared(root, root)
    assert (found.worse, found.left_out, found.environments, len(found.pairs)) == (0, [], [], 3)
    assert all(pair.same for pair in found.pairs)
    times = [row for row in found.rows if row.table == "ablation"]
    assert len(times) == 5 and all(row.change.interval.value == 1 for row in times)
    assert {row.change.verdict for row in times} == {"equivalent", "inconclusive"}
    assert {row.change.verdict for row in found.rows if row.table != "ablation"} == {"same"}
    assert found.rows and "no regression" in comparing.summary(found)


def test_a_slower_arm_is_a_regression(tmp_path: Path) -> None:
    """A ratio that rose beyond intervals and floors is slower, from B's side; the other way round it is faster."""
    rose = ablation((*PAIR, 1.06, 1.055, 1.065, "slower"))
    a, b = both(tmp_path, tables={"ablation": rose})
    about = (*PAIR, "burst")
    assert verdicts(compared(a, b).pairs[0]) == {about: "slower"} and compared(a, b).worse == 1
    assert verdicts(compared(b, a).pairs[0]) == {about: "faster"} and compared(b, a).worse == 0
    text = said(a, b)
    assert "slower  fused_qkv / separate_qkv, step  ratio 0.998 -> 1.060  1.062 times (" in text
    assert "regressions:\n  qkv/aa11: slower fused_qkv / separate_qkv, step" in text
    assert text.endswith("1 compared (1 slower), 2 not: 1 regression; 2 rows of A have no counterpart in B")


def test_both_noise_floors_count(tmp_path: Path) -> None:
    """What lies within the floors of both sides, added in squares, is no regression."""
    rose = ablation((*PAIR, 1.06, 1.055, 1.065, "slower")).assign(noise_floor=0.07)
    a, b = both(tmp_path, tables={"ablation": rose})
    for found in (compared(a, b), compared(b, a)):
        (row,) = found.rows
        assert (row.noise_floor, row.change.verdict) == (math.hypot(0.07, 0.004), "inconclusive")
        assert row.change.reason == "the difference is within the noise floor of 7.0 %"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": {"seed": 1}}, "seed 0 against 1"),
        ({"parameters": {"height": 16, "width": 16}}, "height 8 against 16, width 8 against 16"),
        ({"parameters": {"transforms": ["fast"]}}, "transforms none against ['fast']"),
        ({"parameters": {"dtype": "bfloat16"}}, "dtype float32 against bfloat16"),
        ({"weights": {"source": "digits", "kind": "trained", "digest": "beef"}}, "weights 9f2c against beef"),
        ({"environment": {"device_type": "gpu"}}, "dtype float32 against bfloat16"),
        ({"recipe": {"default": "4bit"}}, "quantization none against {'default': '4bit'}"),
        ({"notebook": "notebooks/other.ipynb"}, f"B has no run of {NOTEBOOK}"),
    ],
)
def test_other_inputs_are_not_compared(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Another seed, size, dtype, model, notebook or other weights: one line that says in what they differ."""
    a, b = both(tmp_path, **change)
    assert f"{a} and {b} have nothing to compare: A qkv/aa11: {reason}" in refusal(a, b)


def test_recipes_that_arms_are_made_by_count(tmp_path: Path) -> None:
    """Arms of one name whose recipes differ are not compared; an arm that only one side has does not matter."""
    mixed, other = {"default": "4bit", "rules": []}, {"default": "8bit", "rules": []}
    put(tmp_path / "none")
    for name, content in (("a", mixed), ("same", mixed), ("b", other)):
        put(tmp_path / name, recipes={"mixed": content})
    assert "recipe mixed" in refusal(tmp_path / "a", tmp_path / "b")
    assert compared(tmp_path / "a", tmp_path / "same").rows and compared(tmp_path / "a", tmp_path / "none").rows


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"quads": 10}},
        {"parameters": {"device": "cpu"}},
        {"parameters": {"dtype": "float32"}},
        {"parameters": {"transforms": [], "quantization": None}},
        {"parameters": {"source": "elsewhere/digits"}},
        {"started": "2027-01-01T00:00:00+00:00"},
        {"device": "cpu-other"},
    ],
)
def test_what_makes_no_other_input(change: dict[str, Any], tmp_path: Path) -> None:
    """Effort, a device, a default written out, or another path to the same weights keep no runs apart."""
    a, b = both(tmp_path, **change)
    assert len(compared(a, b).rows) == 3


def packed(root: Path, key: str, *modes: str, slow: float = 1.0, **meta: Any) -> Path:
    """A run of the notebook quantization with an arm a mode, each taking `slow` times what it takes elsewhere."""
    rows = [(mode, "float32", "step", slow * 1.2, slow * 1.195, slow * 1.205, "slower") for mode in modes]
    parameters = INPUTS | {"modes": list(modes)} | meta.pop("parameters", {})
    given = {"notebook": "notebooks/quantization.ipynb", **meta, "parameters": parameters}
    return add_run(root, "quantization", key, {"ablation": ablation(*rows)}, **given)


def test_another_list_of_arms_keeps_no_runs_apart(tmp_path: Path) -> None:
    """Runs that differ in their modes are paired, the arms of both are judged, the rest is listed with the reason."""
    packed(tmp_path / "a", "aa11", "8bit", "4bit")
    packed(tmp_path / "b", "bb22", "8bit", "nvfp4", "4bit", slow=1.1)
    found = compared(tmp_path / "a", tmp_path / "b")
    arms = {row.about[0]: row.change.verdict for row in found.rows}
    assert arms == {"8bit": "slower", "4bit": "slower"} and found.worse == 2
    alone = [(one.what, one.reason) for one in found.left_out]
    assert alone == [("nvfp4 of quantization/bb22", "only B has this arm, A has not")]
    modes = "asked for other rows: modes ['8bit', '4bit'] against ['8bit', 'nvfp4', '4bit']"
    assert found.pairs[0].notes == [modes]


def test_arms_of_one_side_are_told_in_the_order_of_its_table(tmp_path: Path) -> None:
    """What is left out stands in the same order however often it is asked, here or in another process."""
    more = ["nvfp4", "mxfp4", "6bit", "5bit", "4bit-g32", "3bit", "2bit"]
    packed(tmp_path / "a", "aa11", "8bit")
    packed(tmp_path / "b", "bb22", "8bit", *more)
    left_out = compared(tmp_path / "a", tmp_path / "b").left_out
    assert [one.what for one in left_out] == [f"{mode} of quantization/bb22" for mode in more]


def test_the_same_list_of_arms_counts_first(tmp_path: Path) -> None:
    """Runs that agree in their lists are paired before others, whatever is newer; then those that share most rows."""
    packed(tmp_path / "a", "aa11", "8bit", "4bit")
    packed(tmp_path / "a", "aa22", "8bit", "6bit", started="2027-01-01")
    packed(tmp_path / "b", "bb11", "8bit", "4bit", started="2025-01-01")
    packed(tmp_path / "b", "bb22", "2bit", started="2027-03-01")
    packed(tmp_path / "b", "bb33", "8bit", "6bit", "5bit", started="2027-02-01")
    found = compared(tmp_path / "a", tmp_path / "b")
    assert {pair.a.name[-4:]: pair.b.name[-4:] for pair in found.pairs} == {"aa11": "bb11", "aa22": "bb33"}
    assert [(one.what, one.reason) for one in found.alone] == [
        ("B quantization/bb22", "another run of the same inputs is compared")
    ]


def test_a_run_from_before_there_was_a_list_of_arms(tmp_path: Path) -> None:
    """A run without a parameter for its arms is paired with that which shares most of its rows."""
    path = packed(tmp_path / "a", "aa11", "8bit", "4bit") / "run.json"
    path.write_text(path.read_text().replace('"modes"', '"formerly"'))
    packed(tmp_path / "b", "bb11", "8bit", "4bit")
    packed(tmp_path / "b", "bb22", "2bit", started="2027-01-01")
    (pair,) = compared(tmp_path / "a", tmp_path / "b").pairs
    assert (pair.b.name, len(pair.rows)) == ("quantization/bb11", 2)


@pytest.mark.parametrize("name", ["draws", "held_out", "trajectories", "mixes", "ladder", "transforms", "quantization"])
def test_what_changes_a_row_keeps_runs_apart(name: str, tmp_path: Path) -> None:
    """Of other seeds an error is another one under the same name, and so is an arm of another model or ladder."""
    values = [["a"], ["a", "b"]] if name in ("ladder", "transforms") else [4, 6]
    for place, value in enumerate(values):
        packed(tmp_path / "ab"[place], "aa11", "8bit", parameters={name: value})
    text = refusal(tmp_path / "a", tmp_path / "b")
    assert text.endswith(f"A quantization/aa11: {name} {values[0]} against {values[1]} (and 1 more)")


def test_the_orders_of_another_packing_are_others(tmp_path: Path) -> None:
    """The notebook memory packs what it loads in an order as its last mode says, so that this one stays an input."""
    for root, modes in (("a", ("8bit", "4bit")), ("b", ("6bit", "4bit")), ("c", ("4bit", "8bit"))):
        packed(tmp_path / root, "aa11", *modes, notebook="notebooks/memory.ipynb", parameters={"unload": []})
    assert len(compared(tmp_path / "a", tmp_path / "b").rows) == 1
    assert "last mode ['4bit'] against ['8bit']" in refusal(tmp_path / "a", tmp_path / "c")


def test_a_parameter_that_only_one_notebook_has_is_told(tmp_path: Path) -> None:
    """A newer notebook's parameter keeps nothing apart, and the pair says so."""
    a, b = both(tmp_path, parameters={"shift": 3.0})
    assert "inputs known of one side only: shift=3.0 only in B" in said(a, b)


def test_missing_and_new_arms_are_listed(tmp_path: Path) -> None:
    """An arm, a scope or a row of only one side is left out with the reason, once, and costs no verdict."""
    rows = (
        (*PAIR, 0.998, 0.994, 1.003, "equivalent"),
        ("new", "separate_qkv", "step", 1.0, 0.99, 1.01, "equivalent"),
    )
    a, b = both(tmp_path, tables={"ablation": ablation(*rows)})
    found = compared(a, b)
    assert [row.about for row in found.rows] == [(*PAIR, "burst")] and found.worse == 0
    assert [(one.what, one.reason) for one in found.left_out] == [
        ("new of qkv/aa11", "only B has this arm, A has not"),
        ("fused_qkv separate_qkv qkv burst of qkv/aa11", "only A has it in its table 'ablation'"),
        ("fused_qkv separate_qkv block burst of qkv/aa11", "only A has it in its table 'ablation'"),
    ]


def test_rows_that_cannot_be_judged_are_listed(tmp_path: Path) -> None:
    """A ratio without an interval, and one that is there twice, are left out with the reason."""
    odd = pd.concat([qkv().assign(ratio_low=[None, 0.969, 0.994]), qkv().iloc[1:2]])
    a, b = both(tmp_path, tables={"ablation": odd})
    reasons = [one.reason for one in compared(a, b).left_out]
    assert reasons == ["B recorded no usable interval", "B has it 2 times in its table 'ablation'"]


def test_tables_of_other_versions(tmp_path: Path) -> None:
    """Rows from before there were regimes are bursts; a table with the wrong columns' types is left out and told."""
    a, b = both(tmp_path, tables={"ablation": qkv().assign(regime=None)})
    assert len(compared(a, b).rows) == 3
    path = b / "qkv" / "aa11" / "tables" / "ablation.parquet"
    pd.DataFrame({"arm": ["x"], "ratio": ["fast"]}).to_parquet(path)
    assert "table ablation of run qkv/aa11 cannot be used: column scope is missing" in refusal(a, b)
    path.write_bytes(b"PAR1 no more")
    assert "not readable as a 'ablation' table" in refusal(a, b)
    path.unlink()
    assert "table 'ablation' of qkv/aa11: only A has one" in refusal(a, b)


def test_memory_and_quality(tmp_path: Path) -> None:
    """Grown weights and peaks, a fallen accuracy, a grown error and one that is no number any more are regressions."""
    moved = quantization()
    grown = {("8bit", "weight_bytes"): 1.05, ("4bit", "peak_bytes"): 1.2, ("float32", "peak_bytes"): 0.9}
    memory, quality = moved["memory"], moved["quality"]
    memory["bytes"] = [int(r.bytes * grown.get((r.arm, r.metric), 1.0)) for r in memory.itertuples()]
    accuracy = (quality["metric"] == "digit_accuracy") & (quality["arm"] == "4bit")
    quality.loc[accuracy, ["value", "low", "high"]] = 0.4, 0.35, 0.45
    errors = {"8bit": 0.0062, "4bit": float("nan")}
    of_error = quality["metric"] == "relative_l2_error"
    quality.loc[of_error, "value"] = [errors.get(r.arm, r.value) for r in quality[of_error].itertuples()]
    a, b = both(tmp_path, tables=moved)
    shutil.rmtree(a)
    put(a, tables=quantization())
    found = compared(a, b)
    assert {(row.table, *row.about[:2]) for row in found.rows if row.change.worse} == {
        ("memory", "8bit", "weights"),
        ("memory", "4bit", "step"),
        ("quality", "4bit", "digit_accuracy"),
        ("quality", "8bit", "relative_l2_error"),
        ("quality", "4bit", "relative_l2_error"),
    }
    assert found.worse == 5 and found.left_out == []
    words = {row.change.verdict for row in found.rows}
    assert words >= {"smaller", "larger", "worse", "same"} and {"larger", "worse"} < set(WORSE)
    text = said(a, b)
    assert re.search(r"larger +8bit, weights +3.72 MB -> 3.91 MB +1.050 times", text)
    assert "it is no finite number any more" in text


def test_a_perfect_picture_can_get_worse(tmp_path: Path) -> None:
    """An infinite PSNR in A is compared: the same in B is as good, a finite one is worse."""
    perfect = pd.DataFrame([{"arm": "x", "metric": "psnr_db", "value": math.inf, "weights_kind": "trained"}])
    put(tmp_path / "a", tables={"quality": perfect})
    put(tmp_path / "b", tables={"quality": perfect.assign(value=40.0)})
    a, b = tmp_path / "a", tmp_path / "b"
    assert [compared(*sides).worse for sides in ((a, a), (a, b), (b, a))] == [0, 1, 0]
    text = said(a, b)
    assert "there was no error" in text and compared(a, b).left_out == []


def test_peaks_of_two_devices_are_not_compared(tmp_path: Path) -> None:
    """Weights are the same anywhere; a peak is its device's allocator's. Steps are not set beside each other either."""
    a, b = both(tmp_path, tables=quantization(), device="apple-m3-max")
    shutil.rmtree(a)
    put(a, tables=quantization())
    found = compared(a, b)
    assert len([row for row in found.rows if row.table == "memory"]) == 3
    assert {one.reason for one in found.left_out} == {
        "the peaks of two devices are those of different allocators and kernels"
    }
    assert found.pairs[0].steps_s == {}
    assert found.environments[0] == ("device", "cpu-amd-epyc-2c", "apple-m3-max")


def test_how_the_sides_differ_is_shown(tmp_path: Path) -> None:
    """Device, MLX, zimage and MLX_* variables come first with both values, momentary facts never, others by name."""
    facts = {"mlx": "0.33.0", "blas": "openblas 0.3.29", "os": "macOS", "MLX_X": "1", "load_average": "9 9 9"}
    a, b = both(tmp_path, environment=facts, digests={"sources": "ab" * 32})
    found = compared(a, b)
    assert found.environments == [
        ("mlx", "0.32.4", "0.33.0"),
        ("sources", "unknown", "abababababab"),
        ("MLX_X", "unknown", "1"),
        ("os", "Linux", "macOS"),
    ]
    text = said(a, b)
    assert "they differ in:\n   mlx      0.32.4 -> 0.33.0\n" in text and "and in os (--json has the values)" in text


def test_doubtful_machines_are_told_of(tmp_path: Path) -> None:
    """A side that ran on battery says so before the verdicts."""
    a, b = both(tmp_path, environment={"power_source": "Battery Power"})
    assert "B  Times may be off: at the start of 1 of 1 run on battery power." in said(a, b)


def test_steps_are_context(tmp_path: Path) -> None:
    """On one device the baseline's step is shown, with the words that it is not judged."""
    timed = fabricated.samples("separate_qkv", "fused_qkv").assign(scope="step", regime="burst")
    a, b = both(tmp_path, tables={"ablation": qkv(), "samples": timed.assign(time_s=2 * timed["time_s"])})
    shutil.rmtree(a)
    put(a, tables={"ablation": qkv(), "samples": timed})
    found = compared(a, b)
    assert list(found.pairs[0].steps_s) == ["separate_qkv"] and found.worse == 0
    assert "for context, a step: separate_qkv 11.1 ms -> 22.2 ms (not judged: no clock links the two runs)" in said(
        a, b
    )


def test_whole_steps_and_trajectories_have_times(tmp_path: Path) -> None:
    """Medians of what was kept in bursts, by arm and scope; no part of a step, warm-up, canary or copy counts."""
    rows = [  # arm, scope, kind, regime, dropped, seconds in A and in B
        *[("separate_qkv", "step", "sample", None, False, time_s, 2 * time_s) for time_s in (1.0, 2.0, 9.0)],
        ("separate_qkv", "step", "sample", "burst", True, 99.0, 1.0),
        ("separate_qkv", "step", "warm-up", "burst", False, 99.0, 1.0),
        ("separate_qkv", "step", "sample", "sustained", False, 99.0, 1.0),
        ("separate_qkv", "trajectory", "sample", "burst", False, 20.0, 30.0),
        ("separate_qkv", "8 x 16 px, batch 2, 4 tokens", "sample", "burst", False, 5.0, 4.0),
        ("separate_qkv", "qkv", "sample", "burst", False, 0.1, 9.0),
        ("separate_qkv", "up to final_layer", "sample", "burst", False, 0.1, 9.0),
        ("separate_qkv", None, "sample", "burst", False, 0.1, 9.0),
        ("fused_qkv", "step", "sample", "burst", False, 2.0, float("nan")),
        ("canary", "step", "canary", "burst", False, 0.1, 9.0),
        ("copy", "step", "sample", "burst", False, 2.0, 9.0),
    ]
    frame = pd.DataFrame(rows, columns=["arm", "scope", "kind", "regime", "dropped", "a", "b"])
    for side in "ab":
        put(tmp_path / side, tables={"ablation": qkv(), "samples": frame.assign(time_s=frame[side])})
    (pair,) = compared(tmp_path / "a", tmp_path / "b").pairs
    assert {(time.arm, time.scope): (time.a_s, time.b_s) for time in pair.times} == {
        ("separate_qkv", "step"): (2.0, 4.0),
        ("separate_qkv", "trajectory"): (20.0, 30.0),
        ("separate_qkv", "8 x 16 px, batch 2, 4 tokens"): (5.0, 4.0),
    }
    assert pair.steps_s == {"separate_qkv": (2.0, 4.0)}


def test_a_run_that_fails_now_is_a_regression(tmp_path: Path) -> None:
    """A run that completed in A and failed in B counts; one that failed in A is only told."""
    a, b = both(tmp_path, key="bb22", parameters={"seed": 1})
    put(a, "cc33", parameters={"seed": 1})
    put(b, "dd44", status="failed", error="ValueError: no")
    found = compared(a, b)
    assert found.worse == 1
    assert "B qkv/dd44: it failed, and completed in A: ValueError: no (a regression)" in said(a, b)
    assert compared(b, a).worse == 0 and "the run of A failed: ValueError: no" in said(b, a)


def test_a_run_that_fails_on_other_arms_is_no_regression(tmp_path: Path) -> None:
    """Where B's failed run asked for other arms than A's, nobody asked A for these: A's run has no counterpart."""
    a, b = both(tmp_path)
    packed(a, "aa11", "8bit", "4bit")
    packed(b, "bb22", "8bit", "4bti", status="failed", error="ValueError: no")
    found = compared(a, b)
    (one,) = found.left_out
    others = "modes ['8bit', '4bit'] against ['8bit', '4bti']"
    assert one.what == "B quantization/bb22" and one.reason == (
        f"it failed, and asked for other rows than A's quantization/aa11 ({others}): ValueError: no"
    )
    assert (found.worse, found.missing_runs) == (0, 1)
    assert comparing.incomplete(found) == "1 run of A has no counterpart in B"
    packed(b, "cc33", "8bit", device="cpu-other")  # a run that completed is compared, if on another device
    again = compared(a, b)
    assert (again.worse, again.missing_runs, [pair.b.name for pair in again.pairs][-1]) == (0, 0, "quantization/cc33")
    packed(b, "dd44", "8bit", "4bit", status="failed", error="ValueError: no")  # and one that asked for the same counts
    assert compared(a, b).worse == 1


def test_if_all_fails_now_that_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every run of B failed it is status 1, not one that was asked wrongly; A needs a completed run."""
    a, b = both(tmp_path, status="failed", error="ValueError: no")
    assert cli.main(["compare", str(a), str(b)]) == 1
    assert "ValueError: no (a regression)" in capsys.readouterr().out
    assert cli.main(["compare", str(b), str(a)]) == 2
    assert "has no completed run" in capsys.readouterr().err


def test_a_damaged_run_that_is_named(tmp_path: Path) -> None:
    """A named run that is damaged, of another schema, or in a folder of another name than its key: one line says so."""
    put(tmp_path)
    path = put(tmp_path, "bb22") / "run.json"
    put(tmp_path, "aa00")
    (tmp_path / "qkv" / "aa00" / "run.json").write_text("{")
    text = path.read_text()
    for content, words in (
        ("{", "bb22/run.json: not valid JSON"),
        (text.replace('"schema": 1', '"schema": 99'), "schema 99 is not known"),
        (text.replace("bb22", "cc33"), "says run_key 'cc33', but its folder has another name"),
    ):
        path.write_text(content)
        for completed in (True, False):
            with pytest.raises(StoreError, match=words) as caught:
                comparing.side(str(path.parent), Store(tmp_path), completed)
            assert "\n" not in str(caught.value)


def test_one_run_of_several_alike(tmp_path: Path) -> None:
    """Of several runs of the same inputs the one of the same experiment counts, and of those the newest."""
    a, b = both(tmp_path, key="bb22", started="2027-01-01T00:00:00+00:00")
    put(b, "cc33", started="2027-02-01T00:00:00+00:00")
    add_run(b, "other", "dd44", {"ablation": qkv()}, notebook=NOTEBOOK, parameters=INPUTS, started="2027-03-01")
    found = compared(a, b)
    assert [(pair.a.name, pair.b.name) for pair in found.pairs] == [("qkv/aa11", "qkv/cc33")]
    assert {one.reason for one in found.left_out} == {"another run of the same inputs is compared"}


def test_the_same_device_and_effort_count_first(tmp_path: Path) -> None:
    """A run is paired with that of its own device, whichever is newer, and with that of as many quads."""
    a, b = both(tmp_path, key="bb22", started="2026-01-01")
    put(b, "cc33", device="apple-m3-max", started="2027-01-01")
    put(a, "dd44", device="cpu-third", started="2027-02-01")  # the newest of A does not take another's away
    put(b, "ee55", parameters={"quads": 10}, started="2027-03-01")
    pairs = {pair.a.name: pair.b.name for pair in compared(a, b).pairs}
    assert (pairs["qkv/aa11"], len(pairs)) == ("qkv/bb22", 2)


def test_which_of_several_is_meant_is_not_guessed(tmp_path: Path) -> None:
    """A run without a parameter over which the other side was swept is in no pair, either way round, and it is said."""
    a, b = tmp_path / "a", tmp_path / "b"
    put(a)
    for key, batch in (("bb22", 1), ("cc33", 4)):
        put(b, key, parameters={"batch": batch})
    text = refusal(a, b)
    assert "A qkv/aa11: B has several runs that fit, which differ in batch; this one has no such (and 2 more)" in text
    assert "B has several runs that fit" not in refusal(b, a) and "A has several" not in refusal(b, a).split("(and")[1]
    put(b, "dd44")  # one that has no batch either is meant
    assert [(pair.a.name, pair.b.name) for pair in compared(a, b).pairs] == [("qkv/aa11", "qkv/dd44")]
    assert all(pair.same for pair in compared(b, b).pairs) and len(compared(b, b).pairs) == 3


def test_a_copied_experiment_is_its_folder(tmp_path: Path) -> None:
    """What was copied or renamed is called as it is now, whatever its run.json says."""
    put(tmp_path)
    shutil.copytree(tmp_path / "qkv", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "aa11" / "tables")
    found = comparing.side(str(tmp_path / "other" / "aa11"), Store(tmp_path))
    assert found.what.startswith("run other/aa11 in ") and [run.name for run in found.runs] == ["other/aa11"]
    assert comparing.side("other/aa11", Store(tmp_path)).runs[0].tables == {}


def test_only_current_runs_of_an_experiment_count(tmp_path: Path) -> None:
    """A superseded run is compared when it is named, not with its experiment."""
    root = fabricated.across_versions(tmp_path)
    store = Store(root)
    assert [run.name for run in comparing.side("qkv_fusion", store).runs] == [f"qkv_fusion/{'3f' * 6}"]
    sides = comparing.side("qkv_fusion/1f", store), comparing.side("3f3f", store)
    assert comparing.compare(*sides).worse == 3


def test_what_names_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment, a key, its start, experiment/key, a results folder, and paths to what is in one."""
    root = fabricated.swept(fabricated.quickstart(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    store = Store(root)
    counts = {
        "quickstart": 3, "aa11": 1, "quickstart/aa": 1, "results": 6, "./results/": 6, str(root): 6, "results/.": 6,
        "results/quickstart": 3, "results/quickstart/aa11aa11aa11": 1, "results/quickstart/bb": 1,
    }  # fmt: skip
    assert {asked: len(comparing.side(asked, store).runs) for asked in counts} == counts
    monkeypatch.chdir(root / "quickstart")
    assert len(comparing.side(".", store).runs) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nothing", "no run 'nothing'; `zimage list` shows what there is; or name a results folder"),
        ("", "no run ''"),
        ("empty", "empty: no runs in this folder"),
        (".", "no runs in this folder; name one of the stores in it, such as"),
        ("results/quickstart/zz", "no run 'quickstart/zz'"),
        ("results/turbo_sizes/3d", "has no completed run"),
        ("x" * 300, "results folder"),
    ],
)
def test_what_names_no_side(asked: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no run, or has no completed one, is refused in one line."""
    root = fabricated.swept(fabricated.quickstart(tmp_path / "results"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as caught:
        comparing.side(asked, Store(root))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damage_is_told_and_costs_only_itself(tmp_path: Path) -> None:
    """An unreadable run.json or experiment.json is a line; the other runs are compared."""
    a, b = both(tmp_path)
    put(b, "bb22", parameters={"seed": 7})
    (b / "qkv" / "bb22" / "run.json").write_text("{")
    add_experiment(b, "qkv", "q?", ["aa11"])
    (b / "qkv" / "experiment.json").write_text("{")
    one = comparing.side(str(b), Store(a))
    assert len(one.problems) == 2 and [run.name for run in one.runs] == ["qkv/aa11"]
    assert len(compared(a, b).rows) == 3


@pytest.mark.parametrize("table", ["ablation", "samples"])
def test_tables_of_a_that_cannot_be_read_are_counted(table: str, tmp_path: Path) -> None:
    """Those of A's completed runs stand in the last line, judged or not; of B's they do not."""
    tables = {"ablation": qkv(), "samples": fabricated.samples(*PAIR[:2]), "memory": quantization()["memory"]}
    for name in "ab":
        put(tmp_path / name, tables=tables)
    (tmp_path / "a" / "qkv" / "aa11" / "tables" / f"{table}.parquet").write_bytes(b"garbage")
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.rows and (found.unreadable, found.worse) == (1, 0)
    assert comparing.incomplete(found) == "1 table of A cannot be read"
    assert "no regression in what could be judged: 1 table of A cannot be read" in comparing.summary(found)
    assert compared(tmp_path / "b", tmp_path / "a").unreadable == 0


def test_what_could_not_be_judged_is_counted(tmp_path: Path) -> None:
    """Runs, arms, tables and rows of A that B lacks are counted, those of B alone, failed or unusable in A are not."""
    a, b = tmp_path / "a", tmp_path / "b"
    put(a, tables=quantization() | {"ablation": qkv()})
    put(b, tables={"ablation": qkv().iloc[:2].assign(ratio_high=[1.0, None])})
    packed(a, "cc33", "8bit", "4bit", "2bit")
    packed(b, "cc33", "8bit", "nvfp4")
    put(a, "dd44", parameters={"seed": 1})
    put(a, "ee55", parameters={"seed": 2}, status="failed", error="ValueError: no")
    put(b, "ff66", parameters={"seed": 3})
    found = compared(a, b)
    counts = {one.what: one.missing_rows for one in found.left_out if one.missing_rows}
    tables = [row.table for row in compared(a, a).rows]
    assert counts == {
        "4bit of quantization/cc33": 1,
        "2bit of quantization/cc33": 1,
        "fused_qkv separate_qkv block burst of qkv/aa11": 1,
        "fused_qkv separate_qkv step burst of qkv/aa11": 1,
        "table 'memory' of qkv/aa11": tables.count("memory"),
        "table 'quality' of qkv/aa11": tables.count("quality"),
    }
    assert (found.missing_runs, found.missing_rows) == (1, sum(counts.values()))
    lacking = f"1 run of A has no counterpart in B, {found.missing_rows} rows of A have no counterpart in B"
    assert f"no regression in what could be judged: {lacking}" in comparing.summary(found)
    assert comparing.incomplete(found) == lacking.replace(", ", " and ")
    whole = compared(a, a)
    assert (whole.missing_runs, whole.missing_rows, comparing.incomplete(whole)) == (0, 0, "")


def test_what_only_unusable_rows_of_a_lack_is_not_missing(tmp_path: Path) -> None:
    """A row that A itself cannot use, or a peak of another device's allocator, is nothing that B lacks."""
    put(tmp_path / "a", tables={**quantization(), "ablation": qkv().assign(ratio_low=[None, 0.969, 0.994])})
    put(tmp_path / "b", tables={**quantization(), "ablation": qkv()}, device="apple-m3-max")
    found = compared(tmp_path / "a", tmp_path / "b")
    assert len(found.left_out) > 1 and (found.missing_runs, found.missing_rows) == (0, 0)


def test_undecided_rows_are_counted(tmp_path: Path) -> None:
    """Inconclusive rows stand beside "no regression", and that no time ratio is decided where A has some."""
    wide = qkv().assign(ratio_low=0.2, ratio_high=5.0)
    a, b = both(tmp_path, tables={"ablation": wide})
    found = compared(a, b)
    assert (found.undecided, found.times_undecided) == (3, True)
    said_of_it = "no regression in what could be judged: 3 rows are undecided, no time ratio is decided"
    assert comparing.summary(found) == f"3 compared (3 inconclusive), 0 not: {said_of_it}"
    assert comparing.incomplete(found) == "no time ratio is decided"
    only = {name: frame for name, frame in quantization().items() if name in ("memory", "quality")}
    untimed = [put(tmp_path / name, tables=only) for name in ("c", "d")]
    assert not compared(*(path.parent.parent for path in untimed)).times_undecided


def scaled(root: Path, ratio: float, half: float | None = 0.01, **meta: Any) -> Path:
    """A run of scaling: a step of 16 x 16 px takes `ratio` times one of 8 x 8 px, an image of two 0.9 times."""
    sides = {"height": [16, 8], "width": [16, 8], "batch": [1, 2], "caption_tokens": [32, 32]}
    least = {f"beside_{name}": 8 if name in ("height", "width") else 1 for name in sides} | {
        "beside_caption_tokens": 32
    }
    ratios = pd.Series([ratio, 0.9])
    ends = {} if half is None else {"ratio_low": ratios * (1 - half), "ratio_high": ratios * (1 + half)}
    frame = pd.DataFrame({"arm": "float32", "axis": ["resolution", "batch"], **sides}).assign(**least)
    given = {"notebook": "notebooks/scaling.ipynb", "parameters": INPUTS, **meta}
    return add_run(root, "scaling", "aa11", {"axes": frame.assign(ratio=ratios, **ends)}, **given)


def test_a_step_that_grows_more_with_the_size_is_a_regression(tmp_path: Path) -> None:
    """Rows of `axes` are judged as time ratios, told by axis and sizes, and hold together with the others."""
    a, b = tmp_path / "a", tmp_path / "b"
    scaled(a, 4.0)
    scaled(b, 4.4)
    found = compared(a / "scaling", b / "scaling")
    assert [row.change.verdict for row in found.rows] == ["slower", "inconclusive"]
    assert (found.worse, found.together, found.left_out, found.times_undecided) == (1, 2, [], False)
    name = "float32, resolution 16 x 16 px, batch 1, 32 tokens beside 8 x 8 px, batch 1, 32 tokens"
    assert re.search(f"slower +{name} +ratio 4.000 -> 4.400 +1.100 times [(]8.* % more", said(a, b))
    sides = [comparing.side(str(root), Store(root)) for root in (a, b)]
    row = comparing.content(*sides, found)["pairs"][0]["rows"][1]
    about = {"table": "axes", "axis": "batch", "height": 8, "batch": 2, "beside_batch": 1, "a": row["a"]}
    assert about.items() <= row.items() and row["a"]["value"] == 0.9


def test_growth_without_an_interval_is_undecided(tmp_path: Path) -> None:
    """Where a side had too few rounds for an interval its rows of `axes` are inconclusive, whatever the values."""
    a, b, c = (tmp_path / name for name in "abc")
    scaled(a, 4.0)
    scaled(b, 9.0, half=None)
    scaled(c, -1.0)
    for sides in ((a, b), (b, a), (b, b)):
        found = compared(*sides)
        assert [row.change.verdict for row in found.rows] == ["inconclusive"] * 2
        assert {row.change.reason for row in found.rows} == {"one side has no interval of its own"}
        assert (found.worse, found.times_undecided, found.together) == (0, True, 1)
    left_out = compared(a, c).left_out
    assert [(one.what, one.reason, one.missing_rows) for one in left_out] == [(
        "float32 resolution 16 x 16 px, batch 1, 32 tokens beside 8 x 8 px, batch 1, 32 tokens of scaling/aa11",
        "B recorded no usable interval", 1,
    )]  # fmt: skip
