"""Models in the local Ollama store: both generations of blobs, how names resolve, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import ollama_store as store
from tests.checkpoints import CONFIG, tensors, write_single
from tests.ollama_store import GGUF, JSON, PLACE, TENSOR, Layer, Stored, blob
from tests.test_weights import arrays, refused, same_bits
from zimage import sources, transforms, weights
from zimage.config import TransformerConfig
from zimage.errors import WeightsError
from zimage.sources import ollama
from zimage.transformer import Transformer

import mlx.core as mx
import pytest

VALUES = tensors()
STORED = store.stored(VALUES)
PLAIN = [store.config_layer(CONFIG), *store.tensor_layers(STORED)]
TINY = "ollama:tiny"
NAME = "layers.0.attention.to_k.weight"
QUANTIZABLE = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24), n_layers=1)
TYPES = [("4bit", "int4", "64"), ("4bit-g32", "int4", "32"), ("8bit", "int8", "64"), ("nvfp4", "nvfp4", "16"),
         ("mxfp8", "mxfp8", "32")]  # fmt: skip
OLDER_LAYER = "transformer/layers.0.attention.to_k.weight_scale"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, where the environment says; digests are kept in this test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    return tmp_path / "store"


def quantized(folder: Path, quantization: str) -> Path:
    """A quantized model, saved by zimage."""
    return weights.save_transformer(transforms.quantize(Transformer(QUANTIZABLE), quantization), folder)


def assert_same(source: str, folder: Path) -> None:
    """Both load bit for bit alike and have one digest."""
    assert same_bits(arrays(weights.load_transformer(source)), arrays(weights.load_transformer(folder)))
    assert sources.describe(source).digest == sources.describe(folder).digest


def position(name: str) -> int:
    """Where the layer of a tensor stands in the plain model."""
    return [layer.name for layer in PLAIN].index(f"transformer/{name}")


def changed(root: Path, change: Callable[[list[Any]], object]) -> Path:
    """The plain model, the layers of its manifest changed."""
    store.write_blobs(root, PLAIN)
    entries = [layer.entry for layer in PLAIN]
    change(entries)
    return store.write_manifest(root, {"layers": entries})


def test_a_model_loads_as_the_folder_with_the_same_bytes_does(root: Path, tmp_path: Path) -> None:
    """A floating-point model has a folder's values and digest, whether a blob's key has the prefix, not, or is data."""
    folder = write_single(tmp_path / "folder", VALUES)
    store.write_model(root, PLAIN)
    assert_same(TINY, folder)
    prefixed = [PLAIN[0], *store.tensor_layers(STORED, prefix="transformer/")]
    store.write_model(root, prefixed, "registry.ollama.ai/library/tiny/prefixed")
    assert_same("ollama:tiny:prefixed", folder)
    store.write_model(root, [PLAIN[0], *store.separate_layers(STORED)], "registry.ollama.ai/library/tiny/data")
    assert_same("ollama:tiny:data", folder)


@pytest.mark.parametrize("prefix", ["", "transformer/"])
@pytest.mark.parametrize(("quantization", "told", "group"), TYPES)
def test_a_packed_blob_loads_bit_for_bit(
    quantization: str, told: str, group: str, prefix: str, root: Path, tmp_path: Path
) -> None:
    """A packed weight with .scale and .bias in its blob is what zimage saves of the same model, digest and all."""
    folder = quantized(tmp_path / "folder", quantization)
    metadata = {"quant_type": told, "group_size": group}
    layers = store.tensor_layers(store.stored_in(folder), metadata, prefix)
    store.write_model(root, [store.config_layer(QUANTIZABLE), *layers])
    assert str(next(iter(sources.describe(TINY).packing.values()))) == quantization
    assert_same(TINY, folder)


def test_what_mlx_packs_is_what_is_loaded(root: Path) -> None:
    """The packed arrays of a loaded model are those that mx.quantize gave, each in its place."""
    name = "layers.0.feed_forward.w1.weight"
    values = store.stored(tensors(QUANTIZABLE))
    weight = mx.array(tensors(QUANTIZABLE)[name])
    made = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=32, bits=8), strict=True))
    for leaf, array in made.items():
        kind = {mx.uint32: "U32", mx.float32: "F32"}[array.dtype]
        values[name.replace("weight", leaf)] = Stored(kind, array.shape, bytes(memoryview(array.view(mx.uint8))))
    layers = store.tensor_layers(values, {"quant_type": "int8", "group_size": "32"})
    store.write_model(root, [store.config_layer(QUANTIZABLE), *layers])
    loaded = arrays(weights.load_transformer(TINY))
    for leaf, array in made.items():
        assert mx.array_equal(loaded[name.replace("weight", leaf)], array)


@pytest.mark.parametrize("quantization", ["4bit", "8bit", "nvfp4"])
def test_the_older_generation_loads_bit_for_bit(quantization: str, root: Path, tmp_path: Path) -> None:
    """Scales and biases in layers of their own, every one keyed `data` and without metadata, load the same."""
    folder = quantized(tmp_path / "folder", quantization)
    layers = store.separate_layers(store.stored_in(folder))
    assert OLDER_LAYER in [layer.name for layer in layers]
    store.write_model(root, [store.config_layer(QUANTIZABLE), *layers])
    assert_same(TINY, folder)


@pytest.mark.parametrize("prefix", ["", "transformer/"])
def test_a_blob_may_group_tensors(prefix: str, root: Path, tmp_path: Path) -> None:
    """A layer of several packed tensors, its metadata told a tensor, loads the same; a wrong entry in it is refused."""
    folder = quantized(tmp_path / "folder", "4bit")
    layers = [store.config_layer(QUANTIZABLE)]
    content: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for layer in store.tensor_layers(store.stored_in(folder), {"quant_type": "int4"}, prefix):
        if ".feed_forward." not in layer.name:
            layers.append(layer)
            continue
        key = f"{prefix}{layer.name.removeprefix('transformer/')}"
        metadata |= {f"{key}.quant_type": "int4", f"{key}.group_size": "64"}
    for name, tensor in store.stored_in(folder).items():
        if ".feed_forward." in name:
            told = name.replace(".scales", ".weight.scale").replace(".biases", ".weight.bias")
            content[f"{prefix}{told}"] = tensor
    group = Layer(TENSOR, "transformer/feed_forward", blob(content, metadata))
    store.write_model(root, [*layers, group])
    assert_same(TINY, folder)
    for wrong in ("int8", "int3"):
        bad = blob(content, {**metadata, f"{prefix}layers.0.feed_forward.w2.weight.quant_type": wrong})
        store.write_model(root, [*layers, replace(group, content=bad)])
        refused_here(TINY, f"quant_type {wrong}" if wrong == "int8" else "'int3' is not known")


def test_equal_tensors_may_share_a_blob(root: Path, tmp_path: Path) -> None:
    """Two tensors of equal bytes are one blob where both are keyed `data`, and load as the two that they are."""
    values = {**VALUES, "cap_pad_token": VALUES["x_pad_token"]}
    folder = write_single(tmp_path / "folder", values)
    store.write_model(root, [PLAIN[0], *store.separate_layers(store.stored(values))])
    assert len(list((root / "blobs").iterdir())) < len(values) + 1
    assert_same(TINY, folder)
    weights.load_transformer(TINY, dtype="bfloat16", check_values=True)


def test_other_components_are_ignored(root: Path, tmp_path: Path) -> None:
    """Layers of the text encoder, the VAE and the tokenizer are neither read nor have to be there."""
    folder = write_single(tmp_path / "folder", VALUES)
    others = [
        Layer(TENSOR, "text_encoder/model.embed_tokens.weight", b"not read"),
        Layer(TENSOR, "vae/decoder.conv_in.weight", b"nor this"),
        Layer(JSON, "vae/config.json", b"{"),
        Layer("application/vnd.docker.container.image.v1+json", "", b""),
    ]
    store.write_blobs(root, PLAIN)
    store.write_manifest(root, {"layers": [layer.entry for layer in [*others, *PLAIN, *others]]})
    assert_same(TINY, folder)
    assert len(sources.describe(TINY).files) == len(VALUES)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("ollama:tiny", "registry.ollama.ai/library/tiny/latest"),
        ("ollama:tiny:bf16", "registry.ollama.ai/library/tiny/bf16"),
        ("ollama:x/z-image-turbo", "registry.ollama.ai/x/z-image-turbo/latest"),
        ("ollama:x/z-image-turbo:fp4", "registry.ollama.ai/x/z-image-turbo/fp4"),
        ("ollama:example.org/x/y", "example.org/x/y/latest"),
        ("ollama:localhost:5000/x/y", "localhost:5000/x/y/latest"),
        ("ollama:localhost:5000/x/y:q4.1_a-b", "localhost:5000/x/y/q4.1_a-b"),
    ],
)
def test_names_resolve_as_ollama_does(source: str, place: str, root: Path) -> None:
    """Host, namespace and tag have defaults, and the tag follows the last slash: a port is no tag."""
    manifest = store.write_model(root, PLAIN, place)
    info = sources.describe(source)
    assert (info.folder, info.config, set(info.tensors)) == (manifest.parent, CONFIG, set(VALUES))


@pytest.mark.parametrize("written", ["{}", "  {}\t", '"{}"', "'{}'", ' "{}" ', '" {} "'])
def test_the_variable_is_stripped_of_spaces_and_quotes(
    written: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OLLAMA_MODELS names the store also where it was set with spaces or quotes around it."""
    store.write_model(root, PLAIN)
    monkeypatch.setenv("OLLAMA_MODELS", written.format(root))
    assert ollama.roots() == [root]
    assert set(sources.describe(TINY).tensors) == set(VALUES)


