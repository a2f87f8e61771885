"""An ablation in one call: a baseline and its arms on the same inputs, compared by their time and by their output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zimage import half
from zimage.errors import InputError
from zimage.inputs import Inputs
from zimage.layers import clone
from zimage.measure import Comparison, NoiseFloor, compare_many, default_canary, noise_floor, timed
from zimage.transformer import Transformer

import mlx.core as mx
from mlx.utils import tree_map

if TYPE_CHECKING:
    import pandas as pd

Work = Callable[[], Any]  # builds its graph anew and returns the arrays to compute
Transform = Callable[[Transformer], Transformer]
_FEWEST_QUADS = 6  # of a noise floor


@dataclass(frozen=True)
class Ablation:
    """What came of an ablation: a comparison of time for each arm, and how far its velocity is from the baseline's.

    scope: what one call computes, such as "step". errors: relative L2, by arm; none where only time was compared.
    """

    scope: str
    noise_floor: NoiseFloor
    comparisons: dict[str, Comparison]
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """The noise floor, then an arm a line."""
        lines = [str(self.noise_floor)]
        for arm, found in self.comparisons.items():
            error = f"; relative L2 error {self.errors[arm]:.3g}" if arm in self.errors else ""
            lines.append(f"{found}{error}")
        return "\n".join(lines)

    def tables(self, weights_kind: str) -> dict[str, "pd.DataFrame"]:
        """The tables to record: `ablation`, `samples`, and `quality` where there are errors.

        weights_kind: "trained" or "synthetic", as `sources.describe(source).kind` says it.
        """
        import pandas as pd

        comparisons = [*self.comparisons.values()]
        timed_in: list[Comparison | NoiseFloor] = [*comparisons, self.noise_floor]
        samples = [row for trial, found in enumerate(timed_in) for row in found.sample_rows(self.scope, trial=trial)]
        tables = {
            "ablation": pd.DataFrame([found.row(self.scope) for found in comparisons]),
            "samples": pd.DataFrame(samples),
        }
        if self.errors:
            baseline = comparisons[0].baseline
            rows = [{"arm": arm, "value": error, "baseline": baseline} for arm, error in self.errors.items()]
            tables["quality"] = pd.DataFrame(rows).assign(metric="relative_l2_error", weights_kind=weights_kind)
        return tables


def ablate(
    model: Transformer,
    transforms: Mapping[str, Transform],
    example: Inputs,
    *,
    seed: int = 0,
    quads: int = 20,
    baseline: str = "baseline",
) -> Ablation:
    """Compare the model with what each of several transforms makes of it, by the time of a step and by its velocity.

    transforms: functions model -> model by the names of their arms, each called once, on `model`, which is the
    baseline. example: what all are called with, as of `inputs.example`. quads: at most. Meanwhile the model's weights
    are in memory a second time, for the noise floor. Raises InputError for a transform that gives no model, one of
    other velocities in shape, or that changes the model it was given; and MeasurementError as `measure.compare_many`.
    """
    wanted = model(*example)
    steady = bool(mx.array_equal(model(*example), wanted))  # else nothing can be told from a difference
    arms = {}
    for name, transform in transforms.items():
        arms[name] = transform(model)
        if not isinstance(arms[name], Transformer):
            given = type(arms[name]).__name__
            raise InputError(f"transform {name!r} must return the changed model, it returned a {given}")
        if steady and not mx.array_equal(model(*example), wanted):
            raise InputError(
                f"transform {name!r} changed the model that it was given, which is the baseline; change and return a "
                "copy: zimage.layers.clone(model)"
            )
    errors = {name: _error(name, arm(*example), wanted) for name, arm in arms.items()}
    works = {name: _step(arm, example) for name, arm in arms.items()}
    found = compare(
        _step(model, example), works, lambda: _step(copied(model), example), seed=seed, quads=quads, baseline=baseline
    )
    return Ablation(found.scope, found.noise_floor, found.comparisons, errors)


def compare(
    work: Work,
    arms: Mapping[str, Work],
    again: Callable[[], Work],
    *,
    seed: int = 0,
    quads: int = 20,
    scope: str = "step",
    baseline: str = "baseline",
) -> Ablation:
    """Compare the time of the arms' work with that of the baseline's, all interleaved, with a canary and a noise floor.

    work: builds its graph anew and returns the arrays to compute, as for `measure.timed`. again: gives the work of a
    second copy of the baseline, which is let go once the noise floor is known. Every arm is called once before,
    untimed. Raises MeasurementError as `measure.compare_many`.
    """
    canary, call = default_canary(), timed(work)
    floor = noise_floor(
        call, timed(again()), seed=seed, quads=max(quads, _FEWEST_QUADS), canary=canary, names=(baseline, "copy")
    )
    calls = {name: timed(arm) for name, arm in arms.items()}
    for first in calls.values():
        first()  # it builds what is not built yet
    comparisons = compare_many(
        call, calls, seed=seed, max_quads=quads, noise_floor=floor, canary=canary, baseline_name=baseline
    )
    return Ablation(scope, floor, comparisons)


def copied(model: Transformer) -> Transformer:
    """The model with all its parameters at other places in memory, as if it had been loaded a second time.

    Blocks on disk stay there: their arrays are read anew in every call as it is.
    """
    new = clone(model)
    layers, new.layers = new.layers, [block for block in new.layers if not block.streamed]
    new.update(tree_map(mx.array, new.parameters()))
    mx.eval(new.parameters())
    new.layers = layers
    return new


def _step(model: Transformer, example: Inputs) -> Work:
    return lambda: model(*example)


def _error(name: str, found: mx.array, wanted: mx.array) -> float:
    if found.shape != wanted.shape:
        raise InputError(
            f"transform {name!r} made a model whose velocity has the shape {list(found.shape)} in the place of "
            f"{list(wanted.shape)}; only equal shapes can be compared"
        )
    return half.relative_l2(found, wanted)
