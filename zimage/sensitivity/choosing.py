"""Recipes for a budget of error or of bytes, measured as a whole, and what they are worth beside another packing."""

import math
from collections import Counter
from dataclasses import dataclass

from zimage import mixing
from zimage.errors import InputError, MeasurementError
from zimage.measure.statistics import Estimate, analyse
from zimage.mixing import Choices, Mix
from zimage.quantization import Quantization
from zimage.recipes import Recipe
from zimage.sensitivity.reference import Damage, Reference, linears, packed

import numpy as np

ROUNDS = 6  # of correcting a recipe whose error was found to be another than predicted
CLOSE = 0.9  # of its error budget a recipe should use


@dataclass(frozen=True)
class Found:
    """A mix that was chosen, `rounds` times corrected, and what it did when it was measured as a whole.

    velocity: its error on the reference that it was made with. That is no judgement of a mix that was corrected by it.
    """

    mix: Mix
    velocity: Damage
    rounds: int = 0


def within_error(
    reference: Reference, available: Choices, most_error: float, factor: float = 1.0, rounds: int = ROUNDS
) -> Found:
    """The mix of the fewest bytes whose velocity, measured as a whole, errs by `most_error` at most.

    reference: what it is measured and corrected on, best another than the choices are from, as those were made to suit
    their own, and another than the mix is judged on, as that is made to suit this one. Where it errs by more than the
    budget, or by less than CLOSE of it, the factor is corrected by what was measured and another mix chosen, `rounds`
    times at most; of those within the budget the smallest is given. Raises InputError where no mix is predicted or
    found to meet the budget.
    """
    best: Found | None = None
    mixing.require_positive(most_error, "error budget")
    least = math.inf
    seen: set[Recipe] = set()
    for done in range(rounds + 1):
        try:
            mix = mixing.fewest_bytes(available, most_error, factor)
        except InputError:
            mix = mixing.finest(available, factor)  # no more than a prediction, before that was measured
        if mix.recipe in seen:
            break
        seen.add(mix.recipe)
        velocity = reference.velocity(packed(reference.model, mix.recipe))
        least = min(least, velocity.error)
        if velocity.error <= most_error:
            best = Found(mix, velocity, done) if best is None or mix.bytes < best.mix.bytes else best
            if velocity.error >= CLOSE * most_error:
                break
        correction = (velocity.error / mix.error) ** 2 if mix.error and velocity.error else 1.0
        factor *= max(correction, 1.02) if velocity.error > most_error else correction
    if best is not None:
        return best
    raise InputError(
        f"error budget {most_error:g} can't be met: of {len(seen)} mixes that were measured the best errs by "
        f"{least:.3g}; allow that, or offer packings of more bits"
    )


def within_bytes(reference: Reference, available: Choices, most_bytes: int, factor: float = 1.0) -> Found:
    """The mix of the least predicted error with at most `most_bytes` of weights in blocks, and its measured error.

    Raises InputError where none is as small.
    """
    mix = mixing.least_error(available, most_bytes, factor)
    return Found(mix, reference.velocity(packed(reference.model, mix.recipe)))


def compare(arm: Damage, baseline: Damage) -> Estimate:
    """How many times the error of `baseline` that of `arm` is on the same items, with its 95 % interval.

    The exact signed-rank estimate over the items' own ratios; with fewer than six items it has no bounds. Raises
    MeasurementError where one of them makes no error at all.
    """
    if not (arm.squared > 0).all() or not (baseline.squared > 0).all():
        raise MeasurementError("a ratio of errors needs both sides to make some on every item")
    return analyse(np.log(arm.squared / baseline.squared) / 2, 0.05)


def block_bytes(reference: Reference, quantization: Quantization) -> int:
    """Bytes of all blocks' linear weights where all are packed alike."""
    return sum(reference.choice(path, quantization, 0.0).bytes for path in linears(reference.model))


def counted(mix: Mix) -> dict[str, int]:
    """How many layers are packed in which way, the most common first."""
    return {str(name or "not packed"): n for name, n in Counter(mix.packing.values()).most_common()}
