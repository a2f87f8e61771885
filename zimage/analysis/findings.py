"""What an experiment found, in plain sentences assembled from its tables.

Nothing is claimed that a table does not say: an inconclusive verdict is reported as undecided, the largest stage is
only called so when its interval lies above every other, and a missing table is left out.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from zimage.analysis import answers, cost_texts, detail_texts, memory_reading, pareto, reading, scaling_words, units
from zimage.analysis.gains import clause, has_ladder
from zimage.analysis.reading import (
    arms,
    best_scope,
    headline,
    is_fraction,
    metric_name,
    metric_value,
    records,
)
from zimage.choices import FLOATING, PACKED
from zimage.measure.comparison import MANY_TIMES

import pandas as pd

Tables = Mapping[str, pd.DataFrame]
WAYS = (*FLOATING, *PACKED)  # to compute one product
KNOWN_VERDICTS = ("faster", "slower", "equivalent", "inconclusive")
_MANY_ARMS = 9
_SCOPES = {"step": " per step", "block": " per block", "qkv": " in the QKV projections"}
_REGIMES = {"sustained": ", sustained", "fresh processes": ", in fresh processes"}
_UNDECIDED = re.compile(r"\b(?:is|are) undecided\b|\bcould (?:not )?be decided\b")  # in a sentence: it decides nothing
_REFERENCES = ("baseline", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    `text` is the statement, `evidence` the numbers that stand behind or beside it, `verdict` one of KNOWN_VERDICTS or
    "" for a plain observation. `short` is all of it for one sentence among others; "" where a wider finding says more.
    """

    text: str
    verdict: str = ""
    evidence: tuple[str, ...] = ()
    short: str = ""


@dataclass(frozen=True)
class Brief:
    """Findings in short: on which device, with which kind of weights, and what.

    more: how many there are besides; failed: how many runs failed, in words, "" where none did.
    """

    device: str
    weights: str
    clauses: Sequence[str]
    more: int = 0
    failed: str = ""

    @property
    def sentence(self) -> str:
        """All in one: `On <device>, with <kind> weights: a; b; 2 more on its page.`"""
        rest = [f"{self.more} more on its page"] if self.more else []
        said = [*self.clauses, *rest, *filter(None, [self.failed])]
        return f"{self._start}: {'; '.join(said) or 'nothing was recorded that a finding could rest on'}."

    def lines(self, columns: int) -> list[str]:
        """The same for a terminal of so many columns: where, then what, an item each, and how many more last."""
        items = [*self.clauses, *filter(None, [self.failed])]
        if not items:
            return [self.sentence]
        rest = [f"{self.more} more on its page."] if self.more else []
        return [f"{self._start}:", *(line for item in items for line in _wrapped(item, columns)), *rest]

    @property
    def _start(self) -> str:
        return f"On {self.device}" + (f", with {self.weights} weights" if self.weights else "")


