"""What is said of small decisions: their times, their changes of the output, and what was left out."""

from tests.lab import fabricated
from zimage import practices
from zimage.analysis import detail_texts
from zimage.analysis.findings import findings
from zimage.errors import InputError
from zimage.lab.cases import case

import numpy as np
import pandas as pd
import pytest


def tables() -> dict[str, pd.DataFrame]:
    """What the notebook details records: two that are slower, one faster, one undecided and one left out."""
    ablation = fabricated.ablation(
        ("with_all_ones_mask", "plain", "step", 1.04, 1.03, 1.05, "slower"),
        ("bf16_timestep", "plain", "step", 1.001, 0.998, 1.004, "equivalent"),
        ("zero_pad_tokens", "plain", "step", 1.01, 0.97, 1.06, "inconclusive"),
        ("compile_blocks", "plain", "step", 0.93, 0.92, 0.94, "faster"),
        ("eval_every_stage", "plain", "step", 1.21, 1.18, 1.25, "slower"),
        ("wired_limit", "plain", "step", np.nan, np.nan, np.nan, "inconclusive"),
        ("MLX_MAX_OPS_PER_BUFFER=10", "plain process", "step", 1.02, 1.011, 1.03, "slower"),
    )
    ablation.loc[ablation["arm"] == "wired_limit", "reason"] = "left out: Metal alone has it"
    errors = {"with_all_ones_mask": 0.0, "bf16_timestep": 0.004, "zero_pad_tokens": 0.45, "compile_blocks": 0.0}
    rows = [{"arm": arm, "metric": "relative_l2_error", "baseline": "plain", "value": v} for arm, v in errors.items()]
    rows += [{**row, "baseline": "float32", "value": 0.9} for row in rows]
    rows.append({"arm": "plain", "metric": "relative_l2_error", "baseline": "float32", "value": 0.003})
    rows.append({"arm": "bf16_timestep", "metric": "drift_relative_l2", "baseline": "plain", "step": 2, "value": 0.01})
    drift = {"metric": "drift_relative_l2", "baseline": "plain"}
    rows += [{"arm": "compile_blocks", "step": i, "value": v, **drift} for i, v in ((1, 0.0), (2, 0.003))]
    rows += [{"arm": "with_all_ones_mask", "step": i, "value": 0.0, **drift} for i in (1, 2)]
    rows.append({"arm": "bf16_timestep", "metric": "digit_accuracy", "value": 0.75})
    quality = pd.DataFrame(rows).assign(weights_kind="trained")
    named = {"ablation": ablation, "quality": quality}
    return {name: fabricated.arrow(name, frame).to_pandas() for name, frame in named.items()}


def test_details_are_told_together() -> None:
    """A sentence for each kind with the numbers of who stands out, one for the output, one for what was left out."""
    found = dict(detail_texts.texts(tables()))
    assert [*found] == [
        "details that change the output, 3 timed: 1 is known to take more time (with_all_ones_mask the most, 4.0 %)",
        "details that leave the output as it is, 2 timed: 1 is known to take more time (eval_every_stage the most, "
        "21.0 %) and 1 less (compile_blocks the most, 7.0 %)",
        "zero_pad_tokens changes the velocity the most, by 45.0 % of its length (trained weights)",
        "variables of MLX, 1 timed: 1 is known to take more time (MLX_MAX_OPS_PER_BUFFER=10 the most, 2.0 %)",
        "left out here: wired_limit",
    ]
    evidence = [*found.values()]
    assert evidence[0] == ("more time: with_all_ones_mask", "equivalent: bf16_timestep", "undecided: zero_pad_tokens")
    assert evidence[2] == (
        "zero_pad_tokens 0.450, bf16_timestep 0.00400",
        "the plain model is 0.00300 away from float32",
        "only the end of a run changes: compile_blocks 0.00300",
        "no bit changes: with_all_ones_mask",
    )
    assert evidence[4] == ("wired_limit: Metal alone has it",)


def test_without_any_interval_nothing_is_decided() -> None:
    """Where no comparison of a kind has an interval, none is said to be known not to take more time."""
    found = tables()
    found["ablation"] = found["ablation"].assign(ratio_low=0.0, ratio_high=np.inf, verdict="inconclusive")
    said = [text for text, evidence in detail_texts.texts(found) if "timed" in text and not evidence]
    ends = "timed: nothing could be decided, as none has an interval"
    assert len(said) == 3 and all(text.endswith(ends) for text in said)


def test_they_are_findings_in_short() -> None:
    """The page's findings open with them, and an arm alone has no short sentence beside them."""
    found = findings(tables())
    assert [one.text for one in found[:5]] == [text for text, _ in detail_texts.texts(tables())]
    assert [bool(one.short) for one in found] == [True] * 5 + [False] * (len(found) - 5)
    left = next(one for one in found if "wired_limit against plain" in one.text)
    assert left.evidence == ("left out: Metal alone has it",)


def test_other_ablations_are_left_alone() -> None:
    """An ablation of transforms that are no details, compiled blocks among them, has no such sentence or section."""
    other = fabricated.ablation(("compile_blocks", "plain", "step", 0.93, 0.92, 0.94, "faster"))
    assert detail_texts.texts({"ablation": other}) == [] and detail_texts.texts({}) == []
    shown, _ = case({"ablation": other}, [], "a")
    assert "Which details matter" not in [section.title for section in shown]


def test_the_page_has_a_table_of_them() -> None:
    """Each detail with what it is, who does it, its verdict or why it has none, and both changes of the output."""
    shown, _ = case(tables(), [], "a")
    (section,) = [section for section in shown if section.title == "Which details matter"]
    assert "from the same model without the detail" in section.note and section.table is not None
    rows = {row[0].text: row for row in section.table.rows}
    texts = [cell.text for cell in rows["bf16_timestep"]]
    known = practices.OUTPUT["bf16_timestep"]
    assert texts == [
        "bf16_timestep",
        known.what,
        known.who,
        "equivalent",
        "1.001 (0.998 to 1.004)",
        "0.00400",
        "0.0100",
    ]
    assert [cell.kind for cell in rows["wired_limit"]][3] == "free"
    assert rows["wired_limit"][3].text == "left out: Metal alone has it"
    assert len({len(row) for row in section.table.rows}) == 1


@pytest.mark.parametrize("wrong", ["", "MLX_A", "MLX_A=", "=1", "PATH=1", "MLX_A B=1", "mlx_a=1", 3, None])
def test_a_variable_is_one_of_mlx(wrong: object) -> None:
    """Other variables, and what is no assignment, are refused in one line."""
    assert practices.variable("MLX_A=1=2") == {"MLX_A": "1=2"}
    with pytest.raises(InputError, match="a variable of MLX is") as caught:
        practices.variable(wrong)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
