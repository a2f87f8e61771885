"""Quality of an arm over a whole denoising run: how far its latents drift, and what its velocities are off by.

Errors are of `found` against `wanted`, pooled over all seeds: the relative L2 error |found - wanted| / |wanted|, the
cosine between both, and the SNR in decibels, 20 log10(|wanted| / |found - wanted|), infinite where nothing differs.
Intervals are 95 % percentile bootstraps over six seeds or more, a seed being drawn with all its steps.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from zimage import scheduler
from zimage.errors import InputError
from zimage.measure import statistics
from zimage.transformer import Captions, Transformer

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Row = dict[str, Any]
Result = TypeVar("Result")
RESAMPLES = 1000
LEVEL = 0.95
FEWEST = 6  # seeds of an interval, as many as the exact 95 % interval of a ratio needs
AT_ONCE = 50  # seeds denoised together


@dataclass(frozen=True)
class Trajectory:
    """What a denoising run went through, in fp32: S steps of B seeds.

    sigmas [S + 1] from 1 to 0; latents [S + 1, B, C, H, W] from noise to what was drawn; velocities [S, B, C, H, W],
    where velocities[i] were computed at latents[i].
    """

    sigmas: tuple[float, ...]
    latents: Floats
    velocities: Floats

    @property
    def drawn(self) -> Floats:
        """The latents [B, C, H, W] at the end."""
        return self.latents[-1]

    def first(self, seeds: int) -> "Trajectory":
        """Of the first so many seeds alone."""
        return Trajectory(self.sigmas, self.latents[:, :seeds], self.velocities[:, :seeds])


class Errors(NamedTuple):
    """Of a number of arrays against others: pooled, see the module's text."""

    relative_l2: float
    cosine: float
    snr_db: float


def trajectory(
    model: Transformer,
    captions: Captions,
    size: tuple[int, int],
    steps: int = 8,
    shift: float = 3.0,
    seed: int = 0,
    patch_size: int | None = None,
    at_once: int = AT_ONCE,
) -> Trajectory:
    """All latents and velocities of `scheduler.sample` with the same arguments; item i starts from seed + i.

    At most `at_once` items are denoised together. Raises InputError as `sample` does, and where a velocity is not
    finite, with the step.
    """
    counted = isinstance(captions, (mx.array, list, tuple)) and not (
        isinstance(captions, mx.array) and not captions.ndim
    )
    count = max(len(captions) if counted else 1, 1)  # what is no list of captions is refused by `walk`
    parts = []
    for start in range(0, count, at_once):
        some = captions[start : start + at_once] if counted else captions
        walked = scheduler.walk(model, some, size, steps, shift, seed + start if start else seed, patch_size)
        latents, velocities = [], []
        for i, step in enumerate(walked):
            if not i:
                latents.append(_numpy(step.latents))
            latents.append(_numpy(step.after))
            velocities.append(_finite(_numpy(step.velocity), i))
        parts.append((np.stack(latents), np.stack(velocities)))
    joined = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
    return Trajectory(tuple(scheduler.sigmas(steps, shift)), *joined)


def along(
    model: Transformer,
    reference: Trajectory,
    captions: Captions,
    patch_size: int | None = None,
    at_once: int = AT_ONCE,
) -> Floats:
    """The model's velocities [S, B, C, H, W] at every latent of another's run, so that no error of one step enters the
    next. Captions are those of the reference's seeds, and at_once that of its `trajectory`: a batch of another size
    may be rounded otherwise. Raises InputError where a velocity is not finite."""
    parts = []
    for start in range(0, reference.latents.shape[1], at_once):
        some, found = captions[start : start + at_once], []
        for i, (sigma, latents) in enumerate(zip(reference.sigmas[:-1], reference.latents[:-1], strict=True)):
            velocity = scheduler.velocity(model, mx.array(latents[start : start + at_once]), some, sigma, patch_size)
            found.append(_finite(_numpy(velocity), i))
        parts.append(np.stack(found))
    return np.concatenate(parts, axis=1)


