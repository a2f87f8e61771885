"""Recipes: what they mean, what is refused, and that packing by them is the same everywhere."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.lab.making import write_notebook
from tests.synthetic import synthetic
from tests.test_weights import arrays, same_bits
from zimage import cli, recipes, sources, transforms, weights
from zimage.analysis import cost, fitting, footprint
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.lab import keys, notebook
from zimage.quantization import Quantization
from zimage.recipes import Recipe, packing, read
from zimage.sources.published import BLOCKS, linears

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Every width of its linear layers is a multiple of 128.
WIDE = TransformerConfig.tiny(dim=384, n_heads=6, axes_dims=(16, 24, 24), n_layers=2)
MIXED = {
    "default": "4bit",
    "group_size": 128,
    "rules": [
        {"pattern": "*.adaLN_modulation.*", "quantization": None},
        {"pattern": "layers.0.attention.*", "quantization": "8bit", "group_size": 32},
        {"pattern": "layers.0.attention.to_out.0", "quantization": "mxfp4"},
        {"pattern": "context_refiner.?.feed_forward.w[13]", "quantization": "6bit"},
    ],
}
YAML = """\
default: 4bit
group_size: 128
rules:
  - {pattern: "*.adaLN_modulation.*", quantization: null}
  - {pattern: layers.0.attention.*, quantization: 8bit, group_size: 32}
  - pattern: layers.0.attention.to_out.0
    quantization: mxfp4
  - {pattern: "context_refiner.?.feed_forward.w[13]", quantization: 6bit}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(asked: Any, config: TransformerConfig = WIDE) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(InputError) as caught:
        packing(config, asked)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_last_rule_that_matches_wins() -> None:
    """Rules override the default and the rules before them; null leaves a layer as it is."""
    found = packing(WIDE, MIXED)
    assert found["layers.1.attention.to_q"] == Quantization("affine", 4, 128)
    assert "layers.1.adaLN_modulation.0" not in found
    assert found["layers.0.attention.to_q"] == Quantization("affine", 8, 32)
    assert found["layers.0.attention.to_out.0"] == Quantization("mxfp4", 4, 32)
    assert found["context_refiner.0.feed_forward.w3"] == Quantization("affine", 6, 128)
    assert found["context_refiner.0.feed_forward.w2"] == Quantization("affine", 4, 128)
    assert all(path.split(".")[0] in BLOCKS for path in found)


@pytest.mark.parametrize("name", ["r.yaml", "r.yml", "r.json"])
def test_a_file_means_what_the_dict_means(name: str, tmp_path: Path) -> None:
    """A recipe reads alike as a dict, as YAML, as JSON with any indent, and by a text or a Path."""
    text = YAML if name != "r.json" else json.dumps(MIXED, indent="\t")
    path = write(tmp_path / name, text)
    assert read(path) == read(str(path)) == read(MIXED)
    assert read(path).digest == read(MIXED).digest
    assert read(read(MIXED).content) == read(MIXED)


