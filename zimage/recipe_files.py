"""Recipes as people write them, checked against what they may hold; see `recipes` for what they mean."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimage.errors import InputError
from zimage.quantization import AFFINE_GROUPS, Quantization
from zimage.recipes import Recipe, Rule, require_file
from zimage.strict import Strict, validate
from zimage.yaml_lines import Document, Place, load

import yaml
from pydantic import Field

MAX_RULES = 1000


class _Rule(Strict):
    pattern: str = Field(min_length=1, max_length=200)
    quantization: str | None
    group_size: int | None = None


class _File(Strict):
    default: str | None = None
    group_size: int | None = None
    rules: list[_Rule] = Field(default=[], max_length=MAX_RULES)


def read(path: Path) -> Recipe:
    """The recipe in a YAML or JSON file. Raises InputError with file and line."""
    require_file(path)
    return _recipe(load(path, "a recipe", InputError))


def write(path: str | Path, recipe: Recipe, comments: Sequence[str] = ()) -> Path:
    """Write `recipe` to a YAML or JSON file, from which `read` gives it back, and give its path.

    comments: lines that a YAML file opens with; JSON has no place for them. A file that is there is replaced, whole or
    not at all. Raises InputError for a name that is no recipe's and where it cannot be written.
    """
    target = Path(path)
    require_file(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        draft.write_text(text(recipe, comments, target.suffix), encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


def text(recipe: Recipe, comments: Sequence[str] = (), suffix: str = ".yaml") -> str:
    """What `write` puts into a file whose name ends in `suffix`."""
    if suffix == ".json":
        return json.dumps(recipe.content, indent=2) + "\n"
    head = "".join(f"# {''.join(filter(str.isprintable, ' '.join(line.split())))}\n" for line in comments)
    content = {key: value for key, value in recipe.content.items() if value or key == "default"}
    flow = None if "rules" in content else False  # None: a rule a line
    return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=flow, width=1000)


def of_mapping(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a dict holds. Raises InputError, which names the place in it."""
    return _recipe(Document("recipe", dict(values), None, InputError))


def _recipe(document: Document) -> Recipe:
    file = validate(document, _File, "a recipe")
    if not document.value:
        raise document.error((), "it is empty; a recipe has 'default', 'rules', or both")
    given, takers = file.group_size, 0

    def quantization(name: str | None, own: int | None, place: Place) -> Quantization | None:
        """What a name and the group beside it mean; `takers` counts those that take the recipe's group."""
        nonlocal takers
        beside = (*place, "group_size")
        if name is None:
            if own is not None:
                raise document.error(beside, "group_size is of no use where quantization is null; leave it out")
            return None
        try:
            found = Quantization.parse(name)
        except InputError as error:
            raise document.error((*place, "quantization" if place else "default"), str(error)) from None
        fixed = found.mode != "affine" or "-g" in name
        group = own if own is not None else given
        if group is None:
            return found
        if fixed:
            if own is not None and own != found.group_size:
                raise document.error(
                    beside, f"group_size {own} contradicts {name}, whose groups are {found.group_size}"
                )
            takers += given == found.group_size
            return found
        if group not in AFFINE_GROUPS:
            where = beside if own is not None else ("group_size",)
            raise document.error(where, f"group_size of {name} must be 32, 64 or 128, found {group}")
        takers += own is None
        return Quantization(found.mode, found.bits, group)

    default = quantization(file.default, None, ())
    rules = tuple(
        Rule(rule.pattern, quantization(rule.quantization, rule.group_size, ("rules", i)), _place(document, i))
        for i, rule in enumerate(file.rules)
    )
    if given is not None and not takers:
        raise document.error(("group_size",), f"group_size {given} is of no use: nothing here takes it; leave it out")
    return Recipe(default, rules)


def _place(document: Document, rule: int) -> str:
    place = ("rules", rule, "pattern")
    return document.where(place) if document.lines is not None else f"{document.where(place)}, rule {rule + 1}"
