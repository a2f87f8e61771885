"""What PEFT keeps of an adapter's training, which says by how much the adapter's layers are scaled."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.errors import WeightsError
from zimage.sources import plain, read_json, read_whole_header

_CHANGES_ITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Patterns:
    """Values for the modules whose names end in some pattern; of several that fit, the first counts, as in PEFT.

    PEFT takes expressions. What trainers write are names, anchored by ^ or not, and nothing else is taken here.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values: dict[tuple[bool, str], tuple[int, Any]] = {}
        for order, (pattern, value) in enumerate(values.items()):
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if set(name) & set("\\^$*+?()[]{}|"):
                raise WeightsError(f"{where} has {plain(repr(pattern))}; zimage takes module names, not expressions")
            self._values.setdefault((pattern.startswith("^"), name), (order, value))

    def get(self, module: str) -> Any:
        """The value for a module, None where no pattern fits."""
        parts = module.split(".")
        ends = [(True, module), *((False, ".".join(parts[i:])) for i in range(len(parts)))]
        found = [self._values[end] for end in ends if end in self._values]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class Settings:
    """What PEFT keeps of an adapter's training: its rank and alpha, and those of the modules that differ."""

    where: str
    rank: int | None
    alpha: float | None
    ranks: _Patterns
    alphas: _Patterns
    rslora: bool

    def factor(self, module: str, rank: int) -> float:
        """What a pair of `rank` is multiplied by. Raises WeightsError where the settings say another rank."""
        expected = self.ranks.get(module) or self.rank
        if expected not in (None, rank):
            raise WeightsError(
                f"{self.where} says rank {expected} for {module}, found rank {rank}; is it of another adapter?"
            )
        alpha = self.alphas.get(module)
        alpha = self.alpha if alpha is None else alpha
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_settings(file: Path) -> Settings | None:
    """The settings in the file's metadata, else in the adapter_config.json beside it, else None."""
    metadata = read_whole_header(file).metadata
    if "lora_adapter_metadata" in metadata:
        where, text = f"{plain(file)}: lora_adapter_metadata", metadata["lora_adapter_metadata"]
        values = _json(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b"", where)
        if isinstance(values, dict):  # the keys of each adapted model begin with the model's name
            values = {key.removeprefix("transformer."): value for key, value in values.items()}
        return _checked(values, where)
    beside = file.parent / "adapter_config.json"
    if not os.path.isfile(beside):
        return None
    return _checked(read_json(beside), plain(beside))


def _checked(values: Any, where: str) -> Settings:
    if not isinstance(values, dict):
        raise WeightsError(f"{where}: expected a JSON object, found {type(values).__name__}")

    def check(name: str, value: Any, right: bool, expected: str) -> None:
        if not right:
            shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
            raise WeightsError(f"{where}: {plain(name)} must be {expected}, found {plain(shown)}")

    given = {name: value for name, value in values.items() if value is not None}
    patterns = {}
    for one, several, right, expected in (
        ("r", "rank_pattern", _is_rank, "a positive integer"),
        ("lora_alpha", "alpha_pattern", is_number, "a finite number"),
    ):
        check(one, given.get(one), one not in given or right(given[one]), expected)
        own = given.get(several, {})
        check(several, own, isinstance(own, dict), "an object")
        for pattern, value in own.items():
            check(f"{several}.{pattern}", value, right(value), expected)
        patterns[several] = _Patterns(own, f"{where}: {several}")
    rslora = given.get("use_rslora", False)
    check("use_rslora", rslora, isinstance(rslora, bool), "true or false")
    start = given.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_ITS_BASE):
        raise WeightsError(
            f"{where}: init_lora_weights {plain(repr(start))} means base weights of its own; save it as a plain LoRA"
        )
    return Settings(
        where, given.get("r"), given.get("lora_alpha"), patterns["rank_pattern"], patterns["alpha_pattern"], rslora
    )  # fmt: skip


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: not valid JSON: {plain(error)}") from None
