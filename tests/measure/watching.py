"""Processes that tests start, watched by their pids."""

import subprocess
import time
from pathlib import Path


def ends(pid: int) -> bool:
    """Whether the process ends within 5 seconds; one that only waits to be collected has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        if not shown.stdout.strip() or shown.stdout.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def pids(log: Path, count: int = 1) -> list[int]:
    """The pids in `log`, once there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = log.read_text(encoding="ascii").split() if log.exists() else []
        if len(found) >= count:
            return [int(pid) for pid in found]
        time.sleep(0.05)
    raise AssertionError("the program did not come so far")
