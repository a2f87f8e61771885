"""Memory by stage, of the process and of the device, and whether anything was swapped."""

import os
import subprocess
import sys
from pathlib import Path

from zimage.errors import MeasurementError
from zimage.measure import memory

import mlx.core as mx
import pytest

MB = 2**20


def test_peak_bytes_count_what_is_held_and_what_is_added() -> None:
    """The peak is what was held before and all that the work holds at once; after it nothing more is held."""
    held = mx.ones((512, 1024))
    mx.eval(held)
    before = mx.get_active_memory()
    one = memory.peak_bytes(lambda: held + 1)
    assert before >= 2 * MB
    assert one - before == pytest.approx(2 * MB, rel=0.05)
    several = memory.peak_bytes(lambda: [held + 1, held + 2, held + 3])
    assert several - before == pytest.approx(3 * 2 * MB, rel=0.05)
    assert memory.peak_bytes(lambda: None) == mx.get_active_memory() == before


def test_an_arm_needs_its_weights_and_the_most_of_three_runs() -> None:
    """What others hold is left out, the arm's own weights are counted, and the run that holds the most decides."""
    others, weights = mx.ones((8, 512, 512)), mx.ones((512, 512))
    mx.eval(others, weights)
    copies = iter([1, 4, 2])
    found = memory.needed_bytes(weights.nbytes, lambda: [weights + i for i in range(next(copies))])
    assert found == pytest.approx((1 + 4) * MB, rel=0.05)
    copies = iter([3, 4, 2])
    least, most = memory.needed_range(weights.nbytes, lambda: [weights + i for i in range(next(copies))])
    assert (least, most) == pytest.approx(((1 + 2) * MB, (1 + 4) * MB), rel=0.05)


def test_memory_by_stage() -> None:
    """Every prefix has its own peak: a large second stage doesn't show in the third, nor in the first's cache."""
    x = mx.ones((256, 1024))
    mx.eval(x)
    before = mx.get_active_memory()

    def run(k: int) -> mx.array:
        if k == 2:  # 16 MB that are let go before the result is there
            return x + mx.exp(mx.tile(x, (16, 1))).sum()
        return x + k

    rows = memory.by_stage(["a", "b", "c"], run)
    assert [(row["stage"], row["metric"]) for row in rows] == [
        (stage, metric) for stage in "abc" for metric in ("active_bytes", "peak_bytes", "cache_bytes")
    ]
    found = {(row["stage"], row["metric"]): row["bytes"] for row in rows}
    for stage in "abc":
        assert found[stage, "active_bytes"] - before == pytest.approx(MB, abs=0.1 * MB)
    assert found["a", "peak_bytes"] - before == pytest.approx(MB, abs=0.1 * MB)
    assert found["b", "peak_bytes"] - before >= 15 * MB
    assert found["c", "peak_bytes"] - before == pytest.approx(MB, abs=0.1 * MB)
    assert found["b", "cache_bytes"] >= 15 * MB
    assert found["a", "cache_bytes"] < MB > found["c", "cache_bytes"]
    assert mx.get_active_memory() == before


