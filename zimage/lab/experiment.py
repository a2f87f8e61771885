"""Experiment files: what they may hold, and the runs they ask for.

    kind: experiment
    name: qkv_fusion
    question: Does one fused QKV projection beat three on this device?
    notebook: notebooks/qkv_fusion.ipynb      # or a list: each gets the parameters it knows
    parameters: {source: digits}
    zip: {height: [8, 16], width: [8, 16]}    # lists of one length that walk together: one axis
    grid: {batch: [1, 2]}                     # every combination, with the zipped axis too
    exclude: [{height: 16, batch: 2}]         # drops what matches all its pairs
    include: [{height: 32, width: 32}]        # adds these
    quick: {grid: {batch: [1]}}               # with --quick: parameters merge, the others replace
    timeout_s: 900                            # for each run

An axis wins over a parameter of the same name only where `quick` narrows a wider file down; within one level the two
are a contradiction and refused. Everything is checked before anything runs, also the half that --quick does not use.
"""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zimage.errors import ExperimentError, StoreError, unknown
from zimage.lab import notebook as notebooks
from zimage.lab.notebook import Notebook
from zimage.lab.store import check_name
from zimage.strict import Strict, short, validate
from zimage.yaml_lines import Document, Place, load, parse_value

from pydantic import Field, field_validator

MAX_RUNS = 10_000
MAX_TIMEOUT_S = 7 * 86400.0
Values = dict[str, Any]


class _Quick(Strict):
    parameters: Values = Field(default_factory=dict)
    zip: dict[str, list[Any]] | None = None
    grid: dict[str, list[Any]] | None = None
    exclude: list[Values] | None = None
    include: list[Values] | None = None


