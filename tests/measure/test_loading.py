"""Loading is measured in a process of its own: what is reported is what happened there, and failures are one line."""

import sys
import time
from pathlib import Path

from tests import checkpoints
from zimage import loaders, weights
from zimage.errors import InputError, MeasurementError
from zimage.measure import plain_read
from zimage.measure.loading import PLAIN_READ, Loading, measure_loading, take_turns
from zimage.sources import describe

import numpy as np
import pytest

MB = 1_000_000
GROWS = """
from zimage.measure.reporting import report
import time, numpy as np
{before}
def load():
    {load}
report(load, lambda result: result.nbytes)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def grows(load: str, before: str = "") -> Loading:
    return measure_loading(python(GROWS.format(load=load, before=before)), 60)


def refused(code: str, timeout_s: float = 60) -> str:
    with pytest.raises(MeasurementError) as caught:
        measure_loading(python(code), timeout_s)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("size", [50 * MB, 200 * MB])
def test_memory_that_is_kept(size: int) -> None:
    """A process that grows by a known amount is measured within 10 %, whatever it had held before."""
    found = grows(f"return np.ones({size}, np.uint8)", before=f"held = np.ones({100 * MB}, np.uint8)")
    assert found.result_bytes == size
    assert found.peak_bytes == pytest.approx(size, rel=0.1)


def test_memory_that_is_let_go_again() -> None:
    """The peak counts what was held on the way and freed before the end."""
    found = grows(f"a = np.ones({200 * MB}, np.uint8); b = a[:1000].copy(); del a; return b")
    assert found.result_bytes == 1000
    assert found.peak_bytes == pytest.approx(200 * MB, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_memory_that_was_let_go_before() -> None:
    """What a process held and freed before loading began, as imports do, is no part of the peak."""
    found = grows(f"return np.ones({50 * MB}, np.uint8)", before=f"a = np.ones({300 * MB}, np.uint8); del a")
    assert found.peak_bytes == pytest.approx(50 * MB, rel=0.1)


def test_only_loading_is_timed() -> None:
    """The seconds are those of the load, without the start of the process and what it did before."""
    found = grows("time.sleep(0.2); return np.ones(1000)", before="time.sleep(0.6)")
    assert 0.2 <= found.time_s < 0.5
    assert found.bandwidth_bytes_per_s == found.result_bytes / found.time_s


def test_a_larger_peak_of_the_device_counts() -> None:
    """Where the device held more than the system counts as the process's own, that is the peak."""
    code = "from zimage.measure.reporting import report\nreport(lambda: None, lambda _: 1, lambda: 10**12)"
    assert measure_loading(python(code), 60).peak_bytes == 10**12


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; print('no\\x1b[31m file', file=sys.stderr); sys.exit(3)", ("failed (3)", "no [31m file")),
        ("raise ValueError('one\\ntwo')", ("failed (1)", "two")),
        ("import os; os.kill(os.getpid(), 9)", ("failed (-9)", "it said nothing")),
        ("pass", ("found nothing",)),
        ("print('{\"time_s\": 1}')", ("found {", "time_s")),
        ('print(\'{"time_s": NaN, "peak_bytes": 1, "result_bytes": 1}\')', ("NaN",)),
        ('print(\'{"time_s": 1, "peak_bytes": Infinity, "result_bytes": 1}\')', ("Infinity",)),
        ('print(\'{"time_s": 0, "peak_bytes": 1, "result_bytes": 1}\')', ("found",)),
        ("print('[' * 100000)", ("...",)),
        ("print('[1]')", ("found [1]",)),
    ],
)
def test_a_loader_that_fails_is_one_line(code: str, words: tuple[str, ...]) -> None:
    """A failing, killed or silent loader, and one that reports no numbers, is a MeasurementError of one line."""
    said = refused(code)
    assert all(word in said for word in words), said
    assert len(said) < 1000


