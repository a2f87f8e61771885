"""Loading a checkpoint strictly, and saving one that loads back bit for bit."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import CONFIG, INDEX, SINGLE, tensors, write_config, write_sharded, write_single
from zimage import backend, saving, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError, ZImageError
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

VALUES = tensors()
NAME = "layers.0.attention.to_k.weight"
# Every input width is divisible by the groups of 32 and 64 here.
MODES = ["2bit", "3bit", "4bit", "5bit", "6bit", "8bit", "4bit-g32", "mxfp4", "nvfp4", "mxfp8"]


def arrays(model: Transformer) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same_bits(a: Mapping[str, mx.array], b: Mapping[str, mx.array]) -> bool:
    """Whether two models' arrays have the same names, dtypes, shapes and bits."""
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and bytes(_raw(a[name])) == bytes(_raw(b[name]))
        for name in a
    )


def _raw(array: mx.array) -> Any:
    return memoryview(mx.contiguous(array).view(mx.uint8))


def digests(folder: Path) -> dict[str, str]:
    """Content and permissions of every file below a folder."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mode}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(source: Path, *words: str, **options: Any) -> str:
    """The one line with which loading `source` is refused; it holds all `words`."""
    with pytest.raises(ZImageError) as caught:
        weights.load_transformer(source, **options)
    line = str(caught.value)
    assert line.isprintable(), repr(line)
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_the_stored_values_are_loaded(write: Any, tmp_path: Path) -> None:
    """Every array of the model has exactly the values that another reader finds in the files."""
    folder = write(tmp_path, VALUES)
    stored: dict[str, NDArray[Any]] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    loaded = arrays(weights.load_transformer(folder, dtype="float32"))
    assert set(loaded) == set(stored)
    for name, array in loaded.items():
        assert np.array_equal(np.array(array), stored[name]), name


def test_loading_leaves_the_source_alone(tmp_path: Path) -> None:
    """Loading, with a dtype and a quantization, neither changes, adds nor removes a file of the source."""
    folder = write_sharded(tmp_path, VALUES)
    before = digests(folder)
    weights.load_transformer(folder, dtype="bfloat16")
    with pytest.raises(InputError):
        weights.load_transformer(folder, quantization="4bit")  # 170 is not divisible by 64
    assert digests(folder) == before


def test_without_a_dtype_the_device_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dtype None is what suits the device, float32 on a CPU, whatever is stored."""
    folder = write_single(tmp_path, {name: value.astype(np.float16) for name, value in VALUES.items()})
    monkeypatch.setattr(backend, "default_dtype", lambda: "float32")
    assert {a.dtype for a in arrays(weights.load_transformer(folder)).values()} == {mx.float32}
    monkeypatch.setattr(backend, "default_dtype", lambda: "bfloat16")
    assert {a.dtype for a in arrays(weights.load_transformer(folder)).values()} == {mx.bfloat16}
    assert weights.load_transformer("synthetic:tiny").dtype == mx.bfloat16


