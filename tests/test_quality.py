"""Drift along a denoising run, errors of velocities, and the distance of two Gaussians, by hand-computed references."""

import math
from typing import Any

from zimage import quality, scheduler
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.quality import Trajectory
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest

SIZE = (4, 4)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(TransformerConfig.tiny())


@pytest.fixture(scope="module")
def captions() -> mx.array:
    return mx.random.normal((3, 2, 48), key=mx.random.key(1))


@pytest.fixture(scope="module")
def run(model: Transformer, captions: mx.array) -> Trajectory:
    return quality.trajectory(model, captions, SIZE, steps=2, seed=4)


def made(latents: Any, sigmas: tuple[float, ...] = (1.0, 0.0)) -> Trajectory:
    """A run with these latents [S + 1, B, ...]."""
    states = np.array(latents, np.float32)
    return Trajectory(sigmas, states, np.diff(states, axis=0))


def values(rows: list[quality.Row], step: int = 1) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows if row.get("step", step) == step}


def test_a_trajectory_is_what_sample_goes_through(model: Transformer, captions: mx.array, run: Trajectory) -> None:
    """It starts from the noise of its seeds, each step adds its velocity, and it ends where `sample` does, bitwise."""
    assert (run.latents.shape, run.velocities.shape) == ((3, 3, 4, *SIZE), (2, 3, 4, *SIZE))
    assert run.sigmas == tuple(scheduler.sigmas(2, 3.0))
    assert np.array_equal(run.latents[0], np.array(scheduler.noise(model, 3, SIZE, 4)))
    for i in range(2):
        moved = run.latents[i] + (run.sigmas[i] - run.sigmas[i + 1]) * run.velocities[i]
        assert np.allclose(moved, run.latents[i + 1], atol=1e-6)
    sampled = scheduler.sample(model, captions, SIZE, 2, 3.0, 4)
    assert np.array_equal(run.drawn, np.array(sampled))


def test_seeds_may_be_denoised_in_parts(model: Transformer, captions: mx.array, run: Trajectory) -> None:
    """Two at once or all at once, every seed goes the same way, up to rounding."""
    parts = quality.trajectory(model, captions, SIZE, steps=2, seed=4, at_once=2)
    assert np.allclose(parts.latents, run.latents, atol=1e-5)
    assert np.array_equal(run.first(2).latents, run.latents[:, :2])


def test_a_model_has_no_drift_from_itself(model: Transformer, captions: mx.array, run: Trajectory) -> None:
    """The same model computes the same bits: no error after any step, a cosine of 1, and no noise in its signal."""
    again, difference = quality.repeated(
        lambda: quality.trajectory(model, captions, SIZE, steps=2, seed=4), lambda t: [t.latents, t.velocities]
    )
    assert difference == 0
    rows = quality.drift(run, again)
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2]
    for step in (1, 2):
        assert values(rows, step) == {"drift_relative_l2": 0, "drift_cosine": 1, "drift_snr_db": math.inf}
    assert {row["count"] for row in rows} == {3}


def test_errors_by_hand() -> None:
    """[3, 4] off by [0, 0.5] is a tenth of its length: 20 dB; at right angles and of equal length, cosine 0."""
    found = quality.errors(np.array([3, 4.5], np.float32), np.array([3, 4], np.float32))
    assert found.relative_l2 == pytest.approx(0.1)
    assert found.snr_db == pytest.approx(20)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    turned = quality.errors(np.array([-4, 3], np.float32), np.array([3, 4], np.float32))
    assert turned == pytest.approx((math.sqrt(2), 0, -10 * math.log10(2)))


def test_drift_pools_its_seeds_and_bounds_them() -> None:
    """Seeds off by 10 % and exact ones are off by sqrt(0.01 / 2) together, between less and more when resampled;

    fewer than six have no interval, whose ends would be too near.
    """
    noise, ones, off = np.zeros((6, 4)), np.ones((6, 4)), np.array([[1.1] * 4, [1] * 4] * 3)
    first = quality.drift(made([noise, ones]), made([noise, off]))[0]
    assert (first["metric"], first["count"]) == ("drift_relative_l2", 6)
    assert first["value"] == pytest.approx(math.sqrt(0.01 / 2), rel=1e-5)
    assert 0 < first["low"] < 0.06 and 0.08 < first["high"] < 0.1
    for count in (1, 5):
        few = quality.drift(made([noise[:count], ones[:count]]), made([noise[:count], off[:count]]))[0]
        assert (few["low"], few["high"], few["count"]) == (None, None, count)


