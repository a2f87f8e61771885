"""Fixtures that tests of several folders share."""

import pytest


@pytest.fixture(autouse=True)
def _no_run_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run inside a run; what they record must not end up there."""
    monkeypatch.delenv("ZIMAGE_RUN_DIR", raising=False)
