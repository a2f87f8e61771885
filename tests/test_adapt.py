"""Applying LoRA adapters: merged into floating-point weights, beside quantized ones, and with the other transforms."""

from collections.abc import Callable
from pathlib import Path

from tests.loras import CONFIG, delta, named, pairs, write
from tests.parity.cases import relative_l2
from tests.synthetic import synthetic
from tests.test_transforms import FUSIONS, arrays, error, run, same_bits
from zimage import adapters, transforms, weights
from zimage.errors import InputError, WeightsError
from zimage.layers import AdaptedLinear, clone
from zimage.transformer import Transformer, count_parameters, weight_bytes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

MODES = ["2bit", "4bit", "8bit", "4bit-g32", "mxfp4", "nvfp4", "mxfp8"]
SOME = [f"layers.0.{name}" for name in ("attention.to_k", "attention.to_out.0", "feed_forward.w3")]
every_fusion = pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for every linear layer, alpha / rank 0.75."""
    return write(tmp_path_factory.mktemp("whole") / "whole.safetensors", named(pairs(), alpha=3.0))


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of another rank for three layers, one of each fused group."""
    found = pairs(rank=7, seed=1)
    return write(tmp_path_factory.mktemp("some") / "some.safetensors", named({path: found[path] for path in SOME}))


def model(mode: str | None = None, dtype: mx.Dtype = mx.float32) -> Transformer:
    plain = synthetic(CONFIG, dtype=dtype)
    return plain if mode is None else transforms.quantize(plain, mode)


def kinds(found: Transformer) -> dict[str, type]:
    return {path: type(module) for path, module in found.named_modules()}


def unpacked(packed: Transformer) -> Transformer:
    """A quantized model's weights as floats again."""
    plain = synthetic(CONFIG, dtype=packed.dtype)
    values = arrays(packed)
    for path, layer in packed.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            values[f"{path}.weight"] = mx.dequantize(
                layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
            ).astype(packed.dtype)
            values.pop(f"{path}.scales")
            values.pop(f"{path}.biases", None)
    plain.load_weights(list(values.items()))
    return plain


def test_floats_take_the_update_in(whole: Path) -> None:
    """In fp32 each linear weight is W + scale * alpha / rank * B A to rounding, and the rest has the same bits."""
    before = arrays(model())
    after = arrays(transforms.adapt(model(), [(whole, -0.5)]))
    found = pairs()
    assert set(after) == set(before)
    for name, array in after.items():
        path = name.removesuffix(".weight")
        if path in found:
            wanted = np.array(before[name], np.float64) + delta(found[path], -0.375)
            assert relative_l2(np.array(array), wanted) < 2e-7, name
            assert relative_l2(np.array(before[name]), wanted) > 0.05, name
        else:
            assert mx.array_equal(array, before[name]), name


def test_bfloat16_is_rounded_once(whole: Path, some: Path) -> None:
    """In bf16 each weight is the fp32 sum of all updates, rounded once: within half a step of the exact sum."""
    before = arrays(model(dtype=mx.bfloat16))
    after = arrays(transforms.adapt(model(dtype=mx.bfloat16), [(whole, 1.0), (some, 0.5)]))
    first, second = pairs(), pairs(rank=7, seed=1)
    for path in SOME:
        exact = np.array(before[f"{path}.weight"].astype(mx.float32), np.float64)
        exact += delta(first[path], 0.75) + delta(second[path], 0.5)
        array = after[f"{path}.weight"]
        assert array.dtype == mx.bfloat16
        step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        assert np.all(np.abs(np.array(array.astype(mx.float32)) - exact) <= 0.5 * step * 1.001 + 1e-6)


def test_merged_weights_cost_nothing(whole: Path) -> None:
    """A floating-point model with an adapter has the same kinds of layers, counts and bytes as without."""
    plain = model()
    adapted = transforms.adapt(plain, [(whole, 1.0)])
    assert kinds(adapted) == kinds(plain)
    assert (count_parameters(adapted), weight_bytes(adapted)) == (count_parameters(plain), weight_bytes(plain))


