"""The pages in a real browser, opened from the file system with the network cut off.

Chromium is looked for on the PATH, or where ZIMAGE_CHROMIUM says. Without one these tests are skipped, except in CI,
where they fail.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import fabricated
from tests.lab.test_dashboard import hostile_store
from zimage.lab import dashboard
from zimage.lab.store import Store

import pytest

if os.environ.get("CI"):
    import playwright.sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'zimage[test]'")

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@dataclass
class View:
    """An opened page and what it complained about."""

    page: "playwright.Page"
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> "Iterator[playwright.Browser]":
    found = os.environ.get("ZIMAGE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser: none of {', '.join(NAMES)} is on the PATH and ZIMAGE_CHROMIUM is not set"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = fabricated.swept(fabricated.quickstart(tmp_path_factory.mktemp("results")))
    fabricated.across_versions(root)
    dashboard.build(Store(root))
    return root


@pytest.fixture
def show(browser: "playwright.Browser") -> "Iterator[Callable[..., View]]":
    """Opens a file in a fresh, offline context and waits until its visible charts are drawn."""
    contexts = []

    def _show(path: Path, width: int = 1280, scheme: str = "light") -> View:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        context.set_default_timeout(15_000)
        view = View(context.new_page())
        view.page.on("console", lambda m: view.complaints.append(m.text) if m.type in ("error", "warning") else None)
        view.page.on("pageerror", lambda error: view.complaints.append(str(error)))
        view.page.on("request", lambda request: view.requests.append(request.url))
        view.page.on("dialog", lambda dialog: (view.complaints.append(dialog.message), dialog.dismiss()))
        view.page.goto(path.as_uri())
        view.page.wait_for_function(DRAWN)
        return view

    yield _show
    for context in contexts:
        context.close()


# Every chart that can be seen has been drawn to its end.
DRAWN = """() => [...document.querySelectorAll('.plot')].filter((plot) => plot.checkVisibility())
    .every((plot) => plot.dataset.drawn === 'yes' && plot.querySelector('svg.main-svg .cartesianlayer .xtick'))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
BARS = "(plot) => plot.querySelectorAll('.bars .point path').length"
STYLES = "(all) => all.map((e) => getComputedStyle(e).{})"
PAGES = ("index.html", "quickstart/index.html", "turbo_sizes/index.html", "qkv_fusion/index.html")


@pytest.mark.parametrize("name", PAGES)
def test_opens_from_the_file_system_in_silence(results: Path, show: Callable[..., View], name: str) -> None:
    """Every page opens without an error or a warning on the console and asks for nothing but files and inline data."""
    view = show(results / name)
    assert view.complaints == []
    assert {url.partition(":")[0] for url in view.requests} <= {"file", "data", "blob"}


def test_charts_are_drawn(results: Path, show: Callable[..., View]) -> None:
    """Profiles show a bar a stage, forests a marker a row, panels a bar an arm, trends a marker a version."""
    page = show(results / "quickstart/index.html").page
    assert page.locator("[data-figure$=-stages]").first.evaluate(BARS) == 9
    assert page.locator("[data-figure=g1-c0-forest] .scatterlayer .point").count() == 3
    assert page.locator("[data-figure=g2-c0-panel-2]").evaluate(BARS) == 3
    assert "noise_refiner.0" in page.locator("[data-figure$=-stages] .yaxislayer-above").text_content()
    trend = show(results / "qkv_fusion/index.html").page.locator("[data-figure$=-trend]")
    assert (trend.locator(".scatterlayer .point").count(), trend.locator(".xtick").count()) == (3, 3)


