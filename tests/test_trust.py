"""Verdicts on kernels: trials that crash, hang or talk, what is kept and for how long, and what the run key hears."""

import sys
from pathlib import Path

from zimage import blas, doctor, trust

import pytest

FACTS = {"device": "nvidia-fake", "device_type": "gpu", "driver": "1", "mlx": "0.32", "mlx_build": "cuda-13", "os": "x"}
GOOD, BAD, LAST = ({"kernel": name, "dtype": "bfloat16"} for name in ("good", "bad", "last"))
ANSWERING = """
import json, os, sys, time
for request in json.load(sys.stdin):
    if request["kernel"] == "bad":
        {what}
    print(json.dumps({{"request": json.dumps(request, sort_keys=True), "reason": ""}}), flush=True)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv(trust.VARIABLE, raising=False)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> "Trial":
    return Trial(monkeypatch)


class Trial:
    """Puts a program in the place of the trial, and counts how often it is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = 0
        self._patch = monkeypatch
        self.does("pass")

    def does(self, what: str) -> None:
        """`what` happens at the request for the bad kernel; others are answered."""

        def command() -> list[str]:
            self.started += 1
            return [sys.executable, "-I", "-c", ANSWERING.format(what=what)]

        self._patch.setattr(trust, "_command", command)


def test_kernels_that_pass_have_no_reason(trial: Trial) -> None:
    """One process answers all requests."""
    assert trust.tried([GOOD, LAST], 60) == {trust.key(GOOD): "", trust.key(LAST): ""}
    assert trial.started == 1


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("os.kill(os.getpid(), 11)", "its trial was ended by signal 11"),
        ("sys.exit('no such symbol')", "its trial failed: no such symbol"),
        ("os._exit(7)", "its trial failed: exit 7"),
        ("time.sleep(600)", "its trial did not finish within 3 s"),
        ("print('nonsense'); print('[1]'); print('{}'); continue", "its trial failed: exit 0"),
    ],
)
def test_a_kernel_that_takes_the_trial_down_is_named(what: str, reason: str, trial: Trial) -> None:
    """A crash, an exit, a hang or nonsense is the verdict on that kernel, and the others are tried all the same."""
    trial.does(what)
    wanted = {trust.key(GOOD): "", trust.key(BAD): reason, trust.key(LAST): ""}
    assert trust.tried([GOOD, BAD, LAST], 3) == wanted


def test_a_trial_that_cannot_start_trusts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an interpreter no kernel is trusted."""
    monkeypatch.setattr(trust, "_command", lambda: [str(tmp_path / "nowhere")])
    assert trust.tried([GOOD], 3) == {trust.key(GOOD): "its trial could not be started: No such file or directory"}


def test_the_trial_itself_trusts_nothing_on_a_cpu() -> None:
    """The real trial process answers, also for a kernel it does not know."""
    request = {"kernel": "swiglu", "dtype": "float32"}
    answers = trust.tried([request, GOOD], 120)
    assert answers == {trust.key(request): "there is no GPU to run it on", trust.key(GOOD): "there is no such kernel"}


def test_a_verdict_is_asked_for_once(trial: Trial) -> None:
    """What is kept, good or bad, is not tried again."""
    trial.does("os._exit(7)")
    first = trust.settle(FACTS, [GOOD, BAD])
    before = trial.started
    assert trust.settle(FACTS, [GOOD, BAD]) == first
    assert trial.started == before
    assert trust.settle(FACTS, [LAST]) == {trust.key(LAST): ""}
    assert trust.kept(FACTS) == first | {trust.key(LAST): ""}


@pytest.mark.parametrize("what", ["driver", "mlx", "device", "sources"])
def test_a_verdict_holds_for_its_device_and_versions(what: str, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """After another driver, MLX or device, or other kernel sources, it is tried again."""
    trust.settle(FACTS, [GOOD])
    facts = FACTS | {what: "2"}
    if what == "sources":
        monkeypatch.setattr(trust, "sources_digest", lambda: "other")
    assert trust.kept(facts) == {}
    trust.settle(facts, [GOOD])
    assert trial.started == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": 1}', "[" * 100000])
def test_a_damaged_file_is_no_verdict(content: str, tmp_path: Path) -> None:
    """What cannot be read is tried again."""
    (tmp_path / "kernels-nvidia-fake.json").write_text(content)
    assert trust.kept(FACTS) == {}


def test_want_of_memory_is_no_lasting_verdict(tmp_path: Path) -> None:
    """What went wrong for the moment is not kept."""
    trust.keep(FACTS, {trust.key(GOOD): "cudaErrorMemoryAllocation: out of memory"})
    assert not list(tmp_path.iterdir())


def test_the_key_hears_of_kernels_that_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in force changes with a failed verdict, with the variable and the device; a pass changes nothing."""
    assert trust.in_force(FACTS | {"device_type": "cpu"}) == "composed"
    assert trust.in_force(FACTS) == "native"
    trust.keep(FACTS, {trust.key(GOOD): ""})
    assert trust.in_force(FACTS) == "native"
    trust.keep(FACTS, {trust.key(BAD): "it is wrong"})
    one = trust.in_force(FACTS)
    trust.keep(FACTS, {trust.key(LAST): "it is wrong too"})
    two = trust.in_force(FACTS)
    assert len({"native", one, two}) == 3
    monkeypatch.setenv(trust.VARIABLE, "OFF")
    assert trust.in_force(FACTS) == "off"


