"""From how many tokens on attention takes more time than the linear layers.

A block's linear layers grow with its tokens, attention with their square, so that they cross at some number of tokens
of an item. By FLOPs alone that is a property of the config. On a device it lies where their times cross, told in two
independent ways: from the rates of a calibrated `Predictor`, whose linear share holds everything but attention, and
from the operations of a block, each timed alone at several sizes. All speak of a main block, image and caption joined;
the modulation, which does not grow with the tokens, counts as neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from zimage.analysis import cost, roofline
from zimage.analysis.roofline import Size
from zimage.config import TransformerConfig
from zimage.errors import InputError, MeasurementError
from zimage.measure.statistics import analyse, centre, walsh_averages

import numpy as np
from numpy.typing import NDArray

BLOCK = "layers.0"
FLOPS, RATES, OPERATIONS = "FLOPs alone", "calibrated rates", "operations of a block"
_NEVER = 1e12  # tokens, as good as never
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Crossing:
    """At how many tokens of an item attention and the linear layers take as long, by one method.

    tokens is infinite where attention never does, and NaN where the times do not tell; the ends are None where there
    are too few rounds for an interval. note: "extrapolated" where it lies beyond what was measured, "not told" and
    "never" for the two others.
    """

    method: str
    tokens: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    def row(self, config: TransformerConfig) -> dict[str, Any]:
        """A row of the `crossover` table; side_px: of a square image that has so many tokens by itself."""
        patch = config.all_patch_size[0] * config.pixels_per_latent
        known = math.isfinite(self.tokens)
        return {
            "method": self.method,
            "tokens": self.tokens if known else None,
            "tokens_low": _finite(self.low),
            "tokens_high": _finite(self.high),
            "side_px": math.sqrt(self.tokens) * patch if known else None,
            "note": self.note,
        }


@dataclass(frozen=True)
class Measured:
    """Seconds of a main block's attention and of its linear layers at so many tokens of an item, of every round."""

    tokens: int
    attention_s: Sequence[float]
    linear_s: Sequence[float]

    def row(self) -> dict[str, Any]:
        """A row of the `crossover` table."""
        times = {name: float(np.median(getattr(self, name))) for name in ("attention_s", "linear_s")}
        return {"method": OPERATIONS, "tokens": float(self.tokens), **times, "note": "measured"}


def tokens_of(size: Size, config: TransformerConfig) -> int:
    """Tokens of an item of `size` in a main block, padding included. Raises as `cost.token_lengths`."""
    lengths = cost.token_lengths(
        config, size.height, size.width, size.batch, size.caption_tokens, config.all_patch_size[0]
    )
    return lengths[0].joint


def require_different(sizes: Sequence[Size], config: TransformerConfig) -> None:
    """Raise InputError where all of several sizes have as many tokens, which show no crossing; one or none may be."""
    counts = {tokens_of(size, config) for size in sizes}
    if len(sizes) > 1 and len(counts) == 1:
        given = " and ".join(f"{size.height} x {size.width}" for size in sizes)
        raise InputError(
            f"block_sizes {given} px have {counts.pop()} tokens each; a crossing needs sizes of different numbers, "
            "and block_sizes [] leaves it out"
        )


def by_flops(config: TransformerConfig) -> Crossing:
    """Where the FLOPs of attention and of the linear layers are the same."""
    side = config.all_patch_size[0] * config.pixels_per_latent
    size = Size(side, side, 1, 1)
    operations = cost.step(config, side, side, 1, 1, patch_size=config.all_patch_size[0])
    tokens, kinds = tokens_of(size, config), kinds_of(config)
    flops = dict.fromkeys(("matmul", "attention"), 0)
    for operation in operations:
        if operation.stage == BLOCK and (kind := kinds.get(operation.operation)) in flops:
            flops[kind] += operation.flops
    return Crossing(FLOPS, tokens * flops["matmul"] / flops["attention"])


def by_rates(
    points: Sequence[tuple[Size, Sequence[float]]], config: TransformerConfig, alpha: float = 0.05
) -> Crossing:
    """Where their times cross by the rates that a `Predictor` is calibrated with, anew in each round.

    points: the sizes to calibrate with, each with its seconds in every round. Raises MeasurementError as `calibrate`,
    and for sizes that were not timed in the same rounds.
    """
    rounds = {len(times) for _, times in points}
    if len(rounds) != 1 or not min(rounds):
        raise MeasurementError(f"rates need the times of every size in the same rounds, found {sorted(rounds)} of them")
    flops = by_flops(config).tokens

    def crossing(times: Sequence[float]) -> float:
        found = roofline.calibrate([(size, t) for (size, _), t in zip(points, times, strict=True)], config)
        return flops * _quotient(found.linear_s, found.attention_s)

    whole = np.array([times for _, times in points])
    return _crossing(RATES, crossing(_centres(whole)), [crossing(times) for times in whole.T.tolist()], alpha)


