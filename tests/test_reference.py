"""The reference results in the repository: whole, readable without a device, and each from a commit that it names."""

import re
from pathlib import Path

from zimage.analysis.tables import conform
from zimage.lab import claims, dashboard
from zimage.lab.store import Store

import pytest

ROOT = Path(__file__).parent.parent
STORES = sorted(path for path in (ROOT / "results" / "reference").iterdir() if path.is_dir())
EACH = pytest.mark.parametrize("root", STORES, ids=lambda path: path.name)


def test_there_are_reference_results() -> None:
    """The H100's are here."""
    assert "nvidia-h100-80gb-hbm3" in [path.name for path in STORES]


@EACH
def test_reference_runs_are_whole(root: Path) -> None:
    """Every run completed on the folder's device, with conforming tables, at a commit without changes of its own."""
    store = Store(root)
    for name in store.experiments():
        runs, problems = store.scan(name)
        assert runs and not problems
        for run in runs:
            assert run.completed and run.device == root.name
            assert re.fullmatch(r"[0-9a-f]{12}", run.meta["environment"]["commit"])
            assert run.meta["weights"]["kind"] in ("trained", "synthetic")
            for table in run.tables():
                rows = run.table(table)
                assert len(conform(table, rows)) and set(rows["weights_kind"]) == {run.meta["weights"]["kind"]}


@EACH
def test_pages_and_verdicts_are_made_from_the_tables(root: Path) -> None:
    """Findings, and verdicts on the published claims, come out of what is stored; no run is left out."""
    store = Store(root)
    assert all(dashboard.findings(store, name).clauses for name in store.experiments())
    judged, problems = claims.judgements(claims.read(ROOT / "experiments" / "claims.yaml"), store)
    assert judged and not problems


def test_the_readme_s_verdicts_are_those_of_the_stored_runs() -> None:
    """Every row of README's table of claims has the interval and verdict that the H100's results give."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("| claim | claimed |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()[2:]]
    told = [(tuple(map(float, re.findall(r"\d+\.\d", re.split("[;:]", row[2])[0]))), row[3]) for row in rows if row[2]]
    store = Store(ROOT / "results" / "reference" / "nvidia-h100-80gb-hbm3")
    judged, _ = claims.judgements(claims.read(ROOT / "experiments" / "claims.yaml"), store)
    found = [
        (tuple(sorted(round(100 * abs(1 - end), 1) for end in one.interval)), one.verdict)
        for one in judged
        if one.interval is not None
    ]
    assert len(told) == 4 and sorted((tuple(sorted(ends)), verdict) for ends, verdict in told) == sorted(found)


@EACH
def test_nothing_of_the_machine_it_ran_on_is_told(root: Path) -> None:
    """Neither notebooks nor run.json name folders of the machine's file system."""
    for path in [*root.rglob("*.json"), *root.rglob("*.ipynb")]:
        assert not re.search(r"(/home/|/root/|/tmp/|/work/|/Users/)", path.read_text(encoding="utf-8")), path
