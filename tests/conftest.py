"""Fixtures that tests of several folders share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.sweeping import ROOT, Sweep, sweep

import pytest


@pytest.fixture(autouse=True)
def _no_run_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run inside a run; what they record must not end up there."""
    monkeypatch.delenv("ZIMAGE_RUN_DIR", raising=False)


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Sweep]:
    """The quick sweep of an experiment file of this repository, done once however many tests look at it."""

    @cache
    def _swept(experiment: Path) -> Sweep:
        return sweep(experiment, tmp_path_factory.mktemp(experiment.stem) / "results", "--quick")

    return _swept


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, figure: Callable[[str], None]) -> Sweep:
    """The quickstart just as the README tells to run it, done once."""
    done = sweep(ROOT / "experiments" / "quickstart.yaml", tmp_path_factory.mktemp("quickstart") / "results")
    figure(f"the quickstart took {done.duration_s:.0f} s")
    return done


_FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figure() -> Callable[[str], None]:
    """Keeps a measured figure for the end of the run: machines differ, so it is printed and not asserted."""
    return _FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that the tests measured."""
    if _FIGURES:
        terminalreporter.section("measured here, not asserted")
        terminalreporter.write("".join(f"{line}\n" for line in _FIGURES))