def test_a_cpu_computes_in_float32() -> None:
    """On a CPU the default dtype is float32, and digits, stored in bf16, load in it."""
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("this is a GPU")
    assert weights.load_transformer("digits").dtype == mx.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_obeyed(dtype: str, tmp_path: Path) -> None:
    """Every array has the dtype that was asked for, from files and without them."""
    wanted = {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
    for source in (write_single(tmp_path, VALUES), "synthetic:tiny"):
        assert {a.dtype for a in arrays(weights.load_transformer(source, dtype=dtype)).values()} == {wanted}


def test_float16_is_refused_with_its_reason(tmp_path: Path) -> None:
    """float16 is refused because activations overflow in it, and the line says what to use instead."""
    folder = write_single(tmp_path, VALUES)
    line = refused(folder, "float16", "overflow", "bfloat16 or float32", dtype="float16")
    assert line.count("overflow") == 1
    refused(folder, "'int8'", "bfloat16 or float32", dtype="int8")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """A missing tensor is named with the file and the shape it should have."""
    folder = write_single(tmp_path, {name: value for name, value in VALUES.items() if name != NAME})
    refused(folder, str(folder / SINGLE), f"tensor {NAME} is missing", "expected shape [64, 64]")


def test_several_missing_tensors_are_counted(tmp_path: Path) -> None:
    """Of several missing tensors one is named and the others are counted; of shards the folder is named."""
    folder = write_sharded(tmp_path, {name: value for name, value in VALUES.items() if ".feed_forward." not in name})
    refused(folder, str(folder), "feed_forward.w1.weight (and 8 more) is missing", "expected shape [170, 64]")


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    """A tensor that the config knows nothing of is named with its file."""
    folder = write_single(tmp_path, VALUES | {"layers.7.x": np.zeros(3, np.float32), "y": np.zeros(3, np.float32)})
    refused(folder, str(folder / SINGLE), "tensor layers.7.x (and 1 more) is unexpected")


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    """A tensor of another shape is named with its file, what was found and what was expected."""
    folder = write_single(tmp_path, VALUES | {NAME: np.zeros((64, 32), np.float32)})
    refused(folder, str(folder / SINGLE), f"tensor {NAME} has shape [64, 32], expected [64, 64]")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.float64, np.bool_])
def test_a_wrong_dtype_is_named(dtype: Any, tmp_path: Path) -> None:
    """A tensor stored as something else than a float is named with its file, what was found and what was expected."""
    folder = write_single(tmp_path, VALUES | {NAME: VALUES[NAME].astype(dtype)})
    refused(folder, str(folder / SINGLE), f"tensor {NAME} has dtype", "expected F32 or BF16 or F16")


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"n_layers": 2**31 - 1}, "layers.1."),
        ({"n_refiner_layers": 2**31 - 1}, "noise_refiner.1."),
        ({"dim": 2**20, "n_heads": 2**15, "n_kv_heads": 2**15}, "x_pad_token"),
        ({"cap_feat_dim": 2**31 - 1}, "cap_embedder.0.weight"),
        ({"in_channels": 2**31 - 1}, "all_final_layer.2-1.linear.bias"),
        ({"all_patch_size": [2, 2**30], "all_f_patch_size": [1, 1]}, f"all_x_embedder.{2**30}-1.bias"),
        ({"n_layers": 2}, "layers.1."),
    ],
)
def test_a_config_of_another_model_is_refused_at_once(change: dict[str, Any], tmp_path: Path, tensor: str) -> None:
    """Sizes that the tensors don't have are refused before a model of those sizes is built, however large."""
    folder = write_single(tmp_path, VALUES)
    write_config(folder, **change)
    refused(folder, tensor)


