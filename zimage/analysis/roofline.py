"""How near to a device's measured limits operations come, and how long a step of another size will take.

The limits are peaks measured on the device, never a data sheet's: matrix products bound matmuls and attention, a copy's
bandwidth bounds everything. Where a peak that is needed was not measured, the answer is None and the bound is ''.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from zimage.analysis import cost
from zimage.analysis.cost import UNATTRIBUTED, Operation
from zimage.config import TransformerConfig
from zimage.errors import MeasurementError
from zimage.quantization import Quantization

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Regime = Literal["burst", "sustained"]
Form = Literal["sum", "floor"]
Interval = tuple[float, float, float]  # a time and the two ends of its interval, in seconds

# A measured peak may itself be short by this: nothing is taken to run faster than the peak divided by it.
_SHORT_PEAK = 0.8
# How much better (root mean square of relative errors) a floor must fit than a sum to be preferred.
_CLEARLY_BETTER = 0.01


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
    if not math.isfinite(time_s) or time_s <= 0:
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


@dataclass(frozen=True)
class Range:
    """The smallest and largest FLOPs of a step, and tokens of an item, that a prediction was calibrated with."""

    flops: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors of predictions: |predicted / measured - 1|."""

    median: float
    largest: float


@dataclass(frozen=True)
class Predictor:
    """Predicts the seconds of a step on one device, for one model, dtype and packing, from a calibration.

    The work of a step is `linear` times what grows with its tokens (matmuls and elementwise operations) plus
    `attention` times what grows with their square. Both are seconds at the measured peaks where there are any, and
    FLOPs else. To it a constant is either added (`form` "sum": launches and other work beside) or the time never falls
    below it (`form` "floor": a host that prepares the work while the device computes).
    """

    config: TransformerConfig
    dtype: str
    quantization: str | Quantization | None
    patch_size: int | None
    peaks: Peaks | None
    form: Form
    constant_s: float
    linear: float
    attention: float
    range: Range

    def predict(self, size: Size) -> float:
        """Seconds of a step of `size`. Raises InputError or ConfigError for sizes the model does not take."""
        linear, attention = _work(self.operations(size), self.peaks, self.dtype)
        return float(_time_s(self.form, self.constant_s, self.linear * linear + self.attention * attention))

    def caution(self, size: Size) -> str:
        """What speaks against a prediction for `size`, in words; '' within the calibrated range."""
        flops, tokens = _extent(self.operations(size), self.config, size, self.patch_size)
        for name, value, (low, high) in (("FLOPs", flops, self.range.flops), ("tokens", tokens, self.range.tokens)):
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

    def operations(self, size: Size) -> list[Operation]:
        """The operations of a step of `size`."""
        return _operations(size, self.config, self.dtype, self.quantization, self.patch_size)


def calibrate(
    points: Sequence[tuple[Size, float]],
    config: TransformerConfig,
    dtype: str,
    quantization: str | Quantization | None = None,
    peaks: Peaks | None = None,
    patch_size: int | None = None,
    form: Form | None = None,
) -> Predictor:
    """A Predictor from measured (size, seconds) of one model on one device, by least squares of relative errors.

    Three different sizes are enough; `telling_sizes` says which of many. No coefficient is negative, and with peaks
    none has work run notably faster than they allow. `form` is the Predictor's: a GPU's time has a floor, because the
    host prepares its work meanwhile; a CPU's is a sum. Left out, a floor is taken where it fits clearly better, which
    three points hardly ever show. Raises MeasurementError for fewer sizes, times that are not positive, and an unknown
    form.
    """
    checked = _checked(points)
    if len({size for size, _ in checked}) < 3:
        raise MeasurementError(f"a calibration needs three different sizes, found {len({s for s, _ in checked})}")
    steps = [_operations(size, config, dtype, quantization, patch_size) for size, _ in checked]
    usable = peaks is not None and None not in (peaks.matmul_flops_per_s(dtype), peaks.copy.burst)
    peaks = peaks if usable else None
    work = np.array([_work(step, peaks, dtype) for step in steps])
    times = np.array([time_s for _, time_s in checked])
    least = 0.0 if peaks is None else _SHORT_PEAK
    fits = {"sum": _fit_sum(work, times, least), "floor": _fit_floor(work, times, least)}
    if form is None:
        form = "floor" if fits["floor"][0] < fits["sum"][0] - _CLEARLY_BETTER else "sum"
    if form not in fits:
        raise MeasurementError(f"form must be sum or floor, found {form!r}")
    _, constant, linear, attention = fits[form]
    extents = [_extent(step, config, size, patch_size) for step, (size, _) in zip(steps, checked, strict=True)]
    flops, tokens = zip(*extents, strict=True)
    reach = Range((min(flops), max(flops)), (min(tokens), max(tokens)))
    return Predictor(config, dtype, quantization, patch_size, peaks, form, constant, linear, attention, reach)


