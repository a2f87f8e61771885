"""Reading LoRA adapters: every tool's names, where alpha comes from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.loras import BLOCK, CONFIG, STYLES, Array, Pair, delta, named, pairs, write
from tests.parity.cases import relative_l2, to_bfloat16
from zimage import adapters
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError
from zimage.transformer import Transformer

import mlx.nn as nn
import numpy as np
import pytest

PAIRS = pairs(only=BLOCK)
QUERY = f"{BLOCK}.attention.to_q"
DOWN, UP, ALPHA = (f"transformer.{QUERY}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha"))
ONE = named({QUERY: PAIRS[QUERY]})
every_style = pytest.mark.parametrize("style", STYLES)


def file(folder: Path, tensors: dict[str, Any], metadata: Any = None) -> Path:
    return write(folder / "adapter.safetensors", tensors, metadata)


def deltas(path: Path, config: TransformerConfig = CONFIG) -> dict[str, Array]:
    """What a file adds to each layer, factor included."""
    return {module: delta(update.values()) for module, update in adapters.read(path, config).items()}


def adds(path: Path, wanted: dict[str, Pair], factor: float = 1.0, config: TransformerConfig = CONFIG) -> None:
    """Assert that a file changes just the layers of `wanted`, by factor * up @ down."""
    found = deltas(path, config)
    assert set(found) == set(wanted)
    for module, pair in wanted.items():
        assert relative_l2(found[module], delta(pair, factor)) < 1e-6, module


def refused(path: Path, *words: str, config: TransformerConfig = CONFIG) -> str:
    """The one line with which reading `path` is refused; it holds all `words`."""
    with pytest.raises(WeightsError) as caught:
        adapters.read(path, config)
    line = str(caught.value)
    assert line.isprintable(), repr(line)
    assert len(line) < 3000
    for word in words:
        assert word in line, line
    return line


def test_the_linear_layers_are_those_of_the_model() -> None:
    """The table of layers that adapters may change has every linear layer of the model, with its shape."""
    for config in (CONFIG, TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1))):
        linear = {path: m.weight.shape for path, m in Transformer(config).named_modules() if isinstance(m, nn.Linear)}
        assert adapters.linears(config) == linear


@every_style
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_style_names_every_layer(style: str, alpha: float | None, tmp_path: Path) -> None:
    """In each tool's style, with alphas or without, a file for all layers changes all of them by alpha / rank * B A."""
    every = pairs()
    path = file(tmp_path, named(every, style, alpha))
    adds(path, every, 1.0 if alpha is None else alpha / 4)


@every_style
def test_fused_projections_are_split_by_their_rows(style: str, tmp_path: Path) -> None:
    """One attention.qkv changes to_q, to_k and to_v by their rows of it, also where keys have fewer heads."""
    down = PAIRS[QUERY][0]
    ups = [PAIRS[f"{BLOCK}.attention.to_{p}"][1] for p in "qkv"]
    assert ups[0].shape[0] > ups[1].shape[0]
    path = file(tmp_path, named({f"{BLOCK}.attention.qkv": (down, np.concatenate(ups))}, style, 8.0))
    adds(path, {f"{BLOCK}.attention.to_{p}": (down, up) for p, up in zip("qkv", ups, strict=True)}, 2.0)


@every_style
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (f"{BLOCK}.attention.out", f"{BLOCK}.attention.to_out.0"),
        ("x_embedder", "all_x_embedder.2-1"),
        ("final_layer.linear", "all_final_layer.2-1.linear"),
        ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ],
)
def test_comfyui_names(theirs: str, ours: str, style: str, tmp_path: Path) -> None:
    """The names that ComfyUI's single file has for other layers are known in every style."""
    pair = pairs()[ours]
    adds(file(tmp_path, named({theirs: pair}, style)), {ours: pair})


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TransformerConfig.turbo(),
        TransformerConfig.tiny(n_layers=23, n_refiner_layers=12),
        TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1)),
    ],
)
def test_no_two_layers_share_a_name(config: TransformerConfig) -> None:
    """Of any config's names, no two that mean different layers become the same with underscores for dots."""
    known = adapters.modules(config)
    seen: dict[str, Any] = {}
    for module in known.values():
        assert seen.setdefault(module.name.replace(".", "_"), module.parts) == module.parts
    assert {part for module in known.values() for part, _ in module.parts} == set(adapters.linears(config))


