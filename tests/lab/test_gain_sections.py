"""The page of a run with rungs, and of several: the step first, then where the gain goes, then every comparison."""

import json
import re
from pathlib import Path
from typing import Any

from tests.lab.fabricated import DEVICE, ablation, add_experiment, add_run
from zimage.analysis import gain_plots, gains, over_runs
from zimage.lab import dashboard
from zimage.lab.cases import case
from zimage.lab.store import Store

import numpy as np
import pandas as pd
import pytest

_QKV = ("qkv", "qkv_norm", "qkv_norm_rope", "attention", "block", "step")
SAVED = {  # by arm and scope: of the baseline's time, how much less the arm takes
    "fused_qkv": dict(zip(_QKV, (0.09, 0.02, 0.015, 0.01, 0.004, 0.002), strict=True)),
    "fused_qkv_copied": dict(zip(_QKV, (-0.04, -0.03, -0.02, -0.01, -0.002, -0.001), strict=True)),
    "fused_qkv_kernel": {"qkv": 0.09, "qkv_norm_rope": 0.08, "attention": 0.03, "block": 0.01, "step": 0.009},
    "fused_gate_up": {"gate_up": 0.05, "gate_up_swiglu": 0.01, "feed_forward": 0.008, "block": 0.005, "step": 0.004},
    "fused_both": {"block": 0.01, "step": 0.008},
}
BASELINES = {
    "fused_qkv": "separate_qkv", "fused_qkv_copied": "separate_qkv", "fused_qkv_kernel": "separate_qkv_kernel",
    "fused_gate_up": "separate_gate_up", "fused_both": "separate",
}  # fmt: skip
TIMES_S = {
    "qkv": 6e-4, "qkv_norm": 7e-4, "qkv_norm_rope": 9e-4, "attention": 1.5e-3, "gate_up": 1.1e-3,
    "gate_up_swiglu": 1.2e-3, "feed_forward": 1.7e-3, "block": 4e-3, "step": 0.136,
}  # fmt: skip


def ladder(scale: float = 1.0, half_width: float = 0.006) -> dict[str, pd.DataFrame]:
    """Tables of one run of `qkv_fusion` with all arms, its savings multiplied by `scale`."""
    rows = []
    for arm, by_scope in SAVED.items():
        for scope, saved in by_scope.items():
            ratio = 1 - scale * saved
            low, high = ratio - half_width, ratio + half_width
            verdict = "faster" if high < 1 else "slower" if low > 1 else "equivalent"
            rows.append((arm, BASELINES[arm], scope, ratio, low, high, verdict))
    compared = ablation(*rows)
    random = np.random.default_rng(0)
    times = [
        {
            "trial": trial, "arm": row["baseline"], "scope": row["scope"], "kind": "sample", "dropped": False,
            "regime": "burst", "quad": n, "position": 0, "time_s": TIMES_S[row["scope"]] * random.uniform(0.99, 1.01),
        }
        for trial, row in compared.iterrows()
        for n in range(9)
    ]  # fmt: skip
    samples = pd.DataFrame(times)
    return {"ablation": compared, "samples": samples, "gains": gains.table(compared, samples, blocks=32)}


def sweep(root: Path, *changes: dict[str, Any]) -> Store:
    """A store with a run of `qkv_fusion` for each of these parameters."""
    keys = []
    for place, change in enumerate(changes):
        keys.append(f"{place + 1}a" * 6)
        parameters = {
            "source": "synthetic:turbo",
            "height": 512,
            "width": 512,
            "batch": 1,
            "quantization": None,
        } | change
        weights = {"source": "synthetic:turbo", "kind": "synthetic", "digest": "s1"}
        add_run(
            root, "qkv_fusion", keys[-1], ladder(1 + place / 2), parameters=parameters, weights=weights,
            notebook="notebooks/qkv_fusion.ipynb",
        )  # fmt: skip
    add_experiment(root, "qkv_fusion", "Does one fused QKV projection beat three on this device?", keys)
    return Store(root)


