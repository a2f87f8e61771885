"""Which layer to pack how, from what packing each alone costs: the fewest bytes within an error, or the least error.

The squared errors of single changes are taken to add up, to `factor` times their sum: how true that is of a model is
for `sensitivity` to measure. Every layer then has a list of choices, of which one is taken; along the convex hull of
each list, the step that costs the least squared error a byte comes first. On that path nothing of the same size has a
smaller sum; in the bytes that are left over at its end, further single steps are taken where they fit.

Nothing here imports MLX.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zimage.errors import InputError
from zimage.quantization import Quantization
from zimage.recipes import FUSED, Recipe, Rule, published_paths


@dataclass(frozen=True)
class Choice:
    """One way to store a layer, None for unpacked: its bytes, and the squared relative error that it alone makes."""

    quantization: Quantization | None
    bytes: int
    squared_error: float


@dataclass(frozen=True)
class Mix:
    """One choice for each layer, by its published path, and the factor that their squared errors add up to.

    Layers that fusing joins may have one choice together, by the path of the product that it makes of them.
    """

    choices: Mapping[str, Choice]
    factor: float = 1.0

    @property
    def bytes(self) -> int:
        """Bytes of all these layers' weights."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def error(self) -> float:
        """The relative error that is predicted for all of them together."""
        return math.sqrt(self.factor * sum(choice.squared_error for choice in self.choices.values()))

    @property
    def recipe(self) -> Recipe:
        """The recipe that packs so; layers that are not among these stay unpacked only where the default is."""
        return recipe(self.packing)

    @property
    def packing(self) -> dict[str, Quantization | None]:
        """How each layer is packed, by its published path, those that have one choice together one by one."""
        return {part: choice.quantization for path, choice in self.choices.items() for part in published_paths(path)}


Choices = Mapping[str, Sequence[Choice]]


def fusable(choices: Choices) -> Choices:
    """The choices of layers that fusing joins (QKV, gate and up) as one, by the path of their product.

    A mix of these packs such layers alike, as a product of them all needs it. A choice is one that all of them have,
    with the sums of their bytes and squared errors.
    """
    found: dict[str, Sequence[Choice]] = {}
    for path, some in choices.items():
        parent, _, name = path.rpartition(".")
        fused = next((f"{parent}.{product}" for product, parts in FUSED.items() if name in parts), path)
        parts = [part for part in published_paths(fused) if part in choices]
        if fused == path or len(parts) < len(published_paths(fused)):
            found[path] = some
        elif fused not in found:
            each = [{choice.quantization: choice for choice in choices[part]} for part in parts]
            common = [way for way in each[0] if all(way in one for one in each)]
            found[fused] = [
                Choice(way, sum(one[way].bytes for one in each), math.fsum(one[way].squared_error for one in each))
                for way in common
            ]
    return found


def finest(choices: Choices, factor: float = 1.0) -> Mix:
    """The mix of the choices that err least."""
    return Mix({path: _hull(path, some)[-1] for path, some in choices.items()}, require_positive(factor, "factor"))


def fewest_bytes(choices: Choices, most_error: float, factor: float = 1.0) -> Mix:
    """The mix of the fewest bytes whose predicted error is at most `most_error`.

    Raises InputError where the best choice of every layer makes more error than that, and for a budget or a factor that
    isn't a positive number.
    """
    require_positive(most_error, "error budget")
    hulls = {path: _hull(path, some) for path, some in choices.items()}
    best = finest(choices, factor)
    if best.error > most_error:
        raise InputError(
            f"error budget {most_error:g} can't be met: with the best packing offered of every layer the error is "
            f"predicted to be {best.error:.3g}; allow that, or offer packings of more bits, or null for none"
        )
    limit = most_error**2 / factor
    total = sum(choice.squared_error for choice in best.choices.values())

    def fits(old: Choice, new: Choice) -> bool:
        nonlocal total
        after = total + new.squared_error - old.squared_error
        if after > limit:
            return False
        total = after
        return True

    return Mix(_walk(hulls, down=True, fits=fits), factor)