@pytest.mark.parametrize("value", ["off", "OFF", "none", "false", "No", "0", " off "])
def test_kernels_can_be_turned_off_in_several_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them turns all kernels off, and nothing is said of it."""
    monkeypatch.setenv(trust.VARIABLE, value)
    assert trust.off() and trust.doubt() == ""


@pytest.mark.parametrize("value", ["", "on", "ON", "1", "yes", "True"])
def test_kernels_can_be_left_on_in_several_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them turns a kernel off, and nothing is said of it."""
    monkeypatch.setenv(trust.VARIABLE, value)
    assert not trust.off() and trust.doubt() == ""


@pytest.mark.parametrize("value", ["Disabled", "offf", "2"])
def test_an_unknown_word_turns_kernels_off_and_is_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as off, in a run's key too; one line, which `doctor` has as a warning, names it and the known ones."""
    monkeypatch.setenv(trust.VARIABLE, value)
    assert trust.off() and trust.in_force(FACTS) == "off"
    assert trust.doubt() == (
        f"ZIMAGE_KERNELS={value!r} is not known, so all kernels are off; write ZIMAGE_KERNELS=off or ZIMAGE_KERNELS=on"
    )
    (line,) = doctor._kernels(FACTS)
    assert (line.status, f"{line.value}; {line.advice}") == ("warn", trust.doubt())


def test_doctor_has_a_line_for_every_kernel(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU those of the published model are tried, and what falls back is a warning that says why."""
    trust.keep(FACTS, {trust.key(BAD): "it is wrong by 0.5"})
    lines = doctor._kernels(FACTS)
    needed = trust.needed(FACTS)
    assert len(lines) == len(needed) + 1
    assert [(c.name, c.status) for c in lines if "bad" not in c.value] == [("Kernels", "ok")] * len(needed)
    (bad,) = (c for c in lines if "bad" in c.value)
    assert (bad.status, bad.value) == ("warn", "bad (bfloat16): falls back, it is wrong by 0.5")
    assert any(c.value == "qk_norm_rope (bfloat16, head_dim 128): right" for c in lines)
    assert [c.value for c in doctor._kernels(FACTS | {"device_type": "cpu"})] == [
        "plain operations: a CPU has no others"
    ]
    monkeypatch.setenv(trust.VARIABLE, "off")
    assert [c.value for c in doctor._kernels(FACTS)] == ["off: ZIMAGE_KERNELS says so"]
    assert trial.started == 1


def test_doctor_tries_a_kernel_where_it_is_for_the_device(trial: Trial) -> None:
    """Flash attention has a line on a Hopper GPU alone, where it is tried with the others in one process."""
    lines = [c.value for c in doctor._kernels(FACTS | {"architecture": "sm_100"})]
    assert lines and not any("flash_attention" in line for line in lines)
    here = FACTS | {"device": "nvidia-hopper", "architecture": trust.HOPPER}
    found = [c.value for c in doctor._kernels(here)]
    assert set(found) - set(lines) == {"flash_attention (bfloat16, head_dim 128): right"}
    assert trial.started == 2  # one for each device
