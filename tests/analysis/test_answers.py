"""What two experiments answer as a whole: only what intervals decide, from tables as they come back from a store."""

from tests.lab import fabricated
from zimage.analysis import reuse_plots
from zimage.analysis.answers import Beside, beside_fewer_steps, equivalent_steps, texts
from zimage.analysis.findings import findings
from zimage.lab import reuse_sections

import pandas as pd
import pytest


def stored(**tables: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {name: fabricated.arrow(name, frame).to_pandas() for name, frame in tables.items()}


def drifts(*rows: tuple[str, float, float | None, float | None, float]) -> pd.DataFrame:
    """A quality table of 8 steps: arm, error at the end with its interval, share of skipped blocks."""
    found = []
    for arm, value, low, high, skipped in rows:
        ends = {"low": low, "high": high, "step": 8}
        found.append({"arm": arm, "metric": "drift_relative_l2", "value": value, **ends})
        found.append({"arm": arm, "metric": "drift_relative_l2", "value": 0.0, "step": 1})
        found.append({"arm": arm, "metric": "skipped_blocks_fraction", "value": skipped})
    return pd.DataFrame(found).assign(weights_kind="trained")


REUSE = drifts(
    ("keep_captions", 0.0, 0.0, 0.0, 0.175),
    ("timestep", 0.067, 0.057, 0.078, 0.5),
    ("tea", 0.047, 0.036, 0.056, 0.225),
    ("every_2", 0.141, 0.132, 0.149, 0.3),
    ("steps_4", 0.117, 0.108, 0.126, 0.5),
    ("steps_5", 0.074, 0.068, 0.08, 0.375),
    ("steps_6", 0.043, 0.039, 0.046, 0.25),
)
TIMES = fabricated.ablation(
    ("keep_captions", "plain", "trajectory", 0.856, 0.79, 0.93, "faster"),
    ("timestep", "plain", "trajectory", 0.487, 0.43, 0.53, "faster"),
    ("tea", "plain", "trajectory", 0.821, 0.71, 1.06, "inconclusive"),
    ("every_2", "plain", "trajectory", 0.65, 0.6, 0.95, "faster"),
)


def test_each_way_is_held_against_as_few_blocks() -> None:
    """An arm's rival is the plain run of the most whole steps that need no more blocks; one that is exact has none."""
    assert beside_fewer_steps(stored(quality=REUSE)["quality"]) == {
        "timestep": Beside("less", 4, 0.067, 0.117),
        "tea": Beside("undecided", 6, 0.047, 0.043),
        "every_2": Beside("more", 5, 0.141, 0.074),
    }
    assert [equivalent_steps(8, share) for share in (0.0, 0.25, 0.26, 0.99)] == [8, 6, 5, 1]


def test_what_reusing_steps_answers() -> None:
    """The sentence names the fastest of the ways that err less, and the exact way stands beside it with its time."""
    ((text, evidence),) = texts(stored(quality=REUSE, ablation=TIMES))
    assert text == (
        "of 3 ways to reuse earlier steps 1 errs less than a plain run of no more blocks; timestep: 51.3 % less time, "
        "error at the end 6.7 %, that of 4 steps 11.7 %"
    )
    assert evidence == (
        *("less: timestep", "more: every_2", "undecided: tea"),
        "keep_captions changes nothing and takes 14.4 % less time",
    )


@pytest.mark.parametrize("ends", [None, float("nan")])
def test_without_intervals_nothing_is_known(ends: float | None) -> None:
    """Of one seed there are no intervals, also in a notebook's own frame, and no way is said to err less."""
    frame = REUSE.assign(low=ends, high=ends)
    ((text, evidence),) = texts({"quality": frame})
    assert text.endswith("none is known to err less than a plain run of no more blocks")
    assert evidence == ("undecided: timestep, tea, every_2",)


SINGLE = pd.DataFrame(
    [
        {"unit": unit, "kind": kind, "quantization": way, "velocity_error": error, "damage_per_byte": damage}
        for unit, kind, way, error, damage in (
            ("a", "layer", "4bit", 0.01, 1e-12),
            ("b", "layer", "4bit", 0.03, 9e-12),
            ("c", "layer", "4bit", 0.02, 3e-12),
            ("c", "layer", "3bit", 0.9, 1e-9),
            ("layers.0", "block", "4bit", 0.04, 1e-11),
        )
    ]
).assign(arm="4bit", weights_kind="trained")


def recipes(low: float | None, high: float | None) -> dict[str, pd.DataFrame]:
    quality = [
        {"arm": "mixed", "metric": "relative_l2_error", "value": 0.02},
        {"arm": "mixed", "metric": "error_ratio", "baseline": "4bit", "value": 0.471, "low": low, "high": high},
    ]
    memory = [{"arm": arm, "bytes": size} for arm, size in (("mixed", 999), ("4bit", 1000))]
    sums = [{"what": "random mixes", "metric": "velocity", "ratio": ratio} for ratio in (0.8, 1.0, 1.3)]
    return stored(
        quality=pd.DataFrame(quality).assign(weights_kind="trained"),
        memory=pd.DataFrame(memory).assign(stage="weights", metric="weight_bytes"),
        additivity=pd.DataFrame(sums).assign(arm="mix"),
        sensitivity=SINGLE,
    )


def test_what_sensitivity_answers() -> None:
    """The layer that packing harms most is named beside the median one, and the recipe beside packing all alike."""
    (damage, found), (recipe, sums) = texts(recipes(0.376, 0.508))
    assert damage == ("of 3 layers packed to 4bit alone, b does the most damage a byte, 3.00 times the median layer's")
    assert found == ("a does the least", "of blocks layers.0, an error of 4.0 %")
    assert recipe == "mixed errs less than 4bit everywhere: 0.471 of its error (0.376 to 0.508), 99.9 % of its bytes"
    assert sums == ("squared errors of 3 random mixes are 1.00 of their sum in the median (0.800 to 1.30)",)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.4, 1.1, "whether mixed errs less than 4bit everywhere is undecided"),
        (1.1, 1.3, "mixed errs more than 4bit"),
        (None, None, "whether mixed errs less than 4bit everywhere is undecided: 0.471 of its error, 99.9 %"),
    ],
)
def test_a_recipe_claims_only_what_its_interval_says(low: float | None, high: float | None, words: str) -> None:
    """An interval that holds 1, or none, is no claim."""
    assert texts(recipes(low, high))[1][0].startswith(words)


