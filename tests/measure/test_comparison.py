"""Comparisons in quads on an injected clock: the order of calls, the looks, the verdicts, and what they record."""

import math
import random
import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

from tests.measure.clock import Clock
from zimage.analysis.tables import conform
from zimage.errors import MeasurementError
from zimage.measure.comparison import Comparison, compare, compare_many
from zimage.measure.quads import schedule

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, wilcoxon

ABBA, BAAB = (False, True, True, False), (True, False, False, True)


def compared(clock: Clock, ratio: float = 1.0, seed: int = 0, **options: Any) -> Comparison:
    """An arm that takes `ratio` times as long, compared with its baseline on that clock."""
    return compare(clock.arm("baseline"), clock.arm("arm", ratio), seed=seed, **options)


def test_a_quad_has_an_untimed_call_at_its_start_and_after_each_switch() -> None:
    """A quad is A B B A or B A A B; every run of calls of one arm begins with one that is not timed."""
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        calls = list(schedule(rng))
        order = tuple(arm for arm, timed in calls if timed)
        assert order in (ABBA, BAAB)
        seen.add(order)
        first, other = order[0], not order[0]
        assert calls == [
            (first, False), (first, True), (other, False), (other, True), (other, True), (first, False), (first, True)
        ]  # fmt: skip
    assert len(seen) == 2


def test_compare_calls_by_the_schedule_and_keeps_what_was_timed() -> None:
    """The calls that are made are those of `schedule` from the seed, and the samples are the timed ones in order."""
    clock = Clock()
    comparison = compared(clock, seed=5, max_quads=10)
    rng = random.Random(5)
    planned = [call for _ in range(10) for call in schedule(rng)]
    names = {False: "baseline", True: "arm"}
    assert clock.calls == [names[arm] for arm, _ in planned]
    assert [s.arm for s in comparison.samples] == [names[arm] for arm, is_timed in planned if is_timed]
    assert [(s.quad, s.position) for s in comparison.samples] == [(q, p) for q in range(10) for p in range(4)]


def test_the_order_is_random_and_follows_the_seed() -> None:
    """Over 400 quads both orders are about equally frequent and independent of the one before; a seed repeats them."""

    def orders(seed: int) -> list[bool]:
        rng = random.Random(seed)
        return [next(schedule_of)[0] for schedule_of in (iter(list(schedule(rng))) for _ in range(400))]

    drawn = orders(1)
    assert 160 < sum(drawn) < 240
    assert 160 < sum(a != b for a, b in zip(drawn, drawn[1:], strict=False)) < 240
    assert orders(1) == drawn != orders(2)


def test_the_numbers_are_those_of_the_samples() -> None:
    """Ratio and p follow from the kept samples alone: Hodges-Lehmann and the exact test, p times the two looks."""
    comparison = compared(Clock(seed=2, noise=0.02), 1.004, max_quads=20, delta=0.0001)
    assert comparison.quads == 20 and comparison.looks == 2
    frame = pd.DataFrame([vars(s) for s in comparison.samples]).assign(log=lambda f: np.log(f["time_s"]))
    means = frame.pivot_table(index="quad", columns="arm", values="log")
    d = (means["arm"] - means["baseline"]).to_numpy()
    walsh = [(a + b) / 2 for i, a in enumerate(d) for b in d[i:]]
    assert comparison.ratio == pytest.approx(math.exp(np.median(walsh)))
    assert comparison.p == pytest.approx(min(1, 2 * wilcoxon(d, method="exact").pvalue))
    assert comparison.level == 0.05 / 2


def test_same_against_same_is_rarely_rejected() -> None:
    """Of 400 comparisons of an arm with itself on a noisy, drifting clock no more exclude 1 than alpha allows."""
    found = [compared(Clock(i, 0.01, 1e-4), seed=i) for i in range(400)]
    rejected = sum(not c.low <= 1 <= c.high for c in found)
    assert rejected <= binom.ppf(0.999, 400, 0.05)
    assert all((c.p > 0.05) == (c.low <= 1 <= c.high) for c in found)
    assert {c.verdict for c in found} <= {"equivalent", "inconclusive", "faster", "slower"}


