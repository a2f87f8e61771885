"""The store: every run under results/, read without MLX and written whole or not at all.

    results/<experiment>/experiment.json           what the last sweep asked for
    results/<experiment>/<run key>/run.json        one run: status, parameters, environment, digests
                                  /notebook.ipynb  as executed
                                  /tables/<name>.parquet
                                  /pictures/<name>.png, <name>.json {"caption": ...}
                                  /recipes/<name>.yaml

A run is built in a hidden sibling folder and renamed into place. Whoever builds it holds an flock on a hidden lock
file, which the kernel lets go when the process ends, however it ends: so a folder whose lock is free is a leftover.
"""

import fcntl
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage.analysis.tables import SCHEMAS, unusable
from zimage.errors import StoreError
from zimage.lab.files import NAME, read_json, refused, sync, sync_tree, write_json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
RESERVED = ("assets", "reference")  # folders under results/ that are no experiment
_POLL_S = 0.2  # while another process has a lock that we wait for
_META_TYPES: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "experiment": str,
    "run_key": str,
    "notebook": str,
    "parameters": dict,
    "device": str,
    "environment": dict,
    "started": str,
    "duration_s": (int, float),
}


def check_name(name: str) -> str:
    """`name` if it can be an experiment's folder, else StoreError."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise StoreError(f"experiment name {name!r}: use letters, digits, '_', '-' and '.', and none of {RESERVED}")
    return name


@dataclass(frozen=True)
class Picture:
    """A PNG that a run kept."""

    name: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Run:
    """One executed notebook in the store. `meta` is its run.json."""

    path: Path
    meta: dict[str, Any]

    @property
    def key(self) -> str:
        """The run key, which is also its folder's name."""
        return str(self.meta["run_key"])

    @property
    def experiment(self) -> str:
        """The name of its experiment's folder, which may have been copied or renamed since run.json was written."""
        return self.path.parent.name

    @property
    def status(self) -> str:
        """ "completed" or "failed"."""
        return str(self.meta["status"])

    @property
    def completed(self) -> bool:
        """Whether the notebook ran to its end."""
        return self.status == "completed"

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters of the notebook, defaults included."""
        return dict(self.meta["parameters"])

    @property
    def notebook(self) -> str:
        """The notebook's path relative to the project it was run in."""
        return str(self.meta["notebook"])

    @property
    def device(self) -> str:
        """The short name of the device it ran on."""
        return str(self.meta["device"])

    @property
    def facts(self) -> dict[str, str]:
        """What it recorded of its machine."""
        return {name: str(value) for name, value in self.mapping("environment").items()}

    def mapping(self, name: str) -> dict[str, Any]:
        """A part of run.json that is a mapping where it was recorded at all."""
        part = self.meta.get(name)
        return part if isinstance(part, dict) else {}

    def tables(self) -> list[str]:
        """Names of the tables this run recorded, in the order of the schemas."""
        return [name for name in SCHEMAS if (self.path / "tables" / f"{name}.parquet").is_file()]

    def table(self, name: str) -> pd.DataFrame:
        """The recorded table `name`. Raises StoreError if it is absent or unreadable."""
        path = self.path / "tables" / f"{name}.parquet"
        if name not in SCHEMAS or not path.is_file():
            raise StoreError(f"run {self.key} of {self.experiment!r} has no table {name!r}; it has {self.tables()}")
        frame = _frame(read_table(path, name))
        if frame["weights_kind"].isna().all():  # from a version that told it in run.json alone
            frame["weights_kind"] = self.mapping("weights").get("kind")
        return frame

    def damaged(self) -> list[str]:
        """A line for each recorded table that cannot be read or used, going by its footer."""
        lines = []
        for name in self.tables():
            path = self.path / "tables" / f"{name}.parquet"
            try:
                _require_usable(path, name, pq.read_schema(path))
            except StoreError as error:
                lines.append(str(error))
            except (pa.ArrowException, OSError, ValueError):
                try:
                    read_table(path, name)
                except StoreError as error:
                    lines.append(str(error))
        return lines

    def recipes(self) -> list[Path]:
        """The files of the quantization recipes that it wrote, by name."""
        return sorted((self.path / "recipes").glob("*.yaml"))

    def pictures(self) -> list[Picture]:
        """The recorded pictures by name."""
        return [Picture(p.stem, p, _caption(p)) for p in sorted((self.path / "pictures").glob("*.png"))]