def by_operations(measured: Sequence[Measured], alpha: float = 0.05) -> Crossing:
    """Where the ratio of their times is one, between the two sizes around it or along the two next to it.

    The ratio's logarithm is taken as a line in that of the tokens; sizes of as many tokens are one. Not told where
    attention takes longer at every size and less so as they grow. Rounds with a time that is not positive are left out.
    Raises MeasurementError for fewer than two different sizes, or where no round is left.
    """
    ordered = sorted(measured, key=lambda one: one.tokens)
    if len({one.tokens for one in ordered}) < 2:
        raise MeasurementError(f"a crossing needs two different sizes of a block, found {len(measured)}")
    attention, linear = (np.array([getattr(one, name) for one in ordered]) for name in ("attention_s", "linear_s"))
    kept = (attention > 0).all(axis=0) & (linear > 0).all(axis=0)
    if not kept.any():
        raise MeasurementError("no round has positive times of all operations; take larger sizes or more rounds")
    tokens, place = np.unique([one.tokens for one in ordered], return_inverse=True)
    x, means = np.log(tokens), np.array([(place == i) / (place == i).sum() for i in range(len(tokens))])
    attention, linear = means @ attention[:, kept], means @ linear[:, kept]
    values = [_root(x, y) for y in np.log(attention / linear).T]
    estimate = _root(x, np.log(np.array(_centres(attention)) / np.array(_centres(linear))))
    found = _crossing(OPERATIONS, estimate, values, alpha)
    beyond = not ordered[0].tokens <= found.tokens <= ordered[-1].tokens
    return replace(found, note=found.note or ("extrapolated" if beyond else ""))


def _root(x: Floats, y: Floats) -> float:
    """exp of where the broken line through (x, y) comes to 0, drawn on at its ends; _NEVER where it stays below 0, and
    NaN where it lies above it at the least x and does not come down to it before."""
    lines = list(pairwise(zip(x, y, strict=True)))
    inside = [line for line in lines if line[0][1] <= 0 <= line[1][1]]
    ((x0, y0), (x1, y1)) = inside[0] if inside else lines[0] if y[0] > 0 else lines[-1]
    if y1 <= y0:
        return float(math.exp(x0)) if y0 == 0 else _NEVER if y0 < 0 else math.nan
    return float(math.exp(min(max(x0 - y0 * (x1 - x0) / (y1 - y0), 0.0), math.log(_NEVER))))


def kinds_of(config: TransformerConfig, fused: Sequence[str] = ()) -> dict[str, cost.Kind]:
    """What each operation of a main block is, by its name; those that do not grow with the tokens are left out."""
    side = config.all_patch_size[0] * config.pixels_per_latent
    operations = cost.step(config, side, side, 1, 1, patch_size=config.all_patch_size[0], fused=fused)
    return {o.operation: o.kind for o in operations if o.stage == BLOCK and o.operation not in ("adaln", "join")}


def measured(tokens: int, times: Mapping[str, Sequence[float]], kinds: Mapping[str, cost.Kind]) -> Measured:
    """From the seconds of a block's operations, of every round, by name. Raises MeasurementError for none of a kind."""
    sums = {}
    for kind in ("attention", "matmul"):
        own = [times[name] for name in times if kinds.get(name) == kind]
        if not own:
            raise MeasurementError(f"no {kind} is among the operations {', '.join(times)}")
        sums[kind] = np.sum(own, axis=0).tolist()
    return Measured(tokens, sums["attention"], sums["matmul"])


def _quotient(linear_s: float, attention_s: float) -> float:
    """How much more a FLOP of linear layers takes than one of attention; NaN where the first takes no time at all."""
    if linear_s <= 0:
        return math.nan
    return linear_s / attention_s if attention_s > 0 else math.inf


def _centres(times: Floats) -> list[float]:
    """The Hodges-Lehmann estimate of each row of times [N, rounds]."""
    return [float(x) for x in centre(walsh_averages(times))]


def _crossing(method: str, tokens: float, values: Sequence[float], alpha: float) -> Crossing:
    """With the interval over the rounds, in which nothing told counts as none and never as the largest number."""
    if math.isnan(tokens):
        return Crossing(method, tokens, note="not told")
    limited = np.clip(np.nan_to_num(values, nan=1.0, posinf=_NEVER), 1.0, _NEVER)
    found = analyse(np.log(limited), alpha)
    known = 0 < found.low and found.high < math.inf
    low, high = (min(found.low, tokens), max(found.high, tokens)) if known else (None, None)
    never = tokens >= _NEVER
    return Crossing(method, math.inf if never else tokens, low, high, "never" if never else "")


def _finite(value: float | None) -> float | None:
    return None if value is None or not value < _NEVER else value
