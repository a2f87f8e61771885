"""Checkpoint sources: what is found, what is refused, and the digest."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    tensors,
    write_config,
    write_index,
    write_raw,
    write_sharded,
    write_single,
)
from zimage import sources
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, WeightsError, ZImageError

import numpy as np
import pytest
from safetensors.numpy import save_file

VALUES = {f"part.{i}.weight": np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in range(5)}
FIRST = "part.0.weight"
SHARD = "diffusion_pytorch_model-00001-of-00003.safetensors"


def write_packed(folder: Path) -> Path:
    """A checkpoint whose query projection is packed, 4 bits in groups of 32, with no entry in its config."""
    values = tensors()
    rows = CONFIG.dim
    name = "layers.0.attention.to_q"
    packed = {
        f"{name}.weight": np.arange(rows * 8, dtype=np.uint32).reshape(rows, 8),
        f"{name}.scales": np.ones((rows, 2), np.float32),
        f"{name}.biases": np.zeros((rows, 2), np.float32),
    }
    return write_single(folder, {**values, **packed})


def refused(source: str | Path, *words: str) -> str:
    """The one line with which `source` is refused; it holds all `words`."""
    with pytest.raises(ZImageError) as caught:
        sources.describe(source)
    line = str(caught.value)
    assert line.isprintable(), repr(line)
    assert len(line) < 3000
    for word in words:
        assert word in line
    return line


def test_a_diffusers_root_its_transformer_folder_and_its_file_are_the_same_checkpoint(tmp_path: Path) -> None:
    """A root with transformer/, that folder and the file in it give the same config, tensors and digest."""
    folder = write_single(tmp_path / "root" / "transformer", VALUES)
    infos = [sources.describe(source) for source in (tmp_path / "root", str(folder), folder / SINGLE)]
    for info in infos:
        assert (info.kind, info.config, info.quantization, info.folder) == ("trained", CONFIG, None, folder)
        assert info.tensors == infos[0].tensors
        assert info.digest == infos[0].digest
        assert (info.files, info.dtypes, info.bytes) == ([folder / SINGLE], ["F32"], 5 * 24)
    tensor = infos[0].tensors[FIRST]
    stored = (folder / SINGLE).read_bytes()[tensor.start : tensor.end]
    assert np.frombuffer(stored, np.float32).reshape(tensor.shape).tolist() == VALUES[FIRST].tolist()


def test_any_single_safetensors_name_will_do(tmp_path: Path) -> None:
    """A folder's only .safetensors file is taken whatever it is called."""
    folder = write_single(tmp_path / "a", VALUES, name="some.safetensors")
    assert sources.describe(folder).files == [folder / "some.safetensors"]


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    """A sharded folder gives the tensors of all shards, each in its own file."""
    info = sources.describe(write_sharded(tmp_path, VALUES))
    assert set(info.tensors) == set(VALUES)
    assert len(info.files) == 3
    assert info.bytes == 5 * 24


@pytest.mark.parametrize(("name", "dim"), [("turbo", 3840), ("small", 384), ("tiny", 64)])
def test_synthetic_sources_have_no_files(name: str, dim: int) -> None:
    """A synthetic source is its config and nothing else, and says that it is synthetic."""
    info = sources.describe(f"synthetic:{name}")
    assert (info.kind, info.config.dim, info.tensors, info.folder, info.bytes) == ("synthetic", dim, {}, None, 0)
    assert len(info.digest) == 64


def test_synthetic_digests_differ() -> None:
    """Each synthetic source has its own digest."""
    assert len({sources.describe(f"synthetic:{name}").digest for name in ("turbo", "small", "tiny")}) == 3


