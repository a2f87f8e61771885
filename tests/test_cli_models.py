"""`zimage convert` and `zimage generate`: what they write and print, and their exit status."""

from pathlib import Path

from tests.test_cli import zimage
from zimage import cli, digits, sources, transforms, weights
from zimage.digits import picture

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


QUICK = ("--steps", "1")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused, exit 2; nothing is written."""
    before = sorted(Path().rglob("*"))
    status, out, err = zimage(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("zimage: ") and err.count("\n") == 1, err
    assert sorted(Path().rglob("*")) == before
    return err


def test_generate_draws_one_digit(capsys: pytest.CaptureFixture[str]) -> None:
    """`generate 7` writes digits-7.png here, large and with clean squares, and prints its path and how long it took."""
    status, out, err = zimage(capsys, "generate", "7", *QUICK, "--seed", "5")
    assert (status, err) == (0, "")
    assert out.startswith("digits-7.png: 1 steps in ") and out.endswith(" s\n")
    with Image.open("digits-7.png") as image:
        pixels = np.array(image)
    drawn = digits.draw(weights.load_transformer("digits"), [7], steps=1, seed=5)
    assert np.array_equal(pixels, picture.grid(drawn.images, scale=32))
    assert min(pixels.shape) >= 256
    assert [path.name for path in Path().iterdir()] == ["digits-7.png"]


@pytest.mark.parametrize("prompts", [("7", "3", "1"), ("731",), ("7 3 1",)])
def test_several_labels_make_a_grid(prompts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Several labels, in one prompt or in several, are drawn side by side in their order."""
    status, out, _ = zimage(capsys, "generate", "--source", "digits", *prompts, *QUICK)
    assert (status, out.split(":")[0]) == (0, "digits-731.png")
    with Image.open("digits-731.png") as image:
        assert image.size == (3 * 9 * 32 + 32, 9 * 32 + 32)


def test_out_and_quantization_are_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """--out names the file, in another folder too, and --quantization changes what is drawn."""
    Path("a").mkdir()
    assert zimage(capsys, "generate", "7", *QUICK, "--out", "a/plain.PNG")[0] == 0
    assert zimage(capsys, "generate", "7", *QUICK, "--out", "a/packed.png", "--quantization", "2bit")[0] == 0
    with Image.open("a/plain.PNG") as plain, Image.open("a/packed.png") as packed:
        assert plain.format == "PNG"
        assert np.array(plain).tobytes() != np.array(packed).tobytes()