@pytest.mark.parametrize("width", [390, 768])
@pytest.mark.parametrize("name", PAGES)
def test_no_sideways_scrolling(results: Path, show: Callable[..., View], name: str, width: int) -> None:
    """No page is wider than a telephone's or a tablet's screen, also with everything unfolded."""
    page = show(results / name, width).page
    assert page.evaluate(OVERFLOW) <= 0
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => one.open = true)")
    page.wait_for_function(DRAWN)
    assert page.evaluate(OVERFLOW) <= 0
    edges = page.locator(".plot svg.main-svg").evaluate_all("(all) => all.map((s) => s.getBoundingClientRect().right)")
    assert max(edges, default=0) <= width


def test_pictures_are_shown_enlarged_and_unsmoothed(results: Path, show: Callable[..., View]) -> None:
    """All pictures load and keep their pixels when enlarged."""
    page = show(results / "quickstart/index.html").page
    pictures = page.locator("img").evaluate_all(
        "(all) => all.map((i) => [i.complete && i.naturalWidth, i.width, getComputedStyle(i).imageRendering])"
    )
    assert len(pictures) == 3
    for natural, shown, rendering in pictures:
        assert natural == 50
        assert shown > 2 * natural
        assert rendering == "pixelated"


def test_links_resolve(results: Path, show: Callable[..., View]) -> None:
    """From the index a reader gets to a page, from there to its runs' files and back."""
    page = show(results / "index.html").page
    page.get_by_role("link", name="Where does a step's time go").click()
    page.wait_for_function(DRAWN)
    assert page.url.endswith("/quickstart/index.html")
    links = page.locator("a[href]").evaluate_all("(all) => all.map((a) => a.href)")
    files = [Path(link.removeprefix("file://").partition("#")[0]) for link in links]
    assert len(files) > 8
    assert [file for file in files if not file.is_file()] == []
    page.get_by_role("link", name="Experiments").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Experiments"


def test_parameters_switch_the_view(results: Path, show: Callable[..., View]) -> None:
    """Choosing other parameters, with the keyboard, shows their charts, drawn, and hides the first ones."""
    view = show(results / "turbo_sizes/index.html")
    page = view.page
    assert page.locator(".case:visible").count() == 1
    page.get_by_label("Parameters").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => !document.getElementById('g0-c1').hidden")
    page.wait_for_function(DRAWN)
    assert page.locator(".case:visible").get_attribute("id") == "g0-c1"
    assert "whole step 5.40 s" in page.locator(".case:visible .infolayer").first.text_content()
    assert view.complaints == []


def test_a_point_leads_to_its_run(tmp_path: Path, show: Callable[..., View]) -> None:
    """A click on an arm of the front opens the executed notebook of the run it was measured in."""
    fabricated.add_run(tmp_path, "e", "a1", {"pareto": fabricated.pareto()})
    view = show(dashboard.build(Store(tmp_path))[0])
    with view.page.expect_request("**/a1/notebook.ipynb"):
        view.page.locator("[data-figure=g0-c0-by-time] .scatterlayer .point").last.click(force=True)
    assert view.complaints == []


