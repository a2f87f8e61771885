"""`zimage compare` and `zimage trend`: what they print, for people and for programs, and their exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab import fabricated
from tests.lab.fabricated import ablation, qkv
from tests.lab.test_comparing import PAIR, both, packed, put
from tests.sweeping import ROOT, environment
from tests.test_quickstart import WITHOUT_MLX
from zimage import cli, sources
from zimage.analysis import combining

import pyarrow.parquet as pq
import pytest

TINY = {"source": "synthetic:tiny", "height": 64, "width": 64, "batch": 1, "caption_tokens": 4, "device": "cpu"}


def zimage(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    status = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where nothing is worse, 1 where something is, 2 where there is nothing to compare, in one line."""
    slower = ablation((*PAIR, 1.06, 1.055, 1.065, "slower"))
    a, b = both(tmp_path, tables={"ablation": slower})
    assert [zimage(capsys, "compare", *pair)[0] for pair in ((a, a), (b, a), (a, b))] == [0, 0, 1]
    put(tmp_path / "c", parameters={"seed": 3})
    status, out, err = zimage(capsys, "compare", a, tmp_path / "c")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("zimage: ") and err.endswith("A qkv/aa11: seed 0 against 3 (and 1 more)\n")


def test_an_added_mode_breaks_no_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a mode more in the YAML the gate still judges the others: 0 where they are as fast, 1 where they are not."""
    packed(tmp_path / "before", "aa11", "8bit", "4bit")
    packed(tmp_path / "after", "bb22", "8bit", "4bit", "nvfp4")
    packed(tmp_path / "slower", "cc33", "8bit", "4bit", "nvfp4", slow=1.1)
    said = [zimage(capsys, "compare", tmp_path / "before", tmp_path / one) for one in ("after", "slower")]
    assert [(status, err) for status, _, err in said] == [(0, ""), (1, "")]
    for _, out, _ in said:
        assert "  asked for other rows: modes ['8bit', '4bit'] against ['8bit', '4bit', 'nvfp4']\n" in out
        assert "not compared (1):\n  nvfp4 of quantization/" in out and "only B has this arm, A has not" in out
    assert said[1][1].endswith("2 compared (2 slower), 1 not: 2 regressions\n")


def test_a_gate_that_requires_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --require-all it is 1 where B lacks a run or an arm of A or decides no time, with a line that says why."""
    whole = tmp_path / "whole"
    packed(whole, "aa11", "8bit", "4bit")
    put(whole, "bb22")
    gone = "1 run of A has no counterpart in B"
    for arms, why in ((("8bit", "4bit"), f"{gone}\n"), (("8bit",), f"{gone} and 1 row of A has no counterpart in B\n")):
        part = tmp_path / f"part{len(arms)}"
        packed(part, "aa11", *arms)
        status, out, err = zimage(capsys, "compare", whole, part)
        assert (status, err) == (0, "") and f": no regression in what could be judged: {gone}" in out
        assert zimage(capsys, "compare", whole, part, "--require-all")[::2] == (1, f"zimage: --require-all: {why}")
    wide = qkv().assign(ratio_low=0.2, ratio_high=5.0)
    a, b = both(tmp_path, tables={"ablation": wide})
    status, out, err = zimage(capsys, "compare", a, b, "--require-all", "--json")
    assert (status, err) == (1, "zimage: --require-all: no time ratio is decided\n")
    names = ("missing_runs", "missing_rows", "undecided", "times_undecided")
    assert [strict(out)[name] for name in names] == [0, 0, 3, True]
    assert zimage(capsys, "compare", a, b)[0] == 0
    assert zimage(capsys, "compare", whole, whole, "--require-all")[::2] == (0, "")
    _, out, _ = zimage(capsys, "compare", whole, tmp_path / "part1", "--json")
    lacking = [(one["missing_runs"], one["missing_rows"]) for one in strict(out)["not_compared"]]
    assert sorted(lacking) == [(0, 1), (1, 0)]


