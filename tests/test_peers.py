"""Peers are asked in interpreters of their own, and those that are not there, or cannot do it, are said so."""

import json
import sys
from pathlib import Path

from zimage import peers
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, InputError, MeasurementError
from zimage.measure import Resident

import pytest

TINY = TransformerConfig.tiny()


def test_a_command_hands_over_the_sizes() -> None:
    """The job names latent sizes, not pixels, with the whole config, and the file it is for exists."""
    python, program, text = peers.command("diffusers", "python9", TransformerConfig.turbo(), 512, 768, 2, 7, "float32")
    job = json.loads(text)
    assert python == "python9" and Path(program).is_file()
    assert (job["rows"], job["columns"], job["batch"], job["caption_tokens"]) == (64, 96, 2, 7)
    assert TransformerConfig.from_dict(job["config"]) == TransformerConfig.turbo()


@pytest.mark.parametrize(
    ("peer", "changes", "error", "words"),
    [
        ("comfy", {}, InputError, "peer 'comfy' is not known; known are diffusers, mflux"),
        ("mflux", {"batch": 2}, InputError, "one image at a time, found batch 2"),
        ("diffusers", {"height": 5}, ConfigError, "5"),
    ],
)
def test_what_a_peer_cannot_do_is_refused(peer: str, changes: dict[str, int], error: type, words: str) -> None:
    """A peer nobody knows, a batch that mflux does not take and sizes that no model takes are refused in one line."""
    with pytest.raises(error, match=words):
        peers.command(peer, sys.executable, TINY, **{"height": 32, "width": 32, **changes})  # type: ignore[arg-type]


def test_a_peer_that_is_not_there_has_no_version() -> None:
    """Neither an interpreter without the peer nor one that does not exist gives a version."""
    assert peers.version("surely-not-installed", sys.executable) is None
    assert peers.version("diffusers", "/nowhere/python") is None


def test_the_program_needs_nothing_of_zimage() -> None:
    """The file runs by itself in an isolated interpreter, and says in one line that its peer is missing."""
    arm = [sys.executable, "-I", "-S", *peers.command("mflux", "", TINY, 32, 32)[1:]]
    with pytest.raises(MeasurementError) as caught, Resident(arm, timeout_s=60):
        pass
    assert "\n" not in str(caught.value)


def test_a_served_peer_is_timed(tmp_path: Path) -> None:
    """A program that speaks the protocol gives the seconds of one step for every line it is sent."""
    program = Path(peers.__file__).with_name("step.py").read_text(encoding="utf-8")
    fake = program.replace(
        '{"diffusers": diffusers, "mflux": mflux, "zimage": zimage}[job["peer"]](job)', "lambda: time.sleep(0.05)"
    )
    assert fake != program
    (tmp_path / "fake.py").write_text(fake, encoding="utf-8")
    with Resident([sys.executable, str(tmp_path / "fake.py"), json.dumps({"peer": "diffusers"})]) as resident:
        assert all(0.05 <= resident() < 5 for _ in range(2))
