"""Claims judged on measured rows: what supports, refutes or leaves them open, and in which words."""

from typing import Any

from zimage.analysis.claims import (
    NOT_MEASURED,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Judgement,
    Measured,
    claimed,
    in_words,
    judge,
    of_run,
)

import pytest
from hypothesis import given
from hypothesis import strategies as st

H100, CPU = "nvidia-h100-80gb-hbm3", "cpu-amd-epyc-2c"


def claim(low: float | None = 0.90, high: float | None = 0.95, **changes: Any) -> Claim:
    given = {
        "id": "c", "statement": "s", "source": "https://x", "baseline": "separate_qkv", "arm": "fused_qkv",
        "scope": "step", "measured_by": "zimage sweep e.yaml",
    }  # fmt: skip
    return Claim(low=low, high=high, **(given | changes))


def row(ratio: float | None, low: float | None, high: float | None, floor: float | None = 0.004, **changes: Any) -> Any:
    about = {"run": "e/a1", "device": H100, "started": "2026-01-01T00:00:00+00:00", "parameters": {"height": 1024}}
    outer = {name: changes.pop(name, value) for name, value in about.items()}
    compared = {"baseline": "separate_qkv", "arm": "fused_qkv", "scope": "step", "regime": "burst"}
    numbers = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "noise_floor": floor}
    return Measured(notebook="notebooks/q.ipynb", weights="synthetic", row=compared | numbers | changes, **outer)


def on_h100(asked: Claim, *rows: Measured) -> Judgement:
    return judge(asked, H100, rows)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.91, 0.94, SUPPORTED),
        (0.90, 0.95, SUPPORTED),  # the ends belong to the band
        (0.89, 0.94, UNDECIDED),
        (0.91, 0.96, UNDECIDED),
        (0.85, 0.99, UNDECIDED),
        (0.96, 0.97, REFUTED),
        (0.80, 0.89, REFUTED),
        (1.05, 1.10, REFUTED),
        (0.95, 0.97, UNDECIDED),  # touches the band
    ],
)
def test_the_interval_decides(low: float, high: float, verdict: str) -> None:
    """An interval inside the claimed band supports it, one outside refutes it, and one across an end does neither."""
    found = on_h100(claim(), row((low * high) ** 0.5, low, high))
    assert (found.verdict, found.interval, found.evidence) == (verdict, (low, high), ["e/a1"])
    assert bool(found.reason) == (verdict == UNDECIDED)


@pytest.mark.parametrize(
    ("band", "low", "high", "verdict"),
    [
        ((None, 1.01), 0.97, 1.005, SUPPORTED),
        ((None, 1.01), 0.5, 0.6, SUPPORTED),
        ((None, 1.01), 1.02, 1.04, REFUTED),
        ((None, 1.01), 1.0, 1.02, UNDECIDED),
        ((1.2, None), 1.3, 90.0, SUPPORTED),
        ((1.2, None), 1.0, 1.1, REFUTED),
    ],
)
def test_an_end_may_be_open(band: tuple[float | None, float | None], low: float, high: float, verdict: str) -> None:
    """A band without a low or a high end reaches as far as it can."""
    assert on_h100(claim(*band), row((low * high) ** 0.5, low, high)).verdict == verdict


@pytest.mark.parametrize(
    ("band", "interval", "floor", "verdict"),
    [
        ((0.95, 0.99), (0.97, 0.985), 0.01, SUPPORTED),
        ((0.95, 0.99), (0.97, 0.985), 0.03, UNDECIDED),  # the change cannot be told from none
        ((0.95, 0.99), (1.01, 1.02), 0.03, REFUTED),  # and no change refutes a change
        ((None, 1.01), (1.02, 1.03), 0.01, REFUTED),
        ((None, 1.01), (1.02, 1.03), 0.03, UNDECIDED),  # a slowdown that cannot be told from none
        ((None, 1.01), (0.98, 0.99), 0.03, SUPPORTED),
        ((0.95, 0.99), (0.97, 0.985), None, SUPPORTED),
        ((0.95, 0.99), (0.97, 0.985), float("nan"), SUPPORTED),
    ],
)
def test_the_noise_floor(
    band: tuple[float | None, float | None], interval: tuple[float, float], floor: float | None, verdict: str
) -> None:
    """An estimate within the noise floor supports no change and refutes no absence of one; the reason says so."""
    low, high = interval
    found = on_h100(claim(*band), row((low * high) ** 0.5, low, high, floor))
    assert found.verdict == verdict
    if verdict == UNDECIDED:
        assert found.reason == "the estimate lies within the noise floor of 3.0 %"