def errors(found: Floats, wanted: Floats) -> Errors:
    """The errors of arrays of any one shape, pooled. Raises InputError for two shapes and for a reference of zeros."""
    _same_shape(found, wanted)
    return Errors(*(row["value"] for row in interval_rows(found.reshape(1, -1), wanted.reshape(1, -1))))


def drift(reference: Trajectory, arm: Trajectory, seed: int = 0) -> list[Row]:
    """Rows of a `quality` table: after each step 1 to S, how far the arm's latents are from the reference's.

    Three rows a step: `drift_relative_l2`, `drift_cosine` and `drift_snr_db`, with low and high (as `interval_rows`)
    and the count of seeds. seed: of the bootstrap. Raises InputError for runs that don't start from the same noise or
    have other noise levels.
    """
    if reference.sigmas != arm.sigmas:
        levels = [f"{len(each.sigmas) - 1} steps" for each in (reference, arm)]
        raise InputError(
            f"drift needs two runs with the same noise levels, found {levels[0]} and {levels[1]}, or shifts"
        )
    _same_shape(arm.latents, reference.latents)
    if not np.allclose(arm.latents[0], reference.latents[0], rtol=0.01, atol=0.01):  # rounded latents may be compared
        raise InputError("drift needs two runs from the same noise; give both the same seed and captions")
    rows = []
    for step in range(1, len(reference.sigmas)):
        found = interval_rows(arm.latents[step], reference.latents[step], "drift_", seed)
        rows += [{"step": step, **row} for row in found]
    return rows


def velocity_rows(found: Floats, wanted: Floats, baseline: str, seed: int = 0) -> list[Row]:
    """Rows of a `quality` table: errors of velocities [S, B, C, H, W] against those of the model called `baseline`."""
    rows = interval_rows(np.moveaxis(found, 1, 0), np.moveaxis(wanted, 1, 0), "", seed)
    names = {"relative_l2": "relative_l2_error", "cosine": "cosine_similarity", "snr_db": "snr_db"}
    return [{**row, "metric": names[row["metric"]], "baseline": baseline} for row in rows]


def interval_rows(found: Floats, wanted: Floats, prefix: str = "", seed: int = 0) -> list[Row]:
    """The errors of arrays [B, ...] as rows: metric (`prefix` before its name), value, low, high, count.

    low and high come from resampling the B items; they are None for fewer than FEWEST, of which resamples are too much
    alike. Raises InputError as `errors`.
    """
    _same_shape(found, wanted)
    sums, count = _sums(found, wanted, axis=tuple(range(1, found.ndim))), len(found)
    values = _pooled(sums.sum(axis=1))
    if not np.isfinite(values[0]):
        raise InputError("an error is relative to a reference, and this one is zero everywhere")
    resampled = _pooled(sums @ _weights(count, seed).T) if count >= FEWEST else [None] * len(values)
    rows = []
    for name, value, some in zip(Errors._fields, values, resampled, strict=True):
        low, high = (None, None) if some is None else _percentiles(some)
        rows.append({"metric": prefix + name, "value": float(value), "low": low, "high": high, "count": count})
    return rows


