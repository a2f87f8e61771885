"""The unpacked model with trajectories that it drew, and the damage that another model does on them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from zimage import quality, scheduler, transforms
from zimage.errors import InputError, MeasurementError
from zimage.inputs import Inputs
from zimage.mixing import Choice
from zimage.quantization import Quantization
from zimage.recipes import Recipe
from zimage.sources import published
from zimage.transformer import Captions, State, Transformer

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Damage:
    """Squared L2 error and squared L2 norm of what was wanted, item by item [N]."""

    squared: Floats
    wanted: Floats

    @property
    def squared_error(self) -> float:
        """The squared relative error over all items."""
        return float(self.squared.sum() / self.wanted.sum())

    @property
    def error(self) -> float:
        """The relative L2 error over all items."""
        return math.sqrt(self.squared_error)


class Reference:
    """A model as it is, and trajectories that it draws, from seeded noise and one caption each.

    captions: N of them, [N, L, F] or a list of [L_i, F]; size: latent rows and columns; steps and shift as `sample`
    takes them; trajectory i starts from the noise of `seed + i`. batch: how many of them a call computes. Raises
    InputError as `quality.trajectory` does, and for a model with packed weights.
    """

    def __init__(
        self,
        model: Transformer,
        captions: Captions,
        size: tuple[int, int],
        steps: int,
        shift: float = 3.0,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        if transforms.packing_of(model):
            raise InputError("sensitivity is measured against unpacked weights, and this model's are packed")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch must be an integer of at least 1, found {batch!r}")
        self.model, self.steps, self._batch = model, steps, batch
        drawn = quality.trajectory(model, captions, size, steps, shift, seed, at_once=batch)
        self.latents = [mx.array(latents) for latents in drawn.latents]  # [N, C, H, W] before each step, and at the end
        self.velocities = [mx.array(velocities) for velocities in drawn.velocities]  # [N, C, H, W] in each step
        self.count, self._sigmas = len(captions), drawn.sigmas
        self._groups = [
            (slice(start, start + batch), [captions[i] for i in range(start, min(start + batch, self.count))])
            for start in range(0, self.count, batch)
        ]
        self._bytes = {
            path: rows * width * model.dtype.size for path, (rows, width) in linears(model).items()
        }  # as floating-point weights

    @property
    def points(self) -> list[Inputs]:
        """What the model is called with: in every step, the trajectories in groups of `batch`, step by step."""
        return [
            Inputs(latents[rows], mx.full((len(captions),), 1.0 - sigma, dtype=mx.float32), captions)
            for latents, sigma in zip(self.latents[:-1], self._sigmas[:-1], strict=True)
            for rows, captions in self._groups
        ]

    def velocity(self, model: Transformer) -> Damage:
        """The error of another model's velocity at all points; its items are step by step, [steps * N]."""
        found = []
        for point in self.points:
            found.append(model(*point))
            mx.eval(found[-1])
        return self.damage(found)

    def drawn(self, model: Transformer | None = None, step: int = 0, first: mx.array | None = None) -> mx.array:
        """What trajectories end in [N, C, H, W] that a model, or for None the reference, draws from `step` on.

        first: the velocity [N, C, H, W] of that step, where it is known.
        """
        ends = []
        for rows, captions in self._groups:
            latents = self.latents[step][rows]
            for now in range(step, self.steps):
                sigma, to = self._sigmas[now], self._sigmas[now + 1]
                if now == step and first is not None:
                    latents = latents + (sigma - to) * first[rows].astype(latents.dtype)
                else:
                    latents = scheduler.step(model or self.model, latents, captions, sigma, to)
                mx.eval(latents)
            ends.append(latents)
        return mx.concatenate(ends)

    def drift(self, drawn: mx.array) -> Damage:
        """The error [N] of what trajectories ended in [N, C, H, W], as `drawn` gives it."""
        return _finite(Damage(_squares(drawn - self.latents[-1]), _squares(self.latents[-1])))

    def end(self, model: Transformer | None = None, step: int = 0, first: mx.array | None = None) -> Damage:
        """The `drift` of what is `drawn` so."""
        return self.drift(self.drawn(model, step, first))

    def damage(self, velocities: Sequence[mx.array]) -> Damage:
        """The error of velocities at `points`, one after the other."""
        squared, wanted = [], []
        for place, found in enumerate(velocities):
            step, group = divmod(place, len(self._groups))
            own = self.velocities[step][self._groups[group][0]]
            squared.append(_squares(found.astype(mx.float32) - own))
            wanted.append(_squares(own))
        return _finite(Damage(np.concatenate(squared), np.concatenate(wanted)))

    def by_step(self, velocities: Sequence[mx.array]) -> list[mx.array]:
        """Velocities at `points` as one array [N, C, H, W] a step."""
        size = len(self._groups)
        return [mx.concatenate(list(velocities[at : at + size])) for at in range(0, len(velocities), size)]

    def by_trajectory(self, damage: Damage) -> Damage:
        """A velocity's damage over all steps of each trajectory [N]."""
        squared, wanted = (
            values.reshape(self.steps, self.count).sum(axis=0) for values in (damage.squared, damage.wanted)
        )
        return Damage(squared, wanted)

    def of_step(self, damage: Damage, step: int) -> Damage:
        """That part of a velocity's damage that one step made, beside what was wanted in all."""
        own = np.zeros_like(damage.squared)
        items = slice(step * self.count, (step + 1) * self.count)
        own[items] = damage.squared[items]
        return Damage(own, damage.wanted)

    def choice(self, path: str, quantization: Quantization | None, squared_error: float) -> Choice:
        """How the layer at `path` may be stored, with its bytes."""
        stored: int | None = self._bytes[path]
        if quantization is not None:
            rows, width = linears(self.model)[path]
            stored = quantization.stored_bytes(rows, width, self.model.dtype.size)
        assert stored is not None
        return Choice(quantization, stored, squared_error)

    def saved(self, paths: Sequence[str], quantization: Quantization) -> int:
        """Bytes of weights that packing these layers saves."""
        return sum(self._bytes[path] - self.choice(path, quantization, 0.0).bytes for path in paths)

    def from_stage(self, model: Transformer, place: int, states: Sequence[State]) -> list[mx.array]:
        """Velocities at `points` of a model that is the reference up to its stage `place`, given what comes before."""
        found = []
        for point, state in zip(self.points, states, strict=True):
            velocity = reduce(lambda state, stage: stage(state), model.stages(*point)[place:], state).velocity
            assert velocity is not None
            mx.eval(velocity)
            found.append(velocity)
        return found

    def walk(self) -> Iterator[tuple[int, str, list[State]]]:
        """Every stage: its place, its name, and the states of all points before it, computed."""
        stages = [self.model.stages(*point) for point in self.points]
        states = [State(*point) for point in self.points]
        for place, stage in enumerate(stages[0]):
            yield place, stage.name, states
            for i, own in enumerate(stages):
                states[i] = own[place](states[i])
                mx.eval(states[i].arrays())


def linears(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Path and weight shape [rows, width] of every linear layer that can be packed, in forward order."""
    return {
        path: shape for path, shape in published.linears(model.config).items() if path.split(".")[0] in published.BLOCKS
    }


def block_of(path: str) -> str:
    """The block that a layer belongs to, which is also its stage: `layers.0` of `layers.0.attention.to_q`."""
    return ".".join(path.split(".")[:2])


def packed(model: Transformer, recipe: Recipe) -> Transformer:
    """The model packed by a recipe, its other arrays shared. Raises InputError where that cannot be."""
    return transforms.quantize(model, recipe)


def _squares(values: mx.array) -> Floats:
    """Sums of squares of [N, ...] over all but the first axis, in fp32."""
    return np.array(mx.sum(mx.square(values.astype(mx.float32)).reshape(len(values), -1), axis=1)).astype(np.float64)


def _finite(damage: Damage) -> Damage:
    if not np.isfinite(damage.squared).all() or not damage.wanted.sum() > 0:
        raise MeasurementError("an output is not finite, or all zero: nothing can be said about its error")
    return damage
