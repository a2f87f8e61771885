"""One notebook executed by papermill, in a process of its own: `python -m zimage.lab.worker`.

The job comes as one line of JSON on standard input: notebook, output, parameters, cwd, scratch, result. The pipe then
stays open: when it ends, the runner is gone or wants this to stop, and the worker ends with its kernel. What
happened goes to the file `result` as JSON: error (null or one line) and whether the kernel died.
"""

import json
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_managers: list[Any] = []


def main() -> None:
    """Read the job, watch the pipe, execute, write the result."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    # The user's IPython start-up files, history and sockets have no part in a run, and may not even be writable.
    os.environ["IPYTHONDIR"] = str(Path(job["scratch"], "ipython"))
    os.environ["JUPYTER_RUNTIME_DIR"] = str(Path(job["scratch"], "runtime"))
    result = execute(job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's notebook; the answer says whether it failed, and how."""
    import nbformat
    import papermill
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    class SameInterpreter(AsyncKernelManager):
        """A kernel of this interpreter, whatever kernels are registered on the machine."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            _managers.append(self)

        @property
        def kernel_spec(self) -> KernelSpec:
            # Without the folder the kernel works in on its path, `zimage` is the installed one that the run key names.
            argv = [
                sys.executable,
                "-m",
                "ipykernel_launcher",
                "-f",
                "{connection_file}",
                "--IPKernelApp.ignore_cwd=True",
            ]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    output = Path(job["output"])
    dead = False
    failure: str | None = None
    try:
        notebook = nbformat.read(job["notebook"], as_version=4)  # type: ignore[no-untyped-call]
        papermill.execute_notebook(
            notebook,
            str(output).replace("{", "{{").replace("}", "}}"),  # papermill formats paths with the parameters
            parameters=job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=job["cwd"],
            kernel_manager_class=SameInterpreter,
        )
    except papermill.PapermillExecutionError as error:
        failure = f"{error.ename}: {error.evalue}" if error.evalue else error.ename
    except DeadKernelError:
        dead, failure = True, "the kernel died (out of memory, or a crash in native code)"
    except Exception as error:  # whatever Jupyter raises, the run has failed and says so
        failure = f"{type(error).__name__}: {error}"
    return {"error": None if failure is None else one_line(failure), "dead": dead}


def one_line(text: str, limit: int = 300) -> str:
    """The first line of `text` that says something, without terminal colours."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return first if len(first) <= limit else first[: limit - 3] + "..."


def _end_with_pipe() -> None:
    """Wait for the end of standard input, then kill the kernel, which leads a group of its own, and this group."""
    while os.read(0, 4096):
        pass
    for manager in _managers:
        pid = getattr(getattr(manager, "provisioner", None), "pid", None)
        if pid:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
