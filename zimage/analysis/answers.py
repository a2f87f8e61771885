"""What two experiments answer as a whole, where a finding for each arm would leave the answer to the reader.

`sensitivity`: which layers packing harms most, and whether a recipe made of that errs less than packing all alike.
`step_caching`: which ways to reuse earlier steps err less than a plain run of no more blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zimage.analysis import units
from zimage.analysis.reading import DRIFT, final_step, records

import pandas as pd

Tables = Mapping[str, pd.DataFrame]
Answer = tuple[str, tuple[str, ...]]  # a statement, and the numbers behind it
SKIPPED = "skipped_blocks_fraction"
BUDGET = "error_budget"  # the metric whose value is the error that a recipe may make
PLAIN_RUN = "steps_"  # begins the name of a plain run of fewer steps


@dataclass(frozen=True)
class Beside:
    """An arm's error at the end beside that of the plain run of so many steps: "less", "more" or "undecided"."""

    word: str
    steps: int
    error: float
    plain_error: float


def texts(tables: Tables) -> list[Answer]:
    """The answers that the tables of one experiment hold; none for other experiments."""
    return [*_reuse(tables), *_damage(tables.get("sensitivity")), *_recipes(tables)]


def beside_fewer_steps(quality: pd.DataFrame) -> dict[str, Beside]:
    """Arms of step_caching's `quality` table that skip blocks, each beside the plain run that computes no more.

    Where the two 95 % intervals overlap, or there are none, it is undecided. Arms that change nothing are left out.
    """
    rows = final_step(quality)
    skipped = rows[rows["metric"] == SKIPPED].set_index("arm")["value"]
    errors = {str(row["arm"]): row for row in records(rows[rows["metric"] == DRIFT])}
    if skipped.empty or not errors:
        return {}
    steps, found = max(int(row["step"]) for row in errors.values()), {}
    for arm, share in skipped.items():
        count = equivalent_steps(steps, float(share))
        own, plain = errors.get(str(arm)), errors.get(f"{PLAIN_RUN}{count}")
        if str(arm).startswith(PLAIN_RUN) or own is None or plain is None or own["value"] == 0:
            continue
        word = "undecided"
        if not any(units.missing(row[end]) for row in (own, plain) for end in ("low", "high")):
            word = "less" if own["high"] < plain["low"] else "more" if own["low"] > plain["high"] else word
        found[str(arm)] = Beside(word, count, float(own["value"]), float(plain["value"]))
    return found


def equivalent_steps(steps: int, skipped: float) -> int:
    """How many steps of a plain run compute no more blocks than `steps` that skip this share of them."""
    return max(1, int(steps * (1 - skipped) + 1e-9))


def budget_verdict(error: float, low: float | None, high: float | None, budget: float) -> str:
    """Whether an error on trajectories held out keeps to its budget, by its interval if there is one, and the numbers.

    "kept", "missed" or "undecided", then what says so; without an interval the estimate alone decides.
    """
    if units.missing(low) or units.missing(high):
        return f"{'missed' if error > budget else 'kept'}: {units.percent(error, 2)}, by the estimate alone"
    word = "missed" if low > budget else "kept" if high <= budget else "undecided"  # type: ignore[operator]
    ends = " to ".join(units.percent(float(end), 2) for end in (low, high))  # type: ignore[arg-type]
    return f"{word}: {units.percent(error, 2)}, 95 % interval {ends}"


def _reuse(tables: Tables) -> list[Answer]:
    quality = tables.get("quality")
    judged = {} if quality is None or quality.empty else beside_fewer_steps(quality)
    if quality is None or not judged:
        return []
    named = {word: [arm for arm, one in judged.items() if one.word == word] for word in ("less", "more", "undecided")}
    faster = _less_time(tables.get("ablation"))
    ways, than = f"{len(judged)} ways to reuse earlier steps", "than a plain run of no more blocks"
    if good := named["less"]:
        best = min(good, key=lambda arm: faster.get(arm, 1.0))
        time = f"{units.percent(1 - faster[best])} less time, " if best in faster else ""
        one = judged[best]
        text = (
            f"of {ways} {len(good)} err{'s' * (len(good) == 1)} less {than}; {best}: {time}error at the end "
            f"{units.percent(one.error)}, that of {one.steps} steps {units.percent(one.plain_error)}"
        )
    else:
        text = f"of {ways} none is known to err less {than}"
    evidence = [f"{word}: {', '.join(arms)}" for word, arms in named.items() if arms]
    exact = [arm for arm in _exact(quality) if arm in faster]
    evidence += [f"{arm} changes nothing and takes {units.percent(1 - faster[arm])} less time" for arm in exact]
    return [(text, tuple(evidence))]


