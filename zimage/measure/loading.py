"""What loading costs: seconds and memory of a loader, each time in a process that has loaded nothing before.

A second load in the same process would find memory already mapped, and a peak that never falls. Knows commands, not
models: a loader is a command that ends its output with the line that `reporting.report` prints.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.processes import line, named, run_to_end

PLAIN_READ = "plain read"  # the loader that the others are compared with: the same bytes into fresh memory


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
    return _parse(command, run_to_end(command, f"the loader {named(command)}", timeout_s))


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
    said = line(lines[-1]) if lines else "nothing"
    raise MeasurementError(f"the loader {named(command)} must print its time_s and bytes as JSON, found {said}")
