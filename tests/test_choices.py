"""Choices of how linear layers are computed: what is kept and for how long, and what a run's key hears of it."""

import json
from pathlib import Path
from typing import Any

from tests.test_trust import FACTS
from zimage import blas, choices, doctor
from zimage.choices import Choice, Product

import pytest

WIDE = Product("bfloat16", "bfloat16", 1056, 3840, 11520)
PACKED = Product("affine 4 bits, group 64", "bfloat16", 32, 3840, 3840)
SPLIT = Choice("rows split", "whole", 0.9, 0.88, 0.92, 10, ("whole", "rows split", "padded"))
STAYS = Choice("unpacked", "unpacked", 1.0, 1.0, 1.0, 0, ("unpacked", "packed"))
BOTH = {str(WIDE): SPLIT, str(PACKED): STAYS}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "cache_folder", lambda: tmp_path)


def file_in(folder: Path) -> Path:
    return folder / "choices-nvidia-fake.json"


def test_what_is_kept_comes_back() -> None:
    """Choices come back as they were kept, those of later calls beside those of earlier ones."""
    assert choices.kept(FACTS) == {}
    choices.keep(FACTS, {str(WIDE): SPLIT})
    choices.keep(FACTS, {str(PACKED): STAYS})
    assert choices.kept(FACTS) == BOTH


@pytest.mark.parametrize("name", ["device", "driver", "mlx", "mlx_build", "blas", "os"])
def test_another_device_or_version_knows_nothing(name: str, tmp_path: Path) -> None:
    """Where device, driver, MLX, BLAS or system differ, nothing is known, even if the file is where it should be."""
    choices.keep(FACTS, BOTH)
    other = FACTS | {name: "other"}
    file_in(tmp_path).rename(tmp_path / f"choices-{other['device']}.json")
    assert choices.kept(other) == {}
    assert choices.in_force(other) == "as first measured"


def test_other_sources_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are forgotten with the code that they were made between."""
    choices.keep(FACTS, BOTH)
    monkeypatch.setattr(choices, "_sources_digest", lambda: "other")
    assert choices.kept(FACTS) == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "[" * 100_000, "\x00", '{"identity": 3}', '{"choices": []}']
)
def test_a_broken_file_is_none(content: str, tmp_path: Path) -> None:
    """A file that holds anything else counts as none, and is replaced by the next choice."""
    file_in(tmp_path).write_text(content)
    assert choices.kept(FACTS) == {} and choices.in_force(FACTS) == "as first measured"
    choices.keep(FACTS, BOTH)
    assert choices.kept(FACTS) == BOTH


def test_bytes_that_are_no_text_are_none(tmp_path: Path) -> None:
    """The same for bytes that are not UTF-8, and for a folder of that name."""
    file_in(tmp_path).write_bytes(b"\xff\xfe")
    assert choices.kept(FACTS) == {}
    file_in(tmp_path).unlink()
    file_in(tmp_path).mkdir()
    assert choices.kept(FACTS) == {}
    choices.keep(FACTS, BOTH)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"way": "os.system"},
        {"way": ["whole"]},
        {"way": "packed"},
        {"baseline": "elsewhere"},
        {"ratio": "0.9"},
        {"ratio": float("nan")},
        {"low": True},
        {"quads": 1.5},
        {"tried": "whole"},
        {"tried": [1]},
        {"more": 1},
    ],
    ids=str,
)
def test_only_known_ways_are_chosen(entry: Any, tmp_path: Path) -> None:
    """An entry that someone has changed into another way, number or shape is left out; the others hold."""
    choices.keep(FACTS, BOTH)
    content = json.loads(file_in(tmp_path).read_text())
    content["choices"][str(WIDE)] = {**content["choices"][str(WIDE)], **entry} if entry else entry
    file_in(tmp_path).write_text(json.dumps(content))
    assert choices.kept(FACTS) == {str(PACKED): STAYS}


def test_without_a_cache_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no error."""
    monkeypatch.setattr(blas, "cache_folder", lambda: None)
    choices.keep(FACTS, BOTH)
    assert choices.kept(FACTS) == {} and choices.copied(FACTS) == {}


def test_first_choices_change_no_key() -> None:
    """Tuning, and tuning more products, leaves what the run key hears as it was; so does the same answer again."""
    before = choices.in_force(FACTS)
    choices.keep(FACTS, {str(WIDE): SPLIT})
    choices.keep(FACTS, {str(PACKED): STAYS, str(WIDE): SPLIT})
    assert choices.in_force(FACTS) == before == "as first measured"


def test_another_choice_in_the_place_of_one_changes_the_key() -> None:
    """Runs before a choice that came out as another way aren't those after it; and the answer is remembered."""
    choices.keep(FACTS, BOTH)
    first = choices.in_force(FACTS)
    choices.keep(FACTS, {str(WIDE): Choice("padded", "whole", 0.8, 0.7, 0.9, 10, ("whole", "padded"))})
    second = choices.in_force(FACTS)
    assert first != second and second.startswith("measured again ")
    choices.keep(FACTS, {str(Product("float32", "float32", 1, 1, 1)): SPLIT})
    assert choices.in_force(FACTS) == second


def test_a_run_holds_what_was_chosen() -> None:
    """The copy for a run is plain JSON with every choice by its product."""
    choices.keep(FACTS, BOTH)
    copied = json.loads(json.dumps(choices.copied(FACTS)))
    assert copied[str(WIDE)]["way"] == "rows split" and set(copied) == set(BOTH)


def test_the_doctor_shows_the_choices() -> None:
    """A line for each product that has another way, in words with its evidence, and a count of those that stay."""
    (empty,) = doctor._linear_layers(FACTS)
    assert empty.status == "ok" and empty.value.startswith("not tuned on this device")
    choices.keep(FACTS, BOTH)
    found = doctor._linear_layers(FACTS)
    assert {(check.name, check.status, check.advice) for check in found} == {("Linear layers", "ok", "")}
    assert [check.value for check in found] == [
        "bfloat16: 1056 x 3840 to 11520: rows split, 0.900 of the time of whole (0.880 to 0.920, 10 quads)",
        "1 of 2 products measured are fastest as they are without tuning",
    ]
