"""Where attention overtakes the linear layers, and one axis at a time, on times that are made from known rates."""

import math
from pathlib import Path

from zimage import sources
from zimage.analysis import axes, cost, crossover, roofline, scaling_words
from zimage.analysis.crossover import Crossing, Measured
from zimage.analysis.roofline import Size
from zimage.analysis.tables import conform
from zimage.config import TransformerConfig
from zimage.errors import InputError, MeasurementError

import numpy as np
import pandas as pd
import pytest

TURBO = TransformerConfig.turbo()
DIGITS = sources.describe("digits").config
SIZES = [Size(256, 256), Size(1024, 1024), Size(2048, 2048), Size(512, 512, 8)]


def seconds(size: Size, linear_s: float, attention_s: float, config: TransformerConfig = TURBO) -> float:
    """A step's time at known rates, with a start of a millisecond."""
    operations = cost.step(config, size.height, size.width, size.batch, size.caption_tokens)
    flops = {kind: sum(o.flops for o in operations if o.kind == kind) for kind in ("matmul", "attention")}
    return 1e-3 + linear_s * flops["matmul"] + attention_s * flops["attention"]


@pytest.mark.parametrize("config", [TURBO, DIGITS])
def test_by_flops_alone_it_is_a_property_of_the_config(config: TransformerConfig) -> None:
    """At the crossing a block's linear layers and its attention have the same FLOPs, counted anew from the widths."""
    tokens, kv = crossover.by_flops(config).tokens, config.n_kv_heads * config.head_dim
    (w1,) = {o.parameters for o in cost.step(config, 256, 256) if o.stage == "layers.0" and o.operation == "w1"}
    linear = 2 * (2 * config.dim**2 + 2 * config.dim * kv + 3 * w1)
    assert tokens == pytest.approx(linear / (4 * config.dim))
    assert crossover.by_flops(TURBO).tokens == 23040


def test_rates_move_the_crossing_from_that_of_flops() -> None:
    """A FLOP of attention that takes twice as long halves the tokens, whatever the noise, with an interval."""
    rng, chosen = np.random.default_rng(0), SIZES[:1] + SIZES[2:]
    points = [(s, (seconds(s, 1e-15, 2e-15) * np.exp(0.001 * rng.standard_normal(10))).tolist()) for s in chosen]
    found = crossover.by_rates(points, TURBO)
    assert found.method == "calibrated rates"
    assert found.low is not None and found.high is not None and found.low < 11520 < found.high < 1.1 * found.low
    assert found.tokens == pytest.approx(11520, rel=0.02)
    few = crossover.by_rates([(size, times[:3]) for size, times in points], TURBO)
    assert (few.low, few.high) == (None, None)


def test_what_times_do_not_tell_is_no_number() -> None:
    """Attention without a time never overtakes; linear layers without one leave it open."""
    never = crossover.by_rates([(size, [seconds(size, 1e-15, 0)] * 6) for size in SIZES], TURBO)
    assert (never.tokens, never.note) == (math.inf, "never")
    untold = crossover.by_rates([(size, [1e-3 + 1e-8 * i**4] * 6) for i, size in enumerate(SIZES[:3])], TURBO)
    assert math.isnan(untold.tokens) and untold.note == "not told"
    for found in (never, untold):
        row = found.row(TURBO)
        assert row["tokens"] is None and row["side_px"] is None
        conform("crossover", pd.DataFrame([{**row, "arm": "a"}]))
    noisy = [(size, [seconds(size, 1e-15, 0.0 if i < 2 else 1e-15) for i in range(8)]) for size in SIZES]
    some = crossover.by_rates(noisy, TURBO)  # in two of eight rounds attention took no time
    assert math.isfinite(some.tokens) and some.low is not None


@pytest.mark.parametrize(
    ("tokens", "note"), [([4000, 20000], ""), ([1000, 4000, 8000], "extrapolated"), ([16000, 30000], "extrapolated")]
)
def test_operations_cross_between_or_beyond_their_sizes(tokens: list[int], note: str) -> None:
    """Where attention grows with the square and the rest with the tokens the crossing is found, noise or none."""
    rng = np.random.default_rng(1)
    noise = np.exp(0.002 * rng.standard_normal((2, len(tokens), 10)))
    measured = [
        Measured(n, (1e-9 * n**2 * a).tolist(), (1.5e-5 * n * b).tolist())
        for n, a, b in zip(tokens, *noise, strict=True)
    ]
    found = crossover.by_operations(measured[::-1])
    assert found.tokens == pytest.approx(15000, rel=0.02) and found.note == note
    assert found.low is not None and found.high is not None and found.low <= 15000 * 1.01 and found.high >= 15000 * 0.99


