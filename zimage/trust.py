"""Which GPU kernels of our own are known to give wrong answers, or none, on this device.

A kernel is tried in a process of its own before it may run in this one, where it is checked once more. Verdicts are
kept in the user's cache folder for as long as device, driver, MLX and the kernels' sources stay the same. MLX is not
loaded here. `ZIMAGE_KERNELS=off` turns all kernels off, and so does a value that nobody knows, with one line.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage import blas

VARIABLE = "ZIMAGE_KERNELS"
_ON, _OFF = ("on", "1", "yes", "true", ""), ("off", "0", "no", "false", "none")  # values of it, in any case
TRIAL_TIMEOUT_S = 120.0  # of a trial process: compiling takes seconds, so it hangs
Request = dict[str, Any]  # what a kernel is tried for: `kernel`, its name, `dtype`, and the sizes it is compiled for
HOPPER = "sm_90"  # MLX's name for the architecture of NVIDIA's H100 and H200
_EVERYWHERE: tuple[Request, ...] = (
    {"kernel": "qk_norm_rope", "dtype": "bfloat16", "head_dim": 128},
    {"kernel": "residual_norm_modulate", "dtype": "bfloat16", "width": 3840},
    {"kernel": "swiglu", "dtype": "bfloat16"},
    {"kernel": "dequantize", "dtype": "bfloat16", "mode": "affine", "bits": 4, "group_size": 64},
    {"kernel": "dequantize", "dtype": "bfloat16", "mode": "affine", "bits": 8, "group_size": 64},
)
_DECIDING = ("device", "driver", "mlx", "mlx_build", "os")
_PASSING = ("memory", "timed out waiting", "busy")  # in a reason: it says nothing of the kernel


def off() -> bool:
    """Whether the user turned all kernels off, or may have meant to: see `doubt`."""
    return _asked().lower() not in _ON


def doubt() -> str:
    """The line on a value of VARIABLE that is not known, which counts as off; "" for one that is."""
    if (asked := _asked()).lower() in (*_ON, *_OFF):
        return ""
    return f"{VARIABLE}={asked!r:.60} is not known, so all kernels are off; write {VARIABLE}=off or {VARIABLE}=on"


def _asked() -> str:
    return os.environ.get(VARIABLE, "").strip()


def needed(facts: Mapping[str, str]) -> tuple[Request, ...]:
    """What the published model needs on this device, which `zimage doctor` tries."""
    only_here = {"kernel": "flash_attention", "dtype": "bfloat16", "head_dim": 128}
    return (*_EVERYWHERE, only_here) if facts.get("architecture") == HOPPER else _EVERYWHERE


def key(request: Mapping[str, Any]) -> str:
    """A request as text, the same for the same request."""
    return json.dumps(request, sort_keys=True)


def kept(facts: Mapping[str, str]) -> dict[str, str]:
    """Verdicts on this device as `facts` describe it: why each request's kernel must not be used, "" where it may."""
    path = _path(facts)
    try:
        content = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("identity") != _identity(facts):
        return {}
    verdicts = content.get("verdicts")
    if not isinstance(verdicts, dict):
        return {}
    return {name: reason for name, reason in verdicts.items() if isinstance(reason, str)}


def keep(facts: Mapping[str, str], verdicts: Mapping[str, str]) -> None:
    """Keep verdicts beside those there are; what went wrong only for the moment, as for want of memory, is not kept."""
    path = _path(facts)
    lasting = {name: reason for name, reason in verdicts.items() if not any(w in reason.lower() for w in _PASSING)}
    if path is None or not lasting:
        return
    content = {"identity": _identity(facts), "verdicts": kept(facts) | lasting}
    with suppress(OSError):  # a full disk costs another trial, and nothing else
        blas.write_atomically(path, lambda draft: draft.write_text(json.dumps(content)))


def in_force(facts: Mapping[str, str]) -> str:
    """What runs here where a transform puts a kernel in, as part of a run's key.

    "composed" on a device without kernels, "off", "native", or "native but <digest of the kernels that fall back>".
    A kernel that has not been tried yet counts as one that passes, so that trying it changes no key unless it fails.
    """
    if facts.get("device_type") != "gpu":
        return "composed"
    if off():
        return "off"
    failed = sorted(name for name, reason in kept(facts).items() if reason)
    return f"native but {_digest(failed)[:12]}" if failed else "native"


def settle(facts: Mapping[str, str], requests: Sequence[Request]) -> dict[str, str]:
    """The verdicts on these requests, from those kept and else from a trial, which are then kept."""
    known = kept(facts)
    missing = [request for request in requests if key(request) not in known]
    if missing:
        found = tried(missing, TRIAL_TIMEOUT_S)
        keep(facts, found)
        known |= found
    return {key(request): known[key(request)] for request in requests}


def tried(requests: Sequence[Request], timeout_s: float) -> dict[str, str]:
    """Try kernels in a process of their own, and in another one those that come after one that ended or hung it."""
    verdicts: dict[str, str] = {}
    left = list(requests)
    while left:
        answers, ending = _trial(left, timeout_s)
        verdicts |= {key(request): answers[key(request)] for request in left if key(request) in answers}
        left = [request for request in left if key(request) not in verdicts]
        if left:  # the first one without an answer is what ended the process
            verdicts[key(left.pop(0))] = ending
    return verdicts


def _trial(requests: Sequence[Request], timeout_s: float) -> tuple[dict[str, str], str]:
    """The answers of one trial process, and how it ended for the request that it did not answer."""
    try:
        done = subprocess.run(
            _command(), input=json.dumps(list(requests)), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        answers = said if isinstance(said, str) else said.decode(errors="replace")
        return _answers(answers), f"its trial did not finish within {timeout_s:g} s"
    except OSError as error:
        return {}, f"its trial could not be started: {error.strerror}"
    if done.returncode < 0:
        return _answers(done.stdout), f"its trial was ended by signal {-done.returncode}"
    return _answers(done.stdout), f"its trial failed: {blas.one_line(done.stderr) or f'exit {done.returncode}'}"


def _command() -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "zimage.kernels.trial"]


def _answers(text: str) -> dict[str, str]:
    """The lines that are answers: JSON objects with a request's key and a reason."""
    found = {}
    for line in text.splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            answer = json.loads(line)
            found[str(answer["request"])] = str(answer["reason"])
    return found


def _path(facts: Mapping[str, str]) -> Path | None:
    folder = blas.cache_folder()
    return None if folder is None else folder / f"kernels-{facts['device']}.json"


def _identity(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: facts.get(name, "") for name in _DECIDING} | {"sources": sources_digest()}


@functools.cache
def sources_digest() -> str:
    """A digest of everything a kernel is made of: the files of zimage.kernels."""
    files = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    return _digest([text for path in files for text in (path.name, path.read_text(encoding="utf-8"))])


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
