"""What MLX reaches on this device: matrix products, packed ones, dequantizing and copies, measured, never looked up.

Burst rates come from a few calls on a rested device, sustained ones from the second half of at least ten seconds. Peaks
are kept in the user's cache folder for the runs to come. MLX is loaded only to measure.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from zimage import backend, blas
from zimage.errors import MeasurementError
from zimage.measure.power import Sampler
from zimage.measure.samples import Timed

Peaks = dict[str, Any]

SUSTAINED_S = 10.0
ROWS = 4096  # of the left side of a packed product: a step's tokens at 1024 x 1024
REGIMES = {
    "burst": "fastest of seven calls on a rested device, the first left out; a call holds several operations where one "
    "is short",
    "sustained": f"rate over the second half of at least {SUSTAINED_S:g} s",
    "buffers": "reused",
}
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONGEST_CALL_S = 0.1
_CALL_S = 0.02  # a call holds several operations if one is shorter, so that submitting it hardly counts
_MOST_IN_A_CALL = 8
_REPEATS = 7
_LARGEST_FILE = 1 << 20
_REST_S = 0.1  # before a burst: the device gets away from its power limit
_PACKED_BITS = (4, 8)
_GROUP = 64
_CONDITIONS = ("power_source", "low_power_mode", "gpu_power_limit_w", "blas_threads", "other_busy_cores")
_QUIET_CORES = 0.3  # that other work may keep busy while a peak is taken for the device's own
_DECIDING = ("mlx", "driver", "blas")  # where one of these changes, what was kept before holds no longer

Advance = Callable[[float], None]


def measure(full: bool = False, advance: Advance = lambda _seconds: None) -> Peaks:
    """Measure this device. The quick form takes some seconds; `full` about `expected_s`.

    Gives a mapping that JSON can hold, rates in FLOP/s and bytes/s, None for what was not measured:
    `matmul` by dtype (`burst`, `sustained`, `size` of the square product), `quantized_matmul` by packing (also `rows`;
    full only), `dequantize` by packing (`burst`, `bytes` read and written), `copy` (`burst`, `sustained`, `bytes` of
    the array); what it depends on: `mlx`, `driver`, `blas`, `conditions`, `regimes`; the dates `measured` and
    `measured_full`; `under_load` (highest watts and temperature, throttle reasons).

    advance is told of the seconds that pass. Raises BackendError when MLX cannot be used, and MeasurementError when the
    device fails on the way, such as for want of memory.
    """
    facts = backend.device_facts()
    is_gpu = facts["device_type"] == "gpu"
    dtypes = ["float32", "bfloat16", *(["float16"] if is_metal(facts) else [])]
    parts: list[tuple[str, str, Callable[[], Peaks]]] = [
        *(("matmul", dtype, partial(_matmul, dtype, full, advance)) for dtype in dtypes),
        ("copy", "", partial(_copy, is_gpu, full, advance)),
        *(("dequantize", f"{bits}bit", partial(_dequantize, bits, is_gpu, advance)) for bits in _PACKED_BITS),
        *(
            ("quantized_matmul", f"{bits}bit", partial(_quantized_matmul, bits, is_gpu, advance))
            for bits in (_PACKED_BITS if full else ())
        ),
    ]
    peaks: Peaks = {"matmul": {}, "quantized_matmul": {}, "dequantize": {}}
    try:
        with Sampler() as sampler, _reused_buffers():
            for section, name, part in parts:
                if name:
                    peaks[section][name] = part()
                else:
                    peaks[section] = part()
                _free()
    except RuntimeError as error:  # MLX's own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MeasurementError(f"the peaks could not be measured: {reason}") from None
    power, today = sampler.power, datetime.now(UTC).date().isoformat()
    return peaks | {
        "under_load": {
            "power_w": power.max_power_w, "temperature_c": power.temperature_c,
            "throttle": None if power.throttle is None else list(power.throttle),
        },
        "measured": today,
        **({"measured_full": today} if full else {}),
        **{name: facts[name] for name in _DECIDING},
        "conditions": {name: facts[name] for name in _CONDITIONS},
        "regimes": REGIMES,
    }  # fmt: skip


def is_metal(facts: Mapping[str, str]) -> bool:
    """Whether these facts are of an Apple GPU."""
    return facts["device_type"] == "gpu" and not facts["mlx_build"].startswith("cuda")


def expected_s(full: bool, build: str) -> float:
    """About how long `measure` takes with this build of MLX."""
    if not full:
        return 5.0
    compiling = 60.0 if build.startswith("cuda") else 0.0  # a packed product of many rows, for each packing
    return 5.0 + SUSTAINED_S * (4 if build == "metal" else 3) + len(_PACKED_BITS) * (SUSTAINED_S + compiling)


def keep(device: str, peaks: Peaks) -> Peaks:
    """Keep the peaks measured on `device` in the user's cache folder, where there is one; gives these, completed.

    What was kept before and not measured this time stays, unless MLX, the driver or the BLAS has changed since. So
    does a higher rate under the same power, for the runs to come: the roof is the best that the device has reached,
    and a look beside other work does not lower it.
    """
    before = kept(device) or {}
    best = peaks
    if all(before.get(name) == peaks.get(name) for name in _DECIDING):
        best = peaks = _merged(before, peaks)
        if _power(before) == _power(peaks):
            best = _higher(before, peaks)
    folder = blas.cache_folder()
    if folder is not None:
        with suppress(OSError):  # a full disk costs the runs to come their peaks, and nothing else
            blas.write_atomically(folder / f"peaks-{device}.json", lambda draft: draft.write_text(json.dumps(best)))
    return peaks


def kept(device: str, facts: Mapping[str, str] | None = None) -> Peaks | None:
    """The peaks last kept for `device`; None if there are none that can be read.

    facts: about the device as it is now; peaks measured with another MLX, driver or BLAS are then None too.
    """
    folder = blas.cache_folder()
    try:
        peaks = None if folder is None else json.loads(_start_of(folder / f"peaks-{device}.json"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(peaks, dict):
        return None
    if facts is not None and any(peaks.get(name) != facts.get(name) for name in _DECIDING):
        return None
    return peaks


def _start_of(file: Path) -> str:
    """The text of a file that should be small; whatever lies there instead is not read to its end."""
    with file.open(encoding="utf-8") as content:
        return content.read(_LARGEST_FILE)


def here() -> Peaks:
    """The peaks kept for this device as it is now; where there are none they are measured, quickly, and kept.

    So they are where those kept were taken beside other work or with fewer BLAS threads; the best of each rate counts.
    Raises as `measure` does.
    """
    facts = backend.device_facts()
    found = kept(facts["device"], facts)
    if found is None or _held_back(found, facts):
        keep(facts["device"], measured := measure())
        found = kept(facts["device"]) or measured  # without a cache folder nothing is kept
    return found


def _held_back(peaks: Peaks, facts: Mapping[str, str]) -> bool:
    """Whether the device could not do its best when these were measured, as far as they say."""
    then = peaks.get("conditions")
    conditions = then if isinstance(then, dict) else {}
    busy, threads, now = (
        _number(value)
        for value in (conditions.get("other_busy_cores"), conditions.get("blas_threads"), facts.get("blas_threads"))
    )
    fewer = threads is not None and now is not None and threads < now
    return fewer or (busy is not None and busy > _QUIET_CORES)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _merged(before: Peaks, now: Peaks) -> Peaks:
    """`now`, with the values of `before` that are None or missing in it."""
    both = dict(now)
    for name, value in before.items():
        if isinstance(value, dict) and isinstance(both.get(name), dict) and name not in ("under_load", "conditions"):
            both[name] = _merged(value, both[name])
        elif both.get(name) is None:
            both[name] = value
    return both


def _higher(before: Peaks, now: Peaks) -> Peaks:
    """`now`, with those rates of `before` that are higher, and the sizes that reached them."""
    both = dict(now)
    for name, value in before.items():
        if isinstance(value, dict) and isinstance(both.get(name), dict):
            both[name] = _higher(value, both[name])
    for rate, size in (("burst", "size"), ("sustained", "sustained_size")):
        then, new = before.get(rate), now.get(rate)
        if isinstance(then, float) and isinstance(new, float) and math.isfinite(then) and then > new:
            both |= {name: before[name] for name in (rate, size) if name in before}
    return both


def _power(peaks: Peaks) -> Any:
    """What peaks were measured under, but for what only says how busy the machine was."""
    found = peaks.get("conditions")
    return {**found, "blas_threads": None, "other_busy_cores": None} if isinstance(found, dict) else found


def upgraded(peaks: Any) -> Peaks:
    """Peaks as runs hold them, in the form of `measure` also where the run is from before it; {} for none."""
    if not isinstance(peaks, dict):
        return {}
    if isinstance(peaks.get("matmul"), dict):
        return dict(peaks)
    new: Peaks = {"matmul": {}, "quantized_matmul": {}, "dequantize": {}}
    for dtype, prefix in (("float32", "float32_"), (str(peaks.get("dtype")), "")):
        if f"{prefix}matmul_flops_per_s" in peaks:
            rate, size = peaks[f"{prefix}matmul_flops_per_s"], peaks.get(f"{prefix}matmul_size")
            new["matmul"][dtype] = {"burst": rate, "sustained": None, "size": size}
    if "copy_bytes_per_s" in peaks:
        new["copy"] = {"burst": peaks["copy_bytes_per_s"], "sustained": None, "bytes": peaks.get("copy_bytes")}
    return new


def lines(peaks: Any) -> list[tuple[str, str]]:
    """Peaks as (name, value) in words, such as ("Matmul float32", "126 GFLOP/s at 2048 cubed")."""
    known = upgraded(peaks)
    found: list[tuple[str, str]] = []
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # a file that someone has changed
        for dtype, peak in known["matmul"].items():
            found.append((f"Matmul {dtype}", f"{_rates(peak, 'FLOP/s')} at {peak['size']} cubed"))
        for packing, peak in known["quantized_matmul"].items():
            shape = f"{peak['rows']} rows by {peak['size']} squared"
            found.append((f"Matmul {packing}", f"{_rates(peak, 'FLOP/s')} at {shape}"))
        for packing, peak in known["dequantize"].items():
            moved = f"read and written, {scaled(peak['bytes'], 'B')} in all"
            found.append((f"Dequantize {packing}", f"{_rates(peak, 'B/s')} {moved}"))
        moved = f"read and written, one array of {scaled(known['copy']['bytes'], 'B')}"
        found.append(("Copy bandwidth", f"{_rates(known['copy'], 'B/s')} {moved}"))
    return found


def scaled(value: float, unit: str) -> str:
    """A number with three digits and its unit's prefix: 1.26e11 FLOP/s is "126 GFLOP/s"."""
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
    scale, letter = next((s, x) for s, x in scales if value >= 0.9995 * s or s == 1.0)  # 999.6 M is rounded to 1 G
    return f"{value / scale:.3g} {letter}{unit}"