@pytest.mark.parametrize("name", ["2bit", "4bit", "8bit-g32", "4bit-g128", "mxfp4", "nvfp4", "mxfp8"])
def test_a_default_alone_is_the_named_quantization(name: str, tmp_path: Path) -> None:
    """A recipe with only a default packs the bits that the name packs, after loading, while loading and converted."""
    wanted = arrays(transforms.quantize(synthetic(WIDE), name))
    folder = weights.save_transformer(synthetic(WIDE), tmp_path / "plain")
    recipe = {"default": name}
    assert same_bits(arrays(transforms.quantize(synthetic(WIDE), recipe)), wanted)
    assert same_bits(arrays(weights.load_transformer(folder, "float32", recipe)), wanted)
    file = write(tmp_path / "r.json", json.dumps(recipe))
    converted = weights.convert(folder, tmp_path / "packed", "float32", file)
    assert same_bits(arrays(weights.load_transformer(converted)), wanted)
    assert sources.describe(converted).quantization == transforms.quantization_of(
        transforms.quantize(synthetic(WIDE), name)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_recipe_is_saved_and_loaded_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Packing while loading, after loading, and a saved checkpoint give the same model; its config says how."""
    folder = weights.save_transformer(synthetic(WIDE), tmp_path / "plain")
    after = transforms.quantize(weights.load_transformer(folder, dtype), MIXED)
    assert same_bits(arrays(weights.load_transformer(folder, dtype, MIXED)), arrays(after))
    converted = weights.convert(folder, tmp_path / "packed", dtype, MIXED)
    assert same_bits(arrays(weights.load_transformer(converted)), arrays(after))
    assert transforms.packing_of(after) == packing(WIDE, MIXED) == sources.describe(converted).packing
    entry = json.loads((converted / "config.json").read_text())["quantization"]
    assert {name: entry[name] for name in ("group_size", "bits", "mode")} == {
        "group_size": 128, "bits": 4, "mode": "affine"
    }  # fmt: skip
    others = {path for path, found in packing(WIDE, MIXED).items() if found != Quantization("affine", 4, 128)}
    assert {path for path in entry if "." in path} == others


def test_a_recipe_that_packs_nothing_changes_nothing(tmp_path: Path) -> None:
    """With nothing to pack, the model is the plain one, also saved."""
    folder = weights.save_transformer(synthetic(WIDE), tmp_path / "plain")
    for asked in ({"default": None}, {"rules": [{"pattern": "*", "quantization": None}]}):
        assert same_bits(arrays(weights.load_transformer(folder, "float32", asked)), arrays(synthetic(WIDE)))
    converted = weights.convert(folder, tmp_path / "same", "float32", {"default": None})
    assert "quantization" not in json.loads((converted / "config.json").read_text())


def test_a_fused_model_is_packed_as_its_parts_would_be(tmp_path: Path) -> None:
    """A recipe's paths are the published ones also for a fused model; fused or packed first, the bits are the same."""
    recipe = {"default": "4bit", "rules": [{"pattern": "*.to_[qkv]", "quantization": "8bit-g32"}]}
    plain = synthetic(WIDE)
    fused = transforms.fuse_gate_up(transforms.fuse_qkv(plain))
    wanted = transforms.fuse_gate_up(transforms.fuse_qkv(transforms.quantize(plain, recipe)))
    found = transforms.quantize(fused, recipe)
    assert same_bits(arrays(found), arrays(wanted))
    assert transforms.packing_of(found) == packing(WIDE, recipe)
    folder = weights.save_transformer(found, tmp_path / "saved")
    assert same_bits(arrays(weights.load_transformer(folder)), arrays(transforms.quantize(plain, recipe)))


@pytest.mark.parametrize(
    ("pattern", "fuse", "path"),
    [("layers.1.attention.to_v", "fuse_qkv", "layers.1.attention"),
     ("noise_refiner.0.*.w3", "fuse_gate_up", "noise_refiner.0.feed_forward")],
)  # fmt: skip
def test_mixed_precision_in_a_fused_group_is_refused(pattern: str, fuse: str, path: str) -> None:
    """Parts of one product packed differently are refused with the group's path, whichever comes first."""
    recipe = {"default": "4bit", "rules": [{"pattern": pattern, "quantization": "8bit"}]}
    with pytest.raises(InputError, match=rf"^{path}: projections of one fused group must be stored alike, found"):
        getattr(transforms, fuse)(transforms.quantize(synthetic(WIDE), recipe))
    with pytest.raises(InputError, match=rf"^{path}\.(to_qkv|w13) is one product, .* found .* 4bit.* 8bit; mend"):
        transforms.quantize(getattr(transforms, fuse)(synthetic(WIDE)), recipe)


def test_layers_left_alone_can_be_packed_later() -> None:
    """A model packed in part takes a recipe for the rest, and not one for what is packed."""
    attention = {"rules": [{"pattern": "*.attention.*", "quantization": "8bit"}]}
    rest = {"rules": [{"pattern": "*.feed_forward.*", "quantization": "4bit"}]}
    first = transforms.quantize(synthetic(WIDE), attention)
    both = {"rules": attention["rules"] + rest["rules"]}
    assert same_bits(arrays(transforms.quantize(first, rest)), arrays(transforms.quantize(synthetic(WIDE), both)))
    with pytest.raises(InputError, match=r"noise_refiner\.0\.attention\.\S+ is quantized already"):
        transforms.quantize(first, "4bit")


WRONG = {
    "unknown key": ("default: 4bit\nrule: []\n", ":2: unknown key 'rule'; did you mean 'rules'?"),
    "unknown key in a rule": (
        "rules:\n- {pattern: a, quantization: 4bit}\n- {pattern: a, quantization: 4bit,\n   groupsize: 3}",
        ":4: unknown key 'groupsize'; did you mean 'group_size'?",
    ),
    "no quantization": ("rules:\n- {pattern: a}", ":2: key 'rules.0.quantization' is missing"),
    "default a number": ("default: 4", ":1: 'default' takes text, found int 4"),
    "rules a mapping": ("rules: {a: 4bit}", ":1: 'rules' takes a list"),
    "a rule a text": ("rules:\n- a", ":2: 'rules.0' takes names with their values"),
    "group a text": ("default: 4bit\ngroup_size: '64'", ":2: 'group_size' takes a whole number, found str '64'"),
    "group a truth": ("default: 4bit\ngroup_size: true", ":2: 'group_size' takes a whole number"),
    "group a float": ("default: 4bit\ngroup_size: 64.0", ":2: 'group_size' takes a whole number"),
    "unknown name": ("default: 7bit", ":1: unknown quantization '7bit'; known are 2bit"),
    "unknown name in a rule": (
        "rules:\n- {pattern: '*', quantization: 4bit}\n- pattern: '*'\n  quantization: int4",
        ":4: unknown quantization 'int4'",
    ),
    "unknown group": ("default: 4bit\ngroup_size: 48", ":2: group_size of 4bit must be 32, 64 or 128, found 48"),
    "contradiction": (
        "rules:\n- {pattern: '*', quantization: mxfp4, group_size: 64}",
        ":2: group_size 64 contradicts mxfp4, whose groups are 32",
    ),
    "group of nothing": ("default: mxfp4\ngroup_size: 64", ":2: group_size 64 is of no use"),
    "group of null": ("rules:\n- {pattern: '*', quantization: null, group_size: 64}", ":2: group_size is of no use"),
    "no match": (
        "default: 4bit\nrules:\n- {pattern: 'layers.0.*', quantization: 8bit}\n- pattern: 'layers.7.*'\n"
        "  quantization: 8bit",
        ":4: pattern 'layers.7.*' matches no linear layer of this model's blocks",
    ),
    "embedders": ("rules: [{pattern: cap_embedder.1, quantization: 4bit}]", ":1: pattern 'cap_embedder.1' matches no"),
    "another case": ("rules: [{pattern: 'LAYERS.*', quantization: 4bit}]", "matches no linear layer"),
    "empty pattern": ("rules: [{pattern: '', quantization: 4bit}]", ":1: 'rules.0.pattern' must not be empty"),
    "long pattern": (
        f"rules: [{{pattern: '{'*' * 201}', quantization: 4bit}}]",
        ":1: 'rules.0.pattern' must have at most 200 characters",
    ),
    "many rules": (
        "rules:\n" + "- {pattern: '*', quantization: 4bit}\n" * 1001,
        ":1: 'rules' must have at most 1000",
    ),
    "a list": ("- 4bit", ":1: a recipe is a mapping with 'default' and 'group_size' and 'rules', found ['4bit']"),
    "empty": ("", "a recipe is a mapping"),
    "no keys": ("{}", ":1: it is empty; a recipe has 'default', 'rules', or both"),
    "twice": ("default: 4bit\ndefault: 8bit", ":2: key 'default' is there twice (first on line 1)"),
    "a tag": ("default: !!python/name:os.system 4bit", ":1: tag "),
    "not YAML": ("default: [", "not valid YAML"),
    "too large": ("#" * 2**20 + "\n", "larger than 1 MiB, too large for a recipe"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_one_line_with_its_place(case: str, tmp_path: Path) -> None:
    """Whatever is wrong with a recipe's file is said in one line that names the file and the line."""
    text, message = WRONG[case]
    path = write(tmp_path / "wrong.yaml", text)
    line = refused(str(path))
    assert line.startswith(f"{path}:") and message in line, line


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("7bit", "unknown quantization '7bit'; known are 2bit"),
        ("nowhere.yaml", "nowhere.yaml: no such file; give a recipe"),
        (Path("4bit"), "'4bit' is no recipe's file; its name ends in .yaml, .yml, .json"),
        ("a\n.yaml", "unknown quantization"),
        ({}, "recipe: it is empty"),
        ({"rules": [{"pattern": "x", "quantization": "4bit"}]}, "recipe, rule 1: pattern 'x' matches no linear layer"),
        ({"default": 4}, "recipe: 'default' takes text, found int 4"),
        ({"default": "4bit\n\x1b"}, r"recipe: unknown quantization '4bit\n\x1b'"),
        ({1: "4bit"}, "recipe: "),
        ({"rules": [{"pattern": "*", "quantization": "9bit"}]}, "recipe: unknown quantization '9bit'"),
        (["4bit"], "unknown quantization ['4bit']"),
        (4, "unknown quantization 4"),
        (True, "unknown quantization True"),
        (Quantization("affine", 7, 64), "layers.0"),
    ],
    ids=str,
)
def test_other_things_are_no_recipes(asked: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither a name, a file nor a sound dict is refused in one line."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(asked) or isinstance(asked, Quantization)


def test_an_existing_file_called_like_a_quantization_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is a name, whatever lies in the folder one is in."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "4bit", "default: 8bit")
    assert read("4bit") == Recipe(Quantization("affine", 4, 64))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("4bit-g128", "noise_refiner.0.adaLN_modulation.0: input width 192 is not divisible by the group size 128"),
        (
            {"default": "4bit", "rules": [{"pattern": "*.w2", "quantization": "8bit", "group_size": 128},
                                          {"pattern": "layers.0.*.to_k", "quantization": "3bit-g128"}]},
            "layers.0.attention.to_k: input width 192 is not divisible by the group size 128 of 3bit-g128",
        ),
    ],
)  # fmt: skip
def test_a_width_that_no_group_divides_is_refused(recipe: Any, words: str) -> None:
    """A layer whose width is not divided by its group is named with both numbers, whatever the way of packing."""
    narrow = TransformerConfig.tiny(dim=192, n_heads=3, axes_dims=(16, 24, 24))
    assert words in refused(recipe, narrow)
    with pytest.raises(InputError, match="is not divisible by the group size 128"):
        transforms.quantize(synthetic(narrow), recipe)