def test_operations_that_never_cross_say_so() -> None:
    """Attention whose share falls never overtakes, and rounds with times that are not positive are left out."""
    falling = [Measured(n, [1e-6] * 6, [1e-6 * n] * 6) for n in (100, 200)]
    assert crossover.by_operations(falling).note == "never"
    one_bad = [Measured(n, [-1.0, *[1e-9 * n**2] * 6], [1e-6 * n] * 7) for n in (500, 2000)]
    assert crossover.by_operations(one_bad).tokens == pytest.approx(1000)


def test_attention_that_is_slower_everywhere_is_not_faster() -> None:
    """Where it takes longer at every size, and less so at larger ones, it is not told from where on; that it is, is."""
    above = [Measured(n, [s] * 6, [1e-6 * n] * 6) for n, s in ((100, 1.5e-4), (200, 2.98e-4))]
    found = crossover.by_operations(above)
    assert math.isnan(found.tokens) and found.note == "not told"
    rows = [found.row(TURBO), *(one.row() for one in above)]
    ((text, _),) = scaling_words.crossing(pd.DataFrame(rows))
    least = "attention takes more time than the linear layers at all sizes measured, from 100 tokens on"
    assert text == f"{least}, an estimate without an interval"
    assert scaling_words.crossing(pd.DataFrame(rows), 2)[0][0].endswith("an estimate without an interval (2 rounds)")


def test_shapes_of_as_many_tokens_are_one_size() -> None:
    """Two shapes of the least size do not make a line of their own that is drawn on."""
    measured = [
        Measured(n, [1e-9 * n**2 * off] * 6, [1.5e-5 * n] * 6)
        for n, off in ((30000, 0.99), (30000, 1.01), (60000, 1.0))
    ]
    found = crossover.by_operations(measured)
    assert found.tokens == pytest.approx(15000, rel=1e-3) and found.note == "extrapolated"


def test_a_blocks_operations_are_told_apart() -> None:
    """Linear layers, fused or not, and attention are summed by round; modulation and elementwise work are neither."""
    plain, fused = crossover.kinds_of(TURBO), crossover.kinds_of(TURBO, ("qkv", "gate_up"))
    linear = {name for name, kind in plain.items() if kind == "matmul"}
    assert linear == {"to_q", "to_k", "to_v", "to_out", "w1", "w3", "w2"} and plain["sdpa"] == "attention"
    assert {name for name, kind in fused.items() if kind == "matmul"} == {"to_qkv", "to_out", "w13", "w2"}
    times = {"adaln": [9.0, 9.0], "sdpa": [1.0, 2.0], "to_q": [3.0, 4.0], "w2": [1.0, 1.0], "swiglu": [7.0, 7.0]}
    found = crossover.measured(100, times, plain)
    assert found == Measured(100, [1.0, 2.0], [4.0, 5.0])
    assert found.row()["linear_s"] == 4.5
    with pytest.raises(MeasurementError, match="no attention is among the operations to_q"):
        crossover.measured(100, {"to_q": [1.0]}, plain)


def test_what_cannot_cross_is_refused() -> None:
    """One size of a block, rounds that differ and rounds without positive times are one clear line."""
    one = Measured(10, [1.0], [1.0])
    for measured, words in (([one, one], "two different sizes"), ([one, Measured(20, [-1.0], [1.0])], "no round has")):
        with pytest.raises(MeasurementError, match=words) as caught:
            crossover.by_operations(measured)
        assert "\n" not in str(caught.value)
    with pytest.raises(MeasurementError, match="in the same rounds"):
        crossover.by_rates([(size, [1.0] * (1 + i)) for i, size in enumerate(SIZES)], TURBO)
    assert Crossing("FLOPs alone", 23040.0).row(TURBO)["side_px"] == pytest.approx(16 * math.sqrt(23040))


