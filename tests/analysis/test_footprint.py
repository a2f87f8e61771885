"""Memory of a step predicted before anything is allocated, beside what was and is measured."""

from pathlib import Path
from typing import Any

import zimage
from zimage import inputs
from zimage.analysis import cost, footprint
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, InputError
from zimage.measure.memory import peak_bytes
from zimage.transformer import Transformer, weight_bytes

import mlx.core as mx
import pandas as pd
import pytest

TURBO = TransformerConfig.turbo()
H100 = pd.read_csv(Path(__file__).parent.parent / "data" / "scaling_h100.csv")
GB = 10**9
# An H100 with fast work runs dry: the host is not ahead there, and less is alive than is predicted.
SMALL = (H100["arm"] == "4bit") & (H100["height"] == 256)


def _measured(model: Transformer, size: tuple[int, int, int, int]) -> int:
    """The weights, and what one step of a digits model had alive besides what is always held."""
    example = inputs.example(model, "digits", *size, seed=0)
    mx.eval(model(*example))  # makes the tables, which are kept
    mx.synchronize()
    before = int(mx.get_active_memory())
    return weight_bytes(model) + peak_bytes(lambda: model(*example)) - before


def _name(row: Any) -> str:
    return f"{row.arm}-{row.height}x{row.width}-batch{row.batch}-caption{row.caption_tokens}"


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="the model of a CPU")
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", (8, 8, 1, 1)),
        ("float32", (32, 32, 1, 1)),
        ("float32", (16, 16, 8, 1)),
        ("float32", (16, 24, 3, 1)),
        ("bfloat16", (8, 8, 1, 1)),
        ("bfloat16", (32, 32, 1, 1)),
        ("bfloat16", (16, 16, 4, 1)),
    ],
)
def test_a_cpus_peak_is_predicted(dtype: str, size: tuple[int, int, int, int]) -> None:
    """On a CPU the predicted peak is within 5 % of the measured one, from one small image to batches and large ones."""
    model = zimage.load_transformer("digits", dtype)
    mx.eval(model.parameters())
    predicted = footprint.step_bytes(model.config, *size, dtype, device="cpu")
    assert predicted.peak_bytes == pytest.approx(_measured(model, size), rel=0.05)


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="the model of a CPU")
@pytest.mark.parametrize("size", [(8, 8, 1, 1), (8, 8, 8, 1), (32, 32, 1, 1)])
@pytest.mark.parametrize(("dtype", "mode"), [("float32", "8bit"), ("float32", "mxfp4"), ("bfloat16", "4bit")])
def test_a_cpus_peak_with_packed_weights_is_predicted(dtype: str, mode: str, size: tuple[int, int, int, int]) -> None:
    """With packed layers, unpacked before each product, at most a tenth more is held, and 70 % of it at least."""
    model = zimage.load_transformer("digits", dtype, mode)
    predicted = footprint.step_bytes(model.config, *size, dtype, mode, device="cpu")
    most = max(_measured(model, size) for _ in range(3))  # a host that is slower than its threads holds less
    assert 0.7 * predicted.peak_bytes < most < 1.1 * predicted.peak_bytes


def test_a_plain_block_among_packed_ones_counts_as_one() -> None:
    """A recipe that leaves one main block as it is has the plain step's activations, and fewer bytes of weights."""
    recipe = {"default": "4bit", "rules": [{"pattern": "layers.1.*", "quantization": None}]}
    size = (1024, 1024, 1, 32)
    plain, mixed, packed = (
        footprint.step_bytes(TURBO, *size, "float32", how, device="cpu") for how in (None, recipe, "4bit")
    )
    assert packed.activation_bytes < mixed.activation_bytes == plain.activation_bytes
    assert mixed.weight_bytes < plain.weight_bytes


def _besides_weights(row: Any) -> tuple[int, int]:
    """Predicted and measured bytes besides the weights. In some rows another model was resident, and is left out."""
    quantization = None if row.arm == "bfloat16" else row.arm
    found = footprint.step_bytes(
        TURBO, row.height, row.width, row.batch, row.caption_tokens, "bfloat16", quantization, device="cuda"
    )
    return found.activation_bytes, row.peak_bytes - row.active_bytes


