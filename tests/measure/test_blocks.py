"""Sustained comparisons: blocks of calls on injected clocks, and what they find that single calls don't."""

import math
import random
from itertools import groupby
from typing import Any

from tests.measure.clock import Clock
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure import steady, sustained
from zimage.measure.comparison import Comparison, compare
from zimage.measure.quads import schedule
from zimage.measure.samples import Timed

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, wilcoxon


class Heating:
    """A device that a hungry arm's calls heat up: after 0.1 s of them its clock falls by 10 %, until another runs."""

    def __init__(self, hungry: str, seed: int = 0) -> None:
        self._random, self._hungry, self._heat_s = np.random.default_rng(seed), hungry, 0.0

    def arm(self, name: str) -> Timed:
        """A call of about 10 ms."""

        def call() -> float:
            if name != self._hungry:
                self._heat_s = 0.0
            time_s = 0.01 * (1.1 if self._heat_s > 0.1 else 1.0) * math.exp(0.005 * self._random.standard_normal())
            if name == self._hungry:
                self._heat_s += time_s
            return time_s

        return call


def compared(clock: Any, ratio: float = 1.0, **options: Any) -> Comparison:
    """Sustained blocks of 0.02 s, which are about 20 calls of the clock."""
    return sustained(clock.arm("baseline"), clock.arm("arm", ratio), **{"seed": 0, "block_s": 0.02, **options})


def test_sustained_blocks_find_what_bursts_do_not() -> None:
    """An arm that is slow only when it is hot is equivalent in bursts and slower in sustained blocks."""
    device = Heating("arm")
    burst = compare(device.arm("baseline"), device.arm("arm"), seed=0)
    found = sustained(device.arm("baseline"), device.arm("arm"), seed=0, block_s=1.0)
    assert burst.verdict == "equivalent"
    assert found.verdict == "slower" and 1.07 < found.ratio < 1.1
    assert (burst.regime, found.regime) == ("burst", "sustained")
    assert ", 8 sustained quads" in str(found)


def test_a_block_lasts_by_its_calls_own_account() -> None:
    """Blocks follow the schedule's order; each lasts `block_s` after its first call, by what calls return."""
    clock = Clock()
    found = compared(clock, 1.3, seed=4, quads=6)
    rng = random.Random(4)
    planned = ["arm" if arm else "baseline" for _ in range(6) for arm, timed in schedule(rng) if timed]
    blocks = [(key, list(block)) for key, block in groupby(found.samples, lambda s: (s.quad, s.position))]
    assert [key for key, _ in blocks] == [(q, p) for q in range(6) for p in range(4)]
    assert [block[0].arm for _, block in blocks] == planned
    for _, block in blocks:
        assert {s.arm for s in block} == {block[0].arm}
        times = [s.time_s for s in block]
        assert sum(times[1:]) >= 0.02 > sum(times[1:-1])
        assert [s.kind for s in block] == ["warm-up"] + ["sample"] * (len(block) - 1)
    assert len(found.samples) == len(clock.calls)  # nothing is left out


def test_a_block_has_two_calls_at_least() -> None:
    """Where a single call fills a block, one more is made, since the first is not counted."""
    clock = Clock()
    found = compared(clock, block_s=1e-6, quads=6)
    assert len(found.samples) == len(clock.calls) == 6 * 4 * 2


def test_a_first_call_fills_no_block() -> None:
    """A call that builds kernels for as long as a block lasts leaves the block as long as the others."""
    clock, built = Clock(noise=1e-4), iter([1.0])
    baseline = clock.arm("baseline")
    found = sustained(lambda: next(built, 0.0) + baseline(), clock.arm("arm"), seed=0, block_s=0.02, quads=6)
    lengths = {k: len(list(b)) for k, b in groupby(found.samples, lambda s: (s.quad, s.position))}
    assert max(s.time_s for s in found.samples) > 1.0
    assert set(lengths.values()) <= {20, 21, 22}


def test_the_value_of_a_block_is_its_time_per_call() -> None:
    """Ratio and p follow from total time over calls without each block's first, by the signed-rank test."""
    found = compared(Clock(noise=0.05), 1.01, quads=8)
    frame = pd.DataFrame([vars(s) for s in found.samples])
    values = frame[frame["kind"] == "sample"].groupby(["quad", "arm", "position"])["time_s"].mean()
    logs = np.log(values).groupby(["quad", "arm"]).mean().unstack()
    differences = (logs["arm"] - logs["baseline"]).to_numpy()
    walsh = [(a + b) / 2 for i, a in enumerate(differences) for b in differences[i:]]
    assert found.ratio == pytest.approx(math.exp(np.median(walsh)))
    assert found.p == pytest.approx(wilcoxon(differences, method="exact").pvalue)
    assert (found.looks, found.level, found.quads, found.dropped_quads) == (1, 0.05, 8, 0)


def test_same_against_same_is_rarely_rejected() -> None:
    """Of 300 sustained comparisons of an arm with itself on a drifting clock no more exclude 1 than alpha allows."""
    found = [compared(Clock(i, 0.02, 1e-5), seed=i, block_s=0.004) for i in range(300)]
    assert sum(not c.low <= 1 <= c.high for c in found) <= binom.ppf(0.999, 300, 0.05)
    assert all((c.p > 0.05) == (c.low <= 1 <= c.high) for c in found)


