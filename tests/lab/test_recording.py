"""What a notebook keeps with its run."""

from pathlib import Path

from zimage.errors import ExperimentError, StoreError
from zimage.lab import record, record_picture
from zimage.lab.files import read_json
from zimage.lab.store import read_table

import numpy as np
import pandas as pd
import pytest
from PIL import Image

FRAME = pd.DataFrame({"arm": ["baseline"], "metric": ["m"], "value": [1.0]})


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in [("RUN_DIR", str(tmp_path)), ("RUN_KEY", "aa11"), ("EXPERIMENT", "demo"), ("DEVICE", "cpu-x")]:
        monkeypatch.setenv(f"ZIMAGE_{name}", value)
    return tmp_path


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIMAGE_RUN_DIR", raising=False)


def test_shared_columns_and_appending(run_folder: Path) -> None:
    """A table gets the run's key, experiment and device; recording it again appends; the frame is left as it was."""
    frame = FRAME.copy()
    record("quality", frame)
    record("quality", frame.assign(value=2.0))
    rows = read_table(run_folder / "tables" / "quality.parquet", "quality").to_pylist()
    assert [(r["run_key"], r["experiment"], r["device"], r["arm"], r["value"], r["low"]) for r in rows] == [
        ("aa11", "demo", "cpu-x", "baseline", 1.0, None), ("aa11", "demo", "cpu-x", "baseline", 2.0, None),
    ]  # fmt: skip
    assert list(frame.columns) == list(FRAME.columns)


def test_every_table_says_what_kind_of_weights_it_is_about(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the run, unless the frame says it itself; nothing for a run without weights."""
    times = pd.DataFrame({"arm": ["a"], "scope": ["step"]})
    monkeypatch.setenv("ZIMAGE_WEIGHTS_KIND", "synthetic")
    record("ablation", times)
    record("quality", FRAME.assign(weights_kind="trained"))
    monkeypatch.setenv("ZIMAGE_WEIGHTS_KIND", "")
    record("samples", times)
    tables = run_folder / "tables"
    found = {name: read_table(tables / f"{name}.parquet", name) for name in ("ablation", "quality", "samples")}
    assert {name: rows["weights_kind"].to_pylist() for name, rows in found.items()} == {
        "ablation": ["synthetic"], "quality": ["trained"], "samples": [None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "frame", "message"),
    [("nope", FRAME, "table 'nope' is not known"), ("quality", FRAME.assign(x=1), "unknown column x"),
     ("quality", FRAME.assign(value="a"), "quality"), ("quality", [1], "give a pandas DataFrame"),
     ("quality", FRAME.drop(columns="metric"), "column 'metric' has missing values"),
     ("stages", pd.DataFrame({"arm": ["a"], "view": ["prefix"], "stage": [None]}), "column 'stage' has missing"),
     ("ablation", pd.DataFrame({"arm": ["a", "b"], "scope": ["step", None]}), "column 'scope' has missing"),
     ("quality", pd.concat([FRAME, FRAME], axis=1), "column 'arm' occurs twice"), ("../x", FRAME, "not known")],
)  # fmt: skip
def test_bad_tables(run_folder: Path, name: str, frame: pd.DataFrame, message: str) -> None:
    """What does not fit the schema is refused in one line, and nothing is written."""
    with pytest.raises(ExperimentError, match=message):
        record(name, frame)
    assert list(run_folder.iterdir()) == []


@pytest.mark.usefixtures("by_hand")
def test_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run a table and a picture are shown, and a table that does not fit is refused all the same."""
    record("quality", FRAME)
    record_picture("p", np.zeros((2, 2), np.uint8), "a caption")
    said = capsys.readouterr().out
    assert "baseline" in said
    assert "a caption" in said
    with pytest.raises(ExperimentError, match="unknown column"):
        record("quality", FRAME.assign(x=1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 4)])
def test_pictures(run_folder: Path, shape: tuple[int, ...]) -> None:
    """A uint8 array comes back from its PNG exactly, with its caption; a second of that name takes its place."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    record_picture("p", np.zeros((1, 1), np.uint8), "old")
    record_picture("p", pixels, "seven, drawn")
    with Image.open(run_folder / "pictures" / "p.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert read_json(run_folder / "pictures" / "p.json") == {"caption": "seven, drawn"}


@pytest.mark.parametrize("image", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2), np.uint8), "x"])
def test_bad_pictures(run_folder: Path, image: object) -> None:
    """What is no picture is refused, and so is a name that is no file name."""
    with pytest.raises(ExperimentError, match="picture 'p'"):
        record_picture("p", image)  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match="picture name"):
        record_picture("../p", Image.new("L", (1, 1)))
    assert list(run_folder.iterdir()) == []


def test_a_run_folder_that_is_gone(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that cannot be written gives a StoreError."""
    (run_folder / "file").write_text("")
    monkeypatch.setenv("ZIMAGE_RUN_DIR", str(run_folder / "file"))
    with pytest.raises(StoreError, match="cannot be written"):
        record("quality", FRAME)
