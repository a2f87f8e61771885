"""The quickstart's page in a real browser, opened from the file system without a network."""

from collections.abc import Callable

from tests import test_browser
from tests.sweeping import Sweep
from tests.test_browser import BARS, View
from zimage.analysis.findings import KNOWN_VERDICTS

import pytest

browser, show = test_browser.browser, test_browser.show


@pytest.fixture
def view(quickstart: Sweep, show: Callable[..., View]) -> View:
    return show(quickstart.results / "quickstart" / "index.html")


def test_the_page_opens_in_silence(view: View) -> None:
    """The page of real runs opens without an error or warning and asks for nothing but files and inline data."""
    assert view.complaints == []
    assert {url.partition(":")[0] for url in view.requests} <= {"file", "data", "blob"}


def test_the_page_shows_what_each_stage_costs(view: View) -> None:
    """There is a bar for each of the nine stages of the digits model, labelled with its name."""
    chart = view.page.locator("[data-figure$=-stages]")
    assert chart.count() == 1
    assert chart.evaluate(BARS) == 9
    labels = chart.locator(".yaxislayer-above").text_content() or ""
    assert all(name in labels for name in ("t_embedder", "noise_refiner.0", "layers.2", "final_layer"))


def test_the_page_says_whether_fusing_helps(view: View) -> None:
    """The fused projection has a finding with a verdict, and a marker for each of its three scopes."""
    finding = view.page.locator(".findings li", has_text="fused_qkv").filter(has_text="per step")
    assert finding.count() == 1
    assert finding.locator(".tag").inner_text().lower() in {*KNOWN_VERDICTS, "undecided"}
    forests = view.page.locator("[data-figure$=-forest]")
    assert forests.first.locator(".scatterlayer .point").count() == 3


def test_the_page_shows_both_quantized_models(view: View) -> None:
    """8 and 4 bits have a finding each, a marker each, and bars beside the unquantized models' in 32 and 16 bits."""
    for arm in ("8bit", "4bit"):
        assert view.page.locator(".findings li", has_text=arm).count() == 1
    assert view.page.locator("[data-figure$=-forest]").nth(1).locator(".scatterlayer .point").count() == 2
    panels = view.page.locator("[data-figure*=-panel-]")
    assert panels.count() >= 4
    assert max(panels.nth(i).evaluate(BARS) for i in range(panels.count())) == 4


def test_the_page_shows_the_digits(view: View) -> None:
    """Pictures of digits load, one an arm with how many were recognised, and first one of all beside each other."""
    pictures = view.page.locator(".pictures figure")
    found = pictures.locator("img").evaluate_all("(all) => all.map((i) => i.complete && i.naturalWidth)")
    assert len(found) == 5 and all(width > 100 for width in found)
    text = " ".join(pictures.all_inner_texts())
    assert "digits_side_by_side" in pictures.first.inner_text()
    for arm in ("float32", "bfloat16", "8bit", "4bit"):
        assert f"digits_{arm}" in text
    assert text.count("recognised") == 4
