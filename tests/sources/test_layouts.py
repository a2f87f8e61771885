"""Checkpoints as other tools leave them: ComfyUI's single file, mflux's saved folders, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.checkpoints import CONFIG, SINGLE, tensors, write_config, write_single
from tests.test_weights import arrays, same_bits
from zimage import sources, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, WeightsError, ZImageError
from zimage.sources.published import shapes

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from safetensors.numpy import save_file

# The published model but for its sizes, so that a config can be told from the tensors.
SHAPED = replace(
    TransformerConfig.turbo(), dim=256, n_heads=2, n_kv_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=64,
)  # fmt: skip
MFLUX = replace(SHAPED, dim=384, n_heads=3, n_kv_heads=3)  # what tests/data/mflux_saved.json was saved from
MFLUX_SAVED = json.loads((Path(__file__).parents[1] / "data" / "mflux_saved.json").read_text())
NUMPY = {"BF16": mx.bfloat16, "U32": mx.uint32, "F32": mx.float32}


def comfy(values: dict[str, NDArray[Any]], prefix: str = "") -> dict[str, NDArray[Any]]:
    """The tensors under the names of ComfyUI's single file, with one matrix for three projections."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in values.items():
        if name.endswith(".to_q.weight"):
            base = name.removesuffix(".to_q.weight")
            rows = [values[f"{base}.to_{p}.weight"] for p in "qkv"]
            found[f"{prefix}{base}.qkv.weight"] = np.concatenate(rows)
            continue
        if name.endswith((".to_k.weight", ".to_v.weight")):
            continue
        own = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        own = own.replace("norm_q", "q_norm").replace("norm_k", "k_norm").replace("to_out.0", "out")
        found[prefix + own] = value
    return {**found, f"{prefix}norm_final.weight": np.ones(values["x_pad_token"].shape[1], np.float32)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, n_kv_heads=1)], ids=["as many heads", "fewer key heads"])
def test_comfyuis_file_is_the_same_model(config: TransformerConfig, prefix: str, tmp_path: Path) -> None:
    """A file under ComfyUI's names, fused projections and all, gives the same arrays and digest as the published."""
    values = tensors(config)
    plain = write_single(tmp_path / "plain", values)
    write_config(plain, config)
    (tmp_path / "comfy").mkdir()
    save_file(comfy(dict(values), prefix), tmp_path / "comfy" / "z_image.safetensors")
    write_config(tmp_path / "comfy", config)
    file = tmp_path / "comfy" / "z_image.safetensors"
    assert sources.describe(file).digest == sources.describe(plain).digest
    loaded = [arrays(weights.load_transformer(source, dtype="float32")) for source in (plain, file)]
    assert same_bits(*loaded)


def test_a_full_comfyui_checkpoint_loads_its_transformer(tmp_path: Path) -> None:
    """The text encoder and the VAE in a ComfyUI checkpoint are left out."""
    values = comfy(dict(tensors()), "model.diffusion_model.")
    values["text_encoders.qwen3_4b.transformer.model.norm.weight"] = np.ones(3, np.int64)
    values["text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.scale_weight"] = np.ones((), np.float32)
    values["vae.decoder.conv_in.weight"] = np.ones((1, 1, 3, 3), np.float16)
    write_config(tmp_path)
    save_file(values, tmp_path / "full.safetensors")
    assert weights.load_transformer(tmp_path / "full.safetensors").config == CONFIG


@pytest.mark.parametrize("names", ["published", "comfyui"])
def test_a_file_without_config_tells_its_own(names: str, tmp_path: Path) -> None:
    """Without a config.json the sizes come from the tensors and the rest from the published model."""
    values = dict(tensors(SHAPED))
    save_file(values if names == "published" else comfy(values), tmp_path / "a.safetensors")
    for source in (tmp_path / "a.safetensors", tmp_path):
        info = sources.describe(source)
        assert info.config == SHAPED
        info.check()


