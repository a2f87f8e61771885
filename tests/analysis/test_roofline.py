"""Measured peaks, operations under them, and times predicted for sizes that were not measured."""

import math
from pathlib import Path
from typing import Any

from zimage.analysis import cost, roofline
from zimage.analysis.roofline import Peaks, Rate, Size, calibrate
from zimage.analysis.tables import SCHEMAS
from zimage.config import TransformerConfig
from zimage.errors import MeasurementError

import pandas as pd
import pytest

TURBO = TransformerConfig.turbo()
PEAKS = Peaks(matmul={"bfloat16": Rate(800e12, 600e12)}, copy=Rate(3e12))
NESTED = {
    "matmul": {
        "bfloat16": {"burst": 8e14, "sustained": 6e14, "size": 8192},
        "float32": {"burst": 5e13, "sustained": None, "size": 8192},
    },
    "quantized_matmul": {"4bit": {"burst": 1e14}},
    "dequantize": {"4bit": {"burst": 2e11}},
    "copy": {"burst": 3e12, "sustained": None, "bytes": 2**30},
}
FLAT = {
    "dtype": "bfloat16", "matmul_flops_per_s": 8e14, "matmul_size": 8192, "float32_matmul_flops_per_s": 5e13,
    "float32_matmul_size": 4096, "copy_bytes_per_s": 3e12, "copy_bytes": 2**30,
}  # fmt: skip
DATA = Path(__file__).parent.parent / "data"


def _operation(name: str, stage: str = "layers.1") -> cost.Operation:
    return next(o for o in cost.step(TURBO, 1024, 1024) if (o.stage, o.operation) == (stage, name))


def test_peaks_are_read_in_both_forms() -> None:
    """The nested form and the older flat one give the same rates where both have them."""
    nested, flat = Peaks.of(NESTED), Peaks.of(FLAT)
    assert nested.matmul["bfloat16"] == Rate(8e14, 6e14)
    assert nested.quantized_matmul["4bit"] == Rate(1e14)
    assert nested.dequantize["4bit"] == Rate(2e11)
    for dtype in ("bfloat16", "float32"):
        assert nested.matmul_flops_per_s(dtype) == flat.matmul_flops_per_s(dtype)
    assert nested.copy == flat.copy == Rate(3e12)


@pytest.mark.parametrize(
    "facts",
    [
        None, {}, [], {"matmul": 3, "copy": "fast"}, {"matmul": {"bfloat16": {"burst": "8e14"}}},
        {"matmul": {"bfloat16": None}, "copy": {"burst": math.nan}}, {"dtype": "bfloat16", "copy_bytes_per_s": -1.0},
        {"matmul": {"bfloat16": {"burst": math.inf}}, "copy": {"burst": True}},
    ],
)  # fmt: skip
def test_what_is_no_rate_is_not_measured(facts: Any) -> None:
    """Missing and senseless entries are None, and nothing stands in for them."""
    peaks = Peaks.of(facts)
    assert peaks.matmul_flops_per_s("bfloat16") is None
    assert peaks.copy == Rate()
    assert roofline.place(_operation("w1"), 1e-3, peaks, "bfloat16") == roofline.Placed(
        _operation("w1").flops / _operation("w1").bytes, "", None, None
    )
    assert roofline.mfu(cost.step(TURBO, 512, 512), 0.03, peaks, "bfloat16") is None


def test_a_matmul_is_bound_by_compute_and_a_norm_by_memory() -> None:
    """The roof is the slower of FLOPs and bytes at the peaks; the attained fraction is the roof over the time."""
    w1 = roofline.place(_operation("w1"), 0.5e-3, PEAKS, "bfloat16")
    assert w1.bound == "compute"
    assert w1.roof_s == 2 * 4128 * 3840 * 10240 / 800e12
    assert w1.attained_fraction == pytest.approx(w1.roof_s / 0.5e-3)
    norm = _operation("ffn_norm1")
    placed = roofline.place(norm, 1e-4, PEAKS, "bfloat16")
    assert placed.bound == "memory"
    assert placed.roof_s == norm.bytes / 3e12
    assert placed.intensity_flop_per_byte == pytest.approx(norm.flops / norm.bytes)


def test_a_thin_matmul_is_bound_by_its_weights() -> None:
    """The modulation's product with one row per item reads weights for longer than it computes."""
    assert roofline.place(_operation("adaln"), 1e-4, PEAKS, "bfloat16").bound == "memory"