@pytest.mark.parametrize("value", [None, "", "  ", '""'])
def test_without_the_variable_the_store_is_in_the_home_folder(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~/.ollama/models is looked in first where OLLAMA_MODELS is not set or empty."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS")
    if value is not None:
        monkeypatch.setenv("OLLAMA_MODELS", value)
    store.write_model(tmp_path / ".ollama" / "models", PLAIN)
    assert set(sources.describe(TINY).tensors) == set(VALUES)


def refused_here(source: str, *words: str) -> str:
    """The short line with which loading `source` is refused."""
    line = refused(source, *words)  # type: ignore[arg-type]
    assert len(line) < 3000
    return line


def test_an_unknown_model_is_refused_with_the_command_that_gets_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line for a model that is not there names every store looked in and `ollama pull`."""
    refused_here("ollama:x/none:fp4", str(root), "`ollama pull x/none:fp4`", "OLLAMA_MODELS")
    monkeypatch.delenv("OLLAMA_MODELS")
    refused_here("ollama:x/none", str(Path.home() / ".ollama" / "models"), "/usr/share/ollama/.ollama/models")


@pytest.mark.parametrize(
    "name",
    [
        "", ":", ":latest", "tiny:", "..", "../tiny", "x/..", "x/../tiny", "tiny:..", "/etc/passwd", "/tiny", "tiny/",
        "x//tiny", "a/b/c/d", "a/b/c/d:e", "ti ny", "tiny:a:b", "tiny:a/b/c/d", "tiny\n", "tiny\0", "ti\ud800ny",
        "tïny", "-tiny", ".tiny", "localhost:123456/x/y", "localhost:/x/y", "http://x/y", "~/tiny", "x\\tiny",
    ],
)  # fmt: skip
def test_bad_names_are_refused(name: str, root: Path) -> None:
    """A name that is no Ollama name, and above all one that would lead out of the store, is refused as such."""
    store.write_model(root, PLAIN)
    refused_here(f"ollama:{name}", "is no name of an Ollama model", "ollama:x/z-image-turbo")


def test_a_name_too_long_for_a_file_is_refused(root: Path) -> None:
    """A name that the file system cannot have is refused in a short line."""
    store.write_model(root, PLAIN)
    refused_here(f"ollama:{'x' * 100_000}")


def test_a_language_model_is_refused_as_one(root: Path) -> None:
    """A model with a GGUF layer is said to be a language model; one with neither is said to lack the config."""
    manifest = store.write_model(root, [Layer(GGUF, "", b"GGUF")])
    refused_here(TINY, str(manifest), "it is a language model", "x/z-image-turbo")
    store.write_model(root, PLAIN[1:])
    refused_here(TINY, str(manifest), "no transformer/config.json", "it has no such layer")


def test_a_missing_blob_is_refused(root: Path) -> None:
    """A blob that is not there is named, with the layer and what to do."""
    layer = PLAIN[position(NAME)]
    store.write_model(root, PLAIN)
    (root / "blobs" / f"sha256-{layer.digest}").unlink()
    refused_here(TINY, layer.name, layer.digest, "is not there", "pull the model again")


def test_a_blob_of_another_size_is_refused(root: Path) -> None:
    """A blob cut short is named with both sizes."""
    layer = PLAIN[position(NAME)]
    store.write_model(root, PLAIN)
    path, size = root / "blobs" / f"sha256-{layer.digest}", len(layer.content)
    path.write_bytes(layer.content[:-4])
    refused_here(TINY, str(path), f"{size - 4} bytes long", f"expected {size}", "pull the model again")


@pytest.mark.parametrize("index", [0, 5])
def test_a_flipped_bit_is_found_when_loading(index: int, root: Path) -> None:
    """One bit that changed in a blob, config or tensor, is found before anything is loaded, though not by describe."""
    layer = PLAIN[index]
    store.write_model(root, PLAIN)
    weights.load_transformer(TINY)
    path = root / "blobs" / f"sha256-{layer.digest}"
    content = bytearray(layer.content)
    at = -1 if index else content.index(b"Transformer2DModel")  # of config.json the name of the class
    content[at] ^= 1
    path.write_bytes(content)
    sources.describe(TINY).check()
    refused_here(TINY, str(path), "its SHA-256 is", f"expected {layer.digest}", "pull the model again")
    with pytest.raises(WeightsError):
        weights.convert(TINY, root / "converted")


@pytest.mark.parametrize(
    "digest",
    [
        None, 7, "", "sha256:", "sha256:../../x", "sha256:" + "g" * 64, "sha256:" + "A" * 64, "sha256:" + "a" * 63,
        "sha256:" + "a" * 65, "md5:" + "a" * 64, "a" * 64, "sha256:" + "a" * 64 + "\n", "sha256:" + "/" * 64, [],
    ],
)  # fmt: skip
def test_a_digest_that_is_none_is_refused(digest: Any, root: Path) -> None:
    """A digest that is not sha256 and 64 hex digits, above all a path, is refused and opens nothing."""
    manifest = changed(root, lambda entries: entries[3].update(digest=digest))
    refused_here(TINY, str(manifest), PLAIN[3].name, "expected sha256 and 64 hex digits")


def test_links_out_of_the_store_are_refused(root: Path, tmp_path: Path) -> None:
    """A blob, or a manifest, that is a link to a file outside of the store is refused; a link within it is not."""
    manifest = store.write_model(root, PLAIN)
    path = root / "blobs" / f"sha256-{PLAIN[4].digest}"
    outside, other = tmp_path / "outside", root / "blobs" / "other"
    path.rename(other)
    path.symlink_to(other)
    weights.load_transformer(TINY)
    path.unlink()
    other.rename(outside)
    path.symlink_to(outside)
    refused_here(TINY, str(path), "a link out of")
    path.unlink()
    outside.rename(path)
    manifest.rename(outside)
    manifest.symlink_to(outside)
    refused_here(TINY, str(manifest), "a link out of")


@pytest.mark.parametrize("layers", [None, {}, "x", 3, [], [3], [None], [[]], [{}], [{"mediaType": 3}]])
def test_odd_layers_are_refused(layers: Any, root: Path) -> None:
    """A manifest whose layers are no list of objects with a media type is refused by its path."""
    manifest = store.write_manifest(root, {"layers": layers})
    refused_here(TINY, str(manifest))
    manifest.write_text(json.dumps(layers), encoding="utf-8")
    refused_here(TINY, str(manifest))
    changed(root, lambda entries: entries[2].update(name=["x"]))
    refused_here(TINY, str(manifest), "odd name")


def test_a_layer_twice_is_refused(root: Path) -> None:
    """Two layers of one tensor are refused by its name, also where the older generation's suffix makes them one."""
    manifest = changed(root, lambda entries: entries.append(entries[position(NAME)]))
    refused_here(TINY, str(manifest), f"tensor {NAME} stands in two layers")
    both = [Layer(TENSOR, f"transformer/{NAME}{end}", blob({"data": STORED[NAME]})) for end in (".scale", "_scale")]
    store.write_model(root, [*PLAIN, *both])
    refused_here(TINY, str(manifest), "layers.0.attention.to_k.scales stands in two layers")


