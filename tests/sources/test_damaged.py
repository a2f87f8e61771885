"""Damaged headers, indexes, configs and manifests: each is read or refused in one line, soon and in little memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.checkpoints import write_config, write_raw
from tests.ollama_store import TENSOR, Layer, Stored, blob, config_layer, write_blobs, write_manifest
from tests.sources import damaging
from tests.sources.damaging import CONFIG_VALUES, FILE, INDEX, SMALL, header_of, published
from tests.sweeping import ROOT, side_by_side

import pytest

CASES = 21_700
PARTS = 2  # processes that share them
COUNTED = ("read", "refused", "bads")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")


def run(folder: Path, what: str) -> dict[str, Any]:
    """What became of the cases, or of one source, in a process of its own."""
    command = [sys.executable, "-m", "tests.sources.damaging", str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def refused(folder: Path, source: str | Path, *words: str) -> None:
    """`source` is refused in one line with all `words`, within the process's limits."""
    done = run(folder, str(source))
    assert (done["bad"], done["refused"]) == ([], 1)
    for word in words:
        assert word in done["line"], done["line"]


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Thousands of damaged files never end in anything but success or one printable line, in 512 MB and 5 s a case."""
    folders = [tmp_path / str(part) for part in range(PARTS)]
    for folder in folders:
        folder.mkdir()
    halves = side_by_side(*(partial(run, folder, f"{CASES}/{folder.name}/{PARTS}") for folder in folders))
    count, refused = (sum(half[what] for half in halves for what in whats) for whats in (COUNTED, ["refused"]))
    slowest_s, peak_mb = (max(half[what] for half in halves) for what in ("slowest_s", "peak_mb"))
    figure(f"{count:,} damaged files, {refused:,} refused; at most {slowest_s * 1000:.0f} ms and {peak_mb} MB")
    assert [line for half in halves for line in half["bad"]] == []
    assert count >= 20_000
    kinds = halves[0]["reasons"]
    for kind in kinds:
        assert sum(half["reasons"][kind] for half in halves) >= 0.6 * CASES / len(kinds), kind


def test_the_tally_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, a case that takes too long, and lines too long or not printable are each recorded as bad."""
    monkeypatch.setattr(damaging, "CASE_S", 0.05)
    monkeypatch.setattr(damaging.signal, "signal", damaging.signal.signal)
    before = damaging.signal.signal(damaging.signal.SIGALRM, damaging._ring)

    def spin() -> None:
        while True:
            pass

    def refuse(line: str) -> None:
        raise damaging.ZImageError(line)

    tally = damaging.Tally()
    try:
        for act in (
            spin, lambda: 1 // 0, {}.popitem, lambda: bytearray(2**62), lambda: refuse("a\nb"),
            lambda: refuse("x" * 3000), lambda: refuse(""),
        ):  # fmt: skip
            monkeypatch.setattr(damaging.sources, "describe", lambda _, act=act: act())
            tally.describe("case", str(tmp_path))
    finally:
        damaging.signal.signal(damaging.signal.SIGALRM, before)
    assert [line.split(": ")[1] for line in tally.bad] == [
        "_TooLongError", "ZeroDivisionError", "KeyError", "MemoryError",
        "a line of 3", "a line of 3000", "a line of 0",
    ]  # fmt: skip


def test_a_header_of_80_mb(tmp_path: Path) -> None:
    """A header that claims 80 MB, in a file that has them, is refused by its length and not read."""
    write_config(tmp_path, SMALL)
    with (tmp_path / FILE).open("wb") as f:
        f.write((80_000_000).to_bytes(8, "little"))
        f.truncate(80_000_008)
    refused(tmp_path, tmp_path, FILE, "a header of 80000000 bytes, expected at most")