def error_interval(squared: Doubles, wanted: Doubles, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """The interval of the relative L2 error of B items by their squared errors and squared norms [B].

    As of `interval_rows`: from resampling the items, None for fewer than FEWEST.
    """
    if len(squared) < FEWEST:
        return None, None
    drawn = _weights(len(squared), seed)
    return _percentiles(np.sqrt(drawn @ squared / (drawn @ wanted)))


def error_ratio(found: Floats, beside: Floats, wanted: Floats, level: float = 1 - LEVEL) -> tuple[float, float]:
    """The interval of the relative L2 error of `found` by that of `beside`, arrays [B, ...] of the same B seeds.

    The exact signed-rank interval over the seeds' own ratios, so that what is harder about some seeds is no difference
    between the two. It misses the typical ratio with a chance of `level` at most: that of one of several is to be
    shared out among them. 0 to infinity with fewer than `fewest_seeds` and where only some seeds have no error; exact
    where one side has none at all, (1, 1) where neither has. Raises InputError as `errors`.
    """
    for each in (found, beside):
        _same_shape(each, wanted)
    axis = tuple(range(1, found.ndim))
    own, other = (_sums(each, wanted, axis)[0] for each in (found, beside))
    if not own.any() or not other.any():
        exact = 1.0 if not own.any() and not other.any() else 0.0 if not own.any() else math.inf
        return exact, exact
    if not ((own > 0) & (other > 0)).all():
        return 0.0, math.inf
    ratio = statistics.analyse(np.log(own / other) / 2, level)
    return ratio.low, ratio.high


def fewest_seeds(level: float = 1 - LEVEL) -> int:
    """How many seeds an interval needs that misses with a chance of `level` at most: 6 for 0.05."""
    return next(count for count in itertools.count(1) if statistics.critical(count, level) >= 0)


def repeated(compute: Callable[[], Result], arrays: Callable[[Result], list[Floats]]) -> tuple[Result, float]:
    """What `compute()` gives, and the largest absolute difference of its `arrays` when it is computed once more.

    0 where both agree bit for bit, and only there.
    """
    first, second = compute(), compute()
    differences = [0.0]
    for a, b in zip(arrays(first), arrays(second), strict=True):
        if a.tobytes() != b.tobytes():
            differences.append(max(float(np.abs(a.astype(np.float64) - b).max()), float(np.finfo(np.float32).tiny)))
    return first, max(differences)


@dataclass(frozen=True)
class Estimate:
    """A number estimated from `count` samples, and its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def frechet(mean_a: Doubles, covariance_a: Doubles, mean_b: Doubles, covariance_b: Doubles) -> Doubles:
    """Frechet distance of Gaussians: |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of their covariances.

    Means [..., D], covariances [..., D, D], which may be singular; a distance for each. D. C. Dowson and B. V. Landau,
    Journal of Multivariate Analysis 12, 1982.
    """
    values, vectors = np.linalg.eigh(covariance_b)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    # The square root of A B has the trace of that of the symmetric B^(1/2) A B^(1/2).
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_a @ root), 0)).sum(axis=-1)
    traces = np.trace(covariance_a, axis1=-2, axis2=-1) + np.trace(covariance_b, axis1=-2, axis2=-1)
    distance: Doubles = np.maximum(np.square(mean_a - mean_b).sum(axis=-1) + traces - 2 * crossed, 0)
    return distance


def frechet_estimate(
    features: Doubles,
    reference: Doubles,
    strata: Integers,
    seed: int = 0,
    beside: Doubles | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Frechet distance of samples [N, D] to a reference [M, D] that is taken as it is, free of the samples' bias.

    The plain distance of N samples is too large, the more so the fewer they are, and that of a resample once more by
    as much: so the value is less that bias, and the interval is the pivotal one, 2 * distance - percentiles. A value
    may therefore come out at zero. As many samples were drawn of each of the `strata` [N] as were wanted, so resamples
    are drawn within them, one fewer than there are, which leaves their variance unbiased. With `beside` [N, D],
    samples of the same seeds, it is by how much `features` are farther from the reference than these, resampled in
    pairs. Raises InputError for a stratum of one sample and for shapes that don't fit.
    """
    given = [features] if beside is None else [features, beside]
    if any(each.ndim != 2 or each.shape != features.shape or len(each) != len(strata) for each in given):
        raise InputError(f"a Frechet distance needs samples [N, D] and strata [N], found {[e.shape for e in given]}")
    if reference.ndim != 2 or len(reference) < 2 or reference.shape[1] != features.shape[1]:
        raise InputError(f"a Frechet distance of {features.shape} needs a reference [M, D], found {reference.shape}")
    if not len(strata) or np.unique(strata, return_counts=True)[1].min() < 2:
        raise InputError(f"a Frechet distance needs two samples at least of every label, found {len(strata)} in all")
    wanted, weights = _gaussian(reference), _within(strata, seed, resamples)
    plain, resampled = [], []
    for each in given:
        plain.append(float(frechet(*_gaussian(each), *wanted)))
        resampled.append(frechet(*_gaussian(each, weights), *wanted))
    if beside is None:
        value, low, high = (max(x, 0.0) for x in _pivotal(plain[0], resampled[0]))
        return Estimate(value, low, high, len(features))
    return Estimate(*_pivotal(plain[0] - plain[1], resampled[0] - resampled[1]), len(features))


def _within(strata: Integers, seed: int, resamples: int) -> Doubles:
    """Weights [resamples, N] of resamples within the strata [N], each of one sample fewer than the stratum has."""
    rng, weights = np.random.default_rng(seed), np.zeros((resamples, len(strata)))
    for stratum in np.unique(strata):
        (own,) = np.nonzero(strata == stratum)
        drawn = rng.multinomial(len(own) - 1, [1 / len(own)] * len(own), resamples)
        weights[:, own] = drawn * (len(own) / (len(own) - 1))
    return weights


def _gaussian(samples: Doubles, weights: Doubles | None = None) -> tuple[Doubles, Doubles]:
    """Mean [D] and covariance [D, D] of samples [N, D]; with weights [R, N] those of every resample."""
    count, dims = samples.shape
    taken = np.ones((1, count)) if weights is None else weights
    middle = samples.mean(axis=0)  # moments about it lose no digits
    apart = samples - middle
    mean = taken @ apart / count
    products = (taken @ (apart[:, :, None] * apart[:, None, :]).reshape(count, -1)).reshape(-1, dims, dims)
    covariance = (products - count * mean[:, :, None] * mean[:, None, :]) / (count - 1)
    return (middle + mean, covariance) if weights is not None else (middle + mean[0], covariance[0])


def _pivotal(value: float, resampled: Doubles) -> tuple[float, float, float]:
    """`value` less the bias of its resamples, and its pivotal interval."""
    low, high = _percentiles(resampled)
    return 2 * value - float(resampled.mean()), 2 * value - high, 2 * value - low


def _numpy(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32))