@pytest.mark.parametrize(
    "numbers",
    [(None, None, None), (0.93, None, 0.94), (0.93, 0.92, float("nan")), (0.93, 0.94, 0.95), (0.93, 0.0, 0.94),
     (0.93, 0.92, float("inf"))],
)  # fmt: skip
def test_without_a_usable_interval_nothing_is_decided(numbers: tuple[float | None, ...]) -> None:
    """A row whose interval is missing, infinite or does not hold its ratio leaves the claim undecided."""
    found = on_h100(claim(), row(*numbers))
    assert (found.verdict, found.interval) == (UNDECIDED, None)
    assert found.reason == "no usable interval was recorded"
    assert found.evidence == ["e/a1"]


INSIDE, OUTSIDE, ACROSS = (0.93, 0.92, 0.94), (0.98, 0.97, 0.99), (0.95, 0.93, 0.97)


@pytest.mark.parametrize(
    ("cases", "verdict", "reason"),
    [
        ((INSIDE, INSIDE), SUPPORTED, ""),
        ((OUTSIDE, OUTSIDE), REFUTED, ""),
        ((INSIDE, OUTSIDE), UNDECIDED, "of 2 cases 1 supported, 1 refuted"),
        ((INSIDE, ACROSS, INSIDE), UNDECIDED, "of 3 cases 2 supported, 1 undecided"),
        ((OUTSIDE, ACROSS), UNDECIDED, "of 2 cases 1 refuted, 1 undecided"),
        ((ACROSS, ACROSS), UNDECIDED, "the interval lies partly inside the claimed band"),
    ],
)
def test_several_cases_have_to_agree(cases: tuple[tuple[float, ...], ...], verdict: str, reason: str) -> None:
    """Of several runs each must support the claim, or each refute it; evidence and interval hold all."""
    rows = [row(*one, run=f"e/{n}", parameters={"height": 1024, "seed": n}) for n, one in enumerate(cases)]
    found = on_h100(claim(), *rows)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.evidence == [f"e/{n}" for n in range(len(cases))]
    assert found.interval == (min(one[1] for one in cases), max(one[2] for one in cases))


def test_burst_and_sustained_are_two_cases_of_one_run() -> None:
    """A run that measured both regimes counts with both, and is named once."""
    found = on_h100(claim(), row(*INSIDE), row(*OUTSIDE, regime="sustained"))
    assert (found.verdict, len(found.cases), found.evidence) == (UNDECIDED, 2, ["e/a1"])


def test_only_the_newest_run_of_the_same_parameters_counts() -> None:
    """A later run replaces an earlier one of its notebook, parameters and device, and no other."""
    old = row(*OUTSIDE, run="e/old", started="2026-01-01T00:00:00+00:00")
    new = row(*INSIDE, run="e/new", started="2026-02-01T00:00:00+00:00")
    elsewhere = row(*OUTSIDE, run="e/cpu", started="2026-03-01T00:00:00+00:00", device=CPU)
    for rows in ([old, new, elsewhere], [elsewhere, new, old]):
        found = judge(claim(), H100, rows)
        assert (found.verdict, found.evidence) == (SUPPORTED, ["e/new"])
    other = row(*OUTSIDE, run="e/big", parameters={"height": 2048}, started="2025-01-01T00:00:00+00:00")
    assert sorted(judge(claim(), H100, [old, new, other]).evidence) == ["e/big", "e/new"]