@pytest.mark.parametrize(
    ("piece", "end"), [("[", ""), ("[" * 400 + "]" * 400 + ",", "0]"), ("{},", "0]"), ('{"":', ""), ("0,", "0]")]
)
def test_a_header_of_4_mb_of_lists(piece: str, end: str, tmp_path: Path) -> None:
    """4 MB of brackets, one in another or many side by side, are refused."""
    write_config(tmp_path, SMALL)
    opened = "" if not end else "["
    raw = opened + piece * ((4_000_000 - 3) // len(piece)) + end
    write_raw(tmp_path / FILE, raw.encode())
    refused(tmp_path, tmp_path, str(tmp_path / FILE))


def test_a_name_that_a_pattern_could_search_for_ever(tmp_path: Path) -> None:
    """A tensor's name of 3 MB, made of what other libraries' names consist of, is judged at once."""
    write_config(tmp_path, SMALL)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for piece in (".quant_state.", ".lora.up", "all_final_layer.1", ".attention.qkv", "1", "siglip"):
        write_raw(tmp_path / FILE, {piece * (3_000_000 // len(piece)) + "\n\n": entry})
        refused(tmp_path, tmp_path, "packed by another library" if "quant" in piece else str(tmp_path / FILE))


def test_long_names_make_no_long_line(tmp_path: Path) -> None:
    """A line that names several tensors, a shape and offsets stays short whatever their lengths."""
    long = "x" * 10_000
    shape = {"dtype": "F32", "shape": ["y" * 9000], "data_offsets": ["z" * 9000]}
    same = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_config(tmp_path, SMALL)
    for header in (
        {long: shape},
        {f"{long}.attention.out.x": same, f"{long}.attention.to_out.0.x": same},
        {"layers.0.attention.to_q.weight": same, f"{long}.attention.qkv.weight": {**same, "shape": [0] * 16}},
    ):
        write_raw(tmp_path / FILE, header)
        refused(tmp_path, tmp_path, str(tmp_path / FILE))


def test_a_config_of_2_billion_layers(tmp_path: Path) -> None:
    """A config of 2**31 layers or one fewer, and a tensor of the very last, costs nothing and is refused."""
    last = {"layers.2147483646.attention_norm1.weight": ("F32", (32,))}
    header, data = header_of(published(SMALL) | last)
    damaging.write(tmp_path / FILE, header, data)
    write_config(tmp_path, SMALL, n_layers=2**31)
    refused(tmp_path, tmp_path, "config.json", "n_layers")
    write_config(tmp_path, SMALL, n_layers=2**31 - 1)
    refused(tmp_path, tmp_path, "layers.1.attention_norm1.weight", "is missing")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, tmp_path, "do not tell the config")


def test_a_config_of_400_000_patch_sizes(tmp_path: Path) -> None:
    """A config whose list of patch sizes fills 4 MB is refused at the first that has no tensor."""
    header, data = header_of(published(SMALL))
    damaging.write(tmp_path / FILE, header, data)
    count = 400_000
    values = {**CONFIG_VALUES, "all_patch_size": list(range(1, count + 1)), "all_f_patch_size": [1] * count}
    raw = json.dumps(values, separators=(",", ":"))
    assert 3_000_000 < len(raw) < 4_000_000
    (tmp_path / "config.json").write_text(raw, encoding="utf-8")
    refused(tmp_path, tmp_path, "all_x_embedder.1-1.bias is missing")


def test_an_index_of_100_000_names_of_one_file_that_is_missing(tmp_path: Path) -> None:
    """An index that names 100,000 tensors of a file that is not there is refused by the file, or by its own length."""
    write_config(tmp_path, SMALL)
    for name, words in (
        ("{}", "a.safetensors, which is not there"),
        ("layers.{}.attention_norm1.weight", "longer than"),
    ):
        weight_map = {name.format(i): "a.safetensors" for i in range(100_000)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        refused(tmp_path, tmp_path, words)


def test_a_manifest_of_100_000_layers(tmp_path: Path) -> None:
    """A manifest of 100,000 layers is refused by its length; one of 10,000, all the same blob, for what they are."""
    root = tmp_path / "store"
    own = Layer(TENSOR, "transformer/x", blob({"data": Stored("F32", (1,), bytes(4))}))
    write_blobs(root, [config_layer(SMALL), own])
    for count, words in ((100_000, "longer than"), (10_000, "is missing")):
        entries = [
            {"mediaType": TENSOR, "name": f"transformer/{i}", "digest": own.entry["digest"]} for i in range(count)
        ]
        write_manifest(root, {"layers": [config_layer(SMALL).entry, *entries]})
        refused(tmp_path, "ollama:tiny", words)