def test_a_gate_whose_reference_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --require-all it is 1 where a table or a run of A cannot be read, even if nothing is left to compare."""
    a, b = both(tmp_path)
    for root in (a, b):
        packed(root, "cc33", "8bit")
    path = a / "qkv" / "aa11" / "tables" / "ablation.parquet"
    path.write_bytes(b"garbage")
    status, out, err = zimage(capsys, "compare", a, b)
    assert status == 0 and "aa11" in err and err.count("\n") == 1
    assert out.endswith("no regression in what could be judged: 1 table of A cannot be read\n")
    told = "zimage: --require-all: 1 table of A cannot be read\n"
    status, _, err = zimage(capsys, "compare", a, b, "--require-all")
    assert status == 1 and err.endswith(told)
    status, out, err = zimage(capsys, "compare", a / "qkv", b / "qkv", "--require-all", "--json")
    assert (status, strict(out)["unreadable_tables"]) == (1, 1) and err.endswith(told)
    assert zimage(capsys, "compare", a / "qkv", b / "qkv")[0] == 2
    (a / "qkv" / "aa11" / "run.json").write_text("{")
    status, _, err = zimage(capsys, "compare", a, b, "--require-all")
    assert status == 1 and "--require-all: " in err.splitlines()[-1] and "aa11" in err.splitlines()[-1]


def test_a_gate_after_a_typo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B's failed run of other arms is no regression; with --require-all, A's run lacks its counterpart: exit 1."""
    a, b = tmp_path / "a", tmp_path / "b"
    packed(a, "aa11", "8bit")
    packed(b, "bb22", "-1", status="failed", error="ValueError: no")
    status, out, err = zimage(capsys, "compare", a, b)
    assert (status, out, err.count("\n")) == (2, "", 1) and "modes ['8bit'] against ['-1']" in err
    status, out, err = zimage(capsys, "compare", a, b, "--require-all")
    lacking, undecided = "1 run of A has no counterpart in B", "no time ratio is decided"
    assert (status, err) == (1, f"zimage: --require-all: {lacking} and {undecided}\n")
    assert "(a regression)" not in out and out.endswith(f" in what could be judged: {lacking}, {undecided}\n")


def clocked(root: Path, *arms: str, **meta: Any) -> Path:
    """A store with a run of qkv_fusion that keeps the samples of a step of these arms, or of both."""
    timed = fabricated.samples(*arms or PAIR[1::-1]).assign(scope="step", regime="burst")
    put(root, tables={"ablation": qkv(), "samples": timed}, **meta)
    return root


def slowed(root: Path, to: Path, *factors: float) -> Path:
    """A copy of a store in which each sample took so many times as long, a factor for all or one an arm."""
    shutil.copytree(root, to)
    for path in to.glob("*/*/tables/samples.parquet"):
        frame = pq.read_table(path).to_pandas()
        arms = list(dict.fromkeys(frame["arm"]))
        by = dict(zip(arms, factors * (len(arms) if len(factors) == 1 else 1), strict=True))
        frame["time_s"] *= frame["arm"].map(by)
        pq.write_table(fabricated.arrow("samples", frame), path)
    return to


def test_everything_takes_twice_as_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No ratio moves: exit 0 and a line that says so, and with --times exit 1 where it is more than that."""
    a = clocked(tmp_path / "a")
    b = slowed(a, tmp_path / "b", 1.9, 2.1)
    status, out, err = zimage(capsys, "compare", a, b)
    *_, told, summary = out.splitlines()
    assert (status, err) == (0, "") and "no regression" in summary
    assert told == (
        "every step takes 1.9 to 2.1 times as long in B; no ratio can tell that: --times 25 makes it a failure, "
        "--rerun measures both in turns"
    )
    status, out, err = zimage(capsys, "compare", a, b, "--times", 95)
    assert (status, err) == (1, "") and "every step" not in out and "not judged" not in out
    assert (
        "  within        separate_qkv, step               11.1 ms -> 21.1 ms    1.900 times: at most 95 % longer\n"
        in out
    )
    assert (
        "regressions:\n  qkv/aa11: longer fused_qkv, step 11.8 ms -> 24.7 ms 2.100 times: more than 95 % longer\n"
        in out
    )
    assert "\nTimes: medians of each run's samples" in out
    assert out.endswith(", 2 by their seconds (1 longer), 0 not: 1 regression; 2 rows are undecided\n")
    assert [zimage(capsys, "compare", a, b, "--times", percent)[0] for percent in (25, 250)] == [1, 0]


def test_little_more_time_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5 % more pass --times 25 and not --times 4; nothing is told without it, nor where one arm is as it was."""
    a = clocked(tmp_path / "a")
    for place, (factors, statuses, told) in enumerate(
        [
            ((1.05,), [0, 0, 1], False),
            ((1.12,), [0, 0, 1], True),
            ((1.0, 2.0), [0, 1, 1], False),
            ((0.5,), [0] * 3, False),
        ]
    ):
        b = slowed(a, tmp_path / f"b{place}", *factors)
        said = [zimage(capsys, "compare", a, b, *more) for more in ((), ("--times", 25), ("--times", 4))]
        assert [status for status, _, _ in said] == statuses
        assert (
            "every step takes 1.1 times as long in B; no ratio can tell that: --times 10 makes" in said[0][1]
        ) == told
        assert ("no ratio can tell" in said[0][1]) == told