def test_built_in_names_mean_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`digits` ships with the package, also where a folder has that name; `./digits` is the folder."""
    write_single(tmp_path / "digits", VALUES)
    monkeypatch.chdir(tmp_path)
    assert sources.describe("digits").config.dim == 192
    assert sources.describe("./digits").config == CONFIG


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` at the start of a source is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_single(tmp_path / "a", VALUES)
    assert sources.describe("~/a").config == CONFIG


def test_label_embeddings_beside_the_config_are_found(tmp_path: Path) -> None:
    """captions.safetensors makes a digits model of a source, and what it holds is part of the digest."""
    write_single(tmp_path, VALUES)
    plain = sources.describe(tmp_path)
    assert (plain.captions, sources.describe("synthetic:tiny").captions) == (None, None)
    before = plain.digest
    path = tmp_path / "captions.safetensors"
    digests = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        for source in (tmp_path, tmp_path / SINGLE):
            assert sources.describe(source).captions == path
            digests.append(sources.describe(source).digest)
    assert digests[0] == digests[1] != digests[2] == digests[3]
    assert before not in digests


def test_a_quantization_entry_and_a_synthetic_label_are_told(tmp_path: Path) -> None:
    """What config.json says of packing and of the weights' kind is in the description."""
    write_single(tmp_path, VALUES)
    write_config(tmp_path, _weights_kind="synthetic")
    info = sources.describe(tmp_path)
    assert (info.quantization, info.kind) == (None, "synthetic")
    packed = write_packed(tmp_path / "packed")
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert sources.describe(packed).quantization == entry
    write_config(packed, quantization={"bits": 8, "group_size": 64})
    assert sources.describe(packed).quantization == {"group_size": 64, "bits": 8, "mode": "affine"}


@pytest.mark.parametrize(
    "source",
    ["", " ", "nowhere", "org/name", "~nobody-of-that-name/x", "synthetic:huge", "synthetic:", "digits2", "a\0b",
     "a\nb", "x" * 5000, "nowhere/x.safetensors"],
)  # fmt: skip
def test_what_is_no_source_is_refused(source: str) -> None:
    """A text that names nothing gives one line."""
    refused(source)


