"""A Program's process: `python -m zimage.measure.worker` loads it, says it is ready, and times one call when asked.

The job comes as one line of JSON on standard input: function, arguments, warm_up, and the path to find modules on. Then
`ready`, with the seconds of the first call and the warm-ups, is said on standard output, and the seconds of one more
call for every further line. When the input ends, whoever asked is gone or has had enough: the process ends with all
that it started, in the middle of a call too.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from zimage.errors import MeasurementError, ZImageError
from zimage.measure.processes import line
from zimage.measure.timing import timed


def main() -> int:
    """Serve until the input ends; the exit status of a program that fails."""
    asking, answering = _own_streams()
    job = json.loads(asking.readline())
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asking, asked), daemon=True).start()
    try:
        sys.path[:] = job["path"]
        call = timed(work(job["function"], job["arguments"]))
        print("ready", *(call() for _ in range(1 + job["warm_up"])), file=answering, flush=True)
        while True:
            asked.get()
            print(call(), file=answering, flush=True)
    except ZImageError as error:
        print(line(error), file=sys.stderr)
    except Exception as error:  # whatever the program raises is for whoever asked, in one line
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = line(f"{type(error).__name__}: {error}")
        print(f"{said} ({Path(where.filename).name}, line {where.lineno})", file=sys.stderr)
    return 1


def work(function: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """What "module:function" gives for these arguments. Raises MeasurementError where that is not callable."""
    module, _, name = function.partition(":")
    found = getattr(import_module(module), name)(**arguments)
    if not callable(found):
        raise MeasurementError(f"{function} must give a callable without arguments, found {type(found).__name__}")
    return found


def _own_streams() -> tuple[IO[bytes], IO[str]]:
    """Standard input and output for the answers alone: the program reads nothing, and prints to standard error."""
    asking, answering = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return asking, answering


def _listen(asking: IO[bytes], asked: queue.SimpleQueue[bytes]) -> None:
    for one in iter(asking.readline, b""):
        asked.put(one)
    with suppress(ProcessLookupError, PermissionError):  # by hand, it may not lead a group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