def test_seconds_of_two_devices_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However much longer another device takes it is exit 0, and --times says that it judged nothing."""
    a = clocked(tmp_path / "a")
    b = slowed(clocked(tmp_path / "other", device="apple-m3-max"), tmp_path / "b", 3.0)
    status, out, err = zimage(capsys, "compare", a, b)
    assert (status, err) == (0, "") and "no ratio can tell" not in out
    status, out, err = zimage(capsys, "compare", a, b, "--times", 25)
    nothing = "no step or trajectory of both has seconds of one device"
    assert (status, err) == (0, f"zimage: --times judged nothing: {nothing}\n")
    assert (
        "  no seconds are judged: cpu-amd-epyc-2c against apple-m3-max\n" in out
        and "0 by their seconds (0 longer)" in out
    )
    asked = zimage(capsys, "compare", a, b, "--times", 25, "--require-all")
    assert asked[::2] == (1, f"zimage: --require-all: {nothing}\n")


def test_every_device_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What rose together on one device is told with its name where there are others, which did not."""
    a, b = (clocked(tmp_path / name) for name in "ab")
    other = clocked(tmp_path / "other", key="bb22", device="apple-m3-max")
    for one, root in ((other, a), (slowed(other, tmp_path / "slow", 2.0), b)):
        shutil.copytree(one / "qkv" / "bb22", root / "qkv" / "bb22")
    _, out, _ = zimage(capsys, "compare", a, b)
    assert out.count("no ratio can tell") == 1 and "\napple-m3-max: every step takes 2.0 times as long in B;" in out


def test_seconds_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json has the seconds of every arm, whether they were judged, and what rose together."""
    a = clocked(tmp_path / "a")
    b = slowed(a, tmp_path / "b", 2.0)
    for more, status, judged in (((), 0, None), (("--times", 25), 1, True), (("--times", 200), 0, False)):
        found, out, _ = zimage(capsys, "compare", "--json", a, b, *more)
        content = strict(out)
        times = content["times"]
        assert (found, content["regressions"], times["longer"]) == (
            status,
            2 * status,
            None if not more else 2 * status,
        )
        assert (times["percent"], times["compared"]) == (more[1] if more else None, 2)
        assert times["rose_together"] == [
            {"device": fabricated.DEVICE, "times": 2, "ratio_low": 2.0, "ratio_high": 2.0}
        ]
        one, two = content["pairs"][0]["times"]
        assert (one["arm"], one["scope"], two["arm"]) == ("separate_qkv", "step", "fused_qkv")
        assert one["b_s"] == 2 * one["a_s"] > 0 and one["ratio"] == 2 and one["regression"] is judged


def test_a_profile_has_no_ratios_but_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing but seconds can be compared it is exit 2 without --times, and judged with it."""
    for name, scale in (("a", 1.0), ("b", 1.5)):
        fabricated.add_run(tmp_path / name, "profile", "aa11", {"stages": fabricated.stages(scale)})
    a, b = tmp_path / "a", tmp_path / "b"
    status, out, err = zimage(capsys, "compare", a, b)
    assert (status, out) == (2, "") and "nothing to compare" in err
    said = [zimage(capsys, "compare", *sides, "--times", 25) for sides in ((a, b), (b, a))]
    assert [status for status, _, _ in said] == [1, 0]
    assert said[0][1].endswith("0 compared (none), 1 by their seconds (1 longer), 0 not: 1 regression\n")