def test_many_labels_have_a_short_file_name() -> None:
    """The default file name holds at most forty labels, so that it stays a valid one."""
    assert cli._picture_path(None, "0123456789" * 40).name == f"digits-{'0123456789' * 4}-and-360-more.png"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument"),
        (("seven",), "digits such as 7"),
        (("7", "x"), "'7 x'"),
        (("",), "digits such as 7"),
        (("7", "--steps", "0"), "steps must be"),
        (("7", "--steps", "many"), "not a valid integer"),
        (("7", "--steps", "100000000000000000000"), "steps must be an integer from 1 to 10000"),
        (("7", "--out", ""), "is empty"),
        (("7", "--out", f"{'x' * 5000}.png"), "File name too long"),
        (("7", "--out", f"{'x' * 5000}/a.png"), "File name too long"),
        (("7", "--shift", "nan"), "shift must be"),
        (("7", "--seed", "-1"), "seed must be"),
        (("7", "--quantization", "9bit"), "unknown quantization '9bit'"),
        (("7", "--quantization", "4bit-g128"), "not divisible by the group size 128"),
        (("7", "--out", "nowhere/a.png"), "no folder nowhere"),
        (("7", "--out", "a.jpg"), "end the file's name in .png"),
        (("7", "--out", "folder.png"), "is a folder"),
        (("7", "--source", "nowhere"), "no checkpoint at 'nowhere'"),
    ],
)
def test_generate_refuses_in_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad labels, settings and files give exit 2 and one line, and no picture."""
    Path("folder.png").mkdir()
    assert words in refused(capsys, "generate", *arguments)


def test_other_models_cannot_draw_a_text_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """A source other than digits is told that a prompt needs the text encoder and the VAE."""
    line = refused(capsys, "generate", "a red fox", "--source", "synthetic:tiny")
    assert "text encoder and the VAE" in line and "this version does not have" in line


def test_convert_saves_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """`convert` writes a folder that loads, packed and cast as asked, and prints its size."""
    status, out, err = zimage(capsys, "convert", "digits", "a/b", "--dtype", "bfloat16", "--quantization", "4bit")
    info = sources.describe("a/b")
    assert (status, err) == (0, "")
    assert out.startswith(f"a/b: {len(info.tensors)} tensors, {info.bytes:,} bytes, in ")
    assert (info.dtypes, info.quantization) == (["BF16", "U32"], {"group_size": 64, "bits": 4, "mode": "affine"})
    assert info.config == sources.describe("digits").config


def test_a_converted_digits_model_draws(capsys: pytest.CaptureFixture[str]) -> None:
    """`convert` takes the label embeddings along, so that `generate --source` draws with the converted model."""
    assert zimage(capsys, "convert", "digits", "packed", "--quantization", "4bit")[0] == 0
    assert Path("packed/captions.safetensors").is_file()
    assert zimage(capsys, "generate", "7", *QUICK, "--source", "packed", "--out", "a.png")[0] == 0
    assert zimage(capsys, "generate", "7", *QUICK, "--quantization", "4bit", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_model_draws_with_its_own_labels(capsys: pytest.CaptureFixture[str]) -> None:
    """`generate --source` uses the label embeddings beside the model, not those that ship; a bad file is one line."""
    weights.convert("digits", "own")
    table = digits.table_of(sources.describe("digits"))
    assert table is not None
    mx.save_safetensors("own/captions.safetensors", {"captions": table[::-1]})
    assert zimage(capsys, "generate", "2", *QUICK, "--source", "own", "--out", "a.png")[0] == 0
    assert zimage(capsys, "generate", "7", *QUICK, "--out", "b.png")[0] == 0
    seeded = digits.draw(weights.load_transformer("digits"), [7], steps=1, seed=0)
    with Image.open("a.png") as image:
        assert np.array_equal(np.array(image), picture.grid(seeded.images, scale=32))
    for content in ({"captions": table[:9]}, {"labels": table}, {"captions": table.astype(mx.int32)}):
        mx.save_safetensors("own/captions.safetensors", content)
        assert "label embeddings" in refused(capsys, "generate", "2", *QUICK, "--source", "own")
    Path("own/captions.safetensors").write_bytes(b"no")
    assert "captions.safetensors: cannot be read" in refused(capsys, "generate", "2", *QUICK, "--source", "own")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits",), "Missing argument 'DIR'"),
        (("nowhere", "a"), "no checkpoint at 'nowhere'"),
        (("digits", "full"), "full exists and is not an empty folder"),
        (("digits", "a", "--dtype", "float16"), "overflow"),
        (("digits", "a", "--quantization", "9bit"), "unknown quantization"),
        (("digits", "full/x/a"), "cannot be saved"),
        (("digits", ""), "is empty"),
        (("digits", "x" * 5000), "cannot be saved"),
        (("odd", "a"), "odd/config.json: quantization.group_size must be a positive integer, found 'abc'"),
    ],
)
def test_convert_refuses_in_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad sources, targets and settings give exit 2 and one line, and nothing is written."""
    Path("full").mkdir()
    Path("full/x").write_text("x")
    weights.save_transformer(transforms.quantize(weights.load_transformer("digits"), "4bit"), "odd")
    text = Path("odd/config.json").read_text()
    Path("odd/config.json").write_text(text.replace('"group_size": 64', '"group_size": "abc"'))
    assert words in refused(capsys, "convert", *arguments)


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """-h explains the command and its options."""
    status, out, _ = zimage(capsys, command, "-h")
    assert status == 0
    assert "--quantization" in out