@pytest.mark.parametrize(("ratio", "verdict"), [(1.05, "slower"), (0.95, "faster")])
def test_six_quads_can_conclude(ratio: float, verdict: str) -> None:
    """With six quads, the fewest that are allowed, a clear difference is called, on the right side."""
    assert compared(Clock(), ratio, quads=6).verdict == verdict


def test_a_noise_floor_bounds_sustained_verdicts_too() -> None:
    """An effect within the floor is inconclusive."""
    found = compared(Clock(), 1.05, noise_floor=0.1)
    assert found.verdict == "inconclusive" and "within the noise floor of 10.0 %" in found.reason


def test_rows_fit_their_tables() -> None:
    """Rows of both tables carry the regime `sustained` without being told."""
    found = compared(Clock(), quads=6)
    samples = conform("samples", pd.DataFrame(found.sample_rows("step"))).to_pandas()
    ablation = conform("ablation", pd.DataFrame([found.row("step")])).to_pandas()
    assert set(samples["regime"]) == set(ablation["regime"]) == {"sustained"}
    assert len(samples) == len(found.samples)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quads": 5}, "quads must be an integer of at least 6, found 5"),
        ({"quads": 8, "alpha": 0.001}, "quads must be an integer of at least 11"),
        ({"quads": 8.0}, "quads"),
        ({"block_s": 0.0}, "block_s must be positive"),
        ({"block_s": math.inf}, "block_s"),
        ({"block_s": "10"}, "block_s"),
        ({"alpha": 0.0}, "alpha"),
        ({"delta": 1.0}, "delta"),
        ({"seed": 0.5}, "seed"),
        ({"noise_floor": -1.0}, "noise_floor"),
        ({"names": ("a", "a")}, "both called 'a'"),
        ({"names": ("a",)}, "names must be two"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_called(options: dict[str, Any], words: str) -> None:
    """Arguments out of range give a MeasurementError of one line, and neither arm is called."""
    clock = Clock()
    with pytest.raises(MeasurementError, match=words) as caught:
        compared(clock, **options)
    assert clock.calls == [] and "\n" not in str(caught.value)


@pytest.mark.parametrize("time_s", [0.0, math.nan, None])
def test_what_is_no_time_is_refused(time_s: Any) -> None:
    """A call that returns no time names its arm, where counting its seconds would never end."""
    with pytest.raises(MeasurementError, match="broken returned"):
        sustained(Clock().arm("a"), lambda: time_s, seed=0, names=("a", "broken"))


def test_an_interruption_passes_through() -> None:
    """Ctrl-C in a block ends the comparison."""

    def stop() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sustained(Clock().arm("a"), stop, seed=0, block_s=0.01)


def test_steady_blocks_are_taken_on_end_and_all_kept() -> None:
    """One warm-up, then blocks that last by their calls' own account, a canary before the first and after each."""
    clock = Clock(seed=1)
    found = steady(clock.arm("step"), block_s=0.02, blocks=6, canary=clock.arm("canary"))
    kinds = [(s.arm, s.kind, s.quad) for s in found.samples]
    assert kinds[:2] == [("step", "warm-up", 0), ("canary", "canary", 0)] and kinds[-1] == ("canary", "canary", 6)
    assert [name for name, *_ in kinds] == clock.calls
    means = []
    for block in range(6):
        times = [s.time_s for s in found.samples if s.kind == "sample" and s.quad == block]
        assert sum(times) >= 0.02 > sum(times[:-1])
        means.append(sum(times) / len(times))
    walsh = sorted((a + b) / 2 for i, a in enumerate(means) for b in means[i:])
    assert found.time_s == pytest.approx(np.median(walsh)) and (found.low_s, found.high_s) == (walsh[0], walsh[-1])
    assert found.calls == sum(s.kind == "sample" for s in found.samples)
    canaries = [s.time_s for s in found.samples if s.kind == "canary"]
    assert found.canary_ratio == canaries[-1] / canaries[0]
    rows = pd.DataFrame(found.sample_rows("1024 x 1024 px", trial=3))
    conform("samples", rows)
    assert set(rows["regime"]) == {"sustained"} and set(rows["trial"]) == {3}


def test_steady_blocks_see_what_heat_does() -> None:
    """A device that slows while it is hot takes its hot time; two blocks are too few for an interval, and say so."""
    found = steady(Heating("step").arm("step"), block_s=1.0, blocks=6)
    assert found.time_s == pytest.approx(0.011, rel=0.02) and found.canary_ratio is None
    few = steady(Clock().arm("step"), block_s=0.01, blocks=2)
    assert math.isnan(few.low_s) and math.isnan(few.high_s)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"block_s": 0}, "block_s"), ({"blocks": 0}, "blocks must be an integer"), ({"alpha": 2}, "alpha"),
     ({"canary": 3}, "canary must be"), ({"name": "canary"}, "no arm can be called 'canary'")],
)  # fmt: skip
def test_steady_blocks_refuse_what_they_cannot_do(options: dict[str, Any], words: str) -> None:
    """Arguments out of range and times that are not positive are refused in one line."""
    with pytest.raises(MeasurementError, match=words):
        steady(Clock().arm("step"), **options)
    with pytest.raises(MeasurementError, match="step returned 0 seconds"):
        steady(lambda: 0, block_s=0.01)