def test_short_names_need_one_patch_size(tmp_path: Path) -> None:
    """Where a model has several patch sizes, x_embedder is no layer of it; the full names are."""
    config = TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1))
    pair = pairs(config)["all_x_embedder.1-1"]
    refused(file(tmp_path, named({"x_embedder": pair})), "does not have", config=config)
    adds(file(tmp_path, named({"all_x_embedder.1-1": pair})), {"all_x_embedder.1-1": pair}, config=config)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bf16"])
def test_stored_dtypes(dtype: str, tmp_path: Path) -> None:
    """Pairs stored in fp32, fp16 or bf16 are read as exactly the values stored."""
    stored, wanted = {}, {}
    for role, name in (("down", DOWN), ("up", UP)):
        values = to_bfloat16(ONE[name])
        stored[name] = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values.astype(dtype)
        wanted[role] = values if dtype == "bf16" else stored[name].astype(np.float32)
    down, up = adapters.read(file(tmp_path, stored), CONFIG)[QUERY].values()
    assert np.array_equal(down, wanted["down"])
    assert np.array_equal(up, wanted["up"])


@pytest.mark.parametrize(
    "alpha",
    [np.float32(2), np.float16(2), np.float64(2), np.int64(2), np.int32(2), np.float32([2]), np.uint16(0x4000)],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_alpha_tensors(alpha: Any, tmp_path: Path) -> None:
    """alpha is a scalar of any usual dtype, bf16 among them (its bits here), also as a list of one."""
    adds(file(tmp_path, {**ONE, ALPHA: alpha}), {QUERY: PAIRS[QUERY]}, 0.5)


def test_numbers_that_lead_away_from_one_are_right(tmp_path: Path) -> None:
    """alpha may be negative, zero or far from the rank: the update is alpha / rank of the product all the same."""
    for alpha in (-3.0, 1e-6, 512.0):
        adds(file(tmp_path, {**ONE, ALPHA: np.float32(alpha)}), {QUERY: PAIRS[QUERY]}, float(np.float32(alpha)) / 4)
    assert not deltas(file(tmp_path, {**ONE, ALPHA: np.float32(0)}))[QUERY].any()


SETTINGS: list[tuple[dict[str, Any], float]] = [
    ({"r": 4, "lora_alpha": 8}, 2.0),
    ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    ({"r": 4}, 1.0),
    ({"r": None, "lora_alpha": None, "use_rslora": None, "rank_pattern": None, "alpha_pattern": None}, 1.0),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attention.to_q": 2}}, 0.5),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{QUERY}": 2.0}}, 0.5),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers\\.1\\.attention\\.to_q$": 2}}, 0.5),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^attention.to_q": 2, "o_q": 2, "to_k": 2}}, 2.0),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 1, "to_q": 2, "attention.to_q": 3}}, 0.5),
    ({"r": 16, "lora_alpha": 8, "rank_pattern": {"to_q": 4}}, 2.0),
    ({"r": 16, "lora_alpha": 16, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 4}}, 1.0),
    ({"r": 4, "lora_alpha": 8, "init_lora_weights": True, "target_modules": ["to_q"], "peft_type": "LORA"}, 2.0),
    ({"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}, 2.0),
]
every_setting = pytest.mark.parametrize(("settings", "factor"), SETTINGS)


@every_setting
def test_settings_in_the_metadata(settings: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """Without alpha tensors, the metadata that diffusers writes says alpha, as PEFT understands it."""
    packed = {**{f"transformer.{k}": v for k, v in settings.items()}, "text_encoder.lora_alpha": 77}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}
    adds(file(tmp_path, ONE, metadata), {QUERY: PAIRS[QUERY]}, factor)


@every_setting
def test_settings_beside_the_file(settings: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """Without alpha tensors and metadata, adapter_config.json beside the file says alpha, as PEFT understands it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    adds(file(tmp_path, ONE, {"format": "pt"}), {QUERY: PAIRS[QUERY]}, factor)


def test_the_nearest_alpha_counts(tmp_path: Path) -> None:
    """A layer's own alpha counts before the metadata, and the metadata before the file beside it, which isn't read."""
    (tmp_path / "adapter_config.json").write_text("{broken", encoding="utf-8")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})}
    adds(file(tmp_path, {**ONE, ALPHA: np.float32(1)}, metadata), {QUERY: PAIRS[QUERY]}, 0.25)
    adds(file(tmp_path, {**ONE, ALPHA: np.float32(1)}), {QUERY: PAIRS[QUERY]}, 0.25)
    adds(file(tmp_path, ONE, metadata), {QUERY: PAIRS[QUERY]}, 4.0)
    refused(file(tmp_path, ONE), "adapter_config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], ["expected a JSON object, found list"]),
        ({"r": 0}, ["r must be a positive integer, found 0"]),
        ({"r": True}, ["r must be a positive integer, found True"]),
        ({"r": 8}, ["says rank 8 for layers.1.attention.to_q, found rank 4"]),
        ({"lora_alpha": "8"}, ["lora_alpha must be a finite number, found '8'"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha must be a finite number, found nan"]),
        ({"lora_alpha": 10**400}, ["lora_alpha must be a finite number"]),
        ({"use_rslora": 1}, ["use_rslora must be true or false, found 1"]),
        ({"alpha_pattern": [1]}, ["alpha_pattern must be an object, found list"]),
        ({"alpha_pattern": {"to_q": None}}, ["alpha_pattern.to_q must be a finite number, found NoneType"]),
        ({"rank_pattern": {"to_q": 4.0}}, ["rank_pattern.to_q must be a positive integer, found 4.0"]),
        ({"rank_pattern": {"(a+)+b": 4}}, ["'(a+)+b'", "not expressions"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "base weights of its own"]),
    ],
)
def test_impossible_settings_are_refused(settings: Any, words: list[str], tmp_path: Path) -> None:
    """Settings that PEFT could not have written, that are another adapter's, or that need an expression are refused."""
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps(settings), encoding="utf-8")
    refused(file(tmp_path, ONE), "adapter_config.json", *words)
    beside.unlink()
    refused(file(tmp_path, ONE, {"lora_adapter_metadata": json.dumps(settings)}), "lora_adapter_metadata", *words)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, 5, None, "\udc80", "nul", '{"r": ' + "9" * 5000 + "}"])
