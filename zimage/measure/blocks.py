"""Sustained times: blocks instead of calls, each long enough for an arm to make its own heat, compared or alone."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zimage.measure.arguments import (
    require_calls,
    require_fractions,
    require_integer,
    require_names,
    require_pair,
    require_positive,
)
from zimage.measure.comparison import Comparison
from zimage.measure.floor import NoiseFloor, floor_at, require_floor
from zimage.measure.quads import Sample, differences, sample_rows, schedule, seconds
from zimage.measure.samples import Timed
from zimage.measure.statistics import analyse, centre, critical, verdict, walsh_averages

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


@dataclass(frozen=True)
class Steady:
    """What one call takes for long: seconds over the blocks, the ends of their interval, and every timed call.

    Both ends are NaN where there are too few blocks for any interval at the level. canary_ratio: the last canary's
    time by the first one's, which says by how much the device has slowed; None without one.
    """

    time_s: float
    low_s: float
    high_s: float
    calls: int
    canary_ratio: float | None
    samples: list[Sample]

    def sample_rows(self, scope: str, trial: int = 0) -> list[dict[str, Any]]:
        """The raw samples as rows of the `samples` table; `quad` is the block."""
        return sample_rows(self.samples, scope, "sustained", trial)


def steady(
    call: Timed, *, block_s: float = 10.0, blocks: int = 6, canary: Timed | None = None, alpha: float = 0.05,
    name: str = "step",
) -> Steady:  # fmt: skip
    """What `call` takes in blocks of `block_s` seconds on end: sustained, with nothing to compare it with.

    One call before the first block warms up and builds kernels. A block's value is the time of its calls divided by
    their number, as in `sustained`; the estimate is the Hodges-Lehmann one over the blocks, the interval the exact
    signed-rank one. One canary stands before the first block and one after each. Raises MeasurementError for arguments
    out of range and times that are not positive.
    """
    require_names(name)
    require_calls({name: call}, canary)
    require_fractions(alpha=alpha)
    require_integer("blocks", blocks, 1)
    require_positive(block_s=block_s)
    samples = [Sample(name, 0, 0, seconds(name, call()), "warm-up")]
    values, checked = [], []
    for block in range(blocks + 1):
        if canary is not None:
            checked.append(seconds("the canary", canary()))
            samples.append(Sample("canary", block, -1, checked[-1], "canary"))
        if block < blocks:
            times = list(_block(name, call, block_s))
            samples += [Sample(name, block, position, time_s) for position, time_s in enumerate(times)]
            values.append(math.fsum(times) / len(times))
    walsh = walsh_averages(np.array(values))
    rank = critical(blocks, alpha)
    low, high = (float(walsh[rank]), float(walsh[-rank - 1])) if rank >= 0 else (math.nan, math.nan)
    slower = checked[-1] / checked[0] if checked else None
    return Steady(float(centre(walsh)), low, high, sum(s.kind == "sample" for s in samples), slower, samples)


def _block(name: str, call: Timed, block_s: float) -> Iterator[float]:
    """The times of one block's calls after the first."""
    total = 0.0
    while total < block_s:
        time_s = seconds(name, call())
        total += time_s
        yield time_s
