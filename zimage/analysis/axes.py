"""How the time of a step grows along one axis at a time: resolution, aspect, batch, caption length."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zimage.analysis.crossover import tokens_of
from zimage.analysis.roofline import Predictor, Size
from zimage.config import TransformerConfig
from zimage.measure.statistics import analyse, verdict

import numpy as np

AXES = ("resolution", "aspect", "batch", "caption")
_SIDES = ("height", "width", "batch", "caption_tokens")
_DELTA = 0.01  # within which two sizes count as equivalent, as in verdicts


def pairs(sizes: Sequence[Size], config: TransformerConfig) -> list[tuple[str, Size, Size]]:
    """(axis, size, beside): which sizes differ from which in one thing alone, each beside the least of its kind.

    resolution: another number of tokens, each by its squarest size, of the batch and caption that most sizes have;
    aspect: as many tokens in another shape, beside the squarest; batch and caption: the same image.
    """
    found: list[tuple[str, Size, Size]] = []
    groups: dict[tuple[Any, ...], list[Size]] = {}
    for size in dict.fromkeys(sizes):
        groups.setdefault((size.batch, size.caption_tokens), []).append(size)
    most = max(groups.values(), key=len, default=[])
    for group in groups.values():
        by_tokens: dict[int, list[Size]] = {}
        for size in sorted(group, key=lambda s: (tokens_of(s, config), max(s.height, s.width), s.height)):
            by_tokens.setdefault(tokens_of(size, config), []).append(size)
        squarest = [alike[0] for alike in by_tokens.values()]
        found += [("resolution", size, squarest[0]) for size in squarest[1:] if group is most]
        found += [("aspect", size, alike[0]) for alike in by_tokens.values() for size in alike[1:]]
    for axis, own, other in (("batch", "batch", "caption_tokens"), ("caption", "caption_tokens", "batch")):
        same: dict[tuple[Any, ...], list[Size]] = {}
        for size in dict.fromkeys(sizes):
            same.setdefault((size.height, size.width, getattr(size, other)), []).append(size)
        for group in same.values():
            least, *more = sorted(group, key=lambda s: getattr(s, own))
            found += [(axis, size, least) for size in more]
    return found


def rows(
    times: Mapping[Size, Sequence[float]],
    config: TransformerConfig,
    predictor: Predictor,
    alpha: float = 0.05,
) -> list[dict[str, Any]]:
    """Rows of an `axes` table: the time of each of `pairs` by that beside it, measured and predicted.

    times: seconds of every size in the same rounds, so that ratios are of one round; of a batch they are those of an
    image. The intervals hold together.
    """
    compared, found = pairs(list(times), config), []
    for axis, size, beside in compared:
        per_item = beside.batch / size.batch if axis == "batch" else 1.0
        logs = np.log(np.array(times[size]) / np.array(times[beside]) * per_item)
        estimate = analyse(logs, alpha / len(compared))
        known = 0 < estimate.low and estimate.high < math.inf
        found.append(
            {
                "axis": axis,
                **{name: getattr(size, name) for name in _SIDES},
                **{f"beside_{name}": getattr(beside, name) for name in _SIDES},
                "tokens": tokens_of(size, config),
                "ratio": estimate.ratio,
                "ratio_low": estimate.low if known else None,
                "ratio_high": estimate.high if known else None,
                "predicted_ratio": predictor.predict(size) / predictor.predict(beside) * per_item,
                "verdict": verdict(estimate, _DELTA, None)[0],
            }
        )
    return found
