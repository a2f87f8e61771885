"""Single changes: one layer, one block, or one block in one step packed, all else as it is."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zimage.quantization import Quantization
from zimage.recipes import Recipe, Rule
from zimage.sensitivity.reference import Damage, Reference, block_of, linears, packed

import mlx.core as mx

Advance = Callable[[], None]


@dataclass(frozen=True)
class Single:
    """What one change alone does: `unit`, a layer or a block, packed in all steps or in one.

    velocity: over the points of all steps; of a change in one step it holds that step's error only, so that the squared
    errors of all steps are those of the block. bytes_saved: of weights, against the unpacked ones.
    """

    unit: str
    kind: str  # "layer" or "block"
    quantization: Quantization
    step: int | None
    bytes_saved: int
    velocity: Damage
    end: Damage | None
    velocities: tuple[mx.array, ...] = field(default=(), repr=False, compare=False)  # [N, C, H, W] of a block's steps

    @property
    def damage_per_byte(self) -> float:
        """Squared relative error of the velocity a byte saved: squares, because it is they that add up."""
        return self.velocity.squared_error / self.bytes_saved

    def row(self, weights_kind: str) -> dict[str, Any]:
        """The row of a `sensitivity` table; weights_kind: "trained" or "synthetic"."""
        return {
            "arm": str(self.quantization), "quantization": str(self.quantization), "unit": self.unit, "kind": self.kind,
            "step": self.step, "bytes_saved": self.bytes_saved, "velocity_error": self.velocity.error,
            "end_error": None if self.end is None else self.end.error, "damage_per_byte": self.damage_per_byte,
            "weights_kind": weights_kind,
        }  # fmt: skip


def layers(
    reference: Reference,
    quantizations: Sequence[Quantization],
    ends: Sequence[Quantization] = (),
    advance: Advance = lambda: None,
) -> list[Single]:
    """Every linear layer of every block packed alone, in each of these ways; the end is measured for those in `ends`.

    Raises InputError where a layer cannot be packed so, and MeasurementError where a velocity is not finite.
    """
    units = {path: (path,) for path in linears(reference.model)}
    return _singles(reference, "layer", units, quantizations, ends, advance)


def blocks(
    reference: Reference, quantization: Quantization, end: bool = True, advance: Advance = lambda: None
) -> list[Single]:
    """Every block packed alone, all of its linear layers alike. Raises as `layers`."""
    units: dict[str, tuple[str, ...]] = {}
    for path in linears(reference.model):
        units[block_of(path)] = (*units.get(block_of(path), ()), path)
    return _singles(reference, "block", units, [quantization], [quantization] if end else [], advance)


def block_steps(
    reference: Reference, singles: Sequence[Single], end: bool = True, advance: Advance = lambda: None
) -> list[Single]:
    """Each of these blocks packed in one step alone, for every step.

    A velocity's error in one step is there already, with the block's own; only what becomes of it by the trajectory's
    end is computed, by the reference itself. Raises as `layers`.
    """
    found = []
    for single in singles:
        for step, velocity in enumerate(single.velocities):
            own = reference.of_step(single.velocity, step)
            after = reference.end(step=step, first=velocity) if end else None
            found.append(replace(single, step=step, velocity=own, end=after, velocities=()))
            advance()
    return found


def _singles(
    reference: Reference,
    kind: str,
    units: Mapping[str, Sequence[str]],
    quantizations: Sequence[Quantization],
    ends: Sequence[Quantization],
    advance: Advance,
) -> list[Single]:
    of_block: dict[str, list[str]] = {}
    for unit, paths in units.items():
        of_block.setdefault(block_of(paths[0]), []).append(unit)
    found = []
    for place, name, states in reference.walk():
        for unit in of_block.get(name, ()):
            for quantization in quantizations:
                model = packed(reference.model, _rule(unit, kind, quantization))
                velocities = reference.from_stage(model, place, states)
                damage, by_step = reference.damage(velocities), reference.by_step(velocities)
                end = reference.end(model, first=by_step[0]) if quantization in ends else None
                saved = reference.saved(units[unit], quantization)
                del model  # before the next is packed
                kept = tuple(by_step) if kind == "block" else ()
                found.append(Single(unit, kind, quantization, None, saved, damage, end, kept))
                advance()
    return found


def _rule(unit: str, kind: str, quantization: Quantization) -> Recipe:
    return Recipe(None, (Rule(f"{unit}.*" if kind == "block" else unit, quantization),))


def ranked(singles: Sequence[Single]) -> list[Single]:
    """Those that save bytes, from the least damage a byte saved to the most."""
    return sorted((single for single in singles if single.bytes_saved > 0), key=lambda s: s.damage_per_byte)


def items(reference: Reference, ways: int, ends: int = 1) -> float:
    """How many items' forward passes `layers` in `ways` packings, `blocks` and `block_steps` take together.

    A layer's velocity takes the part of a pass from its block on; an end takes whole passes. ends: of how many packings
    those of the layers are measured; 0 leaves out those of blocks too.
    """
    stages = [stage.name for stage in reference.model.stages(*reference.points[0])]
    count, steps = reference.count, reference.steps
    each = count * steps
    total = 0.0
    for block, inside in Counter(map(block_of, linears(reference.model))).items():
        total += (ways * inside + 1) * each * (1 - stages.index(block) / len(stages))
        if ends:
            total += (ends * inside + 1) * count * (steps - 1) + count * steps * (steps - 1) / 2
    return total
