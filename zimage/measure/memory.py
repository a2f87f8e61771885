"""Memory: what MLX holds by stage, what the process and the system hold, and whether anything was swapped meanwhile.

What the platform doesn't tell is None.
"""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.errors import MeasurementError

import mlx.core as mx

_PROC = Path("/proc")
_COMMAND_TIMEOUT_S = 10
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory MLX held while `work`'s arrays were computed, everything that was held before included."""
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(work())
    return max(int(mx.get_peak_memory()), int(mx.get_active_memory()))  # the first is 0 until something is allocated


def needed_bytes(own_bytes: int, work: Callable[[], Any], runs: int = 3) -> int:
    """What an arm needs alone: its `own_bytes` of weights, which are held already, and the most that `work` adds.

    What others hold beside it is no part of that. The most of several runs: how far the host is ahead of the device
    changes what is alive at once, and the first run builds what is not built yet.
    """
    return needed_range(own_bytes, work, runs)[1]


def needed_range(own_bytes: int, work: Callable[[], Any], runs: int = 3) -> tuple[int, int]:
    """The least and the most that an arm needs alone in several runs; see `needed_bytes`."""
    held = int(mx.get_active_memory())
    peaks = [peak_bytes(work) for _ in range(runs)]
    return own_bytes + min(peaks) - held, own_bytes + max(peaks) - held


def by_stage(names: Sequence[str], run: Callable[[int], Any]) -> list[dict[str, Any]]:
    """MLX's memory for each prefix of a chain, as rows (stage, metric, bytes) of the `memory` table.

    `run(k)` builds the first k stages and returns what has to be evaluated. active_bytes: held once these are computed
    and kept, weights included; peak_bytes: the most that was held meanwhile, counted from before this prefix;
    cache_bytes: freed buffers that MLX keeps for reuse. Raises MeasurementError for no stages.
    """
    if not names:
        raise MeasurementError("memory by stage needs at least one stage")
    rows = []
    for k, name in enumerate(names, start=1):
        mx.clear_cache()
        mx.reset_peak_memory()
        result = run(k)
        mx.eval(result)
        active = int(mx.get_active_memory())
        peak = max(int(mx.get_peak_memory()), active)
        found = {"active_bytes": active, "peak_bytes": peak, "cache_bytes": int(mx.get_cache_memory())}
        rows += [{"stage": name, "metric": metric, "bytes": value} for metric, value in found.items()]
        del result
    return rows


def process() -> dict[str, int | None]:
    """Memory of this process and swap of the system, in bytes.

    resident_bytes: of this process now; resident_peak_bytes: the most it was; swap_used_bytes: of the whole system;
    swapped_in_bytes and swapped_out_bytes: since the system started, so that their difference over a run says whether
    it swapped.
    """
    if sys.platform == "linux":
        return _linux()
    return _macos() if sys.platform == "darwin" else dict.fromkeys(_linux(), None)


def device() -> dict[str, int | None]:
    """Bytes of the device's memory, its recommended working set, and what MLX holds, caches and at most held of it."""
    info = mx.device_info()
    total, recommended = info.get("total_memory", info.get("memory_size")), info.get("max_recommended_working_set_size")
    if mx.default_device().type == mx.DeviceType.cpu:
        total, recommended = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return {
        "memory_bytes": None if total is None else int(total),
        "recommended_bytes": None if recommended is None else int(recommended),
        "active_bytes": int(mx.get_active_memory()),
        "cache_bytes": int(mx.get_cache_memory()),
        "peak_bytes": int(mx.get_peak_memory()),
    }


@dataclass
class Swapping:
    """What the whole system swapped while it was watched, in bytes; None where the platform doesn't tell."""

    in_bytes: int | None = None
    out_bytes: int | None = None

    def __str__(self) -> str:
        if self.in_bytes is None or self.out_bytes is None:
            return "whether anything was swapped meanwhile is unknown"
        if not self.in_bytes and not self.out_bytes:
            return "nothing was swapped meanwhile"
        return (
            f"the system swapped {self.out_bytes / 1e6:.1f} MB out and {self.in_bytes / 1e6:.1f} MB in meanwhile: "
            "these times are not the device's; free memory and measure again"
        )


@contextmanager
def watch() -> Iterator[Swapping]:
    """Watch the system's swap: what is given is filled in when the block ends, and prints as one line."""
    seen, before = Swapping(), process()
    try:
        yield seen
    finally:
        after = process()
        seen.in_bytes = _difference(before["swapped_in_bytes"], after["swapped_in_bytes"])
        seen.out_bytes = _difference(before["swapped_out_bytes"], after["swapped_out_bytes"])


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _linux() -> dict[str, int | None]:
    status, meminfo, vmstat = (_numbers(_PROC / name) for name in ("self/status", "meminfo", "vmstat"))
    page = os.sysconf("SC_PAGE_SIZE")
    free = _difference(meminfo.get("SwapFree"), meminfo.get("SwapTotal"))
    return {
        "resident_bytes": _times(status.get("VmRSS"), 1024),
        "resident_peak_bytes": _times(status.get("VmHWM"), 1024),
        "swap_used_bytes": _times(free, 1024),
        "swapped_in_bytes": _times(vmstat.get("pswpin"), page),
        "swapped_out_bytes": _times(vmstat.get("pswpout"), page),
    }


def _macos() -> dict[str, int | None]:
    resident = re.search(r"\d+", _output("ps", "-o", "rss=", "-p", str(os.getpid())))
    used = re.search(r"used = ([\d.]+)([KMG])", _output("sysctl", "-n", "vm.swapusage"))
    counters = _output("vm_stat")
    page = re.search(r"page size of (\d+) bytes", counters)
    pages = {name: re.search(rf"{name}:\s+(\d+)", counters) for name in ("Swapins", "Swapouts")}

    def swapped(name: str) -> int | None:
        found = pages[name]
        return int(found[1]) * int(page[1]) if found and page else None

    return {
        "resident_bytes": int(resident[0]) * 1024 if resident else None,
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "swap_used_bytes": int(float(used[1]) * _UNITS[used[2]]) if used else None,
        "swapped_in_bytes": swapped("Swapins"),
        "swapped_out_bytes": swapped("Swapouts"),
    }


def _times(value: int | None, unit: int) -> int | None:
    return None if value is None else value * unit


def _numbers(path: Path) -> dict[str, int]:
    """The first number on each line of one of Linux's status files, by its name; nothing where it cannot be read."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", text, re.MULTILINE)}


def _output(*command: str) -> str:
    """A command's output, or "" when it is not there, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
