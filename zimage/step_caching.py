"""Levers that reuse in a step of a denoising trajectory what an earlier one computed, though it would differ a little.

Each is a function model -> model. What is kept belongs to one trajectory: `scheduler.sample` starts one, on a copy of
the model that shares its modules and dies with the trajectory. A call outside of a trajectory computes everything and
keeps nothing. Within one, a call that does not continue the call before it, with other captions, shapes, dtypes or a
timestep that has not grown, starts anew. All items of a batch are reused together, and only where every one of them may
be, so that a batch reuses no more than its most demanding item. `model.report` says what the latest trajectory skipped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from zimage.caching import OfOneModel, Report, as_tuple
from zimage.errors import InputError, require_integer
from zimage.layers import as_class
from zimage.reusing import FITTED, coefficients, require_every, require_tea, require_threshold, require_thresholds
from zimage.transformer import Captions, Stage, State, Transformer, TransformerBlock

import mlx.core as mx
import numpy as np

_M = TypeVar("_M", bound=Transformer)
GO_THRESHOLD = 0.15  # of Ollama's Z-Image, x/imagegen/models/zimage/zimage.go, where it cannot be switched off
FLUX_THRESHOLD, LUMINA2_THRESHOLD = 0.25, 0.3  # the lowest that is published with each as about 1.5 times as fast


class Rule(Protocol):
    """Decides for each step of a trajectory but the first whether it reuses."""

    def reuses(self, memory: "Memory") -> bool:
        """Whether the step that `memory` has come to reuses."""

    @property
    def needs_input(self) -> bool:
        """Whether it looks at the first main block's input."""


@dataclass
class Memory:
    """What a trajectory remembers of its steps: numbers, one for every item, and arrays [B, L, D].

    timesteps: of this step; computed_at: of the last one that computed; accumulated: distances since then; entering:
    the modulated input of the first main block, where the rule needs it, and entered: that of the step before.
    """

    steps: int
    step: int = -1
    timesteps: list[float] = field(default_factory=list)
    computed_at: list[float] = field(default_factory=list)
    accumulated: list[float] = field(default_factory=list)
    entering: mx.array | None = None
    entered: mx.array | None = None

    def add(self, distances: Iterable[float]) -> float:
        """The largest of the accumulated distances after adding these."""
        self.accumulated = [a + d for a, d in zip(self.accumulated, distances, strict=True)]
        return max(self.accumulated)

    def compute(self) -> None:
        """This step computes."""
        self.accumulated, self.computed_at = [0.0] * len(self.timesteps), self.timesteps


@dataclass(frozen=True)
class EveryNth:
    """Compute in steps 0, n, 2n, ... and reuse in all others."""

    interval: int
    needs_input = False

    def reuses(self, memory: Memory) -> bool:
        return memory.step % self.interval != 0


@dataclass(frozen=True)
class TimestepDistance:
    """Reuse until the distances from the last computed step's timestep, added up, exceed the threshold.

    Every step adds its whole way from the last computed one: the third step's distance counts beside the second's, and
    contains it. So does the code it follows (`reuse_by_timestep`).
    """

    threshold: float
    needs_input = False

    def reuses(self, memory: Memory) -> bool:
        pairs = zip(memory.timesteps, memory.computed_at, strict=True)
        return memory.add(abs(now - then) for now, then in pairs) <= self.threshold


@dataclass(frozen=True)
class InputDistance:
    """TeaCache's rule (`tea_cache`)."""

    threshold: float
    coefficients: tuple[float, ...]
    needs_input = True

    def reuses(self, memory: Memory) -> bool:
        now, before = memory.entering, memory.entered
        if now is None or before is None or memory.step == memory.steps - 1:
            return False
        # A difference below zero, which a polynomial gives outside of what it was fitted to, is none.
        rescaled = [max(0.0, float(np.polyval(self.coefficients, x))) for x in relative_l1(now, before)]
        return memory.add(rescaled) < self.threshold


