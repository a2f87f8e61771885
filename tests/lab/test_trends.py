"""One experiment across versions: which runs make its history, what is judged between them, and how a page shows it."""

import json
from pathlib import Path
from typing import Any

from tests.lab import fabricated
from tests.lab.fabricated import DEVICE, ablation, add_experiment, add_run, qkv
from tests.lab.test_dashboard import HOSTILE, Page
from zimage.analysis import trend_plots
from zimage.analysis import trends as analysis
from zimage.lab import comparing, dashboard, trends
from zimage.lab.store import Run, Store

import pytest

NOTEBOOK = "notebooks/qkv_fusion.ipynb"


def add(root: Path, key: str, mlx: str, started: str = "2026-11-24", **meta: Any) -> Path:
    """A run of one experiment on a version of MLX."""
    facts = {"mlx": mlx, "zimage": "0.1.0", "commit": "c0", **meta.pop("facts", {})}
    tables = meta.pop("tables", {"ablation": qkv()})
    return add_run(root, "e", key, tables, environment=facts, started=started, **{"notebook": NOTEBOOK, **meta})


def only(root: Path) -> analysis.Trend:
    (found,), problems = trends.read(Store(root), "e")
    assert problems == []
    return found


def test_versions_stand_in_their_order(tmp_path: Path) -> None:
    """Versions are ordered as numbers, then by date, whenever they were measured; of one version the newest counts."""
    add(tmp_path, "a1", "0.9.1", "2026-03-01")
    add(tmp_path, "a2", "0.10.0", "2026-01-01")
    add(tmp_path, "a3", "0.10.0", "2026-02-01")
    found = only(tmp_path)
    assert found.versions == ["MLX 0.9.1", "MLX 0.10.0"]
    assert [run.name for run in found.runs] == ["e/a1", "e/a3"]


def test_versions_of_zimage_are_versions_too(tmp_path: Path) -> None:
    """Runs of other zimage sources are other points, named by what tells them apart."""
    for place, commit in enumerate(("c0", "c1", "c1")):
        digests = {"sources": str(place) * 64}
        add(tmp_path, f"a{place}", "0.32.4", f"2026-0{place + 1}-01", facts={"commit": commit}, digests=digests)
    assert only(tmp_path).versions == ["c0, sources 0000000", "c1, sources 1111111", "c1, sources 2222222"]


@pytest.mark.parametrize(
    "change",
    [
        {"device": "apple-m3-max"},
        {"parameters": {"source": "digits", "height": 16, "seed": 0}},
        {"parameters": {"source": "digits", "height": 8, "seed": 1}},
        {"weights": {"source": "digits", "kind": "trained", "digest": "beef"}},
        {"notebook": "notebooks/other.ipynb"},
        {"status": "failed"},
    ],
)
def test_other_things_are_no_history(change: dict[str, Any], tmp_path: Path) -> None:
    """Another device, input, notebook or weights, and a failed run, make no point."""
    add(tmp_path, "a1", "0.31.0")
    add(tmp_path, "a2", "0.32.0", **change)
    assert trends.read(Store(tmp_path), "e") == ([], [])


def test_a_history_goes_on_where_an_arm_is_added(tmp_path: Path) -> None:
    """A run that was asked for more arms is a version of those that were asked for fewer; no run is lost."""

    def asked(key: str, mlx: str, started: str, *modes: str) -> None:
        rows = [(mode, "plain", "step", 1.1, 1.05, 1.2, "slower") for mode in modes]
        inputs = {"source": "digits", "height": 8, "seed": 0, "modes": list(modes)}
        add(tmp_path, key, mlx, started, parameters=inputs, tables={"ablation": ablation(*rows)})

    asked("a1", "0.31.0", "2026-01-01", "8bit", "4bit")
    asked("a2", "0.32.0", "2026-02-01", "8bit", "4bit", "mxfp4")
    asked("a3", "0.33.0", "2026-03-01", "4bit")
    found = only(tmp_path)
    assert [run.name for run in found.runs] == ["e/a1", "e/a2", "e/a3"]
    changes = {(p.run, p.about[0]): p.change and p.change.verdict for p in found.points}
    assert changes[("e/a2", "mxfp4")] is None and changes[("e/a3", "4bit")] is not None
    asked("a4", "0.32.0", "2026-04-01", "3bit")  # newer, but of the others' rows it has none
    asked("a5", "0.33.0", "2026-05-01", "3bit")
    several, _ = trends.read(Store(tmp_path), "e")
    assert [run.name for run in several[0].runs] == ["e/a1", "e/a2", "e/a3"]
    assert {run.name for one in several for run in one.runs} == {f"e/a{i}" for i in range(1, 6)}
    (other,) = [one for one in several if one.runs[-1].name == "e/a5"]
    assert "e/a4" in [run.name for run in other.runs]