@pytest.mark.parametrize(("ratio", "verdict"), [(1.03, "slower"), (0.97, "faster")])
def test_a_planted_difference_is_found_with_its_sign(ratio: float, verdict: str) -> None:
    """3 % on a clock of 1 % noise are found at the first look, on the right side, and the interval holds the truth."""
    found = [compared(Clock(i), ratio, seed=i) for i in range(40)]
    assert {c.verdict for c in found} == {verdict}
    assert {c.quads for c in found} == {10}
    assert sum(c.low <= ratio <= c.high for c in found) >= 38


def test_drift_cancels_in_quads_and_not_in_sequence() -> None:
    """Under a linear drift all of the baseline before all of the arm looks slower, and quads don't."""
    clock = Clock(noise=0.001, drift_per_call=2e-4)
    baseline, arm = clock.arm("baseline"), clock.arm("arm")
    first, second = ([math.log(call()) for _ in range(80)] for call in (baseline, arm))
    in_sequence = np.array(second).reshape(40, 2).mean(axis=1) - np.array(first).reshape(40, 2).mean(axis=1)
    assert wilcoxon(in_sequence, method="exact").pvalue < 1e-6
    quads = [compared(Clock(i, 0.001, 2e-4), seed=i) for i in range(40)]
    assert {c.verdict for c in quads} == {"equivalent"}
    assert sum(not c.low <= 1 <= c.high for c in quads) <= binom.ppf(0.999, 40, 0.05)


