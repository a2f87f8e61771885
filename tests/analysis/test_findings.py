"""Findings say what the tables say and no more."""

from tests.lab import fabricated
from zimage.analysis import cost_texts
from zimage.analysis.findings import Brief, baseline_arm, families, findings, time_phrase

import pandas as pd
import pytest


def stored(**tables: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The frames as they come back from a store, every column there and null where it was not given."""
    return {name: fabricated.arrow(name, frame).to_pandas() for name, frame in tables.items()}


def one(*row: object, **columns: object) -> dict[str, pd.DataFrame]:
    return stored(ablation=fabricated.ablation(row).assign(**columns))  # type: ignore[arg-type]


def test_where_the_time_goes() -> None:
    """The largest part and the stage that stands out are named with their shares of the whole step."""
    (found,) = findings(stored(stages=fabricated.stages()))
    assert found.text == "the 3 main layers take 71 % of a step and layers.1 alone takes 32 %"
    assert found.evidence == ("a step takes 10.8 ms",)


def test_a_stage_without_a_name() -> None:
    """A row whose stage is missing counts among the others and ends nothing."""
    table = fabricated.stages()
    table.loc[0, "stage"] = None
    (found,) = findings(stored(stages=table))
    assert found.text == "the 3 main layers take 71 % of a step and layers.1 alone takes 32 %"


def test_no_stage_stands_out_within_the_intervals() -> None:
    """A stage whose interval touches another's is not called the largest."""
    table = fabricated.stages()
    table.loc[table["stage"] == "layers.1", ["time_low_s", "time_high_s"]] = [0.001, 0.006]
    (found,) = findings(stored(stages=table))
    assert "layers.1" not in found.text
    assert "main layers" in found.text


def test_no_stage_stands_out_without_intervals() -> None:
    """Without intervals nobody can tell which stage is the largest, and it is not said."""
    (found,) = findings(stored(stages=fabricated.stages().drop(columns=["time_low_s", "time_high_s"])))
    assert "alone" not in found.text


def test_no_share_without_a_whole_step() -> None:
    """Without the whole step's time there is no share to speak of."""
    table = fabricated.stages()
    assert findings(stored(stages=table[table["view"] != "whole"])) == []


@pytest.mark.parametrize(
    ("ratio", "verdict", "text"),
    [
        (0.95, "faster", "a takes 5.0 % less time than b per step"),
        (1.121, "slower", "a takes 12.1 % more time than b per step"),
        (0.998, "equivalent", "a is equivalent in time to b per step"),
        (0.93, "inconclusive", "whether a is faster than b per step is undecided"),
    ],
)
def test_verdicts(ratio: float, verdict: str, text: str) -> None:
    """Each verdict has its own words, and the ratio with its interval stands beside it."""
    (found,) = findings(one("a", "b", "step", ratio, ratio - 0.01, ratio + 0.01, verdict))
    assert (found.text, found.verdict) == (text, verdict)
    assert found.evidence[0] == f"ratio {ratio:.3f}, 95 % interval {ratio - 0.01:.3f} to {ratio + 0.01:.3f}"


@pytest.mark.parametrize("verdict", ["inconclusive", "better", None])
def test_an_undecided_verdict_is_no_claim(verdict: str | None) -> None:
    """Inconclusive, unknown and missing verdicts never read as less or more time, in the long form or the short."""
    (found,) = findings(one("a", "b", "step", 0.5, 0.2, 1.4, verdict))
    for text in (found.text, found.short, *found.evidence):
        assert "less time" not in text
        assert "more time" not in text
    assert "undecided" in found.text
    assert found.verdict == "inconclusive"


def test_an_undecided_interval_without_one_says_why() -> None:
    """Where the interval excludes 1 the short form, too, says why nothing is decided; where it holds 1 it need not."""
    why = "the difference is within the noise floor of 4.6 %"
    for high, told in ((0.98, f": {why}"), (1.02, "")):
        (found,) = findings(one("a", "b", "step", 0.96, 0.933, high, "inconclusive", reason=why))
        numbers = f"ratio 0.960, 95 % interval 0.933 to {high:.3f}"
        assert found.evidence == (numbers, why)
        assert found.short == f"whether a is faster than b per step is undecided ({numbers}{told})"


def test_a_missing_ratio_is_not_measured() -> None:
    """A verdict without a ratio behind it claims nothing."""
    (found,) = findings(one("a", "b", "step", None, None, None, "faster"))
    assert found.text == "the time of a against b per step was not measured"
    assert found.verdict == "inconclusive"


def test_an_untested_interval_has_no_level() -> None:
    """Without a p-value the interval is not called a 95 % one."""
    (found,) = findings(one("a", "b", "step", 0.9, 0.8, 0.95, "faster", p_value=None))
    assert found.evidence == ("ratio 0.900, interval 0.800 to 0.950",)


def test_only_the_widest_scope_is_in_the_short_form() -> None:
    """A gain in a part of the step is a finding, but the sentence for the terminal speaks of the step."""
    found = findings(stored(ablation=fabricated.qkv()))
    assert [line.verdict for line in found] == ["faster", "inconclusive", "equivalent"]
    shorts = [line.short for line in found if line.short]
    assert shorts == [
        "fused_qkv is equivalent in time to separate_qkv per step (ratio 0.998, 95 % interval 0.994 to 1.003)"
    ]


def test_memory_and_quality_join_the_verdict() -> None:
    """One line an arm holds its time, size, error and accuracy, the last three beside the baseline's where it tells."""
    found = {line.text.split()[0]: line for line in findings(stored(**fabricated.quantization()))}
    assert list(found) == ["8bit", "4bit"]
    assert found["4bit"].evidence[1:] == (
        "weights 84 % smaller (2.11 MB against 12.8 MB)",
        "peak memory 50 % smaller (10.4 MB against 21.0 MB)",
        "relative L2 error 0.0813",
        "digit accuracy 96.0 % against 98.4 %",
    )
    assert found["8bit"].evidence[-1] == "digit accuracy 98.2 % against 98.4 % (intervals overlap)"


def test_quality_stands_beside_the_arms_own_baseline_only() -> None:
    """With several baselines an arm's error is never held against an arm that it was not compared with."""
    rows = [
        ("no_mask", "all_ones_mask", "step", 0.5, 0.4, 0.6, "faster"),
        ("4bit", "matmul", "matmul", 3, 2, 4, "slower"),
    ]
    errors = [
        {"arm": arm, "metric": "relative_l2_error", "value": v} for arm, v in (("all_ones_mask", 0.01), ("4bit", 0.09))
    ]
    found = findings(stored(ablation=fabricated.ablation(*rows), quality=pd.DataFrame(errors)))
    texts = [" ".join((one.text, *one.evidence)) for one in found]
    assert not any("against" in text for text in texts)
    assert [one.short for one in found] == [
        "no_mask takes 50.0 % less time than all_ones_mask per step (40.0 to 60.0 %)",
        "4bit takes 3.00 times as long as matmul (matmul) (2.00 to 4.00 times), relative L2 error 0.0900",
        "all_ones_mask: relative L2 error 0.0100",
    ]


def test_quality_alone() -> None:
    """A table of quality without times is still a finding, with no verdict."""
    tables = stored(quality=fabricated.quantization()["quality"])
    found = findings(tables)
    assert [line.text for line in found] == ["8bit: relative L2 error 0.00540", "4bit: relative L2 error 0.0813"]
    assert {line.verdict for line in found} == {""}


def test_loading_beside_a_plain_read() -> None:
    """A loader's median time stands beside a plain read's; its peak beside its result, or the files' where it packs."""
    found = findings(stored(loading=fabricated.loading()))
    assert [line.text for line in found] == [
        "zimage loads in 1.10 times a plain read's time, with a peak memory of 1.05 times the result",
        "zimage 4bit loads in 1.55 times a plain read's time, with a peak memory of 0.325 times the files",
    ]
    assert found[0].evidence == ("2.20 s (of 3: 2.09 s to 2.42 s) against 2 s", "peak 8.40 GB, result 8.00 GB")
    assert found[1].evidence[1] == "peak 2.60 GB, files 8.00 GB"
    assert {line.verdict for line in found} == {""}


def test_loading_without_a_plain_read_or_memory() -> None:
    """Nothing is compared with what was not measured, and a null peak is not told."""
    table = fabricated.loading().query("arm != 'plain read'").assign(peak_bytes=None)
    found = findings(stored(loading=table))
    assert [line.text for line in found] == ["zimage loads in 2.20 s", "zimage 4bit loads in 3.10 s"]


def test_the_last_step_counts() -> None:
    """Of a quality measured at several steps the last one is reported, whatever the order of the rows."""
    rows = [{"arm": "4bit", "metric": "psnr_db", "step": s, "value": v} for s, v in ((19, 31.0), (0, 50.0))]
    (found,) = findings(stored(quality=pd.DataFrame(rows)))
    assert found.text == "4bit: PSNR (dB) 31.0"


def test_nothing_recorded() -> None:
    """No tables, or empty ones, give no finding and a sentence that says so."""
    empty = stored(**{name: pd.DataFrame() for name in ("stages", "ablation", "memory", "quality")})
    assert findings({}) == findings(empty) == []
    assert Brief("cpu", "", ()).sentence == "On cpu: nothing was recorded that a finding could rest on."


def test_the_sentence() -> None:
    """The sentence names device and kind of weights and ends in one full stop."""
    assert Brief("cpu", "synthetic", ["a", "b"]).sentence == "On cpu, with synthetic weights: a; b."
    more = Brief("cpu", "", ["a"], 3, "1 of 2 runs failed")
    assert more.sentence == "On cpu: a; 3 more on its page; 1 of 2 runs failed."


def test_the_list() -> None:
    """For a terminal a line says where, each finding is an item that fits the columns, and how many more comes last."""
    long = "a step takes 11.9 ms and 8bit takes 70.1 % more time than float32"
    brief = Brief("cpu", "trained", ["b", long], 3, "1 of 2 runs failed")
    start, end = "On cpu, with trained weights:", "3 more on its page."
    assert brief.lines(200) == [start, "- b", f"- {long}", "- 1 of 2 runs failed", end]
    wrapped = ["- a step takes 11.9 ms and 8bit takes", "  70.1 % more time than float32"]
    assert brief.lines(43) == [start, "- b", *wrapped, "- 1 of 2 runs failed", end]  # not between 70.1 and %
    assert Brief("cpu", "", ["a"]).lines(80) == ["On cpu:", "- a"]
    nothing = Brief("cpu", "", ())
    assert nothing.lines(20) == [nothing.sentence]


def test_baseline() -> None:
    """The ablation names the baseline; without it a well-known arm is taken, and no arm is guessed."""
    tables = fabricated.quantization()
    assert baseline_arm(stored(**tables)) == "float32"
    assert baseline_arm(stored(memory=tables["memory"])) == "float32"
    assert baseline_arm(stored(memory=tables["memory"].query("arm != 'float32'"))) is None


@pytest.mark.parametrize(
    ("ratio", "text", "beside"),
    [
        (0.95, "5.0 % less time", " than it"),
        (1.3, "30.0 % more time", " than it"),
        (1.0002, "the same time to 0.1 %", " than it"),
        (23.961, "24.0 times as long", " as it"),
    ],
)
def test_time_phrase(ratio: float, text: str, beside: str) -> None:
    """A ratio is told as a change of time, as none where it rounds to none, and as times where there are many."""
    assert time_phrase(ratio) == text
    assert time_phrase(ratio, "it") == text + beside


def test_of_many_arms_those_with_an_answer_come_first() -> None:
    """Where there are more arms than a page shows at once, what is known stands before what is not."""
    odd = [("undecided", 1.0, 0.9, 1.1, "inconclusive"), ("slow", 1.2, 1.1, 1.3, "slower")]
    rows = [(f"{name}_{n}", "plain", "step", *rest) for n in range(4) for name, *rest in odd]
    rows += [("fast_0", "plain", "step", 0.8, 0.7, 0.9, "faster")]
    few = [one.verdict for one in findings(stored(ablation=fabricated.ablation(*rows)))]
    rows += [("fast_1", "plain", "step", 0.8, 0.7, 0.9, "faster")]
    many = [one.text for one in findings(stored(ablation=fabricated.ablation(*rows)))]
    assert few[-1] == "faster"
    assert [text.split()[0] for text in many[:6]] == ["fast_0", "fast_1", *[f"slow_{n}" for n in range(4)]]


def test_the_slowest_operation_and_what_is_unattributed() -> None:
    """A profiled stage's finding names its slowest operation, the share bound by memory, and the signed rest."""
    (found,) = findings(stored(operations=fabricated.operations()))
    assert found.text == "sdpa takes the most of layers.0, 31 % of its time, at 51 % of the roof"
    assert found.evidence == ("21 % in operations bound by memory", "-2 % unattributed")


def test_only_the_costliest_block_is_spoken_of() -> None:
    """Of several blocks taken apart the one that takes the most time is in the findings."""
    small = fabricated.operations().assign(stage="context_refiner.0")
    small["time_s"] *= 0.1
    (found,) = findings(stored(operations=pd.concat([small, fabricated.operations()])))
    assert "of layers.0" in found.text


def test_ways_of_one_product_are_no_parts_of_a_whole() -> None:
    """Rows without an unattributed rest are alternatives, whose shares of their sum would say nothing."""
    rows = fabricated.operations()
    assert findings(stored(operations=rows[rows["operation"] != "unattributed"])) == []


def test_a_block_by_depth_stands_beside_the_stages() -> None:
    """The depth view's block is evidence of the profile's finding, with its interval, and no stage of it."""
    block = {"arm": "baseline", "view": "depth", "time_s": 2.5e-3, "time_low_s": 2.4e-3, "time_high_s": 2.6e-3}
    table = pd.concat([fabricated.stages(), pd.DataFrame([{**block, "stage": "one block"}])])
    (found,) = findings(stored(stages=table))
    assert found.text == "the 3 main layers take 71 % of a step and layers.1 alone takes 32 %"
    assert found.evidence[1] == "one main block takes 2.50 ms by the depth view (2.40 ms to 2.60 ms)"


def test_a_profile_of_few_rounds_is_an_estimate() -> None:
    """Without an interval of any stage or operation the sentence says so."""
    words, ends = "an estimate without an interval", ["time_low_s", "time_high_s"]
    for name, frame in (("stages", fabricated.stages()), ("operations", fabricated.operations())):
        (found,) = findings(stored(**{name: frame}))
        assert words not in found.text
        (found,) = findings(stored(**{name: frame.assign(**dict.fromkeys(ends))}))
        assert found.text.endswith(words)


def test_a_block_alone_that_noise_hid() -> None:
    """A block whose slope came out at 0 or below has no time to tell."""
    assert cost_texts.block_alone("layers.0", 2.5e-3, -1e-4) == "layers.0: 2.500 ms alone, -0.100 unattributed"
    for time_s in (-9.16e-3, 0.0, float("nan")):
        told = cost_texts.block_alone("layers.0", time_s, 1e-3)
        assert told.startswith("layers.0: the noise hid its time") and "9.16" not in told


def test_what_is_undecided_has_its_badge() -> None:
    """A sentence that decides nothing has the verdict of what is undecided; one that names what is open has none."""
    whole = {"quality": "w", "metric": "error_ratio", "baseline": "4bit", "value": 0.9, "low": 0.5, "high": 1.2}
    rows = pd.DataFrame([whole | {"arm": "mixed"}]).drop(columns="quality")
    (found, *_) = findings(stored(quality=rows))
    assert (found.text.partition(":")[0], found.verdict) == (
        "whether mixed errs less than 4bit everywhere is undecided", "inconclusive"
    )  # fmt: skip
    (found, *_) = findings(stored(quality=rows.assign(high=0.95)))
    assert found.verdict == ""
    (found, *_) = findings(stored(pareto=fabricated.pareto().assign(time_ratio_high=None, category="unknown")))
    assert "could not be decided" in found.text and found.verdict == "inconclusive"


def test_operations_without_peaks_are_not_placed() -> None:
    """Without measured peaks nothing is said of a roof."""
    (found,) = findings(stored(operations=fabricated.operations().drop(columns=["bound", "attained_fraction"])))
    assert "roof" not in found.text and "memory" not in "".join(found.evidence)


def test_the_prediction_is_judged_where_it_was_not_calibrated() -> None:
    """The error stated is of sizes held out, and a table without such sizes states none."""
    (found,) = findings(stored(scaling=fabricated.scaling()))
    assert found.text == "calibrated at 3 sizes, the cost model is 4.0 % off in the median of others"
    assert found.evidence == ("3 sizes held out, at most 10.0 % off",)
    assert findings(stored(scaling=fabricated.scaling().assign(use="calibration"))) == []


def test_energy_is_stated_where_it_is_known() -> None:
    """Joules a step are stated with power and throttling; an arm whose machine tells nothing is left out."""
    (found,) = findings(stored(power=fabricated.power()))
    assert found.text == "baseline: 80.0 J a step"
    assert found.evidence == ("615 W on average", "throttled by power cap")


def test_each_arm_is_held_against_its_own_baseline() -> None:
    """Where a run compares with several baselines, no arm's error or size is put beside a stranger's."""
    compared = fabricated.ablation(
        ("no_mask", "all_ones_mask", "step", 0.5, 0.49, 0.51, "faster"),
        ("packed", "plain", "matmul", 2.0, 1.9, 2.1, "slower"),
    )
    errors = {"all_ones_mask": 0.0162, "packed": 0.091, "fused_copied": 0.003}
    quality = pd.DataFrame([{"arm": a, "metric": "relative_l2_error", "value": v} for a, v in errors.items()])
    sizes = {"all_ones_mask": 100, "packed": 25, "plain": 50}
    memory = pd.DataFrame(
        [{"arm": a, "stage": "weights", "metric": "weight_bytes", "bytes": v} for a, v in sizes.items()]
    )
    said = [
        " ".join((f.text, *f.evidence)) for f in findings(stored(ablation=compared, quality=quality, memory=memory))
    ]
    assert not any("against 0.0162" in text for text in said)
    assert any("weights 50 % smaller (25 B against 50 B)" in text for text in said)
    assert any("fused_copied: relative L2 error 0.00300" in text for text in said)


STEP_ROWS: list[tuple[object, ...]] = [
    ("a", "plain", "step", 0.90, 0.89, 0.91, "faster"),
    ("b", "plain", "step", 0.95, 0.94, 0.96, "faster"),
    ("c", "plain", "step", 1.00, 0.998, 1.002, "equivalent"),
    ("together", "plain", "step", 0.80, 0.79, 0.81, "faster"),
    ("without_a", "together", "step", 1.03, 1.02, 1.04, "slower"),
    ("without_b", "together", "step", 1.12, 1.11, 1.13, "slower"),
    ("without_c", "together", "step", 0.98, 0.95, 1.01, "inconclusive"),
]


def test_a_finding_a_family() -> None:
    """The best alone, all together and the worthiest beside the others are named, and what is undecided is said."""
    table = stored(ablation=fabricated.ablation(*STEP_ROWS))  # type: ignore[arg-type]
    alone, together, beside = families(table["ablation"])
    assert alone.text == "of 3 transforms, a alone gains the most, 10.0 % less time"
    assert alone.evidence == ("faster a, b", "equivalent c")
    assert (together.text, together.verdict) == (
        "a model with all 3 takes 20.0 % less time than plain per step",
        "faster",
    )
    assert together.evidence[-1] == "their ratios alone multiply to 0.855"
    assert beside.text == "beside the others b is worth the most: without b a step takes 12.0 % more time"
    assert beside.evidence == ("slower without a, b", "inconclusive without c")
    every = findings(table)
    assert every[:3] == [alone, together, beside]
    assert len(every) == 3 + len(STEP_ROWS)
    assert [bool(one.short) for one in every] == [True] * 3 + [False] * len(STEP_ROWS)


def test_the_best_of_a_family_is_known_to_be_it() -> None:
    """One whose verdict is open isn't the best, however far its ratio; those with overlapping intervals share it."""
    rows = [
        ("a", "plain", "step", 0.70, 0.4, 1.3, "inconclusive"),
        ("b", "plain", "step", 0.90, 0.89, 0.92, "faster"),
        ("c", "plain", "step", 0.91, 0.90, 0.93, "faster"),
        ("together", "plain", "step", 0.80, 0.79, 0.81, "faster"),
        ("without_a", "together", "step", 1.3, 0.7, 1.9, "inconclusive"),
        ("without_b", "together", "step", 1.03, 1.02, 1.04, "slower"),
    ]
    alone, _, beside = families(stored(ablation=fabricated.ablation(*rows))["ablation"])
    assert alone.text == "of 2 transforms, b alone gains the most, 10.0 % less time"
    assert beside.text == "beside the others b is worth the most: without b a step takes 3.0 % more time"
    rows.append(("without_c", "together", "step", 1.0, 0.999, 1.001, "equivalent"))
    alone, *_ = families(stored(ablation=fabricated.ablation(*rows))["ablation"])
    assert alone.text == "of 3 transforms, b or c alone gains the most, 10.0 % less time"


def test_ways_are_one_finding() -> None:
    """How many products have a faster way than the plainest, and the largest gain; no way has a sentence of its own."""
    rows = [
        ("rows split", "whole", "w1, 1056 rows", 0.9, 0.89, 0.91, "faster"),
        ("padded", "whole", "w1, 1056 rows", 1.1, 1.09, 1.11, "slower"),
        ("packed", "unpacked", "w1, 4bit, 1 rows", 0.2, 0.19, 0.21, "faster"),
        ("rows split", "whole", "w2, 1056 rows", 1.2, 1.19, 1.21, "slower"),
        ("tuned", "plain", "step", 0.9, 0.89, 0.91, "faster"),
    ]
    first, *others = findings(stored(ablation=fabricated.ablation(*rows)))
    assert first.text == "of 3 products whose ways were compared 2 have one faster than the plainest"
    assert first.evidence == ("up to 80.0 % less time: packed instead of unpacked (w1, 4bit, 1 rows)",)
    assert len(others) == len(rows)
    assert [one.short.split(" ")[0] for one in others if one.short] == ["tuned"]
    (none, *_) = findings(stored(ablation=fabricated.ablation(rows[1])))
    assert none.text == "of 1 product whose ways were compared none has one known to be faster than the plainest"


def test_undecided_families_claim_nothing() -> None:
    """Where no interval excludes 1 nothing is called a gain, however far the ratios lie from it."""
    rows = [(*row[:6], "inconclusive") for row in STEP_ROWS]
    alone, together, beside = families(stored(ablation=fabricated.ablation(*rows))["ablation"])  # type: ignore[arg-type]
    assert alone.text == "no transform alone is known to take less time"
    assert together.text == "whether a model with all 3 is faster than plain per step is undecided"
    assert beside.text == "no transform is known to be worth anything beside the others"


def test_families_without_intervals_are_undecided() -> None:
    """Where no comparison has an interval, no transform is said to be known not to gain."""
    pairs = [
        ("a", "plain"),
        ("b", "plain"),
        ("together", "plain"),
        ("without_a", "together"),
        ("without_b", "together"),
    ]
    rows = [(*pair, "step", 0.9, 0.0, float("inf"), "inconclusive") for pair in pairs]
    alone, _, beside = families(stored(ablation=fabricated.ablation(*rows))["ablation"])
    assert alone.text == "what each transform gains alone could not be decided, as none has an interval"
    assert beside.text.endswith("beside the others could not be decided, as none has an interval")


def test_only_bursts_of_whole_families_are_one() -> None:
    """Sustained rows, missing ratios and other ablations make no family."""
    frame = stored(ablation=fabricated.ablation(*STEP_ROWS))["ablation"]  # type: ignore[arg-type]
    assert families(frame.assign(regime="sustained")) == families(frame.assign(ratio=float("nan"))) == []
    assert families(frame[frame["baseline"] == "plain"]) == families(frame[frame["arm"] != "together"]) == []
    assert families(None) == families(frame[:0]) == []


@pytest.mark.parametrize(
    ("regime", "words"),
    [("burst", "per step"), ("sustained", "per step, sustained"), ("fresh processes", "per step, in fresh processes")],
)
def test_how_it_was_measured_is_said(regime: str, words: str) -> None:
    """A finding of sustained blocks or of fresh processes says so, or it would stand there twice with two numbers."""
    (found,) = findings(one("a", "b", "step", 0.95, 0.94, 0.96, "faster", regime=regime))
    assert found.text == f"a takes 5.0 % less time than b {words}"


@pytest.mark.parametrize(
    ("plain", "packed", "told"),
    [
        (0.0, 0.0, None),
        (0.0, 0.2, "Fréchet distance 0.200 against 0 (intervals overlap)"),
        (0.2, 0.0, "Fréchet distance 0 against 0.200 (intervals overlap)"),
    ],
)
def test_two_distances_of_zero_say_nothing(plain: float, packed: float, told: str | None) -> None:
    """Fréchet distances are cut off at zero: where both are there, they are left out; one alone is told."""
    rows = [
        {"arm": arm, "metric": metric, "value": value, "low": low, "high": high}
        for arm, metric, value, low, high in (
            ("float32", "frechet_distance", plain, 0.0, 1.4),
            ("8bit", "frechet_distance", packed, 0.0, 1.6),
            ("float32", "relative_l2_error", 0.0, None, None),
            ("8bit", "relative_l2_error", 0.01, None, None),
        )
    ]
    ratios = fabricated.ablation(("8bit", "float32", "step", 1.2, None, None, "inconclusive"))
    (found, *_) = findings(stored(ablation=ratios, quality=pd.DataFrame(rows)))
    clauses = [one for one in found.evidence if "Fréchet" in one]
    assert clauses == ([] if told is None else [told]) and ("Fréchet" in found.short) == (told is not None)
    assert "relative L2 error 0.0100" in found.evidence  # against zero by construction, which is not said
    assert "(ratio 1.200, without an interval)" in found.short