def _less_time(ablation: pd.DataFrame | None) -> dict[str, float]:
    """The time ratios of the arms that are known to take less time."""
    if ablation is None or ablation.empty:
        return {}
    rows = records(ablation[ablation["verdict"] == "faster"].dropna(subset=["ratio"]))
    return {str(row["arm"]): float(row["ratio"]) for row in rows}


def _exact(quality: pd.DataFrame) -> list[str]:
    """Arms whose latents at the end are the plain run's, bit for bit."""
    rows = final_step(quality)
    return [str(arm) for arm in rows.loc[(rows["metric"] == DRIFT) & (rows["value"] == 0), "arm"]]


def _damage(single: pd.DataFrame | None) -> list[Answer]:
    """Which layer packing harms most for the bytes it saves, beside the median layer, and which block."""
    if single is None or single.empty:
        return []
    whole = single[single["step"].isna()]
    blocks = whole[whole["kind"] == "block"].dropna(subset=["velocity_error"])
    layers = whole[whole["kind"] == "layer"].dropna(subset=["damage_per_byte"])
    ways = [*blocks["quantization"].dropna().unique(), *layers["quantization"].dropna().unique()]
    layers = layers[layers["quantization"].isin(ways[:1])]
    if len(layers) < 2:
        return []
    ranked, median = layers.sort_values("damage_per_byte"), float(layers["damage_per_byte"].median())
    least, most = (records(ranked)[place] for place in (0, -1))
    times = f", {units.significant(most['damage_per_byte'] / median)} times the median layer's" if median > 0 else ""
    text = f"of {len(layers)} layers packed to {ways[0]} alone, {most['unit']} does the most damage a byte{times}"
    evidence = [f"{least['unit']} does the least"]
    if len(blocks):
        worst = records(blocks.nlargest(1, "velocity_error"))[0]
        evidence.append(f"of blocks {worst['unit']}, an error of {units.percent(worst['velocity_error'])}")
    return [(text, tuple(evidence))]


def _recipes(tables: Tables) -> list[Answer]:
    """Each recipe's error beside that of packing all layers alike, and its bytes, as on trajectories held out."""
    quality, memory = tables.get("quality"), tables.get("memory")
    if quality is None or quality.empty or not (quality["metric"] == "error_ratio").any():
        return []
    held = {} if memory is None else dict(memory[memory["metric"] == "weight_bytes"][["arm", "bytes"]].values)
    found: list[Answer] = []
    for row in records(quality[quality["metric"] == "error_ratio"]):
        arm, plain, ends = row["arm"], row["baseline"], (row["low"], row["high"])
        known = not any(units.missing(end) for end in ends)
        word = "less" if known and row["high"] < 1 else "more" if known and row["low"] > 1 else None
        text = f"whether {arm} errs less than {plain} everywhere is undecided"
        if word:
            text = f"{arm} errs {word} than {plain} everywhere"
        text += f": {units.significant(row['value'])} of its error"
        text += f" ({units.significant(row['low'])} to {units.significant(row['high'])})" if known else ""
        if arm in held and held.get(plain):
            text += f", {units.percent(held[arm] / held[plain])} of its bytes"
        found.append((text, () if found else _added(tables.get("additivity"))))
    return found + _budgets(quality)


def _budgets(quality: pd.DataFrame) -> list[Answer]:
    """Whether recipes that were made within an error budget keep to it on trajectories held out."""
    errors = {row["arm"]: row for row in records(quality[quality["metric"] == "relative_l2_error"])}
    found: list[Answer] = []
    for row in records(quality[quality["metric"] == BUDGET]):
        if (own := errors.get(row["arm"])) is not None:
            told = budget_verdict(own["value"], own["low"], own["high"], row["value"])
            budget = units.percent(row["value"], 2)
            text = f"{row['arm']}: on held-out trajectories its error budget of {budget} is {told}"
            found.append((text, ()))
    return found


def _added(sums: pd.DataFrame | None) -> tuple[str, ...]:
    """How well the squared errors of a random mix's layers added up, which is what recipes are chosen by."""
    ratios = pd.Series(dtype=float) if sums is None else sums.loc[sums["what"] == "random mixes", "ratio"].dropna()
    if ratios.empty:
        return ()
    ends = " to ".join(units.significant(float(end)) for end in (ratios.min(), ratios.max()))
    of = f"of {len(ratios)} random mixes"
    return (f"squared errors {of} are {units.significant(float(ratios.median()))} of their sum in the median ({ends})",)