def test_velocities_along_another_run(model: Transformer, captions: mx.array, run: Trajectory) -> None:
    """At the latents of its own run a model gives the velocities of that run, and their errors name the reference."""
    found = quality.along(model, run, captions)
    assert np.array_equal(found, run.velocities)
    rows = quality.velocity_rows(1.1 * run.velocities, run.velocities, "float32")
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(
        {"relative_l2_error": 0.1, "cosine_similarity": 1, "snr_db": 20}, rel=1e-5
    )
    assert {(row["baseline"], row["count"]) for row in rows} == {("float32", 3)}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_velocities_along_a_run_in_its_own_parts_are_its_own(
    at_once: int, model: Transformer, captions: mx.array
) -> None:
    """In the batches that a run was drawn in, the same model gives its velocities bit for bit, the last part too."""
    sizes = []

    def watched(latents: mx.array, *others: Any) -> mx.array:
        sizes.append(latents.shape[0])
        return model(latents, *others)

    parts = quality.trajectory(model, captions, SIZE, steps=2, seed=4, at_once=at_once)
    found = quality.along(watched, parts, captions, at_once=at_once)  # type: ignore[arg-type]
    assert np.array_equal(found, parts.velocities) and max(sizes) == at_once


def test_a_difference_between_two_times_is_told() -> None:
    """What is computed a second time and comes out otherwise has its largest difference told, be it one of sign."""
    results = iter([np.array([1.0, 2], np.float32), np.array([1.0, 2.5], np.float32)])
    first, difference = quality.repeated(lambda: next(results), lambda x: [x])
    assert (first.tolist(), difference) == ([1, 2], 0.5)
    zeros = iter([np.array([0.0], np.float32), np.array([-0.0], np.float32)])
    assert quality.repeated(lambda: next(zeros), lambda x: [x])[1] > 0


@pytest.mark.parametrize(
    ("means", "covariances", "wanted"),
    [
        (([0, 0], [3, 4]), (np.eye(2), np.eye(2)), 25),
        (([0, 0], [0, 0]), (np.diag([1, 4]), np.diag([9, 16])), (3 - 1) ** 2 + (4 - 2) ** 2),
        # Turned by a right angle, [1, 4] is [4, 1]; at another angle the roots don't commute and the trace decides.
        (([1, 0], [0, 0]), (np.diag([1, 4]), np.diag([4, 1])), 1 + 1 + 1),
        (([0, 0], [0, 0]), (np.ones((2, 2)), np.array([[1, -1], [-1, 1]])), 4),
        (([1, 2], [1, 2]), (np.array([[2, 1], [1, 2]]), np.array([[2, 1], [1, 2]])), 0),
    ],
)
def test_the_distance_of_two_gaussians(means: Any, covariances: Any, wanted: float) -> None:
    """The Frechet distance of Gaussians whose distance is known, singular covariances among them, both ways round."""
    (a, b), (p, q) = (np.array(m, float) for m in means), (np.array(c, float) for c in covariances)
    assert quality.frechet(a, p, b, q) == pytest.approx(wanted, abs=1e-7)
    assert quality.frechet(b, q, a, p) == pytest.approx(wanted, abs=1e-7)


def test_a_frechet_distance_of_few_samples_is_free_of_bias() -> None:
    """Of ten samples of each of four kinds the interval covers the true distance, which the plain one far exceeds."""
    rng = np.random.default_rng(0)
    kinds, middles = np.arange(40) % 4, 3 * np.eye(4, 6)
    reference = rng.normal(size=(4000, 6)) + middles[np.arange(4000) % 4]
    covered, values, plain = 0, [], []
    for trial in range(40):
        samples = rng.normal(size=(40, 6)) + middles[kinds] + np.eye(6)[5]  # all apart by 1: a distance of 1
        found = quality.frechet_estimate(samples, reference, kinds, trial, resamples=200)
        covered += found.low <= 1 <= found.high
        values.append(found.value)
        plain.append(float(quality.frechet(*quality._gaussian(samples), *quality._gaussian(reference))))
    assert found.count == 40
    assert covered >= 35
    assert np.mean(values) == pytest.approx(1, abs=0.2)
    assert np.mean(plain) > 1.5


def test_a_frechet_distance_beside_anothers_is_compared_in_pairs() -> None:
    """Samples are no farther than themselves, exactly; moved by 2 they are 4 farther. Pairs are surer."""
    rng = np.random.default_rng(1)
    reference, samples, kinds = rng.normal(size=(500, 3)), rng.normal(size=(40, 3)), np.arange(40) % 2
    samples += reference.mean(axis=0) - samples.mean(axis=0)
    assert quality.frechet_estimate(samples, reference, kinds, beside=samples) == quality.Estimate(0, 0, 0, 40)
    moved = samples + 2 * np.eye(3)[0]
    farther = quality.frechet_estimate(moved, reference, kinds, beside=samples)
    assert farther.low < farther.value < farther.high
    assert farther.value == pytest.approx(4, abs=0.1)
    changed = moved + 0.1 * rng.normal(size=moved.shape)
    paired, alone = (quality.frechet_estimate(changed, reference, kinds, beside=b) for b in (moved, None))
    assert 5 * (paired.high - paired.low) < alone.high - alone.low