def test_broken_metadata_is_refused(text: Any, tmp_path: Path) -> None:
    """Metadata that is not JSON, not text or nested without end is refused with the place."""
    refused(file(tmp_path, ONE, {"lora_adapter_metadata": text}), "lora_adapter_metadata")


def test_endless_settings_are_refused(tmp_path: Path) -> None:
    """An adapter_config.json of many megabytes is not read whole."""
    (tmp_path / "adapter_config.json").write_bytes(b" " * 5_000_000 + b"{}")
    refused(file(tmp_path, ONE), "adapter_config.json", "longer than")


OTHER_KINDS = {
    f"transformer.{QUERY}.dora_scale": "DoRA",
    f"base_model.model.{QUERY}.lora_magnitude_vector": "DoRA",
    f"base_model.model.{QUERY}.lora_magnitude_vector.default.weight": "DoRA",
    f"lora_unet_{QUERY.replace('.', '_')}.lokr_w1": "LoKr",
    f"lora_unet_{QUERY.replace('.', '_')}.hada_w1_a": "LoHa",
    f"transformer.{QUERY}.oft_R.weight": "OFT",
    f"transformer.{QUERY}.lora_mid.weight": "convolutions",
    f"diffusion_model.{QUERY}.diff": "full difference",
    "diffusion_model.cap_embedder.1.diff_b": "full difference",
    f"transformer.{QUERY}.lora_B.bias": "bias of a LoRA",
    f"lora_unet_{QUERY.replace('.', '_')}.lora_up.bias": "bias of a LoRA",
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused(name: str, tmp_path: Path) -> None:
    """What is not plain LoRA is recognised, alone or beside a pair, and the line names its kind and a way out."""
    for tensors in ({name: np.zeros((4, 4), np.float32)}, {**ONE, name: np.zeros((4, 4), np.float32)}):
        refused(file(tmp_path, tensors), name, OTHER_KINDS[name], "merge it with the tool that made it")


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_up.weight",
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_layers_0_mlp.alpha",
        "base_model.model.text_encoder.layers.0.lora_A.weight",
    ],
)
def test_text_encoders_are_refused(name: str, tmp_path: Path) -> None:
    """A tensor of the text encoder is recognised; the line says that only the transformer is adapted."""
    refused(file(tmp_path, {**ONE, name: np.zeros((4, 4), np.float32)}), name, "transformer only")


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "no up": (lambda t: t.pop(UP), [DOWN, "has no up beside it"]),
    "no down": (lambda t: t.pop(DOWN), [UP, "has no down beside it"]),
    "only an alpha": (
        lambda t: t.update({f"transformer.{BLOCK}.attention.to_k.alpha": np.float32(1)}),
        ["attention.to_k.alpha has no down beside it"],
    ),
    "the input is too narrow": (
        lambda t: t.update({DOWN: np.zeros((4, 191), np.float32)}),
        [DOWN, "has shape [4, 191], expected [4, 192]"],
    ),
    "too many outputs": (
        lambda t: t.update({UP: np.zeros((200, 4), np.float32)}),
        [UP, "has shape [200, 4], expected [192, 4]"],
    ),
    "ranks differ": (
        lambda t: t.update({UP: np.zeros((192, 5), np.float32)}),
        [UP, "has shape [192, 5], expected [192, 4]"],
    ),
    "a convolution": (
        lambda t: t.update({DOWN: np.zeros((4, 192, 1, 1), np.float32)}),
        [DOWN, "has shape [4, 192, 1, 1], expected [rank, 192]"],
    ),
    "transposed": (lambda t: t.update({DOWN: t[DOWN].T.copy()}), [DOWN, "expected [192, 192]"]),
    "rank 0": (
        lambda t: t.update({DOWN: np.zeros((0, 192), np.float32), UP: np.zeros((192, 0), np.float32)}),
        [DOWN, "has rank 0"],
    ),
    "fp64": (lambda t: t.update({DOWN: t[DOWN].astype(np.float64)}), [DOWN, "dtype F64, expected F32 or BF16 or F16"]),
    "integers": (lambda t: t.update({UP: t[UP].astype(np.int8)}), [UP, "dtype I8, expected F32 or BF16 or F16"]),
    "alpha is a matrix": (lambda t: t.update({ALPHA: np.ones((2, 2), np.float32)}), [ALPHA, "one finite number"]),
    "alpha is empty": (lambda t: t.update({ALPHA: np.ones((0,), np.float32)}), [ALPHA, "one finite number"]),
    "alpha is NaN": (lambda t: t.update({ALPHA: np.float32("nan")}), [ALPHA, "one finite number, found nan"]),
    "alpha is Inf": (lambda t: t.update({ALPHA: np.float16("-inf")}), [ALPHA, "one finite number, found -inf"]),
    "alpha is a byte": (lambda t: t.update({ALPHA: np.int8(1)}), [ALPHA, "one finite number, found I8 []"]),
    "an unknown layer": (
        lambda t: t.update(named({"layers.2.attention.to_q": PAIRS[QUERY]})),
        ["layers.2.attention.to_q.lora_A.weight (and 1 more)", "does not have"],
    ),
    "another model": (
        lambda t: t.update(named({"transformer_blocks.0.attn.to_q": PAIRS[QUERY]}, "Kohya")),
        ["lora_unet_transformer_blocks_0_attn_to_q", "does not have"],
    ),
    "a norm": (
        lambda t: t.update(named({f"{BLOCK}.attention.norm_q": PAIRS[QUERY]})),
        ["norm_q", "does not have"],
    ),
    "a plain weight": (
        lambda t: t.update({"transformer.x_pad_token": np.zeros((1, 192), np.float32)}),
        ["x_pad_token is not part of a LoRA"],
    ),
    "two prefixes": (
        lambda t: t.update(named({QUERY: PAIRS[QUERY]}, "Kohya")),
        [DOWN, "lora_unet_layers_1_attention_to_q.lora_down.weight", "keep one"],
    ),
    "qkv beside to_q": (
        lambda t: t.update(named({f"{BLOCK}.attention.qkv": (PAIRS[QUERY][0], np.zeros((320, 4), np.float32))})),
        [UP, "attention.qkv.lora_B.weight", f"are both for {QUERY}", "keep one"],
    ),
    "out beside to_out.0": (
        lambda t: t.update(
            named({f"{BLOCK}.attention.{n}": PAIRS[f"{BLOCK}.attention.to_out.0"] for n in ("out", "to_out.0")})
        ),
        ["attention.out.lora_B.weight", "attention.to_out.0.lora_B.weight", "keep one"],
    ),
    "nothing": (lambda t: t.clear(), ["holds no tensors"]),
    "a whole checkpoint": (
        lambda t: (t.clear(), t.update({f"{QUERY}.weight": np.zeros((192, 192), np.float32)})),
        ["a whole checkpoint; give it as the source"],
    ),
    "a single file": (
        lambda t: (t.clear(), t.update({f"diffusion_model.{BLOCK}.attention.qkv.weight": np.zeros(4, np.float32)})),
        ["a whole checkpoint; give it as the source"],
    ),
    "something else": (lambda t: (t.clear(), t.update({"emb": np.zeros(4, np.float32)})), ["no LoRA"]),
    "an odd name": (lambda t: t.update({"a\nb\x1b[31m": np.zeros(4, np.float32)}), ["a\\nb\\x1b[31m"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_sound_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    """Each kind of damage is refused in one line that names the file, the tensors, what was found and expected."""
    tensors: dict[str, Any] = dict(ONE)
    change, words = DAMAGED[damage]
    change(tensors)
    path = file(tmp_path, tensors)
    refused(path, str(path), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bf16"])
@pytest.mark.parametrize("name", [DOWN, UP])
def test_values_that_are_not_finite_are_refused(name: str, dtype: str, value: float, tmp_path: Path) -> None:
    """One NaN or Inf in a pair of any dtype is refused with the tensor's name."""
    values = ONE[name].copy()
    values[-1, -1] = value
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values.astype(dtype)
    refused(file(tmp_path, {**ONE, name: stored}), name, "NaN or Inf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A pickle, a folder, no file, an unreadable name and a file cut short are each refused with the path."""
    pickle = tmp_path / "pytorch_lora_weights.bin"
    pickle.write_bytes(b"PK\x03\x04")
    refused(pickle, str(pickle), "no pickles")
    refused(tmp_path, str(tmp_path), "is a folder")
    refused(tmp_path / "missing.safetensors", "missing.safetensors", "no adapter at")
    refused(Path("\0.safetensors"), "no adapter at")
    refused(Path("x" * 5000), "no adapter at")
    path = file(tmp_path, ONE)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, str(path), "download it again")


def test_a_file_that_shrinks_after_it_was_read_is_refused(tmp_path: Path) -> None:
    """Values are read after the header; if the file is shorter or gone by then, one line says so."""
    path = file(tmp_path, ONE)
    update = adapters.read(path, CONFIG)[QUERY]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="cut short while it was read"):
        update.values()
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        update.values()


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-2", "a.safetensors", -0.01),
        ("dir:1/a.safetensors", "dir:1/a.safetensors", 1.0),
        ("dir:1/a.safetensors:2", "dir:1/a.safetensors", 2.0),
        ("a:b", "a:b", 1.0),
        ("a:", "a:", 1.0),
        ("a:1:2", "a:1", 2.0),
    ],
)
def test_a_number_after_a_colon_is_the_scale(text: str, path: str, scale: float) -> None:
    """FILE:SCALE is split at the last colon where a number follows, and FILE alone has scale 1."""
    assert adapters.parse(text) == (Path(path), scale)


