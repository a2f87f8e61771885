"""Programs for processes of their own: they sleep a planted time, or go wrong in one particular way."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zimage  # noqa: F401 - before MLX

import mlx.core as mx

Work = Callable[[], object]


def sleeping(time_s: float, first_s: float = 0.0, log: str = "") -> Work:
    """Work that takes `time_s`, and `first_s` more at its first call; notes its pid in `log` when it is loaded."""
    if log:
        with Path(log).open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    calls = []

    def work() -> mx.array:
        time.sleep(time_s + (0 if calls else first_s))
        calls.append(1)
        return mx.ones(3) + 1

    return work


def needing(name: str, value: str) -> Work:
    """Work of a process whose environment has had that variable since before MLX was imported."""
    if os.environ.get(name) != value:
        raise ValueError(f"{name} is {os.environ.get(name)!r}")
    return lambda: mx.ones(3) + 1


def raising() -> Work:
    raise ValueError("the first\nthe \x1b[31msecond")


def raising_in_a_call(calls: int) -> Work:
    left = [calls]

    def work() -> mx.array:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no more")
        return mx.ones(1)

    return work


def printing(size: int) -> Work:
    """Work that writes `size` bytes to standard output, as Python does and as C does, and reads standard input."""

    def work() -> mx.array:
        assert sys.stdin.read() == ""
        print("x" * (size // 2))
        for _ in range(size // 2000):
            os.write(1, b"0.5\n" * 250)
        return mx.ones(1)

    return work


def exiting(status: int) -> Work:
    sys.exit(status)


def killed(calls: int) -> Work:
    left = [calls]

    def work() -> mx.array:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), 9)
        return mx.ones(1)

    return work


def hanging(log: str = "") -> Work:
    """Never gives its work; a child that it started hangs too, and both their pids are in `log`."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if log:
        Path(log).write_text(f"{os.getpid()}\n{child.pid}\n", encoding="ascii")
    time.sleep(60)
    return mx.ones


def no_work() -> int:
    return 3


def no_arrays() -> Work:
    return lambda: "a text"
