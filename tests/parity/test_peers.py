"""diffusers served as a peer: one step of the digits' shape, timed in a process of its own."""

import sys
from pathlib import Path

from tests.sweeping import ROOT
from zimage import cli, peers, sources
from zimage.errors import MeasurementError
from zimage.lab.store import Store
from zimage.measure import Resident

import pytest

pytestmark = pytest.mark.parity


def test_diffusers_serves_a_step() -> None:
    """It gives the seconds of a step, in a batch and without padding to what its images would need."""
    config = sources.describe("digits").config
    assert config is not None
    assert peers.version("diffusers", sys.executable)
    command = peers.command("diffusers", sys.executable, config, 8, 12, 2, 1, "float32", "cpu")
    with Resident(command) as resident:
        assert 0 < resident() < 60


def test_an_option_it_does_not_know_is_refused() -> None:
    """It ends with one line that names the option."""
    config = sources.describe("digits").config
    assert config is not None
    command = peers.command("diffusers", sys.executable, config, 8, 8, 1, 1, "float32", "cpu", ["faster"])
    with pytest.raises(MeasurementError, match="diffusers knows no option faster"), Resident(command):
        pass


@pytest.mark.usefixtures("in_process")
def test_the_notebook_compares_it_hot_too(tmp_path: Path) -> None:
    """`peers` takes turns with it in calls and, where asked for, in blocks; its ratio is diffusers' time by ours."""
    given = {"quads": "6", "sustained_s": "0.2", "power_s": "0"}
    options = [text for name, value in given.items() for text in ("-p", name, value)]
    assert cli.main(["run", str(ROOT / "notebooks" / "peers.ipynb"), *options, "--results", str(tmp_path)]) == 0
    (run,) = Store(tmp_path).runs("peers")
    every = run.table("ablation")
    ablation = every[every["ratio"].notna()]
    assert list(every.loc[every["ratio"].isna(), "arm"]) == ["mflux"]  # which was left out, and says why
    assert list(ablation["regime"]) == ["burst", "sustained"]
    assert set(ablation["baseline"]) == {"zimage"} and ablation["arm"].str.startswith("diffusers 0.").all()
    assert (ablation["ratio"] > 0).all() and set(run.table("samples")["regime"]) == {"burst", "sustained"}