def least_error(choices: Choices, most_bytes: int, factor: float = 1.0) -> Mix:
    """The mix of the least predicted error whose layers have at most `most_bytes` of weights.

    Raises InputError where the smallest choice of every layer takes more than that, and for numbers that aren't
    positive.
    """
    require_positive(most_bytes, "byte budget")
    hulls = {path: _hull(path, some) for path, some in choices.items()}
    smallest = Mix({path: hull[0] for path, hull in hulls.items()}, require_positive(factor, "factor"))
    if smallest.bytes > most_bytes:
        raise InputError(
            f"byte budget {most_bytes:,} can't be met: the smallest packing offered of every layer takes "
            f"{smallest.bytes:,}; allow that, or offer packings of fewer bits"
        )
    total = smallest.bytes

    def fits(old: Choice, new: Choice) -> bool:
        nonlocal total
        after = total + new.bytes - old.bytes
        if after > most_bytes:
            return False
        total = after
        return True

    return Mix(_walk(hulls, down=False, fits=fits), factor)


def _walk(
    hulls: Mapping[str, Sequence[Choice]], down: bool, fits: Callable[[Choice, Choice], bool]
) -> dict[str, Choice]:
    """The choices at the end of a walk along all hulls at once, down to fewer bytes or up to less error.

    Hulls are convex, so that a layer's own steps come in their order when all are sorted by squared error a byte. A
    layer of which one step did not fit takes none of those behind it.
    """
    steps = []
    for path, hull in hulls.items():
        for place, (small, large) in enumerate(pairwise(hull)):
            price = (small.squared_error - large.squared_error) / (large.bytes - small.bytes)
            steps.append((price, path, -place, large, small) if down else (-price, path, place, small, large))
    at = {path: hull[-1 if down else 0] for path, hull in hulls.items()}
    for _, path, _, old, new in sorted(steps, key=lambda step: step[:3]):
        if at[path] is old and fits(old, new):
            at[path] = new
    return at


def _hull(path: str, choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of a layer's choices, bytes rising and error falling. Raises InputError for bad numbers."""
    if not choices or any(not math.isfinite(c.squared_error) or c.squared_error < 0 or c.bytes < 0 for c in choices):
        raise InputError(f"{path}: needs choices with a size and an error, at least one and all finite")
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.squared_error)):
        if hull and (choice.bytes == hull[-1].bytes or choice.squared_error >= hull[-1].squared_error):
            continue  # another takes no more bytes and makes no more error
        while len(hull) > 1 and _above(hull[-2], hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _above(left: Choice, middle: Choice, right: Choice) -> bool:
    """Whether `middle` lies on or above the line from `left` to `right`."""
    first = (left.squared_error - middle.squared_error) * (right.bytes - middle.bytes)
    return first <= (middle.squared_error - right.squared_error) * (middle.bytes - left.bytes)


def require_positive(value: float, name: str) -> float:
    """The number `value`. Raises InputError, which calls it `name`, unless it is a positive one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} must be a positive number, found {value!r:.60}")
    return float(value)


def recipe(packing: Mapping[str, Quantization | None]) -> Recipe:
    """A short recipe that packs each of these layers, by its published path, as it says, None for not at all.

    The default is what most layers have, then a rule a block for what most of its layers have where that differs, then
    a rule a layer. Layers that are not named fall to the default: name all that a model's blocks have.
    """
    default = _commonest(packing.values())
    by_block: dict[str, dict[str, Quantization | None]] = {}
    for path, quantization in packing.items():
        by_block.setdefault(".".join(path.split(".")[:2]), {})[path] = quantization
    rules = []
    for block, layers in by_block.items():
        common = default
        odd = sum(quantization != default for quantization in layers.values())
        own = _commonest(layers.values())
        if odd > 1 + sum(quantization != own for quantization in layers.values()):  # the block's own rule pays
            common = own
            rules.append(Rule(f"{block}.*", own))
        rules += [Rule(path, quantization) for path, quantization in layers.items() if quantization != common]
    return Recipe(default, tuple(rules))


def _commonest(values: Iterable[Quantization | None]) -> Quantization | None:
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None