def test_an_unknown_source_is_told_what_there_is() -> None:
    """The line for an unknown source repeats it and lists what a source can be."""
    refused("nowhere", "'nowhere'", "synthetic:tiny", "digits", "diffusers folder")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """A folder without config.json is named and told where the file is looked for."""
    refused(tmp_path, str(tmp_path), "no config.json", "transformer/")
    save_file(VALUES, tmp_path / SINGLE)
    refused(tmp_path, str(tmp_path), "no config.json", "do not tell the config")
    refused(tmp_path / SINGLE, str(tmp_path / SINGLE), "no config.json beside it")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A folder with a config alone says that it found no weights."""
    write_config(tmp_path)
    refused(tmp_path, str(tmp_path), "found none")


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    """Several files without an index are named, because which one is meant is not known."""
    write_single(tmp_path, VALUES, "a.safetensors")
    save_file(VALUES, tmp_path / "b.safetensors")
    refused(tmp_path, "a.safetensors, b.safetensors", "index")


def test_two_indexes_are_refused(tmp_path: Path) -> None:
    """Two indexes in a folder are both named."""
    write_sharded(tmp_path, VALUES)
    (tmp_path / "other.safetensors.index.json").write_bytes((tmp_path / INDEX).read_bytes())
    refused(tmp_path, INDEX, "other.safetensors.index.json")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "model.gguf", "model.pkl", "model.npz"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    """A pickle, a GGUF or any other file is refused by its name, without being opened."""
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    refused(tmp_path / name, str(tmp_path / name), "not a .safetensors file")
    refused(tmp_path)


def test_a_folder_of_pickles_says_so(tmp_path: Path) -> None:
    """A folder that holds only a pickle names it and says that pickles are not read."""
    write_config(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(tmp_path, "diffusion_pytorch_model.bin", "a pickle can run code")


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path) -> None:
    """A shard that is not there is named beside its index."""
    write_sharded(tmp_path, VALUES)
    (tmp_path / SHARD).unlink()
    refused(tmp_path, str(tmp_path / INDEX), SHARD, "not there")


def test_a_listed_tensor_that_is_absent_is_refused(tmp_path: Path) -> None:
    """A tensor that the index promises and the shard lacks is named with the shard."""
    write_sharded(tmp_path, VALUES)
    (tmp_path / SHARD).unlink()
    save_file({"part.3.weight": VALUES["part.3.weight"]}, tmp_path / SHARD)
    refused(tmp_path, str(tmp_path / SHARD), f"tensor {FIRST} is missing")


def test_a_tensor_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    """A tensor that lies in a shard but not in the index is named with the shard."""
    write_sharded(tmp_path, VALUES)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    write_index(tmp_path, {name: file for name, file in weight_map.items() if name != "part.4.weight"})
    refused(tmp_path, "tensor part.4.weight is not listed")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "x.bin", "", 3, None, ["x"], "a\n.bin"]
)
def test_an_index_reaches_no_other_folder(file: Any, tmp_path: Path) -> None:
    """An index may name .safetensors files of its own folder and nothing else."""
    write_sharded(tmp_path / "a", VALUES)
    save_file(VALUES, tmp_path / "x.safetensors")
    write_index(tmp_path / "a", {FIRST: file})
    refused(tmp_path / "a", str(tmp_path / "a" / INDEX), FIRST, "not a .safetensors file name")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"])
def test_a_broken_index_is_refused(content: bytes, tmp_path: Path) -> None:
    """An index that is no JSON object with a weight_map is named."""
    write_sharded(tmp_path, VALUES)
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, str(tmp_path / INDEX))


def test_an_index_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    """A tensor listed twice in an index is refused, where plain JSON would take the second."""
    write_sharded(tmp_path, VALUES)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}')
    refused(tmp_path, str(tmp_path / INDEX), "stands twice")


def _entry(shape: list[Any], *offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


FOUR = b"\0" * 4
EIGHT = b"\0" * 8
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda p: p.write_bytes(b""), ["0 bytes"]),
    "short": (lambda p: p.write_bytes(b"\1\0\0"), ["3 bytes"]),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), ["bytes long, expected"]),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), ["cut short"]),
    "padded": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), ["bytes long, expected"]),
    "absurd header": (lambda p: write_raw(p, {}, length=2**63), ["cut short"]),
    "pickle in disguise": (lambda p: p.write_bytes(b"\x80\x04\x95" + b"x" * 100), ["not a safetensors file"]),
    "no JSON": (lambda p: write_raw(p, b"{nonsense"), ["not valid JSON"]),
    "no UTF-8": (lambda p: write_raw(p, b'{"\xff": 1}'), ["not valid JSON"]),
    "deep JSON": (lambda p: write_raw(p, b"[" * 200_000), ["not valid JSON"]),
    "no object": (lambda p: write_raw(p, []), ["not a JSON object"]),
    "name twice": (
        lambda p: write_raw(p, b'{"a": {"shape": [1]}, "a": {"shape": [1]}}', EIGHT),
        ["a stands twice"],
    ),
    "entry is no object": (lambda p: write_raw(p, {"a": 3}), ["tensor a", "dtype"]),
    "unknown dtype": (lambda p: write_raw(p, {"a": _entry([1], 0, 4, dtype="F4")}, FOUR), ["tensor a", "'F4'"]),
    "dtype is a list": (lambda p: write_raw(p, {"a": _entry([1], 0, 4, dtype=["F32"])}, FOUR), ["tensor a"]),
    "wrong byte count": (lambda p: write_raw(p, {"a": _entry([2], 0, 4)}, FOUR), ["tensor a", "4 bytes, expected 8"]),
    "backwards": (lambda p: write_raw(p, {"a": _entry([1], 4, 0)}, FOUR), ["tensor a", "expected 4"]),
    "negative shape": (lambda p: write_raw(p, {"a": _entry([-1, -1], 0, 4)}, FOUR), ["tensor a", "damaged"]),
    "fractional shape": (lambda p: write_raw(p, {"a": _entry([1.0], 0, 4)}, FOUR), ["tensor a", "damaged"]),
    "boolean shape": (lambda p: write_raw(p, {"a": _entry([True], 0, 4)}, FOUR), ["tensor a", "damaged"]),
    "three offsets": (lambda p: write_raw(p, {"a": _entry([1], 0, 4, 8)}, FOUR), ["tensor a", "damaged"]),
    "astronomical shape": (lambda p: write_raw(p, {"a": _entry([10**4000] * 4, 0, 4)}, FOUR), ["tensor a"]),
    "many axes": (lambda p: write_raw(p, {"a": _entry([2**40] * 900, 0, 4)}, FOUR), ["tensor a"]),
    "overlap": (
        lambda p: write_raw(p, {"a": _entry([1], 0, 4), "b": _entry([1], 2, 6)}, b"\0" * 6),
        ["tensor b", "overlap"],
    ),
    "gap": (lambda p: write_raw(p, {"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}, b"\0" * 12), ["tensor b", "gap"]),
    "gap at the start": (lambda p: write_raw(p, {"a": _entry([1], 4, 8)}, EIGHT), ["tensor a", "gap"]),
    "odd name": (lambda p: write_raw(p, {"a\nb\ud800": _entry([2], 0, 4)}, FOUR), ["'a\\nb\\ud800'"]),
    "long name": (lambda p: write_raw(p, {"a" * 9999: _entry([2], 0, 4)}, FOUR), ["aaa..."]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    """A file whose header or length is wrong gives one line naming it, and the tensor where there is one."""
    write_single(tmp_path, VALUES)
    make, words = DAMAGES[damage]
    make(tmp_path / SINGLE)
    refused(tmp_path, str(tmp_path / SINGLE), *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"dim": 1, "dim": 2}', "dim stands twice"),
        (b"{}", "missing config key"),
        (b'{"a\\nb": 1}', "unknown config key"),
        (b'{"quantization": "4bit"}', "quantization must be an object"),
    ],
)
def test_a_bad_config_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    """A config.json that is not one gives one line naming the file."""
    write_single(tmp_path, VALUES)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, str(tmp_path / "config.json"), word)


@pytest.mark.parametrize("place", [None, "layers.0.attention.to_q"])
@pytest.mark.parametrize(
    "entry",
    ['"group_size": "abc"', '"group_size": [64]', '"group_size": null', '"group_size": 1e400', '"group_size": -1',
     '"group_size": 0', '"group_size": true', '"group_size": 99999999999999999999', '"bits": 4.0', '"mode": "magic"',
     '"mode": ["affine"]'],
)  # fmt: skip
def test_a_quantization_that_cannot_be_is_refused(entry: str, place: str | None, tmp_path: Path) -> None:
    """An impossible group size, bits or mode, for all layers or for one, gives one line naming file, key and value."""
    write_single(tmp_path, VALUES)
    write_config(tmp_path, quantization="HERE")
    path = tmp_path / "config.json"
    inner = f'{{"{place}": {{{entry}}}}}' if place else f"{{{entry}}}"
    path.write_text(path.read_text().replace('"HERE"', inner))
    key = entry.split('"')[1]
    refused(tmp_path, str(path), f"quantization.{place}.{key} must be" if place else f"quantization.{key} must be")


def test_the_omni_variant_is_refused(tmp_path: Path) -> None:
    """A config with siglip_feat_dim is refused as the omni variant, with its file."""
    write_single(tmp_path, VALUES)
    write_config(tmp_path, siglip_feat_dim=1152)
    with pytest.raises(ConfigError, match="omni") as caught:
        sources.describe(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_a_folder_named_like_a_file_is_refused(tmp_path: Path) -> None:
    """A directory called x.safetensors is neither opened nor taken for weights."""
    write_config(tmp_path)
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path / SINGLE, "no config.json")
    refused(tmp_path, "found none")


def test_a_symlink_loop_is_refused(tmp_path: Path) -> None:
    """A link to itself is no checkpoint, as a source and inside one."""
    loop = tmp_path / SINGLE
    loop.symlink_to(loop)
    refused(loop)
    write_config(tmp_path)
    refused(tmp_path, "found none")


@pytest.mark.parametrize("part", ["config.json", SINGLE])
def test_a_file_that_may_not_be_read_is_refused(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system refuses becomes one line with the file and the reason."""
    write_single(tmp_path, VALUES)
    plain_open = Path.open

    def refusing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == part:
            raise PermissionError(13, "Permission denied", str(path))
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    line = refused(tmp_path, str(tmp_path / part), "Permission denied")
    assert "Errno" not in line


