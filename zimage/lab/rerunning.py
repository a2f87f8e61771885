"""`zimage compare --rerun`: the steps of two sides' runs timed anew, fresh processes of both in turns on one clock.

What two runs recorded apart can only be compared as ratios to baselines of their own. Here the whole step of each is
timed beside the other's, so that two versions of MLX or of zimage, each in an interpreter of its own, or two models in
this one, are compared as such.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage import peers
from zimage.analysis import comparing, matching
from zimage.analysis.combining import ALPHA, DELTA, WORSE
from zimage.analysis.matching import Recorded
from zimage.errors import ExperimentError, StoreError
from zimage.lab import keys, terminal
from zimage.lab.comparing import Side
from zimage.measure.comparison import Comparison
from zimage.measure.fresh import FEWEST_PAIRS, fewest_pairs, in_fresh_processes
from zimage.measure.processes import Arm, Program

# What `arms.step` takes of a notebook's parameters; what a run leaves at null is left to each side's own default.
_ARGUMENTS = ("source", "dtype", "quantization", "transforms", "height", "width", "batch", "caption_tokens", "seed")
_NEEDED = ("source", "height", "width")
_MAY_DIFFER = (*matching.OF_THE_MODEL, "dtype")  # models of one source do the same work


@dataclass(frozen=True)
class Steps:
    """A step of each side to time: the runs it is of, and the arguments of `arms.step`."""

    a: Recorded
    b: Recorded
    arguments: tuple[dict[str, Any], dict[str, Any]]

    def noise_floor(self, device: str) -> float | None:
        """The largest floor that either run recorded of a step in bursts, where it ran on this device."""
        floors = [
            comparing.floor_of(row)
            for run in (self.a, self.b)
            if run.device == device
            for (_, _, scope, regime), row in comparing.ratios(run.tables).items()
            if (scope, regime) == ("step", comparing.BURST)
        ]
        return max((floor for floor in floors if floor is not None), default=None)


def rerun(a: Side, b: Side, pythons: Sequence[str], pairs: int, samples: int, as_json: bool) -> int:
    """Time the steps of both sides, each of them once, and tell; the exit status.

    Their intervals hold together: the level is divided by their number, and `pairs` raised where so few could not show
    anything at it.
    pythons: the interpreters of A and of B, each with a zimage installed; none for this one. Raises ExperimentError for
    anything else, StoreError where the sides have no step to time in common, and MeasurementError where it fails.
    """
    if len(pythons) not in (0, 2):
        raise ExperimentError("--python is given twice, for A and for B, or not at all")
    if pairs < FEWEST_PAIRS or samples < 1:
        raise ExperimentError(f"--pairs {pairs} --samples {samples}: give at least {FEWEST_PAIRS} and 1")
    wanted = steps(a, b)
    device = _device(wanted)
    facts = [keys.device_facts(device, python) for python in pythons or ("", "")]
    found: list[Comparison] = []
    alpha = ALPHA / len(wanted)
    pairs = max(pairs, fewest_pairs(alpha))
    terminal.note(f"{len(wanted)} step{'s' * (len(wanted) > 1)} to time, {2 * pairs} processes each")
    with terminal.progress("measuring", 2 * pairs * len(wanted)) as on:
        for one in wanted:
            found.append(
                in_fresh_processes(
                    *_arms(one, pythons, device), seed=int(one.a.parameters.get("seed", 0)), pairs=pairs,
                    samples=samples, alpha=alpha, delta=DELTA, noise_floor=one.noise_floor(facts[0]["device"]),
                    names=("A", "B"), advance=on,
                )
            )  # fmt: skip
    differing = matching.environments(facts[:1], facts[1:])
    worse = sum(one.verdict in WORSE for one in found)
    content = {
        "a": _side_content(a, pythons[:1], facts[0]),
        "b": _side_content(b, pythons[1:], facts[1]),
        "environment": [{"fact": name, "a": one, "b": two} for name, one, two in differing],
        "steps": [_step_content(one, comparison) for one, comparison in zip(wanted, found, strict=True)],
        "regressions": worse,
    }
    terminal.show(content, as_json, lambda: _lines(wanted, found, facts, differing))
    return 1 if worse else 0


def steps(a: Side, b: Side) -> list[Steps]:
    """The steps that runs of both sides did on the same inputs, each once; their models may differ.

    Raises StoreError where there is none, or where a source holds other weights today than when it ran.
    """
    completed_a, completed_b = ([run for run in side.runs if not run.error] for side in (a, b))
    matched = matching.match(completed_a, completed_b, _MAY_DIFFER)
    found: list[Steps] = []
    for one, two in matched.pairs:
        if any(name not in run.parameters for run in (one, two) for name in _NEEDED):
            continue
        asked = Steps(one, two, (_arguments(one), _arguments(two)))
        if asked.arguments not in [other.arguments for other in found]:
            found.append(asked)
    if not found:
        reason = matched.alone_a[0][1] if matched.alone_a else "no run has one step of one size"
        raise StoreError(f"{a.asked} and {b.asked} have no step to time again: {reason}")
    for run in [run for one in found for run in (one.a, one.b)]:
        _check_weights(run)
    return found


def _arguments(run: Recorded) -> dict[str, Any]:
    said = dict(run.parameters) | ({} if run.recipe is None else {"quantization": run.recipe})
    return {name: said[name] for name in _ARGUMENTS if said.get(name) not in (None, [])}


def _check_weights(run: Recorded) -> None:
    recorded, source = (run.weights or {}).get("digest"), str(run.parameters["source"])
    if recorded is not None and keys.described(source, Path.cwd()).digest != recorded:
        raise StoreError(f"{run.name}: {source} holds other weights today than when it ran; run it again first")


def _device(wanted: Sequence[Steps]) -> str:
    """The `device` that all runs were given, or names of one device. Raises StoreError for several devices."""
    given = list(dict.fromkeys(str(run.parameters.get("device", "auto")) for one in wanted for run in (one.a, one.b)))
    if len(given) > 1 and len({keys.device_facts(device)["device"] for device in given}) > 1:
        raise StoreError(f"the runs ran with device {' and '.join(given)}: name runs of one device to time them again")
    return given[0]


def _arms(one: Steps, pythons: Sequence[str], device: str) -> list[Arm]:
    arguments = [said | {"device": device} for said in one.arguments]
    if pythons:
        return [peers.of_zimage(python, said) for python, said in zip(pythons, arguments, strict=True)]
    return [Program("zimage.arms:step", said) for said in arguments]


def _side_content(side: Side, python: Sequence[str], facts: Mapping[str, str]) -> dict[str, Any]:
    return {"asked": side.asked, "what": side.what, "python": python[0] if python else None, "facts": dict(facts)}


def _step_content(one: Steps, found: Comparison) -> dict[str, Any]:
    named = {"a": one.a.name, "b": one.b.name, "arguments_a": one.arguments[0], "arguments_b": one.arguments[1]}
    return named | found.row("step") | {"regression": found.verdict in WORSE, "samples": found.sample_rows("step")}


def _lines(
    wanted: Sequence[Steps], found: Sequence[Comparison], facts: Sequence[Mapping[str, str]],
    differing: Sequence[tuple[str, str, str]],
) -> list[str]:  # fmt: skip
    said = [f"On {facts[0]['device']}, fresh processes of A and B in turns:"]
    if not differing:
        said += ["  A and B run on the same MLX and zimage"]
    said += [f"  {name}  {one} -> {two}" for name, one, two in differing]
    for one, comparison in zip(wanted, found, strict=True):
        left, right = one.arguments
        said += ["", f"A  a step of {_words(left)} ({one.a.name}, {one.a.kind or 'unknown'} weights)"]
        said += [
            f"B  the same step ({one.b.name})" if left == right else f"B  a step of {_words(right)} ({one.b.name})"
        ]
        said.append(str(comparison))
    return said


def _words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())
