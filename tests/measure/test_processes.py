"""Arms in processes of their own: what is timed there, what is made of it, and that nothing is left behind."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.measure.clock import Clock
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import Program, Resident, compare, in_fresh_processes, processes
from zimage.measure.processes import Arm, ProcessComparison

import numpy as np
import pandas as pd
import pytest

PROGRAMS = "tests.measure.programs"
SERVES = "import sys, time; print('loading'); print('ready'); sys.stdout.flush()\nfor _ in sys.stdin: "
TIMEOUT_S = 60.0


def program(name: str, **arguments: Any) -> Program:
    return Program(f"{PROGRAMS}:{name}", arguments)


def command(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def serve(arm: Arm, calls: int, timeout_s: float) -> None:
    with Resident(arm, warm_up=0, timeout_s=timeout_s) as resident:
        for _ in range(calls):
            resident()


def refused(arm: Arm, calls: int = 0, timeout_s: float = TIMEOUT_S) -> str:
    with pytest.raises(MeasurementError) as caught:
        serve(arm, calls, timeout_s)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable() and len(said) < 1000
    return said


def ends(pid: int) -> bool:
    """Whether the process ends within 5 seconds; one that only waits to be collected has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        if not shown.stdout.strip() or shown.stdout.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def pids(log: Path, count: int = 1) -> list[int]:
    """The pids in `log`, once there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = log.read_text(encoding="ascii").split() if log.exists() else []
        if len(found) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.05)
    raise AssertionError("the program did not come so far")


def test_a_program_is_timed_where_it_runs() -> None:
    """A resident program says what its first call and its warm-ups took, then each call's seconds, and is gone after.

    What is timed is the work, not the way to the process and back, and not the loading.
    """
    with Resident(program("sleeping", time_s=0.05, first_s=0.2), warm_up=2) as resident:
        first, *warm_up = resident.before_s
        times = [resident() for _ in range(3)]
        pid = resident.pid
    assert 0.25 <= first < 0.5
    assert len(warm_up) == 2
    assert all(0.05 <= time_s < 0.2 for time_s in [*warm_up, *times])
    assert pid is not None and ends(pid)
    with pytest.raises(MeasurementError, match="is not running; call it inside"):
        resident()


def test_residents_are_compared_in_quads() -> None:
    """Two resident programs take turns as the calls of `compare`, and a planted doubling is found slower."""
    quick, slow = program("sleeping", time_s=0.01), program("sleeping", time_s=0.02)
    with Resident(quick, warm_up=0) as baseline, Resident(slow, warm_up=0) as arm:
        found = compare(baseline, arm, seed=0, max_quads=10)
    assert found.verdict == "slower"
    assert 1.5 < found.ratio < 2.5


def test_a_command_of_someone_elses() -> None:
    """A command that says ready and answers each line is resident too; the last word of a line is the seconds.

    It keeps the environment it was given: our modules are not put in its way.
    """
    code = "import os; assert os.environ.get('PYTHONPATH') == before; " + SERVES + "print('took', 0.25, flush=True)"
    with Resident(command(f"before = {os.environ.get('PYTHONPATH')!r}\n{code}"), timeout_s=TIMEOUT_S) as resident:
        assert resident.before_s == []
        assert [resident(), resident()] == [0.25, 0.25]


@pytest.mark.parametrize("size", [10_000_000])
def test_what_a_program_prints_disturbs_nothing(size: int) -> None:
    """Ten megabytes on standard output, numbers among them, and reading standard input change no answer."""
    with Resident(program("printing", size=size), warm_up=0, timeout_s=TIMEOUT_S) as resident:
        assert len(resident.before_s) == 1
        assert [resident() > 0 for _ in range(2)] == [True, True]


@pytest.mark.parametrize(
    ("arm", "calls", "words"),
    [
        (program("raising"), 0, ("ended (1)", "ValueError: the first the [31msecond", "programs.py, line")),
        (program("raising_in_a_call", calls=2), 3, ("ended (1)", "RuntimeError: no more")),
        (program("exiting", status=3), 0, ("ended (3) without an answer: it said nothing",)),
        (program("killed", calls=1), 1, ("ended (-9) without an answer",)),
        (program("no_work"), 0, ("must give a callable without arguments, found int",)),
        (program("no_arrays"), 0, ("timed work returned a str",)),
        (program("sleeping"), 0, ("TypeError", "time_s")),
        (program("nothing"), 0, ("AttributeError", "nothing")),
        (Program("nowhere.at_all:f"), 0, ("ModuleNotFoundError: No module named 'nowhere'",)),
    ],
)
def test_a_program_that_fails_is_one_line(arm: Program, calls: int, words: tuple[str, ...]) -> None:
    """A program that raises, exits, dies or isn't there is a MeasurementError with its name and its last words."""
    said = refused(arm, calls)
    assert all(word in said for word in (arm.function, *words)), said