@pytest.mark.parametrize("part", ["baseline", "arm", "scope"])
def test_another_comparison_is_no_case(part: str) -> None:
    """A row of another baseline, arm or scope says nothing about the claim, and the reason names what is missing."""
    found = on_h100(claim(), row(*INSIDE, **{part: "other"}))
    assert (found.verdict, found.interval, found.cases) == (NOT_MEASURED, None, ())
    assert found.reason == "no run compares fused_qkv against separate_qkv, scope step"


def test_devices() -> None:
    """A claim about some devices is judged on those only; each device is judged by its own rows."""
    here = claim(devices=("nvidia-h100-*", "apple-m2-pro*"))
    rows = [row(*INSIDE), row(*OUTSIDE, run="e/cpu", device=CPU)]
    assert judge(here, H100, rows).verdict == SUPPORTED
    off = judge(here, CPU, rows)
    assert (off.verdict, off.reason) == (NOT_MEASURED, "it is about nvidia-h100-* and apple-m2-pro*")
    assert judge(claim(), CPU, rows).verdict == REFUTED
    assert judge(claim(), "apple-m2-pro", rows).verdict == NOT_MEASURED
    assert (judge(claim(), None, []).verdict, judge(claim(), None, []).device) == (NOT_MEASURED, None)


@pytest.mark.parametrize(
    ("where", "parameters", "counts"),
    [
        ({"height": 1024}, {"height": 1024}, True),
        ({"height": 1024}, {"height": 8}, False),
        ({"height": 1024}, {}, False),
        ({"height": 1}, {"height": True}, False),
        ({"height": 1024}, {"height": 1024.0}, True),
        ({"quantization": None}, {}, True),
        ({"quantization": None}, {"quantization": None}, True),
        ({"quantization": None}, {"quantization": "4bit"}, False),
        ({"source": "synthetic:*"}, {"source": "synthetic:turbo"}, True),
        ({"source": "synthetic:*"}, {"source": "digits"}, False),
        ({"source": "*"}, {"source": None}, False),
        ({"source": ["digits", "*Z-Image*"]}, {"source": "Tongyi-MAI/Z-Image-Turbo"}, True),
        ({"source": ["digits", None]}, {}, True),
        ({"height": 8, "width": 8}, {"height": 8, "width": 9}, False),
    ],
)
def test_conditions(where: dict[str, Any], parameters: dict[str, Any], counts: bool) -> None:
    """Only runs whose parameters meet all conditions count: equal, a pattern, any of a list, null where absent."""
    found = on_h100(claim(where=where), row(*INSIDE, parameters=parameters))
    assert found.verdict == (SUPPORTED if counts else NOT_MEASURED)


def test_a_run_with_other_settings_is_mentioned() -> None:
    """Where runs compare the arms with other settings, the reason counts them and says what the nearest lacks."""
    wanted = claim(where={"height": 1024, "source": ["a", "b*"], "quantization": None})
    rows = [row(*INSIDE, run=f"e/{h}", parameters={"height": h, "quantization": "4bit"}) for h in (8, 1024)]
    assert on_h100(wanted, *rows).reason == (
        "2 runs compare fused_qkv against separate_qkv, scope step, but not with source a or b*, quantization null"
    )
    assert on_h100(wanted, rows[0]).reason.endswith(
        "1 run compares fused_qkv against separate_qkv, scope step, but not with height 1024, source a or b*, "
        "quantization null"
    )


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.941, 0.959, "4.1-5.9 % less time"),
        (0.95, 0.95, "5.0 % less time"),
        (1.333, 1.538, "33.3-53.8 % more time"),
        (0.988, 1.008, "1.2 % less to 0.8 % more time"),
        (1.0, 1.02, "0.0-2.0 % more time"),
        (0.98, 1.0, "0.0-2.0 % less time"),
    ],
)
def test_intervals_in_words(low: float, high: float, words: str) -> None:
    """An interval of ratios reads as percent of less or more time, the smaller change first."""
    assert in_words(low, high) == words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.90, 0.95, "5-10 % less time"),
        (1.333, 1.538, "33.3-53.8 % more time"),
        (None, 1.01, "at most 1 % more time"),
        (None, 0.95, "at least 5 % less time"),
        (1.2, None, "at least 20 % more time"),
        (0.9, None, "at most 10 % less time"),
        (0.99, 1.02, "1 % less to 2 % more time"),
        (None, None, "any time"),
    ],
)
def test_bands_in_words(low: float | None, high: float | None, words: str) -> None:
    """A claimed band reads the same way, without needless decimals; an open end is at least or at most."""
    assert claimed(claim(low, high)) == words


