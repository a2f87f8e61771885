"""How near to a device's measured limits operations come, and how long a step of another size will take.

The limits are peaks measured on the device, never a data sheet's: matrix products bound matmuls and attention, a copy's
bandwidth bounds everything. Where a peak that is needed was not measured, the answer is None and the bound is ''.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from zimage.analysis import cost, units
from zimage.analysis.cost import UNATTRIBUTED, Operation
from zimage.config import TransformerConfig
from zimage.errors import InputError, MeasurementError

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Regime = Literal["burst", "sustained"]
Interval = tuple[float, float, float]  # a time and the two ends of its interval, in seconds


@dataclass(frozen=True)
class Rate:
    """A rate (FLOP/s or bytes/s) reached for a moment and for long; None where it was not measured."""

    burst: float | None = None
    sustained: float | None = None

    def of(self, regime: Regime) -> float | None:
        """The rate in a regime. Raises MeasurementError for an unknown one."""
        if regime not in ("burst", "sustained"):
            raise MeasurementError(f"regime must be burst or sustained, found {regime!r}")
        return self.burst if regime == "burst" else self.sustained


@dataclass(frozen=True)
class Peaks:
    """What a device was measured to reach: matmuls by dtype, quantized matmuls and unpacking by packing, copies."""

    matmul: Mapping[str, Rate] = field(default_factory=dict)  # FLOP/s
    quantized_matmul: Mapping[str, Rate] = field(default_factory=dict)  # FLOP/s
    dequantize: Mapping[str, Rate] = field(default_factory=dict)  # bytes/s
    copy: Rate = Rate()  # bytes/s, read plus written

    @classmethod
    def of(cls, facts: Mapping[str, Any] | None) -> "Peaks":
        """From a mapping as runs keep it, nested by dtype or in the older flat form; None has nothing measured.

        What is missing, or no positive number, counts as not measured.
        """
        facts = facts if isinstance(facts, Mapping) else {}
        if "matmul_flops_per_s" in facts or "copy_bytes_per_s" in facts:
            by_dtype = {"float32": Rate(_rate(facts.get("float32_matmul_flops_per_s")))}
            by_dtype[str(facts.get("dtype"))] = Rate(_rate(facts.get("matmul_flops_per_s")))
            return cls(matmul=by_dtype, copy=Rate(_rate(facts.get("copy_bytes_per_s"))))
        named = {
            key: {str(name): _rates(rates) for name, rates in facts[key].items()}
            for key in ("matmul", "quantized_matmul", "dequantize")
            if isinstance(facts.get(key), Mapping)
        }
        return cls(**named, copy=_rates(facts.get("copy")))

    def matmul_flops_per_s(self, dtype: str, regime: Regime = "burst") -> float | None:
        """The measured matmul peak in `dtype`."""
        return self.matmul.get(dtype, Rate()).of(regime)


def _rates(value: Any) -> Rate:
    return Rate(_rate(value.get("burst")), _rate(value.get("sustained"))) if isinstance(value, Mapping) else Rate()


def _rate(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if good else None


@dataclass(frozen=True)
class Placed:
    """An operation on the roofline. `bound` is "compute", "memory", or "" where a peak is missing.

    `roof_s` is the time the peaks allow and `attained_fraction` that time over the measured one.
    """

    intensity_flop_per_byte: float | None
    bound: Literal["compute", "memory", ""]
    attained_fraction: float | None
    roof_s: float | None


def place(operation: Operation, time_s: float | None, peaks: Peaks, dtype: str, regime: Regime = "burst") -> Placed:
    """Where an operation that took `time_s` lies under the peaks.

    A matmul or attention is bound by the slower of its FLOPs at the matmul peak of `dtype` and its bytes at the copy's
    bandwidth; with packed weights too, whose products are computed in `dtype`. An elementwise operation is bound by its
    bytes alone. Nothing is attained where no positive time was measured.
    """
    compute_s, memory_s = _roofs_s(operation, peaks, dtype, regime)
    intensity = operation.flops / operation.bytes if operation.bytes else None
    if compute_s is None or memory_s is None:
        return Placed(intensity, "", None, None)
    roof_s = max(compute_s, memory_s)
    timed = time_s is not None and math.isfinite(time_s) and time_s > 0
    attained = roof_s / time_s if timed and time_s is not None and roof_s > 0 else None
    return Placed(intensity, "compute" if compute_s > memory_s else "memory", attained, roof_s)


def _roofs_s(operation: Operation, peaks: Peaks, dtype: str, regime: Regime) -> tuple[float | None, float | None]:
    """Seconds that the FLOPs and that the bytes take at the peaks; an elementwise operation's FLOPs take none."""
    bandwidth = peaks.copy.of(regime)
    memory_s = None if bandwidth is None else operation.bytes / bandwidth
    if operation.kind == "elementwise":
        return 0.0, memory_s
    rate = peaks.matmul_flops_per_s(dtype, regime)
    return None if rate is None else operation.flops / rate, memory_s