def test_names_are_those_of_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain names are looked up in --results, and two runs of one experiment can be compared."""
    root = fabricated.across_versions(tmp_path)
    status, out, err = zimage(capsys, "compare", "qkv_fusion/1f", "3f", "--results", root)
    assert (status, err) == (1, "")
    assert out.startswith(f"A  run qkv_fusion/{'1f' * 6} in {root}, 1 run on cpu-amd-epyc-2c, 24 Oct 2026")
    assert out.endswith("3 compared (3 slower), 0 not: 3 regressions\n")


def test_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json has every row with both sides, the change and whether it is a regression, as valid JSON."""
    odd = qkv().assign(ratio_high=[1.06, float("inf"), 1.07], ratio=[1.05, 1.0, 1.06], ratio_low=[1.04, 0.0, 1.05])
    a, b = both(tmp_path, tables={"ablation": odd}, environment={"mlx": "0.33.0"})
    status, out, _ = zimage(capsys, "compare", "--json", a, b)
    content = strict(out)
    assert (status, content["regressions"]) == (1, 2)
    assert {"fact": "mlx", "a": "0.32.4", "b": "0.33.0"} in content["environment"]
    (pair,) = content["pairs"]
    assert (pair["a"], pair["b"], pair["weights"], pair["parameters"]["seed"]) == ("qkv/aa11", "qkv/aa11", "trained", 0)
    qkv_row, block, step = pair["rows"]
    assert {name: qkv_row[name] for name in ("table", "arm", "baseline", "scope", "regime", "verdict")} == {
        "table": "ablation", "arm": "fused_qkv", "baseline": "separate_qkv", "scope": "qkv", "regime": "burst",
        "verdict": "slower",
    }  # fmt: skip
    assert (qkv_row["a"]["value"], qkv_row["b"]["high"], qkv_row["regression"]) == (0.931, 1.06, True)
    assert qkv_row["ratio"]["value"] == pytest.approx(1.05 / 0.931)
    assert (block["b"]["high"], block["ratio"]["high"], block["verdict"]) == (None, None, "inconclusive")
    assert step["noise_floor"] == combining.combined_floor(0.004, 0.004, 3) and "independent" in content["method"]