def relative_l1(now: mx.array, before: mx.array) -> list[float]:
    """mean |now - before| / mean |before| of every item of [B, ...]; infinite where there was nothing and now is."""
    now, before = now.astype(mx.float32), before.astype(mx.float32)
    axes = [*range(1, now.ndim)]
    change, size = mx.mean(mx.abs(now - before), axis=axes), mx.mean(mx.abs(before), axis=axes)
    return mx.where(change == 0, 0.0, change / size).tolist()  # type: ignore[return-value]


class Trajectory(OfOneModel):
    """What one trajectory keeps, and the stages of its steps.

    first, stop: the main blocks whose joint change is reused, or None for the velocity, and with it the whole step.
    """

    def __init__(self, rule: Rule, blocks: tuple[int, int] | None, steps: int, report: Report) -> None:
        self.rule, self.blocks, self.steps, self.report = rule, blocks, steps, report
        self._key: tuple[Any, ...] = ()
        self._restart()

    def fresh(self) -> None:
        """A copy of the model is in no trajectory."""

    def stages(self, stages: Sequence[Stage]) -> list[Stage]:
        """The stages of a step with what they take over; their names, and their fold as the call, stay."""
        start, stop = 0, len(stages)
        if self.blocks is not None:
            start = next(i for i, stage in enumerate(stages) if stage.name == "layers.0") + self.blocks[0]
            stop = start + self.blocks[1] - self.blocks[0]
        return [replace(stage, run=self._run(i, stage, start, stop)) for i, stage in enumerate(stages)]

    def _run(self, i: int, stage: Stage, start: int, stop: int) -> Any:
        def run(state: State) -> State:
            if i == 0:
                self._begin(state)
            if i == start:
                state = self._decide(state, stage)
            inside = start <= i < stop
            if isinstance(stage.module, TransformerBlock):
                self.report.blocks += 1
                self.report.skipped_blocks += inside and self._reusing
            if not inside or not self._reusing:
                state = stage(state)
                if i == stop - 1:
                    self._keep(state)
                return state
            return self._take_over(state) if i == stop - 1 else state

        return run

    def _begin(self, state: State) -> None:
        """A new step, which continues the trajectory or starts it anew."""
        try:
            timesteps = [float(t) for t in np.array(state.timestep.astype(mx.float32)).tolist()]
        except ValueError:
            raise InputError(
                "a model that reuses earlier steps decides in Python what to reuse, and so cannot be inside "
                "mx.compile; compile its blocks: zimage.transforms.compile_blocks"
            ) from None
        captions = as_tuple(state.caption_features)
        known, key = self._key, (state.latents.shape, state.latents.dtype, *captions)
        same = len(known) == len(key) and known[:2] == key[:2]
        same = same and all(a is b for a, b in zip(known[2:], captions, strict=True))
        grown = same and all(now > then for now, then in zip(timesteps, self._memory.timesteps, strict=True))
        if known and not grown:
            self.report.restarts += 1
            self._restart()
        self._key = key  # and with it the captions, whose identity is compared: no other array can be at their place
        self._memory.step += 1
        self._memory.timesteps = timesteps
        if self._memory.step == 0:
            self._memory.compute()
        self.report.steps += 1

    def _restart(self) -> None:
        self._memory, self._reusing = Memory(self.steps), False
        self._before: mx.array | None = None
        self._after: mx.array | None = None

    def _decide(self, state: State, stage: Stage) -> State:
        """Whether this step reuses; the state as it enters what may be skipped."""
        memory = self._memory
        if self.blocks is not None:
            state = _joined(state)
        if self.rule.needs_input:
            memory.entered, memory.entering = memory.entering, _modulated(state, stage)
        self._reusing = self.rule.reuses(memory) and self._after is not None
        if not self._reusing:
            self.report.computed.append(self.report.steps - 1)
            memory.compute()
            self._before, self._after = state.joint, None
        return state

    def _keep(self, state: State) -> None:
        self._after = state.velocity if self.blocks is None else state.joint

    def _take_over(self, state: State) -> State:
        assert self._after is not None
        if self.blocks is None:
            return replace(state, velocity=self._after)
        assert state.joint is not None and self._before is not None
        return replace(state, joint=state.joint + (self._after - self._before))


def _joined(state: State) -> State:
    """The state with the joint sequence that the first main block makes."""
    if state.joint is not None:
        return state
    assert state.image is not None and state.caption is not None
    return replace(state, image=None, caption=None, joint=mx.concatenate([state.image, state.caption], axis=1))