def charted(page: str) -> list[str]:
    return [part.split('"')[0] for part in page.split('data-figure="')[1:]]


def test_one_run_shows_the_step_then_the_way_to_it() -> None:
    """The forest is of the step alone, the ladder follows, and every comparison lies folded below."""
    shown, folds = case(ladder(), [], "x")
    assert [section.title for section in shown] == ["What the arms cost in time", "Where the gain goes"]
    assert shown[0].table is not None and len(shown[0].table.rows) == len(SAVED)
    rungs = shown[1]
    assert rungs.folded and rungs.table is not None
    assert len(rungs.table.rows) == sum(map(len, SAVED.values()))
    assert "fused_qkv, the product alone saves 54" in rungs.charts[0].alt
    (every,) = [section for section in folds if section.title == "Every comparison"]
    assert every.table is not None and len(every.table.rows) == len(rungs.table.rows)


def test_a_run_without_rungs_is_shown_as_ever() -> None:
    """Product, block and step alone are rows of one forest, and no comparison is folded away."""
    tables = ladder()
    tables = {name: frame[frame["scope"].isin(["qkv", "block", "step"])] for name, frame in tables.items()}
    shown, folds = case(tables, [], "x")
    assert [section.title for section in shown] == ["What the arms cost in time"]
    assert shown[0].table is not None and len(shown[0].table.rows) == 13
    assert [section.title for section in folds] == ["Samples"]


def test_several_runs_stand_in_one_table_of_the_step(tmp_path: Path) -> None:
    """The overview has a row a case and a column an arm, drawn and as a table; each case keeps its own ladder."""
    store = sweep(tmp_path, {}, {"batch": 2}, {"quantization": "8bit"})
    dashboard.build(store)
    page = (tmp_path / "qkv_fusion" / "index.html").read_text()
    assert "The step, over all runs" in page and page.count("Where the gain goes</h3>") == 3
    (drawn,) = [name for name in charted(page) if name.endswith("-all-cases")]
    figure = json.loads(page.split(f'id="{drawn}">')[1].split("</script>")[0])
    assert figure["layout"]["yaxis"]["ticktext"] == [
        "batch=1, quantization=none", "batch=2, quantization=none", "batch=1, quantization=8bit",
    ]  # fmt: skip
    points = {trace["name"]: trace["x"] for trace in figure["data"] if trace["marker"]["symbol"] == "circle"}
    assert points["fused_qkv"] == pytest.approx([0.998, 0.997, 0.996])
    assert set(points) == set(SAVED)
    row = page.split('<th scope="row">batch=2, quantization=none</th>')[1].split("</tr>")[0]
    assert row.count("<td") == len(SAVED) and "equivalent, 0.997 (0.991 to 1.003)" in row


def test_several_runs_of_few_scopes_stand_in_it_too(tmp_path: Path) -> None:
    """Runs of product, block and step alone share the overview; what is not the step's lies folded under each."""
    store = sweep(tmp_path, {}, {"batch": 2})
    for path in tmp_path.rglob("tables/*.parquet"):
        frame = pd.read_parquet(path)
        frame[frame["scope"].isin(["qkv", "block", "step"])].to_parquet(path)
    dashboard.build(store)
    page = (tmp_path / "qkv_fusion" / "index.html").read_text()
    assert "The step, over all runs" in page and "Where the gain goes" not in page
    assert page.count("Every comparison</summary>") == 2
    (found, *_) = over_runs.step(
        [(run.key, {t: run.table(t) for t in run.tables()}) for run in store.runs("qkv_fusion")]
    )
    assert found.text == "fused_qkv against separate_qkv per step is equivalent in all of 2 runs"


@pytest.mark.parametrize("name", ["gains", "ablation"])
def test_a_run_without_one_of_the_tables_is_shown(name: str) -> None:
    """Where comparisons or savings were not recorded, what there is is shown."""
    tables = {kept: frame for kept, frame in ladder().items() if kept != name}
    shown, _ = case(tables, [], "x")
    assert len(shown) == 1