def test_a_file_that_vanished_has_no_digest(tmp_path: Path) -> None:
    """The digest of a checkpoint whose file is gone is refused in one line."""
    info = sources.describe(write_single(tmp_path, VALUES))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(WeightsError, match="No such file"):
        _ = info.digest


def test_the_digest_does_not_depend_on_the_files(tmp_path: Path) -> None:
    """One file, three shards and another file name have one digest."""
    written = (
        write_single(tmp_path / "a", VALUES),
        write_sharded(tmp_path / "b", VALUES),
        write_single(tmp_path / "c", dict(reversed(VALUES.items())), "c.safetensors"),
    )
    assert len({sources.describe(folder).digest for folder in written}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {FIRST: VALUES[FIRST] + np.float32(1e-6)},
        {FIRST: VALUES[FIRST].reshape(3, 2)},
        {FIRST: VALUES[FIRST].view(np.int32)},
        {"part.9.weight": VALUES[FIRST]},
    ],
    ids=["a value", "a shape", "a dtype", "one tensor more"],
)
def test_the_digest_changes_with_any_tensor(change: dict[str, Any], tmp_path: Path) -> None:
    """A changed value, shape, dtype or name gives another digest."""
    before = sources.describe(write_single(tmp_path / "a", VALUES)).digest
    assert sources.describe(write_single(tmp_path / "b", VALUES | change)).digest != before


