"""Comparing two arms over fresh processes, each loaded alone: one process alive at a time, in pairs of random order.

It tells what the start of a program, with its addresses and its warm-up, does to the times, and it is how two arms are
compared that don't fit in memory together: they alternate as processes.
"""

import math
import random
from collections.abc import Callable

from zimage.errors import MeasurementError
from zimage.measure.arguments import require_fractions, require_integer, require_pair
from zimage.measure.comparison import Comparison
from zimage.measure.floor import NoiseFloor, floor_at, require_floor
from zimage.measure.processes import Arm, Resident
from zimage.measure.quads import Sample
from zimage.measure.statistics import analyse, critical, verdict

import numpy as np

FEWEST_PAIRS = 8
REGIME = "fresh processes"


def require_processes(count: int) -> None:
    """How many processes a side are to be compared, 0 for none. Raises MeasurementError for too few."""
    if 0 < count < FEWEST_PAIRS or count < 0:
        raise MeasurementError(f"processes must be 0 or at least {FEWEST_PAIRS}, found {count}")


def fewest_pairs(alpha: float) -> int:
    """How many pairs it takes to show anything at `alpha`; never fewer than are worth it."""
    return max(FEWEST_PAIRS, math.ceil(math.log2(2 / alpha)))


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
    noise_floor: float | NoiseFloor | None = None,
    timeout_s: float = 600.0,
    names: tuple[str, str] = ("baseline", "arm"),
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare two arms, each loaded alone in `pairs` processes of its own, one process alive at a time.

    A process makes its first call, `warm_up` more, then `samples`; a pair is one process of each arm, in an order drawn
    from `seed`, and gives one difference of mean log times. They are judged once, by the signed-rank test over pairs.
    advance: called after each of the 2 `pairs` processes. Raises MeasurementError for fewer than 8 pairs, an
    alpha that so many cannot reach, other arguments out of range, and as `Resident` does.
    """
    require_pair(names)
    require_integer("seed", seed)
    require_integer("pairs", pairs, FEWEST_PAIRS)
    require_integer("samples", samples, 1)
    require_fractions(alpha=alpha, delta=delta)
    if critical(pairs, alpha) < 0:
        raise MeasurementError(
            f"{pairs} pairs cannot show anything at alpha {alpha:g}: their p is at least {2.0 ** (1 - pairs):.2g}; "
            f"take {fewest_pairs(alpha)} pairs"
        )
    require_floor(noise_floor)
    rng = random.Random(seed)
    taken: list[Sample] = []
    differences: list[float] = []
    for pair in range(pairs):
        order = [(names[0], baseline), (names[1], arm)]
        if rng.random() < 0.5:
            order.reverse()
        means = {}
        for process, (name, program) in enumerate(order, start=2 * pair + 1):
            try:
                with Resident(program, warm_up=warm_up, timeout_s=timeout_s) as resident:
                    before = resident.before_s or [resident() for _ in range(1 + warm_up)]  # a command makes none
                    times = [resident() for _ in range(samples)]
            except MeasurementError as error:
                raise MeasurementError(f"{name}, process {process} of {2 * pairs}: {error}") from None
            kinds = ["first call", *["warm-up"] * warm_up, *["sample"] * samples]
            taken += [
                Sample(name, pair, position, time_s, kind, process=process)
                for position, (kind, time_s) in enumerate(zip(kinds, [*before, *times], strict=True))
            ]
            means[name] = float(np.log(times).mean())
            advance()
        differences.append(means[names[1]] - means[names[0]])
    estimate = analyse(np.array(differences), alpha)
    floor = floor_at(noise_floor, pairs)
    word, reason = verdict(estimate, delta, floor)
    return Comparison(
        names[0], names[1], estimate.ratio, estimate.low, estimate.high, estimate.p, word, reason, word, pairs, {}, 1,
        alpha, alpha, delta, floor, REGIME, seed, taken,
    )  # fmt: skip