def test_looks_come_at_ten_twenty_thirty_and_forty_quads() -> None:
    """A comparison ends at a look and nowhere else: at the first with an answer, or at the last."""
    found = [compared(Clock(i, 0.02), 1.01, seed=i) for i in range(60)]
    assert set(Counter(c.quads for c in found)) <= {10, 20, 30, 40}
    assert len({c.quads for c in found}) >= 3
    assert all(c.looks == c.quads // 10 for c in found)
    unsettled = [c for c in found if c.quads < 40]
    assert all(not c.low <= 1 <= c.high or math.log(c.high / c.low) < c.delta for c in unsettled)


def test_a_narrow_interval_ends_a_comparison() -> None:
    """With almost no noise an arm like its baseline is equivalent at the first look."""
    comparison = compared(Clock(noise=1e-4))
    assert (comparison.verdict, comparison.quads, comparison.looks) == ("equivalent", 10, 1)


def test_equivalent_even_where_one_is_excluded() -> None:
    """A difference that is certain but well inside the band is called equivalent, and its text says how large it is."""
    comparison = compared(Clock(noise=1e-4), 1.004)
    assert comparison.verdict == "equivalent"
    assert comparison.low > 1
    assert "equivalent, 0.4 % more time than baseline" in str(comparison)


def test_many_times_are_told_as_times() -> None:
    """What takes several times as long is told so, with the interval in times, not as hundreds of per cent."""
    text = str(compared(Clock(noise=1e-3), 24.0))
    assert re.search(r"slower, 2[34]\.\d\d times as long as baseline, 95 % CI 2[34]\.\d\d-24\.\d\d", text)


def test_the_noise_floor_bounds_what_is_called_faster() -> None:
    """An effect smaller than the noise floor is inconclusive and says so, a larger one is slower."""
    within, beyond = (compared(Clock(), 1.03, noise_floor=floor) for floor in (0.05, 0.005))
    assert (within.verdict, beyond.verdict) == ("inconclusive", "slower")
    assert "within the noise floor of 5.0 %" in within.reason
    assert "noise floor 0.5 %" in str(beyond)


def test_a_budget_ends_a_comparison_and_says_so() -> None:
    """When the time is spent the comparison stops after at least four quads, and an open verdict names the budget."""
    comparison = compared(Clock(), budget_s=1e-9)
    assert (comparison.quads, comparison.looks, comparison.verdict) == (4, 1, "inconclusive")
    assert comparison.reason.startswith("too few quads")
    assert comparison.reason.endswith("at this level, it takes 8; the budget of 1e-09 s was spent")
    assert compared(Clock(), budget_s=1e9).quads >= 10


def test_max_quads_bounds_a_comparison() -> None:
    """With fewer quads at most, the last of them is the last look."""
    comparison = compared(Clock(noise=0.05), max_quads=13)
    assert (comparison.quads, comparison.looks) == (13, 2)


@pytest.mark.parametrize(
    ("max_quads", "looks"),
    [(1, 1), (7, 1), (10, 1), (11, 2), (12, 2), (20, 2), (21, 3), (30, 3), (31, 4), (40, 4)],
)
def test_the_level_is_split_over_the_looks_that_are_planned(max_quads: int, looks: int) -> None:
    """Each look has an equal part of alpha: those after ten, twenty and thirty quads that come before the last one."""
    comparison = compared(Clock(noise=0.05), max_quads=max_quads)
    assert (comparison.quads, comparison.looks, comparison.level) == (max_quads, looks, 0.05 / looks)
    few = compared(Clock(), 1.1, max_quads=max_quads, budget_s=1e-9)
    assert few.level == 0.05 / looks and few.quads == min(4, max_quads)


@pytest.mark.parametrize("of", [1, 3])
def test_test_and_interval_agree_whatever_is_planned(of: int) -> None:
    """However many looks and arms share alpha, the interval holds 1 exactly when p exceeds alpha."""
    found = [
        compared(Clock(100 * max_quads + i), 1.01, of=of, max_quads=max_quads)
        for max_quads in range(1, 41)
        for i in range(5)
    ]
    excluding = [c for c in found if not c.low <= 1 <= c.high]
    assert all((c.p > 0.05) == (c.low <= 1 <= c.high) for c in found)
    assert 20 < len(excluding) < len(found) - 20


def test_a_single_look_has_the_whole_level() -> None:
    """Seven quads show what takes four times as long, which they could not at a quarter of alpha."""
    comparison = compared(Clock(), 4.0, max_quads=7)
    assert (comparison.verdict, comparison.quads, comparison.looks) == ("slower", 7, 1)
    assert comparison.p == 2 / 2**7 and comparison.low > 3


@pytest.mark.parametrize(
    ("arms", "max_quads", "alpha", "needed"),
    [(1, 5, 0.05, 6), (2, 6, 0.05, 7), (3, 6, 0.05, 7), (6, 7, 0.05, 8), (25, 9, 0.05, 10), (26, 10, 0.05, 12),
     (1, 10, 1e-4, 16), (100, 1, 0.05, 13)],
)  # fmt: skip
def test_too_few_quads_are_known_before_anything_is_measured(
    arms: int, max_quads: int, alpha: float, needed: int
) -> None:
    """Where no interval is possible, how many quads it takes is said first and in the reason, neither more nor less."""
    clock, said = Clock(), f"max_quads={max_quads} is too few for any interval at alpha {alpha:g} with {arms} arm"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=f"^{said}s?, whatever is measured: it takes {needed} quads$"):
            compared(clock, of=arms, max_quads=max_quads, alpha=alpha)
        with pytest.raises(RuntimeWarning, match=f"it takes {needed} quads$"):
            compared(clock, of=arms, max_quads=needed - 1, alpha=alpha)
        assert clock.calls == []
        enough = compared(Clock(noise=1e-4), 2.0, of=arms, max_quads=needed, alpha=alpha)
        assert (enough.verdict, enough.quads) == ("slower", needed)
    with pytest.warns(RuntimeWarning, match=said):
        comparison = compared(clock, 2.0, of=arms, max_quads=max_quads, alpha=alpha)
    assert comparison.reason == f"too few quads for any interval at this level, it takes {needed}"
    assert (comparison.verdict, comparison.low, comparison.high) == ("inconclusive", 0, math.inf)


def test_an_alpha_beyond_forty_quads_is_said() -> None:
    """A level that no comparison reaches has no number of quads to give."""
    with pytest.warns(RuntimeWarning, match="it takes more than 40 quads$"):
        comparison = compared(Clock(), 2.0, alpha=1e-12)
    assert comparison.reason.endswith("at this level, it takes more than 40")


def test_several_arms_share_the_level_and_the_time() -> None:
    """Three arms have a third of the level each, are interleaved, and stop one by one as they have their answers."""
    clock = Clock()
    ratios = {"much": 1.1, "little": 1.012, "none": 1.0}
    found = compare_many(clock.arm("baseline"), {n: clock.arm(n, r) for n, r in ratios.items()}, seed=3)
    assert list(found) == list(ratios)
    assert {c.level for c in found.values()} == {0.05 / 12}
    assert all((c.p > 0.05) == (c.low <= 1 <= c.high) for c in found.values())
    assert (found["much"].quads, found["much"].verdict) == (10, "slower")
    assert found["none"].quads > 10
    first_quads = clock.calls[: 3 * 7 * 5]
    assert all(set(first_quads[i : i + 7]) - {"baseline"} for i in range(0, len(first_quads), 7))
    orders = {tuple(dict.fromkeys(c for c in first_quads[i : i + 21] if c != "baseline")) for i in range(0, 105, 21)}
    assert all(set(order) == set(ratios) for order in orders)
    assert len(orders) > 1
    last = len(clock.calls) - clock.calls[::-1].index("much")
    assert set(clock.calls[last:]) <= {"baseline", "little", "none"}


