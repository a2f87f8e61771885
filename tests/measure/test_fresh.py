"""Comparisons over fresh processes: their order, what is judged, and a planted delay found."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.measure.clock import Clock
from tests.measure.watching import ends, pids
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import Program, fresh, in_fresh_processes
from zimage.measure.comparison import Comparison
from zimage.measure.statistics import analyse

import numpy as np
import pandas as pd
import pytest

PROGRAMS = "tests.measure.programs"
TIMEOUT_S = 60.0


def sleeping(**arguments: Any) -> Program:
    return Program(f"{PROGRAMS}:sleeping", arguments)


def test_fresh_processes_find_a_planted_delay(tmp_path: Path) -> None:
    """An arm that sleeps 30 ms longer than a 30 ms baseline is slower by about two, in eight processes of each.

    Every process is a new one and the one before has ended by then; first calls and warm-ups are kinds of their own.
    """
    log, alive = tmp_path / "log", []

    def advance() -> None:
        alive.extend(pid for pid in pids(log) if not ends(pid))

    found = in_fresh_processes(
        sleeping(time_s=0.03, first_s=0.1, log=str(log)),
        sleeping(time_s=0.06, first_s=0.1, log=str(log)),
        seed=3, samples=3, warm_up=2, timeout_s=TIMEOUT_S, advance=advance,
    )  # fmt: skip
    assert found.verdict == "slower"
    assert 1.6 < found.ratio < 2.2
    assert len(set(pids(log))) == 16 and alive == []
    frame = pd.DataFrame(found.sample_rows("step"))
    assert frame.groupby("kind").size().to_dict() == {"first call": 16, "warm-up": 32, "sample": 48}
    assert sorted(frame["process"].unique()) == list(range(1, 17))
    assert frame.groupby("process")["arm"].nunique().eq(1).all()
    assert frame[frame["kind"] == "first call"]["time_s"].min() > 0.12
    assert frame[frame["kind"] != "first call"]["time_s"].max() < 0.12
    conform("samples", frame)


def test_a_commands_first_call_is_not_judged() -> None:
    """A command in another environment has its first call and warm-ups apart too, though it makes none by itself."""
    command = ["sh", "-c", "echo ready; t=9; while read x; do echo $t; t=1; done"]
    found = in_fresh_processes(command, command, seed=0, samples=2, warm_up=1, timeout_s=TIMEOUT_S)
    kinds = {kind: [s.time_s for s in found.samples if s.kind == kind] for kind in ("first call", "warm-up", "sample")}
    assert kinds == {"first call": [9.0] * 16, "warm-up": [1.0] * 16, "sample": [1.0] * 32}
    assert (found.ratio, found.verdict) == (1.0, "equivalent")


class Fake:
    """Stands for `Resident`: an arm is a call of an injected clock, and at most one is alive at a time."""

    alive = 0

    def __init__(self, arm: Any, *, warm_up: int, timeout_s: float) -> None:
        self._call, self.before_s = arm, [1.0] * (1 + warm_up)
        assert timeout_s > 0

    def __enter__(self) -> Callable[[], float]:
        Fake.alive += 1
        assert Fake.alive == 1
        return self  # type: ignore[return-value]

    def __exit__(self, *_: object) -> None:
        Fake.alive -= 1

    def __call__(self) -> float:
        return float(self._call())


def compared(clock: Clock, ratio: float, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Comparison:
    monkeypatch.setattr(fresh, "Resident", Fake)
    return in_fresh_processes(clock.arm("baseline"), clock.arm("arm", ratio), **{"seed": 0, **options})  # type: ignore[arg-type]


def test_pairs_of_processes_in_a_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair is a process of each arm, in both orders, drawn from the seed; first calls and warm-ups are not judged."""
    clock = Clock()
    found = compared(clock, 1.5, monkeypatch, pairs=20, samples=4, seed=5)
    blocks = [clock.calls[i : i + 4] for i in range(0, len(clock.calls), 4)]
    assert all(len(set(block)) == 1 for block in blocks)
    firsts = [block[0] for block in blocks[::2]]
    assert all({a[0], b[0]} == {"baseline", "arm"} for a, b in zip(blocks[::2], blocks[1::2], strict=True))
    rng = random.Random(5)
    assert firsts == ["arm" if rng.random() < 0.5 else "baseline" for _ in range(20)] and len(set(firsts)) == 2
    assert found.ratio == pytest.approx(1.5, rel=0.01)
    assert {s.process for s in found.samples} == set(range(1, 41))


