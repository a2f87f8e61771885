"""Fixtures that tests of several folders share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.sweeping import Sweep, sweep_quickly

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
        return sweep_quickly(experiment, tmp_path_factory.mktemp(experiment.stem) / "results")

    return _swept