def _modulated(state: State, stage: Stage) -> mx.array:
    """The first main block's input after its norm and modulation."""
    assert isinstance(stage.module, TransformerBlock) and state.joint is not None
    temb = state.of_timestep(stage.module)
    assert temb is not None
    return stage.module.before_attention(state.joint, stage.module.modulation(temb)[0])


class StepCached(Transformer):
    """A transformer that reuses, in a trajectory, what an earlier step computed."""

    rule: Rule
    blocks: tuple[int, int] | None
    report: Report
    trajectory: Trajectory | None = None

    def stages(
        self, latents: mx.array, timestep: mx.array, caption_features: Captions, patch_size: int | None = None
    ) -> list[Stage]:
        stages = super().stages(latents, timestep, caption_features, patch_size)
        return stages if self.trajectory is None else self.trajectory.stages(stages)


def started(model: Transformer, steps: int) -> Transformer:
    """The model as a trajectory of `steps` steps calls it: one of its own where it reuses steps, else the same one.

    It shares all modules, and so what is compiled, with `model`, whose `report` is from now on that of this trajectory.
    Captions that `model` kept are let go: every trajectory pays for refining its own once, whoever drew them before.
    """
    if model.kept_captions is not None:
        model.kept_captions = model.kept_captions.fresh()
    if not isinstance(model, StepCached):
        return model
    model.report = Report()
    own = type(model).__new__(type(model))
    dict.update(own, model)
    own.__dict__.update(model.__dict__)
    own.trajectory = Trajectory(model.rule, model.blocks, steps, model.report)
    return own


def tea_cache(
    model: Transformer, threshold: float = FLUX_THRESHOLD, polynomial: str | Sequence[float] = "flux"
) -> Transformer:
    """Reuse the main blocks' change for as long as their input has changed little since: TeaCache.

    x is the relative L1 distance of the first main block's modulated input, `attention_norm1(joint) * (1 + scale)`,
    from that of the step before. The polynomial of x, an estimate of how much the output changes, is added up, and
    while the sum is below the threshold, the blocks' joint change of the last computed step is added to this step's
    input; at the threshold the blocks are computed and the sum starts from 0. The first and the last step are always
    computed. After F. Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, CVPR 2025,
    https://arxiv.org/abs/2411.19108, and its ports to FLUX and Lumina2; here a polynomial's value below 0 counts as 0.

    polynomial: one of `reusing.POLYNOMIALS`, coefficients from the highest power down, or those that `fitted` gives.
    Raises InputError for bad numbers.
    """
    require_threshold(threshold)
    return _cached(model, InputDistance(threshold, coefficients(polynomial)), (0, len(model.layers)))


def reuse_by_timestep(model: Transformer, threshold: float = GO_THRESHOLD) -> Transformer:
    """Reuse the whole velocity for as long as the timestep is near that of the last computed step.

    The rule that Ollama's Go implementation has always on for Z-Image (x/imagegen/cache/teacache.go there, called
    TeaCache): it looks at no activation, and adds up each step's distance in the noise level from the last computed one
    until that exceeds the threshold. Euler steps with one velocity are one step over all their noise levels, so that
    this is a plain run which leaves the reused levels out. Raises InputError for bad numbers.
    """
    require_threshold(threshold)
    return _cached(model, TimestepDistance(threshold), None)


def reuse_change(model: Transformer, interval: int = 2, first: int = 0, count: int | None = None) -> Transformer:
    """Compute `count` main blocks from block `first` on in every n-th step alone, and reuse their joint change.

    All blocks unless said otherwise. The static interval is that of FORA (P. Selvaraju et al.,
    https://arxiv.org/abs/2407.01425), which keeps the outputs of attention and feed-forward; what is kept here is the
    change that a range of blocks makes, as in Delta-DiT (P. Chen et al., https://arxiv.org/abs/2406.01125), so that the
    step's own input goes on through it. Raises InputError for numbers out of range.
    """
    blocks = len(model.layers)
    require_integer("interval", interval, 1)
    require_integer("first", first, 0, blocks - 1)
    if count is None:
        count = blocks - first
    require_integer("count", count, 1, blocks - first)
    return _cached(model, EveryNth(interval), (first, first + count))