def test_sizes_of_as_many_tokens_are_refused_before_anything_is_timed() -> None:
    """Padding makes 16 px as long as 32 px in the published model: one line says so; other sizes, one or none do."""
    with pytest.raises(InputError, match=r"block_sizes 16 x 16 and 32 x 32 px have 64 tokens each; a crossing needs"):
        crossover.require_different([Size(16, 16), Size(32, 32)], TURBO)
    for sizes in ([], [Size(16, 16)], [Size(16, 16), Size(512, 512)]):
        crossover.require_different(sizes, TURBO)


def test_an_h100s_times_give_a_crossing() -> None:
    """The plain step's times on an H100 cross at more tokens than FLOPs do, for all else of a step counts too."""
    table = pd.read_csv(Path(__file__).parent.parent / "data" / "scaling_h100.csv")
    table = table[table["arm"] == "bfloat16"]
    times = {
        Size(*(int(row[n]) for n in ("height", "width", "batch", "caption_tokens"))): row["time_s"]
        for row in table.to_dict("records")
    }
    chosen = roofline.telling_sizes(list(times), TURBO)
    found = crossover.by_rates([(size, [times[size]]) for size in chosen], TURBO)
    assert 25_000 < found.tokens < 40_000


ASKED = [
    *(Size(512, 512), Size(1024, 1024), Size(512, 2048), Size(2048, 512), Size(768, 768)),
    *(Size(512, 512, 4), Size(512, 512, 8), Size(1024, 1024, 1, 512), Size(512, 512, 1, 64)),
]


def test_sizes_that_differ_in_one_thing_are_put_beside_each_other() -> None:
    """Each axis has the sizes that differ in it alone, beside the least; shapes are of exactly as many tokens."""
    found = axes.pairs(ASKED, TURBO)
    named = {axis: [(size, beside) for name, size, beside in found if name == axis] for axis in axes.AXES}
    assert named == {
        "resolution": [(Size(768, 768), Size(512, 512)), (Size(1024, 1024), Size(512, 512))],
        "aspect": [(Size(512, 2048), Size(1024, 1024)), (Size(2048, 512), Size(1024, 1024))],
        "batch": [(Size(512, 512, 4), Size(512, 512)), (Size(512, 512, 8), Size(512, 512))],
        "caption": [(Size(512, 512, 1, 64), Size(512, 512)), (Size(1024, 1024, 1, 512), Size(1024, 1024))],
    }
    assert axes.pairs(ASKED[::-1], TURBO) != [] and axes.pairs([], TURBO) == [] and axes.pairs(ASKED[:1], TURBO) == []


def test_ratios_are_those_of_one_round_and_of_one_image() -> None:
    """A drift that all sizes of a round share leaves ratios alone; a batch's is an image's."""
    rng, drift = np.random.default_rng(2), np.linspace(1, 3, 12)
    slow = {Size(2048, 512): 1.05}
    times = {
        size: (
            seconds(size, 1e-15, 2e-15) * slow.get(size, 1) * drift * np.exp(1e-4 * rng.standard_normal(12))
        ).tolist()
        for size in ASKED
    }
    predictor = roofline.calibrate([(size, seconds(size, 1e-15, 2e-15)) for size in SIZES], TURBO)
    rows = axes.rows(times, TURBO, predictor)
    conform("axes", pd.DataFrame(rows).assign(arm="a"))
    shapes = {(row["height"], row["width"]): row for row in rows if row["axis"] == "aspect"}
    assert shapes[512, 2048]["verdict"] == "equivalent" and shapes[512, 2048]["predicted_ratio"] == 1
    assert shapes[2048, 512]["verdict"] == "slower" and shapes[2048, 512]["ratio"] == pytest.approx(1.05, rel=1e-3)
    for row in rows:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        if (row["height"], row["width"]) not in shapes:
            assert row["ratio"] == pytest.approx(row["predicted_ratio"], rel=1e-3)
    batch = next(row for row in rows if row["axis"] == "batch" and row["batch"] == 8)
    assert 0.9 < batch["ratio"] < 1
    few = axes.rows({size: some[:2] for size, some in times.items()}, TURBO, predictor)
    assert {row["ratio_low"] for row in few} == {None} and {row["verdict"] for row in few} == {"inconclusive"}
