"""`python -m tests.measure.honesty_table` simulates the method and writes the tables of docs/honesty.md."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from unittest.mock import patch

from tests.measure import study
from tests.measure.clocks import BY_NAME, CLOCKS, NOISIER, ClockModel
from tests.measure.study import Outcome
from zimage.measure import statistics
from zimage.measure.statistics import LOOKS

PAGE = Path(__file__).parents[2] / "docs" / "honesty.md"
BEGIN, END = "<!-- tables: python -m tests.measure.honesty_table -->", "<!-- end of tables -->"
WITH_CANARY = ("throttle", "AR(1)")


@dataclass(frozen=True)
class Study:
    """The outcomes on one clock: of the same against the same, and of planted ratios, at one look, at two and four."""

    same: Outcome
    same_two: Outcome
    same_four: Outcome
    two_percent: Outcome
    two_percent_two: Outcome
    two_percent_four: Outcome
    one_percent: Outcome


@cache
def studied(clock: ClockModel) -> Study:
    """20,000 runs of each kind on that clock."""
    return Study(
        study.run(clock), study.run(clock, looks=study.TWO_LOOKS), study.run(clock, looks=LOOKS),
        study.run(clock, 1.02), study.run(clock, 1.02, study.TWO_LOOKS), study.run(clock, 1.02, LOOKS),
        study.run(clock, 1.01),
    )  # fmt: skip


@cache
def with_canary(name: str) -> list[Outcome]:
    """The same against the same where quads whose canary is out of step are dropped, at one look, at two and four."""
    planned = (study.ONE_LOOK, study.TWO_LOOKS, LOOKS)
    return [study.run(BY_NAME[name], looks=looks, taken=study.with_canary) for looks in planned]


@lru_cache(maxsize=1)
def noisier() -> Outcome:
    """A planted 1 % in noise of 3 %."""
    return study.run(NOISIER, 1.01)


@contextmanager
def off_by(ranks: int) -> Iterator[None]:
    """While this lasts, the ends of intervals are taken that many ranks further inside than the test allows."""
    right = statistics.critical
    with patch.object(statistics, "critical", lambda n, level: right(n, level) + ranks):
        yield


def _off_by(ranks: int) -> Outcome:
    with off_by(ranks):
        return study.run(BY_NAME["iid 1 %"])


@dataclass(frozen=True)
class Mutant:
    """A wrong method: how its runs end, the check that has to refuse it, and how it shows, in words.

    beside: the right method's runs of the same kind, as `Study` has them.
    """

    name: str
    clock: str
    run: Callable[[], Outcome]
    passes: Callable[[Outcome], bool]
    shows: Callable[[Outcome], str]
    beside: str = "same"


def _rejections(outcome: Outcome) -> str:
    return f"rejects {_percent(outcome.rejected.mean())} of the same against the same"


def _disagreements(outcome: Outcome) -> str:
    return f"test and interval disagree in {study.disagreements(outcome)} runs"


def _signs(outcome: Outcome) -> str:
    return f"calls {_percent((outcome.high < 1).mean())} of arms that take 2 % more time faster"


def _agrees(outcome: Outcome) -> bool:
    return study.disagreements(outcome) == 0


def _mutant(clock: str, **options: object) -> Callable[[], Outcome]:
    return partial(study.run, BY_NAME[clock], **options)  # type: ignore[arg-type]


EVERY_QUAD = range(1, LOOKS[-1] + 1)
MUTANTS = (
    Mutant(
        "all of the baseline, then all of the arm", "drift", _mutant("drift", taken=study.in_sequence),
        study.rarely_rejects, _rejections,
    ),
    Mutant(
        "the same order, while the clock throttles", "throttle", _mutant("throttle", taken=study.in_sequence),
        study.rarely_rejects, _rejections,
    ),
    Mutant(
        "a look after every quad, until it excludes 1", "iid 2 %",
        _mutant("iid 2 %", looks=EVERY_QUAD, level=study.ALPHA), study.rarely_rejects, _rejections,
    ),
    Mutant(
        "two looks, with the whole of alpha at each", "spikes",
        _mutant("spikes", looks=study.TWO_LOOKS, level=study.ALPHA), study.rarely_rejects, _rejections, "same_two",
    ),
    Mutant(
        "the arm's outliers dropped, the baseline's kept", "spikes",
        _mutant("spikes", taken=partial(study.in_quads, judge=study.without_outliers_of_the_arm)),
        study.rarely_rejects, _rejections,
    ),
    Mutant("interval one rank too narrow", "iid 1 %", partial(_off_by, 1), _agrees, _disagreements),
    Mutant("interval one rank too wide", "iid 1 %", partial(_off_by, -1), _agrees, _disagreements),
    Mutant(
        "labels of arm and baseline swapped", "iid 1 %",
        _mutant("iid 1 %", ratio=1.02, taken=partial(study.in_quads, judge=study.swapped)),
        lambda outcome: study.has_right_sign(outcome, 1.02), _signs, "two_percent",
    ),
)  # fmt: skip


@cache
def mutated(name: str) -> Outcome:
    """How the runs of the mutant of that name end."""
    return next(mutant for mutant in MUTANTS if mutant.name == name).run()


def tables() -> str:
    """The two tables, in Markdown."""
    lines = [
        "| clock | what it does | same rejected, 1 look | 2 looks | 4 looks | 1.02 covered, 1 look | 2 looks | 4 looks "
        "| 1 % found |",
        f"| --- | --- |{' ---: |' * 7}",
    ]
    for clock in CLOCKS:
        found = studied(clock)
        shares = (
            found.same.rejected, found.same_two.rejected, found.same_four.rejected, found.two_percent.covers(1.02),
            found.two_percent_two.covers(1.02), found.two_percent_four.covers(1.02), found.one_percent.rejected,
        )  # fmt: skip
        lines.append(_row(clock.name, clock.parameters, *(_percent(share.mean()) for share in shares)))
    lines.append(_row(NOISIER.name, NOISIER.parameters, *[""] * 6, _percent(noisier().rejected.mean())))
    for name in WITH_CANARY:
        rates = (_percent(outcome.rejected.mean()) for outcome in with_canary(name))
        lines.append(
            _row(f"{name}, with a canary", "as above, quads with a canary out of step dropped", *rates, *[""] * 4)
        )
    lines += ["", "| wrong method | clock | what gives it away |", "| --- | --- | --- |"]
    lines += [_row(mutant.name, mutant.clock, mutant.shows(mutated(mutant.name))) for mutant in MUTANTS]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def written() -> str:
    """The tables as the page has them."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Simulate, and put the tables between the page's two marks."""
    text = PAGE.read_text(encoding="utf-8")
    new = f"{BEGIN}\n\n{tables()}\n\n{END}"
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: new, text, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