@given(low=st.floats(0.5, 2.0), width=st.floats(1.0, 1.5), bottom=st.floats(0.5, 2.0), band=st.floats(1.001, 1.5))
def test_a_verdict_is_never_both(low: float, width: float, bottom: float, band: float) -> None:
    """For any interval and band, supported and refuted are what the definitions say; all else is undecided."""
    high, top = low * width, bottom * band
    found = on_h100(claim(bottom, top), row(low, low, high, None)).verdict
    inside, outside = bottom <= low and high <= top, high < bottom or low > top
    assert found == (SUPPORTED if inside else REFUTED if outside else UNDECIDED)


TURBO = {"source": "synthetic:turbo", "height": 1024}


@pytest.mark.parametrize(
    ("interval", "verdict", "measured"),
    [
        ((0.91, 0.94), SUPPORTED, "6.0-9.0 % less time"),
        ((0.99, 1.01), REFUTED, "1.0 % less to 1.0 % more time"),
        ((0.94, 0.96), UNDECIDED, "4.0-6.0 % less time"),
    ],
)
def test_one_run_judges_as_all_results_do(interval: tuple[float, float], verdict: str, measured: str) -> None:
    """A run that meets a claim's conditions supports it, refutes it or leaves it undecided, by the same rule."""
    asked = claim(where={"source": ["synthetic:turbo", "*Z-Image*"], "height": 1024})
    rows = [row((interval[0] * interval[1]) ** 0.5, *interval, parameters=TURBO)]
    (said,) = of_run([asked, claim(scope="block")], rows)
    assert (said["verdict"], said["measured"], said["claimed"]) == (verdict, measured, "5-10 % less time")
    assert said["verdict"] == on_h100(asked, *rows).verdict


def test_a_run_of_another_model_leaves_a_claim_open() -> None:
    """On digits, and in another size, a claim is not about the run, with what it is about and what was measured."""
    asked = claim(where={"source": ["synthetic:turbo", "*Z-Image*"], "height": 1024})
    (said,) = of_run([asked], [row(0.92, 0.91, 0.94, parameters={"source": "digits", "height": 8})])
    assert (said["verdict"], said["measured"]) == ("not about this model", "6.0-9.0 % less time")
    assert said["reason"] == (
        "it is about source synthetic:turbo or *Z-Image*, height 1024; this run does not count, and measured is what "
        "it shows all the same"
    )
    (said,) = of_run([asked], [row(0.92, 0.91, 0.94, parameters=TURBO | {"height": 512})])
    assert said["verdict"] == "not about this run" and "about height 1024;" in said["reason"]


def test_a_run_without_an_interval_says_so() -> None:
    """Too few quads for an interval are said, not a band from nothing to infinity."""
    (said,) = of_run([claim()], [row(0.92, 0.0, float("inf"))])
    assert (said["verdict"], said["measured"]) == (UNDECIDED, "no interval")


def test_a_claim_about_another_device_is_not_about_the_run() -> None:
    """A claim about devices of another name is left, with their name."""
    (said,) = of_run([claim(devices=("apple-*",))], [row(0.92, 0.91, 0.94)])
    assert (said["verdict"], said["reason"]) == ("not about this run", "it is about apple-*")
