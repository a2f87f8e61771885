"""The modulation of all blocks from one product: the plain model's velocity, nothing stored twice, nothing stale."""

import gc
from pathlib import Path
from unittest.mock import patch

from tests.synthetic import synthetic
from tests.test_transforms import CONFIGS, MODES, PLAIN, arrays, error, every_config, run, same_bits
from zimage import arms, inputs, kernels, low_memory, operations, step_caching, transforms
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.modulation import Stacked
from zimage.saving import save_transformer
from zimage.transformer import State, Transformer, TransformerBlock, weight_bytes
from zimage.weights import load_transformer

import mlx.core as mx
import pytest

MODULATED = 1 + 2  # the noise refiner and the main blocks of PLAIN


def own_products(model: Transformer) -> int:
    """How many blocks compute their modulation themselves in a call."""
    count = 0
    plain = TransformerBlock.modulation

    def counted(block: TransformerBlock, temb: object) -> object:
        nonlocal count
        count += isinstance(temb, mx.array)
        return plain(block, temb)  # type: ignore[arg-type]

    with patch.object(TransformerBlock, "modulation", counted):
        mx.eval(run(model))
    return count


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("others", [[], ["join_blocks"], ["join_blocks", "compile_blocks"], ["compile_step"]], ids=str)
def test_it_computes_the_same(config: TransformerConfig, dtype: str, others: list[str]) -> None:
    """Of a ragged batch it gives the plain model's velocity up to rounding, also joined and compiled."""
    model = arms.transformed(transforms.cast(synthetic(config), dtype), others)
    fused = transforms.fuse_modulation(model)
    for seed in (3, 4):
        assert error(run(fused, seed), run(model, seed)) <= (1e-6 if dtype == "float32" else 0.02)


def test_one_product_takes_the_place_of_each_block_s() -> None:
    """No block of a fused model computes a modulation, and the stacked layer is called once, before the first block."""
    model = synthetic(PLAIN)
    fused = transforms.fuse_modulation(model)
    assert own_products(model) == MODULATED
    stacked = fused.stacked_modulation
    assert stacked is not None and own_products(fused) == 0
    calls = []
    linear = kernels.Linear.__call__

    def counted(layer: kernels.Linear, x: mx.array) -> mx.array:
        calls.append(layer)
        return linear(layer, x)

    with patch.object(kernels.Linear, "__call__", counted):
        run(fused)
    assert [layer for layer in calls if layer is stacked.layer] == [stacked.layer]
    assert not any(layer is block.adaLN_modulation[0] for layer in calls for block in fused.layers)
    example = inputs.example(model, "synthetic:tiny", 32, 32, 2, 3, 0)
    names, prefix = operations.stage_prefix(fused, example)
    assert names[0] == "t_embedder" and prefix(1)[1].shape == (2, 1, 4 * PLAIN.dim)  # the stage does the product


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "nvfp4"])
def test_packed_layers_are_stacked_as_they_are(mode: str) -> None:
    """A quantized model's modulation is that of its packed layers, from one packed product."""
    packed = transforms.quantize(synthetic(PLAIN), mode)
    fused = transforms.fuse_modulation(packed)
    assert own_products(fused) == 0
    assert error(run(fused), run(packed)) <= 1e-6
    assert same_bits(arrays(fused), arrays(packed))


def test_layers_packed_differently_are_refused_and_left_by_the_fast_model() -> None:
    """One line names the layer and both ways; the fast model then leaves modulation to the blocks."""
    recipe = {"rules": [{"pattern": "layers.1.adaLN_modulation.0", "quantization": "8bit"}]}
    packed = transforms.quantize(synthetic(PLAIN), recipe)
    with pytest.raises(InputError, match=r"^adaLN_modulation: projections of one fused group must be stored alike"):
        transforms.fuse_modulation(packed)
    fast = arms.fast(packed)
    assert fast.stacked_modulation is None
    assert error(run(fast), run(packed)) <= 1e-5


