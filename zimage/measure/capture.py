"""Native captures, on request and never timed: Metal's .gputrace, and NVTX ranges for Nsight Systems.

Open a .gputrace with Xcode (`open step.gputrace`). NVTX ranges are seen by Nsight Systems, under which the whole
process runs: `nsys profile --trace=cuda,nvtx --output=step python capture.py`, then `nsys-ui step.nsys-rep`, or
`nsys stats --report nvtx_sum step.nsys-rep` in a terminal.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.arguments import require_gputrace
from zimage.measure.timing import untimed

import mlx.core as mx


def require(kind: str | None) -> None:
    """Raise MeasurementError unless a capture of this kind can be taken: "nvtx", a path for `metal`, or None for none.

    For before a long measurement that ends with one.
    """
    if kind == "nvtx":
        _ranges()
    elif kind:
        _require_metal(Path(kind))


def metal(work: Callable[[], Any], path: str | Path) -> Path:
    """Evaluate what `work` returns under a Metal capture, and give the .gputrace that was written.

    Run `work` once before, or the capture shows kernels being built. Raises MeasurementError without a Metal device,
    without MTL_CAPTURE_ENABLED=1 in the environment the process started with, or for a path that cannot be written.
    """
    target = Path(path)
    _require_metal(target)
    with untimed("a Metal capture"):
        try:
            mx.metal.start_capture(str(target))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MeasurementError(f"{target}: Metal started no capture: {reason}") from None
        try:
            mx.eval(work())
        finally:
            mx.metal.stop_capture()
    return target


def nvtx(names: Sequence[str], step: Callable[[int], Any]) -> None:
    """Evaluate a chain stage by stage, each within an NVTX range of its name.

    `step(k)` continues from what step(k - 1) left, for k = 1 .. len(names), and returns what has to be evaluated.
    Raises MeasurementError for no stages, or without the package nvtx.
    """
    if not names:
        raise MeasurementError("a capture needs at least one stage")
    ranges = _ranges()
    with untimed("an NVTX capture"):
        for k, name in enumerate(names, start=1):
            with ranges.annotate(name):
                mx.eval(step(k))  # waits for the device, so that the range spans its work


def _require_metal(target: Path) -> None:
    require_gputrace(target)
    if not mx.metal.is_available():
        raise MeasurementError("no Metal device here: a .gputrace is captured on a Mac with Apple silicon")
    if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
        raise MeasurementError("Metal captures must be allowed at start: run again with MTL_CAPTURE_ENABLED=1 set")
    if target.exists():
        raise MeasurementError(f"{target} exists already, and Metal overwrites no capture: move it or choose another")


def _ranges() -> Any:
    """The package nvtx."""
    try:
        return import_module("nvtx")
    except ImportError:
        raise MeasurementError("NVTX ranges need a package that is not installed: pip install nvtx") from None