def mfu(
    operations: Sequence[Operation], time_s: float, peaks: Peaks, dtype: str, regime: Regime = "burst"
) -> float | None:
    """Model FLOPs utilisation: FLOPs of matmuls and attention over what the measured matmul peak gives in `time_s`.

    None where that peak was not measured. Raises MeasurementError for a time that is not positive.
    """
    if units.missing(time_s) or time_s <= 0:
        raise MeasurementError(f"MFU needs a positive time, found {time_s!r} s")
    rate = peaks.matmul_flops_per_s(dtype, regime)
    flops = sum(o.flops for o in operations if o.kind != "elementwise")
    return None if rate is None else flops / time_s / rate


def operation_rows(
    operations: Sequence[Operation],
    times: Mapping[tuple[str, str], Interval],
    peaks: Peaks,
    dtype: str,
    regime: Regime = "burst",
) -> list[dict[str, Any]]:
    """Rows of the `operations` table, for the stages in which an operation was timed, in the order of the step.

    times: (stage, operation) -> seconds and their interval; the operation `unattributed` is what the stage takes beyond
    the others, and comes last. Raises MeasurementError for a time of something that is no operation of the step.
    """
    known = {(o.stage, o.operation) for o in operations}
    strangers = [key for key in times if key not in known and key[1] != UNATTRIBUTED]
    if strangers:
        raise MeasurementError(f"{strangers[0][1]!r} is no operation of stage {strangers[0][0]!r} in this step")
    rows: list[dict[str, Any]] = []
    shown = [total.path for total in cost.by_stage(operations) if any(stage == total.path for stage, _ in times)]
    for stage in shown:
        for o in operations:
            timed = times.get((stage, o.operation))
            if o.stage == stage and (timed is not None or o.bytes):
                rows.append(_row(o, timed, peaks, dtype, regime))
        if (stage, UNATTRIBUTED) in times:
            rows.append({**_times(stage, UNATTRIBUTED, times[stage, UNATTRIBUTED]), "bound": ""})
    return rows


def _row(o: Operation, timed: Interval | None, peaks: Peaks, dtype: str, regime: Regime) -> dict[str, Any]:
    placed = place(o, None if timed is None else timed[0], peaks, dtype, regime)
    return {
        **_times(o.stage, o.operation, timed),
        "flops": float(o.flops),
        "bytes": o.bytes,
        "intensity_flop_per_byte": placed.intensity_flop_per_byte,
        "attained_fraction": placed.attained_fraction,
        "bound": placed.bound,
    }


def _times(stage: str, operation: str, timed: Interval | None) -> dict[str, Any]:
    time_s, low_s, high_s = (None, None, None) if timed is None else (None if math.isnan(x) else x for x in timed)
    return {
        "stage": stage,
        "operation": operation,
        "time_s": time_s,
        "time_low_s": low_s,
        "time_high_s": high_s,
    }


@dataclass(frozen=True)
class Size:
    """What a step's time depends on besides the model: pixels, batch, and caption tokens for all items or for each."""

    height: int
    width: int
    batch: int = 1
    caption_tokens: int | tuple[int, ...] = 32

    @classmethod
    def of(cls, values: object, *rest: int) -> "Size":
        """From a list of all four, or of the first of them with the rest given. Raises InputError for what is none."""
        names = ["height", "width", "batch", "caption_tokens"][: 4 - len(rest)]
        listed = isinstance(values, (list, tuple)) and len(values) == len(names)
        if not listed or not all(type(value) is int and value >= 1 for value in values):  # type: ignore[attr-defined]
            raise InputError(
                f"a size is a list of {', '.join(names)}, each an integer of at least 1, found {values!r:.60}"
            )
        return cls(*values, *rest)  # type: ignore[misc]


