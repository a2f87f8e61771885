"""Which runs are of the same thing: the same notebook on the same inputs, whatever machine and versions they ran on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zimage.machine import MOMENTARY, UNKNOWN

import pandas as pd

# Parameters that make another model of the source; a notebook that has none of them leaves the source as it is.
OF_THE_MODEL = ("quantization", "transforms")
# How hard was looked, and with what: these change how sure a result is, or where it ran, but not what it is about.
OF_THE_EFFORT = (
    *("quads", "rounds", "sustained_s", "processes", "power_s", "capture", "device"),
    *("diffusers_python", "mflux_python"),
)
_FIRST = ("device", "mlx", "driver", "blas", "kernels", "tuning", "zimage", "commit", "sources")


@dataclass(frozen=True)
class Recorded:
    """A run as it is compared: where it is, what it ran on which inputs, and the tables it left.

    name: `experiment/key`. weights: source, kind and digest, where the run had any. facts: what it recorded of its
    machine and programs. error: why it failed, "" for a completed run. unreadable: why a table cannot be read, by name.
    """

    name: str
    notebook: str
    device: str
    started: str
    parameters: Mapping[str, Any]
    weights: Mapping[str, Any] | None
    recipe: Any
    facts: Mapping[str, str]
    tables: Mapping[str, pd.DataFrame]
    error: str = ""
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """The experiment it belongs to."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """The kind of its weights: "trained", "synthetic" or ""."""
        return str((self.weights or {}).get("kind", ""))

    def inputs(self) -> dict[str, Any]:
        """What it computed on: its parameters but for those of the effort, each as what it meant."""
        said: dict[str, Any] = dict.fromkeys(OF_THE_MODEL) | dict(self.parameters)
        if said.get("dtype", "") is None:  # what suits the device; see backend.default_dtype
            said["dtype"] = "bfloat16" if self.facts.get("device_type") == "gpu" else "float32"
        if self.recipe is not None:  # what is in the recipe's file counts, wherever it lay
            said["quantization"] = self.recipe
        if self.weights is not None and "source" in said:
            del said["source"]
            said["weights"] = self.weights.get("digest")
        return {name: _plain(value) for name, value in said.items() if name not in OF_THE_EFFORT}


def differences(a: Recorded, b: Recorded, allowed: Sequence[str] = ()) -> list[str]:
    """In which inputs two runs of one notebook differ, each in words; a parameter that only one of them has does not
    count, because one version of a notebook has more of them than another."""
    left, right = a.inputs(), b.inputs()
    return [
        f"{name} {_words(name, left[name])} against {_words(name, right[name])}"
        for name in left
        if name in right and left[name] != right[name] and name not in allowed
    ]


def only_one_has(a: Recorded, b: Recorded) -> list[str]:
    """The inputs that only one of two runs has a parameter for, in words."""
    sides = ((a.inputs(), b.inputs(), "A"), (b.inputs(), a.inputs(), "B"))
    return [f"{n}={v} only in {side}" for own, other, side in sides for n, v in own.items() if n not in other]


def match(
    a: Iterable[Recorded], b: Iterable[Recorded], allowed: Sequence[str] = ()
) -> tuple[list[tuple[Recorded, Recorded]], list[Recorded], list[Recorded]]:
    """Runs of A and B with the same notebook and inputs, in pairs, and those of A and of B that are left over.

    Of several that fit, one of the same experiment counts first, then one that completed, then the newest.
    """
    pairs: list[tuple[Recorded, Recorded]] = []
    left_a: list[Recorded] = []
    left_b = sorted(b, key=lambda run: run.started)
    for one in sorted(a, key=lambda run: (not run.error, run.started), reverse=True):
        fitting = [two for two in left_b if two.notebook == one.notebook and not differences(one, two, allowed)]
        if not fitting:
            left_a.append(one)
            continue
        found = max(fitting, key=lambda two: (two.experiment == one.experiment, not two.error, two.started))
        left_b = [two for two in left_b if two is not found]
        pairs.append((one, found))
    return pairs, left_a, left_b


def why_alone(run: Recorded, others: Sequence[Recorded], paired: Iterable[Recorded], side: str) -> str:
    """Why a run has no counterpart among the `others`, which are those of `side`; `paired` are its own side's."""
    if any(one.notebook == run.notebook and not differences(run, one) for one in paired):
        return "another run of the same inputs is compared"
    same = [one for one in others if one.notebook == run.notebook]
    if not same:
        return f"{side} has no run of {run.notebook}"
    apart = [differences(*((run, one) if side == "B" else (one, run))) for one in same]
    nearest = min(apart, key=len)
    return ", ".join(nearest) if nearest else f"{side}'s run of the same inputs is compared with another one"


def environments(a: Iterable[Mapping[str, str]], b: Iterable[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Every lasting fact about machine and programs in which A and B differ, what matters most first: (name, A, B)."""
    sides = [_values(facts) for facts in (a, b)]
    names = {name for side in sides for name in side if name not in MOMENTARY}
    order = {name: place for place, name in enumerate(_FIRST)}

    def place(name: str) -> tuple[int, str]:
        return order.get(name, len(order) + (not name.startswith("MLX_"))), name

    texts = [
        (name, *(" | ".join(side.get(name, {})) or UNKNOWN for side in sides)) for name in sorted(names, key=place)
    ]
    return [(name, one, two) for name, one, two in texts if one != two]


def matters(name: str) -> bool:
    """Whether a fact that `environments` gives is one of those that decide what a run measures."""
    return name in _FIRST or name.startswith("MLX_")


def _values(several: Iterable[Mapping[str, str]]) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = {}
    for facts in several:
        for name, value in facts.items():
            found.setdefault(name, {})[value] = None
    return {name: dict.fromkeys(sorted(values)) for name, values in found.items()}


def _plain(value: Any) -> Any:
    """No transforms at all are the same however they are written; True is not 1."""
    return None if value in ([], "") else (str(value), "") if isinstance(value, bool) else value


def _words(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        value = value[0]
    text = "none" if value is None else str(value)
    return text[:12] if name == "weights" else text if len(text) <= 60 else f"{text[:60]}..."
