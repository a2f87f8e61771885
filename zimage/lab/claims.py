"""Claims files, and their claims judged on what a store holds.

    kind: claims
    claims:
      - id: fused_qkv_step
        statement: Fusing the QKV projections takes 5-10 % less time
        source: https://...                            # where it is said
        note: what the source says and measured        # optional
        baseline: separate_qkv                         # these three name rows of the `ablation` tables
        arm: fused_qkv
        scope: step
        metric: time_ratio                             # arm / baseline
        claimed: {low: 0.90, high: 0.95}               # null for an open end
        devices: ["nvidia-h100-*"]                     # patterns of short device names; any device if left out
        where: {height: 1024, source: ["a", "b*"]}     # the runs that count: equal, a pattern, or any of a list
        measured_by: zimage sweep experiments/published_claims.yaml

Nothing here needs MLX.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zimage.analysis import units
from zimage.analysis.claims import NOT_MEASURED, Case, Claim, Judgement, Measured, claimed, in_words, judge, of_run
from zimage.analysis.reading import records
from zimage.errors import ExperimentError, StoreError
from zimage.lab.files import NAME
from zimage.lab.store import Run, Store
from zimage.strict import Strict, validate
from zimage.yaml_lines import Document, Place, load

import pandas as pd
from pydantic import Field

FILE = Path("experiments") / "claims.yaml"
_TEXTS = ("statement", "source", "note", "baseline", "arm", "scope", "measured_by")
_VERDICTS_WIDTH = len(NOT_MEASURED)


class _Band(Strict):
    low: float | None = Field(allow_inf_nan=False, gt=0)
    high: float | None = Field(allow_inf_nan=False, gt=0)


class _Claim(Strict):
    id: str
    statement: str
    source: str
    note: str = ""
    baseline: str
    arm: str
    scope: str
    metric: Literal["time_ratio"]
    claimed: _Band
    devices: list[str] = Field(default_factory=list)
    where: dict[str, Any] = Field(default_factory=dict)
    measured_by: str


class _File(Strict):
    kind: Literal["claims"]
    claims: list[_Claim] = Field(min_length=1)


def nearest(start: Path) -> Path:
    """The claims file of the project around the folder `start`. Raises ExperimentError where there is none."""
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    raise ExperimentError(f"{start}: no {FILE} here or above; go to the project's folder, or name one with --claims")


def read(path: Path) -> list[Claim]:
    """The claims in the file `path`. Raises ExperimentError with file and line for anything that does not fit."""
    document = load(path, "a claims file")
    file = validate(document, _File, "a claims file", "claims")
    return [_claim(document, index, file) for index in range(len(file.claims))]


def measured(store: Store) -> tuple[list[Measured], list[str], list[str]]:
    """The rows of all `ablation` tables, the devices with completed runs, and a line for each run that is unreadable.

    All experiments and all completed runs count, not only those of the last sweep.
    """
    rows: list[Measured] = []
    devices: set[str] = set()
    problems: list[str] = []
    for name in store.experiments():
        runs, unreadable = store.scan(name)
        problems += unreadable
        for run in runs:
            if not run.completed:
                continue
            devices.add(run.device)
            try:
                rows += _rows(run)
            except StoreError as error:
                problems.append(str(error))
    return rows, sorted(devices), list(dict.fromkeys(problems))


def judgements(claims: Sequence[Claim], store: Store) -> tuple[list[Judgement], list[str]]:
    """Every claim on every device that the store has results of, and a line for each run that is unreadable."""
    rows, devices, problems = measured(store)
    judged = [judge(claim, device, rows) for device in devices for claim in claims]
    return judged or [judge(claim, None, rows) for claim in claims], problems


def of_this_run(ablation: pd.DataFrame, parameters: Mapping[str, Any], weights: str) -> list[dict[str, str]]:
    """What the run of a notebook says of the project's claims, see `analysis.claims.of_run`; nothing without a file.

    `ablation` is what it recorded, `parameters` are its own, `weights` their kind. Raises ExperimentError for a claims
    file that cannot be read.
    """
    try:
        file = nearest(Path.cwd())
    except ExperimentError:
        return []
    device = os.environ.get("ZIMAGE_DEVICE", "")  # by hand nothing says it: claims about certain devices are left
    rows = [Measured("this run", device, "", "", parameters, weights, row) for row in records(ablation)]
    return of_run(read(file), rows)


@dataclass(frozen=True)
class Shown:
    """What a page says of the claims on one device: (verdict, statement and id, its source, the evidence) of each.

    experiments: of each claim those whose runs are behind it.
    """

    device: str
    claims: list[tuple[str, str, str, list[str]]]
    unmeasured: int  # claims that no run of this device decides
    experiments: list[set[str]]

    def of_experiment(self, name: str) -> list[tuple[str, str, str, list[str]]]:
        """Those of the claims that runs of this experiment are behind."""
        return [one for one, behind in zip(self.claims, self.experiments, strict=True) if name in behind]


def on_page(store: Store) -> tuple[list[Shown], list[str]]:
    """The claims of the project that the store lies in, for each device that at least one is measured on.

    And a line where the claims file cannot be read. Nothing where there is none.
    """
    try:
        file = nearest(store.root.resolve())
    except ExperimentError:
        return [], []
    try:
        judged, _ = judgements(read(file), store)
    except ExperimentError as error:
        return [], [str(error)]
    found: dict[str, list[Judgement]] = {}
    for one in judged:
        if one.device is not None:
            found.setdefault(one.device, []).append(one)
    shown = []
    for device, several in found.items():
        measured_here = [one for one in several if one.verdict != NOT_MEASURED]
        lines_of = [
            (one.verdict, f"{one.claim.statement} ({one.claim.id})", one.claim.source, _evidence(one))
            for one in measured_here
        ]
        if lines_of:
            behind = [{run.partition("/")[0] for run in one.evidence} for one in measured_here]
            shown.append(Shown(device, lines_of, len(several) - len(lines_of), behind))
    return shown, []


def content(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The judgements as data for programs."""
    return [
        {
            "id": one.claim.id,
            "verdict": one.verdict,
            "interval": None if one.interval is None else list(one.interval),
            "device": one.device,
            "evidence": one.evidence,
            "reason": one.reason,
            "statement": one.claim.statement,
            "source": one.claim.source,
            "note": one.claim.note,
            "claimed": [one.claim.low, one.claim.high],
            "measured_by": one.claim.measured_by,
            "cases": [_case_content(case) for case in one.cases],
        }
        for one in judged
    ]


