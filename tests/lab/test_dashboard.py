"""Pages are assembled from stores made by hand, so nothing here runs a model."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.lab import fabricated
from zimage.analysis.tables import SCHEMAS
from zimage.errors import StoreError
from zimage.lab import cost_sections, dashboard
from zimage.lab.sections import chart
from zimage.lab.store import Store

import pandas as pd
import plotly.graph_objects as go
import pytest

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


class Page(HTMLParser):
    """What a browser would find on a page: elements with their attributes, texts, and scripts by type."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.elements, self.text = path, [], ""
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif self.open[-1:] != ["style"]:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def links(self) -> list[str]:
        found = [a.get("href") or a.get("src") for _, a in self.elements if a.get("href") or a.get("src")]
        return [link for link in found if not link.startswith(("#", "data:"))]

    def figures(self) -> dict[str, dict[str, Any]]:
        return {a["id"]: json.loads(text) for a, text in self.scripts if a.get("type") == "application/json"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fabricated.quickstart(tmp_path / "results")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two experiments and its pages, for tests that only look."""
    root = fabricated.swept(fabricated.quickstart(tmp_path_factory.mktemp("built")))
    dashboard.build(Store(root))
    return root


@pytest.fixture(scope="module")
def quickstart(built: Path) -> Page:
    return Page(built / "quickstart" / "index.html")


@pytest.fixture(scope="module")
def swept(built: Path) -> Page:
    return Page(built / "turbo_sizes" / "index.html")


def page_of(root: Path, experiment: str = "quickstart") -> Page:
    dashboard.build(Store(root))
    return Page(root / experiment / "index.html")


def test_build_writes_pages_index_and_script(results: Path) -> None:
    """A build gives a page an experiment, then the index, and plotly's script once."""
    fabricated.swept(results)
    pages = dashboard.build(Store(results))
    assert pages == [results / name / "index.html" for name in ("quickstart", "turbo_sizes")] + [results / "index.html"]
    assert all(page.is_file() for page in pages)
    assert [path.name for path in results.rglob("*.js")] == ["plotly.min.js"]
    assert not list(results.rglob("*.part"))


def test_build_of_one_experiment_keeps_the_index_whole(results: Path) -> None:
    """Building one experiment's page leaves the others in the index."""
    fabricated.swept(results)
    pages = dashboard.build(Store(results), ["turbo_sizes"])
    assert [page.parent.name for page in pages] == ["turbo_sizes", "results"]
    assert "Where does a step's time go" in Page(results / "index.html").text


def test_every_link_leads_to_a_file(built: Path) -> None:
    """Each link, script and picture of every page is a relative path to a file that is there."""
    for path in built.rglob("index.html"):
        links = Page(path).links()
        assert links
        for link in links:
            assert (path.parent / unquote(link)).is_file(), link


def test_pages_ask_for_nothing_elsewhere(built: Path) -> None:
    """No page names an address on a network."""
    for path in built.rglob("index.html"):
        assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", path.read_text(encoding="utf-8"))


def test_a_number_leads_to_its_run(quickstart: Page) -> None:
    """Each run behind the page is linked with its notebook and its run.json."""
    links = quickstart.links()
    for key in ("aa11aa11aa11", "bb22bb22bb22", "cc33cc33cc33"):
        assert f"{key}/notebook.ipynb" in links
        assert f"{key}/run.json" in links


def test_the_page_says_what_was_found(quickstart: Page) -> None:
    """Question, device, kind of weights and the findings with their numbers stand on the page."""
    text = " ".join(quickstart.text.split())
    for part in (
        "does fusing QKV help",
        fabricated.DEVICE,
        "trained",
        "24 Nov 2026, 04:12 UTC",
        "3 runs completed",
        "The 3 main layers take 71 % of a step and layers.1 alone takes 32 %",
        "fused_qkv is equivalent in time to separate_qkv per step",
        "Whether fused_qkv is faster than separate_qkv per block is undecided",
        "4bit takes 12.1 % more time than float32 per step",
        "digit accuracy 96.0 % against 98.4 %",
        "sdpa takes the most of layers.0, 31 % of its time, at 51 % of the roof",
        "Predicted for the step before anything was allocated: 20.0 MB, 0.952 times what was measured",
        "the whole step",
        "80.0 J a step",
    ):
        assert part in text


def test_charts_hold_the_tables_values(quickstart: Page) -> None:
    """The figures on the page carry the numbers that the runs recorded."""
    figures = quickstart.figures()
    stages = next(f for name, f in figures.items() if name.endswith("-stages"))
    found = {y: x for trace in stages["data"] for y, x in zip(trace["y"], trace["x"], strict=True)}
    assert found["layers.1"] == pytest.approx(3.5)
    forests = [f for name, f in figures.items() if name.endswith("-forest")]
    assert [x for f in forests for trace in f["data"] for x in trace["x"]] == [0.931, 0.998, 0.988, 1.284, 1.121]
    panels = [name for name in figures if "-panel-" in name]
    assert len(panels) == 5  # time, weights, peak memory, error and accuracy by arm
    (memory,) = (f for name, f in figures.items() if name.endswith("-memory"))
    assert memory["data"][0]["x"] == [9.0]  # MB of the one stage; the step's stands in the table
    (operations,) = (f for name, f in figures.items() if "-operations-" in name)
    assert sum(len(trace["x"]) for trace in operations["data"]) == 10


def test_every_chart_and_picture_has_words(quickstart: Page) -> None:
    """Charts and pictures have alternative texts, charts with their values."""
    elements = quickstart.elements
    plots = [a for _, a in elements if a.get("class") == "plot"]
    assert len(plots) >= 10
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    assert any("fused_qkv · step 0.998, equivalent" in a["aria-label"] for a in plots)
    images = [a for tag, a in elements if tag == "img"]
    assert [a["src"] for a in images] == [f"cc33cc33cc33/pictures/digits_{a}.png" for a in ("float32", "8bit", "4bit")]
    assert all("20 Euler steps" in a["alt"] for a in images)


def test_document_basics(built: Path) -> None:
    """Every page has a language, a title, a viewport and one first heading."""
    for path in built.rglob("index.html"):
        page = Page(path)
        tags = [tag for tag, _ in page.elements]
        assert ("html", {"lang": "en"}) in page.elements
        assert tags.count("h1") == tags.count("title") == tags.count("main") == 1
        assert any(a.get("name") == "viewport" for tag, a in page.elements if tag == "meta")


def test_swept_parameters_can_be_chosen(swept: Page) -> None:
    """Runs of several parameters have a selector, one view each, and one forest over all of them."""
    options = [a["value"] for tag, a in swept.elements if tag == "option"]
    cases = [a["id"] for _, a in swept.elements if a.get("class") == "case"]
    assert options == cases == ["g0-c0", "g0-c1"]
    (forest,) = [f for name, f in swept.figures().items() if name.endswith("-forest")]
    assert "fused_qkv · step · height=1024" in [y for trace in forest["data"] for y in trace["y"]]
    assert "height=512" in swept.text


def test_failed_runs_are_told(swept: Page, built: Path) -> None:
    """A failed run is counted and its one-line error stands on the page with a link to its notebook."""
    assert "BackendError: out of memory at layers.17: use a smaller height" in swept.text
    assert "3d3d3d3d3d3d/notebook.ipynb" in swept.links()
    assert "1 failed" in Page(built / "index.html").text
    assert dashboard.findings(Store(built), "turbo_sizes").sentence.endswith("; 1 of 3 runs failed.")


def test_runs_of_an_earlier_sweep_are_not_shown(swept: Page) -> None:
    """What the last sweep did not ask for takes no part in figures or findings."""
    assert not any("4d4d4d4d4d4d" in link for link in swept.links())
    assert "a step takes 10.8 ms" not in swept.text


def test_synthetic_weights_are_prominent(swept: Page, built: Path) -> None:
    """Synthetic weights are marked on the page and the index, and the page says what they are worth."""
    assert ("span", {"class": "tag synthetic"}) in swept.elements
    assert "errors and pictures mean little" in swept.text
    assert "synthetic weights" in Page(built / "index.html").text
    assert "with synthetic weights" in dashboard.findings(Store(built), "turbo_sizes").sentence


def parts(path: Path) -> list[str]:
    """The HTML of every section and fold of a page that says what runs found."""
    text = path.read_text(encoding="utf-8").partition('aria-label="Runs and environment"')[0]
    return re.findall(r'<section class="section".*?</section>|<details><summary>.*?</details>', text, re.DOTALL)


def mixed(root: Path) -> Path:
    """An experiment with runs of trained and of synthetic weights with all kinds of tables, and one of no weights."""
    small, timed = {"source": "synthetic:small", "kind": "synthetic", "digest": "s1"}, fabricated.samples("baseline")
    tables = {**fabricated.quantization(), "stages": fabricated.stages(), "operations": fabricated.operations()}
    tables |= {"modules": fabricated.modules(), "power": fabricated.power().iloc[:1], "samples": timed}
    tables |= {"scaling": fabricated.scaling(), "axes": fabricated.axes(), "crossover": fabricated.crossover()}
    tables |= {"pareto": fabricated.pareto(), "loading": fabricated.loading()}
    drawn = {"digits_8bit": (fabricated.picture(0, 0.0), "")}
    fabricated.add_run(root, "mixed", "a1", tables, drawn, parameters={"source": "digits"})
    fabricated.add_run(root, "mixed", "b2", tables, parameters={"source": "synthetic:small"}, weights=small)
    none = {"parameters": {"source": "none"}, "weights": None, "notebook": "notebooks/other.ipynb"}
    fabricated.add_run(root, "mixed", "c3", {"ablation": fabricated.qkv()}, **none)
    fabricated.add_experiment(root, "mixed", "q?", ["a1", "b2", "c3"])
    return root


def test_every_table_says_whose_weights(tmp_path: Path) -> None:
    """Every section and fold with a table says trained or synthetic, that of both both, and that of neither neither."""
    root = mixed(fabricated.across_versions(fabricated.swept(fabricated.quickstart(tmp_path))))
    dashboard.build(Store(root))
    said: dict[str, list[str]] = {}
    for name in Store(root).experiments():
        for part in parts(root / name / "index.html"):
            (kind,) = re.findall(r'<p class="quiet">([A-Z][a-z ]*) weights\.', part) or [""]
            assert kind or "<table" not in part or name == "mixed", part[:300]
            said.setdefault(name, []).append(kind)
    assert set(said["quickstart"]) == set(said["qkv_fusion"]) == {"Trained"} and set(said["turbo_sizes"]) == {
        "Synthetic"
    }
    trained, synthetic = (said["mixed"].count(kind) for kind in ("Trained", "Synthetic"))
    assert trained == synthetic + 1 > 15  # the pictures
    assert said["mixed"].count("Trained and synthetic") == 1 and said["mixed"].count("") == 1


def test_findings_say_whose_weights_where_a_page_has_both(tmp_path: Path) -> None:
    """Runs of a page with both kinds are named with theirs, on the page and in the terminal; a run alone needs none."""
    store = Store(mixed(tmp_path))
    text = page_of(store.root, "mixed").text
    assert "source=digits, trained weights" in text and "source=synthetic:small, synthetic weights" in text
    whole = dashboard.findings(store, "mixed").sentence
    assert whole.startswith(f"On {fabricated.DEVICE}, with trained and synthetic weights: ")
    assert "[source=digits, trained weights]; " in whole
    alone = dashboard.findings(store, "mixed", ["b2"]).sentence
    assert alone.startswith(f"On {fabricated.DEVICE}, with synthetic weights: ") and alone.count("synthetic") == 1


def test_of_two_runs_alike_the_newest_counts(tmp_path: Path) -> None:
    """Without a sweep on record the newest completed run of the same parameters is shown, the other only listed."""
    fabricated.add_run(tmp_path, "e", "a1", {"stages": fabricated.stages(2.0)}, started="2026-11-20T00:00:00+00:00")
    fabricated.add_run(tmp_path, "e", "b2", {"stages": fabricated.stages()}, started="2026-11-21T00:00:00+00:00")
    page = page_of(tmp_path, "e")
    assert "a step takes 10.8 ms" in page.text
    assert "a step takes 21.6 ms" not in page.text
    assert "completed, superseded" in page.text
    assert "a1/run.json" in page.links()


def test_runs_of_differently_made_models_are_told_apart(tmp_path: Path) -> None:
    """A newer run of the transformed model does not take the plain one's place: both are views, by what differs."""
    for key, given in (("a1", {"rounds": 3}), ("b2", {"rounds": 5, "transforms": ["fuse_qkv", "submit_early"]})):
        fabricated.add_run(tmp_path, "e", key, {"stages": fabricated.stages()}, parameters=given)
    page = page_of(tmp_path, "e")
    labels = [text for text in ("transforms=none", "transforms=fuse_qkv + submit_early") if text in page.text]
    assert len(labels) == len([1 for tag, _ in page.elements if tag == "option"]) == 2
    assert "superseded" not in page.text


def test_two_devices_are_told_apart(tmp_path: Path) -> None:
    """Runs on two devices are two views, labelled with the device."""
    for key, device in (("a1", "apple-m3-max"), ("b2", "nvidia-h100-80gb-hbm3")):
        fabricated.add_run(tmp_path, "e", key, {"stages": fabricated.stages()}, device=device)
    page = page_of(tmp_path, "e")
    assert len([1 for tag, _ in page.elements if tag == "option"]) == 2
    assert "On apple-m3-max and nvidia-h100-80gb-hbm3" in dashboard.findings(Store(tmp_path), "e").sentence


def test_runs_of_different_machines_are_compared_with_the_difference(tmp_path: Path) -> None:
    """Above verdicts of several runs stands in which facts these differ, but for those of the moment."""
    for name, other in (("differ", "0.33.0"), ("alike", "0.32.4")):
        for key, mlx, load in (("a1", "0.32.4", "0.1"), ("b2", other, "3.5")):
            environment = {"mlx": mlx, "load_average": load, "os": "Linux"}
            tables, batch = {"ablation": fabricated.qkv()}, {"batch": int(key[1])}
            fabricated.add_run(tmp_path, name, key, tables, parameters=batch, environment=environment)
        fabricated.add_experiment(tmp_path, name, "?", ["a1", "b2"])
    assert "These runs differ in mlx; how, stands under Environment." in page_of(tmp_path, "differ").text
    assert "0.32.4 | 0.33.0" in page_of(tmp_path, "differ").text
    assert "These runs differ" not in page_of(tmp_path, "alike").text


def test_ratios_to_several_baselines_are_no_column(tmp_path: Path) -> None:
    """Times are beside sizes and errors only where all arms of the run are compared with one baseline."""
    tables = fabricated.quantization()
    several = tables["ablation"].assign(baseline=["float32", "bfloat16"])
    fabricated.add_run(tmp_path, "one", "a1", tables)
    fabricated.add_run(tmp_path, "several", "b2", {**tables, "ablation": several})
    assert "time ratio, step" in page_of(tmp_path, "one").text
    assert "time ratio, step" not in page_of(tmp_path, "several").text


def test_power_and_prediction_are_told_in_their_units(tmp_path: Path) -> None:
    """A clock of 1.755e9 Hz is about 1.75 GHz, joules are a step's, and the error is that of the sizes held out."""
    fabricated.add_run(tmp_path, "e", "a1", {"power": fabricated.power(), "scaling": fabricated.scaling()})
    text = page_of(tmp_path, "e").text
    assert re.search(r"80(\.0)? J\s+615 W\s+1\.7[56] GHz\s+61(\.0)? °C\s+power cap", text)
    assert "median absolute error 4.0 % at 3 sizes held out, 10.0 % at most" in text


def test_single_file(results: Path) -> None:
    """With single_file the page carries plotly's script itself and refers to none."""
    (path, _) = dashboard.build(Store(results), single_file=True)
    page = Page(path)
    assert not (results / "assets").exists()
    assert not [a for a, _ in page.scripts if a.get("src")]
    assert any(len(text) > 1_000_000 for _, text in page.scripts)


def hostile_store(root: Path) -> Path:
    """A run in which every text that a run can supply is an attack."""
    tables = {
        "stages": fabricated.stages().assign(stage=HOSTILE, arm=HOSTILE),
        "ablation": fabricated.qkv().assign(
            arm=HOSTILE, scope=HOSTILE, baseline=HOSTILE, verdict=HOSTILE, reason=HOSTILE
        ),
        "memory": fabricated.quantization()["memory"].assign(stage=HOSTILE, metric=HOSTILE),
        "quality": fabricated.quantization()["quality"].assign(metric=HOSTILE),
        "samples": fabricated.samples(HOSTILE),
        "loading": fabricated.loading().assign(arm=HOSTILE),
        "operations": fabricated.operations().assign(arm=HOSTILE, stage=HOSTILE, operation=HOSTILE, bound=HOSTILE),
        "modules": fabricated.modules().assign(arm=HOSTILE, path=HOSTILE),
        "scaling": fabricated.scaling().assign(arm=HOSTILE, use=HOSTILE),
        "axes": fabricated.axes().assign(arm=HOSTILE, verdict=HOSTILE),
        "crossover": fabricated.crossover().assign(note=HOSTILE),
        "pareto": fabricated.pareto().assign(dominated_by=HOSTILE, baseline=HOSTILE, weights_kind=HOSTILE),
        "power": fabricated.power().assign(arm=HOSTILE, scope=HOSTILE, regime=HOSTILE, throttle=HOSTILE),
    }
    strings = dict.fromkeys(("device", "notebook", "started"), HOSTILE)
    facts, weights = {HOSTILE: HOSTILE}, dict.fromkeys(("source", "kind", "digest"), HOSTILE)
    for key, status in (("a1", "completed"), ("b2", "completed"), ("c3", "failed")):
        meta = {"parameters": {HOSTILE: HOSTILE, "n": key}, "environment": facts, "versions": facts, "error": HOSTILE}
        drawn = {"p": (fabricated.picture(0, 0.0), HOSTILE)}
        fabricated.add_run(root, "e", key, tables, drawn, status=status, weights=weights, **strings, **meta)
    fabricated.add_experiment(root, "e", HOSTILE, ["a1", "b2", "c3"])
    assert len(Store(root).runs("e")) == 3  # what the store refuses to read would attack nothing
    return root


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """No text of a run becomes an element, an attribute, a script or a template."""
    hostile_store(tmp_path)
    for path in dashboard.build(Store(tmp_path)):
        page = Page(path)
        assert HOSTILE.partition("{{")[0] in page.text
        assert "7*7" in page.text
        assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
        assert [a["src"] for tag, a in page.elements if tag == "img" and a["src"] == "x"] == []
        assert not [text for a, text in page.scripts if text.strip().startswith("alert")]
        for figure in page.figures().values():
            assert "<script" not in json.dumps(figure)


def test_a_figures_json_cannot_leave_its_script() -> None:
    """Whatever text a figure holds, its JSON on the page has no character of markup and reads back the same."""
    figure = go.Figure(layout={"height": 100, "margin": {"t": 20}, "annotations": [{"text": HOSTILE + "<!--\u2028"}]})
    made = chart(figure, "id", "alt")
    assert not set(made.json) & set("<>&\u2028")
    assert json.loads(made.json)["layout"]["annotations"][0]["text"] == HOSTILE + "<!--\u2028"


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - {"environment"}))
@pytest.mark.parametrize("rows", [[], [{"arm": "a"}], [{"arm": None}]])
def test_meagre_tables(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A table without rows, or whose rows say next to nothing, still gives a page and a sentence."""
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["arm"])
    fabricated.add_run(tmp_path, "e", "a1", {name: frame})
    assert "nan" not in page_of(tmp_path, "e").text.lower().split()
    assert dashboard.findings(Store(tmp_path), "e").sentence.startswith(f"On {fabricated.DEVICE}")


def test_loading_has_its_section(tmp_path: Path) -> None:
    """A table of loading becomes a figure, a table and a finding beside the plain read's time."""
    fabricated.add_run(tmp_path, "e", "a1", {"loading": fabricated.loading()})
    page = page_of(tmp_path, "e")
    assert "What loading costs" in page.text and "2.09 s to 2.42 s" in page.text
    (figure,) = page.figures().values()
    assert [trace["y"] for trace in figure["data"]] == [["plain read", "zimage", "zimage 4bit"]] * 2
    assert "zimage loads in 1.10 times a plain read's time" in dashboard.findings(Store(tmp_path), "e").sentence


def test_broken_files_are_told_and_the_rest_is_shown(results: Path) -> None:
    """An unreadable table and an unreadable run.json are named on the page; what can be read is shown."""
    (results / "quickstart/bb22bb22bb22/tables/ablation.parquet").write_bytes(b"PAR1 no more")
    (results / "quickstart/aa11aa11aa11/run.json").write_text("{")
    text = page_of(results).text
    assert "ablation.parquet: not readable" in text
    assert "run.json: not valid JSON" in text
    assert "4bit takes 12.1 % more time" in text


@pytest.mark.parametrize("part", ["findings_of", "case"])
def test_odd_tables_cost_a_line(results: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A run whose tables nothing can be made of is named on the page, and the others are shown."""
    whole = getattr(dashboard, part)

    def fails(tables: dict[str, pd.DataFrame], *arguments: Any, **named: Any) -> Any:
        if "stages" in tables:
            raise AttributeError("no such thing")
        return whole(tables, *arguments, **named)

    monkeypatch.setattr(dashboard, part, fails)
    text = page_of(results).text
    assert "quickstart/aa11aa11aa11: its tables cannot be shown: AttributeError: no such thing" in text
    assert "4bit takes 12.1 % more time" in text


def test_tables_that_cannot_be_used_are_told(results: Path) -> None:
    """A table without a column that it needs, or with text for numbers, is a line on the page; the rest is shown."""
    path = results / "quickstart/bb22bb22bb22/tables/ablation.parquet"
    frame = pd.read_parquet(path)
    frame.assign(ratio=frame["ratio"].map("about {}".format)).to_parquet(path)
    fabricated.add_run(results, "front", "a1", {"pareto": fabricated.pareto(), "stages": fabricated.stages()})
    path = results / "front/a1/tables/pareto.parquet"
    pd.read_parquet(path).drop(columns="category").to_parquet(path)
    text = page_of(results).text
    assert text.count("table ablation of run quickstart/bb22bb22bb22 cannot be used: column ratio holds text") == 1
    assert "4bit takes 12.1 % more time" in text
    text = page_of(results, "front").text
    assert "table pareto of run front/a1 cannot be used: column category is missing; run it again" in text
    assert "a step takes 10.8 ms" in text


def test_earlier_runs_are_not_lost_without_a_word(tmp_path: Path) -> None:
    """A page says how many completed runs its newest sweep took off it, and what lists them; not what was done anew."""
    for key, given in (("a1", {"batch": 1}), ("b2", {"batch": 2}), ("c3", {"batch": 3})):
        fabricated.add_run(tmp_path, "e", key, {"stages": fabricated.stages()}, parameters=given)
    fabricated.add_run(tmp_path, "e", "d4", {"stages": fabricated.stages()}, parameters={"batch": 1})
    fabricated.add_run(tmp_path, "e", "f5", parameters={"batch": "typo"}, status="failed", error="E: no")
    told = "{} earlier completed {} no longer on this page, as the newest sweep asks for others; {} files are kept"
    for asked, count, words in (
        (["a1", "b2", "c3"], 0, ()),  # d4 has the parameters of a1
        (["d4", "c3"], 1, ("1", "run is", "its")),
        (["f5"], 4, ("The newest sweep has no completed run. 4", "runs are", "their")),
    ):
        fabricated.add_experiment(tmp_path, "e", "q?", asked)
        text = page_of(tmp_path, "e").text
        assert ("no longer on this page" in text) == bool(count) == bool(dashboard.earlier(Store(tmp_path), "e"))
        if count:
            assert told.format(*words) in text and "`zimage show e` lists" in text
            assert ("has no completed run" in text) == (asked == ["f5"])


def test_recipes_are_linked(tmp_path: Path) -> None:
    """The recipes that a run wrote are linked beside it, whatever they are called."""
    run = fabricated.add_run(tmp_path, "e", "a1", {"stages": fabricated.stages()})
    assert "Recipes" not in page_of(tmp_path, "e").text
    (run / "recipes").mkdir()
    for name in ("within_error", "<b>&'a b"):
        (run / "recipes" / f"{name}.yaml").write_text("default: null\n")
    page = page_of(tmp_path, "e")
    assert {"a1/recipes/within_error.yaml", "a1/recipes/%3Cb%3E%26%27a%20b.yaml"} <= set(page.links())
    assert all((tmp_path / "e" / unquote(link)).is_file() for link in page.links() if "recipes" in link)
    assert "<b>&'a b.yaml, within_error.yaml." in page.text


def test_a_block_that_noise_hid_is_no_number(tmp_path: Path) -> None:
    """Where the depth view's block came out negative, page and finding say that the noise hid it."""
    deep = {"arm": "baseline", "view": "depth", "time_s": -9.16e-3, "time_low_s": -0.02, "time_high_s": 0.01}
    rows = [{**deep, "stage": "one block"}, {**deep, "stage": "the rest", "time_s": 0.02}]
    stages = pd.concat([fabricated.stages(), pd.DataFrame(rows)], ignore_index=True)
    fabricated.add_run(tmp_path, "e", "a1", {"stages": stages})
    text = page_of(tmp_path, "e").text
    assert "the noise hid what one main block takes by the depth view" in text
    assert "9.16 ms" not in text and "hidden by noise" in text and "20.0 ms" in text


def test_only_failures(tmp_path: Path) -> None:
    """An experiment whose every run failed says so instead of showing nothing."""
    fabricated.add_run(tmp_path, "e", "a1", status="failed", error="ZeroDivisionError: division by zero")
    text = page_of(tmp_path, "e").text
    assert "Nothing has completed yet" in text
    assert "ZeroDivisionError: division by zero" in text
    expected = f"On {fabricated.DEVICE}, with trained weights: 1 of 1 run failed."
    assert dashboard.findings(Store(tmp_path), "e").sentence == expected


def test_an_empty_store_has_an_index(tmp_path: Path) -> None:
    """A store without experiments gives an index that says how to begin."""
    assert dashboard.build(Store(tmp_path)) == [tmp_path / "index.html"]
    assert "No experiment has run yet" in Page(tmp_path / "index.html").text


def test_unknown_experiment(results: Path) -> None:
    """A name that the store does not hold is refused with those it holds, and nothing is written."""
    with pytest.raises(StoreError, match=r"no experiment 'nope'; there are: quickstart"):
        dashboard.build(Store(results), ["nope"])
    assert not (results / "index.html").exists()


def test_the_sentence_is_one_plain_line(built: Path) -> None:
    """The terminal's sentence is one line without markup, with each notebook's finding about the whole step."""
    text = dashboard.findings(Store(built), "quickstart").sentence
    assert text.startswith(f"On {fabricated.DEVICE}, with trained weights: the 3 main layers take 71 % of a step")
    assert "fused_qkv is equivalent in time to separate_qkv per step" in text
    assert "weights 84 % smaller, relative L2 error 0.0813" in text
    assert "\n" not in text
    assert "<" not in text


def test_pages_are_the_same_twice(results: Path) -> None:
    """A rebuild of an unchanged store changes no byte."""
    first = [path.read_bytes() for path in dashboard.build(Store(results))]
    assert [path.read_bytes() for path in dashboard.build(Store(results))] == first


def test_no_mlx(results: Path) -> None:
    """Pages are built where MLX cannot be imported."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'mlx': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from zimage.lab.store import Store; from zimage.lab import dashboard\n"
        f"print(len(dashboard.build(Store({str(results)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_the_module_tree_is_indented_by_what_holds_what() -> None:
    """A module stands below the one that holds it, under its own name or with that of the list it is in."""
    table = cost_sections.modules(fabricated.arrow("modules", fabricated.modules()).to_pandas()).table
    assert table is not None
    names = [row[0].text.replace("\N{NO-BREAK SPACE}", " ") for row in table.rows]
    assert names == [
        "the whole step", "   layers", "      layers.0", "         attention", "            to_out.0",
        "         feed_forward", "   final_layer",
    ]  # fmt: skip


def test_ratios_to_different_baselines_are_not_put_side_by_side(tmp_path: Path) -> None:
    """Where arms have baselines of their own, the panel of arms holds their errors, no ratio of one to another's."""
    rows = [
        ("no_mask", "all_ones_mask", "step", 0.5, 0.4, 0.6, "faster"),
        ("b", "c", "step", 0.9, 0.8, 1.1, "inconclusive"),
    ]
    errors = [
        {"arm": arm, "metric": "relative_l2_error", "value": v} for arm, v in (("all_ones_mask", 0.01), ("c", 0.02))
    ]
    tables = {"ablation": fabricated.ablation(*rows), "quality": pd.DataFrame(errors)}
    fabricated.add_experiment(tmp_path, "claims", "Which hold?", ["a" * 16])
    fabricated.add_run(tmp_path, "claims", "a" * 16, tables)
    dashboard.build(Store(tmp_path))
    page = (tmp_path / "claims" / "index.html").read_text()
    assert "relative L2 error" in page
    assert "time ratio, step" not in page
    assert "The baseline is grey" not in page


def test_findings_beyond_the_most_are_counted_in_words(tmp_path: Path) -> None:
    """One finding too many is `1 more finding`, two are `2 more findings`."""
    for name, number in (("one", dashboard.ON_A_PAGE + 1), ("two", dashboard.ON_A_PAGE + 2)):
        rows = [(f"arm{i}", "base", "step", 0.9, 0.8, 0.95, "faster") for i in range(number)]
        fabricated.add_experiment(tmp_path, name, "Which?", [name * 5])
        fabricated.add_run(tmp_path, name, name * 5, {"ablation": fabricated.ablation(*rows)})
    dashboard.build(Store(tmp_path))
    one, two = ((tmp_path / name / "index.html").read_text() for name in ("one", "two"))
    assert "1 more finding<" in one
    assert "2 more findings<" in two


def test_a_busy_machine_is_said_on_the_page(tmp_path: Path) -> None:
    """A run that started beside other work, or on a battery, has that above its findings; a quiet one has nothing."""
    busy = {"device_type": "cpu", "cores": "2", "machine_cores": "2", "other_busy_cores": "1.9"}
    quiet = busy | {"other_busy_cores": "0.0"}
    for name, facts in (("busy", busy), ("quiet", quiet)):
        fabricated.add_experiment(tmp_path, name, "How long?", [name * 3])
        fabricated.add_run(tmp_path, name, name * 3, {"stages": fabricated.stages()}, environment=facts)
    dashboard.build(Store(tmp_path))
    said = "Times may be off: at the start of 1 of 1 run other work keeps 1.9 of 2 CPU cores busy."
    assert said in (tmp_path / "busy" / "index.html").read_text()
    assert "Times may be off" not in (tmp_path / "quiet" / "index.html").read_text()


def test_runs_are_told_apart_by_what_they_measured(tmp_path: Path) -> None:
    """What chooses rows, or says how hard was looked, stands in no label where other parameters tell the runs apart."""
    table = {"ablation": fabricated.ablation(("4bit", "float32", "step", 1.2, 1.1, 1.3, "slower"))}
    sizes = {"a": (8, ["4bit"], 10), "b": (16, ["8bit", "4bit"], 20)}
    for key, (height, modes, quads) in sizes.items():
        given = {"source": "digits", "height": height, "width": height, "modes": modes, "quads": quads}
        fabricated.add_run(tmp_path, "e", key, table, parameters=given)
    text = Page(dashboard.build(Store(tmp_path))[0]).text
    assert "4bit · 8 x 8 px" in text and "4bit · 8 x 8 px, modes" not in text
    fabricated.add_run(tmp_path, "f", "a", table, parameters={"source": "digits", "modes": ["4bit"]})
    fabricated.add_run(tmp_path, "f", "b", table, parameters={"source": "digits", "modes": ["8bit", "4bit"]})
    assert "4bit · modes=8bit + 4bit" in Page(dashboard.build(Store(tmp_path))[1]).text
