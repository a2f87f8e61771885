"""The first thing that anyone runs, through the command line: what it prints, leaves behind and can be asked later."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.sweeping import ROOT, Sweep, command, environment
from zimage import digits
from zimage.digits import picture
from zimage.digits.data import Digits
from zimage.digits.quality import recognised

import numpy as np
import pytest
from PIL import Image

WITHOUT_MLX = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx" or name.startswith("mlx."):
            raise ImportError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
from zimage import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def sweep(quickstart: Sweep) -> Sweep:
    return quickstart


def without_mlx(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`zimage` with these arguments, in a process that cannot import MLX."""
    line = [sys.executable, "-W", "error", "-c", WITHOUT_MLX, *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=300)


def test_the_quickstart_says_what_it_does_and_found(sweep: Sweep) -> None:
    """It says how many runs, then that all completed, on what device what was found, and where the page is."""
    assert (sweep.status, sweep.err) == (0, "")
    first, second, start, *found, page = sweep.out.splitlines()
    assert first.startswith("quickstart: 3 runs, 3 to do, ")
    assert re.fullmatch(r"quickstart: 3 completed, 0 failed in .+", second)
    assert start.startswith("On ") and start.endswith(", with trained weights:")
    subjects = (" of a step", "fused_qkv", "8bit", "4bit", "bfloat16")
    assert len(found) == len(subjects)
    for line, subject in zip(found, subjects, strict=True):
        assert line.startswith("- ") and subject in line
    assert all(words in found[2] for words in ("relative L2 error", "smaller"))
    assert page == f"page: {sweep.results / 'quickstart' / 'index.html'}"


def test_the_quickstart_is_quick(sweep: Sweep) -> None:
    """It is made for two minutes; more than twice that, on any machine that has nothing else to do, is a fault."""
    assert sweep.duration_s < 240


def test_a_second_call_does_nothing_new(sweep: Sweep) -> None:
    """The same command finds all runs done, executes none, and says the same findings and page."""
    files = {path: path.stat().st_mtime_ns for path in sweep.results.glob("quickstart/*/**/*") if path.is_file()}
    again = command("sweep", "experiments/quickstart.yaml", "--results", str(sweep.results))
    assert (again.returncode, again.stderr) == (0, "")
    lines = again.stdout.splitlines()
    assert lines[:2] == [
        "quickstart: 3 runs, all done already (--fresh runs them again)",
        "quickstart: 0 completed, 0 failed, 3 done before",
    ]
    assert lines[2:] == sweep.out.splitlines()[2:]
    after = {path: path.stat().st_mtime_ns for path in sweep.results.glob("quickstart/*/**/*") if path.is_file()}
    assert after == files


def test_runs_record_what_they_ran_on(sweep: Sweep) -> None:
    """Each run names its device, MLX, BLAS and Python, and has digests of weights, sources and notebook."""
    for run in sweep.store.runs("quickstart"):
        facts = run.meta["environment"]
        assert facts["device"] == run.device and facts["mlx"] and facts["blas"] and facts["python"]
        weights = run.meta["weights"]
        assert (weights["source"], weights["kind"], len(weights["digest"])) == ("digits", "trained", 64)
        assert set(run.meta["digests"]) == {"notebook", "sources", "weights"}
        assert (run.path / "notebook.ipynb").is_file()


def test_pages_are_built_without_mlx(sweep: Sweep) -> None:
    """Where MLX cannot be imported `report` builds the page again, with the same charts, and says the same findings."""
    page = sweep.results / "quickstart" / "index.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    done = without_mlx("report", "--results", str(sweep.results))
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart: " + "\n".join(sweep.out.splitlines()[2:-1]) in done.stdout
    figures = re.compile(r'data-figure="[^"]+"')
    assert figures.findall(page.read_text(encoding="utf-8")) == figures.findall(before) != []


def test_the_store_is_listed_without_mlx(sweep: Sweep) -> None:
    """Where MLX cannot be imported `list` still lists the three runs with their weights' kind, in text and as JSON."""
    done, machine = (without_mlx("list", *more, "--results", str(sweep.results)) for more in ((), ("--json",)))
    assert (done.returncode, done.stderr, machine.returncode) == (0, "", 0)
    keys = [run.key for run in sweep.store.runs("quickstart")]
    assert len(keys) == 3
    assert all(key in done.stdout and key in machine.stdout for key in keys)
    assert done.stdout.count("trained weights") == 3
    (listed,) = json.loads(machine.stdout)["experiments"]
    assert {run["weights"] for run in listed["runs"]} == {"trained"}


def test_a_run_is_shown_without_mlx(sweep: Sweep) -> None:
    """Where MLX cannot be imported `show` finds a run by the start of its key and names its notebook and tables."""
    run = next(run for run in sweep.store.runs("quickstart") if run.notebook.endswith("quantization.ipynb"))
    done = without_mlx("show", run.key[:8], "--results", str(sweep.results))
    assert (done.returncode, done.stderr) == (0, "")
    for word in (run.key, run.notebook, "ablation", "quality", "digits_4bit"):
        assert word in done.stdout, word


def test_a_digit_is_generated(tmp_path: Path) -> None:
    """`zimage generate --source digits 7` writes a picture of clean squares that the classifier reads as a seven."""
    done = command("generate", "--source", "digits", "7", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("digits-7.png: 20 steps in ")
    with Image.open(tmp_path / "digits-7.png") as image:
        pixels = np.asarray(image)
    scale = 32
    assert pixels.shape == (10 * scale, 10 * scale)
    centres = pixels[scale:-scale, scale:-scale][scale // 2 :: scale, scale // 2 :: scale]
    paper, ink = picture._PAPER, picture._INK
    drawn = (paper - centres.astype(np.float32)) / (paper - ink)
    assert np.array_equal(picture.grid(drawn[None], scale=scale), pixels)
    assert recognised(Digits(drawn[None], np.array([7]))).all()
    assert digits.labels_in("7") == [7]
