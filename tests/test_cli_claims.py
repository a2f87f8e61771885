"""`zimage claims`: what it prints, for people and for programs, and what it does with bad input."""

import json
import subprocess
import sys
from pathlib import Path

from tests.lab.test_claims import H100, store, text
from tests.sweeping import ROOT, environment
from tests.test_quickstart import WITHOUT_MLX
from zimage import cli

import pytest

CLAIMS = str(ROOT / "experiments" / "claims.yaml")


def zimage(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `zimage claims`."""
    status = cli.main(["claims", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It exits 0 and says device by device what became of each claim."""
    store(tmp_path)
    status, out, err = zimage(capsys, "--results", str(tmp_path), "--claims", CLAIMS)
    assert (status, err) == (0, "")
    assert f"On {H100}:\n  supported " in out
    assert "measured 6.1-7.9 % less time" in out


def test_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is a list with id, verdict, interval, device and evidence of each claim on each device, and valid JSON."""
    store(tmp_path)
    status, out, err = zimage(capsys, "--json", "--results", str(tmp_path), "--claims", CLAIMS)
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (status, err, len(found)) == (0, "", 12)
    judged = {(one["id"], one["device"]): one for one in found}
    one = judged["fused_qkv_step", H100]
    assert (one["verdict"], one["interval"]) == ("supported", [0.921, 0.939])
    assert one["evidence"] == ["published_claims/aa11"]
    assert one["source"].startswith("https://github.com/ollama/ollama/")
    (case,) = one["cases"]
    assert (case["ratio"], case["noise_floor"], case["regime"]) == (0.93, 0.004, "burst")
    assert (case["comparison"], case["comparison_without_drops"], case["weights"]) == ("faster", None, "synthetic")
    none = judged["no_all_ones_mask", "cpu-amd-epyc-2c"]
    assert (none["verdict"], none["interval"], none["evidence"]) == ("not measured here", None, [])
    for one in found:
        for name in one["evidence"]:
            assert cli.main(["show", name, "--results", str(tmp_path)]) == 0


def test_the_projects_own_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --claims it takes those of the project around the current folder; elsewhere one line says what to do."""
    monkeypatch.chdir(tmp_path)
    status, out, err = zimage(capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("zimage: ") and err.endswith("no experiments/claims.yaml here or above; go to the project's "
                                                       "folder, or name one with --claims\n")  # fmt: skip
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "claims.yaml").write_text(text({"id": "mine"}))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    status, out, err = zimage(capsys)
    assert (status, err) == (0, "")
    assert out.startswith("results: no results yet\n  not measured here  ") and "(mine)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claims", "absent.yaml"], "absent.yaml: no such file; give a claims file"),
        (["--claims", ""], "it is empty"),
        (["--claims", "bad.yaml"], "bad.yaml:1: kind 'experiment' is not a claims file"),
        (["--results", "bad.yaml"], "is not a folder"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_asked_wrongly(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be read is exit 2 and one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "claims.yaml").write_text(text({}))
    (tmp_path / "bad.yaml").write_text("kind: experiment\n")
    status, out, err = zimage(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_damaged_runs_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged run is a line on standard error; the claims are judged and the JSON stays whole."""
    store(tmp_path)
    (tmp_path / "quickstart" / "bb22" / "tables" / "ablation.parquet").write_bytes(b"")
    status, out, err = zimage(capsys, "--json", "--results", str(tmp_path), "--claims", CLAIMS)
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("zimage: skipped: ") and "bb22" in err
    assert len(json.loads(out)) == 12


def test_it_needs_no_mlx(tmp_path: Path) -> None:
    """Where MLX cannot be imported the claims are judged all the same."""
    store(tmp_path)
    line = [sys.executable, "-W", "error", "-c", WITHOUT_MLX, "claims", "--results", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"On {H100}:\n  supported " in done.stdout
