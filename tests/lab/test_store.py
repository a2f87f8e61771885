"""The store: whole or not at all, readable whatever lies in it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.lab.making import meta
from zimage.errors import StoreError
from zimage.lab.recording import append_rows
from zimage.lab.store import Run, Store

import pandas as pd
import pytest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def put(store: Store, key: str = "aa11", value: float = 1.0, **changes: Any) -> Run:
    content = meta(key, **changes)
    with store.lock(content["experiment"], key):
        partial = store.begin(content["experiment"], key)
        frame = pd.DataFrame({"run_key": [key], "arm": ["x"], "metric": ["m"], "value": [value]})
        append_rows(partial, "quality", frame)
        (partial / "pictures").mkdir()
        (partial / "pictures" / "p.png").write_bytes(b"png")
        (partial / "pictures" / "p.json").write_text('{"caption": "seven"}')
        return store.commit(partial, content)


def names(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "demo").iterdir())


def test_empty(store: Store) -> None:
    """A results folder that does not exist is an empty store, and reading it makes nothing."""
    assert (store.experiments(), store.runs("demo"), store.experiment("demo"), store.done("demo", "aa")) == (
        [],
        [],
        {},
        None,
    )
    assert store.table("demo", "quality").empty
    assert not store.root.exists()


def test_a_run_comes_back(store: Store) -> None:
    """A committed run is found with its parameters, tables and pictures, and nothing else is left in the folder."""
    put(store)
    (run,) = store.runs("demo")
    assert (run.key, run.status, run.parameters, run.tables()) == ("aa11", "completed", {"batch": 1}, ["quality"])
    assert run.table("quality")["value"].tolist() == [1.0]
    assert [(p.name, p.caption) for p in run.pictures()] == [("p", "seven")]
    assert store.experiments() == ["demo"]
    assert names(store) == ["aa11"]


def test_tables_are_stacked_over_completed_current_runs(store: Store) -> None:
    """The stacked table holds completed runs of the last sweep in its order, no failed and no superseded ones."""
    for key, value, status in [
        ("aa", 1.0, "completed"),
        ("bb", 2.0, "completed"),
        ("cc", 3.0, "failed"),
        ("dd", 4.0, "completed"),
    ]:
        put(store, key, value, status=status, parameters={"batch": value, "same": 1})
    store.write_experiment("demo", {"name": "demo", "run_keys": ["bb", "aa", "cc", "zz"]})
    assert store.table("demo", "quality")["value"].tolist() == [2.0, 1.0]
    assert [run.key for run in store.runs("demo")] == ["bb", "aa", "cc", "dd"]
    assert [run.key for run in store.current("demo")] == ["bb", "aa", "cc"]
    assert store.swept("demo") == ["batch"]


def test_only_completed_is_done(store: Store) -> None:
    """A failed run does not count as done, and a later completed one takes its place."""
    put(store, status="failed", error="E: x")
    assert store.done("demo", "aa11") is None
    put(store, value=5.0)
    assert store.done("demo", "aa11") is not None
    assert store.table("demo", "quality")["value"].tolist() == [5.0]
    assert names(store) == ["aa11"]


BAD_META = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "NaN": json.dumps(meta()).replace("2.0", "NaN"),
    "other schema": json.dumps(meta(schema=2)),
    "no parameters": json.dumps({k: v for k, v in meta().items() if k != "parameters"}),
    "parameters a list": json.dumps(meta(parameters=[])),
    "strange status": json.dumps(meta(status="running")),
    "another key": json.dumps(meta("bb22")),
    "duration text": json.dumps(meta(duration_s="long")),
    "weights text": json.dumps(meta(weights="x")),
    "weights without source": json.dumps(meta(weights={"kind": 3})),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_META)
def test_unreadable_run_is_skipped_with_a_line(store: Store, case: str) -> None:
    """A run.json that is not one is left out with one line naming it, and is not done; other runs are unharmed."""
    put(store)
    put(store, "cc33")
    path = store.root / "demo" / "aa11" / "run.json"
    path.write_text(BAD_META[case])
    runs, (problem,) = store.scan("demo")
    assert [run.key for run in runs] == ["cc33"]
    assert str(path) in problem
    assert "\n" not in problem
    assert store.done("demo", "aa11") is None


def test_a_damaged_run_is_done_again_and_its_folder_kept(store: Store) -> None:
    """With an unreadable table a run is not done; with an unreadable run.json its folder stays beside the new run."""
    run = put(store)
    (run.path / "tables" / "quality.parquet").write_bytes(b"PAR1")
    runs, (problem,) = store.scan("demo")
    assert [one.key for one in runs] == ["aa11"] and "quality.parquet: not readable" in problem
    assert store.done("demo", "aa11") is None
    for number in ("", "1"):
        (run.path / "run.json").write_text("{")
        (run.path / "mine.txt").write_text(number)
        put(store)
        kept = run.path.with_name(f"aa11.damaged{number}")
        assert (kept / "mine.txt").read_text() == number and store.done("demo", "aa11") is not None
    assert [one.key for one in store.runs("demo")] == ["aa11"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 50, b"x" * 1000])
def test_unreadable_table(store: Store, content: bytes) -> None:
    """A table that is no parquet file gives one StoreError line naming it."""
    run = put(store)
    path = run.path / "tables" / "quality.parquet"
    path.write_bytes(content)
    for read in (lambda: run.table("quality"), lambda: store.table("demo", "quality")):
        with pytest.raises(StoreError, match=r"quality\.parquet: not readable") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_table_of_other_types(store: Store) -> None:
    """A table whose columns are of another kind is refused and its run is done again; columns it lacks are null."""
    run = put(store)
    path, about = run.path / "tables" / "quality.parquet", {"arm": ["a"], "metric": ["m"]}
    pd.DataFrame({**about, "value": ["text"]}).to_parquet(path)
    line = "table quality of run demo/aa11 cannot be used: column value holds text in place of numbers; run it again"
    with pytest.raises(StoreError) as refused:
        run.table("quality")
    assert str(refused.value) == line and store.scan("demo")[1] == [line]
    assert store.done("demo", "aa11") is None
    pd.DataFrame({**about, "value": [1], "count": [None]}).to_parquet(path)
    assert run.table("quality")["value"].tolist() == [1.0]
    assert run.table("quality")["baseline"].isna().all() and store.scan("demo")[1] == []


@pytest.mark.parametrize(
    ("lacking", "told"), [(["metric"], "column metric is"), (["arm", "metric"], "columns arm, metric are")]
)
def test_table_that_does_not_say_what_it_is_about(store: Store, lacking: list[str], told: str) -> None:
    """A table without a column that says what its rows are about is refused and its run is done again."""
    run = put(store)
    run.table("quality").drop(columns=lacking).to_parquet(run.path / "tables" / "quality.parquet")
    line = f"table quality of run demo/aa11 cannot be used: {told} missing; run it again"
    with pytest.raises(StoreError, match=line):
        run.table("quality")
    assert store.scan("demo")[1] == [line] and store.done("demo", "aa11") is None


def test_unreadable_experiment_file(store: Store) -> None:
    """A broken experiment.json is told by scan and does not hide the runs."""
    put(store)
    (store.root / "demo" / "experiment.json").write_text("{")
    runs, (problem,) = store.scan("demo")
    assert [run.key for run in runs] == ["aa11"]
    assert "experiment.json" in problem


@pytest.mark.parametrize("keys", [3, "aa11", [1], {"a": 1}, None])
def test_run_keys_of_another_type(store: Store, keys: object) -> None:
    """An experiment.json whose run_keys are no list of keys is refused in one line wherever it is read."""
    put(store)
    (store.root / "demo" / "experiment.json").write_text(json.dumps({"run_keys": keys}))
    for read in (store.experiment, store.current, store.swept):
        with pytest.raises(StoreError, match=r"experiment\.json: run_keys is not a list"):
            read("demo")
    assert [run.key for run in store.scan("demo")[0]] == ["aa11"]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path too long for the system, and a folder nobody may read, give one StoreError line that says why."""
    with pytest.raises(StoreError, match="cannot be read: File name too long; choose another folder with --results"):
        Store(tmp_path / ("x" * 5000))
    (tmp_path / "r").mkdir()
    store = Store(tmp_path / "r")

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(StoreError, match="r: cannot be read: Permission denied"):
        store.experiments()


