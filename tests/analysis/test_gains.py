"""What is saved from scope to scope, where it is said to be lost, and how it is drawn."""

import math
from typing import Any

from tests.lab import fabricated
from zimage.analysis import gain_plots, gains
from zimage.analysis.findings import findings

import pandas as pd
import pytest

US = 1e-6


def ladder(*saved: tuple[str, float, float, float], arm: str = "fused_qkv", floor: float = 1.0) -> pd.DataFrame:
    """A `gains` table of one arm: scope, saved, and the ends of the interval, in microseconds."""
    rows = [
        {
            "arm": arm, "baseline": "separate_qkv", "scope": scope, "blocks": 1, "time_s": 600 * US,
            "saved_s": value * US, "saved_low_s": low * US, "saved_high_s": high * US, "floor_s": floor * US,
        }
        for scope, value, low, high in saved
    ]  # fmt: skip
    return pd.DataFrame(rows)


LOST = (
    ("qkv", 20.0, 18.0, 22.0),
    ("qkv_norm", 2.0, 0.0, 4.0),
    ("qkv_norm_rope", 2.5, 0.5, 4.5),
    ("attention", 1.0, -3.0, 5.0),
    ("block", 0.0, -6.0, 6.0),
    ("step", -1.0, -9.0, 7.0),
)


def test_savings_come_from_the_ratio_and_the_baselines_median() -> None:
    """0.9 of a median of 2 ms is 0.2 ms saved, of a step a block's share of it; dropped quads don't count."""
    ablation = fabricated.ablation(
        ("fused_qkv", "separate_qkv", "qkv", 0.9, 0.8, 0.95, "faster"),
        ("fused_qkv", "separate_qkv", "step", 0.9, 0.8, 0.95, "faster"),
        ("fused_qkv", "separate_qkv", "step", 0.9, 0.8, 0.95, "faster"),
    )
    ablation.loc[2, "regime"] = "sustained"
    rows = [
        {"trial": trial, "arm": "separate_qkv", "kind": kind, "time_s": time_s, "dropped": dropped}
        for trial in (0, 1)
        for kind, time_s, dropped in (
            ("sample", 0.001, False),
            ("sample", 0.002, False),
            ("sample", 0.009, False),
            ("sample", 7.0, True),
            ("canary", 8.0, False),
        )
    ]
    rows.append({"trial": 0, "arm": "fused_qkv", "kind": "sample", "time_s": 0.5, "dropped": False})
    found = gains.table(ablation, pd.DataFrame(rows), blocks=4)
    assert list(found["scope"]) == ["qkv", "step"] and list(found["blocks"]) == [1, 4]
    product, step = found.to_dict("records")
    assert product["time_s"] == 0.002 and step["time_s"] == 0.0005
    assert (product["saved_s"], product["saved_low_s"], product["saved_high_s"]) == pytest.approx((2e-4, 1e-4, 4e-4))
    assert step["saved_s"] == pytest.approx(5e-5)
    assert product["floor_s"] == pytest.approx(0.002 * math.expm1(0.004))


def test_the_scope_that_takes_the_gain_is_named() -> None:
    """Of a saving of 20 us that shrinks to 2 at the norm, the norm is said to take 18 back."""
    text = gains.clause(ladder(*LOST), "fused_qkv")
    assert text == "the product alone saves 20.0 µs a block, of which 18.0 µs are lost in QK norm"


def test_a_loss_beyond_the_gain_is_all_of_it() -> None:
    """Where more is lost than the product saved, all of that is said to be lost, not a larger part of it."""
    rows = [(scope, *(value if scope == "qkv" else value - 10 for value in values)) for scope, *values in LOST]
    assert gains.clause(ladder(*rows), "fused_qkv").endswith("saves 20.0 µs a block, all of which is lost in QK norm")


def test_what_lies_between_is_named_whole() -> None:
    """Where no scope was measured between two, all that lies between them is named."""
    rows = [row for row in LOST if row[0] != "qkv_norm"]
    assert gains.clause(ladder(*rows), "fused_qkv").endswith("of which 17.5 µs are lost in QK norm and RoPE")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ((20.0, 20.0, 20.0), "and none of that is known to be lost up to the step"),
        ((20.0, 30.0, 25.0), "and none of that is known to be lost up to the step"),
        ((0.5, 9.0, 9.0), "the product alone is not known to save any time"),  # within the floor
        ((-20.0, 0.0, 0.0), "the product alone costs 20.0 µs a block"),
    ],
)
def test_nothing_is_said_that_is_not_known(saved: tuple[float, ...], words: str) -> None:
    """What is within intervals or the noise floor is not called lost, and a product that costs time has no gain."""
    rows = [(scope, v, v - 1.0, v + 1.0) for scope, v in zip(("qkv", "qkv_norm", "step"), saved, strict=True)]
    assert gains.clause(ladder(*rows), "fused_qkv").endswith(words)


