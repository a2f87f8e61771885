"""What `--rerun` times: which steps of which runs, by whom, and what it makes of the answer. No process is started."""

import json
from pathlib import Path
from typing import Any

from tests.lab.fabricated import DEVICE, ablation, add_run, qkv
from tests.measure.clock import Clock
from zimage.errors import StoreError
from zimage.lab import comparing, keys, rerunning
from zimage.lab.store import Store
from zimage.measure import Program, compare

import pytest

SIZES = {"source": "digits", "height": 8, "width": 8, "batch": 1, "caption_tokens": 1, "seed": 0, "device": "cpu"}
FACTS = {"device": DEVICE, "mlx": "0.32.4", "commit": "c0"}


class Asked:
    """Stands for `in_fresh_processes`: keeps what it was asked, and answers with a ratio of B to A."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.arms: list[tuple[Any, Any]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, a: Any, b: Any, **options: Any) -> Any:
        self.arms.append((a, b))
        self.options.append(options)
        clock, floor = Clock(noise=0.001), options["noise_floor"]
        return compare(
            clock.arm("A"), clock.arm("B", self.ratio), seed=0, max_quads=20, noise_floor=floor, names=("A", "B")
        )


def rerun(root: Path, ratio: float, monkeypatch: pytest.MonkeyPatch, *pythons: str, b: str = "e") -> tuple[int, Asked]:
    asked = Asked(ratio)
    monkeypatch.setattr(rerunning, "in_fresh_processes", asked)
    known = {"gpu": {"device": "apple-m3-max"}, "": {}, "new": {"mlx": "0.33.0"}}
    monkeypatch.setattr(
        keys, "device_facts", lambda device, python="": FACTS | known.get(device, {}) | known.get(python, {})
    )
    sides = (comparing.side(one, Store(root)) for one in ("e", b))
    return rerunning.rerun(*sides, pythons, 8, 5, False), asked


def add(root: Path, key: str, experiment: str = "e", **parameters: Any) -> None:
    tables = {"ablation": qkv().assign(noise_floor=[0.5, 0.4, 0.02])}
    add_run(root, experiment, key, tables, parameters=SIZES | parameters, weights=None, notebook="notebooks/q.ipynb")


@pytest.mark.parametrize(
    ("ratio", "status", "word"),
    [(1.1, 1, "slower"), (0.9, 0, "faster"), (1.0, 0, "equivalent"), (1.015, 0, "inconclusive")],
)
def test_the_verdict_decides_the_status(
    ratio: float, status: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit 1 only where B's step is slower, beyond the floor that the runs recorded of a step in bursts."""
    add(tmp_path, "aa")
    found, asked = rerun(tmp_path, ratio, monkeypatch)
    assert found == status
    out = capsys.readouterr().out
    assert f"\nB: {word}, " in out and "A and B run on the same MLX and zimage" in out
    assert [options["noise_floor"] for options in asked.options] == [0.02]


def test_programs_of_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without interpreters each side is a program of this zimage; what a run left at null keeps its default."""
    add(tmp_path, "aa", dtype=None, transforms=[], quads=7)
    add(tmp_path, "bb", "f", dtype="float32", transforms=["fast"], quads=9)
    _, asked = rerun(tmp_path, 0.5, monkeypatch, b="f")
    ((a, b),) = asked.arms
    assert (a, b) == (
        Program("zimage.arms:step", SIZES),
        Program("zimage.arms:step", SIZES | {"dtype": "float32", "transforms": ["fast"]}),
    )


def test_interpreters_of_the_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two interpreters each serves the step of its own zimage, and how the two differ is shown."""
    add(tmp_path, "aa")
    _, asked = rerun(tmp_path, 1.1, monkeypatch, "old", "new")
    ((a, b),) = asked.arms
    assert (a[0], b[0]) == ("old", "new") and a[1:] == b[1:]
    assert json.loads(a[2]) == {"peer": "zimage", "arguments": SIZES}
    out = capsys.readouterr().out
    assert "mlx  0.32.4 -> 0.33.0" in out and "B  the same step (e/aa)" in out


def test_each_step_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the same step, by other notebooks or with other effort, are one; runs without one size have none."""
    add(tmp_path, "aa")
    add(tmp_path, "bb", batch=2)
    tables = {"ablation": ablation(("x", "y", "step", 1.0, 0.99, 1.01, "equivalent"))}
    add_run(tmp_path, "e", "cc", tables, parameters=SIZES, weights=None, notebook="notebooks/other.ipynb")
    add_run(tmp_path, "e", "dd", tables, parameters={"source": "digits"}, weights=None, notebook="notebooks/s.ipynb")
    _, asked = rerun(tmp_path, 1.0, monkeypatch)
    assert sorted(a.arguments["batch"] for a, _ in asked.arms) == [1, 2]


def test_many_steps_share_one_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The level is divided by the number of steps, and the pairs are enough to show something at it."""
    for place in range(20):
        add(tmp_path, f"a{place}", batch=place + 1)
    _, asked = rerun(tmp_path, 1.0, monkeypatch)
    assert [(options["alpha"], options["pairs"]) for options in asked.options] == [(0.05 / 20, 10)] * 20


def test_floors_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor of another device is none here; one from before there were regimes is one of bursts."""
    tables = {"ablation": qkv().assign(noise_floor=0.03, regime=None)}
    inputs = {"parameters": SIZES, "weights": None, "notebook": "notebooks/q.ipynb"}
    add_run(tmp_path, "e", "aa", tables, **inputs)
    other = {"ablation": qkv().assign(noise_floor=0.5)}
    add_run(tmp_path, "f", "bb", other, device="apple-m3-max", **inputs)
    _, asked = rerun(tmp_path, 1.0, monkeypatch, b="f")
    assert [options["noise_floor"] for options in asked.options] == [0.03]


def test_runs_of_two_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are timed on the device they ran on, or one line says that there are two; two names of one are one."""
    add(tmp_path, "aa")
    add(tmp_path, "bb", batch=2, device="auto")
    _, asked = rerun(tmp_path, 1.0, monkeypatch)
    assert len(asked.arms) == 2
    add(tmp_path, "cc", batch=3, device="gpu")
    with pytest.raises(StoreError, match="ran with device cpu and auto and gpu: name runs of one device"):
        rerun(tmp_path, 1.0, monkeypatch)


def test_a_recipe_counts_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose quantization was a recipe's file is timed with what was in the file then."""
    recipe = {"default": "4bit"}
    parameters = SIZES | {"quantization": "gone.yaml"}
    add_run(tmp_path, "e", "aa", {"ablation": qkv()}, parameters=parameters, weights=None, recipe=recipe)
    _, asked = rerun(tmp_path, 1.0, monkeypatch)
    assert asked.arms[0][0].arguments["quantization"] == recipe
