"""zimage clean: failed and superseded runs go, after asking, and nothing else ever does."""

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from tests.lab.making import FACTS, fake_kernels, meta, write_experiment, write_notebook
from zimage import cli
from zimage.errors import StoreError
from zimage.lab import cleaning
from zimage.lab.files import write_json
from zimage.lab.store import Store

import click
import pytest


def add(root: Path, key: str, *, started: str = "2026-01-01T00:00:00+00:00", **changes: Any) -> Path:
    """A run of the experiment demo."""
    path = root / "demo" / key
    write_json(path / "run.json", meta(key, started=started, **changes))
    return path


def kept(root: Path) -> set[str]:
    return {path.parent.name for path in (root / "demo").glob("*/run.json")}


DAMAGE = re.compile("zimage: skipped: .*/damaged/run.json: not valid JSON.*\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a failed run, a superseded one, its successor, and runs that differ in more than their code."""
    late = "2026-02-01T00:00:00+00:00"
    add(tmp_path, "failed", status="failed", error="ValueError: no\ngood")
    add(tmp_path, "old")
    add(tmp_path, "new", started=late)
    add(tmp_path, "othersize", parameters={"batch": 2})
    add(tmp_path, "otherdevice", device="gpu")
    add(tmp_path, "othermlx", environment=FACTS | {"mlx": "0.31.0"})
    add(tmp_path, "othervariable", environment=FACTS | {"MLX_Y": "2"})
    add(tmp_path, "othercommit", environment=FACTS | {"commit": "abc"})
    add(tmp_path, "othersources", digests={"sources": "5" * 64})
    add(tmp_path, "otherversion", versions={"zimage": "0.0.9"})
    add(tmp_path, "otherweights", weights={"source": "a", "kind": "trained", "digest": "b"})
    add(tmp_path, "othernotebook", notebook="notebooks/b.ipynb")
    add(tmp_path, "asked", started="2025-01-01T00:00:00+00:00")
    Store(tmp_path).write_experiment("demo", {"schema": 1, "name": "demo", "run_keys": ["asked", "new"]})
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "mine").mkdir()
    (tmp_path / "demo" / "damaged").mkdir()
    (tmp_path / "demo" / "damaged" / "run.json").write_text("{")
    return tmp_path


