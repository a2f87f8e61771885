"""What the README says, checked: its code runs, its commands exist, its links lead somewhere, CI runs what it tells."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.digits.drawing import First
from tests.lab.fabricated import ablation, add_run
from tests.parity.cases import CASES
from zimage import cli, recipes
from zimage.analysis.findings import Brief
from zimage.config import TransformerConfig
from zimage.digits import picture
from zimage.lab import experiment
from zimage.sources import describe

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_code_runs() -> None:
    """The README's Python blocks run one after the other, and the comparison prints its one line."""
    code = "\n".join(blocks("python"))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = "(faster|slower|equivalent|inconclusive)"
    assert re.fullmatch(rf"fused_qkv: {verdicts}, .*95 % CI .* quads.*", done.stdout.strip())


def test_the_findings_have_their_layout() -> None:
    """What the quickstart is shown to print has findings in the lines that a terminal of 104 columns gets."""
    (shown,) = (block.splitlines() for block in blocks("text") if block.startswith("quickstart: "))
    start, *lines = shown[2:-1]
    items = re.findall(r"- (.*?)(?=\n- |$)", "\n".join(lines), re.S)
    device, weights = re.fullmatch(r"On (\S+), with (\w+) weights:", start).groups()  # type: ignore[union-attr]
    assert Brief(device, weights, [item.replace("\n  ", " ") for item in items]).lines(104) == [start, *lines]


def test_the_experiment_is_valid(tmp_path: Path) -> None:
    """The README's experiment file passes validation, in full and with its quick switch."""
    (text,) = (block for block in blocks("yaml") if block.startswith("kind: experiment"))
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    path = tmp_path / "e.yaml"
    path.write_text(text)
    asked = experiment.read(path)
    assert [len(asked.plan(quick=quick)) for quick in (False, True)] == [3, 1]


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    """The README's recipe can be read, and packs the shipped and the published model in the ways that it names."""
    (text,) = (block for block in blocks("yaml") if block.startswith("default:"))
    path = tmp_path / "mixed.yaml"
    path.write_text(text)
    for config in (describe("digits").config, TransformerConfig.turbo()):
        found = recipes.packing(config, path)
        assert {str(packing) for packing in found.values()} == {"4bit", "8bit-g32", "mxfp8"}
        assert str(found["layers.2.feed_forward.w2"]) == "8bit-g32"
        assert not any("adaLN" in path for path in found)


def test_the_gate_closes_on_a_regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's workflow is YAML whose comparisons, also that in a comment, pass equal results, not a slower arm."""
    (text,) = (block for block in blocks("yaml") if block.startswith("# .github/workflows"))
    steps = [
        step["run"]
        for step in yaml.safe_load(text.replace("# - run:", "- run:"))["jobs"]["speed"]["steps"]
        if "run" in step
    ]
    swept, *gates = (shlex.split(step, comments=True) for step in steps if step.startswith("zimage"))
    assert swept[:2] == ["zimage", "sweep"] and (ROOT / swept[2]).is_file()
    assert ["--times" in gate for gate in gates] == [False, True]
    monkeypatch.chdir(tmp_path)
    arm, meta = ("8bit", "float32", "step"), {"notebook": "notebooks/quantization.ipynb"}
    add_run(
        Path("reference"), "quantization", "aa11", {"ablation": ablation((*arm, 1.1, 1.09, 1.11, "slower"))}, **meta
    )
    for place, (ratio, status) in enumerate(((1.1, 0), (1.2, 1), (1.0, 0))):
        rows = ablation((*arm, ratio, ratio - 0.01, ratio + 0.01, "slower"))
        started = f"2026-12-0{place + 1}T00:00:00+00:00"
        add_run(Path("results"), "quantization", f"{place}b", {"ablation": rows}, started=started, **meta)
        assert [cli.main(gate[1:]) for gate in gates] == [status, status]


def test_ci_runs_the_readmes_commands() -> None:
    """Both test commands of the README stand in .ci/run as they are."""
    ci = (ROOT / ".ci" / "run").read_text()
    commands = [line for block in blocks("sh") for line in block.splitlines() if "pytest" in line]
    assert len(commands) == 2
    assert all(command in ci for command in commands)


def test_commands_exist() -> None:
    """Every zimage command that the README writes in code is one, and so are its options."""
    written = [line for block in blocks("sh") for line in block.splitlines()] + re.findall(r"`(zimage [^`]+)`", README)
    words = [shlex.split(part.replace("[", " ").replace("]", " ")) for text in written for part in text.split("&&")]
    calls = [w[1:] for w in words if Path(w[0]).name == "zimage"]
    assert {call[0] for call in calls} >= set(cli.cli.commands) - {"lab", "report"}
    for name, *rest in calls:
        known = {option for parameter in cli.cli.commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link and picture exists, and no placeholder is left."""
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    assert re.findall(r"@[A-Z_]+@", text) == []


def test_the_picture_is_what_the_model_draws(first_digits: First) -> None:
    """docs/digits.png shows the first forty digits of seed 0, drawn by the shipped weights, enlarged cleanly."""
    shown = np.array(Image.open(ROOT / "docs" / "digits.png"))
    wanted = picture.grid(first_digits(40).images, columns=20, scale=5)
    assert shown.shape == wanted.shape
    assert np.abs(shown.astype(int) - wanted).max() <= 3  # grey levels; backends round differently


def test_the_number_of_parity_cases_is_right() -> None:
    """The README counts the parity cases correctly."""
    assert f"on {len(CASES)} configurations" in README


def test_extras() -> None:
    """The device extras exclude each other and add nothing on macOS, where MLX brings its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"cpu", "cuda12", "cuda13", "test", "parity"}
    (conflict,) = project["tool"]["uv"]["conflicts"]
    assert {entry["extra"] for entry in conflict} == {"cpu", "cuda12", "cuda13"}
    for device in ("cpu", "cuda12", "cuda13"):
        assert all("sys_platform == 'linux'" in requirement for requirement in extras[device])