@pytest.mark.parametrize("row", list(H100[~SMALL].itertuples()), ids=_name)
def test_an_h100s_peak_is_predicted(row: Any) -> None:
    """Weights and all that is alive besides come to between 4 % less and 20 % more than was measured on an H100."""
    predicted, measured = _besides_weights(row)
    weights = cost.whole(
        cost.step(TURBO, row.height, row.width, quantization=None if row.arm == "bfloat16" else row.arm)
    ).weight_bytes
    assert 0.96 <= (predicted + weights) / (measured + weights) <= 1.2


@pytest.mark.parametrize("row", list(H100[SMALL].itertuples()), ids=_name)
def test_where_the_host_is_slow_the_prediction_is_an_upper_bound(row: Any) -> None:
    """A step too small to keep the device busy has less alive at once than is predicted, never more."""
    predicted, measured = _besides_weights(row)
    assert measured < predicted


def test_weights_are_those_of_the_cost_model() -> None:
    """Weights are counted as they are stored, packed where they are."""
    plain = footprint.step_bytes(TURBO, 512, 512)
    packed = footprint.step_bytes(TURBO, 512, 512, quantization="4bit")
    assert plain.weight_bytes == 2 * 6_154_908_736
    assert packed.weight_bytes == cost.whole(cost.step(TURBO, 512, 512, quantization="4bit")).weight_bytes
    assert plain.peak_bytes == plain.weight_bytes + plain.activation_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_more_work_never_takes_less(device: footprint.DeviceKind) -> None:
    """A larger image, a larger batch and a wider dtype need at least as much, on every kind of device."""
    config = TransformerConfig.small()

    def peak(height: int, batch: int, dtype: str) -> int:
        return footprint.step_bytes(config, height, height, batch, 32, dtype, device=device).peak_bytes

    for smaller, larger in [
        ((256, 1, "bfloat16"), (512, 1, "bfloat16")),
        ((256, 1, "bfloat16"), (256, 3, "bfloat16")),
        ((256, 1, "bfloat16"), (256, 1, "float32")),
    ]:
        assert peak(*smaller) < peak(*larger)


def test_what_one_operation_needs_is_always_alive() -> None:
    """Even where batches of operations are tiny, the residual stream, its norm, gate and up are alive together."""
    found = footprint.step_bytes(TURBO, 2048, 2048, 8, device="metal")
    tokens = 8 * (128 * 128 + 32)
    assert found.activation_bytes >= 2 * tokens * (2 * 3840 + 2 * 10240)


def test_unpacked_weights_are_counted_where_they_are_unpacked() -> None:
    """Packed weights are unpacked for a while on a CPU and on CUDA, and not on Metal."""
    for device, unpacks in (("cpu", True), ("cuda", True), ("metal", False)):
        plain, packed = (
            footprint.step_bytes(TURBO, 256, 256, quantization=q, device=device).activation_bytes  # type: ignore[arg-type]
            for q in (None, "8bit")
        )
        assert (packed > plain) is unpacks


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"device": "tpu"}, InputError, "device must be cpu, cuda or metal, found 'tpu'"),
        ({"dtype": "float16"}, InputError, "dtype 'float16' is not supported"),
        ({"height": 500}, ConfigError, "height 500 is not a positive multiple of 8"),
    ],
)
def test_impossible_questions_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    """What no device and no model has is one error that names it."""
    with pytest.raises(error, match=message):
        footprint.step_bytes(TURBO, **{"height": 512, "width": 512, **values})


@pytest.mark.parametrize(
    ("peak", "recommended", "total", "verdict", "words"),
    [
        (20 * GB, 30 * GB, 40 * GB, "fits", "about 20.0 GB of 30.0 GB"),
        (30 * GB, 30 * GB, 40 * GB, "fits", "of 30.0 GB"),
        (35 * GB, 30 * GB, 40 * GB, "tight", "more than the recommended working set of 30.0 GB"),
        (41 * GB, 30 * GB, 40 * GB, "cannot fit", "more than the device's 40.0 GB"),
        (41 * GB, None, 40 * GB, "cannot fit", "more than the device's 40.0 GB"),
        (35 * GB, None, 40 * GB, "fits", "of 40.0 GB"),
        (35 * GB, 30 * GB, None, "tight", "expect swapping"),
        (35 * GB, None, None, "unknown", "the device's memory is unknown"),
    ],
)
def test_verdicts(peak: int, recommended: int | None, total: int | None, verdict: str, words: str) -> None:
    """Above the recommended working set is tight, above the total cannot fit, and unknown limits judge nothing."""
    found, sentence = footprint.verdict(peak, recommended, total)
    assert found == verdict
    assert words in sentence
    assert "\n" not in sentence