class _File(Strict):
    kind: Literal["experiment"]
    name: str
    question: str
    notebook: list[str] = Field(min_length=1)
    parameters: Values = Field(default_factory=dict)
    zip: dict[str, list[Any]] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    exclude: list[Values] = Field(default_factory=list)
    include: list[Values] = Field(default_factory=list)
    quick: _Quick | None = None
    timeout_s: float = Field(default=3600.0, gt=0, le=MAX_TIMEOUT_S)

    @field_validator("notebook", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class Planned:
    """One run to do: a notebook and all its parameters."""

    notebook: Notebook
    parameters: Values


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file with its notebooks read."""

    file: _File
    document: Document
    root: Path  # the project that notebook paths are relative to, and where notebooks run
    notebooks: tuple[Notebook, ...]

    @property
    def name(self) -> str:
        """Its name, under which its runs are stored."""
        return self.file.name

    @property
    def question(self) -> str:
        """What it asks, the title of its page."""
        return self.file.question

    @property
    def timeout_s(self) -> float:
        """Seconds after which each run is stopped."""
        return self.file.timeout_s

    def plan(self, *, quick: bool = False, overrides: Values | None = None) -> list[Planned]:
        """The runs, notebook by notebook in a fixed order, each once.

        overrides: parameters that win over everything the file says about them. Raises ExperimentError for overrides
        that no notebook accepts, and for a plan that is empty or has more than MAX_RUNS runs.
        """
        if quick and self.file.quick is None:
            raise ExperimentError(f"{self.document.path}: has no 'quick' part; write one or leave --quick out")
        forced = overrides or {}
        for name, value in forced.items():
            check_value(self.notebooks, name, value)
        combinations = list(_expand(_level(self.file, quick), forced, self.document))
        if not combinations:
            raise ExperimentError(f"{self.document.path}: nothing to run: exclude drops every combination")
        runs: list[Planned] = []
        for notebook in self.notebooks:
            for given in combinations:
                known = {name: value for name, value in given.items() if name in notebook.parameters}
                planned = Planned(notebook, notebook.resolve(known))
                if not any(_same(planned, other) for other in runs):
                    runs.append(planned)
        return runs


def read(path: Path) -> Experiment:
    """The experiment in `path`, checked against its notebooks. Raises ExperimentError with file and line."""
    document = load(path)
    file = validate(document, _File, "an experiment file", "experiment")
    try:
        check_name(file.name)
    except StoreError as error:
        raise document.error(("name",), str(error)) from None
    root = notebooks.project_root(path)
    experiment = Experiment(file, document, root, tuple(_notebooks(file, document, root)))
    for quick in (False, True):
        _check_level(experiment, quick)
    return experiment


def check_value(known: tuple[Notebook, ...], name: str, value: Any) -> None:
    """Raise ExperimentError unless some notebook has the parameter `name` and all that have it accept `value`."""
    having = [notebook for notebook in known if name in notebook.parameters]
    if not having:
        what = f"{known[0].name} has no parameter" if len(known) == 1 else "none of the notebooks has a parameter"
        raise ExperimentError(unknown(what, name, _names(known)))
    for notebook in having:
        try:
            notebook.parameters[name].accept(value)
        except ExperimentError as error:
            raise ExperimentError(f"{notebook.name}: {error}") from None


def value_from_text(known: tuple[Notebook, ...], name: str, text: str) -> Any:
    """The value that `text` from a command line means for the parameter `name`: YAML, or the text itself if that fits.

    Raises ExperimentError as `check_value` does.
    """
    try:
        value = parse_value(text)
        check_value(known, name, value)
    except ExperimentError:
        try:
            check_value(known, name, text)
        except ExperimentError:
            pass
        else:
            return text  # where a text is wanted, nobody should have to quote 7 twice
        raise
    return value


def _names(known: tuple[Notebook, ...]) -> list[str]:
    return list(dict.fromkeys(name for notebook in known for name in notebook.parameters))


def _notebooks(file: _File, document: Document, root: Path) -> Iterator[Notebook]:
    listed = isinstance(document.value["notebook"], list)
    for index, name in enumerate(file.notebook):
        place: Place = ("notebook", index) if listed else ("notebook",)
        if name in file.notebook[:index]:
            raise document.error(place, f"notebook {name!r} is there twice")
        if not os.path.isfile(root / name):  # Path.is_file raises for a name that is too long
            shown = f"notebook {short(name)} not found in {root}"
            raise document.error(place, f"{shown}; paths are relative to that folder")
        try:
            found = notebooks.read(root / name, root)
        except ExperimentError as error:
            raise document.error(place, str(error)) from None
        yield found


@dataclass(frozen=True)
class _Level:
    """What counts with or without --quick, and where each piece is written."""

    parameters: Values
    zip: dict[str, list[Any]]
    grid: dict[str, list[Any]]
    exclude: list[Values]
    include: list[Values]
    places: dict[str, Place]


def _level(file: _File, quick: bool) -> _Level:
    chosen = file.quick if quick and file.quick is not None else _Quick()
    pieces: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for key in ("zip", "grid", "exclude", "include"):
        narrowed = getattr(chosen, key)
        pieces[key] = getattr(file, key) if narrowed is None else narrowed
        places[key] = (key,) if narrowed is None else ("quick", key)
    return _Level(parameters={**file.parameters, **chosen.parameters}, places=places, **pieces)


def _check_level(experiment: Experiment, quick: bool) -> None:
    file, document = experiment.file, experiment.document
    level = _level(file, quick)
    own = file.quick.parameters if quick and file.quick is not None else {} if quick else file.parameters
    own_place: Place = ("quick", "parameters") if quick else ("parameters",)
    for name, value in own.items():
        _check(experiment, (*own_place, name), name, value)
    for key, axes in (("zip", level.zip), ("grid", level.grid)):
        for name, values in axes.items():
            place = (*level.places[key], name)
            if not values:
                raise document.error(place, f"{key} {name!r} is an empty list; give it values or take it out")
            for index, value in enumerate(values):
                _check(experiment, (*place, index), name, value)
            if name in own and (not quick or level.places[key][0] != "quick"):
                where = f"line {document.line((*own_place, name))}"
                raise document.error(place, f"{name!r} is an axis of {key} and also a parameter ({where}); keep one")
            if key == "grid" and name in level.zip:
                raise document.error(place, f"{name!r} is in zip and in grid; keep one")
    lengths = {name: len(values) for name, values in level.zip.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise document.error(level.places["zip"], f"zip lists walk together, so they need one length: {shown}")
    for key, rows in (("exclude", level.exclude), ("include", level.include)):
        for index, row in enumerate(rows):
            if not row:
                raise document.error((*level.places[key], index), f"{key} holds an empty entry")
            for name, value in row.items():
                _check(experiment, (*level.places[key], index, name), name, value)


def _check(experiment: Experiment, place: Place, name: str, value: Any) -> None:
    try:
        check_value(experiment.notebooks, name, value)
    except ExperimentError as error:
        raise experiment.document.error(place, str(error)) from None


def _expand(level: _Level, forced: Values, document: Document) -> Iterator[Values]:
    walking = {name: values for name, values in level.zip.items() if name not in forced}
    axes: list[list[Values]] = []
    if walking:
        axes.append([dict(zip(walking, row, strict=True)) for row in zip(*walking.values(), strict=True)])
    axes += [[{name: v} for v in values] for name, values in level.grid.items() if name not in forced]
    count = math.prod(map(len, axes)) + len(level.include)
    if count > MAX_RUNS:
        raise document.error(level.places["grid"], f"{count} combinations are more than {MAX_RUNS}; shorten the lists")
    for combination in itertools.product(*axes):
        given = {**level.parameters}
        for part in combination:
            given.update(part)
        given.update(forced)
        if not any(all(name in given and _equal(given[name], v) for name, v in row.items()) for row in level.exclude):
            yield given
    for row in level.include:
        yield {**level.parameters, **row, **forced}


def _equal(one: Any, other: Any) -> bool:
    """Equality in which True is not 1, but 1 is 1.0."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _same(one: Planned, other: Planned) -> bool:
    return one.notebook is other.notebook and repr(one.parameters) == repr(other.parameters)