def _finite(velocity: Floats, step: int) -> Floats:
    if not np.isfinite(velocity).all():
        raise InputError(f"step {step + 1} gave a velocity that is not finite; use another dtype or packing")
    return velocity


def _same_shape(found: Floats, wanted: Floats) -> None:
    if found.shape != wanted.shape or not found.size:
        raise InputError(f"errors need two arrays of one shape, found {list(found.shape)} and {list(wanted.shape)}")


def _sums(found: Floats, wanted: Floats, axis: tuple[int, ...]) -> Doubles:
    """Sums of squares of the error, of what was wanted and of what was found, and their product: [4, B]."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    sums: Doubles = np.stack([np.sum(x, axis=axis) for x in (np.square(a - b), np.square(b), np.square(a), a * b)])
    return sums


def _pooled(sums: Doubles) -> Doubles:
    """The Errors [3, ...] of sums [4, ...]."""
    error, wanted, found, product = sums
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing differs, or nothing is there
        cosine = np.minimum(np.where(found > 0, product / np.sqrt(wanted * found), 0.0), 1.0)
        pooled: Doubles = np.stack([np.sqrt(error / wanted), cosine, 10 * np.log10(wanted / error)])
    return pooled


def _weights(count: int, seed: int) -> Doubles:
    """How often each resample takes each of `count` items: [RESAMPLES, count]."""
    drawn: Doubles = np.random.default_rng(seed).multinomial(count, [1 / count] * count, RESAMPLES).astype(np.float64)
    return drawn


def _percentiles(values: Doubles) -> tuple[float, float]:
    """Between which the middle LEVEL of the values lie."""
    ordered = np.sort(values)
    skipped = int((1 - LEVEL) / 2 * len(ordered))
    return float(ordered[skipped]), float(ordered[-1 - skipped])
