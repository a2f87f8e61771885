"""What a process that loads something says of it: one JSON line with seconds, bytes, and the memory it needed at most.

Standard library only, and whole in this one file: its text is also given to interpreters that have no zimage.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def report(load: Callable[[], Any], size: Callable[[Any], int], device_peak: Callable[[], int] = lambda: 0) -> None:
    """Call `load`, and print its seconds, the `size` of its result, and how far memory rose above what it was before.

    device_peak: the most that was allocated on a device, which the system doesn't count as this process's own. The
    larger of the two peaks is given: where host and device share their memory, they count the same bytes.
    """
    before = _start_counting()
    start = time.perf_counter()
    result = load()
    time_s = time.perf_counter() - start
    peak = max(_peak_bytes() - before, device_peak())
    print(json.dumps({"time_s": time_s, "peak_bytes": peak, "result_bytes": size(result)}), flush=True)


def _start_counting() -> int:
    """Bytes that the process holds now; its peak is counted from here on, where the system allows that."""
    if sys.platform != "linux":
        return _peak_bytes()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")  # sets VmHWM to VmRSS
    except OSError:
        return _peak_bytes()  # of the imports, which hold on to nearly all of it
    return _status("VmRSS")


def _peak_bytes() -> int:
    # Linux hands ru_maxrss down from the process that started this one.
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        line = next(line for line in f if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
