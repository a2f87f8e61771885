"""Arms by their names alone: a precision and then transforms, joined by ` + `, such as `4bit-g32 + fast`.

The precision is a dtype, "float32" or "bfloat16", or how the weights of a model that is there already are packed: a
packing's name or a recipe's file. Arms that are only asked for need no MLX.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage import recipes
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.transform_names import require_known

if TYPE_CHECKING:
    from zimage.inputs import Inputs
    from zimage.transformer import Transformer

DTYPES = ("float32", "bfloat16")
JOINT = " + "


@dataclass(frozen=True)
class Lever:
    """What an arm does: its precision, and the names of its transforms in order.

    As text it is the arm's name, in which a recipe's file stands without its folder and ending.
    """

    precision: str
    transforms: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> "Lever":
        """From an arm's name. Raises InputError for what is no name and for unknown transforms."""
        parts = [part.strip() for part in name.split("+")] if isinstance(name, str) else []
        if not parts or not all(parts):
            raise InputError(f"an arm is a precision and transforms such as '4bit{JOINT}fast', found {name!r}")
        require_known(parts[1:])
        return cls(parts[0], tuple(parts[1:]))

    def __str__(self) -> str:
        return JOINT.join([str(recipes.label(self.precision)), *self.transforms])


def require(wanted: Sequence[str], *others: str) -> list[Lever]:
    """The levers of these names, in their order. others: names that none of them may have.

    Raises InputError unless there is one at least and all are different, and for names that are not known. A recipe's
    file is not looked at.
    """
    if not isinstance(wanted, (list, tuple)) or not wanted:
        raise InputError(f"arms must be a list of names, one at least, found {wanted!r:.80}")
    found = [Lever.parse(name) for name in wanted]
    names = [*others, *map(str, found)]
    for name in names:
        if names.count(name) > 1:
            beside = f"; the baseline is {', '.join(map(repr, others))}, and all must differ" if others else ""
            raise InputError(f"arm {name!r} is there twice{beside or '; all must differ'}")
    for lever in found:
        if lever.precision not in DTYPES and not recipes.is_file(lever.precision):
            recipes.read(lever.precision)
    return found


def named(wanted: Sequence[str], config: TransformerConfig, baseline: str) -> list[Lever]:
    """`require` of these names and that of the baseline, whose packings, recipes' files too, must fit the config."""
    found = require(wanted, baseline)
    for lever in found:
        if lever.precision not in DTYPES:
            recipes.packing(config, recipes.read(lever.precision))
    return found


def made(lever: Lever, model: "Transformer", source: str, *examples: "Inputs") -> "Transformer":
    """The arm of a lever, sharing with `model` what it can: a packed one all but what is packed.

    model: of `source`, in floating point; another dtype than its own is loaded anew. examples: as in
    `arms.transformed`. Raises as `quantize`, `load_transformer` and `arms.transformed` do.
    """
    from zimage import arms  # brings MLX, which names do not need
    from zimage.transforms import quantize
    from zimage.weights import load_transformer

    if lever.precision not in DTYPES:
        plain = quantize(model, lever.precision)
    else:
        own = str(model.dtype).removeprefix("mlx.core.")
        plain = model if lever.precision == own else load_transformer(source, lever.precision)
    return arms.transformed(plain, lever.transforms, *examples)