def test_damage_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read is a line on standard error and rules no regression of B out; the JSON stays whole."""
    a, b = both(tmp_path)
    put(b, "bb22", parameters={"seed": 7})
    (b / "qkv" / "bb22" / "run.json").write_text("{")
    status, out, err = zimage(capsys, "compare", "--json", a, b)
    assert (status, err.count("\n")) == (1, 2) and err.startswith("zimage: skipped: ") and "bb22" in err
    assert "not known to be free of regressions" in err and len(strict(out)["pairs"]) == 1
    status, out, err = zimage(capsys, "compare", "--json", b, a)
    assert (status, err.count("\n")) == (0, 1) and len(strict(out)["pairs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a"], "issing argument 'B'"),
        (["compare", "a", "nowhere"], "no run 'nowhere'"),
        (["compare", "a", "a", "--python", "python3"], "give it with --rerun"),
        (["compare", "a", "a", "--rerun", "--require-all"], "--rerun times anew: give one of them"),
        (["compare", "a", "a", "--times", "0"], "'--times': 0 is no positive number of percent"),
        (["compare", "a", "a", "--times", "-5"], "-5 is no positive number of percent"),
        (["compare", "a", "a", "--times", "nan"], "nan is no positive number of percent"),
        (["compare", "a", "a", "--times", "inf"], "inf is no positive number of percent"),
        (["compare", "a", "a", "--times", "much"], "'much' is not a valid float"),
        (["compare", "a", "a", "--times", "25", "--rerun"], "--rerun times anew: give one of them"),
        (["compare", "a", "a", "--rerun", "--python", "python3"], "given twice, for A and for B, or not at all"),
        (["compare", "a", "a", "--rerun", "--pairs", "7"], "give at least 8 and 1"),
        (["compare", "a", "a", "--rerun", "--samples", "0"], "give at least 8 and 1"),
        (["compare", "a", "b", "--rerun"], "have no step to time again: seed 0 against 5"),
        (["compare", "profile", "profile", "--rerun"], "no run has one step of one size"),
        (["compare", "a", "a", "--rerun"], "qkv/aa11: digits holds other weights today than when it ran"),
        (
            ["compare", "t", "t", "--rerun", "--python", "no-such-python", "--python", "x"],
            "no-such-python: cannot be st",
        ),
        (["compare", "t", "t", "--rerun", "--python", "false", "--python", "x"], "false: its zimage cannot be asked"),
        (["trend", "nothing", "--results", "a"], "no experiment 'nothing'; there are: qkv"),
    ],
)
def test_asked_wrongly(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be done is exit 2 and one line that says what to do."""
    monkeypatch.chdir(tmp_path)
    both(tmp_path, parameters={"seed": 5})
    fabricated.add_run(Path("profile"), "p", "aa11", parameters={"source": "digits", "sizes": [[8, 8]]})
    put(Path("t"), parameters=TINY, weights=None)
    status, out, err = zimage(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_they_need_no_mlx(tmp_path: Path) -> None:
    """Where MLX cannot be imported results are compared and trends shown all the same."""
    root = fabricated.across_versions(tmp_path)
    for words, status in ((("compare", "1f", "3f"), 1), (("trend", "qkv_fusion"), 0)):
        line = [sys.executable, "-W", "error", "-c", WITHOUT_MLX, *words, "--results", str(root)]
        done = subprocess.run(
            line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )
        assert (done.returncode, done.stderr) == (status, "")
        assert "slower" in done.stdout


def test_a_trend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The versions stand below each other with the change since the one before, and a step's time as context."""
    root = fabricated.across_versions(tmp_path)
    status, out, err = zimage(capsys, "trend", "qkv_fusion", "--results", root)
    assert (status, err) == (0, "")
    assert "  fused_qkv to separate_qkv, step\n    MLX 0.31.2  1.000 (0.996 to 1.005)\n    MLX 0.32.4  0.998 (" in out
    assert "MLX 0.33.0  1.053 (1.049 to 1.058)  slower, 1.055 times the ratio before (" in out
    assert "for context, a step of separate_qkv (not judged: no clock links two runs)\n    MLX 0.31.2  11.1 ms" in out
    status, out, _ = zimage(capsys, "trend", "qkv_fusion", "--results", root, "--json")
    (content,) = strict(out)
    assert [one["version"] for one in content["versions"]] == ["MLX 0.31.2", "MLX 0.32.4", "MLX 0.33.0"]
    assert [one["change"] and one["change"]["verdict"] for one in content["points"] if one["scope"] == "step"] == [
        None,
        "inconclusive",
        "slower",
    ]


def test_no_trend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An experiment of one version has none, and says so."""
    put(tmp_path)
    status, out, _ = zimage(capsys, "trend", "qkv", "--results", tmp_path)
    assert (status, out) == (0, "qkv: every result is known of one version of MLX and zimage only\n")


def test_rerun(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of both sides is timed anew, in eight processes of each of two interpreters' zimage in turns."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    weights = {"source": "synthetic:tiny", "kind": "synthetic", "digest": sources.describe("synthetic:tiny").digest}
    put(tmp_path, parameters=TINY, weights=weights)
    asked = ["compare", "aa11", "qkv", "--results", tmp_path, "--rerun", "--samples", 2, "--json"]
    status, out, err = zimage(capsys, *asked, "--python", sys.executable, "--python", sys.executable)
    content = strict(out)
    (step,) = content["steps"]
    assert (status, err) == (int(step["verdict"] == "slower"), "")
    assert content["regressions"] == status and content["environment"] == []
    assert (content["a"]["python"], content["a"]["facts"]["device_type"]) == (sys.executable, "cpu")
    assert (step["regime"], step["quads"], step["noise_floor"]) == ("fresh processes", 8, 0.004)
    assert step["arguments_a"] == step["arguments_b"] == {n: v for n, v in TINY.items() if n != "device"} | {"seed": 0}
    assert {sample["kind"] for sample in step["samples"]} == {"first call", "warm-up", "sample"}
    assert len({sample["process"] for sample in step["samples"]}) == 16
