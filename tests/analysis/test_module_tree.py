"""The module tree: which of the measured times a module has, and its share of the step."""

from typing import Any

from zimage.analysis import cost, module_tree
from zimage.config import TransformerConfig

import pytest

CONFIG = TransformerConfig.tiny()
OPERATIONS = cost.step(CONFIG, 64, 64)
STAGES = {total.path: (1e-3 * place, 0.9e-3 * place, 1.1e-3 * place) for place, total in
          enumerate(cost.by_stage(OPERATIONS), start=1)}  # fmt: skip
WHOLE_S = 0.5  # more than the stages' sum: the start of an evaluation is in it


def _tree(times: dict[tuple[str, str], tuple[float, float, float]], whole_s: float | None = WHOLE_S) -> dict[str, Any]:
    rows = module_tree.rows(OPERATIONS, STAGES, times, whole_s)
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def _time(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["time_s"], row["time_low_s"], row["time_high_s"]


def test_a_stage_has_its_own_time_and_a_list_of_them_the_sum() -> None:
    """A stage keeps time and interval of the prefix view; what holds stages has their sum, without an interval."""
    tree = _tree({})
    assert all(_time(tree[name]) == time for name, time in STAGES.items())
    layers = sum(time[0] for name, time in STAGES.items() if name.startswith("layers."))
    assert _time(tree["layers"]) == (pytest.approx(layers), None, None)
    assert _time(tree[""]) == (WHOLE_S, None, None)


def test_a_share_is_of_the_whole_step() -> None:
    """Shares are of the step's own measured time, not of the stages' sum; without it there are none."""
    tree = _tree({})
    assert tree[""]["share"] == 1.0
    assert all(tree[name]["share"] == pytest.approx(time[0] / WHOLE_S) for name, time in STAGES.items())
    assert {row["share"] for row in _tree({}, None).values()} == {None}


def test_below_a_stage_times_are_those_of_its_operations() -> None:
    """A module of one operation has that one's interval, one of several their sum, and none if one was not timed."""
    names = ("to_q", "to_k", "to_v", "qk_norm", "rope", "sdpa", "to_out")
    times = {("layers.0", name): (1e-4, 0.8e-4, 1.3e-4) for name in names}
    tree = _tree(times | {("layers.0", "unattributed"): (5.0, 4.0, 6.0)})
    assert _time(tree["layers.0.attention.to_q"]) == (1e-4, 0.8e-4, 1.3e-4)
    assert _time(tree["layers.0.attention"]) == (pytest.approx(7e-4), None, None)
    assert _time(tree["layers.0"]) == STAGES["layers.0"]  # what is unattributed is in no module
    assert _time(tree["layers.1.attention"]) == (None, None, None)
    del times["layers.0", "rope"]
    assert _time(_tree(times)["layers.0.attention"]) == (None, None, None)