def test_a_wide_interval_is_no_loss() -> None:
    """A saving of 20 us beside 0 +- 30 is not known to be lost, nor kept."""
    text = gains.clause(ladder(("qkv", 20, 18, 22), ("qkv_norm", 0, -30, 30), ("step", 0, -30, 30)), "fused_qkv")
    assert text == "the product alone saves 20.0 µs a block, which is within the noise of all around it"


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_without_intervals_nothing_is_known(end: float) -> None:
    """Too few quads for an interval leave all open, and the picture is drawn all the same."""
    rows = ladder(*((scope, value, -end, end) for scope, value, _, _ in LOST))
    assert gains.clause(rows, "fused_qkv") == "the product alone is not known to save any time"
    assert not any(gains.is_known(row) for row in rows.to_dict("records"))
    figure = gain_plots.ladder(rows)
    hollow = [trace for trace in figure.data if trace.marker.symbol == "circle-open"]
    assert sum(len(trace.x) for trace in hollow) == len(LOST)


def test_only_a_run_with_rungs_has_a_ladder() -> None:
    """Product, block and step alone say nothing of what lies between; neither does an arm without a product."""
    three = ladder(*(row for row in LOST if row[0] in ("qkv", "block", "step")))
    assert not gains.has_ladder(three) and gains.clause(three, "fused_qkv") == ""
    assert not gains.has_ladder(None) and gains.clause(None, "fused_qkv") == ""
    both = pd.concat([ladder(*LOST), ladder(*LOST[-2:], arm="fused_both")])
    assert gains.has_ladder(both) and gains.clause(both, "fused_both") == ""


def test_two_ladders_stand_below_each_other() -> None:
    """QKV's arms have rows of their own, then those of gate and up, with arms of the block and the step alone."""
    gate = [("gate_up", 9.0, 8.0, 10.0), ("gate_up_swiglu", -9.0, -10.0, -8.0), ("step", 1.0, -2.0, 4.0)]
    frame = pd.concat(
        [ladder(*LOST), ladder(*gate, arm="fused_gate_up"), ladder(*LOST[-2:], arm="fused_both", floor=math.nan)]
    )
    assert [arms for _, arms in gains.by_ladder(frame)] == [["fused_qkv"], ["fused_gate_up", "fused_both"]]
    figure = gain_plots.ladder(frame)
    labels = list(figure.layout.yaxis.ticktext)
    assert labels == [
        gains.NAMES[scope] for scope in ("qkv", "qkv_norm", "qkv_norm_rope", "attention", "block", "step")
    ] + [gains.NAMES[scope] for scope in ("gate_up", "gate_up_swiglu", "block", "step")]
    drawn = {trace.name: list(trace.x) for trace in figure.data if trace.mode == "lines"}
    assert drawn["fused_qkv"] == pytest.approx([20, 2, 2.5, 1, 0, -1])
    assert drawn["fused_gate_up"] == pytest.approx([9, -9, 1])
    assert len(figure.layout.shapes) == 1 + len(LOST) + len(gate)  # the zero, and a noise floor a point
    assert len(gain_plots.ladder(frame.iloc[:0]).data) == 0


def test_a_table_of_odd_rows_is_read() -> None:
    """Scopes that are not known, arms without a name and arms on both ladders end nothing."""
    odd = pd.concat([ladder(*LOST), ladder(("gate_up", 5, 4, 6), ("elsewhere", 1, 0, 2))])
    odd = pd.concat([odd, ladder(*LOST).assign(arm=None)], ignore_index=True)
    assert "lost in QK norm" in gains.clause(odd, "fused_qkv")
    assert len(gain_plots.ladder(odd).data)


def test_the_finding_says_the_step_first_and_then_where_the_gain_goes() -> None:
    """A run with rungs has one finding an arm: the step's verdict, then the clause; narrower scopes are rungs only."""
    tables: dict[str, Any] = {"ablation": fabricated.qkv(), "gains": ladder(*LOST)}
    (found,) = findings(tables)
    assert found.text == "fused_qkv is equivalent in time to separate_qkv per step"
    assert found.evidence[-1].startswith("the product alone saves 20.0 µs a block")
    assert found.short.startswith("fused_qkv is equivalent in time to separate_qkv per step (ratio 0.998")
    assert found.short.endswith("): the product alone saves 20.0 µs a block, of which 18.0 µs are lost in QK norm")
    assert len(findings({"ablation": fabricated.qkv()})) == 3