def test_several_runs_say_together_what_became_of_the_step(tmp_path: Path) -> None:
    """One sentence an arm for all runs comes first, with its ratios and where most is lost; each run's own follow."""
    store = sweep(tmp_path, {}, {"batch": 2}, {"quantization": "8bit"}, {"batch": 4})
    said = dashboard.findings(store, "qkv_fusion").sentence
    first = "fused_qkv against separate_qkv per step is equivalent in all of 4 runs (ratios 0.995 to 0.998)"
    assert said.startswith(f"On {DEVICE}, with synthetic weights: {first}; ")
    assert "fused_gate_up against separate_gate_up per step, in 4 runs: faster in 2, equivalent in 2 (" in said
    assert said.count(";") == len(SAVED) - 1 and "[" not in said
    dashboard.build(store)
    page = (tmp_path / "qkv_fusion" / "index.html").read_text()
    assert "in 4 of 4 the largest loss of the product&#39;s gain is in QK norm" in page
    assert page.index("in all of 4 runs") < page.index("fused_qkv is equivalent in time to separate_qkv per step")


def test_an_arm_that_is_not_in_every_run() -> None:
    """Where a run lacks an arm it is told in how many it was measured, and never as of all."""
    full = ladder()
    less = {name: frame[frame["arm"] != "fused_qkv"] for name, frame in full.items() if name != "samples"}
    found = over_runs.step([("a", full), ("b", full), ("c", less)])
    texts = [one.text for one in found]
    first = "fused_qkv against separate_qkv per step is equivalent in all that measured it (2 of 3 runs)"
    assert texts[0] == first and "in all of 3 runs" in texts[1]
    assert found[0].short == f"{first} (ratio 0.998)"  # the same in both


def test_the_ladder_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a run has rungs is asked of its table, not by drawing them."""
    drawn: list[int] = []
    draw = gain_plots.ladder
    monkeypatch.setattr(gain_plots, "ladder", lambda frame: drawn.append(1) or draw(frame))
    case(ladder(), [], "x")
    assert drawn == [1]


def test_one_run_speaks_for_itself(tmp_path: Path) -> None:
    """A single run's findings are its own, the step's verdict first and then where the gain goes."""
    said = dashboard.findings(sweep(tmp_path, {}), "qkv_fusion").sentence
    assert ": fused_qkv is equivalent in time to separate_qkv per step (ratio 0.998, " in said
    assert "): the product alone saves 54" in said and " are lost in QK norm; " in said


def test_runs_of_other_weights_are_told_apart(tmp_path: Path) -> None:
    """Trained and synthetic weights are never counted together in a finding, and a dtype is told by its name alone."""
    digits = {"source": "digits", "dtype": None}
    store = sweep(tmp_path, {"dtype": None}, {"dtype": "bfloat16"}, digits, digits | {"batch": 2})
    for run in store.runs("qkv_fusion"):
        if run.parameters["source"] == "digits":
            meta = json.loads((run.path / "run.json").read_text())
            meta["weights"] = {"source": "digits", "kind": "trained", "digest": "d1"}
            (run.path / "run.json").write_text(json.dumps(meta))
    dashboard.build(store)
    page = (tmp_path / "qkv_fusion" / "index.html").read_text()
    joint = re.findall(r"fused_qkv against separate_qkv per step is equivalent in all of (\d) runs", page)
    assert joint[:2] == ["2", "2"] and "all of 4 runs" not in page
    labels = set(re.findall(r"source=[^<,&\"]*, batch=\d[^<;&\"·]*", page))
    assert any("float32" in label for label in labels) and any("bfloat16" in label for label in labels)
    assert not any("dtype" in label for label in labels)


def test_height_and_width_are_told_as_a_size(tmp_path: Path) -> None:
    """Runs that differ in both are told apart by their size, in one piece."""
    dashboard.build(sweep(tmp_path, {}, {"height": 1024, "width": 768}))
    page = (tmp_path / "qkv_fusion" / "index.html").read_text()
    assert ">512 x 512 px</option>" in page and ">1024 x 768 px</option>" in page