def test_resampling_gaussians_agrees_with_taking_the_samples() -> None:
    """A resample that takes one sample twice and another not has the mean and covariance of just those samples."""
    samples = np.random.default_rng(2).normal(5, 1, (4, 3))
    (mean,), (covariance,) = quality._gaussian(samples, np.array([[2.0, 0, 1, 1]]))
    taken = samples[[0, 0, 2, 3]]
    assert np.allclose(mean, taken.mean(axis=0)) and np.allclose(covariance, np.cov(taken.T))


def _not_finite(*_: Any) -> mx.array:
    return mx.full((1, 4, *SIZE), math.nan)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m, _c: quality.trajectory(m, None, SIZE), "at least one caption"),
        (lambda m, _c: quality.trajectory(m, mx.array(1.0), SIZE), "at least one caption"),
        (lambda m, c: quality.trajectory(m, c, SIZE, steps=0), "steps must be"),
        (lambda m, c: quality.trajectory(m, c, SIZE, seed=-1), "seed must be"),
        (lambda _m, c: quality.along(_not_finite, made(np.ones((2, 1, 4, *SIZE))), c), "step 1 gave a velocity that"),
        (lambda _m, _c: quality.drift(made([[[0.0]], [[1.0]]]), made([[[0.5]], [[1.0]]])), "from the same noise"),
        (
            lambda _m, _c: quality.drift(made([[[0.0]], [[1.0]]]), made([[[0.0]], [[1.0]]], (1.0, 0.1))),
            "same noise levels",
        ),
        (lambda _m, _c: quality.drift(made([[[0.0]], [[1.0]]]), made([[[0.0] * 2], [[1.0] * 2]])), "of one shape"),
        (
            lambda _m, _c: quality.frechet_estimate(np.ones((2, 3)), np.ones((5, 3)), np.arange(2)),
            "two samples at least",
        ),
        (lambda _m, _c: quality.frechet_estimate(np.ones((2, 3)), np.ones((5, 3)), np.arange(3)), "and strata"),
        (lambda _m, _c: quality.frechet_estimate(np.ones((2, 3)), np.ones((5, 4)), np.zeros(2)), "needs a reference"),
        (lambda _m, _c: quality.errors(np.ones(2, np.float32), np.zeros(2, np.float32)), "zero everywhere"),
        (lambda _m, _c: quality.errors(np.ones(2, np.float32), np.ones(3, np.float32)), "of one shape"),
    ],
)
def test_bad_input_is_one_clear_line(ask: Any, words: str, model: Transformer, captions: mx.array) -> None:
    """Whatever does not fit gives an InputError of one line that says what."""
    with pytest.raises(InputError, match=words) as caught:
        ask(model, captions)
    assert "\n" not in str(caught.value)


def test_errors_of_the_same_seeds_are_compared_in_pairs() -> None:
    """The ratio of two errors that both follow the seed is far surer than their own intervals are apart."""
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((20, 2, 4, 4)).astype(np.float32)
    change = rng.standard_normal(wanted.shape) * np.geomspace(0.01, 1, 20)[:, None, None, None]
    near, far = ((wanted + scale * change).astype(np.float32) for scale in (1.0, 1.1))
    low, high = quality.error_ratio(far, near, wanted)
    assert low == pytest.approx(1.1, rel=1e-3) and high == pytest.approx(1.1, rel=1e-3)
    (first, *_), (second, *_) = (quality.interval_rows(arm, wanted) for arm in (near, far))
    assert second["low"] < first["high"]
    assert quality.error_ratio(wanted, near, wanted) == (0, 0)
    assert quality.error_ratio(near, wanted, wanted) == (math.inf, math.inf)
    assert quality.error_ratio(wanted, wanted, wanted) == (1, 1)
    some = np.concatenate([wanted[:1], near[1:]])
    assert quality.error_ratio(near, some, wanted) == quality.error_ratio(some, near, wanted) == (0, math.inf)
    with pytest.raises(InputError, match="one shape"):
        quality.error_ratio(near, far[:1], wanted)


def test_a_ratio_of_errors_holds_as_surely_as_it_was_asked_to() -> None:
    """Of arms that err alike, an interval misses 1 as seldom as its level says, with few seeds and with many pairs;

    with fewer seeds than the level needs nothing is known.
    """
    rng = np.random.default_rng(0)
    assert [quality.fewest_seeds(level) for level in (0.05, 0.05 / 15, 0.05 / 325)] == [6, 10, 14]
    for level, count in ((0.05, 6), (0.05 / 15, 10)):
        wanted, missed, trials = np.ones((count, 1), np.float32), 0, 600
        for _ in range(trials):
            one, other = (wanted + np.exp(rng.standard_normal(wanted.shape)) * 0.1 for _ in range(2))
            low, high = quality.error_ratio(one.astype(np.float32), other.astype(np.float32), wanted, level)
            missed += not low <= 1 <= high
        assert missed <= trials * level + 3 * (trials * level) ** 0.5
        few = [each[: count - 1].astype(np.float32) for each in (one, other, wanted)]
        assert quality.error_ratio(few[0], few[1], few[2], level) == (0, math.inf)