def telling_sizes(sizes: Sequence[Size], config: TransformerConfig, patch_size: int | None = None) -> tuple[Size, ...]:
    """The three of `sizes` that tell a constant, linear work and attention apart best; to calibrate with.

    They are those of the largest determinant of the three columns, each in shares of the whole step: as a rule the
    smallest step, the one with the most tokens an item, and a large batch of small images. Raises MeasurementError for
    fewer than three different sizes.
    """
    different = list(dict.fromkeys(sizes))
    if len(different) < 3:
        raise MeasurementError(f"a calibration needs three different sizes, found {len(different)}")
    work = np.array([_work(_operations(s, config, "float32", None, patch_size), None, "float32") for s in different])
    columns = np.column_stack([np.full(len(work), work.sum(axis=1).min()), work]) / work.sum(axis=1)[:, None]
    best = max(combinations(range(len(different)), 3), key=lambda three: abs(np.linalg.det(columns[list(three)])))
    return tuple(different[i] for i in best)


def _checked(points: Sequence[tuple[Size, float]]) -> Sequence[tuple[Size, float]]:
    for size, time_s in points:
        if not math.isfinite(time_s) or time_s <= 0:
            raise MeasurementError(f"a calibration needs positive times, found {time_s!r} s for {size}")
    return points


def _operations(
    size: Size,
    config: TransformerConfig,
    dtype: str,
    quantization: str | Quantization | None,
    patch_size: int | None,
) -> list[Operation]:
    return cost.step(config, size.height, size.width, size.batch, size.caption_tokens, dtype, quantization, patch_size)


def _extent(
    operations: Sequence[Operation], config: TransformerConfig, size: Size, patch_size: int | None
) -> tuple[int, int]:
    """FLOPs of a step and tokens of one of its items."""
    found, _ = cost.token_lengths(config, size.height, size.width, size.batch, size.caption_tokens, patch_size)
    return sum(o.flops for o in operations), found.joint


def _work(operations: Sequence[Operation], peaks: Peaks | None, dtype: str) -> tuple[float, float]:
    """Linear work and attention's: seconds at the peaks, or FLOPs of matmuls and of attention.

    Elementwise work grows as matmuls do, so that three points could not tell them apart.
    """
    sums = {True: 0.0, False: 0.0}
    for o in operations:
        if peaks is not None:
            placed = place(o, None, peaks, dtype)
            assert placed.roof_s is not None
            sums[o.kind == "attention"] += placed.roof_s
        elif o.kind != "elementwise":
            sums[o.kind == "attention"] += o.flops
    return sums[False], sums[True]


def _time_s(form: str, constant_s: float, work_s: Any) -> Any:
    return constant_s + work_s if form == "sum" else np.maximum(constant_s, work_s)


def _fit_sum(work: NDArray[Any], times: NDArray[Any], least: float) -> tuple[float, float, float, float]:
    """Error, constant, linear and attention of a constant plus work."""
    columns = np.column_stack([np.ones(len(times)), work])
    constant, linear, attention = _least_squares(columns, times, np.array([0.0, least, least]))
    return _error("sum", constant, work @ [linear, attention], times), constant, linear, attention


def _fit_floor(work: NDArray[Any], times: NDArray[Any], least: float) -> tuple[float, float, float, float]:
    """Error, constant, linear and attention of work that takes at least a constant time.

    Which of the fastest points lie on the floor is tried out.
    """
    order = np.argsort(times)
    fits = []
    for count in range(1, len(times)):
        floor, above = order[:count], order[count:]
        constant = float(np.sum(1 / times[floor]) / np.sum(1 / times[floor] ** 2))  # least squares, as below
        linear, attention = _least_squares(work[above], times[above], np.array([least, least]))
        fits.append((_error("floor", constant, work @ [linear, attention], times), constant, linear, attention))
    return min(fits)


def _least_squares(columns: NDArray[Any], times: NDArray[Any], least: NDArray[Any]) -> list[float]:
    """Coefficients, each at least `least`, of the smallest squared relative errors.

    A faint wish for the last two to be alike decides where the points do not.
    """
    scale = columns.max(axis=0)
    scale[-2:] = scale[-2:].max()
    wish = np.zeros(len(scale))
    wish[-2:] = 1e-3 / times.mean(), -1e-3 / times.mean()
    rows = np.vstack([columns / scale / times[:, None], wish])
    wanted = np.append(np.ones(len(times)), 0.0) - rows @ (least * scale)
    found, _ = nnls(rows, wanted)
    return [float(x) for x in found / scale + least]


def _error(form: str, constant: float, work_s: NDArray[Any], times: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((_time_s(form, constant, work_s) / times - 1) ** 2)))