def test_a_loader_that_hangs_is_ended() -> None:
    """A loader that takes too long is ended in time, together with what it started and what holds its output open."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    said = refused(f"{code}; time.sleep(60)", timeout_s=1)
    assert "longer than 1 s" in said
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("program", ["/nowhere/python", "", "a\0b"])
def test_a_program_that_is_not_there(program: str) -> None:
    """A loader that cannot be started at all is one line too."""
    with pytest.raises(MeasurementError, match="cannot be started") as caught:
        measure_loading([program], 10)
    assert str(caught.value).isprintable()


def test_turns(tmp_path: Path) -> None:
    """Every loader runs once a round and in the round that is not counted, not always in the same order."""
    log = tmp_path / "log"
    code = 'print(\'{"time_s": 2, "peak_bytes": 3, "result_bytes": 4}\')'
    commands = {name: python(f"open({str(log)!r}, 'a').write({name!r}); {code}") for name in "abc"}
    rows = take_turns(commands, 3, seed=1)
    assert [(row["arm"], row["round"]) for row in rows] == [(arm, number) for arm in "abc" for number in (1, 2, 3)]
    assert {row["bandwidth_bytes_per_s"] for row in rows} == {2.0}
    ran = log.read_text()
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(rounds) == 4 and {"".join(sorted(one)) for one in rounds} == {"abc"} and len(set(rounds)) > 1


def test_no_rounds() -> None:
    """Fewer than one round is refused before anything runs."""
    with pytest.raises(MeasurementError, match="at least one round, found rounds=0"):
        take_turns({"a": ["/nowhere"]}, 0)


def test_a_plain_read_reads_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain read gives exactly the bytes asked for, in pieces, and refuses a file that ends early."""
    data = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)
    file = tmp_path / "data"
    file.write_bytes(data.tobytes())
    monkeypatch.setattr(plain_read, "PIECE_BYTES", 1000)
    assert np.array_equal(plain_read.read(str(file), 7, 100_003), data[7:])
    with pytest.raises(EOFError, match="ends at byte 100003, expected 100004"):
        plain_read.read(str(file), 7, 100_004)


@pytest.mark.parametrize("write", [checkpoints.write_single, checkpoints.write_sharded])
def test_all_loaders_load_the_same_bytes(write: object, tmp_path: Path) -> None:
    """Of a checkpoint of one file and of several, every loader that keeps what it reads gives the same bytes."""
    folder = write(tmp_path / "model", checkpoints.tensors())  # type: ignore[operator]
    commands = loaders.commands(folder, "cpu")
    assert list(commands) == [PLAIN_READ, "zimage", "mlx", "safetensors"]  # its widths don't fit groups of 64
    found = {name: measure_loading(command, 120) for name, command in commands.items()}
    assert {name: one.result_bytes for name, one in found.items()} == dict.fromkeys(found, describe(folder).bytes)


def test_packing_is_compared_where_it_can_be(tmp_path: Path) -> None:
    """4 bits are among the loaders of floating-point weights that fit them, and not of weights packed already."""
    assert list(loaders.commands("digits")) == [PLAIN_READ, "zimage", "zimage 4bit", "mlx"]
    packed = weights.convert("digits", tmp_path / "packed", quantization="8bit")
    assert "zimage 4bit" not in loaders.commands(packed)


def test_the_reader_of_mflux_needs_no_zimage(tmp_path: Path) -> None:
    """An interpreter in which zimage can't be imported reads the folder with mflux's reader, here a stand-in's."""
    place = tmp_path / "mflux" / "models" / "common" / "weights" / "loading"
    place.mkdir(parents=True)
    (place / "safetensors_reader.py").write_text(
        "import mlx.core as mx\n"
        "class SafetensorsReader:\n"
        "    @staticmethod\n"
        "    def read_directory(folder):\n"
        f"        return mx.load(folder + '/{checkpoints.SINGLE}')\n"
    )
    folder = checkpoints.write_single(tmp_path / "model", checkpoints.tensors())
    *options, code, given = loaders.commands(folder, mflux_python=sys.executable)["mflux"]
    before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.modules['zimage'] = None\n"
    found = measure_loading([*options, before + code, given], 120)
    assert (given, found.result_bytes) == (str(folder), describe(folder).bytes)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    """A source without files is refused, and a file damaged since is the loader's own line."""
    with pytest.raises(InputError, match="synthetic:tiny has no files"):
        loaders.commands("synthetic:tiny")
    folder = checkpoints.write_single(tmp_path / "model", checkpoints.tensors())
    command = loaders.commands(folder)["zimage"]
    (folder / checkpoints.SINGLE).write_bytes(b"short")
    with pytest.raises(MeasurementError, match=r"failed \(1\): .*model") as caught:
        measure_loading(command, 120)
    assert "\n" not in str(caught.value)