def test_memory_of_no_stage_is_refused() -> None:
    """No stages give a MeasurementError."""
    with pytest.raises(MeasurementError, match="at least one stage"):
        memory.by_stage([], lambda _k: None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_grows_is_seen() -> None:
    """32 MB more that a process touches are in its resident bytes, which never exceed their peak."""
    before = memory.process()
    grown = bytearray(os.urandom(MB) * 32)
    after = memory.process()
    assert before["resident_bytes"] is not None and after["resident_bytes"] is not None
    assert after["resident_bytes"] - before["resident_bytes"] > 0.8 * len(grown)
    assert after["resident_peak_bytes"] is not None and after["resident_peak_bytes"] >= after["resident_bytes"]


def _linux(root: Path, swapped_out: int | None = 7) -> None:
    (root / "self").mkdir(exist_ok=True)
    (root / "self" / "status").write_text("Name:\tpython\nVmHWM:\t    200 kB\nVmRSS:\t    100 kB\nVmSwap:\t   3 kB\n")
    (root / "meminfo").write_text("MemTotal:  1000 kB\nSwapTotal:   50 kB\nSwapFree:   20 kB\n")
    out = "" if swapped_out is None else f"pswpin 2\npswpout {swapped_out}\n"
    (root / "vmstat").write_text(f"nr_free_pages 5\n{out}pgfault 9\n")


def test_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Linux the numbers are those of /proc in bytes; those that are missing are None."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    page = os.sysconf("SC_PAGE_SIZE")
    assert memory.process() == dict.fromkeys(
        ("resident_bytes", "resident_peak_bytes", "swap_used_bytes", "swapped_in_bytes", "swapped_out_bytes"), None
    )
    _linux(tmp_path)
    assert memory.process() == {
        "resident_bytes": 100 * 1024, "resident_peak_bytes": 200 * 1024, "swap_used_bytes": 30 * 1024,
        "swapped_in_bytes": 2 * page, "swapped_out_bytes": 7 * page,
    }  # fmt: skip


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               12345.
Swapins:                                    100.
Swapouts:                                   300.
"""
MACOS = {
    "ps": "  2048\n",
    "sysctl": "total = 3072.00M  used = 1536.50M  free = 1535.50M  (encrypted)\n",
    "vm_stat": VM_STAT,
}


@pytest.mark.parametrize("answers", [MACOS, {}], ids=["all", "none"])
def test_macos(answers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS the numbers come from ps, sysctl and vm_stat; those that are not answered are None."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_output", lambda *command: answers.get(command[0], ""))
    found = memory.process()
    assert found.pop("resident_peak_bytes")
    wanted = [2048 * 1024, int(1536.5 * MB), 100 * 16384, 300 * 16384] if answers else [None] * 4
    names = ("resident_bytes", "swap_used_bytes", "swapped_in_bytes", "swapped_out_bytes")
    assert found == dict(zip(names, wanted, strict=True))


@pytest.mark.parametrize("error", [FileNotFoundError("ps"), subprocess.TimeoutExpired("ps", 1)])
def test_commands_that_fail_say_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is not there or hangs leaves the value unknown."""

    def run(*_command: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert memory._output("ps") == ""


def test_other_platforms_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known to tell, all values are None."""
    monkeypatch.setattr(sys, "platform", "other")
    assert set(memory.process().values()) == {None}


def test_watching_the_swap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is swapped within the block is counted and said, also when the block fails; unknown stays unknown."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    page = os.sysconf("SC_PAGE_SIZE")
    _linux(tmp_path)
    with memory.watch() as quiet:
        pass
    assert (quiet.in_bytes, quiet.out_bytes, str(quiet)) == (0, 0, "nothing was swapped meanwhile")
    busy = memory.Swapping()

    def fail() -> None:
        nonlocal busy
        with memory.watch() as busy:
            _linux(tmp_path, 1007)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (busy.in_bytes, busy.out_bytes) == (0, 1000 * page)
    assert str(busy).startswith(
        f"the system swapped {1000 * page / 1e6:.1f} MB out and 0.0 MB in meanwhile: these times"
    )
    with memory.watch() as unknown:
        _linux(tmp_path, None)
    assert (unknown.in_bytes, unknown.out_bytes) == (None, None)
    assert str(unknown) == "whether anything was swapped meanwhile is unknown"


def test_device_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's totals are what MLX says of it, a CPU's memory is the machine's; what isn't said is None."""
    found = memory.device()
    assert found["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["recommended_bytes"] is None
    assert found["active_bytes"] == mx.get_active_memory()

    class Device:
        type = mx.DeviceType.gpu

    monkeypatch.setattr(mx, "default_device", Device)
    for info, wanted in (
        ({"memory_size": 8, "max_recommended_working_set_size": 6}, (8, 6)),
        ({"total_memory": 80}, (80, None)),
        ({}, (None, None)),
    ):
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        found = memory.device()
        assert (found["memory_bytes"], found["recommended_bytes"]) == wanted