def test_find(store: Store) -> None:
    """A run is named by its key, the start of it, or experiment/key; no run or several are told."""
    put(store, "aa11")
    put(store, "aa22")
    put(store, "aa11", experiment="other")
    assert store.find("aa2").key == "aa22"
    assert store.find("other/a").experiment == "other"
    for what, message in [
        ("aa", "fits 3 runs"),
        ("aa11", "fits 2"),
        ("ff", "no run"),
        ("none/a", "no experiment"),
        ("", "no run"),
    ]:
        with pytest.raises(StoreError, match=message):
            store.find(what)


@pytest.mark.parametrize("name", ["../x", "", ".x", "assets", "a/b", "x" * 101, "a\n"])
def test_experiment_names(store: Store, name: str) -> None:
    """A name that would leave the results folder or collide with its own files is refused."""
    with pytest.raises(StoreError, match="experiment name"):
        store.write_experiment(name, {})


def test_nan_is_refused(store: Store) -> None:
    """What is no strict JSON does not get into the store, and the run does not appear."""
    with pytest.raises(StoreError, match="not writable as JSON"):
        put(store, parameters={"x": float("nan")})
    assert store.runs("demo") == []


def test_unwritable(store: Store) -> None:
    """A place that cannot be written gives a StoreError."""
    store.root.mkdir()
    (store.root / "demo").write_text("a file in the way")
    with pytest.raises(StoreError, match=r"cannot be .*; choose another folder with --results"):
        put(store)
    with pytest.raises(StoreError, match="is not a folder"):
        Store(store.root / "demo")


