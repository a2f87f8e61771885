"""Loading, packing and converting in little memory, whole or not at all; values, digests and adapters on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.checkpoints import CONFIG, SINGLE, tensors, write_config, write_sharded, write_single
from tests.loras import named, pairs
from tests.sweeping import side_by_side
from tests.test_cli import zimage
from tests.test_weights import QUANTIZABLE, arrays, same_bits
from zimage import saving, sources, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError
from zimage.sources import digests
from zimage.sources.published import shapes
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

LARGE = replace(TransformerConfig.turbo(), n_layers=4)
LARGEST_BLOCK = 2 * (4 * 3840**2 + 3 * 3840 * 10240 + 4 * 3840 * 256)  # bytes in bf16
MB = 2**20
MEASURED = """
import json, sys, time
from zimage import weights
from zimage.transformer import weight_bytes

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

RECIPE = {"default": "4bit", "rules": [{"pattern": "layers.*.w2", "quantization": "8bit", "group_size": 32}]}
what, source, target = sys.argv[1:]
before, result = status("VmRSS"), 0
if what == "convert":
    weights.convert(source, target, "bfloat16", "4bit")
else:
    model = weights.load_transformer(source, "bfloat16", RECIPE if what == "pack" else None)
    result = weight_bytes(model)
print(json.dumps({"peak": status("VmHWM") - before, "result": result}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic checkpoint of several gigabytes with the published layers, made for this test."""
    noise = mx.random.normal((2**20,)).astype(mx.bfloat16)
    mx.eval(noise)

    def values(shape: tuple[int, ...]) -> mx.array:
        size = int(np.prod(shape))
        return mx.tile(noise, -(-size // noise.size))[:size].reshape(shape)

    config = {"_weights_kind": "synthetic", **LARGE.to_dict()}
    folder = tmp_path_factory.mktemp("large") / "a"
    return saving.save_tensors({name: values(shape) for name, shape in shapes(LARGE)}, config, folder)


def write_lora(path: Path, config: TransformerConfig) -> Path:
    """An adapter for the attention of the first main block."""
    save_file(named(pairs(config, only="layers.0.attention")), path)
    return path


def measured(what: str, source: Path, target: Path) -> tuple[int, int]:
    """Peak memory over what a process has before it loads, and the bytes of its model."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, what, str(source), str(target)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["peak"], answer["result"]


@pytest.fixture(scope="module")
def peaks(large: Path) -> dict[str, tuple[int, int]]:
    """What `measured` finds for everything that is done with the large checkpoint, each in a process of its own."""
    whats = ("pack", "convert", "load")
    found = side_by_side(*(partial(measured, what, large, converted(large)) for what in whats))
    return dict(zip(whats, found, strict=True))


def converted(large: Path) -> Path:
    """Where the large checkpoint is converted to."""
    return large.with_name("converted")


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@needs_proc
def test_loading_takes_the_memory_of_its_result(peaks: dict[str, tuple[int, int]]) -> None:
    """Loading several gigabytes peaks at most at 1.1 times the model's bytes."""
    peak, result = peaks["load"]
    assert result > 2.5e9
    assert peak <= 1.1 * result, (peak / MB, result / MB)


@needs_proc
def test_packing_while_loading_takes_little_more_than_the_packed_size(peaks: dict[str, tuple[int, int]]) -> None:
    """Load-and-quantize, by a recipe, peaks at most at the quantized size, the largest block and 300 MB."""
    peak, result = peaks["pack"]
    assert result < 0.4 * 2 * sum(int(np.prod(shape)) for _, shape in shapes(LARGE))
    assert peak <= result + LARGEST_BLOCK + 300 * MB, (peak / MB, result / MB)


@needs_proc
def test_converting_holds_one_tensor_at_a_time(large: Path, peaks: dict[str, tuple[int, int]]) -> None:
    """`convert` to 4 bits peaks below the largest block and 300 MB, whatever the model's size; the folder is whole."""
    peak, _ = peaks["convert"]
    assert peak <= LARGEST_BLOCK + 300 * MB, peak / MB
    info = sources.describe(converted(large))
    info.check()
    assert (info.kind, info.quantization) == ("synthetic", {"group_size": 64, "bits": 4, "mode": "affine"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_while_loading_gives_what_packing_afterwards_gives(dtype: str, tmp_path: Path) -> None:
    """Load-and-quantize, quantize after loading, and converting give the same bits."""
    folder = write_sharded(tmp_path / "a", tensors(QUANTIZABLE))
    write_config(folder, QUANTIZABLE)
    after = arrays(transforms.quantize(weights.load_transformer(folder, dtype), "4bit"))
    assert same_bits(arrays(weights.load_transformer(folder, dtype, "4bit")), after)
    converted = weights.convert(folder, tmp_path / "b", dtype, "4bit")
    assert same_bits(arrays(weights.load_transformer(converted)), after)


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and converting tell of exactly the bytes that there are."""
    folder = write_single(tmp_path / "a", tensors())
    monkeypatch.setattr(weights, "_GROUP_BYTES", 0)
    told: list[int] = []
    model = weights.load_transformer(folder, "float32", advance=told.append)
    total = sum(array.nbytes for array in arrays(model).values())
    assert sum(told) == total and len(told) > 20
    announced: list[int] = []
    written: list[int] = []

    def progress(size: int) -> saving.Advance:
        announced.append(size)
        return written.append

    weights.convert(folder, tmp_path / "b", "float32", progress=progress)
    assert (announced, sum(written)) == ([total], total)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_convert_leaves_no_half_folder(how: signal.Signals, tmp_path: Path) -> None:
    """Stopped while it writes, `convert` leaves no target; what a kill leaves beside it goes with the next try."""
    code = (
        "import sys, time\n"
        "from zimage import cli, saving\n"
        "write = saving._write_all\n"
        "def slow(*arguments):\n"
        "    write(*arguments)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(0.2)\n"
        "saving._write_all = slow\n"
        "sys.exit(cli.main(['convert', 'digits', 'out/a']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        os.kill(process.pid, how)
        _, said = process.communicate(timeout=60)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    if how == signal.SIGKILL:
        assert left == [f".a.{process.pid}.partial", SINGLE, "out"]
        weights.convert("synthetic:tiny", tmp_path / "out" / "a")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a"]
    else:
        assert (process.returncode, said.strip(), left) == (1, "zimage: stopped", [])


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with too little room is refused with both sizes, and nothing is left behind."""
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(WeightsError, match=r"needs [\d,]+ bytes, and its disk has 1,000 free"):
        weights.convert("synthetic:tiny", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bad_values_are_found_when_asked(value: float, dtype: type, tmp_path: Path) -> None:
    """--check-values names the tensor, how many values are bad and where the first is; without it nothing is said."""
    name = "layers.0.feed_forward.w2.weight"
    values = {n: v.astype(dtype) for n, v in tensors().items()}
    values[name][3, 7] = values[name][5, 1] = value
    folder = write_single(tmp_path / "a", values)
    weights.load_transformer(folder)
    total = values[name].size
    words = rf"{SINGLE}: tensor {name} has 2 of {total:,} values .* first at \[3, 7\]"
    with pytest.raises(WeightsError, match=words):
        weights.load_transformer(folder, check_values=True)
    with pytest.raises(WeightsError, match=words):
        weights.convert(folder, tmp_path / "b", check_values=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("mode", ["4bit", "mxfp4", "nvfp4", "mxfp8"])
def test_bad_scales_of_packed_weights_are_found(mode: str, tmp_path: Path) -> None:
    """A scale that means NaN is found in packed weights of every mode, and sound ones pass."""
    model = transforms.quantize(Transformer(QUANTIZABLE), mode)
    weights.check_values(weights.save_transformer(model, tmp_path / "a"))
    layer = model.layers[0].attention.to_k
    bad = np.nan if mode == "4bit" else 255
    layer.scales[2, 1] = bad
    folder = weights.save_transformer(model, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"layers.0.attention.to_k.scales has 1 of .* first at \[2, 1\]"):
        weights.check_values(folder)


def test_the_command_checks_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`convert --check-values` refuses NaN with exit 2 and one line."""
    values = {name: value.copy() for name, value in tensors().items()}
    values["x_pad_token"][0, 0] = np.nan
    folder = write_single(tmp_path / "a", values)
    status, out, err = zimage(capsys, "convert", str(folder), str(tmp_path / "b"), "--check-values")
    assert (status, out) == (2, "") and "tensor x_pad_token has 1 of 64 values" in err


def test_a_kept_digest_is_used_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is computed once for files that stay as they are, and anew for one that was changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    reads: list[Path] = []
    whole = digests._range_digest

    def counted(path: Path, start: int, end: int) -> str:
        reads.append(path)
        return whole(path, start, end)

    monkeypatch.setattr(digests, "_range_digest", counted)
    folder = write_sharded(tmp_path / "a", tensors())
    first = sources.describe(folder).digest
    assert len(reads) == len(tensors())
    reads.clear()
    assert (sources.describe(folder).digest, reads) == (first, [])
    file = next(folder.glob("*-00002-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sources.describe(folder).digest != first
    assert reads


def test_a_file_that_was_just_written_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest of a file that changed within the last two seconds is not kept: its times might not show a change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_single(tmp_path / "a", tensors())
    assert sources.describe(folder).digest
    assert not list((tmp_path / "cache").rglob("digests/*"))


def test_a_damaged_cache_is_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rubbish in the cache is replaced by the right digest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    folder = write_single(tmp_path / "a", tensors())
    right = sources.describe(folder).digest
    kept = next((tmp_path / "cache").rglob("digests/*"))
    kept.write_text("rubbish")
    assert sources.describe(folder).digest == right == kept.read_text()


def test_an_adapter_is_merged_while_loading(tmp_path: Path) -> None:
    """`lora=` gives what adapting the loaded model gives, also packed afterwards, and converted."""
    folder = write_single(tmp_path / "a", tensors())
    lora = write_lora(tmp_path / "lora.safetensors", CONFIG)
    plain = weights.load_transformer(folder, "float32")
    adapted = transforms.adapt(plain, [(lora, 0.5)])
    assert same_bits(arrays(weights.load_transformer(folder, "float32", lora=[(lora, 0.5)])), arrays(adapted))
    assert not same_bits(arrays(adapted), arrays(plain))
    halves = {name: value.astype(np.float16) for name, value in tensors().items()}
    half = write_single(tmp_path / "half", halves)
    wide = transforms.adapt(weights.load_transformer(half, "float32"), [(lora, 0.5)])
    assert same_bits(arrays(weights.load_transformer(half, "float32", lora=[(lora, 0.5)])), arrays(wide))
    converted = weights.convert(folder, tmp_path / "b", "float32", lora=[(lora, 0.5)])
    assert same_bits(arrays(weights.load_transformer(converted, "float32")), arrays(adapted))


def test_an_adapter_stays_beside_packed_weights(tmp_path: Path) -> None:
    """On a checkpoint that is stored packed the update stays beside, and such a model is not converted."""
    packed = transforms.quantize(Transformer(QUANTIZABLE), "4bit")
    folder = weights.save_transformer(packed, tmp_path / "a")
    lora = write_lora(tmp_path / "lora.safetensors", QUANTIZABLE)
    model = weights.load_transformer(folder, lora=[(lora, 1.0)])
    assert any(path.startswith("layers.0.attention.to_q") and "lora_down" in path for path in arrays(model))
    with pytest.raises(InputError, match=r"is quantized, and no checkpoint can hold a LoRA .* --lora and --quant"):
        weights.convert(folder, tmp_path / "b", lora=[(lora, 1.0)])


def test_the_commands_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`convert --lora FILE:SCALE` merges, `generate --lora` draws otherwise, and a missing file is one line."""
    digits = sources.describe("digits").config
    lora = write_lora(tmp_path / "lora.safetensors", digits)
    assert zimage(capsys, "convert", "digits", str(tmp_path / "a"), "--lora", f"{lora}:0.5")[0] == 0
    assert sources.describe(tmp_path / "a").digest != sources.describe("digits").digest
    pictures = [str(tmp_path / f"{i}.png") for i in range(2)]
    assert zimage(capsys, "generate", "7", "--steps", "1", "--out", pictures[0])[0] == 0
    assert zimage(capsys, "generate", "7", "--steps", "1", "--out", pictures[1], "--lora", f"{lora}:30")[0] == 0
    assert Path(pictures[0]).read_bytes() != Path(pictures[1]).read_bytes()
    status, _, err = zimage(capsys, "convert", "digits", str(tmp_path / "b"), "--lora", "nowhere.safetensors")
    assert status == 2 and "no adapter at nowhere.safetensors" in err


def test_loading_does_not_wait_for_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an ordinary folder hashes nothing."""
    monkeypatch.setattr(digests, "_range_digest", None)
    started = time.monotonic()
    weights.load_transformer(write_single(tmp_path, tensors()))
    assert time.monotonic() - started < 60