def packed_blob(root: Path, tmp_path: Path, metadata: dict[str, Any], without: str = "none") -> None:
    """A model of which one weight is packed as int4 in groups of 64, its blob's metadata as given."""
    values = store.stored_in(quantized(tmp_path / "folder", "4bit"))
    layers = store.tensor_layers(values, {"quant_type": "int4", "group_size": "64"})
    path = NAME.removesuffix(".weight")
    leaves = {"": "weight", ".scale": "scales", ".bias": "biases"}
    content = {f"{NAME}{end}": values[f"{path}.{leaf}"] for end, leaf in leaves.items() if end != without}
    own = Layer(TENSOR, f"transformer/{NAME}", blob(content, metadata))
    others = [layer for layer in layers if layer.name != own.name]
    store.write_model(root, [store.config_layer(QUANTIZABLE), *others, own])


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"quant_type": "int3"}, "'int3' is not known; known are int4, int8, nvfp4, mxfp8"),
        ({"quant_type": 4}, "quant_type 4 is not known"),
        ({"quant_type": ["int4"]}, "is not known"),
        ({"quant_type": "\n" * 9000}, "is not known"),
        ({"quant_type": "int8", "group_size": "64"}, "is not what it stores"),
        ({"quant_type": "nvfp4", "group_size": "16"}, "is not what it stores"),
        ({"quant_type": "mxfp8"}, "is not what it stores"),
        ({"quant_type": "int4", "group_size": "32"}, "with group_size '32' is not what it stores"),
        ({"quant_type": "int4", "group_size": "x\n"}, "is not what it stores"),
        ({f"{NAME}.quant_type": "int8", "quant_type": "int4"}, "quant_type int8"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(
    metadata: dict[str, Any], words: str, root: Path, tmp_path: Path
) -> None:
    """A quantization that is not known, or is not how the blob's own tensors are packed, is refused with both."""
    packed_blob(root, tmp_path, metadata)
    refused_here(TINY, words, "pull")


@pytest.mark.parametrize("metadata", [{"quant_type": "int8"}, {"quant_type": "int4"}])
def test_a_type_of_other_bits_is_refused_without_a_group_size(
    metadata: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """int4 that is stored and told as int8, no group size beside it, is refused; told rightly it loads."""
    packed_blob(root, tmp_path, metadata)
    if metadata["quant_type"] == "int4":
        weights.load_transformer(TINY)
    else:
        refused_here(TINY, "quant_type int8")


@pytest.mark.parametrize("leaf", [".scale", ".bias"])
def test_a_missing_scale_or_bias_is_refused(leaf: str, root: Path, tmp_path: Path) -> None:
    """A packed weight without its scale, or affine without its bias, is refused by the tensor's name."""
    packed_blob(root, tmp_path, {"quant_type": "int4", "group_size": "64"}, leaf)
    refused_here(TINY, "layers.0.attention.to_k.")


def test_a_tensor_the_layer_does_not_speak_of_is_refused(root: Path) -> None:
    """A second tensor in the blob of one, and a blob with nothing but a scale, are refused."""
    tensor = STORED[NAME]
    others = [layer for layer in PLAIN if layer.name != f"transformer/{NAME}"]
    for content, words in (({NAME: tensor, "other": tensor}, "tensor other is unexpected"),
                           ({"x.scale": tensor}, f"no tensor {NAME}")):  # fmt: skip
        store.write_model(root, [*others, Layer(TENSOR, f"transformer/{NAME}", blob(content))])
        refused_here(TINY, words)


def test_a_manifest_is_read_as_strictly_as_any_file(root: Path) -> None:
    """A manifest that is no JSON, or names something twice, is refused by its path."""
    manifest = store.write_model(root, PLAIN)
    for text in ("", "{", '{"layers": [], "layers": []}', "\x00", "[" * 50_000):
        (root / "manifests" / PLACE).write_text(text, encoding="utf-8")
        refused_here(TINY, str(manifest))