def test_a_pair_is_one_difference_of_mean_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is that of `analyse` over the pairs' differences of mean log times at a single look."""
    found = compared(Clock(noise=0.05), 1.1, monkeypatch, samples=5)
    frame = pd.DataFrame([vars(s) for s in found.samples if s.kind == "sample"])
    means = np.log(frame["time_s"]).groupby([frame["quad"], frame["arm"]]).mean().unstack()
    wanted = analyse((means["arm"] - means["baseline"]).to_numpy(), 0.05)
    assert (found.ratio, found.low, found.high, found.p) == pytest.approx(
        (wanted.ratio, wanted.low, wanted.high, wanted.p)
    )


@pytest.mark.parametrize(
    ("noise", "ratio", "floor", "verdict"),
    [
        (0.0, 1.0, None, "equivalent"),
        (0.001, 0.9, None, "faster"),
        (0.001, 1.1, None, "slower"),
        (0.001, 1.1, 0.2, "inconclusive"),
        (0.5, 1.0, None, "inconclusive"),
    ],
)
def test_verdicts_of_processes(
    noise: float, ratio: float, floor: float | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal times are equivalent, different ones faster or slower, and noise or a floor above them inconclusive."""
    found = compared(Clock(noise=noise), ratio, monkeypatch, noise_floor=floor)
    assert found.verdict == verdict, found
    said = str(found)
    assert "\n" not in said and verdict in said and "8 pairs of fresh processes" in said
    assert (found.reason in said) == (verdict == "inconclusive")
    row = found.row("step")
    assert (row["regime"], row["quads"], row["verdict_without_drops"], row["noise_floor"]) == (
        "fresh processes",
        8,
        verdict,
        floor,
    )
    conform("ablation", pd.DataFrame([row]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 7}, "pairs must be an integer of at least 8, found 7"),
        ({"pairs": 8.0}, "found 8.0"),
        ({"samples": 0}, "samples must be an integer of at least 1"),
        ({"warm_up": -1}, "warm_up must be an integer of at least 0, found -1"),
        ({"timeout_s": "60"}, "timeout_s must be positive"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": math.nan}, "timeout_s must be positive"),
        ({"timeout_s": math.inf}, "timeout_s must be positive"),
        ({"alpha": 0}, "alpha must lie between 0 and 1"),
        ({"alpha": 0.005}, r"8 pairs cannot show anything at alpha 0.005: their p is at least 0.0078; take 9 pairs"),
        ({"alpha": 0.001, "pairs": 10}, "at least 0.002; take 11 pairs"),
        ({"noise_floor": -1}, "noise_floor"),
        ({"names": ("a", "a")}, "both called 'a'"),
        ({"seed": 0.5}, "seed must be an integer"),
    ],
)
def test_impossible_comparisons_are_refused(options: dict[str, Any], words: str) -> None:
    """Arguments out of range, fewer than eight processes a side among them, are refused before anything runs."""
    arm = Program(f"{PROGRAMS}:exiting", {"status": 9})
    with pytest.raises(MeasurementError, match=words):
        in_fresh_processes(arm, arm, **{"seed": 0, **options})


def test_which_process_failed() -> None:
    """A failure names the arm and the process it happened in, and ends the comparison there."""
    arm = Program(f"{PROGRAMS}:exiting", {"status": 9})
    with pytest.raises(MeasurementError, match=r"^(quick|slow), process 1 of 16: .*exiting.* ended \(9\)"):
        in_fresh_processes(arm, arm, seed=0, names=("quick", "slow"))