def _rates(peak: Mapping[str, Any], unit: str) -> str:
    long = peak.get("sustained")
    return scaled(peak["burst"], unit) + (f" ({scaled(long, unit)} sustained)" if long else "")


def _matmul(dtype: str, full: bool, advance: Advance) -> Peaks:
    """The best rate over growing square products, and the size that reached it."""
    best, best_size = 0.0, 0
    for size in _SIZES:
        left, right = _normal((size, size), dtype), _normal((size, size), dtype)
        found, time_s = _burst(lambda left=left, right=right: left @ right, 2.0 * size**3, advance)  # type: ignore[misc]
        if found > best:
            best, best_size = found, size
        if 8 * time_s > _LONGEST_CALL_S:
            break
    sustained = None
    if full:
        left, right = _normal((best_size, best_size), dtype), _normal((best_size, best_size), dtype)
        sustained = _sustained(lambda: left @ right, 2.0 * best_size**3, advance)
    peak = {"burst": best, "sustained": sustained, "size": best_size}
    return peak | ({"sustained_size": best_size} if full else {})  # a later quick look may find another size


def _copy(is_gpu: bool, full: bool, advance: Advance) -> Peaks:
    """The rate of reading an array and writing another, well beyond any cache."""
    import mlx.core as mx

    size = 2**28 if is_gpu else 2**25  # elements of 4 bytes
    array = _normal((size // 2**12, 2**12), "float32")
    moved = 2.0 * array.nbytes
    burst, _ = _burst(lambda: mx.negative(array), moved, advance)
    sustained = _sustained(lambda: mx.negative(array), moved, advance) if full else None
    size_bytes = int(array.nbytes)
    return {"burst": burst, "sustained": sustained, "bytes": size_bytes}


def _dequantize(bits: int, is_gpu: bool, advance: Advance) -> Peaks:
    """The rate of unpacking weights, packed bytes read and plain ones written."""
    import mlx.core as mx

    size = 2**27 if is_gpu else 2**23
    dtype = backend.default_dtype()
    codes, scales, biases = mx.quantize(_normal((size // 2**12, 2**12), dtype), group_size=_GROUP, bits=bits)
    mx.eval(codes, scales, biases)

    def work() -> Any:
        return mx.dequantize(codes, scales, biases, group_size=_GROUP, bits=bits)

    moved = sum(part.nbytes for part in (codes, scales, biases)) + size * getattr(mx, dtype).size
    burst, _ = _burst(work, float(moved), advance)
    return {"burst": burst, "bytes": int(moved)}


def _quantized_matmul(bits: int, is_gpu: bool, advance: Advance) -> Peaks:
    """The rate of products of `ROWS` rows with packed square weights, and their size."""
    import mlx.core as mx

    dtype = backend.default_dtype()
    best: Peaks = {"burst": 0.0, "sustained": None, "size": 0, "rows": ROWS}
    best_work: Callable[[], Any] | None = None
    for size in (4096,) if is_gpu else _SIZES:
        left = _normal((ROWS, size), dtype)
        codes, scales, biases = mx.quantize(_normal((size, size), dtype), group_size=_GROUP, bits=bits)
        mx.eval(codes, scales, biases)
        work = partial(mx.quantized_matmul, left, codes, scales, biases, True, _GROUP, bits)
        found, time_s = _burst(work, 2.0 * ROWS * size**2, advance)
        if found > best["burst"]:
            best |= {"burst": found, "size": size}
            best_work = work
        if 4 * time_s > _LONGEST_CALL_S:
            break
    if best_work is not None:
        best["sustained"] = _sustained(best_work, 2.0 * ROWS * best["size"] ** 2, advance)
    return best


@contextmanager
def _reused_buffers() -> Iterator[None]:
    """Let MLX keep every buffer for the next call: by default, on CPUs it keeps 32 MB and asks the system for the rest.

    Copies of 134 MB then measure the system's page faults: 1.3 GB/s on two cores of an AMD EPYC, and 11 GB/s without.
    """
    import mlx.core as mx

    before = mx.set_cache_limit(mx.get_memory_limit())
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _free() -> None:
    """Give back the memory of the part that is done, so that the largest of them decides what fits."""
    import mlx.core as mx

    mx.clear_cache()


def _normal(shape: tuple[int, ...], dtype: str) -> Any:
    """Finite values of the usual size, computed: products of zeros run faster than those of data."""
    import mlx.core as mx

    array = mx.random.normal(shape, key=mx.random.key(0)).astype(getattr(mx, dtype))
    mx.eval(array)
    return array


def _burst(work: Callable[[], Any], amount: float, advance: Advance) -> tuple[float, float]:
    """`amount` per second of the fastest call after the first, and the seconds of one `work`.

    A peak is the most that was reached, not what is usual; what a device keeps up is the sustained rate.
    """
    time_s = _fastest_s(_repeated(work, 1, advance))
    count = _in_a_call(time_s)
    if count > 1:
        time_s = _fastest_s(_repeated(work, count, advance)) / count
    return amount / time_s, time_s


def _sustained(work: Callable[[], Any], amount: float, advance: Advance) -> float:
    """`amount` per second over the second half of calls that take at least `SUSTAINED_S` together."""
    count = _in_a_call(_fastest_s(_repeated(work, 1, advance)))
    call = _repeated(work, count, advance)
    times: list[float] = []
    while math.fsum(times) < SUSTAINED_S or len(times) < 2:
        times.append(call())
    return amount * count / second_half_mean_s(times)


def second_half_mean_s(times: Iterable[float]) -> float:
    """The mean of the last calls that make up half of the whole time."""
    times = list(times)
    half, spent, calls = math.fsum(times) / 2, 0.0, 0
    for time_s in reversed(times):
        spent, calls = spent + time_s, calls + 1
        if spent >= half:
            break
    return spent / calls


def _in_a_call(time_s: float) -> int:
    return max(1, min(_MOST_IN_A_CALL, math.ceil(_CALL_S / time_s)))


def _repeated(work: Callable[[], Any], count: int, advance: Advance) -> Timed:
    """A timed call of `count` times `work`."""
    from zimage.measure.timing import timed  # here, because where MLX is broken its import fails

    call = timed(lambda: [work() for _ in range(count)])

    def told() -> float:
        time_s = call()
        advance(time_s)
        return time_s

    return told


def _fastest_s(call: Timed) -> float:
    from zimage.measure.timing import trial

    time.sleep(_REST_S)
    return min(trial(call, samples=_REPEATS, warm_up=0).samples_s)
