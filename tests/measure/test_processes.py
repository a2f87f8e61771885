"""Arms in processes of their own: what is timed there, what is made of it, and that nothing is left behind."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.measure.watching import ends, pids
from zimage.errors import MeasurementError
from zimage.measure import Program, Resident, compare
from zimage.measure.processes import Arm

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


def test_a_program_has_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables are there from the start, in the place of this process's, and named where it fails."""
    monkeypatch.setenv("MLX_OF_A_TEST", "1")
    needed = {"name": "MLX_OF_A_TEST", "value": "2"}
    arm = Program(f"{PROGRAMS}:needing", needed, {"MLX_OF_A_TEST": "2"})
    assert str(arm).startswith(f"MLX_OF_A_TEST=2 {PROGRAMS}:needing(")
    with Resident(arm, warm_up=0, timeout_s=TIMEOUT_S) as resident:
        assert resident() > 0
    assert "MLX_OF_A_TEST is '1'" in refused(Program(f"{PROGRAMS}:needing", needed))
    assert os.environ["MLX_OF_A_TEST"] == "1"


@pytest.mark.parametrize("wrong", [{"A": 1}, {1: "a"}, {"": "a"}, {"A=B": "a"}, {"A": "a\0b"}, ["A"], "A=1"])
def test_what_is_no_environment_is_refused(wrong: Any) -> None:
    """Names and values that no process can have are refused before any process starts."""
    with pytest.raises(MeasurementError, match=r"the environment of a:b must be texts by name") as caught:
        Program("a:b", {}, wrong)
    assert str(caught.value).isprintable()


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
    assert all(word in said for word in (str(arm), *words)), said


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


@pytest.mark.parametrize("given", [["/nowhere/python"], [""], ["a\0b"], [], [None]])
def test_a_command_that_is_not_there(given: Any) -> None:
    """A command that cannot be started is one line too."""
    assert "cannot be started" in refused(given)


def test_a_command_is_a_list() -> None:
    """A command in one text is refused: no shell takes it apart."""
    assert "a command is a list of words, found 'python serve.py'" in refused("python serve.py")


def test_a_resident_is_one_process() -> None:
    """Entered again while it runs it refuses, and goes on running."""
    resident = Resident(command(SERVES + "print(1)"), timeout_s=TIMEOUT_S)
    with resident:
        with pytest.raises(MeasurementError, match="is running already"):
            resident.__enter__()
        assert resident() == 1


def test_programs_are_told_apart() -> None:
    """A program is called by its function and its arguments, in one line that is not endless."""
    assert str(program("sleeping", time_s=0.1, log="a\nb")) == f"{PROGRAMS}:sleeping(time_s=0.1, log=a b)"
    assert len(str(program("sleeping", log="x" * 1000))) < 150


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
