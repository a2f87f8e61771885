"""Arms and loaders in processes of their own: run to their end, or resident and timed call by call. Needs no MLX.

Two arms that don't fit in memory together alternate as processes here, and fresh processes tell what one start of a
program, with its addresses and its warm-up, does to the times. Every process leads a group, which is ended as a whole.
"""

import json
import math
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zimage
from zimage.errors import MeasurementError
from zimage.measure.statistics import analyse, verdict

import numpy as np

FEWEST_PAIRS = 8
_LONGEST = 300  # characters of what a process said
_LONGEST_JOB = 32_768  # bytes: what a pipe takes before anyone reads from it
_END_S = 2.0  # for a process to end by itself once its input has ended


@dataclass(frozen=True)
class Program:
    """An arm as data: a "module:function" and JSON arguments, given to the function by name in another process.

    The function loads what it needs and gives a callable without arguments, which builds its graph anew and returns the
    arrays to compute, as for `measure.timed`. Modules are found where this process finds them. Raises MeasurementError
    for a name of another form and for arguments that are not JSON.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, name = str(self.function).partition(":")
        if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise MeasurementError(f'a program is "module:function", found {line(repr(self.function))}')
        if module == "__main__":
            raise MeasurementError(f"{line(self)} is known to this process only; put the function into a module")
        self.job(0)

    def __str__(self) -> str:
        return self.function

    def job(self, warm_up: int) -> bytes:
        """The line that tells `zimage.measure.worker` what to do."""
        try:
            if not isinstance(self.arguments, Mapping) or not all(isinstance(name, str) for name in self.arguments):
                raise TypeError(f"they must be a mapping by name, found {self.arguments!r}")
            content = {"function": self.function, "arguments": dict(self.arguments), "warm_up": warm_up}
            job = json.dumps({**content, "path": sys.path}, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise MeasurementError(f"the arguments of {line(self)} must be JSON: {line(error)}") from None
        if len(job) > _LONGEST_JOB:
            raise MeasurementError(f"the arguments of {line(self)} are too long; hand over the name of a file instead")
        return job


Arm = Program | Sequence[str]


class Resident:
    """A process that stays alive with its arm loaded: a context manager, and inside it a `Timed`.

    arm: a Program, called once and `warm_up` times before it is ready, or a command. A command says `ready` in a line
    once it is, then answers every line on its standard input with a line whose last word is the seconds of one call,
    and ends with its input. timeout_s: for getting ready, and for each call.

    Entering and calling raise MeasurementError, one line with the last that the process said, when it cannot be
    started, fails, answers anything else, or takes too long. It and all that it started end with the block, or when it
    fails; a Program also ends when this process is killed.
    """

    def __init__(self, arm: Arm, *, warm_up: int = 3, timeout_s: float = 600.0) -> None:
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise MeasurementError(f"warm_up must be a number of calls, found {warm_up!r}")
        if not 0 < timeout_s < math.inf:
            raise MeasurementError(f"timeout_s must be positive and finite, found {timeout_s!r}")
        if isinstance(arm, Program):
            self._command: Sequence[str] = [sys.executable, "-P", "-m", "zimage.measure.worker"]
            self._job, self._what = arm.job(warm_up), f"the program {line(arm)}"
        else:
            self._command, self._job, self._what = arm, b"", f"the program {named(arm)}"
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._out = self._err = b""
        self.before_s: list[float] = []  # seconds of a Program's first call and of its warm-ups

    def __enter__(self) -> "Resident":
        self._process = start(self._command, self._what, own=bool(self._job), stdin=subprocess.PIPE)
        self._out = self._err = b""
        try:
            self._tell(self._job)
            words = self._answer(lambda said: said.startswith("ready")).split()
            self.before_s = [float(word) for word in words[1:]] if self._job else []
        except BaseException:
            self._end(0)
            raise
        return self

    def __exit__(self, kind: object, *_rest: object) -> None:
        self._end(_END_S if kind is None else 0)

    def __call__(self) -> float:
        """Have one call timed; its seconds."""
        if self._process is None:
            raise MeasurementError(f"{self._what} is not running; call it inside `with Resident(...) as arm:`")
        try:
            return self._call()
        except BaseException:
            self._end(0)
            raise

    def _call(self) -> float:
        if self._read(0):
            raise self._ended()
        if self._out:
            raise MeasurementError(f"{self._what} spoke without being asked: {line(_decode(self._out))}")
        self._tell(b"\n")
        said = self._answer(lambda _: True)
        with suppress(ValueError, IndexError):
            time_s = float(said.split()[-1])
            if 0 < time_s < math.inf:
                return time_s
        raise MeasurementError(f"{self._what} must answer with positive seconds, found {line(said) or 'nothing'}")

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process else None

    def _tell(self, text: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self, wanted: Callable[[str], bool]) -> str:
        """The first line that is `wanted`."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            first, newline, rest = self._out.partition(b"\n")
            if newline:
                self._out = rest
                if wanted(_decode(first)):
                    return _decode(first)
            elif len(first) > _LONGEST_JOB:
                raise MeasurementError(f"{self._what} must answer in lines, found {line(_decode(first))}")
            if (left := deadline - time.monotonic()) <= 0:
                raise _too_slow(self._what, self._timeout_s)
            if not newline and self._read(min(left, 60.0)):
                raise self._ended()

    def _read(self, timeout_s: float) -> bool:
        """Wait for output, standard error's too so that it never fills up; whether standard output has ended."""
        assert self._process is not None and self._process.stdout is not None and self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not self._process.stderr.closed:
                selector.register(self._process.stderr, selectors.EVENT_READ)
            ended = False
            for key, _ in selector.select(timeout_s):
                data = os.read(key.fd, 65536)
                if key.fileobj is self._process.stdout:
                    self._out += data
                    ended = not data
                elif data:
                    self._err = (self._err + data)[-4096:]
                else:
                    self._process.stderr.close()
        return ended

    def _ended(self) -> MeasurementError:
        assert self._process is not None and self._process.stderr is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        if not self._process.stderr.closed:
            os.set_blocking(self._process.stderr.fileno(), False)
            with suppress(BlockingIOError):
                while data := os.read(self._process.stderr.fileno(), 65536):
                    self._err = (self._err + data)[-4096:]
        code = self._process.returncode
        status = "its output" if code is None else f"({code})"
        return MeasurementError(f"{self._what} ended {status} without an answer: {last_words(_decode(self._err))}")

    def _end(self, grace_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        finally:
            kill(process)
            with process:
                pass


@dataclass(frozen=True)
class ProcessSample:
    """One timed call: of which arm, in which process and pair, the how-manieth there, and of what kind."""

    arm: str
    process: int
    pair: int
    position: int
    kind: str
    time_s: float


@dataclass(frozen=True)
class ProcessComparison:
    """What an arm did to the time over pairs of fresh processes; the fields mean what those of `Comparison` do."""

    baseline: str
    arm: str
    ratio: float
    low: float
    high: float
    p: float
    verdict: str
    reason: str
    pairs: int
    alpha: float
    delta: float
    noise_floor: float | None
    seed: int
    samples: list[ProcessSample]

    def __str__(self) -> str:
        confidence = f"{100 * (1 - self.alpha):g} % CI"
        evidence = f"{self.pairs} pairs of fresh processes"
        if self.noise_floor is not None:
            evidence += f", noise floor {100 * self.noise_floor:.1f} %"
        if self.verdict == "inconclusive":
            evidence += f" ({self.reason})"
        if self.low <= 1 <= self.high:
            found = f"time ratio {self.ratio:.3f} to {self.baseline}, {confidence} {self.low:.3f}-{self.high:.3f}"
        else:
            change, *ends = (100 * abs(1 - x) for x in (self.ratio, self.low, self.high))
            found = f"{change:.1f} % {'less' if self.ratio < 1 else 'more'} time than {self.baseline}, "
            found += f"{confidence} {min(ends):.1f}-{max(ends):.1f}"
        return f"{self.arm}: {self.verdict}, {found}, {evidence}"

    def row(self, scope: str) -> dict[str, Any]:
        """The comparison as a row of the `ablation` table, pairs of processes in the place of quads."""
        return {
            "arm": self.arm, "baseline": self.baseline, "scope": scope, "regime": "burst", "ratio": self.ratio,
            "ratio_low": self.low, "ratio_high": self.high, "p_value": self.p, "verdict": self.verdict,
            "reason": self.reason, "verdict_without_drops": self.verdict, "quads": self.pairs, "dropped_quads": 0,
            "noise_floor": self.noise_floor,
        }  # fmt: skip

    def sample_rows(self, scope: str, trial: int = 0) -> list[dict[str, Any]]:
        """Every timed call as a row of the `samples` table: first calls and warm-ups are kinds of their own.

        Processes are numbered from 1 in the order they ran; 0 is the one that asks.
        """
        return [
            {
                "arm": s.arm, "scope": scope, "process": s.process, "trial": trial, "quad": s.pair,
                "position": s.position, "kind": s.kind, "regime": "burst", "time_s": s.time_s, "dropped": False,
            }
            for s in self.samples
        ]  # fmt: skip


def in_fresh_processes(
    baseline: Arm,
    arm: Arm,
    *,
    seed: int,
    pairs: int = FEWEST_PAIRS,
    samples: int = 10,
    warm_up: int = 3,
    alpha: float = 0.05,
    delta: float = 0.01,
    noise_floor: float | None = None,
    timeout_s: float = 600.0,
    names: tuple[str, str] = ("baseline", "arm"),
    advance: Callable[[], None] = lambda: None,
) -> ProcessComparison:
    """Compare two arms, each loaded alone in `pairs` processes of its own, one process alive at a time.

    A process makes its first call, `warm_up` more, then `samples`; a pair is one process of each arm, in an order drawn
    from `seed`, and gives one difference of mean log times. They are judged once, by the signed-rank test over pairs.
    advance: called after each of the 2 `pairs` processes. Raises MeasurementError for fewer than 8 pairs and other
    arguments out of range, and as `Resident` does.
    """
    _check(pairs, samples, alpha, delta, noise_floor, names, seed)
    rng = random.Random(seed)
    taken: list[ProcessSample] = []
    differences: list[float] = []
    for pair in range(pairs):
        order = [(names[0], baseline), (names[1], arm)]
        if rng.random() < 0.5:
            order.reverse()
        means = {}
        for i, (name, program) in enumerate(order, start=1):
            with Resident(program, warm_up=warm_up, timeout_s=timeout_s) as resident:
                before = resident.before_s
                times = [resident() for _ in range(samples)]
            kinds = ["first call", "warm-up"]
            kinds = kinds[: len(before)] + kinds[1:] * (len(before) - 2) + ["sample"] * samples
            taken += [
                ProcessSample(name, 2 * pair + i, pair, position, kind, time_s)
                for position, (kind, time_s) in enumerate(zip(kinds, [*before, *times], strict=True))
            ]
            means[name] = float(np.log(times).mean())
            advance()
        differences.append(means[names[1]] - means[names[0]])
    estimate = analyse(np.array(differences), alpha)
    word, reason = verdict(estimate, delta, noise_floor)
    return ProcessComparison(
        *names, estimate.ratio, estimate.low, estimate.high, estimate.p, word, reason, pairs, alpha, delta,
        noise_floor, seed, taken,
    )  # fmt: skip


def _check(
    pairs: int,
    samples: int,
    alpha: float,
    delta: float,
    noise_floor: float | None,
    names: tuple[str, str],
    seed: int,
) -> None:
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < FEWEST_PAIRS:
        raise MeasurementError(f"fresh processes are compared in at least {FEWEST_PAIRS} pairs, found {pairs!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise MeasurementError(f"a process must take at least one sample, found {samples!r}")
    if not 0 < alpha < 1 or not 0 < delta < 1:
        raise MeasurementError(f"alpha and delta must lie between 0 and 1, found {alpha} and {delta}")
    if noise_floor is not None and not 0 <= noise_floor < math.inf:
        raise MeasurementError(f"noise_floor must be a |log ratio|, 0 or more, found {noise_floor}")
    if names[0] == names[1]:
        raise MeasurementError(f"baseline and arm are both called {names[0]!r}; their names must differ")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MeasurementError(f"seed must be an integer, found {seed!r}")


def run_to_end(command: Sequence[str], what: str, timeout_s: float) -> str:
    """Run a command of ours in a process of its own to its end; what it printed.

    Raises MeasurementError, which calls it `what`, when it cannot be started, fails or takes longer than `timeout_s`;
    then it and all that it started are ended.
    """
    with start(command, what, own=True, stdin=subprocess.DEVNULL) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise _too_slow(what, timeout_s) from None
            raise
    if process.returncode != 0:
        raise MeasurementError(f"{what} failed ({process.returncode}): {last_words(_decode(err))}")
    return _decode(out)


def start(command: Sequence[str], what: str, own: bool, stdin: int) -> subprocess.Popen[bytes]:
    """A process that leads a group of its own, its output in pipes; an `own` one's zimage is this one."""
    environment = dict(os.environ)
    if own:
        home = str(Path(zimage.__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        return subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=environment,
        )  # fmt: skip
    except (OSError, ValueError, IndexError, TypeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise MeasurementError(f"{what} cannot be started: {line(reason)}") from None


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that `start` gave, with all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def named(command: Sequence[str]) -> str:
    """The program and its first words, without a whole text of code."""
    return line(" ".join(word for word in command[:4] if len(word) < 200 and "\n" not in word))


def last_words(text: str) -> str:
    """The last line that says something."""
    return line(next((one for one in reversed(text.splitlines()) if one.strip()), "it said nothing"))


def line(text: object) -> str:
    """Any text as one printable line of bounded length."""
    one = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return one if len(one) <= _LONGEST else f"{one[:_LONGEST]}..."


def _too_slow(what: str, timeout_s: float) -> MeasurementError:
    return MeasurementError(f"{what} took longer than {timeout_s:g} s and was ended; give it more time")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")