def test_a_history_breaks_where_a_run_fits_several(tmp_path: Path) -> None:
    """A run from before there was a batch is a version of neither of two batches; of a single one it is."""
    add(tmp_path, "a0", "0.30.0")
    inputs = {"source": "digits", "height": 8, "seed": 0}
    add(tmp_path, "a1", "0.31.0", parameters=inputs | {"batch": 1})
    add(tmp_path, "a2", "0.32.0", parameters=inputs | {"batch": 1})
    assert only(tmp_path).versions == ["MLX 0.30.0", "MLX 0.31.0", "MLX 0.32.0"]
    add(tmp_path, "a3", "0.31.0", parameters=inputs | {"batch": 4})
    assert only(tmp_path).versions == ["MLX 0.31.0", "MLX 0.32.0"]
    add(tmp_path, "a4", "0.32.0", parameters=inputs | {"batch": 4})
    found, _ = trends.read(Store(tmp_path), "e")
    assert [[run.name for run in one.runs] for one in found] == [["e/a1", "e/a2"], ["e/a3", "e/a4"]]


def test_a_page_reads_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cases a page has, what its runs are compared by is made once, not anew for every case."""
    for place in range(6):
        add(tmp_path, f"a{place}", "0.32.0", parameters={"source": "digits", "height": 8 * place})
    add_experiment(tmp_path, "e", "q?", [f"a{place}" for place in range(6)])
    made: list[str] = []

    def counted(run: Run, *names: Any) -> Any:
        made.append(run.key)
        return comparing.recorded(run, *names)

    monkeypatch.setattr(trends, "recorded", counted)
    dashboard.build(Store(tmp_path))
    assert len(made) == 6


def test_superseded_runs_count(tmp_path: Path) -> None:
    """The last sweep asked for one run only; the trend has all three, and the change of the last is judged."""
    found, _ = trends.read(Store(fabricated.across_versions(tmp_path)), "qkv_fusion")
    (one,) = found
    assert len(one.runs) == 3 and len(one.points) == 9
    step = [point for point in one.points if point.about[2] == "step"]
    assert [p.change and p.change.verdict for p in step] == [None, "inconclusive", "slower"]
    assert [list(steps) for steps in one.steps_s] == [["separate_qkv"]] * 3
    texts = [finding.text for finding in analysis.findings(one)]
    assert texts[-1] == "the time ratio of fused_qkv to separate_qkv, step, rose by 5.3 % from MLX 0.31.2 to MLX 0.33.0"
    assert [bool(finding.short) for finding in analysis.findings(one)] == [False, False, True]


def test_nothing_changed(tmp_path: Path) -> None:
    """Where no ratio is known to have changed one finding says so, as equivalent only where all are."""
    pair = ("fused_qkv", "separate_qkv")
    for place, mlx in enumerate(("0.31.0", "0.32.0")):
        add(tmp_path, f"a{place}", mlx, tables={"ablation": ablation((*pair, "step", 0.95, 0.949, 0.951, "faster"))})
    (finding,) = analysis.findings(only(tmp_path))
    assert finding.text == "no time ratio is known to have changed from MLX 0.31.0 to MLX 0.32.0"
    assert (finding.verdict, finding.short) == ("equivalent", "")
    wide = ablation((*pair, "step", 0.95, 0.9, 1.0, "inconclusive"))
    add(tmp_path, "a9", "0.33.0", tables={"ablation": wide})
    (finding,) = analysis.findings(only(tmp_path))
    assert finding.verdict == "inconclusive"


def test_a_change_within_the_noise_floor_says_so(tmp_path: Path) -> None:
    """A change whose interval excludes 1 and that is inconclusive all the same has the reason in its line."""
    for place, ratio in enumerate((1.0, 0.9)):
        row = ("fused_qkv", "separate_qkv", "step", ratio, ratio - 0.01, ratio + 0.01, "faster")
        add(tmp_path, f"a{place}", f"0.3{place}.0", tables={"ablation": ablation(row).assign(noise_floor=0.1)})
    (line,) = [line for line in trends.lines("e", [only(tmp_path)]) if "inconclusive" in line]
    assert line.endswith("(0.887 to 0.914): the difference is within the noise floor of 14.1 %")


def test_an_arm_that_is_not_always_there(tmp_path: Path) -> None:
    """An arm is judged since the last version that measured it, and one without an earlier one has no change."""
    step = ("separate_qkv", "step", 0.95, 0.949, 0.951, "faster")
    for place, arms in enumerate((("x",), ("y",), ("x", "y", "z"))):
        add(tmp_path, f"a{place}", f"0.{place}.0", tables={"ablation": ablation(*((arm, *step) for arm in arms))})
    last = {p.about[0]: p.change and p.change.verdict for p in only(tmp_path).points if p.run == "e/a2"}
    assert last == {"x": "equivalent", "y": "equivalent", "z": None}


def test_an_unreadable_old_run_costs_a_line(tmp_path: Path) -> None:
    """A damaged table of a superseded run is told; the page and the other versions' points are there."""
    for place in range(3):
        folder = add(tmp_path, f"a{place}", f"0.{place}.0")
        if place == 0:
            (folder / "tables" / "ablation.parquet").write_bytes(b"PAR1 no more")
    add_experiment(tmp_path, "e", "q?", ["a2"])
    (found,), problems = trends.read(Store(tmp_path), "e")
    assert len(found.points) == 6 and len(problems) == 1 and "a0" in problems[0]
    dashboard.build(Store(tmp_path))
    assert "Across versions" in (tmp_path / "e" / "index.html").read_text()


