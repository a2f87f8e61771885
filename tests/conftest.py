"""Fixtures that tests of several folders share."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tests.digits.drawing import First
from tests.in_process import execute
from tests.sweeping import QUICKSTART, Command, Sweep, on_digits, quick, side_by_side, sweep
from zimage import backend
from zimage.lab import runner
from zimage.measure import peaks

import hypothesis
import pytest

hypothesis.settings.register_profile("zimage", deadline=None)  # an example's time is that of the machine's other work
hypothesis.settings.load_profile("zimage")


@pytest.fixture(autouse=True)
def _no_run_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run inside a run; what they record must not end up there."""
    monkeypatch.delenv("ZIMAGE_RUN_DIR", raising=False)


@pytest.fixture(scope="session")
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Command], Sweep]:
    """A sweep or run of this repository, done once however many tests look at it.

    They take most of the time of all tests and each keeps one core busy: the first that is asked for brings all others
    that tests of this session are about, two at a time.
    """
    done: dict[Command, Sweep] = {}

    def _swept(line: Command) -> Sweep:
        if line not in done:
            _keep_peaks()
            wanted = dict.fromkeys((line, *_wanted(request.session.items)))
            lines = sorted((one for one in wanted if one not in done), key=lambda one: one != QUICKSTART)  # the longest
            folders = [tmp_path_factory.mktemp("swept") / "results" for _ in lines]
            calls = [partial(sweep, one, folder) for one, folder in zip(lines, folders, strict=True)]
            done.update(zip(lines, side_by_side(*calls), strict=True))
        return done[line]

    return _swept


def _wanted(items: Iterable[pytest.Item]) -> Iterator[Command]:
    """The sweeps and runs that tests name by their parameters or fixtures."""
    for item in items:
        named = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        fixtures = getattr(item, "fixturenames", ())
        if "quickstart" in fixtures:
            yield QUICKSTART
        if "experiment" in named and "swept" in fixtures:
            yield quick(named["experiment"])
        if "path" in named and "ran" in fixtures:
            yield on_digits(named["path"])


def _keep_peaks() -> None:
    """Let the runs to come find what this device reaches: beside each other each would measure it anew."""
    facts = backend.device_facts()
    found = peaks.here()
    peaks.keep(facts["device"], found | {"conditions": found["conditions"] | {"other_busy_cores": "0.0"}})


@pytest.fixture(scope="session")
def quickstart(swept: Callable[[Command], Sweep], figure: Callable[[str], None]) -> Sweep:
    """The quickstart just as the README tells to run it, done once."""
    done = swept(QUICKSTART)
    figure(f"the quickstart took {done.duration_s:.0f} s, perhaps beside another sweep")
    return done


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let notebooks run in this process, without a kernel."""
    monkeypatch.setattr(runner, "_execute", execute)


@pytest.fixture(scope="session")
def first_digits(tmp_path_factory: pytest.TempPathFactory) -> First:
    """The first digits that the shipped weights draw."""
    return First(tmp_path_factory.mktemp("digits"))


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