def test_wide_tables_fit_a_page(tmp_path: Path, show: Callable[..., View]) -> None:
    """On a wide screen no table of verdicts or of a front is cut: names and reasons wrap."""
    reason = "the interval is too wide: it holds 1 and reaches beyond the band of equivalence"
    names = ("bfloat16_positions_and_timestep", "with_an_all_ones_mask_in_float32")
    pairs = [(f"{name} · submit_early", "separate_qkv") for name in names]
    rows = [(*pair, scope, 1.02, 0.9, 1.1, "inconclusive") for pair in pairs for scope in ("step", "trajectory")]
    times = fabricated.ablation(*rows).assign(reason=reason)
    front = fabricated.pareto()
    front = front.assign(bytes_low=front["bytes"] // 2, bytes_high=front["bytes"])
    fabricated.add_run(tmp_path, "e", "a1", {"ablation": times, "pareto": front})
    dashboard.build(Store(tmp_path))
    page = show(tmp_path / "e" / "index.html", width=1400).page
    cut = "() => [...document.querySelectorAll('.section .scroll')].map(s => s.scrollWidth - s.clientWidth)"
    assert page.evaluate(cut) == [0, 0]


def test_folded_charts_are_drawn_when_unfolded(results: Path, show: Callable[..., View]) -> None:
    """The samples' chart appears, in full width, when its section is opened."""
    page = show(results / "quickstart/index.html").page
    page.locator("summary", has_text="Samples").first.click()
    page.wait_for_function(DRAWN)
    chart = page.locator("[data-figure$=-samples]").first
    assert chart.locator(".boxlayer .box").count() >= 1
    assert chart.locator("svg.main-svg").first.bounding_box()["width"] > 700  # type: ignore[index]


def _luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3])
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(results: Path, show: Callable[..., View], scheme: str) -> None:
    """Text, tags and chart labels have a contrast of at least 4.5 to what lies behind them."""
    page = show(results / "quickstart/index.html", scheme=scheme).page
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    panel = page.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor")
    assert (_luminance(back) > 0.5) == (scheme == "light")
    pairs = [
        *((color, back) for color in page.locator("h1, .quiet, .evidence, a, th").evaluate_all(STYLES.format("color"))),
        *(
            (fill, panel)
            for fill in page.locator(".plot .ytick text, .plot .xtick text").evaluate_all(STYLES.format("fill"))
        ),
        *page.locator(".tag").evaluate_all(
            "(all) => all.map((e) => getComputedStyle(e)).map((style) => [style.color, style.backgroundColor])"
        ),
    ]
    assert len(pairs) > 50
    for front, behind in pairs:
        low, high = sorted((_luminance(front), _luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, behind)


def test_charts_follow_a_change_of_scheme(results: Path, show: Callable[..., View]) -> None:
    """When the reader's scheme turns dark the labels of drawn charts turn light."""
    page = show(results / "quickstart/index.html").page
    fill = "getComputedStyle(document.querySelector('.plot .ytick text')).fill"
    before = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{fill} !== '{before}'")
    assert _luminance(page.evaluate(fill)) > 0.5 > _luminance(before)


def test_single_file_needs_no_other(tmp_path: Path, show: Callable[..., View]) -> None:
    """A single-file page shows its charts and pictures when it is moved away from everything else."""
    root = fabricated.quickstart(tmp_path / "results")
    page, _ = dashboard.build(Store(root), single_file=True)
    moved = tmp_path / "alone.html"
    shutil.copy(page, moved)
    view = show(moved)
    assert view.complaints == []
    assert view.page.locator("svg.main-svg").count() > 0
    loaded = "images => images.length > 0 && images.every(i => i.complete && i.naturalWidth > 0)"
    assert view.page.eval_on_selector_all(".pictures img", loaded)


def test_a_missing_script_is_told(tmp_path: Path, browser: "playwright.Browser") -> None:
    """Without plotly's script beside it a page says what is missing and keeps its tables."""
    root = fabricated.swept(tmp_path)
    page_path, _ = dashboard.build(Store(root))
    (root / "assets" / "plotly.min.js").unlink()
    page = browser.new_page()
    page.goto(page_path.as_uri())
    assert "assets/plotly.min.js, is not where this page expects it" in page.locator(".plot").first.inner_text()
    assert page.locator("table").count() > 0
    page.close()


def test_hostile_data_runs_nothing(tmp_path: Path, show: Callable[..., View]) -> None:
    """Names, errors and captions that are attacks open no dialog, make no element and break no chart."""
    hostile_store(tmp_path)
    dashboard.build(Store(tmp_path))
    for name in ("index.html", "e/index.html"):
        view = show(tmp_path / name, width=390)
        page = view.page
        page.evaluate("() => document.querySelectorAll('details').forEach((one) => one.open = true)")
        page.wait_for_function(DRAWN)
        assert view.complaints == []
        assert page.locator("img[src=x], [onerror], main script:not([type])").count() == 0
        assert page.evaluate(OVERFLOW) <= 0
    assert page.locator("svg.main-svg").count() > 0