def variants(
    model: Transformer,
    thresholds: Sequence[float],
    tea: Sequence[Sequence[Any]],
    every: Sequence[Sequence[Any]],
    line: Sequence[float] = (),
) -> dict[str, Transformer]:
    """Several of the above from plain numbers, by names such as timestep_0.15, tea_flux_0.25 and every_2_blocks_15-29.

    thresholds: of `reuse_by_timestep`; tea: (polynomial, threshold) pairs, where "fitted" stands for `line`; every:
    (interval, start, stop), start and stop as shares of the main blocks, 0.5 their middle. Raises InputError for what
    is none of these.
    """
    require_thresholds(thresholds)
    require_tea(tea)
    require_every(every)
    found: dict[str, Transformer] = {}
    for threshold in thresholds:
        found[f"timestep_{threshold}"] = reuse_by_timestep(model, threshold)
    for polynomial, threshold in tea:
        own = line if polynomial == FITTED else polynomial
        found[f"tea_{polynomial}_{threshold}"] = tea_cache(model, threshold, own)
    blocks = len(model.layers)
    for interval, start, stop in every:
        first, end = math.floor(start * blocks), math.ceil(stop * blocks)
        part = "" if end - first == blocks else f"_blocks_{first}-{end - 1}"
        found[f"every_{interval}{part}"] = reuse_change(model, interval, first, end - first)
    return found


def observed(
    model: Transformer, captions: Captions, latents: mx.array, levels: Sequence[float], patch_size: int | None = None
) -> list[tuple[float, float]]:
    """What TeaCache's polynomial is fitted to, of every step of a plain trajectory but the first, and every item.

    Pairs of the relative L1 distance of the first main block's modulated input from the step before, and of the change
    that the main blocks make, which is what is reused. levels: noise levels as of `scheduler.sigmas`.
    """
    pairs: list[tuple[float, float]] = []
    before: tuple[mx.array, mx.array] | None = None
    for sigma, next_sigma in zip(levels[:-1], levels[1:], strict=True):
        state = State(latents, mx.full((latents.shape[0],), 1.0 - sigma, dtype=mx.float32), captions)
        stages = Transformer.stages(model, *(state.latents, state.timestep, captions, patch_size))
        for stage in stages:
            if stage.name == "layers.0":
                state = _joined(state)
                joint, entering = state.joint, _modulated(state, stage)
            if stage.name == "final_layer":
                assert state.joint is not None and joint is not None
                change = state.joint - joint
            state = stage(state)
        assert state.velocity is not None
        latents = latents + (sigma - next_sigma) * state.velocity.astype(latents.dtype)
        mx.eval(latents, entering, change)
        if before is not None:
            pairs += zip(relative_l1(entering, before[0]), relative_l1(change, before[1]), strict=True)
        before = entering, change
    return pairs


def fitted(pairs: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """The least-squares polynomial of `observed` pairs, highest power first; of degree 4 as the published ones.

    Raises InputError for a degree out of range or fewer different distances than a polynomial of it needs.
    """
    require_integer("degree", degree, 0, 10)
    x, y = (np.array(values, np.float64) for values in zip(*pairs, strict=True)) if pairs else (np.zeros(0),) * 2
    if len(np.unique(x)) <= degree or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(
            f"a polynomial of degree {degree} needs {degree + 1} different finite distances at least, found "
            f"{len(np.unique(x))}; observe more steps"
        )
    return tuple(float(c) for c in np.polynomial.Polynomial.fit(x, y, degree).convert().coef[::-1])


def _cached(model: Transformer, rule: Rule, blocks: tuple[int, int] | None) -> Transformer:
    if isinstance(model, StepCached):
        raise InputError(f"the model reuses steps already, by {model.rule}; cache the model it was made from")
    if type(model) is not Transformer:
        raise InputError(f"a {type(model).__name__} cannot reuse steps; only a Transformer can")
    new = as_class(StepCached, model)
    new.rule, new.report = rule, Report()
    object.__setattr__(new, "blocks", blocks)  # MLX would take a tuple for parameters
    return new
