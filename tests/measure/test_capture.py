"""Native captures: refused in one line where they cannot be taken, and never timed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure import capture
from zimage.measure.timing import timed, untimed

import mlx.core as mx
import pytest


class FakeMetal:
    """Metal as a capture uses it, noting what is called."""

    def __init__(self, there: bool = True, error: str = "") -> None:
        self.calls: list[str] = []
        self._there, self._error = there, error

    def is_available(self) -> bool:
        """Whether there is such a device."""
        return self._there

    def start_capture(self, path: str) -> None:
        """Begin."""
        self.calls.append(f"start {path}")
        if self._error:
            raise RuntimeError(self._error)

    def stop_capture(self) -> None:
        """End."""
        self.calls.append("stop")


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> FakeMetal:
    """A Metal device on which captures are allowed."""
    fake = FakeMetal()
    monkeypatch.setattr(mx, "metal", fake)
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    return fake


def _refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(MeasurementError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def _not_run() -> None:
    pytest.fail("nothing may run")


def test_a_metal_capture_surrounds_the_evaluation(metal: FakeMetal, tmp_path: Path) -> None:
    """The capture starts before the work is evaluated and ends after it, and its path is given."""
    kept: list[mx.array] = []

    def work() -> mx.array:
        metal.calls.append("work")
        kept.append(mx.ones((256, 1024)) + 1)
        return kept[0]

    before = mx.get_active_memory()
    path = tmp_path / "step.gputrace"
    assert capture.metal(work, path) == path
    assert metal.calls == [f"start {path}", "work", "stop"]
    assert mx.get_active_memory() - before >= 2**20


def test_a_capture_ends_when_the_work_fails(metal: FakeMetal, tmp_path: Path) -> None:
    """Work that raises is no reason to go on capturing, or to refuse timings afterwards."""
    with pytest.raises(ZeroDivisionError):
        capture.metal(lambda: 1 / 0, tmp_path / "step.gputrace")
    assert metal.calls[-1] == "stop"
    assert timed(lambda: None)() >= 0


def test_metal_captures_that_cannot_be_taken(metal: FakeMetal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wrong suffix, a file in the way, no leave at start, no device, or Metal's own no: each is one line."""
    path = tmp_path / "step.gputrace"
    _refused(lambda: capture.metal(_not_run, tmp_path / "step.trace"), r"name it .*step\.gputrace")
    path.mkdir()
    _refused(lambda: capture.metal(_not_run, path), "exists already")
    path.rmdir()
    monkeypatch.delenv("MTL_CAPTURE_ENABLED")
    _refused(lambda: capture.metal(_not_run, path), "run again with MTL_CAPTURE_ENABLED=1 set")
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    monkeypatch.setattr(mx, "metal", FakeMetal(error="Failed to start\ndetails"))
    _refused(lambda: capture.metal(_not_run, path), "Metal started no capture: Failed to start")
    monkeypatch.setattr(mx, "metal", FakeMetal(there=False))
    _refused(lambda: capture.metal(_not_run, path), "no Metal device here")
    assert metal.calls == []
    assert timed(lambda: None)() >= 0


def test_each_stage_has_its_nvtx_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is built and evaluated within a range of its own name, in order."""
    seen: list[str] = []

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        seen.append(f"push {name}")
        yield
        seen.append("pop")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    monkeypatch.setattr(mx, "eval", lambda result: seen.append(f"eval {result}"))
    capture.nvtx(["a", "b"], lambda k: k)
    assert seen == ["push a", "eval 1", "pop", "push b", "eval 2", "pop"]


def test_nvtx_captures_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, or without stages, nothing runs and one line says why."""
    monkeypatch.setitem(sys.modules, "nvtx", None)
    _refused(lambda: capture.nvtx(["a"], lambda _k: _not_run()), "pip install nvtx")
    _refused(lambda: capture.nvtx([], lambda _k: _not_run()), "at least one stage")


@pytest.mark.parametrize("way", ["metal", "nvtx"])
def test_nothing_is_timed_under_a_capture(
    way: str, metal: FakeMetal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A timed call within a capture is a MeasurementError that names it, and its work isn't done."""
    nvtx = SimpleNamespace(annotate=lambda _name: untimed("a range"))
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    call = timed(_not_run)
    if way == "metal":
        _refused(lambda: capture.metal(call, tmp_path / "step.gputrace"), "a Metal capture is under way")
        assert metal.calls[-1] == "stop"
    else:
        _refused(lambda: capture.nvtx(["a"], lambda _k: call()), "under way")
    assert timed(lambda: None)() >= 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nonsense", r"name it nonsense\.gputrace"), ("a.gputrace", "no Metal"), ("nvtx", "pip install")],
)
def test_what_cannot_be_captured_is_known_beforehand(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`require` refuses what the capture itself would, without taking one; None asks for none."""
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    _refused(lambda: capture.require(kind), words)
    capture.require(None)