@pytest.mark.parametrize(
    ("code", "calls", "words"),
    [
        ("pass", 0, "ended (0) without an answer: it said nothing"),
        ("import sys; sys.exit('no\\x1b[31m device')", 0, "ended (1) without an answer: no [31m device"),
        ("print('x' * 10_000_000)", 0, "must answer in lines, found xxx"),
        ("for _ in range(100_000): print('x' * 100)", 0, "ended (0) without an answer"),
        ("import os; os.write(1, bytes(range(256)) * 100)", 0, "ended (0) without an answer"),
        (SERVES + "print('soon')", 1, "must answer with positive seconds, found soon"),
        (SERVES + "print()", 1, "must answer with positive seconds, found nothing"),
        (SERVES + "print('nan')", 1, "must answer with positive seconds, found nan"),
        (SERVES + "print(-1.0)", 1, "must answer with positive seconds, found -1.0"),
        (SERVES + "print('1\\n2\\n3')", 2, "spoke without being asked: 2"),
        (SERVES + "sys.exit('out of memory')", 1, "ended (1) without an answer: out of memory"),
        ("import os; print('ready'); os.close(0); os.close(1); os._exit(5)", 1, "ended (5) without an answer"),
    ],
)
def test_a_command_that_answers_wrongly_is_one_line(code: str, calls: int, words: str) -> None:
    """Garbage, silence, answers nobody asked for and an early end are each a MeasurementError that shows what came."""
    assert words in refused(command(code), calls)


@pytest.mark.parametrize(
    "code", ["{wait}", "print('ready'); {wait}", "print('ready', flush=True)\nwhile True: print('x', file=sys.stderr)"]
)
def test_a_command_that_hangs_is_ended(code: str) -> None:
    """One that never gets ready, one that never answers and one that only complains are ended in time."""
    start = time.monotonic()
    said = refused(command("import sys, time; " + code.format(wait="time.sleep(60)")), 1, timeout_s=0.5)
    assert "took longer than 0.5 s and was ended" in said
    assert time.monotonic() - start < 10


def test_endless_chatter_is_ended() -> None:
    """Lines without end that are not `ready` don't put off the time limit."""
    assert "took longer than 0.5 s" in refused(command("while True: print('loading')"), timeout_s=0.5)


def test_a_program_that_hangs_takes_its_children_with_it(tmp_path: Path) -> None:
    """A program that takes too long is ended together with what it started."""
    log = tmp_path / "log"
    assert "took longer than 5 s" in refused(program("hanging", log=str(log)), timeout_s=5)
    assert all(ends(pid) for pid in pids(log, 2))


def test_an_arm_that_failed_is_gone_at_once() -> None:
    """After a call that failed the process is ended, within the block too, and further calls say so."""
    with Resident(command(SERVES + "print('soon')"), timeout_s=TIMEOUT_S) as resident:
        pid = resident.pid
        with pytest.raises(MeasurementError, match="positive seconds"):
            resident()
        assert pid is not None and ends(pid)
        with pytest.raises(MeasurementError, match="is not running"):
            resident()


@pytest.mark.parametrize("given", [["/nowhere/python"], [""], ["a\0b"], []])
def test_a_command_that_is_not_there(given: list[str]) -> None:
    """A command that cannot be started is one line too."""
    assert "cannot be started" in refused(given)