def test_a_file_that_vanishes_while_loading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own error at a file that cannot be read becomes one line naming it."""
    folder = write_single(tmp_path, VALUES)
    info = weights.describe(folder)
    (folder / SINGLE).unlink()
    monkeypatch.setattr(weights, "describe", lambda _: info)
    refused(folder, str(folder / SINGLE), "cannot be read")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_loads_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """A floating-point model that is saved and loaded has the same config, names, dtypes and bits."""
    model = weights.load_transformer("synthetic:tiny", dtype=dtype)
    folder = weights.save_transformer(model, tmp_path / "a")
    back = weights.load_transformer(folder, dtype=dtype)
    assert back.config == model.config
    assert same_bits(arrays(back), arrays(model))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_model_loads_bit_for_bit(mode: str, dtype: str, tmp_path: Path) -> None:
    """A quantized model that is saved and loaded without a dtype has the same names, dtypes and bits, and output."""
    model = transforms.quantize(Transformer(QUANTIZABLE, dtype=transforms.parse_dtype(dtype)), mode)
    back = weights.load_transformer(weights.save_transformer(model, tmp_path / "a"))
    assert same_bits(arrays(back), arrays(model))
    assert transforms.quantization_of(back) == transforms.quantization_of(model)


QUANTIZABLE = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), n_layers=1)


def test_the_quantization_entry_is_written_as_mlx_lm_does(tmp_path: Path) -> None:
    """config.json's entry has bits, group_size and mode, and layers packed otherwise have an entry of their own."""
    model = transforms.quantize(Transformer(QUANTIZABLE), "4bit")
    attention = model.layers[0].attention
    other = transforms.quantize(Transformer(QUANTIZABLE), "8bit-g32")
    attention.to_q = other.layers[0].attention.to_q
    folder = weights.save_transformer(model, tmp_path / "a")
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert entry == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "layers.0.attention.to_q": {"group_size": 32, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    assert same_bits(arrays(weights.load_transformer(folder)), arrays(model))


@pytest.mark.parametrize("mode", [None, "4bit", "mxfp8"])
def test_a_fused_model_is_saved_unfused(mode: str | None, tmp_path: Path) -> None:
    """A fused model is saved under the published names, and is there the plain model bit for bit."""
    model = Transformer(QUANTIZABLE)
    plain = model if mode is None else transforms.quantize(model, mode)
    fused = transforms.fuse_gate_up(transforms.fuse_qkv(plain))
    assert "layers.0.attention.to_qkv.weight" in arrays(fused)
    folder = weights.save_transformer(fused, tmp_path / "a")
    assert set(weights.describe(folder).tensors) == set(arrays(plain))
    assert same_bits(arrays(weights.load_transformer(folder)), arrays(plain))


def test_a_quantized_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    """A checkpoint packed from bf16 loads in bf16 also on a CPU, and in another dtype when asked."""
    model = transforms.quantize(Transformer(QUANTIZABLE, dtype=mx.bfloat16), "4bit")
    folder = weights.save_transformer(model, tmp_path / "a")
    assert weights.load_transformer(folder).dtype == mx.bfloat16
    assert weights.load_transformer(folder, dtype="float32").dtype == mx.float32


def test_a_checkpoint_packed_from_float16_does_not_compute_in_it(tmp_path: Path) -> None:
    """Scales stored in fp16 are cast to what suits the device, because fp16 overflows."""
    folder = weights.save_transformer(transforms.quantize(Transformer(QUANTIZABLE), "4bit"), tmp_path / "a")
    stored = load_file(folder / SINGLE)
    halved = {name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in stored.items()}
    save_file(halved, folder / SINGLE)
    assert weights.load_transformer(folder).dtype == transforms.parse_dtype(backend.default_dtype())


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    """A quantized checkpoint is not quantized again, before anything is loaded."""
    folder = weights.save_transformer(transforms.quantize(Transformer(QUANTIZABLE), "4bit"), tmp_path / "a")
    refused(folder, "quantized already", quantization="8bit")


@pytest.mark.parametrize(
    "entry",
    [{"bits": 7}, {"bits": "4"}, {"mode": "magic"}, {"group_size": 48}, {"group_size": -1}, {"bits": 8},
     {"group_size": None, "bits": 2}, {"layers.0.attention.to_q": {"bits": 8}},
     {"layers.0.attention.to_q": {"mode": "mxfp4"}}],
    ids=str,
)  # fmt: skip
def test_a_wrong_quantization_entry_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    """An entry that is impossible or does not fit the packed tensors gives one line."""
    folder = weights.save_transformer(transforms.quantize(Transformer(QUANTIZABLE), "4bit"), tmp_path / "a")
    write_config(folder, QUANTIZABLE, quantization={"bits": 4, "group_size": 64, "mode": "affine", **entry})
    refused(folder)


def test_a_quantization_entry_must_match_the_tensors(tmp_path: Path) -> None:
    """Packed tensors without an entry load as their shapes show; an entry without packed tensors is refused."""
    packed = weights.save_transformer(transforms.quantize(Transformer(QUANTIZABLE), "4bit"), tmp_path / "a")
    before = arrays(weights.load_transformer(packed))
    write_config(packed, QUANTIZABLE)
    assert same_bits(arrays(weights.load_transformer(packed)), before)
    folder = write_single(tmp_path / "b", VALUES)
    write_config(folder, quantization={"bits": 4, "group_size": 64})
    refused(folder, "no tensor has scales")


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_convert_keeps_the_synthetic_label(quantization: str | None, tmp_path: Path) -> None:
    """Synthetic weights are still called synthetic after being saved, and after being saved again."""
    first = weights.convert("synthetic:small", tmp_path / "a", quantization=quantization)
    second = weights.convert(first, tmp_path / "b")
    assert [weights.describe(folder).kind for folder in (first, second)] == ["synthetic", "synthetic"]
    trained = weights.convert(write_single(tmp_path / "c", VALUES), tmp_path / "d")
    assert weights.describe(trained).kind == "trained"


def test_convert_makes_missing_folders(tmp_path: Path) -> None:
    """The target's parents are made, and a target that is an empty folder is used."""
    folder = weights.convert("synthetic:tiny", tmp_path / "a" / "b" / "c")
    assert weights.load_transformer(folder).config == TransformerConfig.tiny()
    (tmp_path / "empty").mkdir()
    assert weights.convert("synthetic:tiny", tmp_path / "empty") == tmp_path / "empty"


def test_convert_refuses_a_taken_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a folder with something in it or a link is not overwritten, which is said before anything is loaded."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.setattr(weights, "load_transformer", None)
    for name in ("full", "file", "link"):
        with pytest.raises(WeightsError, match=f"{name} exists and is not an empty folder"):
            weights.convert("synthetic:tiny", tmp_path / name)
    with pytest.raises(WeightsError, match="cannot be saved"):
        weights.convert("synthetic:tiny", tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[write] no"), KeyboardInterrupt()]
)
def test_a_failing_save_leaves_nothing_behind(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing fails or is stopped there is no target, no partial folder and no new parent."""

    def failing(path: Path, *_: Any) -> None:
        path.write_bytes(b"x")
        raise error

    monkeypatch.setattr(saving, "write_safetensors", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WeightsError):
        weights.save_transformer(Transformer(CONFIG), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_not_taken_for_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that stops early without an error is noticed, and leaves nothing behind."""
    whole = saving.write_safetensors

    def short(path: Path, *arguments: Any) -> None:
        whole(path, *arguments)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(saving, "write_safetensors", short)
    with pytest.raises(WeightsError, match="bytes long"):
        weights.save_transformer(Transformer(CONFIG), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_kind_is_one_of_two(tmp_path: Path) -> None:
    """A kind that is neither trained nor synthetic is refused and nothing is written."""
    with pytest.raises(InputError, match="'trained' or 'synthetic'"):
        weights.save_transformer(Transformer(CONFIG), tmp_path / "a", kind="other")
    assert list(tmp_path.iterdir()) == []


def test_several_patch_sizes_and_grouped_queries_are_saved_and_loaded(tmp_path: Path) -> None:
    """A config with two patch sizes, fewer key heads and no QK norm goes through saving and loading."""
    config = TransformerConfig.tiny(
        n_kv_heads=1, qk_norm=False, all_patch_size=(1, 2), all_f_patch_size=(1, 1), n_refiner_layers=0
    )
    model = Transformer(config)
    back = weights.load_transformer(weights.save_transformer(model, tmp_path / "a"), dtype="float32")
    assert back.config == config
    assert same_bits(arrays(back), arrays(model))


def test_shards_with_a_stray_file_beside_them_are_loaded(tmp_path: Path) -> None:
    """Where there is an index, a .safetensors file that it doesn't name is left out."""
    folder = write_sharded(tmp_path, VALUES)
    save_file({"x": np.zeros(3, np.float32)}, folder / "adapter.safetensors")
    assert (folder / INDEX).is_file()
    assert weights.load_transformer(folder).config == CONFIG
