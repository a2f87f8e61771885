"""Published claims, judged on what was measured here.

A claim is about the time ratio (arm / baseline) of one comparison. Every measured row that fits it is a case:

    supported   the whole interval lies inside the claimed band
    refuted     the whole interval lies outside it
    undecided   anything else

An estimate within the noise floor is no change that could be told from none: it supports no band that excludes 1, and
refutes no band that includes 1. Several cases support a claim together only if each does, and refute it only if each
does; else it is undecided and the reason counts them. Without a case, or on a device that the claim is not about, it
is "not measured here".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from zimage.analysis import units

SUPPORTED, REFUTED, UNDECIDED, NOT_MEASURED = "supported", "refuted", "undecided", "not measured here"
VERDICTS = (SUPPORTED, REFUTED, UNDECIDED, NOT_MEASURED)
Interval = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """What somebody published: that `arm` takes between `low` and `high` times the time of `baseline` in `scope`.

    An end that is None is open. `devices` are patterns of short device names, none meaning any device; `where` are
    conditions on a run's parameters; `measured_by` is the command that measures it.
    """

    id: str
    statement: str
    source: str
    baseline: str
    arm: str
    scope: str
    low: float | None
    high: float | None
    measured_by: str
    note: str = ""
    devices: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)

    def concerns(self, device: str) -> bool:
        """Whether it is about this device."""
        return not self.devices or any(fnmatchcase(device, pattern) for pattern in self.devices)

    def compares(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of an `ablation` table is its comparison."""
        return all(row.get(name) == getattr(self, name) for name in ("baseline", "arm", "scope"))

    def unmet(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its conditions that a run with these parameters does not meet; a parameter it lacks is null."""
        return {name: value for name, value in self.where.items() if not _meets(parameters.get(name), value)}


@dataclass(frozen=True)
class Measured:
    """A row of an `ablation` table, and the run it comes from: `experiment/key`, when it started, what it ran."""

    run: str
    device: str
    notebook: str
    started: str
    parameters: Mapping[str, Any]
    weights: str | None  # their kind
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A measured row judged on its own: supported, refuted or undecided, and why where it is undecided."""

    measured: Measured
    verdict: str
    reason: str
    interval: Interval | None


@dataclass(frozen=True)
class Judgement:
    """A claim on one device: its verdict with the reason, and the cases behind it.

    `interval` holds the intervals of all cases; None where there is none. `device` is None where there are no results.
    """

    claim: Claim
    device: str | None
    verdict: str
    reason: str
    interval: Interval | None
    cases: tuple[Case, ...]

    @property
    def evidence(self) -> list[str]:
        """The runs behind it, each once."""
        return list(dict.fromkeys(case.measured.run for case in self.cases))


def newest(rows: Iterable[Measured]) -> list[Measured]:
    """The rows of the newest run of each notebook, parameters and device."""
    kept: dict[tuple[str, str, str], list[Measured]] = {}
    for row in sorted(rows, key=lambda row: (row.started, row.run)):
        key = (row.notebook, json.dumps(row.parameters, sort_keys=True, default=repr), row.device)
        before = kept.get(key, [])
        kept[key] = [*before, row] if before and before[0].run == row.run else [row]
    return [row for rows in kept.values() for row in rows]


def judge(claim: Claim, device: str | None, rows: Sequence[Measured]) -> Judgement:
    """The claim on one device, by those of `rows` that are its own; of repeated runs only the newest counts."""
    if device is None:
        return _unmeasured(claim, device, "there are no results")
    if not claim.concerns(device):
        return _unmeasured(claim, device, f"it is about {' and '.join(claim.devices)}")
    compared = [one for one in newest(rows) if one.device == device and claim.compares(one.row)]
    cases = tuple(_case(claim, one) for one in compared if not claim.unmet(one.parameters))
    if not cases:
        return _unmeasured(claim, device, _missing(claim, compared))
    verdicts = {case.verdict for case in cases}
    ends = [case.interval for case in cases if case.interval is not None]
    interval = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None
    verdict = verdicts.pop() if len(verdicts) == 1 else UNDECIDED
    return Judgement(claim, device, verdict, _reason(verdict, cases), interval, cases)


def of_run(claims: Iterable[Claim], rows: Sequence[Measured]) -> list[dict[str, str]]:
    """What one run says of the claims whose comparison it has: each one's verdict, with what was measured and why.

    A run that does not meet a claim's conditions says nothing of it, whatever it measured: it is `not about this model`
    where its source is another one, else `not about this run`.
    """
    said = []
    for claim in claims:
        compared = [one for one in rows if claim.compares(one.row)]
        if not compared:
            continue
        judged = judge(claim, compared[0].device, compared)
        cases = judged.cases or tuple(_case(claim, one) for one in compared)
        ends = [case.interval for case in cases if case.interval is not None and math.isfinite(case.interval[1])]
        measured = in_words(min(low for low, _ in ends), max(high for _, high in ends)) if ends else "no interval"
        verdict, reason = judged.verdict, judged.reason
        if verdict == NOT_MEASURED:
            unmet = claim.unmet(compared[0].parameters)
            verdict = f"not about this {'model' if 'source' in unmet else 'run'}"
            if unmet:
                wanted = ", ".join(f"{name} {_wanted(value)}" for name, value in unmet.items())
                reason = f"it is about {wanted}; this run does not count, and measured is what it shows all the same"
        said.append(
            {
                "claim": claim.statement,
                "claimed": claimed(claim),
                "measured": measured,
                "verdict": verdict,
                "reason": reason,
                "source": claim.source,
            }
        )
    return said


def claimed(claim: Claim) -> str:
    """The claimed band in words: `5-10 % less time`; an open end reads `at least 5 % less time`."""
    low, high = claim.low, claim.high
    if low is not None and high is not None:
        return in_words(low, high, "{:g}")
    end = high if low is None else low
    if end is None:
        return "any time"
    word = "at most" if (low is None) == (end >= 1) else "at least"
    return f"{word} {in_words(end, end, '{:g}')}"


def in_words(low: float, high: float, form: str = "{:.1f}") -> str:
    """An interval of time ratios in words: `4.1-5.9 % less time`; `form` writes a percentage."""
    near, far = (form.format(round(abs(100 * (end - 1)), 1)) for end in sorted((low, high), key=lambda x: abs(x - 1)))
    if low < 1 < high:
        return (
            f"{form.format(round(100 - 100 * low, 1))} % less to {form.format(round(100 * high - 100, 1))} % more time"
        )
    return f"{near if near == far else f'{near}-{far}'} % {'more' if high > 1 else 'less'} time"


def _meets(found: object, wanted: object) -> bool:
    """Equality, or for texts a pattern; of a list, any. True is not 1."""
    if isinstance(wanted, list):
        return any(_meets(found, one) for one in wanted)
    if isinstance(found, str) and isinstance(wanted, str):
        return fnmatchcase(found, wanted)
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def _case(claim: Claim, measured: Measured) -> Case:
    ratio, low, high = (_number(measured.row.get(name)) for name in ("ratio", "ratio_low", "ratio_high"))
    if ratio is None or low is None or high is None or not 0 < low <= ratio <= high:
        return Case(measured, UNDECIDED, "no usable interval was recorded", None)
    bottom, top = claim.low or 0.0, math.inf if claim.high is None else claim.high
    floor = _number(measured.row.get("noise_floor"))
    if floor is not None and abs(math.log(ratio)) <= floor:
        within = f"the estimate lies within the noise floor of {units.percent(floor)}"
    else:
        within = ""
    allows_no_change = bottom <= 1 <= top
    if bottom <= low and high <= top:
        verdict, reason = (UNDECIDED, within) if within and not allows_no_change else (SUPPORTED, "")
    elif high < bottom or low > top:
        verdict, reason = (UNDECIDED, within) if within and allows_no_change else (REFUTED, "")
    else:
        verdict, reason = UNDECIDED, "the interval lies partly inside the claimed band"
    return Case(measured, verdict, reason, (low, high))


def _reason(verdict: str, cases: tuple[Case, ...]) -> str:
    """Why it is undecided; "" where it is not."""
    if verdict != UNDECIDED:
        return ""
    reasons = list(dict.fromkeys(case.reason for case in cases if case.reason))
    if all(case.verdict == UNDECIDED for case in cases):
        return "; ".join(reasons)
    counts = [(sum(case.verdict == word for case in cases), word) for word in (SUPPORTED, REFUTED, UNDECIDED)]
    return f"of {len(cases)} cases {', '.join(f'{count} {word}' for count, word in counts if count)}"


def _unmeasured(claim: Claim, device: str | None, reason: str) -> Judgement:
    return Judgement(claim, device, NOT_MEASURED, reason, None, ())


def _missing(claim: Claim, compared: Sequence[Measured]) -> str:
    """Why no row fits."""
    what = f"{claim.arm} against {claim.baseline}, scope {claim.scope}"
    runs = len({one.run for one in compared})
    if not runs:
        return f"no run compares {what}"
    nearest = min((claim.unmet(one.parameters) for one in compared), key=len)
    wanted = ", ".join(f"{name} {_wanted(value)}" for name, value in nearest.items())
    return f"{runs} run{'s compare' if runs > 1 else ' compares'} {what}, but not with {wanted}"


def _wanted(value: object) -> str:
    """A condition's value in words."""
    values = value if isinstance(value, list) else [value]
    return " or ".join(one if isinstance(one, str) else json.dumps(one) for one in values)


def _number(value: Any) -> float | None:
    return None if units.missing(value) else float(value)
