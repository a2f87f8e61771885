"""Arms and loaders in processes of their own: run to their end, or resident and timed call by call. Needs no MLX.

Every process leads a group, and is ended with all that it started.
"""

import json
import math
import os
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
from zimage.measure.arguments import require_integer, require_positive

_LONGEST = 300  # characters of what a process said
_LONGEST_JOB = 32_768  # bytes: what a pipe takes before anyone reads from it
_END_S = 2.0  # for a process to end by itself once its input has ended


@dataclass(frozen=True)
class Program:
    """An arm as data: a "module:function" and JSON arguments, given to the function by name in another process.

    The function loads what it needs and gives a callable without arguments, which builds its graph anew and returns the
    arrays to compute, as for `measure.timed`. Modules are found where this process finds them. environment: variables
    that the process has beside those of this one, or in their place, from its start. Raises MeasurementError for a name
    of another form, for arguments that are not JSON and for variables that are no texts.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, name = str(self.function).partition(":")
        if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise MeasurementError(f'a program is "module:function", found {line(repr(self.function))}')
        if module == "__main__":
            raise MeasurementError(f"{self.function} is known to this process only; put the function into a module")
        if not isinstance(self.environment, Mapping) or not all(map(_is_variable, self.environment.items())):
            raise MeasurementError(
                f"the environment of {line(self.function)} must be texts by name, found {line(self.environment)}"
            )
        self.job(0)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        variables = "".join(f"{name}={value} " for name, value in self.environment.items())
        return line(f"{variables}{self.function}({given})", 120)

    def job(self, warm_up: int) -> bytes:
        """The line that tells `zimage.measure.worker` what to do."""
        try:
            if not isinstance(self.arguments, Mapping) or not all(isinstance(name, str) for name in self.arguments):
                raise TypeError(f"they must be a mapping by name, found {self.arguments!r}")
            content = {"function": self.function, "arguments": dict(self.arguments), "warm_up": warm_up}
            job = json.dumps({**content, "path": sys.path}, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise MeasurementError(f"the arguments of {line(self.function)} must be JSON: {line(error)}") from None
        if len(job) > _LONGEST_JOB:
            raise MeasurementError(
                f"the arguments of {line(self.function)} are too long; hand over the name of a file instead"
            )
        return job


def _is_variable(pair: tuple[Any, Any]) -> bool:
    texts = all(isinstance(text, str) and "\0" not in text for text in pair)
    return texts and pair[0] != "" and "=" not in pair[0]


Arm = Program | Sequence[str]


class Resident:
    """A process that stays alive with its arm loaded: a context manager, and inside it a `Timed`.

    arm: a Program, called once and `warm_up` times before it is ready, or a command. A command says `ready` in a line
    once it is, then answers every line on its standard input with a line whose last word is the seconds of one call,
    and ends with its input. timeout_s: for getting ready, and for each call. Compare a resident with another one: an
    arm in this process shares it with whatever else is loaded here.

    Entering and calling raise MeasurementError, one line with the last that the process said, when it cannot be
    started, fails, answers anything else, or takes too long. It and all that it started end with the block, or when it
    fails; a Program also ends when this process is killed.
    """

    def __init__(self, arm: Arm, *, warm_up: int = 3, timeout_s: float = 600.0) -> None:
        require_integer("warm_up", warm_up, 0)
        require_positive(timeout_s=timeout_s)
        if isinstance(arm, Program):
            self._command: Sequence[str] = [sys.executable, "-P", "-m", "zimage.measure.worker"]
            self._job, self._what = arm.job(warm_up), f"the program {arm}"
        else:
            self._command, self._job, self._what = arm, b"", f"the program {named(arm)}"
        self._variables = arm.environment if isinstance(arm, Program) else {}
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._out = self._err = b""
        self.before_s: list[float] = []  # seconds of a Program's first call and of its warm-ups

    def __enter__(self) -> "Resident":
        if self._process is not None:
            raise MeasurementError(f"{self._what} is running already; make another Resident for another process")
        own = bool(self._job)
        self._process = start(self._command, self._what, own, stdin=subprocess.PIPE, variables=self._variables)
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


def start(
    command: Sequence[str], what: str, own: bool, stdin: int, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process that leads a group of its own, its output in pipes; an `own` one's zimage is this one.

    variables: of its environment, in the place of this process's.
    """
    if isinstance(command, str):
        raise MeasurementError(f"a command is a list of words, found {line(repr(command))}")
    environment = dict(os.environ) | dict(variables or {})
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
    words = [command] if isinstance(command, str) else [str(word) for word in command[:4]]
    return line(" ".join(word for word in words if len(word) < 200 and "\n" not in word))


def last_words(text: str) -> str:
    """The last line that says something."""
    return line(next((one for one in reversed(text.splitlines()) if one.strip()), "it said nothing"))


def line(text: object, longest: int = _LONGEST) -> str:
    """Any text as one printable line of bounded length."""
    one = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return one if len(one) <= longest else f"{one[:longest]}..."


def _too_slow(what: str, timeout_s: float) -> MeasurementError:
    return MeasurementError(f"{what} took longer than {timeout_s:g} s and was ended; give it more time")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")
