"""What loading costs: seconds and memory of a loader, each time in a process that has loaded nothing before.

A second load in the same process would find memory already mapped, and a peak that never falls. Knows commands, not
models: a loader is a command that ends its output with the line that `reporting.report` prints.
"""

import json
import math
import os
import random
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zimage
from zimage.errors import MeasurementError

PLAIN_READ = "plain read"  # the loader that the others are compared with: the same bytes into fresh memory
_LONGEST = 300  # characters of what a loader said


@dataclass(frozen=True)
class Loading:
    """One load: its seconds, how far the process's memory rose at most, and the bytes of what it gave."""

    time_s: float
    peak_bytes: int
    result_bytes: int

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes of the result in a second."""
        return self.result_bytes / self.time_s


def measure_loading(command: Sequence[str], timeout_s: float = 600.0) -> Loading:
    """Run a loader in a process of its own, and give what it reports.

    Raises MeasurementError when it cannot be started, fails, reports nothing of the kind or takes longer than
    `timeout_s`; then it and all that it started are ended.
    """
    home = str(Path(zimage.__file__).parent.parent)  # the loader's zimage is this one
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise MeasurementError(f"the loader {_line(command[0])} cannot be started: {_line(reason)}") from None
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise MeasurementError(
                f"the loader {_named(command)} took longer than {timeout_s:g} s and was ended; give it more time"
            ) from None
        raise
    if process.returncode != 0:
        said = next((line for line in reversed(err.splitlines()) if line.strip()), "it said nothing")
        raise MeasurementError(f"the loader {_named(command)} failed ({process.returncode}): {_line(said)}")
    return _parse(command, out)


def take_turns(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    seed: int = 0,
    timeout_s: float = 600.0,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure every loader once a round, in an order drawn anew each round, after a round that is not counted.

    The first round leaves the files in the system's page cache, where they fit. Gives rows of the table `loading`.
    """
    if rounds < 1:
        raise MeasurementError(f"loading needs at least one round, found rounds={rounds}")
    order, names, rows = random.Random(seed), list(commands), []
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            found = measure_loading(commands[name], timeout_s)
            advance()
            if number:
                speed = found.bandwidth_bytes_per_s
                rows.append({"arm": name, "round": number, **asdict(found), "bandwidth_bytes_per_s": speed})
    return sorted(rows, key=lambda row: (list(commands).index(row["arm"]), row["round"]))


def _parse(command: Sequence[str], out: str) -> Loading:
    lines = out.strip().splitlines()
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        content = json.loads(lines[-1] if lines else "")
        found = Loading(float(content["time_s"]), int(content["peak_bytes"]), int(content["result_bytes"]))
        if math.isfinite(found.time_s) and found.time_s > 0 and found.result_bytes > 0:
            return found
    said = _line(lines[-1]) if lines else "nothing"
    raise MeasurementError(f"the loader {_named(command)} must print its time_s and bytes as JSON, found {said}")


def _named(command: Sequence[str]) -> str:
    """The program and its first words, without a whole text of code."""
    return _line(" ".join(word for word in command[:4] if len(word) < 200 and "\n" not in word))


def _line(text: object) -> str:
    """Any text as one printable line of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