def test_nothing_is_stored_twice(tmp_path: Path) -> None:
    """A fused model has the plain one's names, weights and bytes, and takes no more memory once that is dropped."""
    model = Transformer(PLAIN, seed=5)
    mx.eval(model.parameters())
    before, wanted = arrays(model), run(model)
    values = {name: mx.array(array) for name, array in before.items()}
    mx.eval(wanted, values)
    gc.collect()
    held = mx.get_active_memory()
    fused = transforms.fuse_modulation(model)
    assert same_bits(arrays(fused), values) and weight_bytes(fused) == weight_bytes(model)
    touched = {name for name, array in arrays(fused).items() if array is not before[name]}
    assert touched == {name for name in before if ".adaLN_modulation." in name and not name.startswith("all_final")}
    del model, before
    gc.collect()
    assert mx.get_active_memory() - held < 4096 * len(touched)  # pages, of which small arrays fill a part
    save_transformer(fused, tmp_path / "saved")
    assert same_bits(arrays(load_transformer(tmp_path / "saved")), values)
    assert mx.array_equal(run(transforms.unfuse(fused)), wanted)
    assert transforms.unfuse(fused).stacked_modulation is None


def test_a_replaced_layer_counts() -> None:
    """Whatever is put in a block's place afterwards is what modulates it, and the other blocks stay as they are."""
    plain, fused = synthetic(PLAIN), transforms.fuse_modulation(synthetic(PLAIN))
    before = run(fused)
    for model in (plain, fused):
        linear = model.layers[1].adaLN_modulation[0]
        linear.weight = linear.weight + 0.05
    assert own_products(fused) == 1
    assert error(run(fused), run(plain)) <= 1e-6
    assert error(run(fused), before) > 1e-4
    packed = transforms.quantize(transforms.fuse_modulation(synthetic(PLAIN)), "4bit")
    assert own_products(packed) == MODULATED
    assert error(run(packed), run(transforms.quantize(synthetic(PLAIN), "4bit"))) <= 1e-6
    again = transforms.fuse_modulation(packed)
    assert own_products(again) == 0 and error(run(again), run(packed)) <= 1e-6


def test_a_copy_has_the_same_stack() -> None:
    """Fusing twice changes nothing more, and a copy of a fused model is fused without stacking again."""
    fused = transforms.fuse_modulation(synthetic(PLAIN))
    twice = transforms.fuse_modulation(fused)
    assert twice is not fused and twice.stacked_modulation is fused.stacked_modulation
    assert own_products(transforms.fuse_qkv(fused)) == 0
    with patch.object(Stacked, "of", side_effect=AssertionError), pytest.raises(InputError, match="is so already"):
        arms.changed(fused, "fuse_modulation")


def test_reusing_and_streaming_models() -> None:
    """TeaCache decides by the same modulation, and blocks that stay on disk are refused in one line."""
    model = load_transformer("digits")
    example = inputs.example(model, "digits", 8, 8, 2, 1, 0)
    for one in (model, transforms.fuse_modulation(model)):
        cached = step_caching.started(step_caching.tea_cache(one), 2)
        mx.eval(cached(*example))
        state = State(*example)
        for stage in one.stages(*example)[:5]:
            state = stage(state)
        first = one.layers[0]
        found = first.modulation(state.of_timestep(first))
        assert error(found[0], first.modulation(state.temb)[0]) <= 1e-6
    streamed = low_memory.streamed("digits")
    with pytest.raises(InputError, match="blocks of this model stay on disk; fuse a loaded model"):
        transforms.fuse_modulation(streamed)
    assert error(arms.fast(streamed)(*example), model(*example)) <= 1e-5


def test_variants_share_one_stack() -> None:
    """Arms with the fused modulation have one stacked layer among them, and those without it compute on their own."""
    model = synthetic(CONFIGS["plain"])
    found = arms.variants(model, {"plain": [], "one": ["fuse_modulation"], "fast": ["fast"]})
    assert found["plain"].stacked_modulation is None and own_products(found["plain"]) == MODULATED
    assert found["one"].stacked_modulation is found["fast"].stacked_modulation is not None
    plain = [block.adaLN_modulation[0].weight for block in model.layers]
    assert all(block.adaLN_modulation[0].weight is own for block, own in zip(found["plain"].layers, plain, strict=True))
    assert own_products(found["one"]) == own_products(found["fast"]) == 0