@pytest.mark.parametrize(
    ("error", "low", "high", "words"),
    [
        (0.0305, 0.0301, 0.031, "is missed: 3.05 %, 95 % interval 3.01 % to 3.10 %"),
        (0.0295, 0.029, 0.03, "is kept: 2.95 %, 95 % interval 2.90 % to 3.00 %"),
        (0.0305, 0.029, 0.032, "is undecided: 3.05 %, 95 % interval 2.90 % to 3.20 %"),
        (0.0305, None, None, "is missed: 3.05 %, by the estimate alone"),
        (0.0295, None, None, "is kept: 2.95 %, by the estimate alone"),
    ],
)
def test_a_budget_is_judged_on_what_was_held_out(
    error: float, low: float | None, high: float | None, words: str
) -> None:
    """By the interval where there is one, else by the estimate, and said which; a run without a budget tells none."""
    tables = recipes(0.4, 0.5)
    assert not any("budget" in text for text, _ in texts(tables))
    rows = [
        {"arm": "mixed", "metric": "relative_l2_error", "value": error, "low": low, "high": high},
        {"arm": "mixed", "metric": "error_budget", "value": 0.03},
    ]
    old = tables["quality"]
    tables["quality"] = pd.concat([old[old["metric"] == "error_ratio"], pd.DataFrame(rows)], ignore_index=True)
    text, _ = texts(tables)[-1]
    assert text == f"mixed: on held-out trajectories its error budget of 3.00 % {words}"
    assert any(one.text == one.short == text for one in findings(tables))


def test_an_answer_leads_and_takes_the_sentence() -> None:
    """On the page the answer comes first, and in the terminal's sentence it stands for every arm's own finding."""
    found = findings(stored(quality=REUSE, ablation=TIMES))
    assert found[0].short == found[0].text == texts(stored(quality=REUSE, ablation=TIMES))[0][0]
    assert len(found) > 4 and not any(one.short for one in found[1:])


def test_other_experiments_have_no_answer() -> None:
    """Tables of other experiments, and empty ones, are left to the findings."""
    assert texts(stored(**fabricated.quantization())) == [] == texts({})
    assert texts(stored(quality=REUSE.iloc[:0], sensitivity=SINGLE.iloc[:0])) == []


def test_time_stands_against_error() -> None:
    """The figure draws plain runs as a line from all steps on, the ways to reuse steps beside it, with intervals."""
    fewer = fabricated.ablation(
        ("steps_4", "plain", "trajectory", 0.49, 0.42, 0.56, "faster"),
        ("steps_6", "plain", "trajectory", 0.76, 0.73, 0.82, "faster"),
    )
    times = pd.concat([TIMES, fewer])
    tables = stored(ablation=times, quality=REUSE)
    runs, ways = reuse_plots.time_against_error(tables["ablation"], tables["quality"]).data
    assert list(runs.text) == ["all steps", "steps_6", "steps_4"] and runs.mode.startswith("lines")
    assert dict(zip(ways.text, ways.x, strict=True)) == {
        "keep_captions": 0.856, "tea": 0.821, "every_2": 0.65, "timestep": 0.487,
    }  # fmt: skip
    assert list(ways.y) == pytest.approx([0, 4.7, 14.1, 6.7])
    assert ways.error_x.array[-1] == pytest.approx(0.53 - 0.487) and ways.error_y.arrayminus[-1] == pytest.approx(1.0)
    nothing = stored(ablation=times.iloc[:0], quality=REUSE.iloc[:0])
    assert reuse_plots.time_against_error(nothing["ablation"], nothing["quality"]).layout.height > 0


def test_names_at_the_right_edge_have_room() -> None:
    """The rightmost point of the figure has its name beside it, which the plot's own area does not hold."""
    tables = stored(ablation=TIMES, quality=REUSE)
    figure = reuse_plots.time_against_error(tables["ablation"], tables["quality"])
    assert figure.layout.margin.r >= 90


def test_the_page_has_the_verdicts() -> None:
    """A run of step_caching has a section with the figure and a row for each way; other runs have none."""
    (section,) = reuse_sections.sections(stored(quality=REUSE, ablation=TIMES), "c0")
    assert "plain run that computes no more blocks, rounded down to whole steps" in section.note
    assert equivalent_steps(2, 0.3) == 1  # which the note gives as its example
    assert section.table is not None and len(section.charts) == 1
    rows = [[cell.text for cell in row] for row in section.table.rows]
    assert rows[0] == ["timestep", "6.7 %", "4 steps", "11.7 %", "errs less"]
    assert [row[-1] for row in rows] == ["errs less", "undecided", "errs more"]
    assert reuse_sections.sections(stored(**fabricated.quantization()), "c0") == []