def test_the_page_shows_the_trend(tmp_path: Path) -> None:
    """Chart, table, finding and links are on the experiment's page, with the words for what is not judged."""
    root = fabricated.across_versions(tmp_path)
    dashboard.build(Store(root))
    page = Page(root / "qkv_fusion" / "index.html")
    assert "Across versions" in page.text and "no clock links two runs" in page.text
    assert "rose by 5.3 % from MLX 0.31.2 to MLX 0.33.0" in page.text
    figures = page.figures()
    (line,) = figures["g0-c0-trend"]["data"]
    assert line["x"] == ["MLX 0.31.2", "MLX 0.32.4", "MLX 0.33.0"] and line["y"] == [1.0, 0.998, 1.053]
    assert [len(trace["y"]) for trace in figures["g0-c0-trend-steps"]["data"]] == [3]
    for key in ("1f", "2f", "3f"):
        assert f"{key * 6}/run.json" in page.links() and (root / "qkv_fusion" / (key * 6) / "run.json").is_file()
    assert "All of it but the other versions from run" in page.text
    assert "rose by 5.3 %" in dashboard.findings(Store(root), "qkv_fusion").sentence


def test_a_page_without_versions_has_no_trend(tmp_path: Path) -> None:
    """A store of one version says nothing of trends."""
    root = fabricated.quickstart(tmp_path)
    dashboard.build(Store(root))
    assert "Across versions" not in (root / "quickstart" / "index.html").read_text()


def test_many_versions_and_arms(tmp_path: Path) -> None:
    """A page shows the newest twelve versions, and draws the arms that changed most; the rest is counted."""
    rows = [(f"arm{i}", "b", "step", 0.9 + 0.001 * i, 0.899, 0.93, "faster") for i in range(12)]
    for place in range(15):
        moved = ablation(*rows)
        moved.loc[moved["arm"] == "arm11", ["ratio", "ratio_low", "ratio_high"]] += 0.1 * (place == 14)
        add(tmp_path, f"a{place:02d}", f"0.{place}.0", tables={"ablation": moved})
    dashboard.build(Store(tmp_path))
    page = Page(tmp_path / "e" / "index.html")
    lines = page.figures()["g0-c0-trend"]["data"]
    assert len(lines) == trend_plots.MOST and "arm11" in lines[-1]["name"]
    assert len(lines[0]["x"]) == dashboard.VERSIONS_ON_A_PAGE
    assert "The 8 ratios that changed most are drawn; 4 more are in the table." in page.text
    assert "3 earlier versions are left out here; `zimage trend` has them." in page.text
    assert len(only(tmp_path).versions) == 15


def test_hostile_versions_stay_texts(tmp_path: Path) -> None:
    """No version, commit or arm of a run becomes markup, on the page or in the figures."""
    names = {"arm": HOSTILE, "baseline": HOSTILE}
    for place in range(2):
        facts = {"mlx": f"{HOSTILE}{place}", "commit": HOSTILE}
        add(tmp_path, f"a{place}", "", facts=facts, tables={"ablation": qkv().assign(**names)}, device=DEVICE)
    for path in dashboard.build(Store(tmp_path)):
        page = Page(path)
        assert not any("alert" in text for attrs, text in page.scripts if attrs.get("type") != "application/json")
        assert "<img" not in json.dumps(page.figures()) and "</script" not in json.dumps(page.figures())