def zimage(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> tuple[int, str, str]:
    status = cli.main(["clean", "--results", str(root), *options])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_only_failed_and_superseded_runs_go(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What differs in anything but its code stays, and so does what the last sweep asked for, and what is no run."""
    before = set(root.rglob("*"))
    status, out, err = zimage(capsys, root, "--yes")
    assert (status, out) == (0, "2 of 2 runs removed\n") and DAMAGE.fullmatch(err)
    gone = {path for path in before if not path.exists()}
    assert {path.name for path in gone if path.parent.name == "demo"} == {"failed", "old"}
    assert {path.parent.name for path in gone if path.name == "run.json"} == {"failed", "old"}
    assert len(gone) == 4 and not list((root / "demo").glob(".*"))
    assert "no good" not in (root / "demo" / "index.html").read_text()
    status, out, err = zimage(capsys, root, "--yes")
    assert (status, out) == (0, f"{root}: no failed or superseded runs\n") and DAMAGE.fullmatch(err)


def test_one_broken_record_hides_no_other_experiment(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where experiment.json cannot be read, that is told; of its runs failed ones may go, and all else goes on."""
    (root / "demo" / "experiment.json").write_text("[]")
    status, out, err = zimage(capsys, root, "--yes")
    assert (status, out) == (0, "1 of 1 run removed\n") and "experiment.json: holds list" in err
    assert "old" in kept(root) and "failed" not in kept(root)


def test_a_dry_run_removes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run lists what would go, with why; --json says the same to programs."""
    every = kept(root)
    _, out, _ = zimage(capsys, root, "--dry-run")
    first, failed, old = out.splitlines()
    assert first == "2 runs would be removed:"
    assert failed.startswith(f"  {root}/demo/failed  failed: ValueError: no good  notebooks/a.ipynb, 2026-01-01")
    assert old.startswith(f"  {root}/demo/old  superseded  notebooks/a.ipynb, 2026-01-01")
    content = json.loads(zimage(capsys, root, "--dry-run", "--json")[1])
    assert [(run["key"], run["reason"]) for run in content["runs"]] == [("failed", "failed"), ("old", "superseded")]
    assert (content["removed"], kept(root)) == ([], every)


def test_it_asks(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal it asks and takes no for an answer; where nobody can be asked, one line says what to add."""
    every = kept(root)
    status, out, err = zimage(capsys, root)
    assert (status, out, err.count("\n")) == (2, "", 2) and "2 runs would be removed: add --yes" in err
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda text: bool(asked.append(text)))
    assert zimage(capsys, root)[0] == 1
    assert (asked, kept(root)) == (["remove 2 runs?"], every)
    monkeypatch.setattr(click, "confirm", lambda _text: True)
    assert zimage(capsys, root)[0] == 0
    assert kept(root) == every - {"failed", "old"}


def test_what_changes_meanwhile_stays(root: Path) -> None:
    """A run that another process is at, that was done again or that is a link meanwhile is not removed."""
    store = Store(root)
    chosen = cleaning.removable(store)
    with store.lock("demo", "failed"):
        add(root, "old", started="2026-03-01T00:00:00+00:00")
        assert cleaning.remove(store, chosen) == []
    elsewhere = root / "elsewhere"
    shutil.move(root / "demo" / "failed", elsewhere)
    (root / "demo" / "failed").symlink_to(elsewhere)
    assert cleaning.remove(store, chosen[:1]) == [] and (elsewhere / "run.json").is_file()


def test_it_judges_again_before_it_removes(root: Path) -> None:
    """A run that a sweep has asked for since the question stays, and so does one whose successor is gone."""
    store = Store(root)
    chosen = cleaning.removable(store)
    store.write_experiment("demo", {"schema": 1, "name": "demo", "run_keys": ["old"]})
    assert [run.key for run in cleaning.remove(store, chosen)] == ["failed"]
    store.write_experiment("demo", {"schema": 1, "name": "demo", "run_keys": []})
    chosen = [(run, reason) for run, reason in cleaning.removable(store) if run.key == "old"]
    shutil.rmtree(root / "demo" / "new")
    assert cleaning.remove(store, chosen) == [] and "old" in kept(root)


def test_what_cannot_be_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk refuses in the middle the rest keeps its name and is no run, and pages show what went before."""
    (root / "demo" / "old" / "tables").mkdir()
    remove = shutil.rmtree

    def refuse(path: Path, **options: Any) -> None:
        if Path(path).name.startswith(".old."):
            raise PermissionError(13, "Permission denied")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    store = Store(root)
    with pytest.raises(StoreError, match="demo/old: cannot be removed: Permission denied"):
        cleaning.remove(store, cleaning.removable(store))
    assert {"failed", "old"} & kept(root) == set() and (root / "demo" / "old" / "tables").is_dir()
    assert "no good" not in (root / "demo" / "index.html").read_text()
    assert not list((root / "demo").glob(".*"))


def test_odd_versions_are_no_crash(root: Path) -> None:
    """Versions or digests in a run.json that are no mappings count as none."""
    add(root, "odd", versions=["1"], digests=3)
    assert ("odd", "superseded") in {(run.key, reason) for run, reason in cleaning.removable(Store(root))}


def test_two_at_once(root: Path) -> None:
    """Two at the same time remove each run once and leave nothing else behind."""
    for number in range(30):
        add(root, f"f{number}", status="failed")
    gone: list[str] = []

    def clean() -> None:
        store = Store(root)
        gone.extend(run.key for run, _ in cleaning.removable(store) if store.remove(run))

    threads = [threading.Thread(target=clean) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gone) == len(set(gone)) == 32
    assert not list((root / "demo").glob(".*"))


def test_after_the_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep, a changed cell and the same sweep: the runs of the old cell are superseded, those of the new stay."""
    write_notebook(tmp_path / "notebooks" / "a.ipynb", "x = 1")
    write_experiment(tmp_path, "grid: {batch: [1, 2]}\n")
    monkeypatch.chdir(tmp_path)
    fake_kernels(monkeypatch)
    assert cli.main(["sweep", "experiments/demo.yaml"]) == 0
    store = Store("results")
    old = {run.key for run in store.runs("demo")}
    assert cleaning.removable(store) == []
    write_notebook(tmp_path / "notebooks" / "a.ipynb", "x = 2")
    monkeypatch.setattr("zimage.lab.runner.datetime", _Later)
    assert cli.main(["sweep", "experiments/demo.yaml"]) == 0
    assert {run.key for run, _ in cleaning.removable(store)} == old


class _Later:
    @staticmethod
    def now(zone: Any) -> Any:
        from datetime import datetime, timedelta

        return datetime.now(zone) + timedelta(minutes=1)
