"""An ablation in one call: what it compares, what it records, and which transforms it refuses."""

from collections.abc import Callable
from typing import Any

import zimage
from zimage import ablation, inputs
from zimage.analysis.tables import conform
from zimage.errors import InputError, MeasurementError
from zimage.inputs import Inputs
from zimage.layers import as_class, clone
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten


@pytest.fixture(scope="module")
def model() -> Transformer:
    return zimage.load_transformer("synthetic:tiny", "float32")


@pytest.fixture(scope="module")
def example(model: Transformer) -> Inputs:
    return inputs.example(model, "synthetic:tiny", height=32, width=32, batch=1, caption_tokens=3, seed=0)


def without_a_block(model: Transformer) -> Transformer:
    new = clone(model)
    del new.layers[0]
    return new


def in_place(model: Transformer) -> Transformer:
    model.layers[0].attention_norm1.eps = 1.0
    return model


def narrower(model: Transformer) -> Transformer:
    class Narrower(Transformer):
        def __call__(self, *given: Any) -> mx.array:
            return model(*given)[..., :1]

    return as_class(Narrower, model)


def nothing(_model: Transformer) -> None:
    pass


def test_an_ablation_compares_time_and_output(model: Transformer, example: Inputs) -> None:
    """Every arm is compared with the model, its error is that of its velocity, and the tables can be recorded."""
    found = zimage.ablate(
        model, {"same": clone, "shorter": without_a_block}, example, seed=3, quads=4, baseline="plain"
    )
    assert list(found.comparisons) == ["same", "shorter"]
    assert {(one.baseline, one.quads <= 4) for one in found.comparisons.values()} == {("plain", True)}
    wanted, given = (np.array(one(*example)) for one in (model, without_a_block(model)))
    assert found.errors["same"] == 0
    assert found.errors["shorter"] == pytest.approx(np.linalg.norm(given - wanted) / np.linalg.norm(wanted), rel=1e-4)
    lines = str(found).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["same", "shorter"] and lines[0].startswith("noise floor")
    assert lines[2].endswith(f"; relative L2 error {found.errors['shorter']:.3g}")
    tables = found.tables("synthetic")
    assert {name: len(conform(name, table)) for name, table in tables.items() if name != "samples"} == {
        "ablation": 2,
        "quality": 2,
    }
    assert set(tables["ablation"]["scope"]) == {"step"} and set(tables["quality"]["weights_kind"]) == {"synthetic"}
    assert set(conform("samples", tables["samples"]).column("arm").to_pylist()) == {
        *("plain", "same", "shorter", "copy", "canary")
    }


def test_times_alone_need_no_model() -> None:
    """Work that is no step is compared in its own scope; nothing is said of its output."""
    calls: list[str] = []

    def work(name: str) -> Callable[[], Any]:
        return lambda: calls.append(name) or mx.ones(4) * 2  # type: ignore[func-returns-value]

    found = ablation.compare(work("a"), {"b": work("b")}, lambda: work("copy"), quads=2, scope="run", baseline="a")
    assert found.errors == {} and set(found.tables("trained")) == {"ablation", "samples"}
    assert set(found.tables("trained")["samples"]["scope"]) == {"run"}
    last_copy = max(i for i, name in enumerate(calls) if name == "copy")
    assert calls.index("b") > last_copy and calls[last_copy + 1 : last_copy + 3] != ["copy"]


def test_a_copy_shares_no_array(model: Transformer, example: Inputs) -> None:
    """The copy behind a noise floor has the same values at other places in memory."""

    def places(one: Transformer) -> set[int]:
        flat: Any = tree_flatten(one.parameters())
        return {np.asarray(array).__array_interface__["data"][0] for _, array in flat}

    again = ablation.copied(model)
    assert not places(again) & places(model)
    assert mx.array_equal(again(*example), model(*example))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (nothing, "transform 'mine' must return the changed model, it returned a NoneType"),
        (
            in_place,
            "changed the model that it was given, which is the baseline; change and return",
        ),
        (narrower, "in the place of [1, 4, 4, 4]; only equal shapes"),
    ],
    ids=["nothing", "in place", "another shape"],
)
def test_a_bad_transform_is_one_clear_line(transform: Any, words: str, example: Inputs) -> None:
    """A transform that returns nothing, changes its argument or gives another shape is refused before any timing."""
    model = zimage.load_transformer("synthetic:tiny", "float32")
    with pytest.raises(InputError) as raised:
        zimage.ablate(model, {"mine": transform}, example)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_no_arm_is_refused(model: Transformer, example: Inputs) -> None:
    """An ablation without arms is refused in one line."""
    with pytest.raises(MeasurementError, match="at least one arm"):
        zimage.ablate(model, {}, example)