def test_a_file_that_exists_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colon and a number in the name of a file that exists belong to the name; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert adapters.parse("style:2") == (Path("style:2"), 1.0)
    assert adapters.parse("~/style:2") == (tmp_path / "style:2", 1.0)
    assert adapters.parse("style:2:0.5") == (Path("style:2"), 0.5)
    assert adapters.parse("~/other:2") == (tmp_path / "other", 2.0)


@pytest.mark.parametrize("text", ["", ":0.5", "a:nan", "a:inf", "a:-inf", "a:1e999"])
def test_other_scales_are_refused(text: str) -> None:
    """A scale that is not finite and an empty name are refused in one line."""
    with pytest.raises(InputError, match="--lora") as caught:
        adapters.parse(text)
    assert str(caught.value).isprintable()


def test_several_adapters_come_with_their_scales(tmp_path: Path) -> None:
    """Several files, or one twice, give each layer all their updates, in order, the scales in the factors."""
    both = write(tmp_path / "a.safetensors", named(PAIRS, alpha=2.0))
    one = write(tmp_path / "b.safetensors", ONE)
    found = adapters.read_all([(both, 0.5), (str(one), -2), (both, 1.0)], CONFIG)
    assert set(found) == set(PAIRS)
    assert [u.factor for u in found[QUERY]] == [0.25, -2.0, 0.5]
    assert [u.factor for u in found[f"{BLOCK}.feed_forward.w2"]] == [0.25, 0.5]
    assert adapters.read_all([], CONFIG) == {}


@pytest.mark.parametrize("pair", [None, "file", ("a",), (1, 1.0), ("a", "1"), ("a", None), ("a", np.nan), ("a", True)])
def test_what_is_no_pair_of_file_and_scale_is_refused(pair: Any) -> None:
    """Adapters are pairs of a file and a finite number; anything else is an InputError."""
    with pytest.raises(InputError):
        adapters.read_all([pair], CONFIG)


def test_a_scale_beyond_fp32_is_refused(tmp_path: Path) -> None:
    """A finite scale that takes the values out of fp32's range is refused in one line when they are read."""
    path = file(tmp_path, ONE)
    for scale in (1e39, 1e308):
        update = adapters.read_all([(path, scale)], CONFIG)[QUERY][0]
        with pytest.raises(InputError, match="use a smaller scale"):
            update.values()
