"""Training the digits model, cut down to a few steps of a small model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from zimage import weights
from zimage.digits import train as training
from zimage.errors import InputError

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

SMALL = replace(
    training.CONFIG, dim=64, n_heads=1, n_kv_heads=1, n_layers=1, n_refiner_layers=0, axes_dims=(16, 24, 24)
)


def train(**options: Any) -> tuple[training.Trainee, list[dict[str, Any]]]:
    """The average after a few steps, and the figures that were reported."""
    figures: list[dict[str, Any]] = []
    settings = {"steps": 24, "batch": 16, "report_every": 6, "judged": 0, "config": SMALL, "learning_rate": 0.008}
    average = training.train(**(settings | options), report=lambda one, _: figures.append(one))  # type: ignore[arg-type]
    return average, figures


def test_training_reduces_the_loss() -> None:
    """Some steps of training on real digits bring the loss well down from where it starts."""
    _, figures = train()
    assert [one["step"] for one in figures] == [6, 12, 18, 24]
    assert figures[-1]["loss"] < 0.8 * figures[0]["loss"]


def test_training_is_reproducible() -> None:
    """The same seed gives the same losses and weights, another seed others."""
    (first, one), (second, two), (_, other) = (train(steps=2, batch=4, report_every=1, seed=seed) for seed in (1, 1, 2))
    assert [figures["loss"] for figures in one] == [figures["loss"] for figures in two]
    assert [figures["loss"] for figures in one] != [figures["loss"] for figures in other]
    a, b = (dict(tree_flatten(trainee.parameters())) for trainee in (first, second))
    assert all(np.allclose(np.array(a[name]), np.array(b[name]), atol=1e-6) for name in a)


def test_a_new_trainee_predicts_nothing() -> None:
    """Blocks start as the identity and the output at zero, so the first loss is the variance of data minus noise."""
    trainee = training.Trainee(SMALL, 0)
    velocity = trainee.velocity(mx.random.normal((2, 1, 8, 8)), mx.array([0.2, 0.7]), mx.array([1, 2]))
    assert mx.all(velocity == 0).item()


def test_the_loss_is_that_of_flow_matching() -> None:
    """The loss of a model that predicts nothing is the mean square of data minus noise."""
    keys = mx.random.split(mx.random.key(0), 2)
    data, noise = (mx.random.normal((2, 1, 8, 8), key=key) for key in keys)
    found = training.loss(training.Trainee(SMALL, 0), data, mx.array([1, 2]), noise, mx.array([0.2, 0.7]))
    assert abs(found.item() - mx.mean((data - noise) ** 2).item()) < 1e-5


def test_reports_judge_when_asked() -> None:
    """A report has the quality of the digits drawn by the average, when some are to be drawn."""
    _, figures = train(steps=1, batch=2, judged=20)
    assert set(figures[-1]) == {"step", "seconds", "loss", "accuracy", "variance_low", "variance_high", "nearest"}


def test_what_was_trained_is_saved_as_a_checkpoint(tmp_path: Path) -> None:
    """A trained model is saved in bf16 with its label embeddings beside it, and loads like any other checkpoint."""
    trainee = training.Trainee(SMALL, 3)
    training.save(trainee, tmp_path / "a")
    info = weights.describe(tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    assert (info.config, info.dtypes, info.kind) == (SMALL, ["BF16"], "trained")
    table = mx.load(str(tmp_path / "a" / "captions.safetensors"))["captions"]
    assert mx.array_equal(table, trainee.captions)
    loaded = dict(tree_flatten(weights.load_transformer(tmp_path / "a", dtype="bfloat16").parameters()))
    for name, array in tree_flatten(trainee.transformer.parameters()):
        assert mx.array_equal(loaded[name], array.astype(mx.bfloat16)), name


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch": 0}, {"report_every": 0}])
def test_training_on_nothing_is_refused(options: dict[str, int]) -> None:
    """No steps, no batch or no reports give an InputError."""
    with pytest.raises(InputError, match="at least 1"):
        train(**options)


def test_the_command_refuses_a_taken_folder_before_it_trains(tmp_path: Path) -> None:
    """`python -m zimage.digits.train` says in one line that its folder is taken."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    command = [sys.executable, "-m", "zimage.digits.train", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert done.stderr == f"train: {tmp_path} exists and is not an empty folder; choose another or remove it\n"