PARENT = """
import sys
from zimage.measure import Program, Resident
with Resident(Program("tests.measure.programs:sleeping", {{"time_s": {time_s}, "log": {log!r}}}), warm_up=0) as arm:
    print("loaded", flush=True)
    while True:
        arm()
"""


@pytest.mark.parametrize(("number", "time_s"), [(signal.SIGINT, 0.01), (signal.SIGKILL, 0.01), (signal.SIGKILL, 20)])
def test_nothing_outlives_the_one_who_asked(number: int, time_s: float, tmp_path: Path) -> None:
    """Interrupted or killed, the process that asked leaves no program behind, not even one in the middle of a call."""
    log = tmp_path / "log"
    asking = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(time_s=time_s, log=str(log))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        (pid,) = pids(log)
        time.sleep(0.3)
        asking.send_signal(number)
        asking.wait(20)
        assert ends(pid)
    finally:
        asking.kill()
        asking.wait()


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("zimage.arms", {}, 'a program is "module:function"'),
        ("a.b:c.d", {}, "found 'a.b:c.d'"),
        ("a b:c", {}, "a program is"),
        (":c", {}, "a program is"),
        (None, {}, "found None"),
        ("__main__:f", {}, "put the function into a module"),
        ("a:b", {"x": {1, 2}}, "the arguments of a:b must be JSON"),
        ("a:b", {"x": math.nan}, "must be JSON"),
        ("a:b", {1: 2}, "a mapping by name"),
        ("a:b", [1], "a mapping by name"),
        ("a:b", {"x": "y" * 40_000}, "too long"),
    ],
)
def test_what_is_no_program_is_refused(function: Any, arguments: Any, words: str) -> None:
    """Names of another form and arguments that JSON cannot hold are refused before any process starts."""
    with pytest.raises(MeasurementError, match=re.escape(words)) as caught:
        Program(function, arguments)
    assert str(caught.value).isprintable()


def test_fresh_processes_find_a_planted_delay(tmp_path: Path) -> None:
    """An arm that sleeps 30 ms longer than a 30 ms baseline is slower by about two, in eight processes of each.

    Every process is a new one and the one before has ended by then; first calls and warm-ups are kinds of their own.
    """
    log, alive = tmp_path / "log", []

    def advance() -> None:
        alive.extend(pid for pid in pids(log) if not ends(pid))

    found = in_fresh_processes(
        program("sleeping", time_s=0.03, first_s=0.1, log=str(log)),
        program("sleeping", time_s=0.06, first_s=0.1, log=str(log)),
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


def compared(clock: Clock, ratio: float, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ProcessComparison:
    monkeypatch.setattr(processes, "Resident", Fake)
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
    means = np.log(frame["time_s"]).groupby([frame["pair"], frame["arm"]]).mean().unstack()
    wanted = processes.analyse((means["arm"] - means["baseline"]).to_numpy(), 0.05)
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
        "burst",
        8,
        verdict,
        floor,
    )
    conform("ablation", pd.DataFrame([row]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 7}, "at least 8 pairs, found 7"),
        ({"pairs": 8.0}, "found 8.0"),
        ({"samples": 0}, "at least one sample"),
        ({"warm_up": -1}, "warm_up must be a number of calls, found -1"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"timeout_s": math.nan}, "timeout_s must be positive"),
        ({"timeout_s": math.inf}, "timeout_s must be positive"),
        ({"alpha": 0}, "alpha and delta"),
        ({"noise_floor": -1}, "noise_floor"),
        ({"names": ("a", "a")}, "both called 'a'"),
        ({"seed": 0.5}, "seed must be an integer"),
    ],
)
def test_impossible_comparisons_are_refused(options: dict[str, Any], words: str) -> None:
    """Arguments out of range, fewer than eight processes a side among them, are refused before anything runs."""
    arm = program("exiting", status=9)
    with pytest.raises(MeasurementError, match=words):
        in_fresh_processes(arm, arm, **{"seed": 0, **options})