@pytest.mark.parametrize("mode", [None, "4bit", "mxfp8"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_argument_is_left_alone(mode: str | None, fused: bool, whole: Path) -> None:
    """adapt leaves its argument's arrays, modules and output as they were."""
    plain = FUSIONS["both"](model(mode)) if fused else model(mode)
    before, output, modules = arrays(plain), run(plain), [id(m) for m in plain.modules()]
    mx.eval(output)
    transforms.adapt(plain, [(whole, 1.0)])
    after = arrays(plain)
    assert list(after) == list(before)
    assert all(after[name] is array for name, array in before.items())
    assert [id(m) for m in plain.modules()] == modules
    assert mx.array_equal(run(plain), output)


@pytest.mark.parametrize("mode", [None, "4bit"])
def test_untouched_arrays_are_shared(mode: str | None, some: Path) -> None:
    """Arrays that no update concerns are the same objects, fused ones too; so are packed weights with one beside."""
    for plain in (model(mode), FUSIONS["both"](model(mode))):
        before, after = arrays(plain), arrays(transforms.adapt(plain, [(some, 1.0)]))
        groups = ("layers.0.attention.to_", "layers.0.feed_forward.w")
        untouched = [name for name in before if not name.startswith(groups)]
        assert len(untouched) > 30
        assert [name for name in untouched if after[name] is not before[name]] == []
    packed = model("4bit")
    before, after = arrays(packed), arrays(transforms.adapt(packed, [(some, 1.0)]))
    assert all(after[name] is array for name, array in before.items())


def test_no_adapters_change_nothing() -> None:
    """adapt without files gives the same arrays; at scale 0 the same bits."""
    plain = model()
    assert all(arrays(transforms.adapt(plain, []))[name] is array for name, array in arrays(plain).items())


def test_scale_zero_changes_no_bit(whole: Path) -> None:
    """At scale 0 the weights have the same bits, and a quantized model gives the same output."""
    assert same_bits(arrays(transforms.adapt(model(), [(whole, 0.0)])), arrays(model()))
    packed = model("4bit")
    assert mx.array_equal(run(transforms.adapt(packed, [(whole, 0.0)])), run(packed))


@pytest.mark.parametrize("mode", [None, "4bit", "mxfp8"])
def test_effects_add_up(mode: str | None, whole: Path, some: Path) -> None:
    """Several adapters at once, one after the other, and one in two halves all give the same output to rounding."""
    plain = model(mode)
    together = run(transforms.adapt(plain, [(whole, 1.0), (some, -2.0)]))
    assert error(together, run(transforms.adapt(plain, [(whole, 1.0)]))) > 0.01
    for files in ([(whole, 1.0)], [(some, -2.0)]), ([(some, -1.0), (whole, 1.0)], [(some, -1.0)]):
        adapted = plain
        for part in files:
            adapted = transforms.adapt(adapted, part)
        assert error(run(adapted), together) <= 2e-6
    undone = transforms.adapt(transforms.adapt(plain, [(whole, 1.0)]), [(whole, -1.0)])
    assert error(run(undone), run(plain)) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_beside_packed_weights_it_is_the_same_model(mode: str, whole: Path, some: Path) -> None:
    """A quantized model with updates beside its weights gives what the unpacked weights with the updates in give."""
    packed = model(mode)
    files = [(whole, 0.7), (some, 1.0)]
    found, wanted = run(transforms.adapt(packed, files)), run(transforms.adapt(unpacked(packed), files))
    assert error(found, wanted) <= 3e-6
    assert error(run(packed), wanted) > 0.05


def test_a_layer_with_an_update_beside(whole: Path) -> None:
    """Such a layer is its quantized layer plus x A^T B^T with the factor in B, also with a bias."""
    adapted = transforms.adapt(model("4bit"), [(whole, 2.0)])
    found = pairs()
    x = mx.random.normal((3, 5, 192), key=mx.random.key(1))
    for path, layer in (
        ("layers.0.attention.to_k", adapted.layers[0].attention.to_k),
        ("layers.0.adaLN_modulation.0", adapted.layers[0].adaLN_modulation[0]),
    ):
        assert isinstance(layer, AdaptedLinear)
        x = x[..., : layer.lora_down.shape[1]]
        base = np.array(layer.without_update()(x), np.float64)
        wanted = base + np.array(x, np.float64) @ delta(found[path], 1.5).T
        assert relative_l2(np.array(layer(x)), wanted) < 1e-6


@every_fusion
@pytest.mark.parametrize("mode", [None, "4bit", "mxfp8"])
def test_fusing_an_adapted_model(
    fuse: Callable[[Transformer], Transformer], mode: str | None, whole: Path, some: Path
) -> None:
    """Fusing keeps the output to rounding, with updates on all projections, on one only, and of several ranks."""
    for files in [(whole, 1.0)], [(some, 1.0)], [(whole, 1.0), (some, 1.0)]:
        adapted = transforms.adapt(model(mode), files)
        assert error(run(fuse(adapted)), run(adapted)) <= 1e-6


@every_fusion
@pytest.mark.parametrize("mode", ["4bit", "nvfp4"])
def test_unfusing_gives_back_the_bits(
    fuse: Callable[[Transformer], Transformer], mode: str, whole: Path, some: Path
) -> None:
    """Unfusing a fused model with updates gives the names, layers and bits that it had; fusing again the same bits."""
    for files in [(whole, 1.0)], [(some, 1.0)], [(whole, 1.0), (some, 1.0)]:
        adapted = transforms.adapt(model(mode), files)
        fused = fuse(adapted)
        back = transforms.unfuse(fused)
        assert same_bits(arrays(back), arrays(adapted))
        assert kinds(back) == kinds(adapted)
        assert mx.array_equal(run(back), run(adapted))
        assert same_bits(arrays(fuse(back)), arrays(fused))


@every_fusion
@pytest.mark.parametrize("mode", [None, "4bit"])
def test_adapting_a_fused_model(
    fuse: Callable[[Transformer], Transformer], mode: str | None, whole: Path, some: Path
) -> None:
    """Adapting a fused model gives the bits of fusing an adapted one, also on top of an earlier adapter."""
    plain = model(mode)
    for files in [(whole, 1.0)], [(some, 1.0)]:
        wanted = fuse(transforms.adapt(plain, files))
        assert same_bits(arrays(transforms.adapt(fuse(plain), files)), arrays(wanted))
    twice = transforms.adapt(transforms.adapt(fuse(plain), [(some, 1.0)]), [(whole, 1.0)])
    wanted = fuse(transforms.adapt(transforms.adapt(plain, [(some, 1.0)]), [(whole, 1.0)]))
    assert same_bits(arrays(twice), arrays(wanted))


def test_a_copied_projection_stays_copied(whole: Path) -> None:
    """Adapting a model that copies after the split keeps its blocks doing so."""
    adapted = transforms.adapt(transforms.fuse_qkv_copied(model()), [(whole, 1.0)])
    assert {type(block.attention) for _, block in transforms.blocks(adapted)} == {transforms.CopiedQKVAttention}


def test_a_block_that_is_not_fused_stays_so(some: Path) -> None:
    """Adapting a model of which one block is fused leaves that block fused and the others not."""
    mixed = model("4bit")
    mixed.layers[0].attention = transforms.FusedQKVAttention(mixed.layers[0].attention)
    adapted = transforms.adapt(mixed, [(some, 1.0)])
    assert [type(b.attention) for _, b in transforms.blocks(adapted)] == [
        type(b.attention) for _, b in transforms.blocks(mixed)
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_the_packing_is_still_reported(fused: bool, whole: Path) -> None:
    """quantization_of and the parameter count of an adapted model are those of the bare model; its bytes are more."""
    packed = FUSIONS["both"](model("4bit")) if fused else model("4bit")
    adapted = transforms.adapt(packed, [(whole, 1.0)])
    assert transforms.quantization_of(adapted) == transforms.quantization_of(packed)
    assert count_parameters(adapted) == count_parameters(packed)
    assert weight_bytes(adapted) > weight_bytes(packed)


@pytest.mark.parametrize("fused", [False, True])
def test_casting_an_adapted_model(fused: bool, whole: Path) -> None:
    """A cast casts the updates too, computes in the dtype, and can still be unfused; the argument stays fp32."""
    adapted = transforms.adapt(model("4bit"), [(whole, 1.0)])
    adapted = FUSIONS["both"](adapted) if fused else adapted
    halved = transforms.cast(adapted, "bfloat16")
    assert {a.dtype for a in arrays(halved).values()} == {mx.bfloat16, mx.uint32}
    assert {a.dtype for a in arrays(adapted).values()} == {mx.float32, mx.uint32}
    assert run(halved).dtype == mx.bfloat16
    assert 1e-4 < error(run(halved), run(adapted)) < 0.1
    wanted = transforms.cast(transforms.adapt(model("4bit"), [(whole, 1.0)]), "bfloat16")
    assert same_bits(arrays(transforms.unfuse(halved)), arrays(wanted))


def test_updates_have_the_models_dtype(whole: Path) -> None:
    """Beside weights of a bf16 model the update is bf16, and the output too."""
    adapted = transforms.adapt(model("mxfp4", mx.bfloat16), [(whole, 1.0)])
    assert adapted.layers[0].attention.to_q.lora_up.dtype == mx.bfloat16
    assert run(adapted).dtype == mx.bfloat16


def test_a_clone_has_the_same_updates(whole: Path) -> None:
    """A clone of an adapted, fused model holds the same arrays and can be unfused."""
    adapted = FUSIONS["both"](transforms.adapt(model("4bit"), [(whole, 1.0)]))
    copy = clone(adapted)
    assert all(arrays(copy)[name] is array for name, array in arrays(adapted).items())
    assert same_bits(arrays(transforms.unfuse(copy)), arrays(transforms.unfuse(adapted)))


@pytest.mark.parametrize("fused", [False, True])
def test_updates_beside_packed_weights_are_not_saved(fused: bool, whole: Path, tmp_path: Path) -> None:
    """No checkpoint holds updates beside packed weights: the line says how to merge them, and nothing is written."""
    adapted = transforms.adapt(model("4bit"), [(whole, 1.0)])
    adapted = FUSIONS["both"](adapted) if fused else adapted
    for attempt in (lambda: transforms.tensors(adapted), lambda: weights.save_transformer(adapted, tmp_path / "a/b")):
        with pytest.raises(InputError, match=r"zimage convert SOURCE DIR --lora FILE --quantization NAME$") as caught:
            attempt()
        assert str(caught.value).isprintable()
    assert not (tmp_path / "a").exists()


def test_merged_weights_are_saved_and_quantized(whole: Path, tmp_path: Path) -> None:
    """A floating-point model with an adapter is saved and loads back bit for bit, and can be quantized."""
    adapted = transforms.adapt(model(), [(whole, 1.0)])
    folder = weights.save_transformer(adapted, tmp_path / "saved")
    assert same_bits(arrays(weights.load_transformer(folder, "float32")), arrays(adapted))
    assert error(run(transforms.quantize(adapted, "8bit")), run(adapted)) < 0.03


def test_an_adapted_packed_model_is_not_quantized_again(whole: Path) -> None:
    """Quantizing a model with updates beside its weights is refused like any quantized one."""
    with pytest.raises(InputError, match="is quantized already"):
        transforms.quantize(transforms.adapt(model("4bit"), [(whole, 1.0)]), "8bit")


def test_merged_is_what_adapt_does(whole: Path, some: Path) -> None:
    """Layer by layer, `merged` gives the bits that `adapt` gives, and a weight without updates as the same object."""
    files: list[tuple[str | Path, float]] = [(whole, 1.0), (some, 0.5)]
    updates = adapters.read_all(files, CONFIG)
    wanted = arrays(transforms.adapt(model(dtype=mx.bfloat16), files))
    for name, array in arrays(model(dtype=mx.bfloat16)).items():
        found = transforms.merged(array, updates.get(name.removesuffix(".weight"), ()))
        assert mx.array_equal(found, wanted[name]), name
        assert (found is array) == (name.removesuffix(".weight") not in updates)


def test_updates_are_frozen(whole: Path) -> None:
    """An adapted model has nothing to train, like any other."""
    for mode in (None, "4bit"):
        adapted = FUSIONS["both"](transforms.adapt(model(mode), [(whole, 1.0)]))
        assert tree_flatten(adapted.trainable_parameters()) == []


def test_bad_files_and_scales_are_refused(whole: Path, tmp_path: Path) -> None:
    """What is no adapter of this model or no scale is refused before anything is changed."""
    other = write(tmp_path / "other.safetensors", named({"layers.9.attention.to_q": pairs()[SOME[0]]}))
    with pytest.raises(WeightsError, match=r"layers\.9\.attention\.to_q"):
        transforms.adapt(model(), [(whole, 1.0), (other, 1.0)])
    with pytest.raises(InputError, match="scale must be a finite number, found nan"):
        transforms.adapt(model(), [(whole, float("nan"))])
    with pytest.raises(InputError, match="use a smaller scale"):
        transforms.adapt(model("4bit"), [(whole, 1e39)])
