"""diffusers served as a peer: one step of the digits' shape, timed in a process of its own."""

import sys

from zimage import peers, sources
from zimage.errors import MeasurementError
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