def test_other_heads_do_not_tell_the_config(tmp_path: Path) -> None:
    """A model whose heads are not the published ones needs its config.json, and the line says so."""
    save_file(dict(tensors()), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a.safetensors: no config.json .* 32 wide, not 128 .* config.json there"):
        sources.describe(tmp_path / "a.safetensors")


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    """A tensor under two tools' names at once is refused, naming both."""
    values = dict(tensors())
    values["x_embedder.bias"] = values["all_x_embedder.2-1.bias"]
    with pytest.raises(WeightsError, match=r"all_x_embedder.2-1.bias and x_embedder.bias are both"):
        sources.describe(write_single(tmp_path, values))


@pytest.mark.parametrize("shape", [(64, 64), (129, 64), (192,), (3, 0)])
def test_a_fused_projection_of_odd_rows_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A fused projection that does not hold three is named with its shape."""
    values = {**comfy(dict(tensors())), "layers.0.attention.qkv.weight": np.zeros(shape, np.float32)}
    with pytest.raises(WeightsError, match=r"tensor layers.0.attention.qkv.weight has shape .* three projections"):
        sources.describe(write_single(tmp_path, values))


@pytest.mark.parametrize("bits", ["None", "4", "8"])
@pytest.mark.parametrize("with_config", [False, True])
def test_what_mflux_saves_loads(bits: str, with_config: bool, tmp_path: Path) -> None:
    """Folders with the names, dtypes and shapes that mflux 0.24 writes load, packed ones bit for bit."""
    made = weights.Transformer(MFLUX, dtype=mx.bfloat16)
    if bits != "None":
        transforms.pack(made, lambda _, __: transforms.Quantization("affine", int(bits), 64))
    named = {
        name.replace("t_embedder.mlp.0", "t_embedder.linear1").replace("t_embedder.mlp.2", "t_embedder.linear2")
        .replace("all_final_layer.2-1.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.0"): array
        for name, array in arrays(made).items()
    }  # fmt: skip
    saved = MFLUX_SAVED[bits]
    assert {n: (NUMPY[dtype], tuple(shape)) for n, (dtype, shape) in saved["tensors"].items()} == {
        n: (a.dtype, a.shape) for n, a in named.items()
    }
    folder = tmp_path / "transformer"
    folder.mkdir()
    mx.save_safetensors(str(folder / "0.safetensors"), named, saved["metadata"])
    index = {"metadata": saved["metadata"], "weight_map": dict.fromkeys(named, "0.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if with_config:
        write_config(folder, MFLUX)
    info = sources.describe(tmp_path)
    assert info.config == MFLUX
    assert {str(packed) for packed in info.packing.values()} == (set() if bits == "None" else {f"{bits}bit"})
    loaded = weights.load_transformer(tmp_path, dtype=None if info.packing else "bfloat16")
    assert same_bits(arrays(loaded), arrays(made))
    ours = weights.save_transformer(made, tmp_path / "ours")
    assert sources.describe(ours).digest == info.digest


FOREIGN: dict[str, tuple[str, Any, str]] = {
    "scaled fp8": ("layers.0.attention.to_q.scale_weight", np.ones(1, np.float32), "scaled fp8"),
    "scaled fp8, newer": ("layers.0.attention.qkv.weight_scale", np.ones((), np.float32), "scaled fp8"),
    "comfy_quant": ("layers.0.attention.qkv.comfy_quant", np.ones(8, np.uint8), "scaled fp8 or fp4"),
    "omni": ("siglip_embedder.0.weight", np.ones(8, np.float32), "omni variant"),
    "bitsandbytes": ("layers.0.attention.to_q.weight.absmax", np.ones(8, np.float32), "packed by another library"),
    "lora": ("layers.0.attention.to_q.lora_A.weight", np.ones((4, 64), np.float32), "--lora"),
    "controlnet": ("control_layers.0.attention.to_q.weight", np.ones((4, 64), np.float32), "ControlNet"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_of_weights_are_refused_with_a_way_out(kind: str, tmp_path: Path) -> None:
    """A format that is known and not read is refused by name, with the tensor and what to do."""
    name, value, words = FOREIGN[kind]
    with pytest.raises(WeightsError, match=words) as caught:
        sources.describe(write_single(tmp_path, {**tensors(), name: value}))
    assert name in str(caught.value)


def test_plain_fp8_is_refused(tmp_path: Path) -> None:
    """Weights in fp8 are refused with the dtype and the way out."""
    folder = write_single(tmp_path, tensors())
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["x_pad_token"]
    entry["dtype"], entry["shape"] = "F8_E4M3", [4, entry["shape"][1]]
    raw = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    with pytest.raises(WeightsError, match=r"x_pad_token has dtype F8_E4M3, expected F32 .*--quantization"):
        sources.describe(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("z-image-Q4_K.gguf", b"GGUF\3\0\0\0", "GGUF; take the .safetensors"),
        ("z.safetensors", b"GGUF\3\0\0\0" + b"\0" * 99, "it is a GGUF file"),
        ("model.ckpt", b"PK\3\4", "a pickle can run code"),
        ("z.safetensors", b"PK\3\4" + b"\xff" * 99, "looks like a pickle"),
    ],
)
def test_gguf_and_pickles_are_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    """GGUF and pickles are known by name or by their first bytes, and refused with the reason."""
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(WeightsError, match=words):
            sources.describe(source)


def test_weights_packed_by_another_library_are_refused(tmp_path: Path) -> None:
    """A config that says who packed the weights is refused with that name."""
    folder = write_single(tmp_path, tensors())
    write_config(folder, quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    with pytest.raises(WeightsError, match="packed by 'bitsandbytes'"):
        sources.describe(folder)


def test_the_list_of_tensors_is_the_models() -> None:
    """The names and shapes known without MLX are those of the model, for configs of every kind."""
    for config in (
        TransformerConfig.turbo(), TransformerConfig.small(), MFLUX, CONFIG,
        TransformerConfig.tiny(n_kv_heads=1, qk_norm=False, all_patch_size=(1, 2), all_f_patch_size=(1, 1)),
    ):  # fmt: skip
        model = weights.Transformer(config)
        assert dict(shapes(config)) == {name: array.shape for name, array in tree_flatten(model.parameters())}


def test_parameters_are_counted_by_part() -> None:
    """The published model has 6,154,908,736 parameters, packed or not, nearly all of them in its main blocks."""
    counts = sources.describe("synthetic:turbo").parameters()
    assert sum(counts.values()) == 6_154_908_736
    assert counts["layers"] == 5_427_310_080


@pytest.mark.parametrize("part", ["config.json", SINGLE, "captions.safetensors"])
def test_a_link_out_of_the_folder_is_refused(part: str, tmp_path: Path) -> None:
    """A file of a checkpoint that is a link to somewhere else is refused; a link to the folder itself is followed."""
    folder = write_single(tmp_path / "a", tensors())
    (folder / "captions.safetensors").write_bytes(b"x")
    (tmp_path / "linked").symlink_to(folder)
    assert sources.describe(tmp_path / "linked").config == CONFIG
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    for source in (folder, tmp_path / "linked"):
        with pytest.raises(ZImageError, match=r"a link out of the checkpoint's folder, to .*elsewhere"):
            sources.describe(source)


def test_a_linked_transformer_folder_and_shard_are_refused(tmp_path: Path) -> None:
    """A root whose transformer/ is a link to another place is refused."""
    write_single(tmp_path / "elsewhere", tensors())
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="a link out of"):
        sources.describe(tmp_path / "root")


def test_an_omni_config_says_so(tmp_path: Path) -> None:
    """The omni variant is refused by its config before its tensors are looked at."""
    folder = write_single(tmp_path, tensors())
    write_config(folder, siglip_feat_dim=1152)
    with pytest.raises(ConfigError, match="omni"):
        sources.describe(folder)