@pytest.mark.parametrize("arms", [1, 6])
def test_up_to_six_arms_can_conclude_at_ten_quads(arms: int) -> None:
    """With one to six arms a clear difference is called at the first look."""
    clock = Clock()
    found = compare_many(clock.arm("baseline"), {f"arm {i}": clock.arm(f"arm {i}", 1.1) for i in range(arms)}, seed=0)
    assert {(c.verdict, c.quads) for c in found.values()} == {("slower", 10)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, "alpha must lie between 0 and 1, found 0.0"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"delta": -0.01}, "delta"),
        ({"max_quads": 0}, "max_quads must be an integer between 1 and 40, found 0"),
        ({"max_quads": 41}, "max_quads"),
        ({"max_quads": 10.0}, "max_quads"),
        ({"budget_s": 0.0}, "budget_s must be positive"),
        ({"budget_s": math.nan}, "budget_s"),
        ({"noise_floor": -0.1}, "noise_floor"),
        ({"noise_floor": math.nan}, "noise_floor"),
        ({"seed": None}, "seed must be an integer, found None"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"alpha": "0.05"}, "alpha must lie between 0 and 1, found '0.05'"),
        ({"delta": None}, "delta"),
        ({"budget_s": math.inf}, "budget_s"),
        ({"budget_s": "60"}, "budget_s"),
        ({"noise_floor": "0.01"}, "noise_floor must be"),
        ({"canary": 0.02}, "canary must be a callable"),
        ({"names": ("same", "same")}, "both called 'same'"),
        ({"names": ("alone",)}, "names must be two"),
        ({"names": "ab"}, "names must be two"),
        ({"names": ("a", "")}, "name must be a text"),
        ({"names": ("a", 3)}, "name must be a text"),
        ({"names": ("a", "canary")}, "no arm can be called 'canary'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_called(options: dict[str, Any], words: str) -> None:
    """Arguments out of range give a MeasurementError of one line, and neither arm is called."""
    clock = Clock()
    with pytest.raises(MeasurementError, match=words) as caught:
        compare(clock.arm("a"), clock.arm("b"), **{"seed": 0, **options})
    assert clock.calls == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arms", [{}, None, ["arm"]])
def test_no_arms_are_refused(arms: Any) -> None:
    """A comparison with nothing to compare is a MeasurementError."""
    with pytest.raises(MeasurementError, match="at least one arm"):
        compare_many(Clock().arm("a"), arms, seed=0)


def test_what_cannot_be_called_is_refused_by_its_name() -> None:
    """An arm that is no function is named in a MeasurementError, also one that is called as the argument is."""
    clock = Clock()
    with pytest.raises(MeasurementError, match="baseline must be a callable"):
        compare_many(clock.arm("plain"), {"x": clock.arm("x"), "baseline": 3.0}, seed=0, baseline_name="plain")  # type: ignore[dict-item]
    assert clock.calls == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("broken arm"), MemoryError])
def test_what_an_arm_raises_passes_through(error: Any) -> None:
    """Neither an interruption nor an arm's own error is swallowed."""
    clock = Clock()

    def call() -> float:
        if len(clock.calls) > 20:
            raise error
        return clock.arm("arm")()

    with pytest.raises(error if isinstance(error, type) else type(error)):
        compare(clock.arm("baseline"), call, seed=0, canary=clock.arm("canary"))


@pytest.mark.parametrize("time_s", [0.0, -1e-3, math.nan, math.inf, 10**400, None, True, "1"])
def test_what_is_no_time_is_refused(time_s: Any) -> None:
    """A timed call that returns anything but a positive, finite number names its arm in a MeasurementError."""
    with pytest.raises(MeasurementError, match=r"broken returned .* must be positive"):
        compare(Clock().arm("a"), lambda: time_s, seed=0, names=("a", "broken"))


