"""Claims files are checked strictly, and the claims judged on a store, whatever lies in it."""

import html
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from tests.lab.fabricated import ablation, add_experiment, add_run, qkv
from zimage import arms, cli, ladder
from zimage.errors import ExperimentError
from zimage.lab import claims, dashboard, experiment
from zimage.lab.store import Store

import pytest

ROOT = Path(__file__).parents[2]
H100 = "nvidia-h100-80gb-hbm3"
REAL = {"source": "synthetic:turbo", "dtype": "bfloat16", "height": 1024, "width": 1024}
LINES = {
    "id": "fused_qkv_step",
    "statement": "Fusing takes 5-10 % less time",
    "source": "https://example.org/a",
    "baseline": "separate_qkv",
    "arm": "fused_qkv",
    "scope": "step",
    "metric": "time_ratio",
    "claimed": "{low: 0.90, high: 0.95}",
    "measured_by": "zimage sweep experiments/published_claims.yaml",
}


def text(*changes: dict[str, str | None]) -> str:
    """A claims file with a claim for each of `changes`, which replace, add or (None) leave out lines."""
    said = "kind: claims\nclaims:\n"
    for change in changes:
        kept = {name: value for name, value in (LINES | change).items() if value is not None}
        for place, (name, value) in enumerate(kept.items()):
            said += f"{'  - ' if place == 0 else '    '}{name}: {value}\n"
    return said


def write(folder: Path, content: str) -> Path:
    path = folder / "claims.yaml"
    path.write_text(content)
    return path


def test_a_claim_is_read(tmp_path: Path) -> None:
    """Everything that a file says of a claim is in it; what may be left out is empty."""
    more = {"note": "a note", "devices": '["nvidia-h100-*"]', "where": "{height: 1024, quantization: null}"}
    first, second = claims.read(write(tmp_path, text(more, {"id": "b", "claimed": "{low: null, high: 1.01}"})))
    assert (first.id, first.statement, first.source, first.note) == (
        "fused_qkv_step", "Fusing takes 5-10 % less time", "https://example.org/a", "a note",
    )  # fmt: skip
    assert (first.baseline, first.arm, first.scope) == ("separate_qkv", "fused_qkv", "step")
    assert (first.low, first.high, first.devices) == (0.90, 0.95, ("nvidia-h100-*",))
    assert first.where == {"height": 1024, "quantization": None}
    assert (second.low, second.high, second.devices, second.where, second.note) == (None, 1.01, (), {}, "")


