"""How good generated digits are, against the real ones: recognised, as varied, not copied, and distributed alike.

The classifier is a logistic regression fitted on the pixels of all real images. Its features are its only layer's: the
ten logits, one a class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zimage.digits.data import Digits, Images, real
from zimage.quality import Estimate, frechet_estimate

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression


@dataclass(frozen=True)
class DigitQuality:
    """accuracy: the share of digits that a logistic regression fitted on all real images reads as their label.

    variance_ratio [10]: pixel variance within each class, generated / real. nearest_ratio: the median distance to the
    nearest training image, generated / held-out; well under 1 means copies, well over 1 means no digits.
    """

    accuracy: float
    variance_ratio: NDArray[np.float64]
    nearest_ratio: float


@lru_cache(maxsize=1)
def _classifier() -> LogisticRegression:
    both = _together(*real())
    return LogisticRegression(max_iter=2000).fit(_rows(both.images), both.labels)


def recognised(generated: Digits) -> NDArray[np.bool_]:
    """For every digit, whether the classifier reads it as its label: [N]."""
    found: NDArray[np.bool_] = _classifier().predict(_rows(generated.images)) == generated.labels
    return found


def logits(images: Images) -> NDArray[np.float64]:
    """The classifier's logits [N, 10] of images [N, 8, 8]."""
    found: NDArray[np.float64] = _classifier().decision_function(_rows(images)).astype(np.float64)
    return found


@lru_cache(maxsize=1)
def _real_logits() -> NDArray[np.float64]:
    return logits(_together(*real()).images)


def frechet_distance(generated: Digits, beside: Digits | None = None, seed: int = 0) -> Estimate:
    """Frechet distance of generated digits to all 1797 real ones, between the classifier's logits.

    See `zimage.quality.frechet_estimate`, also for `beside`: digits of the same seeds to be farther or nearer than.
    Raises InputError for fewer than two digits of a label.
    """
    other = None if beside is None else logits(beside.images)
    return frechet_estimate(logits(generated.images), _real_logits(), generated.labels, seed, other)


def judged(drawn: Mapping[str, Digits], baseline: str, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a `quality` table for what each arm drew from the same seeds, `baseline` among them.

    `digit_accuracy`: the share that is recognised, with a 95 % Wilson interval. Where there are two digits of every
    label at least: `frechet_distance`, and for all but the baseline `frechet_difference`, how much farther from the
    real digits than the baseline's, resampled in pairs of a seed. See `frechet_distance` for seed.
    """
    rows: list[dict[str, Any]] = []
    for arm, some in drawn.items():
        count, right = len(some.labels), int(recognised(some).sum())
        low, high = binomtest(right, count).proportion_ci(method="wilson")
        found = [{"metric": "digit_accuracy", "value": right / count, "low": low, "high": high, "count": count}]
        if np.unique(some.labels, return_counts=True)[1].min() > 1:
            found.append({"metric": "frechet_distance", **vars(frechet_distance(some, seed=seed))})
            if arm != baseline:
                beyond = vars(frechet_distance(some, drawn[baseline], seed))
                found.append({"metric": "frechet_difference", "baseline": baseline, **beyond})
        rows += [{"arm": arm, **row} for row in found]
    return rows


def quality(generated: Digits) -> DigitQuality:
    """Judge generated digits that hold every label at least twice."""
    train, held_out = real()
    both = _together(train, held_out)
    variances = [
        _variance(generated.images[generated.labels == k]) / _variance(both.images[both.labels == k]) for k in range(10)
    ]
    nearest = _nearest(generated.images, train.images) / _nearest(held_out.images, train.images)
    return DigitQuality(float(recognised(generated).mean()), np.array(variances), nearest)


def _together(a: Digits, b: Digits) -> Digits:
    return Digits(np.concatenate([a.images, b.images]), np.concatenate([a.labels, b.labels]))


def _rows(images: Images) -> Images:
    return images.reshape(len(images), -1)


def _variance(images: Images) -> float:
    return float(images.var(axis=0).mean())


def _nearest(images: Images, others: Images) -> float:
    a, b = _rows(images).astype(np.float64), _rows(others).astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.median(np.sqrt(np.maximum(squared.min(axis=1), 0))))
