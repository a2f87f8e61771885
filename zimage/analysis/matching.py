"""Which runs are of the same thing: the same notebook on the same inputs, whatever machine and versions they ran on.

Which arms and sizes a run was asked for makes it no other thing: `match` also pairs runs that differ in these alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
# Which arms, scopes and sizes there are. Every row names its own and means the same whichever others there are, so that
# rows can be compared by name. What makes another row of the same name is none of these: the seeds that an error is
# taken over (`draws`, `trajectories`), or what a recipe may choose from (`ladder`).
OF_THE_ROWS = (
    *("arms", "block_sizes", "blocks", "details", "every", "modes", "published", "published_px", "row_counts"),
    *("scopes", "sizes", "streams", "sustained_sizes", "tea", "thresholds", "unload", "variables"),
)
_FIRST = ("device", "mlx", "driver", "blas", "kernels", "tuning", "zimage", "commit", "sources")


@dataclass(frozen=True)
class Recorded:
    """A run as it is compared: where it is, what it ran on which inputs, and the tables it left.

    name: `experiment/key`. weights: source, kind and digest, where the run had any. facts: what it recorded of its
    machine and programs. error: why it failed, "" for a completed run. unreadable: why a table cannot be read, by name.
    recipes: what the recipes say that its arms are made by, by their names in arms.
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
    recipes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """The experiment it belongs to."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """The kind of its weights: "trained", "synthetic" or ""."""
        return str((self.weights or {}).get("kind", ""))

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What it computed on: its parameters but for those of the effort, each as what it meant."""
        said: dict[str, Any] = dict.fromkeys(OF_THE_MODEL) | dict(self.parameters)
        if "dtype" in said:
            said["dtype"] = dtype_of(said, self.facts)
        if self.recipe is not None:  # what is in the recipe's file counts, wherever it lay
            said["quantization"] = self.recipe
        said |= {f"recipe {name}": content for name, content in self.recipes.items()}  # a row's name says nothing of it
        if self.weights is not None and "source" in said:
            del said["source"]
            said["weights"] = self.weights.get("digest")
        if "unload" in said and isinstance(modes := said.get("modes"), list):  # the orders' rows are all of the last
            said["last mode"] = modes[-1:]
        return {name: _plain(value) for name, value in said.items() if name not in OF_THE_EFFORT}

    @cached_property
    def rows(self) -> frozenset[tuple[str, str]]:
        """The arms and scopes that its tables have rows of."""
        frames = [frame.reindex(columns=["arm", "scope"]).drop_duplicates() for frame in self.tables.values()]
        return frozenset((str(arm), str(scope)) for frame in frames for arm, scope in frame.itertuples(index=False))