BAD: dict[str, tuple[dict[str, str | None], int, str]] = {
    "unknown key": ({"wher": "{}"}, 12, "unknown key 'wher'; did you mean 'where'?"),
    "unknown end": ({"claimed": "{low: 0.9, high: 1, mid: 1}"}, 10, "unknown key 'mid'; known: low, high"),
    "no source": ({"source": None}, 3, "key 'claims.0.source' is missing"),
    "no high end": ({"claimed": "{low: 0.9}"}, 10, "key 'claims.0.claimed.high' is missing"),
    "band the wrong way round": ({"claimed": "{low: 0.95, high: 0.90}"}, 10, "low below high, found 0.95 and 0.9"),
    "empty band": ({"claimed": "{low: 0.9, high: 0.9}"}, 10, "low below high"),
    "open band": ({"claimed": "{low: null, high: null}"}, 10, "open at both ends"),
    "band a text": ({"claimed": "{low: a, high: 0.9}"}, 10, "'claims.0.claimed.low' takes a number, found str 'a'"),
    "band a bool": ({"claimed": "{low: true, high: 2}"}, 10, "takes a number, found bool True"),
    "band negative": ({"claimed": "{low: -1, high: 0.9}"}, 10, "must be greater than 0"),
    "band infinite": ({"claimed": "{low: 0.9, high: .inf}"}, 10, "takes a finite number"),
    "band not a number": ({"claimed": "{low: .nan, high: 1}"}, 10, "takes a finite number"),
    "band no mapping": ({"claimed": "5-10 %"}, 10, "takes names with their values"),
    "other metric": ({"metric": "speedup"}, 9, "must be 'time_ratio', found str 'speedup'"),
    "no link": ({"source": "ollama, transformer.go"}, 5, "'source' must be an https link"),
    "plain http": ({"source": "http://example.org"}, 5, "'source' must be an https link"),
    "no script": ({"source": "javascript:alert(1)"}, 5, "'source' must be an https link"),
    "link with blanks": ({"source": "https://a b"}, 5, "'source' must be an https link"),
    "id with blanks": ({"id": "a b"}, 3, "id 'a b': use letters"),
    "empty text": ({"statement": '""'}, 4, "'statement' must be one line of printable text"),
    "text of lines": ({"statement": r'"a\nb"'}, 4, "'statement' must be one line of printable text"),
    "escape codes": ({"note": r'"\e[31m"'}, 12, "'note' must be one line of printable text"),
    "arm a number": ({"arm": "3"}, 7, "'claims.0.arm' takes text, found int 3"),
    "devices a text": ({"devices": "nvidia-*"}, 12, "'claims.0.devices' takes a list, found str 'nvidia-*'"),
    "device a number": ({"devices": "[1]"}, 12, "'claims.0.devices.0' takes text"),
    "empty device": ({"devices": "['']"}, 12, "'devices' must be one line of printable text"),
    "where a list": ({"where": "[height]"}, 12, "takes names with their values"),
    "condition a mapping": ({"where": "{height: {min: 3}}"}, 12, "a value or a list of values for 'height'"),
    "condition empty": ({"where": "{height: []}"}, 12, "a value or a list of values for 'height'"),
    "condition deep": ({"where": "{height: [[1]]}"}, 12, "a value or a list of values for 'height'"),
    "tag": ({"note": "!!python/object/apply:os.system ['true']"}, 12, "tag"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_its_line(case: str, tmp_path: Path) -> None:
    """What is wrong in a claim gives one line that names the file, the line and the trouble."""
    change, line, message = BAD[case]
    with pytest.raises(ExperimentError) as caught:
        claims.read(write(tmp_path, text(change)))
    said = str(caught.value)
    assert f"claims.yaml:{line}: " in said and message in said, said
    assert said.isprintable()


FILES = {
    "an experiment": ("kind: experiment\nname: x\n", ":1: kind 'experiment' is not a claims file"),
    "no kind": ("claims: []\n", ":1: key 'kind' is missing"),
    "a list": ("- 1\n", ":1: a claims file is a mapping that starts with 'kind: claims'"),
    "empty": ("", "a claims file is a mapping"),
    "no claims": ("kind: claims\nclaims: []\n", ":2: 'claims' must not be empty"),
    "claims a mapping": ("kind: claims\nclaims: {a: 1}\n", ":2: 'claims' takes a list"),
    "a claim a text": ("kind: claims\nclaims: [a]\n", ":2: 'claims.0' takes names with their values"),
    "twice": (text({}, {}), ":12: id 'fused_qkv_step' is there twice (first on line 3)"),
    "too large": ("#" * (2**20 + 1), ": larger than 1 MiB"),
    "not YAML": ("kind: [", "not valid YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_files(case: str, tmp_path: Path) -> None:
    """What is no file of claims, or holds one twice, is refused in one line."""
    content, message = FILES[case]
    with pytest.raises(ExperimentError) as caught:
        claims.read(write(tmp_path, content))
    assert message in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """An absent file and a folder are refused in one line that asks for a claims file."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ExperimentError, match="give a claims file"):
            claims.read(path)


def test_the_claims_of_this_repository() -> None:
    """The published claims are read, and each says what it is about, where it was said and how to measure it."""
    found = {one.id: one for one in claims.read(ROOT / "experiments" / "claims.yaml")}
    assert {name: (one.low, one.high) for name, one in found.items()} == {
        "fused_qkv_step": (0.90, 0.95),
        "fused_qkv_projection": (0.90, 0.92),
        "no_all_ones_mask": (0.95, 0.97),
        "quantized_matmul_m2_pro": (1.333, 1.538),
        "quantized_matmul_m3_ultra": (None, 1.01),
        "copies_after_split": (0.95, 0.97),
    }
    assert found["no_all_ones_mask"].concerns(H100) and not found["no_all_ones_mask"].concerns("nvidia-h200")
    assert found["quantized_matmul_m2_pro"].concerns("apple-m2-pro")
    assert all(one.note for one in found.values())
    assert 1 / 0.75 == pytest.approx(1.333, abs=1e-3) and 1 / 0.65 == pytest.approx(1.538, abs=1e-3)


def test_what_measures_the_claims_exists() -> None:
    """Every claim names a sweep of this repository with a run that meets its conditions and measures its arms."""
    for one in claims.read(ROOT / "experiments" / "claims.yaml"):
        program, name, path = shlex.split(one.measured_by)
        assert (program, name) == ("zimage", "sweep") and name in cli.cli.commands
        planned = experiment.read(ROOT / path).plan()
        assert any(not one.unmet(run.parameters) for run in planned), one.id
        sources = [code for run in planned if not one.unmet(run.parameters) for code in run.notebook.code]
        assert one.scope in arms.SCOPES or f'"{one.scope}"' in "\n".join(sources), one.id
        assert one.baseline in ladder.BASELINES or f'"{one.baseline}"' in "\n".join(sources), one.id


def store(root: Path) -> Store:
    """Two devices: an H100 with one real-size run and one of digits, and a CPU with a run of digits."""
    measured = ablation(
        ("fused_qkv", "separate_qkv", "step", 0.930, 0.921, 0.939, "faster"),
        ("fused_qkv", "fused_qkv_copied", "step", 0.999, 0.997, 1.001, "equivalent"),
    )
    synthetic = {"source": "synthetic:turbo", "kind": "synthetic", "digest": "s"}
    meta: dict[str, Any] = {"notebook": "notebooks/qkv_fusion.ipynb", "weights": synthetic, "device": H100}
    add_run(root, "published_claims", "aa11", {"ablation": measured}, parameters=REAL, **meta)
    add_run(root, "quickstart", "bb22", {"ablation": qkv()}, notebook="notebooks/qkv_fusion.ipynb", device=H100)
    add_run(root, "quickstart", "cc33", {"ablation": qkv()}, notebook="notebooks/qkv_fusion.ipynb")
    add_run(root, "quickstart", "dd44", status="failed", device="cpu-failed", error="ValueError: x")
    add_experiment(root, "published_claims", "q?", ["other"])  # superseded runs count too
    return Store(root)


def by_id(judged: list[Any], device: str | None) -> dict[str, Any]:
    return {one.claim.id: one for one in judged if one.device == device}


def test_claims_are_judged_by_device(tmp_path: Path) -> None:
    """Each device of the store gets its judgement of each claim, from its own runs that meet the conditions."""
    published = claims.read(ROOT / "experiments" / "claims.yaml")
    judged, problems = claims.judgements(published, store(tmp_path))
    assert problems == [] and len(judged) == 2 * len(published)
    assert {one.device for one in judged} == {H100, "cpu-amd-epyc-2c"}
    here, cpu = by_id(judged, H100), by_id(judged, "cpu-amd-epyc-2c")
    assert {name: one.verdict for name, one in here.items()} == {
        "fused_qkv_step": "supported",
        "fused_qkv_projection": "not measured here",
        "no_all_ones_mask": "not measured here",
        "quantized_matmul_m2_pro": "not measured here",
        "quantized_matmul_m3_ultra": "not measured here",
        "copies_after_split": "refuted",
    }
    assert here["fused_qkv_step"].evidence == ["published_claims/aa11"]
    assert "but not with source" in here["fused_qkv_projection"].reason
    assert {one.verdict for one in cpu.values()} == {"not measured here"}


def test_what_a_person_reads(tmp_path: Path) -> None:
    """Verdict first, then the claim, the measured interval beside the claimed one, and the run; or what to do."""
    held = store(tmp_path)
    judged, _ = claims.judgements(claims.read(ROOT / "experiments" / "claims.yaml"), held)
    said = claims.lines(judged, held)
    cpu, gpu = (place for place, line in enumerate(said) if line.startswith("On "))
    assert said[cpu] == "On cpu-amd-epyc-2c:" and said[gpu] == f"On {H100}:"
    assert re.fullmatch(r"  supported +One fused .* \(fused_qkv_step\)", said[gpu + 1])
    assert said[gpu + 2].strip() == "measured 6.1-7.9 % less time, claimed 5-10 % less time"
    assert said[gpu + 3].strip() == ("published_claims/aa11 (20 quads, burst, noise floor 0.4 %, synthetic weights)")
    text = "\n".join(said)
    assert "to measure it: zimage sweep experiments/published_claims.yaml" in text
    assert "it is about apple-m2-pro*\n" in text
    assert "measured 0.3 % less to 0.1 % more time, claimed 3-5 % less time" in text


def test_several_cases_are_listed(tmp_path: Path) -> None:
    """Where several runs count, each is listed with its own verdict and interval."""
    held = store(tmp_path)
    other = ablation(("fused_qkv", "separate_qkv", "step", 0.99, 0.985, 0.995, "faster"))
    meta: dict[str, Any] = {"notebook": "notebooks/qkv_fusion.ipynb", "device": H100}
    add_run(tmp_path, "published_claims", "ee55", {"ablation": other}, parameters=REAL | {"batch": 2}, **meta)
    judged, _ = claims.judgements(claims.read(ROOT / "experiments" / "claims.yaml"), held)
    said = "\n".join(claims.lines([by_id(judged, H100)["fused_qkv_step"]], held))
    assert "measured 0.5-7.9 % less time, claimed 5-10 % less time: of 2 cases 1 supported, 1 refuted" in said
    assert "supported, 6.1-7.9 % less time: published_claims/aa11 (" in said
    assert "refuted, 0.5-1.5 % less time: published_claims/ee55 (" in said


def test_damage_is_skipped_and_told(tmp_path: Path) -> None:
    """A run that cannot be read is told and left out; an older one of the same parameters counts instead."""
    held = store(tmp_path)
    meta: dict[str, Any] = {"notebook": "notebooks/qkv_fusion.ipynb", "device": H100}
    started = "2027-01-01T00:00:00+00:00"
    folder = add_run(
        tmp_path, "published_claims", "ff66", {"ablation": qkv()}, parameters=REAL, started=started, **meta
    )
    (folder / "tables" / "ablation.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "quickstart" / "bb22" / "run.json").write_text("{")
    judged, problems = claims.judgements(claims.read(ROOT / "experiments" / "claims.yaml"), held)
    assert by_id(judged, H100)["fused_qkv_step"].evidence == ["published_claims/aa11"]
    assert len(problems) == 2 and all("\n" not in line for line in problems)
    assert any("ff66" in line for line in problems) and any("bb22" in line for line in problems)


def test_no_results(tmp_path: Path) -> None:
    """Without results every claim is not measured here, on no device, with the command that would measure it."""
    held = Store(tmp_path / "none")
    published = claims.read(write(tmp_path, text({})))
    (one,), problems = claims.judgements(published, held)
    assert (one.verdict, one.device, one.interval, problems) == ("not measured here", None, None, [])
    assert claims.lines([one], held)[0] == f"{held.root}: no results yet"
    assert "zimage sweep experiments/published_claims.yaml" in claims.lines([one], held)[-1]


def test_the_nearest_file(tmp_path: Path) -> None:
    """The claims are those of the project around a folder; without one, one line says what to do."""
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    path = write(tmp_path / "experiments", text({}))
    assert claims.nearest(deep) == path
    path.unlink()
    with pytest.raises(ExperimentError, match=r"no experiments/claims.yaml here or above; .* --claims"):
        claims.nearest(deep)


def index(root: Path) -> str:
    dashboard.build(Store(root))
    return (root / "index.html").read_text()


def test_the_index_shows_the_projects_claims(tmp_path: Path) -> None:
    """The index of a store in a project says of each device's measured claims what `zimage claims` says."""
    store(tmp_path / "results")
    assert "Published claims" not in index(tmp_path / "results")  # no claims file here or above
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    page = html.unescape(index(tmp_path / "results")).replace("\N{NO-BREAK SPACE}", " ")
    judged, _ = claims.judgements(claims.read(tmp_path / "experiments" / "claims.yaml"), Store(tmp_path / "results"))
    decided = [one for one in judged if one.verdict != "not measured here"]
    assert {one.device for one in decided} == {H100}
    for one in decided:
        assert f'<span class="tag {one.verdict}">{one.verdict}</span></span><div><p>{one.claim.statement}' in page
    assert {one.verdict for one in decided} == {"supported", "refuted"}
    assert f"On {H100}" in page and "On cpu-amd-epyc-2c" not in page
    assert "measured 6.1-7.9 % less time" in page
    assert "4 more claims are not measured on it." in page


def test_an_experiment_s_page_begins_with_the_claims_on_its_runs(tmp_path: Path) -> None:
    """What its runs say of published claims stands first on its page; other experiments' pages say nothing of them."""
    root = store(tmp_path / "results").root
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    index(root)
    judged, _ = claims.judgements(claims.read(tmp_path / "experiments" / "claims.yaml"), Store(root))
    behind = {name: [one for one in judged if any(run.startswith(f"{name}/") for run in one.evidence)]
              for name in Store(root).experiments()}  # fmt: skip
    assert any(behind.values())
    for name, several in behind.items():
        page = html.unescape((root / name / "index.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")
        assert page.count("Published: ") == len(several)
        for one in several:
            assert f"Published: {one.claim.statement} ({one.claim.id})" in page


def test_an_unreadable_claims_file_costs_the_index_a_line(tmp_path: Path) -> None:
    """The pages are built all the same, and the index says what is wrong with the file, escaped."""
    store(tmp_path / "results")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "claims.yaml").write_text("kind: claims\nclaims:\n  - id: <b>\n")
    page = index(tmp_path / "results")
    assert "claims.yaml:" in page and "<b>" not in page
    assert "q?" in page