def lines(judged: Sequence[Judgement], store: Store) -> list[str]:
    """The judgements for a terminal, device by device: the verdict first, then the claim, then what was measured."""
    said: list[str] = []
    for device in dict.fromkeys(one.device for one in judged):
        said.append(f"{store.root}: no results yet" if device is None else f"On {device}:")
        for one in judged:
            if one.device == device:
                said.append(f"  {one.verdict:{_VERDICTS_WIDTH}}  {one.claim.statement} ({one.claim.id})")
                said += [f"  {'':{_VERDICTS_WIDTH}}  {line}" for line in _evidence(one)]
    return said


def _claim(document: Document, index: int, file: _File) -> Claim:
    claim = file.claims[index]
    place: Place = ("claims", index)
    if not NAME.fullmatch(claim.id):
        raise document.error((*place, "id"), f"id {claim.id!r:.60}: use letters, digits, '_', '-' and '.'")
    ids = [one.id for one in file.claims]
    if ids.index(claim.id) < index:
        first = document.line(("claims", ids.index(claim.id), "id"))
        raise document.error((*place, "id"), f"id {claim.id!r} is there twice (first on line {first})")
    texts: list[tuple[Place, str]] = [((name,), getattr(claim, name)) for name in _TEXTS]
    texts += [(("devices", number), pattern) for number, pattern in enumerate(claim.devices)]
    for inner, text in texts:
        if (text.strip() or inner == ("note",)) and text.isprintable():
            continue
        raise document.error((*place, *inner), f"{inner[0]!r} must be one line of printable text, found {text!r:.60}")
    if not claim.source.startswith("https://") or " " in claim.source:
        raise document.error((*place, "source"), f"'source' must be an https link, found {claim.source!r:.60}")
    low, high = claim.claimed.low, claim.claimed.high
    if low is None and high is None:
        raise document.error((*place, "claimed"), "'claimed' is open at both ends, which claims nothing")
    if low is not None and high is not None and low >= high:
        raise document.error((*place, "claimed"), f"'claimed' must have low below high, found {low:g} and {high:g}")
    for name, value in claim.where.items():
        _check_condition(document, (*place, "where", name), name, value)
    return Claim(
        claim.id, claim.statement, claim.source, claim.baseline, claim.arm, claim.scope, low, high, claim.measured_by,
        claim.note, tuple(claim.devices), claim.where,
    )  # fmt: skip


def _check_condition(document: Document, place: Place, name: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(one, (list, dict)) for one in values):
        raise document.error(place, f"'where' takes a value or a list of values for {name!r}, found {value!r:.60}")


def _rows(run: Run) -> list[Measured]:
    if "ablation" not in run.tables():
        return []
    weights = run.meta.get("weights")
    kind = weights["kind"] if weights else None
    name, started = f"{run.experiment}/{run.key}", str(run.meta["started"])
    return [
        Measured(name, run.device, run.notebook, started, run.parameters, kind, row)
        for row in records(run.table("ablation"))
    ]


def _case_content(case: Case) -> dict[str, Any]:
    row = case.measured.row
    numbers = ("ratio", "ratio_low", "ratio_high", "noise_floor", "quads", "dropped_quads")
    texts = {"regime": "regime", "verdict": "comparison", "verdict_without_drops": "comparison_without_drops"}
    return {
        "run": case.measured.run,
        "verdict": case.verdict,
        "reason": case.reason,
        **{name: None if units.missing(row.get(name)) else row[name] for name in numbers},
        **{new: row[old] if isinstance(row.get(old), str) else None for old, new in texts.items()},
        "weights": case.measured.weights,
        "started": case.measured.started,
        "parameters": dict(case.measured.parameters),
    }


def _evidence(one: Judgement) -> list[str]:
    """What is said below a claim's own line."""
    if one.verdict == NOT_MEASURED:
        if one.device is not None and not one.claim.concerns(one.device):
            return [one.reason]
        return [f"{one.reason}; to measure it: {one.claim.measured_by}"]
    head = f"measured {in_words(*one.interval)}, " if one.interval else ""
    said = [f"{head}claimed {claimed(one.claim)}" + (f": {one.reason}" if one.reason else "")]
    for case in one.cases:
        row = case.measured.row
        facts = [f"{row['quads']:.0f} quads"] if not units.missing(row.get("quads")) else []
        facts += [row["regime"]] if isinstance(row.get("regime"), str) else []
        facts += (
            [f"noise floor {units.percent(row['noise_floor'])}"] if not units.missing(row.get("noise_floor")) else []
        )
        facts += [f"{case.measured.weights} weights"] if case.measured.weights else []
        shown = f"{case.verdict}, {in_words(*case.interval)}: " if len(one.cases) > 1 and case.interval else ""
        said.append(f"{shown}{case.measured.run} ({', '.join(facts)})")
    return said