@dataclass(frozen=True)
class Range:
    """The smallest and largest FLOPs of matmuls and attention, and tokens of an item, of the steps calibrated with."""

    flops: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors of predictions: |predicted / measured - 1|."""

    median: float
    largest: float


@dataclass(frozen=True)
class Predictor:
    """Predicts the seconds of a step on the device, in the dtype and with the packing that it was calibrated with.

    A step takes `constant_s`, and `linear_s` for each FLOP of its matmuls and `attention_s` for each of its attention.
    Elementwise work grows as matmuls do and is in their share.
    """

    config: TransformerConfig
    patch_size: int | None
    constant_s: float
    linear_s: float
    attention_s: float
    range: Range

    def predict(self, size: Size) -> float:
        """Seconds of a step of `size`. Raises InputError or ConfigError for sizes the model does not take."""
        linear, attention = _work(size, self.config, self.patch_size)
        return self.constant_s + self.linear_s * linear + self.attention_s * attention

    def caution(self, size: Size) -> str:
        """What speaks against a prediction for `size`, in words; '' within the calibrated range."""
        reach = _range([size], self.config, self.patch_size)
        for name, (value, _), (low, high) in (
            ("FLOPs", reach.flops, self.range.flops),
            ("tokens", reach.tokens, self.range.tokens),
        ):
            if not low <= value <= high:
                return f"{value:.4g} {name} lie outside the calibrated {low:.4g} to {high:.4g}"
        return ""

    def valid(self, size: Size) -> bool:
        """Whether FLOPs and tokens of `size` lie within what was calibrated."""
        return not self.caution(size)

    def errors(self, points: Sequence[tuple[Size, float]]) -> Errors:
        """How far predictions are from measured (size, seconds). Raises MeasurementError for none or bad times."""
        if not points:
            raise MeasurementError("errors of a prediction need measured points, found none")
        found = [abs(self.predict(size) / time_s - 1) for size, time_s in _checked(points)]
        return Errors(float(np.median(found)), max(found))


def calibrate(
    points: Sequence[tuple[Size, float]], config: TransformerConfig, patch_size: int | None = None
) -> Predictor:
    """A Predictor from measured (size, seconds) of one model on one device, by least squares of relative errors.

    Three different sizes are enough; `telling_sizes` says which of many. No coefficient is negative. Peaks play no
    part: shares of the time at the peaks predicted no better. Raises MeasurementError for fewer sizes and for times
    that are not positive.
    """
    sizes = [size for size, _ in _checked(points)]
    times = np.array([time_s for _, time_s in points])
    columns = _columns(sizes, config, patch_size)
    scale = columns.max(axis=0)
    found, _ = nnls(columns / scale / times[:, None], np.ones(len(times)))
    constant_s, linear_s, attention_s = (float(x) for x in found / scale)
    return Predictor(config, patch_size, constant_s, linear_s, attention_s, _range(sizes, config, patch_size))


def telling_sizes(sizes: Sequence[Size], config: TransformerConfig, patch_size: int | None = None) -> tuple[Size, ...]:
    """The three of `sizes` that tell a constant, linear work and attention apart best; to calibrate with.

    They are those of the largest determinant of the three columns, each in shares of the whole step: as a rule the
    smallest step, the one with the most tokens an item, and a large batch of small images. Raises MeasurementError for
    fewer than three different sizes.
    """
    different = list(dict.fromkeys(sizes))
    columns = _columns(different, config, patch_size)
    columns[:, 0] = columns[:, 1:].sum(axis=1).min()
    columns /= columns[:, 1:].sum(axis=1, keepdims=True)
    best = max(combinations(range(len(different)), 3), key=lambda three: abs(np.linalg.det(columns[list(three)])))
    return tuple(different[i] for i in best)


def require_calibrating(sizes: Sequence[Size]) -> None:
    """Raise MeasurementError for fewer than three different sizes."""
    if len(set(sizes)) < 3:
        raise MeasurementError(f"a calibration needs three different sizes, found {len(set(sizes))}")


def _checked(points: Sequence[tuple[Size, float]]) -> Sequence[tuple[Size, float]]:
    for size, time_s in points:
        if units.missing(time_s) or time_s <= 0:
            raise MeasurementError(f"a prediction needs positive measured times, found {time_s!r} s for {size}")
    return points


def _columns(sizes: Sequence[Size], config: TransformerConfig, patch_size: int | None) -> NDArray[np.float64]:
    """What a step's time is made of, a row a size: one, FLOPs of matmuls, FLOPs of attention."""
    require_calibrating(sizes)
    return np.array([(1.0, *_work(size, config, patch_size)) for size in sizes])


def _work(size: Size, config: TransformerConfig, patch_size: int | None) -> tuple[int, int]:
    """FLOPs of a step's matmuls and of its attention."""
    operations = cost.step(config, size.height, size.width, size.batch, size.caption_tokens, patch_size=patch_size)
    linear, attention = (sum(o.flops for o in operations if o.kind == kind) for kind in ("matmul", "attention"))
    return linear, attention


def _range(sizes: Sequence[Size], config: TransformerConfig, patch_size: int | None) -> Range:
    flops = [sum(_work(size, config, patch_size)) for size in sizes]
    tokens = [
        cost.token_lengths(config, s.height, s.width, s.batch, s.caption_tokens, patch_size)[0].joint for s in sizes
    ]
    return Range((min(flops), max(flops)), (min(tokens), max(tokens)))