@pytest.mark.parametrize("time_s", [None, 0.0, -1e-5, math.nan])
def test_no_positive_time_attains_nothing(time_s: float | None) -> None:
    """An operation without a time, or with noise for one, has a roof and no attained fraction."""
    placed = roofline.place(_operation("w1"), time_s, PEAKS, "bfloat16")
    assert placed.attained_fraction is None
    assert placed.bound == "compute"


def test_what_moves_nothing_has_no_intensity() -> None:
    """Padding where nothing is padded has no intensity and attains nothing."""
    placed = roofline.place(_operation("pad", "x_embedder"), 1e-6, PEAKS, "bfloat16")
    assert placed.intensity_flop_per_byte is None
    assert placed.attained_fraction is None


def test_mfu_counts_products_against_the_regimes_peak() -> None:
    """MFU is matmul and attention FLOPs over time and peak; the sustained peak gives more; elementwise work nothing."""
    operations = cost.step(TURBO, 1024, 1024)
    flops = sum(o.flops for o in operations if o.kind != "elementwise")
    burst = roofline.mfu(operations, 0.11, PEAKS, "bfloat16")
    sustained = roofline.mfu(operations, 0.11, PEAKS, "bfloat16", "sustained")
    assert burst == pytest.approx(flops / 0.11 / 800e12)
    assert sustained == pytest.approx(flops / 0.11 / 600e12)
    assert roofline.mfu([o for o in operations if o.kind == "elementwise"], 0.11, PEAKS, "bfloat16") == 0
    with pytest.raises(MeasurementError, match="positive time, found 0"):
        roofline.mfu(operations, 0, PEAKS, "bfloat16")
    with pytest.raises(MeasurementError, match="regime must be burst or sustained"):
        roofline.mfu(operations, 1, PEAKS, "bfloat16", "hot")  # type: ignore[arg-type]


def test_operation_rows_end_in_what_is_unattributed() -> None:
    """Timed stages have all their operations in order and the signed rest; the others have no rows."""
    operations = cost.step(TURBO, 1024, 1024)
    times = {
        ("layers.0", "w1"): (5e-4, 4e-4, 6e-4), ("layers.0", "sdpa"): (6e-4, 6e-4, 7e-4),
        ("layers.0", "unattributed"): (-1e-4, -4e-4, 2e-4), ("layers.1", "w1"): (5e-4, math.nan, math.nan),
    }  # fmt: skip
    rows = roofline.operation_rows(operations, times, PEAKS, "bfloat16")
    assert {r["stage"] for r in rows} == {"layers.0", "layers.1"}
    first = [r for r in rows if r["stage"] == "layers.0"]
    names = [o.operation for o in operations if o.stage == "layers.0"]
    assert [r["operation"] for r in first] == [*names, "unattributed"]
    assert [r["operation"] for r in rows if r["stage"] == "layers.1"][-1] == "ffn_residual"
    rest = first[-1]
    assert rest["time_s"] == pytest.approx(-1e-4)
    assert (rest["time_low_s"], rest["time_high_s"]) == (-4e-4, 2e-4)
    other = next(r for r in rows if (r["stage"], r["operation"]) == ("layers.1", "w1"))
    assert (other["time_s"], other["time_low_s"], other["time_high_s"]) == (5e-4, None, None)
    w1, norm = (next(r for r in first if r["operation"] == name) for name in ("w1", "ffn_norm1"))
    assert w1["bound"] == "compute"
    assert 0 < w1["attained_fraction"] < 1
    assert norm["time_s"] is None
    assert norm["attained_fraction"] is None
    assert set().union(*rows) <= set(SCHEMAS["operations"].names)


def test_a_time_of_no_operation_is_refused() -> None:
    """A name the step does not have is an error and not a silent hole."""
    with pytest.raises(MeasurementError, match="'to_qkv' is no operation of stage"):
        roofline.operation_rows(
            cost.step(TURBO, 512, 512), {("layers.0", "to_qkv"): (1.0, 1.0, 1.0)}, PEAKS, "bfloat16"
        )


def _measured(arm: str) -> dict[Size, float]:
    """Seconds of a step of the published shape by size: medians of 8 on an H100, MLX 0.32.4, synthetic weights."""
    table = pd.read_csv(DATA / "scaling_h100.csv")
    rows = table[table["arm"] == arm].itertuples()
    return {Size(r.height, r.width, r.batch, r.caption_tokens): r.time_s for r in rows}