def test_killed_before_the_rename(store: Store) -> None:
    """What a killed process was building is invisible, and tidied away; its lock does not last."""
    code = (
        "import sys, time; from zimage.lab.store import Store; s = Store(sys.argv[1])\n"
        "with s.lock('demo', 'aa11'):\n p = s.begin('demo', 'aa11'); (p / 'x').write_text('x')\n"
        " print('on', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        store.tidy("demo")
        assert [name.split(".")[-1] for name in names(store)] == ["partial", "lock"]  # it lives, so it stays
        with store.lock("demo", "aa11", wait_s=0) as mine:
            assert not mine
        os.kill(process.pid, signal.SIGKILL)
    assert store.runs("demo") == []
    assert store.experiments() == []
    store.tidy("demo")
    assert names(store) == []


def test_killed_between_the_renames(store: Store) -> None:
    """If a process dies after moving the old run away, tidying puts the old run back."""
    run = put(store)
    os.rename(run.path, run.path.with_name(".aa11.999.replaced"))
    shutil.copytree(run.path.with_name(".aa11.999.replaced"), run.path.with_name(".aa11.999.partial"))
    assert store.runs("demo") == []
    store.tidy("demo")
    assert names(store) == ["aa11"]
    assert store.done("demo", "aa11") is not None


def test_the_lock_is_exclusive(store: Store) -> None:
    """Eight threads that take the lock in turns never hold it together, though its file comes and goes."""
    inside, worst, turns = [0], [0], [0]

    def work() -> None:
        for _ in range(25):
            with store.lock("demo", "aa11") as mine:
                assert mine
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                time.sleep(0)
                inside[0] -= 1
                turns[0] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (worst[0], turns[0]) == (1, 200)
    assert names(store) == []


def test_reading_needs_no_mlx() -> None:
    """The store is read on machines that have no MLX."""
    code = "import sys; sys.modules['mlx'] = None; import zimage.lab.store; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
