"""Comparing two arms over fresh processes, each loaded alone: one process alive at a time, in pairs of random order.

It tells what the start of a program, with its addresses and its warm-up, does to the times, and it is how two arms are
compared that don't fit in memory together: they alternate as processes.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.processes import Arm, Resident
from zimage.measure.statistics import analyse, verdict

import numpy as np

FEWEST_PAIRS = 8


@dataclass(frozen=True)
class ProcessSample:
    """One timed call: of which arm, in which process and pair, the how-manieth there, and of what kind."""

    arm: str
    process: int
    pair: int
    position: int
    kind: str
    time_s: float


@dataclass(frozen=True)
class ProcessComparison:
    """What an arm did to the time over pairs of fresh processes; the fields mean what those of `Comparison` do."""

    baseline: str
    arm: str
    ratio: float
    low: float
    high: float
    p: float
    verdict: str
    reason: str
    pairs: int
    alpha: float
    delta: float
    noise_floor: float | None
    seed: int
    samples: list[ProcessSample]

    def __str__(self) -> str:
        confidence = f"{100 * (1 - self.alpha):g} % CI"
        evidence = f"{self.pairs} pairs of fresh processes"
        if self.noise_floor is not None:
            evidence += f", noise floor {100 * self.noise_floor:.1f} %"
        if self.verdict == "inconclusive":
            evidence += f" ({self.reason})"
        if self.low <= 1 <= self.high:
            found = f"time ratio {self.ratio:.3f} to {self.baseline}, {confidence} {self.low:.3f}-{self.high:.3f}"
        else:
            change, *ends = (100 * abs(1 - x) for x in (self.ratio, self.low, self.high))
            found = f"{change:.1f} % {'less' if self.ratio < 1 else 'more'} time than {self.baseline}, "
            found += f"{confidence} {min(ends):.1f}-{max(ends):.1f}"
        return f"{self.arm}: {self.verdict}, {found}, {evidence}"

    def row(self, scope: str) -> dict[str, Any]:
        """The comparison as a row of the `ablation` table, pairs of processes in the place of quads."""
        return {
            "arm": self.arm, "baseline": self.baseline, "scope": scope, "regime": "burst", "ratio": self.ratio,
            "ratio_low": self.low, "ratio_high": self.high, "p_value": self.p, "verdict": self.verdict,
            "reason": self.reason, "verdict_without_drops": self.verdict, "quads": self.pairs, "dropped_quads": 0,
            "noise_floor": self.noise_floor,
        }  # fmt: skip

    def sample_rows(self, scope: str, trial: int = 0) -> list[dict[str, Any]]:
        """Every timed call as a row of the `samples` table: first calls and warm-ups are kinds of their own.

        Processes are numbered from 1 in the order they ran; 0 is the one that asks.
        """
        return [
            {
                "arm": s.arm, "scope": scope, "process": s.process, "trial": trial, "quad": s.pair,
                "position": s.position, "kind": s.kind, "regime": "burst", "time_s": s.time_s, "dropped": False,
            }
            for s in self.samples
        ]  # fmt: skip


def in_fresh_processes(
    baseline: Arm,
    arm: Arm,
    *,
    seed: int,
    pairs: int = FEWEST_PAIRS,
    samples: int = 10,
    warm_up: int = 3,
    alpha: float = 0.05,
    delta: float = 0.01,
    noise_floor: float | None = None,
    timeout_s: float = 600.0,
    names: tuple[str, str] = ("baseline", "arm"),
    advance: Callable[[], None] = lambda: None,
) -> ProcessComparison:
    """Compare two arms, each loaded alone in `pairs` processes of its own, one process alive at a time.

    A process makes its first call, `warm_up` more, then `samples`; a pair is one process of each arm, in an order drawn
    from `seed`, and gives one difference of mean log times. They are judged once, by the signed-rank test over pairs.
    advance: called after each of the 2 `pairs` processes. Raises MeasurementError for fewer than 8 pairs and other
    arguments out of range, and as `Resident` does.
    """
    _check(pairs, samples, alpha, delta, noise_floor, names, seed)
    rng = random.Random(seed)
    taken: list[ProcessSample] = []
    differences: list[float] = []
    for pair in range(pairs):
        order = [(names[0], baseline), (names[1], arm)]
        if rng.random() < 0.5:
            order.reverse()
        means = {}
        for process, (name, program) in enumerate(order, start=2 * pair + 1):
            try:
                with Resident(program, warm_up=warm_up, timeout_s=timeout_s) as resident:
                    times = [resident() for _ in range(samples)]
            except MeasurementError as error:
                raise MeasurementError(f"{name}, process {process} of {2 * pairs}: {error}") from None
            before = resident.before_s
            kinds = ["first call", *["warm-up"] * len(before)][: len(before)] + ["sample"] * samples
            taken += [
                ProcessSample(name, process, pair, position, kind, time_s)
                for position, (kind, time_s) in enumerate(zip(kinds, [*before, *times], strict=True))
            ]
            means[name] = float(np.log(times).mean())
            advance()
        differences.append(means[names[1]] - means[names[0]])
    estimate = analyse(np.array(differences), alpha)
    word, reason = verdict(estimate, delta, noise_floor)
    return ProcessComparison(
        *names, estimate.ratio, estimate.low, estimate.high, estimate.p, word, reason, pairs, alpha, delta,
        noise_floor, seed, taken,
    )  # fmt: skip


def _check(
    pairs: int,
    samples: int,
    alpha: float,
    delta: float,
    noise_floor: float | None,
    names: tuple[str, str],
    seed: int,
) -> None:
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < FEWEST_PAIRS:
        raise MeasurementError(f"fresh processes are compared in at least {FEWEST_PAIRS} pairs, found {pairs!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise MeasurementError(f"a process must take at least one sample, found {samples!r}")
    if not 0 < alpha < 1 or not 0 < delta < 1:
        raise MeasurementError(f"alpha and delta must lie between 0 and 1, found {alpha} and {delta}")
    if noise_floor is not None and not 0 <= noise_floor < math.inf:
        raise MeasurementError(f"noise_floor must be a |log ratio|, 0 or more, found {noise_floor}")
    if names[0] == names[1]:
        raise MeasurementError(f"baseline and arm are both called {names[0]!r}; their names must differ")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MeasurementError(f"seed must be an integer, found {seed!r}")