@pytest.mark.parametrize("arm", ["bfloat16", "4bit"])
def test_three_sizes_predict_what_was_measured(arm: str) -> None:
    """Calibrated at three telling sizes of those measured on an H100, the others are predicted to 8 % by the median."""
    points = _measured(arm)
    chosen = roofline.telling_sizes(list(points), TURBO)
    predictor = calibrate([(s, points[s]) for s in chosen], TURBO)
    held_out = [(s, t) for s, t in points.items() if s not in chosen]
    assert len(held_out) >= 5
    errors = predictor.errors(held_out)
    assert errors.median < 0.08
    assert errors.median <= errors.largest < 0.2


def _made(size: Size, config: TransformerConfig) -> float:
    operations = cost.step(config, size.height, size.width, size.batch, size.caption_tokens)
    flops = {kind: sum(o.flops for o in operations if o.kind == kind) for kind in ("matmul", "attention")}
    return 0.02 + 8e-12 * flops["matmul"] + 5e-11 * flops["attention"]


def test_what_a_time_is_made_of_is_found_again() -> None:
    """Times made of a constant and FLOPs give back their coefficients, and exact predictions of other sizes."""
    config = TransformerConfig.small()
    sizes = [Size(64, 64), Size(256, 256, 2), Size(384, 384)]
    predictor = calibrate([(s, _made(s, config)) for s in sizes], config)
    found = (predictor.constant_s, predictor.linear_s, predictor.attention_s)
    assert found == pytest.approx((0.02, 8e-12, 5e-11))
    held_out = Size(192, 320, 3, (77, 5, 300))
    assert predictor.predict(held_out) == pytest.approx(_made(held_out, config))
    assert predictor.errors([(held_out, 2 * _made(held_out, config))]).largest == pytest.approx(0.5)


def test_no_coefficient_is_negative() -> None:
    """Times that fall as work grows give no negative share to anything."""
    points = [(Size(512, 512), 0.3), (Size(1024, 1024), 0.2), (Size(1536, 1536), 0.1)]
    predictor = calibrate(points, TURBO)
    assert min(predictor.constant_s, predictor.linear_s, predictor.attention_s) >= 0


def test_predictions_say_where_they_hold() -> None:
    """Sizes beyond the calibrated FLOPs or tokens carry a caution that names what lies outside."""
    sizes = [Size(512, 512), Size(512, 512, 4), Size(1024, 1024)]
    predictor = calibrate([(s, _made(s, TURBO)) for s in sizes], TURBO)
    assert predictor.range.tokens == (1056, 4128)
    assert predictor.valid(Size(768, 768))
    assert predictor.caution(Size(768, 768)) == ""
    assert "FLOPs lie outside the calibrated" in predictor.caution(Size(256, 256))
    assert "tokens lie outside the calibrated" in predictor.caution(Size(256, 256, 10))
    assert predictor.predict(Size(2048, 2048)) > 0
    assert not predictor.valid(Size(2048, 2048))


def test_telling_sizes_are_of_different_kinds() -> None:
    """The smallest step, the most tokens an item, and a batch of small images are chosen."""
    sizes = [Size(256, 256), Size(512, 512), Size(1024, 1024), Size(1536, 1536), Size(256, 256, 8)]
    assert set(roofline.telling_sizes(sizes, TURBO)) == {sizes[0], sizes[3], sizes[4]}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "three different sizes, found 0"),
        ([(Size(512, 512), 0.03)] * 3, "three different sizes, found 1"),
        ([(Size(512, 512), 0.03), (Size(256, 256), 0.0), (Size(1024, 1024), 0.1)], r"times, found 0\.0 s"),
        ([(Size(512, 512), math.nan), (Size(256, 256), 0.1), (Size(1024, 1024), 0.1)], "times, found nan s"),
        ([(Size(512, 512), None), (Size(256, 256), 0.1), (Size(1024, 1024), 0.1)], "times, found None s"),
    ],
)
def test_too_little_to_calibrate_with_is_refused(points: list[tuple[Size, float]], message: str) -> None:
    """Fewer than three sizes, and times that are none, are errors."""
    with pytest.raises(MeasurementError, match=message):
        calibrate(points, TURBO)


def test_errors_need_points() -> None:
    """Errors over no points, and sizes to choose from that are too few, are refused."""
    sizes = [Size(256, 256), Size(512, 512), Size(768, 768)]
    predictor = calibrate([(s, _made(s, TURBO)) for s in sizes], TURBO)
    with pytest.raises(MeasurementError, match="need measured points"):
        predictor.errors([])
    with pytest.raises(MeasurementError, match="three different sizes, found 1"):
        roofline.telling_sizes([Size(64, 64)] * 4, TURBO)
