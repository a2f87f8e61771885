"""What may be removed from a store: failed runs, and those that a newer run of the same question took the place of."""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from zimage.errors import InputError, StoreError
from zimage.lab import dashboard, terminal
from zimage.lab.keys import NAMED_FACTS
from zimage.lab.store import Run, Store

import click


def removable(store: Store) -> list[tuple[Run, str]]:
    """The runs that may go, each with the reason: "failed" or "superseded".

    Superseded is a completed run that the last sweep did not ask for, where a newer completed one differs from it in
    nothing but the notebook's code. Parameters, weights, device, versions, commit and sources of zimage, and what else
    the run key holds, are the same; a trend over versions loses nothing.
    """
    return [one for name in store.experiments() for one in _removable(store, name)]


def unreadable(store: Store) -> list[str]:
    """What of the store cannot be read and therefore stays, a line each."""
    return list(dict.fromkeys(problem for name in store.experiments() for problem in store.scan(name)[1]))


def _removable(store: Store, experiment: str) -> list[tuple[Run, str]]:
    runs = store.runs(experiment)
    try:
        asked = set(store.experiment(experiment).get("run_keys", []))
    except StoreError:  # which runs the last sweep asked for is not known: none is superseded
        asked = {run.key for run in runs}
    newest: dict[str, Run] = {}
    for run in sorted((run for run in runs if run.completed), key=_started):
        newest[_question(run)] = run
    found = []
    for run in runs:
        if not run.completed:
            found.append((run, "failed"))
        elif run.key not in asked and newest[_question(run)] is not run:
            found.append((run, "superseded"))
    return found


def remove(store: Store, chosen: Sequence[tuple[Run, str]]) -> list[Run]:
    """Remove those of the chosen runs that are still what they were, and build the pages again; gives what went.

    A run that another process is at, has replaced meanwhile, or has asked for again, stays. Raises StoreError where the
    store cannot be written; the pages show what went before that.
    """
    gone: list[Run] = []
    try:
        for run, reason in chosen:
            if store.remove(run, functools.partial(_still, store, run, reason)):
                gone.append(run)
    finally:
        if gone:
            names = dict.fromkeys(run.experiment for run in gone if run.experiment in store.experiments())
            dashboard.build(store, names)
    return gone


def _still(store: Store, run: Run, reason: str) -> bool:
    """Whether a run may still go, as the store is now; a failed one that is as it was may."""
    return reason == "failed" or run.key in {one.key for one, _ in _removable(store, run.experiment)}


def clean(store: Store, yes: bool, dry_run: bool, as_json: bool) -> int:
    """Say what may be removed, ask unless `yes`, remove it and say so; gives the exit status, 1 where the answer is no.

    Raises InputError where nobody can be asked.
    """
    terminal.skipped(unreadable(store))
    chosen = removable(store)
    runs = [_content(run, reason) for run, reason in chosen]
    lines = [_line(run, reason) for run, reason in chosen]
    counted = f"{len(chosen)} run{'' if len(chosen) == 1 else 's'}"
    if dry_run or not chosen:
        said = f"{counted} would be removed:" if chosen else f"{store.root}: no failed or superseded runs"
        terminal.show({"runs": runs, "removed": []}, as_json, lambda: [said, *lines])
        return 0
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise InputError(f"{counted} would be removed: add --yes to remove without asking, or --dry-run to list")
        terminal.say("\n".join(lines))
        if not click.confirm(f"remove {counted}?"):
            return 1
    gone = remove(store, chosen)
    stay = len(chosen) - len(gone)
    text = f"{len(gone)} of {counted} removed" + (f"; {stay} changed meanwhile or in use" if stay else "")
    terminal.show({"runs": runs, "removed": [run.key for run in gone]}, as_json, lambda: [text])
    return 0


def _content(run: Run, reason: str) -> dict[str, Any]:
    """A run for programs."""
    return {
        "experiment": run.experiment, "key": run.key, "reason": reason, "notebook": run.notebook,
        "started": run.meta["started"], "path": str(run.path),
    }  # fmt: skip


def _line(run: Run, reason: str) -> str:
    """A run in a line."""
    why = f": {' '.join(str(run.meta['error']).split())[:80]}" if reason == "failed" and run.meta.get("error") else ""
    return f"  {run.path}  {reason}{why}  {run.notebook}, {run.meta['started']}"


def _started(run: Run) -> str:
    return str(run.meta["started"])


def _question(run: Run) -> str:
    """All that a run's key holds but for the notebook's code, with the version and commit."""
    facts, weights, versions, digests = map(run.mapping, ("environment", "weights", "versions", "digests"))
    chosen = {
        name: value for name, value in facts.items() if name in (*NAMED_FACTS, "commit") or name.startswith("MLX_")
    }
    code = [versions.get("zimage"), digests.get("sources")]
    contents = [run.meta.get(name) for name in ("recipe", "recipes")]
    parts = [run.notebook, run.parameters, run.device, weights, *contents, chosen, code]
    return json.dumps(parts, sort_keys=True, default=str)
