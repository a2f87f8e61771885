"""One step here beside diffusers' on the same machine: that both run is tested, how long they take is printed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parity
def test_a_step_beside_diffusers(figure: Callable[[str], None]) -> None:
    """The comparison with diffusers runs and gives both programs' times."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "parity" / "beside_peers.py"), "--rounds", "9"]
    alone = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^zimage +[0-9.]+ s .*\ndiffusers +[0-9.]+ s .*zimage takes [0-9.]+ of its time$", done.stdout, re.M
    )
    figure(done.stdout.strip())