def _wrapped(item: str, columns: int) -> list[str]:
    """An item of a list as lines, of which none ends between a number and its percent sign."""
    tied = item.replace(" %", "\N{NO-BREAK SPACE}%")
    shape = textwrap.TextWrapper(
        columns, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\N{NO-BREAK SPACE}%", " %") for line in shape.wrap(tied)]


def findings(tables: Tables) -> list[Finding]:
    """The findings of one run or of several runs with the same parameters.

    `tables` maps the names of tables to frames; missing and empty ones are left
    out.
    """
    by_family, by_arm = families(tables.get("ablation")), _arms(tables)
    if len(by_arm) > _MANY_ARMS:  # more than a page shows at once: first what has an answer
        by_arm.sort(key=lambda one: KNOWN_VERDICTS.index(one.verdict or "inconclusive"))
    front = _said([said] if (said := pareto.summary(tables.get("pareto"))) else [])
    if by_family or front:  # which say in short what else each of many arms would
        by_arm = [replace(one, short="") for one in by_arm]
    if of_memory := _said(memory_reading.statements(tables)):
        by_arm = [replace(one, short="") for one in by_arm]
    by_family += ways(tables.get("ablation"))
    answered = _said(answers.texts(tables))
    if answered:
        by_arm = [replace(one, short="") for one in by_arm]
    if absent := _without_peers(tables.get("ablation")):
        by_arm = [replace(one, short="") for one in by_arm]
        answered += absent
    grouped = _said(detail_texts.texts(tables))
    if grouped:
        by_arm = [replace(one, short="") for one in by_arm]
    by_family += grouped
    return [
        *front,
        *answered,
        *_briefly(cost_texts.stages(tables.get("stages"))),
        *_briefly(cost_texts.operations(tables.get("operations"))),
        *of_memory,
        *by_family,
        *by_arm,
        *_briefly(cost_texts.scaling(tables.get("scaling"), reading.rounds(tables.get("samples")))),
        *_said(scaling_words.said(tables)),
        *_briefly(cost_texts.power(tables.get("power"))),
        *_briefly(cost_texts.loading(tables.get("loading"))),
    ]


def _said(found: Sequence[tuple[str, tuple[str, ...]]]) -> list[Finding]:
    """Observations whose text is all that there is to say of them in short; undecided where it says so."""
    return [
        Finding(text, "inconclusive" if _UNDECIDED.search(text) else "", evidence, text) for text, evidence in found
    ]


def _briefly(found: Sequence[cost_texts.Text]) -> list[Finding]:
    """Observations with words of their own for one sentence among others."""
    return [Finding(text, "", evidence, short) for text, evidence, short in found]


def baseline_arm(tables: Tables) -> str | None:
    """The reference arm: what the ablation compares with, else the first arm with a name that says so."""
    compared = tables.get("ablation")
    if compared is not None and len(compared):
        named = compared["baseline"].dropna()
        if len(named):
            return str(named.iloc[0])
    for name in ("memory", "quality"):
        frame = tables.get(name)
        for reference in _REFERENCES:
            if reference in arms(frame):
                return reference
    return None


def baselines(tables: Tables) -> list[str]:
    """Every arm that others are compared with: all that the ablation names, else the one of `baseline_arm`."""
    compared = tables.get("ablation")
    named = [] if compared is None else [str(name) for name in dict.fromkeys(compared["baseline"].dropna())]
    return named or [name for name in [baseline_arm(tables)] if name is not None]


def verdict_of(row: Mapping[str, object]) -> str:
    """The verdict of an ablation row; a missing or unknown one, or one without a ratio, is inconclusive."""
    verdict = row.get("verdict")
    known = verdict in KNOWN_VERDICTS and not units.missing(row.get("ratio"))
    return str(verdict) if known else "inconclusive"


def time_phrase(ratio: float, than: str = "") -> str:
    """A time ratio in words: 0.95 -> `5.0 % less time`, 24 -> `24.0 times as long`; `than` says beside what."""
    if ratio >= MANY_TIMES:
        return f"{units.significant(ratio)} times as long" + (f" as {than}" if than else "")
    than = f" than {than}" if than else ""
    change = units.percent(abs(ratio - 1))
    if change == "0.0 %":
        return f"the same time to 0.1 %{than}"
    return f"{change} {'less' if ratio < 1 else 'more'} time{than}"


def time_finding(row: Mapping[str, object]) -> Finding:
    """One row of an ablation table as a finding, its interval included."""
    arm, baseline, scope = str(row["arm"]), _text(row.get("baseline")) or "the baseline", _text(row.get("scope"))
    where = _SCOPES.get(scope, f" ({scope})" if scope else "")
    where += _REGIMES.get(_text(row.get("regime")), "")
    verdict = verdict_of(row)
    if units.missing(row.get("ratio")):
        text = f"the time of {arm} against {baseline}{where} was not measured"
        return Finding(text, verdict, tuple(filter(None, [_text(row.get("reason"))])), text)
    if verdict == "equivalent":
        text = f"{arm} is equivalent in time to {baseline}{where}"
    elif verdict in ("faster", "slower"):
        text = f"{arm} takes {time_phrase(float(row['ratio']), baseline)}{where}"  # type: ignore[arg-type]
    else:
        text = f"whether {arm} is faster than {baseline}{where} is undecided"
    reason = _text(row.get("reason")) if verdict == "inconclusive" else ""
    evidence = (_numbers(row), *([reason] if reason else []))
    # An interval that holds 1 says by itself why there is no answer.
    why = f": {reason}" if reason and units.excludes_one(row.get("ratio_low"), row.get("ratio_high")) else ""
    return Finding(text, verdict, evidence, f"{text} ({_range(row)}{why})")


def families(frame: pd.DataFrame | None) -> list[Finding]:
    """What transforms gain alone, all together, and what each is worth beside the others: a finding a family.

    `frame` is an ablation that has both `together`, and arms `without_` one against it, as the notebook fusions makes
    them; of another there are none. What is undecided is said to be.
    """
    if frame is None or frame.empty:
        return []
    rows = [row for row in records(frame) if row.get("regime") == "burst" and not units.missing(row["ratio"])]
    without = {str(r["arm"]).removeprefix("without_"): r for r in rows if r["baseline"] == "together"}
    alone = {str(row["arm"]): row for row in rows if row["arm"] in without}
    together = next((row for row in rows if row["arm"] == "together"), None)
    if not without or not alone or together is None:
        return []
    text = "no transform alone is known to take less time"
    if all(units.missing(row["ratio_high"]) for row in alone.values()):
        text = "what each transform gains alone could not be decided, as none has an interval"
    if gains := [name for name, row in alone.items() if verdict_of(row) == "faster"]:
        best = min(gains, key=lambda name: float(alone[name]["ratio"]))
        less, first = time_phrase(float(alone[best]["ratio"])), _or_those_near(best, gains, alone)
        text = f"of {len(alone)} transforms, {first} alone gains the most, {less}"
    product = math.prod(float(row["ratio"]) for row in alone.values())
    whole = time_finding({**together, "arm": f"a model with all {len(without)}"})
    beside = "no transform is known to be worth anything beside the others"
    if all(units.missing(row["ratio_high"]) for row in without.values()):
        beside = "what each transform is worth beside the others could not be decided, as none has an interval"
    if worths := [name for name, row in without.items() if verdict_of(row) == "slower"]:
        best = max(worths, key=lambda name: float(without[name]["ratio"]))
        more, first = time_phrase(float(without[best]["ratio"])), _or_those_near(best, worths, without)
        beside = f"beside the others {first} is worth the most: without {best} a step takes {more}"
    return [
        *_said([(text, tuple(_by_verdict(alone)))]),
        replace(whole, evidence=(*whole.evidence, f"their ratios alone multiply to {units.ratio(product)}")),
        *_said([(beside, tuple(_by_verdict(without, "without ")))]),
    ]


def ways(frame: pd.DataFrame | None) -> list[Finding]:
    """Which products have a way that is known to be faster than the plainest one, as the notebook matmuls compares."""
    rows = [row for row in records(frame) if _is_way(row)] if frame is not None else []
    if not rows:
        return []
    gains = [row for row in rows if verdict_of(row) == "faster"]
    count, faster = (len({row["scope"] for row in some}) for some in (rows, gains))
    of_all = f"of {count} product{'s' * (count > 1)} whose ways were compared"
    if not gains:
        text = f"{of_all} none has one known to be faster than the plainest"
        return [Finding(text, "", (), text)]
    text = f"{of_all} {faster} {'has' if faster == 1 else 'have'} one faster than the plainest"
    best = min(gains, key=lambda row: float(row["ratio"]))
    most = f"up to {time_phrase(float(best['ratio']))}: {best['arm']} instead of {best['baseline']} ({best['scope']})"
    return [Finding(text, "", (most,), f"{text}, {most}")]


def _without_peers(frame: pd.DataFrame | None) -> list[Finding]:
    """That the notebook peers found no peer, and how one is named; nothing where one was timed."""
    rows = [] if frame is None else [row for row in records(frame) if row["baseline"] == "zimage"]
    if not rows or not all(units.missing(row["ratio"]) for row in rows):
        return []
    named = " or ".join(f"--set {row['arm']}_python=PYTHON" for row in rows)
    text = f"no peer was found to compare zimage with; name an interpreter that has one: {named}"
    return [Finding(text, "", (), text)]


def _is_way(row: Mapping[str, object]) -> bool:
    return row["arm"] in WAYS and row["baseline"] in WAYS and not units.missing(row.get("ratio"))


def _or_those_near(best: str, names: list[str], rows: Mapping[str, Mapping[str, object]]) -> str:
    """`best`, or those of `names` whose intervals overlap with its own: it is not known which of them it is."""
    low, high = (float(rows[best][end]) for end in ("ratio_low", "ratio_high"))  # type: ignore[arg-type]
    near = [
        name
        for name in names
        if name != best and float(rows[name]["ratio_low"]) <= high and low <= float(rows[name]["ratio_high"])  # type: ignore[arg-type]
    ]
    return " or ".join([best, *near])


def _by_verdict(rows: Mapping[str, Mapping[str, object]], before: str = "") -> list[str]:
    """Which arms got which verdict, in the order of KNOWN_VERDICTS."""
    names: dict[str, list[str]] = {verdict: [] for verdict in KNOWN_VERDICTS}
    for name, row in rows.items():
        names[verdict_of(row)].append(name)
    return [f"{verdict} {before}{', '.join(found)}" for verdict, found in names.items() if found]


def _arms(tables: Tables) -> list[Finding]:
    """One finding an arm and scope; memory and quality join the finding of the widest scope that the arm has.

    An arm stands beside the baseline that it was compared with. Where there are several, one that was compared with
    none stands alone.
    """
    every = baselines(tables)
    compared = tables.get("ablation")
    found: list[Finding] = []
    for arm in dict.fromkeys([*arms(compared), *arms(tables.get("memory")), *arms(tables.get("quality"))]):
        if every == [arm]:
            continue
        own = compared[compared["arm"] == arm] if compared is not None else pd.DataFrame()
        rows = records(own)
        widest = best_scope(own) if len(own) else ""
        baseline = next((row["baseline"] for row in rows if _text(row["baseline"])), None)
        if baseline is None and len(every) == 1:
            baseline = every[0]
        narrow = [time_finding(row) for row in rows if row["scope"] != widest]
        wide = [time_finding(row) for row in rows if row["scope"] == widest]
        if any(map(_is_way, rows)):  # `ways` says it in short
            narrow, wide = narrow + wide, []
        if not has_ladder(tables.get("gains")):  # which has the narrow scopes as rungs
            found += [replace(one, short="") for one in narrow]
        gone = clause(tables.get("gains"), arm)
        held, drawn = _memory(tables.get("memory"), arm, baseline), _quality(tables.get("quality"), arm, baseline)
        more = [*held, *drawn]
        brief = [text for text, _ in (*held[:1], *drawn)]  # a sentence has room for one size: the weights come first
        full = tuple(text + detail for text, detail in more)
        if wide:
            last = wide.pop()
            told = ": ".join(filter(None, [last.short, gone]))
            evidence = (*last.evidence, *filter(None, [gone]), *full)
            wide.append(replace(last, evidence=evidence, short=", ".join([told, *brief])))
        elif more:
            wide.append(Finding(f"{arm}: {full[0]}", "", full[1:], f"{arm}: {', '.join(brief)}"))
        found += wide
    return found


def _memory(frame: pd.DataFrame | None, arm: str, baseline: str | None) -> list[tuple[str, str]]:
    """What the arm's memory is beside the baseline's: each a clause and its numbers."""
    if frame is None or baseline is None or arm == baseline:
        return []
    texts = []
    keys = frame[["stage", "metric"]].fillna("").agg("/".join, axis=1)
    for key in dict.fromkeys(keys):
        rows = frame[keys == key].dropna(subset=["bytes"])
        mine, theirs = (rows.loc[rows["arm"] == name, "bytes"] for name in (arm, baseline))
        if mine.empty or theirs.empty or float(theirs.iloc[0]) <= 0:
            continue
        now, then, name = float(mine.iloc[0]), float(theirs.iloc[0]), metric_name(str(rows["metric"].iloc[0]))
        change = units.percent(abs(now / then - 1), 0)
        if change == "0 %":
            texts.append((f"the same {name}", f" ({units.size(now)})"))
        else:
            less = "smaller" if now < then else "larger"
            texts.append((f"{name} {change} {less}", f" ({units.size(now)} against {units.size(then)})"))
    return texts


def _quality(frame: pd.DataFrame | None, arm: str, baseline: str | None) -> list[tuple[str, str]]:
    """The arm's quality, beside the baseline's where that says anything: each a clause and a remark."""
    if frame is None or arm == baseline:
        return []
    texts = []
    last = headline(frame)
    for metric in dict.fromkeys(last["metric"]):
        rows = last[last["metric"] == metric].set_index("arm")
        if arm not in rows.index:
            continue
        text = f"{metric_name(metric)} {metric_value(metric, rows.loc[arm, 'value'])}"
        own = rows.loc[baseline, "value"] if baseline in rows.index else None
        # Distances are cut off at zero: two that are there say no more than that there were too few draws.
        if metric.startswith("frechet") and own == 0 == rows.loc[arm, "value"]:
            continue
        # The baseline's own error is zero by construction and says nothing; its accuracy and Fréchet distance do.
        if own is not None and (is_fraction(metric) or metric.startswith("frechet") or own != 0):
            text += f" against {metric_value(metric, rows.loc[baseline, 'value'])}"
            text += _overlap(rows.loc[arm], rows.loc[baseline])
        texts.append((text, ""))
    return texts


def _overlap(mine: "pd.Series[float]", theirs: "pd.Series[float]") -> str:
    ends = (mine["low"], mine["high"], theirs["low"], theirs["high"])
    if any(units.missing(end) for end in ends):
        return ""
    return " (intervals overlap)" if ends[0] <= ends[3] and ends[2] <= ends[1] else ""


def _numbers(row: Mapping[str, object]) -> str:
    low, high = row.get("ratio_low"), row.get("ratio_high")
    text = f"ratio {units.ratio(row['ratio'])}"  # type: ignore[arg-type]
    if units.missing(low) or units.missing(high):
        return text + ", without an interval"
    # Only a tested comparison has a p-value and with it an interval of known coverage.
    kind = "interval" if units.missing(row.get("p_value")) else "95 % interval"
    return f"{text}, {kind} {units.ratio(low)} to {units.ratio(high)}"  # type: ignore[arg-type]


def _range(row: Mapping[str, object]) -> str:
    """The interval in the words of the statement it stands behind: percentages where it excludes 1, else ratios."""
    low, high = row.get("ratio_low"), row.get("ratio_high")
    if units.missing(low) or units.missing(high) or verdict_of(row) not in ("faster", "slower"):
        return _numbers(row)
    if float(row["ratio"]) >= MANY_TIMES:  # type: ignore[arg-type]
        return f"{units.significant(low)} to {units.significant(high)} times"  # type: ignore[arg-type]
    ends = sorted(abs(float(end) - 1) for end in (low, high))  # type: ignore[arg-type]
    return f"{units.percent(ends[0]).removesuffix(' %')} to {units.percent(ends[1])}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