def test_an_untimed_call_may_return_anything() -> None:
    """What an untimed call returns is never looked at."""
    clock, untimed = Clock(), []
    rng = random.Random(0)
    planned = [is_timed for _ in range(4) for _, is_timed in schedule(rng)]

    def call() -> float:
        time_s = clock.arm("x")()
        untimed.append(not planned[len(untimed)])
        return -1.0 if untimed[-1] else time_s

    assert compare(call, call, seed=0, max_quads=4).quads == 4
    assert sum(untimed) == 12


def test_rows_fit_their_tables() -> None:
    """A comparison's row and its samples' rows are rows of the tables `ablation` and `samples`, undecided ones too."""
    clock = Clock()
    found = compare_many(
        clock.arm("plain"), {"x": clock.arm("x", 1.1), "y": clock.arm("y")}, seed=0, max_quads=5, baseline_name="plain"
    )
    ablation = conform("ablation", pd.DataFrame([c.row("step") for c in found.values()])).to_pandas()
    assert list(ablation["arm"]) == ["x", "y"]
    assert set(ablation["baseline"]) == {"plain"}
    assert list(ablation["ratio"]) == [c.ratio for c in found.values()]
    assert set(ablation["quads"]) == {5} and set(ablation["scope"]) == {"step"} and set(ablation["regime"]) == {"burst"}
    rows = [
        row for trial, c in enumerate(found.values()) for row in c.sample_rows("step", regime="sustained", trial=trial)
    ]
    samples = conform("samples", pd.DataFrame(rows)).to_pandas()
    assert len(samples) == 2 * 5 * 4
    assert set(samples["regime"]) == {"sustained"} and set(samples["kind"]) == {"sample"}
    assert not samples.duplicated(["trial", "quad", "position"]).any()
    assert set(samples.loc[samples["trial"] == 0, "arm"]) == {"x", "plain"}


def test_the_text_of_an_undecided_comparison() -> None:
    """Where the interval holds 1 the text gives ratios, and the reason where nothing was decided."""
    comparison = compared(Clock(noise=0.05), max_quads=10, alpha=0.1)
    assert comparison.verdict == "inconclusive"
    c = comparison
    assert str(c) == (
        f"arm: inconclusive, time ratio {c.ratio:.3f} to baseline, 90 % CI {c.low:.3f}-{c.high:.3f}, 10 quads "
        f"({c.reason})"
    )


@pytest.mark.parametrize(("ratio", "words"), [(0.95, "faster, 5.0 % less"), (1.05, "slower, 5.0 % more")])
def test_the_text_of_a_difference(ratio: float, words: str) -> None:
    """Where the interval excludes 1 the text gives percentages, the smaller end of the interval first."""
    comparison = compared(Clock(noise=1e-4), ratio)
    low, high = sorted(100 * abs(1 - end) for end in (comparison.low, comparison.high))
    assert str(comparison) == f"arm: {words} time than baseline, 95 % CI {low:.1f}-{high:.1f}, 10 quads"


def test_the_text_names_what_was_dropped_and_what_it_changed() -> None:
    """Dropped quads are counted in the line by the arm before them, and another verdict without drops is given."""
    plain = compared(Clock(noise=1e-4), 0.95, noise_floor=0.004)
    dropped = replace(plain, dropped={"arm": 2, "baseline": 1}, verdict_without_drops="inconclusive")
    text = "10 quads, 3 dropped (2 after arm, 1 after baseline), noise floor 0.4 %; inconclusive if none were dropped"
    assert str(dropped).endswith(f", {text}")
    assert str(plain).endswith(", 10 quads, noise floor 0.4 %")


def test_arms_compared_one_after_the_other_share_the_level() -> None:
    """An arm that is one of five has the level, interval and p of five arms compared at once."""
    one = compared(Clock(seed=4), 1.02, of=5, max_quads=20)
    arms = {f"arm {i}": Clock(seed=4).arm("arm") for i in range(5)}
    many = compare_many(Clock().arm("baseline"), arms, seed=0, max_quads=20)
    assert one.level == many["arm 0"].level == 0.05 / 10
    alone = compared(Clock(seed=4), 1.02, max_quads=20)
    assert one.p == pytest.approx(min(1, 5 * alone.p)) and one.high - one.low > alone.high - alone.low
    with pytest.raises(MeasurementError, match="of must be an integer of at least 1, found 0"):
        compared(Clock(), of=0)