def test_too_few_weights_for_a_word_are_refused() -> None:
    """nvfp4 layers of an odd number of half words, which MLX cannot pack, are refused and not crashed on."""
    odd = TransformerConfig.tiny(dim=80, n_heads=2, axes_dims=(8, 16, 16))
    recipe = {"rules": [{"pattern": "*.w1", "quantization": "nvfp4"}]}
    assert "w1: 213 x 80 weights are no multiple of 32, which nvfp4 needs" in refused(recipe, odd)


NAMES = ["2bit-g32", "3bit", "4bit-g128", "5bit", "6bit-g128", "8bit", "mxfp4", "nvfp4", "mxfp8", None]
RULES = st.lists(
    st.tuples(
        st.sampled_from(["*", "layers.*", "*.to_[qkv]", "*.w2", "layers.1.*", "*adaLN*", "*.attention.*"]),
        st.sampled_from(NAMES),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(default=st.sampled_from(NAMES), rules=RULES)
def test_rules_are_applied_in_their_order(default: str | None, rules: list[tuple[str, str | None]]) -> None:
    """For any rules, a layer is packed as the last rule says that matches it by fnmatch, else as the default says."""
    from fnmatch import fnmatchcase

    recipe = {"default": default, "rules": [{"pattern": p, "quantization": q} for p, q in rules]}
    found = packing(WIDE, recipe)
    for path in linears(WIDE):
        wanted = default
        for pattern, name in rules:
            wanted = name if fnmatchcase(path, pattern) else wanted
        wanted = wanted if path.split(".")[0] in BLOCKS else None
        assert found.get(path) == (None if wanted is None else Quantization.parse(wanted))


def test_labels() -> None:
    """A quantization's label is its name, a recipe's the name of its file; without one there is none."""
    assert [recipes.label(asked) for asked in ("4bit", "a/b.yaml", Path("a/c.json"), {"default": "4bit"}, None)] == [
        "4bit", "b", "c", "recipe", None
    ]  # fmt: skip


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_commands_take_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`convert` and `generate` take a recipe's file, `show` says how layers are packed, and mistakes are one line."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.yaml", "default: 4bit\nrules: [{pattern: '*.w2', quantization: 8bit}]\n")
    assert command(capsys, "convert", "digits", "packed", "--quantization", "r.yaml")[0] == 0
    packed = transforms.quantize(weights.load_transformer("digits"), Path("r.yaml"))
    assert same_bits(arrays(weights.load_transformer("packed")), arrays(packed))
    _, shown, _ = command(capsys, "show", "packed")
    blocks = [path for path in linears(packed.config) if path.split(".")[0] in BLOCKS]
    w2 = sum(path.endswith(".w2") for path in blocks)
    assert f"layer by layer: 4bit {len(blocks) - w2}, 8bit {w2} of the linear layers in blocks" in shown
    _, shown, _ = command(capsys, "show", "packed", "--json")
    assert json.loads(shown)["layers_by_packing"] == {"4bit": len(blocks) - w2, "8bit": w2}
    assert command(capsys, "generate", "7", "--steps", "1", "--quantization", "r.yaml", "--out", "7.png")[0] == 0
    write(tmp_path / "bad.yaml", "default: 4bit\nrules: [{pattern: 'layers.99.*', quantization: 8bit}]\n")
    for verb in (("convert", "digits", "x"), ("generate", "7")):
        status, out, err = command(capsys, *verb, "--quantization", "bad.yaml")
        assert (status, out) == (2, "") and err.startswith("zimage: bad.yaml:2: pattern 'layers.99.*' matches no")
    assert not Path("x").exists()


def test_show_counts_what_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Linear layers of the blocks that are left as they are have a count of their own."""
    recipe = {"rules": [{"pattern": "layers.0.feed_forward.*", "quantization": "mxfp4"}]}
    weights.convert("digits", tmp_path / "a", quantization=recipe)
    others = sum(path.split(".")[0] in BLOCKS for path in linears(sources.describe("digits").config)) - 3
    assert f"layer by layer: mxfp4 3, not packed {others} of" in command(capsys, "show", str(tmp_path / "a"))[1]


def test_a_run_is_known_by_the_content_of_its_recipe(tmp_path: Path) -> None:
    """The run key depends on what a recipe says, not on where it lies; a recipe that is none stops the run first."""
    parameters = "quantization: str | None = None"
    path = write_notebook(tmp_path / "notebooks" / "a.ipynb", parameters=parameters)
    found = notebook.read(path, tmp_path)

    def identity(value: str | None) -> keys.Identity:
        return keys.identify(found, found.resolve({"quantization": value}), tmp_path)

    write(tmp_path / "a.yaml", YAML)
    write(tmp_path / "b.json", json.dumps(MIXED))
    write(tmp_path / "c.yaml", "default: 4bit")
    first, same, other, plain = map(identity, ("a.yaml", "b.json", "c.yaml", "4bit"))
    assert first.key == same.key and len({first.key, other.key, plain.key, identity(None).key}) == 4
    assert first.recipe == read(MIXED).content and first.digests["recipe"] == read(MIXED).digest
    assert plain.recipe is None and "recipe" not in plain.digests
    write(tmp_path / "a.yaml", "default: 4bit")
    assert identity("a.yaml").key == other.key
    with pytest.raises(InputError, match=r"^d\.yaml: no such file"):
        identity("d.yaml")


def test_arms_are_known_by_the_content_of_their_recipes(tmp_path: Path) -> None:
    """Recipes that are arms count with names and content, not with folders; two that share a name are refused."""
    path = write_notebook(tmp_path / "notebooks" / "a.ipynb", parameters="arms: list = []\nmodes: list = []")
    found = notebook.read(path, tmp_path)

    def identity(*arms: str, modes: Sequence[str] = ()) -> keys.Identity:
        return keys.identify(found, found.resolve({"arms": list(arms), "modes": list(modes)}), tmp_path)

    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "mixed.yaml", YAML)
    write(tmp_path / "elsewhere" / "mixed.json", json.dumps(MIXED))
    write(tmp_path / "other.yaml", YAML)
    first, same = identity("mixed.yaml + fast", "4bit"), identity("elsewhere/mixed.json + fast", "4bit")
    assert first.key == same.key and first.recipes == {"mixed": read(MIXED).content} and first.recipe is None
    others = [identity("mixed.yaml", "4bit"), identity("other.yaml + fast", "4bit"), identity("4bit + fast", "4bit")]
    others += [identity(modes=["mixed.yaml"]), identity(modes=["4bit"])]
    assert len({one.key for one in [first, *others]}) == 6 and others[2].recipes == {}
    write(tmp_path / "elsewhere" / "mixed.json", json.dumps({"default": "8bit"}))
    assert identity("elsewhere/mixed.json + fast", "4bit").key not in {first.key, *(one.key for one in others)}
    with pytest.raises(InputError, match=r"^elsewhere/mixed\.json: another recipe's file is called mixed too"):
        identity("mixed.yaml", modes=["elsewhere/mixed.json"])
    with pytest.raises(InputError, match=r"^lost\.yaml: no such file"):
        identity("lost.yaml + fast")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [MIXED, {"default": None}, {"rules": MIXED["rules"]}], ids=["mixed", "none", "some"])
def test_predicted_bytes_are_the_models(dtype: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Bytes by stage, in all, fused and of a checkpoint that is stored so are predicted to the byte for recipes."""
    model = transforms.quantize(synthetic(WIDE, dtype=getattr(mx, dtype)), recipe)
    options: dict[str, Any] = {"caption_tokens": 5, "dtype": dtype}
    stages = model.stages(mx.zeros((1, 4, 8, 8)), mx.zeros((1,)), mx.zeros((1, 5, WIDE.cap_feat_dim)))
    found = {total.path: total for total in cost.by_stage(cost.step(WIDE, 64, 64, quantization=recipe, **options))}
    assert {stage.name: stage.weight_bytes for stage in stages} == {p: t.weight_bytes for p, t in found.items()}
    whole = sum(array.nbytes for array in arrays(model).values())
    fused = cost.step(WIDE, 64, 64, quantization=recipe, fused=("qkv", "gate_up"), **options)
    assert cost.whole(fused).weight_bytes == whole
    assert footprint.step_bytes(WIDE, 64, 64, 1, 5, dtype, recipe, device="cpu").weight_bytes == whole
    info = sources.describe(weights.save_transformer(model, tmp_path / "a"))
    assert info.loaded_bytes({"float32": 4, "bfloat16": 2}[dtype]) == whole
    stored = cost.step(WIDE, 64, 64, quantization=info.packing or None, **options)
    assert cost.whole(stored).weight_bytes == whole
    device = fitting.Device("cpu", 10**12)
    asked, kept = (
        fitting.fits(*one, device=device) for one in ((WIDE, 64, 64, 1, 5, dtype, recipe), (info, 64, 64, 1, 5))
    )
    assert asked.step.weight_bytes == whole
    assert (kept.step, kept.dtype) == (asked.step, dtype) or not info.packing


def test_unpacking_counts_the_layers_that_are_packed() -> None:
    """A step that unpacks one product of a block takes less than one that unpacks all, and more than none."""

    def alive(recipe: Any) -> int:
        return footprint.step_bytes(WIDE, 64, 64, 1, 5, "float32", recipe, device="cpu").activation_bytes

    some = {"rules": [{"pattern": "layers.0.feed_forward.w2", "quantization": "4bit"}]}
    assert alive(None) == alive({"default": None}) < alive(some) < alive("4bit")
    block = {path: shape for path, shape in linears(WIDE).items() if path.startswith("layers.0.")}
    others = sum(math.prod(shape) for path, shape in block.items() if not path.endswith("w2"))
    others += 4 * 384  # a layer counts with its bias, which the modulation alone has
    assert alive("4bit") - alive(some) == 2 * 4 * others  # of two blocks, in fp32


def test_mixed_parts_of_a_fused_product_have_no_bytes() -> None:
    """A step with a fused product whose parts are packed differently is refused by its path."""
    recipe = {"default": "4bit", "rules": [{"pattern": "layers.1.*.to_v", "quantization": "8bit"}]}
    with pytest.raises(InputError, match=r"^layers\.1\.attention\.to_qkv is one product"):
        cost.step(WIDE, 64, 64, quantization=recipe, fused=("qkv",))
    cost.step(WIDE, 64, 64, quantization=recipe, fused=("gate_up",))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["4bit", "*", "mxfp4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["default", "group_size", "rules", "pattern", "quantization"]) | st.text(), inner
        )
    ),
    max_leaves=12,
)


def said(work: Callable[[], object]) -> str:
    """The line of the InputError that `work` ends in; empty where it does not."""
    try:
        work()
    except InputError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None)
@given(PLAIN)
def test_any_value_is_a_recipe_or_one_line(asked: Any) -> None:
    """Whatever is given for a recipe, the answer is a packing or an InputError of one printable line."""
    assert said(lambda: packing(WIDE, asked)).isprintable()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")), st.booleans())
def test_any_file_is_a_recipe_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bool) -> None:
    """Whatever a file holds, the answer is a recipe or an InputError of one printable line that names the file."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(b"rules:\n- pattern: " * head + content)
    line = said(lambda: read(path))
    assert (line == "" or line.startswith(str(path))) and line.isprintable(), repr(line)
