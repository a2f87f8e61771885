"""Quantization recipes: one packing for the linear layers of all blocks, and rules for some of them by their paths.

A recipe is a mapping, in Python or in a YAML or JSON file:

    default: 4bit                               # a quantization's name, or null: not packed
    group_size: 64                              # of affine packings that don't say their own
    rules:                                      # the last one that matches a layer wins
      - {pattern: "*.adaLN_modulation.*", quantization: null}
      - {pattern: "layers.0.*", quantization: 8bit, group_size: 32}

Patterns are shell patterns over whole published paths such as `layers.0.attention.to_q`, case-sensitive, as
`fnmatch.fnmatchcase` has them: `*` is any text, dots included, `?` one character, `[0-3]` one of several. A pattern
that matches no layer is refused: what it was meant for would be packed in another way than its recipe seems to say.
Embedders, norms and the final layer are never packed.

Nothing here imports MLX.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.quantization import NAMES, Quantization
from zimage.sources import published

SUFFIXES = (".yaml", ".yml", ".json")
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "w13": ("w1", "w3")}  # layers whose rows are those of several
Packing = Mapping[str, Quantization]  # of each packed layer, by its published path


@dataclass(frozen=True)
class Rule:
    """How the layers are packed whose paths match `pattern`, None for not at all; `place` is where that is written."""

    pattern: str
    quantization: Quantization | None
    place: str = field(default="the recipe", compare=False)


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of the blocks are packed: as `default` says, or the last of `rules` that matches."""

    default: Quantization | None
    rules: tuple[Rule, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """The recipe as plain data that `read` takes, every name with its group: alike for recipes that mean the same.

        Where it was read from is no part of it.
        """

        def name(quantization: Quantization | None) -> str | None:
            return None if quantization is None else str(quantization)

        rules = [{"pattern": rule.pattern, "quantization": name(rule.quantization)} for rule in self.rules]
        return {"default": name(self.default), "rules": rules}

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


Asked = str | Path | Mapping[str, Any] | Recipe | Quantization  # what may stand for a recipe


def read(asked: Asked) -> Recipe:
    """The recipe that is meant by a quantization's name, the path of a recipe's file, or its content as a dict.

    Raises InputError, one line, with the line of the file, for anything else.
    """
    if isinstance(asked, Recipe):
        return asked
    if isinstance(asked, Quantization):
        return Recipe(asked)
    if isinstance(asked, (Path, Mapping)) or is_file(asked):
        from zimage import recipe_files  # brings pydantic, which a name does not need

        return recipe_files.of_mapping(asked) if isinstance(asked, Mapping) else recipe_files.read(Path(asked))
    try:
        return Recipe(Quantization.parse(asked))
    except InputError:
        raise InputError(
            f"unknown quantization {asked!r:.200}; known are {NAMES}, and recipes: a dict, or a file that ends in "
            f"{', '.join(SUFFIXES)}"
        ) from None


def is_file(asked: object) -> TypeGuard[str]:
    """Whether a text is meant as the path of a recipe's file, whether or not there is one."""
    return isinstance(asked, str) and asked.endswith(SUFFIXES) and asked.isprintable()


def require_known(modes: object, different: bool = False) -> None:
    """Raise InputError unless it is a list of packings; with `different` one at least, and none of them twice.

    A recipe's file is not looked at.
    """
    if not isinstance(modes, list):
        raise InputError(f"modes must be a list of packings, found {modes!r:.60}")
    for mode in modes:
        if not is_file(mode):
            read(mode)
    if different and (not modes or len({label(mode) for mode in modes}) < len(modes)):
        raise InputError(f"modes must be different ones, one at least, found {modes}")


def require_file(path: str | Path) -> None:
    """Raise InputError unless a recipe's file can have this name."""
    if Path(path).suffix not in SUFFIXES or not str(path).isprintable():
        raise InputError(f"{str(path)!r:.200} is no recipe's file; its name ends in {', '.join(SUFFIXES)}")


def file_of(arm: object) -> str | None:
    """The recipe's file that is the precision of an arm such as `mixed.yaml + fast`; None where it is no file."""
    precision = arm.split("+")[0].strip() if isinstance(arm, str) else None
    return precision if is_file(precision) else None


def label(asked: object) -> str | None:
    """A short name for tables and plots: a quantization's own, a recipe's file without its folder; None for None."""
    if isinstance(asked, (str, Path)):
        return Path(asked).stem if is_file(str(asked)) else str(asked)
    return None if asked is None else "recipe"


def packing(config: TransformerConfig, asked: Asked | Packing | None) -> dict[str, Quantization]:
    """How each layer of a model is packed, by its published path; layers that are not packed are left out.

    A packing by path, such as a source's own, is taken as it is. Raises InputError as `read` does, for a pattern that
    matches no linear layer of a block, and for a layer whose sizes do not allow its packing.
    """
    if asked is None:
        return {}
    if isinstance(asked, Mapping) and any(isinstance(value, Quantization) for value in asked.values()):
        return dict(asked)
    recipe = read(asked)
    layers = {
        path: shape for path, shape in published.linears(config).items() if path.split(".")[0] in published.BLOCKS
    }
    chosen: dict[str, Quantization | None] = dict.fromkeys(layers, recipe.default)
    for rule in recipe.rules:
        matching = re.compile(fnmatch.translate(rule.pattern)).match
        matched = [path for path in layers if matching(path)]
        if not matched:
            example = next(reversed(layers), "none")
            raise InputError(
                f"{rule.place}: pattern {rule.pattern!r} matches no linear layer of this model's blocks, such as "
                f"{example}; mend or remove the rule"
            )
        chosen.update(dict.fromkeys(matched, rule.quantization))
    found = {path: quantization for path, quantization in chosen.items() if quantization is not None}
    for path, quantization in found.items():
        quantization.require(path, *layers[path])
    return found


def of_layer(found: Packing, path: str) -> Quantization | None:
    """How the layer at `path` is packed by `found`, None for not at all; it may be one that fusing made.

    Raises InputError where the parts of a fused layer would be packed differently.
    """
    parts = {part.rpartition(".")[2]: found.get(part) for part in published_paths(path)}
    if len(set(parts.values())) > 1:
        told = ", ".join(f"{part} {quantization or 'not packed'}" for part, quantization in parts.items())
        raise InputError(f"{path} is one product, whose parts must be packed alike, found {told}; mend the recipe")
    return next(iter(parts.values()))


def published_paths(path: str) -> list[str]:
    """The published paths of a layer's parts: its own, or several where fusing made it."""
    parent, _, name = path.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(name, (name,))]