def read_table(path: Path, name: str) -> pa.Table:
    """The table in `path` with the columns of schema `name`; those an older version lacked are null.

    Raises StoreError, one line, if it is not readable as that, or lacks a column that says what its rows are about.
    """
    schema = SCHEMAS[name]
    try:
        found = pq.read_table(path, partitioning=None)
        _require_usable(path, name, found.schema)
        columns = [
            found[f.name].cast(f.type) if f.name in found.column_names else pa.nulls(len(found), f.type) for f in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{path}: not readable as a {name!r} table: {reason[:200]}") from None


def _require_usable(path: Path, name: str, found: pa.Schema) -> None:
    """Raise StoreError where the table in `path`, which has the columns `found`, cannot be used as `name`."""
    if reason := unusable(name, found):
        run = path.parent.parent
        raise StoreError(f"table {name} of run {run.parent.name}/{run.name} cannot be used: {reason}; run it again")


def _frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _caption(picture: Path) -> str:
    side = picture.with_suffix(".json")
    try:
        return str(read_json(side).get("caption", "")) if side.is_file() else ""
    except StoreError:  # a picture without its caption is still worth showing
        return ""


class Store:
    """The runs under one results folder, which need not exist yet."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        with _readable(self.root):
            taken = self.root.exists() and not self.root.is_dir()
        if taken:
            raise StoreError(f"{self.root}: is not a folder; give a results folder with --results")

    # -- reading ------------------------------------------------------------------------------------------------------

    def experiments(self) -> list[str]:
        """Names of the experiments that the store holds, sorted."""
        with _readable(self.root):
            if not self.root.is_dir():
                return []
            return sorted(
                folder.name
                for folder in self.root.iterdir()
                if folder.name not in RESERVED and NAME.fullmatch(folder.name) and folder.is_dir()
                if (folder / "experiment.json").is_file() or any(folder.glob("[!.]*/run.json"))
            )

    def experiment(self, name: str) -> dict[str, Any]:
        """What experiment.json says: name, question, notebooks, parameters, run_keys; {} if there is none."""
        path = self.root / check_name(name) / "experiment.json"
        with _readable(path):
            if not path.is_file():
                return {}
        content = read_json(path)
        keys = content.get("run_keys", [])
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise StoreError(f"{path}: run_keys is not a list of run keys; mend or remove the file")
        return content

    def scan(self, experiment: str) -> tuple[list[Run], list[str]]:
        """All runs in the order they were asked for, older ones last, and a line for what of them cannot be read."""
        runs, problems = [], []
        folder = self.root / check_name(experiment)
        for path in sorted(folder.glob("[!.]*/run.json")):
            try:
                runs.append(Run(path.parent, _checked(path, read_json(path))))
                problems += runs[-1].damaged()
            except StoreError as error:
                problems.append(str(error))
        try:
            order = {key: place for place, key in enumerate(self._asked(experiment))}
        except StoreError as error:
            order = {}
            problems.append(str(error))
        runs.sort(key=lambda run: (order.get(run.key, len(order)), run.meta["started"], run.key))
        return runs, problems

    def runs(self, experiment: str) -> list[Run]:
        """All readable runs of an experiment, those of the last sweep first and in its order."""
        return self.scan(experiment)[0]

    def current(self, experiment: str) -> list[Run]:
        """The runs that the last sweep asked for, failed ones included; all of them if no sweep is on record."""
        asked = set(self._asked(experiment))
        return [run for run in self.runs(experiment) if not asked or run.key in asked]

    def current_or(self, experiment: str, runs: list[Run]) -> list[Run]:
        """`current`, or `runs` where experiment.json is unreadable, which `scan` has said then."""
        try:
            return self.current(experiment)
        except StoreError:
            return runs

    def table(self, experiment: str, name: str) -> pd.DataFrame:
        """Table `name` of the completed current runs, stacked; empty if none recorded it."""
        schema = SCHEMAS.get(name)
        if schema is None:
            raise StoreError(f"table {name!r} is not known; the tables are {', '.join(SCHEMAS)}")
        parts = [
            read_table(run.path / "tables" / f"{name}.parquet", name)
            for run in self.current(experiment)
            if run.completed and name in run.tables()
        ]
        return _frame(pa.concat_tables(parts) if parts else schema.empty_table())

    def swept(self, experiment: str) -> list[str]:
        """Names of the parameters that differ between current runs of the same notebook."""
        values: dict[tuple[str, str], list[Any]] = {}
        for run in self.current(experiment):
            for name, value in run.parameters.items():
                seen = values.setdefault((run.notebook, name), [])
                if value not in seen:
                    seen.append(value)
        return list(dict.fromkeys(name for (_, name), seen in values.items() if len(seen) > 1))

    def done(self, experiment: str, key: str) -> Run | None:
        """The completed run with that key, or None (absent, failed, or unreadable in one of its tables)."""
        path = self.root / check_name(experiment) / key / "run.json"
        try:
            run = Run(path.parent, _checked(path, read_json(path)))
        except StoreError:
            return None
        return run if run.completed and not run.damaged() else None

    def find(self, what: str) -> Run:
        """The run that `what` names: a key, the start of one, or experiment/key. StoreError if none or several."""
        experiment, _, prefix = what.rpartition("/")
        names = self.experiments()
        if experiment and experiment not in names:
            raise StoreError(f"{self.root}: no experiment {experiment!r}; there are: {', '.join(names) or 'none'}")
        runs = [run for name in ([experiment] if experiment else names) for run in self.runs(name)]
        found = [run for run in runs if prefix and run.key.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise StoreError(f"{self.root}: no run {what!r}; `zimage list` shows what there is")
        several = ", ".join(f"{run.experiment}/{run.key}" for run in found[:4])
        raise StoreError(f"{what!r} fits {len(found)} runs ({several}{', ...' if len(found) > 4 else ''}): give more")

    def _asked(self, experiment: str) -> list[str]:
        return list(self.experiment(experiment).get("run_keys", []))

    # -- writing ------------------------------------------------------------------------------------------------------

    def writable(self, experiment: str) -> bool:
        """Whether the folders of the store and of the experiment, which are there, can be written to."""
        return all(os.access(folder, os.W_OK | os.X_OK) for folder in (self.root, self.root / check_name(experiment)))

    def write_experiment(self, name: str, content: dict[str, Any]) -> None:
        """Put experiment.json in place: what a sweep asked for."""
        write_json(self.root / check_name(name) / "experiment.json", content)

    @contextmanager
    def lock(self, experiment: str, key: str, *, wait_s: float = math.inf) -> Iterator[bool]:
        """Hold the right to build this run. Gives False if another process still has it after `wait_s`."""
        folder = self.root / check_name(experiment)
        path = folder / f".{key}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _locked(path, wait_s)
        except OSError as error:
            raise refused(path, "cannot be locked", error) from None
        if handle is None:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)  # before it is released: whoever waits notices that its file is gone
            os.close(handle)

    def begin(self, experiment: str, key: str) -> Path:
        """An empty hidden folder to build the run in. The caller holds its lock."""
        folder = self.root / check_name(experiment) / f".{key}.{os.getpid()}.partial"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise refused(folder, "cannot be written", error) from None
        return folder

    def commit(self, partial: Path, meta: dict[str, Any]) -> Run:
        """Write run.json and put the folder in place, in the stead of an earlier one. The caller holds its lock.

        An earlier folder whose run.json cannot be read stays beside it as KEY.damaged: its notebook and tables may be
        all that is left of a measurement.
        """
        _checked(partial / "run.json", meta)
        target = partial.parent / meta["run_key"]
        replaced = partial.with_suffix(".replaced")
        write_json(partial / "run.json", meta)
        try:
            sync_tree(partial)
            if target.exists():  # a folder cannot be renamed onto a full one
                os.rename(target, replaced if _is_whole(target) else _free_name(target))
            os.rename(partial, target)
            sync(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise refused(target, "cannot be written", error) from None
        return Run(target, meta)

    def remove(self, run: Run, still: Callable[[], bool] = lambda: True) -> bool:
        """Remove a run. False where another process is at it or it is no longer this one, or not `still` to go.

        A folder that is a link, or holds another run by now, stays. still: asked once nobody else can change the run.
        Raises StoreError where it cannot be removed; what is left then has its name again, and is a whole run or none.
        """
        with self.lock(run.experiment, run.key, wait_s=0) as mine:
            try:
                if not mine or run.path.is_symlink() or read_json(run.path / "run.json") != run.meta:
                    return False
            except StoreError:  # gone, or damaged since
                return False
            if not still():
                return False
            leftover = run.path.parent / f".{run.key}.{os.getpid()}.partial"
            try:
                os.rename(run.path, leftover)
                (leftover / "run.json").unlink()  # first: without it the rest is no run
                shutil.rmtree(leftover)
            except OSError as error:
                with suppress(OSError):
                    os.rename(leftover, run.path)
                raise refused(run.path, "cannot be removed", error) from None
        return True

    def tidy(self, experiment: str) -> None:
        """Remove what killed processes left behind; folders that a living process builds are not touched."""
        folder = self.root / check_name(experiment)
        for key in {name.name[1:].split(".")[0] for name in folder.glob(".*.*") if _LEFTOVER.fullmatch(name.name)}:
            with self.lock(experiment, key, wait_s=0) as mine:
                if not mine:
                    continue
                for replaced in folder.glob(f".{key}.*.replaced"):
                    if not (folder / key).exists():  # killed between the two renames
                        os.rename(replaced, folder / key)
                    shutil.rmtree(replaced, ignore_errors=True)
                for partial in folder.glob(f".{key}.*.partial"):
                    shutil.rmtree(partial, ignore_errors=True)


_LEFTOVER = re.compile(r"\.[A-Za-z0-9_-]+\.(\d+\.(partial|replaced)|lock)")


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line that names the folder."""
    try:
        yield
    except OSError as error:
        raise refused(Path(error.filename or root), "cannot be read", error) from None


def _locked(path: Path, wait_s: float) -> int | None:
    """A descriptor that holds the lock on `path`, or None if it is still taken after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait_s == math.inf else fcntl.LOCK_NB))
            # The one before us removes the file when done: then our lock is on a file nobody else will see.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)
            continue
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_whole(folder: Path) -> bool:
    """Whether a run's folder says what it is, so that a newer run may take its place."""
    try:
        return bool(_checked(folder / "run.json", read_json(folder / "run.json")))
    except StoreError:
        return False


def _free_name(folder: Path) -> Path:
    """Where a run's folder that does not say what it is can stand, beside the run that takes its name."""
    names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _checked(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` if it is what run.json must hold, else StoreError."""
    if meta.get("schema") != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema {meta.get('schema')!r} is not known to this version (it knows {SCHEMA_VERSION})"
        )
    for name, kind in _META_TYPES.items():
        if not isinstance(meta.get(name), kind):
            raise StoreError(f"{path}: {name!r} is missing or of the wrong type")
    weights = meta.get("weights")
    if weights is not None and not (
        isinstance(weights, dict) and all(isinstance(weights.get(name), str) for name in ("source", "kind", "digest"))
    ):
        raise StoreError(f"{path}: 'weights' is neither null nor an object with source, kind and digest")
    if meta["status"] not in ("completed", "failed"):
        raise StoreError(f"{path}: status {meta['status']!r} is neither completed nor failed")
    if path.parent.name[0] != "." and meta["run_key"] != path.parent.name:
        raise StoreError(f"{path}: says run_key {meta['run_key']!r}, but its folder has another name: rename it back")
    return meta