@pytest.mark.parametrize("change", [{"norm_eps": 2e-5}, {"t_scale": 999.0}])
def test_the_digest_changes_with_the_config(change: dict[str, Any], tmp_path: Path) -> None:
    """Another config value gives another digest; keys that start with an underscore don't matter."""
    folder = write_single(tmp_path, VALUES)
    before = sources.describe(folder).digest
    write_config(folder, _note="x")
    assert sources.describe(folder).digest == before
    write_config(folder, **change)
    assert sources.describe(folder).digest != before


def test_one_flipped_bit_changes_the_digest(tmp_path: Path) -> None:
    """The digest covers every byte of the values."""
    folder = write_single(tmp_path, VALUES)
    before = sources.describe(folder).digest
    content = bytearray((folder / SINGLE).read_bytes())
    content[-1] ^= 1
    (folder / SINGLE).write_bytes(content)
    assert sources.describe(folder).digest != before


def test_describing_a_checkpoint_does_not_load_mlx(tmp_path: Path) -> None:
    """describe() and the digest work without importing MLX."""
    write_single(tmp_path, VALUES)
    code = (
        "import sys; from zimage import sources\n"
        "for s in sys.argv[1:]: sources.describe(s).digest\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'mlx'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "digits", "synthetic:turbo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_config_reads_back(tmp_path: Path) -> None:
    """The config of a folder is the one that was written."""
    write_single(tmp_path, VALUES)
    write_config(tmp_path, TransformerConfig.small())
    assert sources.describe(tmp_path).config == TransformerConfig.small()