def dtype_of(parameters: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """In which dtype a run with these parameters and facts computed: without one what suits the device.

    That is what `backend.default_dtype` gives there.
    """
    return str(parameters["dtype"] or ("bfloat16" if facts.get("device_type") == "gpu" else "float32"))


@dataclass(frozen=True)
class Matched:
    """Runs of A and B in pairs, and those of A and of B that have no counterpart, each with why."""

    pairs: list[tuple[Recorded, Recorded]]
    alone_a: list[tuple[Recorded, str]]
    alone_b: list[tuple[Recorded, str]]


def differences(a: Recorded, b: Recorded, allowed: Sequence[str] = ()) -> list[str]:
    """In which inputs two runs of one notebook differ, each in words; a parameter that only one of them has does not
    count, because one version of a notebook has more of them than another."""
    left, right = a.inputs, b.inputs
    return [
        f"{name} {_words(name, left[name])} against {_words(name, right[name])}"
        for name in left
        if name in right and left[name] != right[name] and name not in allowed
    ]


def only_one_has(a: Recorded, b: Recorded) -> list[str]:
    """The inputs that only one of two runs has a parameter for, in words."""
    sides = ((a.inputs, b.inputs, "A"), (b.inputs, a.inputs, "B"))
    return [f"{n}={v} only in {side}" for own, other, side in sides for n, v in own.items() if n not in other]


def fitting(run: Recorded, others: Iterable[Recorded], allowed: Sequence[str] = ()) -> list[Recorded]:
    """Those of the others that are of the same notebook and differ from `run` in no input that both have."""
    return [one for one in others if one.notebook == run.notebook and not differences(run, one, allowed)]


def untold(run: Recorded, fits: Sequence[Recorded]) -> list[str]:
    """The parameters that `run` has not and in which runs that fit it differ: it does not tell which of them it is."""
    known = run.inputs
    values: dict[str, list[Any]] = {}
    for one in fits:
        for name, value in one.inputs.items():
            values.setdefault(name, []).append(value)
    return [name for name, some in values.items() if name not in known and any(v != some[0] for v in some)]


def match(a: Sequence[Recorded], b: Sequence[Recorded], allowed: Sequence[str] = ()) -> Matched:
    """Runs of A and B with the same notebook and inputs, but for OF_THE_ROWS and the `allowed` ones, in pairs; and what
    is left over.

    Of several that fit, those that differ in nothing count first, and of others such as completed; then those with the
    same parameters, then those of the same device; of others then such as share more rows; then those of the same
    effort, then of the same experiment, then such as completed, then the newest. A run that does not tell which of
    several it is like, see `untold`, is in no pair, unless they differ in OF_THE_ROWS alone.
    """
    allowed = (*allowed, *OF_THE_ROWS)
    sides = {"A": a, "B": b}
    unclear = {}
    for side, other in (("A", "B"), ("B", "A")):
        for run in sides[side]:
            fits = fitting(run, sides[other], allowed)
            same = [one for one in fits if one.inputs.keys() == run.inputs.keys()]
            if names := [name for name in untold(run, same or fits) if name not in OF_THE_ROWS]:
                unclear[id(run)] = names
    clear = [one for one in a if id(one) not in unclear]
    close = [(one, two) for one in clear for two in fitting(one, b, allowed) if id(two) not in unclear]
    taken: dict[int, Recorded] = {}
    for one, two in sorted(close, key=_nearness, reverse=True):
        if id(one) not in taken and id(two) not in taken:
            taken |= {id(one): two, id(two): one}
    ordered = sorted(a, key=lambda run: (not run.error, run.started), reverse=True)

    def alone(side: str, other: str) -> list[tuple[Recorded, str]]:
        paired = [run for run in sides[side] if id(run) in taken]
        return [
            (run, _why_alone(run, sides[other], paired, other, unclear, allowed))
            for run in (ordered if side == "A" else sorted(b, key=lambda run: run.started))
            if id(run) not in taken
        ]

    pairs = [(one, taken[id(one)]) for one in ordered if id(one) in taken]
    return Matched(pairs, alone("A", "B"), alone("B", "A"))


def _nearness(pair: tuple[Recorded, Recorded]) -> tuple[bool | int | str, ...]:
    a, b = pair
    agree, same = not differences(a, b), a.inputs.keys() == b.inputs.keys()
    efforts = [{name: run.parameters.get(name) for name in OF_THE_EFFORT} for run in pair]
    return (
        agree, agree or not (a.error or b.error), same, a.device == b.device,
        0 if agree and same else len(a.rows & b.rows),
        efforts[0] == efforts[1], a.experiment == b.experiment, not a.error, a.started, not b.error, b.started,
    )  # fmt: skip


def _why_alone(
    run: Recorded, others: Sequence[Recorded], paired: Sequence[Recorded], side: str,
    unclear: Mapping[int, list[str]], allowed: Sequence[str],
) -> str:  # fmt: skip
    """Why a run has no counterpart among the `others`, which are those of `side`; `paired` are its own side's."""
    if id(run) in unclear:
        return f"{side} has several runs that fit, which differ in {', '.join(unclear[id(run)])}; this one has no such"
    same = [one for one in others if one.notebook == run.notebook]
    if not same:
        return f"{side} has no run of {run.notebook}"
    if fitting(run, paired, allowed):
        return "another run of the same inputs is compared"
    apart = [differences(*((run, one) if side == "B" else (one, run)), allowed) for one in same]
    nearest = min(apart, key=len)
    if nearest:
        return ", ".join(nearest)
    names = [name for one in fitting(run, others, allowed) for name in unclear.get(id(one), [])]
    if names:
        return f"{side}'s run that fits has no {', '.join(dict.fromkeys(names))}, in which several that fit it differ"
    return f"{side}'s run of the same inputs is compared with another one"


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
