"""Sustained comparisons: quads of blocks instead of calls, each long enough for an arm to make its own heat."""

import math
import random
from collections.abc import Iterator

from zimage.measure.arguments import require_calls, require_fractions, require_integer, require_pair, require_positive
from zimage.measure.comparison import Comparison
from zimage.measure.floor import NoiseFloor, floor_at, require_floor
from zimage.measure.quads import Sample, differences, schedule, seconds
from zimage.measure.samples import Timed
from zimage.measure.statistics import analyse, verdict

import numpy as np


def sustained(
    baseline: Timed,
    arm: Timed,
    *,
    seed: int,
    block_s: float = 10.0,
    quads: int = 8,
    alpha: float = 0.05,
    delta: float = 0.01,
    noise_floor: float | NoiseFloor | None = None,
    names: tuple[str, str] = ("baseline", "arm"),
) -> Comparison:
    """Compare `arm` with `baseline` in quads of blocks, A B B A or B A A B; one look, after all `quads`.

    A block is one arm called once, which follows the other arm's heat, may build kernels and is a sample of kind
    "warm-up", and then again and again until these calls took `block_s` seconds by their own account. Its value is
    their time divided by their number, not their mean log: sustained is what a long row of steps takes in total, so
    that a pause which a hot device forces counts in full. The samples' position is their block.

    A noise floor from bursts bounds less than one from blocks would. Raises MeasurementError for arguments out of
    range, too few quads for any rejection at alpha, or a time that is not positive.
    """
    require_pair(names)
    require_calls(dict(zip(names, (baseline, arm), strict=True)))
    require_integer("seed", seed)
    require_fractions(alpha=alpha, delta=delta)
    require_integer("quads", quads, math.ceil(1 - math.log2(alpha)))  # 2 / 2^n <= alpha
    require_positive(block_s=block_s)
    require_floor(noise_floor)
    rng = random.Random(seed)
    calls = {False: (names[0], baseline), True: (names[1], arm)}
    samples: list[Sample] = []
    values, outside = np.empty((quads, 4)), np.empty(quads, np.bool_)
    for quad in range(quads):
        order = [is_arm for is_arm, is_timed in schedule(rng) if is_timed]
        outside[quad] = order[0]
        for position, is_arm in enumerate(order):
            name, call = calls[is_arm]
            samples.append(Sample(name, quad, position, seconds(name, call()), "warm-up"))
            times = list(_block(name, call, block_s))
            samples += [Sample(name, quad, position, time_s) for time_s in times]
            values[quad, position] = math.fsum(times) / len(times)
    estimate = analyse(differences(values, outside), alpha)
    floor = floor_at(noise_floor, quads)
    word, reason = verdict(estimate, delta, floor)
    return Comparison(
        names[0], names[1], estimate.ratio, estimate.low, estimate.high, estimate.p, word, reason, word, quads, {}, 1,
        alpha, alpha, delta, floor, "sustained", seed, samples,
    )  # fmt: skip


def _block(name: str, call: Timed, block_s: float) -> Iterator[float]:
    """The times of one block's calls after the first."""
    total = 0.0
    while total < block_s:
        time_s = seconds(name, call())
        total += time_s
        yield time_s
