"""The model: its inputs, stages, masks, dtypes and weights. Its numbers are compared under parity/."""

from typing import Any

from tests.parity import ours
from tests.parity.cases import CASES, relative_l2, repeat_kv, weights
from zimage import kernels
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.transformer import State, Transformer, count_parameters, weight_bytes

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

CONFIG = TransformerConfig.tiny()
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A tiny model in fp32."""
    return Transformer(CONFIG)


def _inputs(
    *captions: int, size: tuple[int, int] = (6, 8), dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Seeded latents, timesteps and captions of the given token counts."""
    keys = mx.random.split(mx.random.key(11), len(captions) + 2)
    B = len(captions)
    latents = mx.random.normal((B, CONFIG.in_channels, *size), key=keys[0]).astype(dtype)
    timestep = mx.random.uniform(0.1, 0.9, (B,), key=keys[1])
    features = [
        mx.random.normal((n, CONFIG.cap_feat_dim), key=key).astype(dtype)
        for n, key in zip(captions, keys[2:], strict=True)
    ]
    return latents, timestep, features


def _error(found: mx.array, wanted: mx.array) -> float:
    return relative_l2(np.array(found), np.array(wanted))


def test_stage_names_are_in_the_order_of_the_forward_pass() -> None:
    """Stages are the embedders, noise refiners, context refiners, main blocks and the final layer, in that order."""
    deep = Transformer(TransformerConfig.tiny(n_layers=3, n_refiner_layers=2))
    names = [stage.name for stage in deep.stages(*_inputs(5))]
    refiners = ["noise_refiner.0", "noise_refiner.1", "context_refiner.0", "context_refiner.1"]
    blocks = ["layers.0", "layers.1", "layers.2"]
    assert names == ["t_embedder", "x_embedder", "cap_embedder", *refiners, *blocks, "final_layer"]


@DTYPES
@pytest.mark.parametrize("captions", [(5,), (5, 40)])
def test_the_model_is_the_fold_of_its_stages(captions: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Folding the stages over a State, evaluating each, gives bit for bit what calling the model gives."""
    transformer = Transformer(CONFIG, dtype=dtype)
    inputs = _inputs(*captions, dtype=dtype)
    state = State(*inputs)
    for stage in transformer.stages(*inputs):
        state = stage(state)
        assert state.arrays()
        mx.eval(state.arrays())
    assert state.velocity is not None
    assert mx.array_equal(state.velocity, transformer(*inputs))


@DTYPES
@pytest.mark.parametrize("given", [mx.float32, mx.bfloat16], ids=["given_float32", "given_bfloat16"])
@pytest.mark.parametrize("captions", [(5,), (5, 40)])
def test_the_residual_stream_keeps_its_dtype(captions: tuple[int, ...], given: mx.Dtype, dtype: mx.Dtype) -> None:
    """Whatever the dtype of the inputs, every array at every stage has that of the weights; timesteps are fp32."""
    transformer = Transformer(CONFIG, dtype=dtype)
    inputs = _inputs(*captions, dtype=given)
    assert transformer.dtype == dtype
    state = State(*inputs)
    for stage in transformer.stages(*inputs):
        state = stage(state)
        assert {array.dtype for array in state.arrays()} == {dtype}, stage.name


def test_the_timestep_is_embedded_before_it_is_rounded() -> None:
    """A bf16 model takes the timestep in fp32: two that are equal in bf16 embed as far apart as in an fp32 model."""
    latents, _, captions = _inputs(5, 5)
    timestep = mx.array([0.5, 0.501])
    assert timestep.astype(mx.bfloat16)[0] == timestep.astype(mx.bfloat16)[1]
    apart = []
    for dtype in (mx.float32, mx.bfloat16):
        stages = Transformer(CONFIG, dtype=dtype).stages(latents, timestep, captions)
        temb = stages[0](State(latents, timestep, captions)).temb
        assert temb is not None
        apart.append(np.linalg.norm(np.array((temb[0] - temb[1]).astype(mx.float32))))
    assert apart[0] > 0.1
    assert 0.5 < apart[1] / apart[0] < 2


def test_a_state_holds_only_what_later_stages_need(model: Transformer) -> None:
    """After the first main block image and caption are gone, and at the end only the velocity is left."""
    inputs = _inputs(5)
    state = State(*inputs)
    for stage in model.stages(*inputs):
        state = stage(state)
        if stage.name.startswith("layers."):
            assert state.image is None
            assert state.caption is None
            assert state.joint is not None
            assert state.joint.shape == (1, 64, CONFIG.dim)
    assert state.velocity is not None
    assert [array.shape for array in state.arrays()] == [(1, 4, 6, 8)]


def test_a_ragged_batch_equals_its_items_one_by_one(model: Transformer) -> None:
    """Each item of a ragged batch has the velocity it has alone, to fp32 rounding."""
    latents, timestep, captions = _inputs(1, 33, 70)
    batch = model(latents, timestep, captions)
    for i, caption in enumerate(captions):
        alone = model(latents[i : i + 1], timestep[i : i + 1], [caption])
        assert _error(batch[i], alone[0]) <= 1e-5


def test_a_list_of_captions_equals_one_array(model: Transformer) -> None:
    """Captions of one length may be given as one array or as a list, with the same result."""
    latents, timestep, captions = _inputs(5, 5)
    assert mx.array_equal(model(latents, timestep, captions), model(latents, timestep, mx.stack(captions)))


def _masks_given(monkeypatch: pytest.MonkeyPatch, transformer: Transformer, inputs: Any) -> list[Any]:
    masks: list[Any] = []
    attend = kernels.attention

    def watched(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
        masks.append(mask)
        return attend(q, k, v, scale, mask)

    monkeypatch.setattr(kernels, "attention", watched)
    mx.eval(transformer(*inputs))
    return masks


@pytest.mark.parametrize("captions", [(5,), (5, 32, 17)])
def test_attention_gets_no_mask_when_none_is_needed(
    captions: tuple[int, ...], model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all items have the same padded length, every attention is called without a mask."""
    assert _masks_given(monkeypatch, model, _inputs(*captions)) == [None] * 4


@DTYPES
def test_masks_are_additive_views_in_the_activations_dtype(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a ragged batch captions and joint sequences have masks [B, 1, 1, L] in the activations' dtype, images none."""
    masks = _masks_given(monkeypatch, Transformer(CONFIG, dtype=dtype), _inputs(5, 40))
    assert masks[0] is None
    assert [mask.shape for mask in masks[1:]] == [(2, 1, 1, 64), (2, 1, 1, 96), (2, 1, 1, 96)]
    assert {mask.dtype for mask in masks[1:]} == {dtype}


def test_zeros_after_a_shorter_caption_do_not_reach_the_output(model: Transformer) -> None:
    """What fills a shorter caption up to the longest is never attended to: the longest may grow without effect."""
    latents, timestep, captions = _inputs(5, 40)
    longer = [captions[0], mx.concatenate([captions[1]] * 3)]
    assert _error(model(latents, timestep, longer)[0], model(latents, timestep, captions)[0]) <= 1e-5


@pytest.mark.parametrize(
    ("token", "size", "captions", "used"),
    [
        ("x_pad_token", (6, 8), (32,), True),  # 12 tokens of 32
        ("x_pad_token", (8, 16), (5,), False),  # 32 tokens
        ("cap_pad_token", (8, 16), (5,), True),
        ("cap_pad_token", (6, 8), (32,), False),
        ("cap_pad_token", (8, 16), (32, 33), True),
    ],
)
def test_pad_tokens_take_part_exactly_where_there_is_padding(
    token: str, size: tuple[int, int], captions: tuple[int, ...], used: bool
) -> None:
    """Changing a learned pad token changes the velocity when its sequence is padded, and not a bit otherwise."""
    inputs = _inputs(*captions, size=size)
    transformer = Transformer(CONFIG)
    before = transformer(*inputs)
    mx.eval(before)
    transformer.update({token: transformer[token] + 1})
    after = transformer(*inputs)
    assert (_error(after, before) > 1e-3) if used else mx.array_equal(after, before)


@pytest.mark.parametrize(
    ("axes_lens", "size", "caption", "axis"),
    [
        # The image is at the frame after the padded caption: a caption of 32 needs 34 frames.
        ((34, 8, 8), (6, 8), 32, None),
        ((33, 8, 8), (6, 8), 32, "frame position 33"),
        ((34, 8, 8), (6, 8), 33, "frame position 6[45]"),
        ((256, 3, 4), (6, 8), 5, None),
        ((256, 2, 4), (6, 8), 5, "row position 2"),
        ((256, 3, 3), (6, 8), 5, "column position 3"),
    ],
)
def test_positions_beyond_axes_lens_are_refused(
    axes_lens: tuple[int, int, int], size: tuple[int, int], caption: int, axis: str | None
) -> None:
    """A caption or an image that just fits runs; one position more gives an InputError that names the axis."""
    transformer = Transformer(TransformerConfig.tiny(axes_lens=axes_lens))
    inputs = _inputs(caption, size=size)
    if axis is None:
        assert np.isfinite(np.array(transformer(*inputs))).all()
    else:
        with pytest.raises(InputError, match=f"^{axis} is beyond axes_lens"):
            transformer(*inputs)


LATENTS, TIMESTEP, CAPTIONS = mx.zeros((2, 4, 6, 8)), mx.zeros((2,)), mx.zeros((2, 5, 48))
BAD_INPUTS: list[tuple[Any, Any, Any, str]] = [
    (mx.zeros((2, 3, 6, 8)), TIMESTEP, CAPTIONS, r"latents must be an MLX array \[B, 4, H, W\], found \[2, 3, 6, 8\]"),
    (mx.zeros((4, 6, 8)), TIMESTEP, CAPTIONS, r"latents must be .* found \[4, 6, 8\]"),
    (mx.zeros((0, 4, 6, 8)), mx.zeros((0,)), [], r"latents must be .* found \[0, 4, 6, 8\]"),
    (np.zeros((2, 4, 6, 8)), TIMESTEP, CAPTIONS, "latents must be .* found ndarray"),
    (None, TIMESTEP, CAPTIONS, "latents must be .* found NoneType"),
    (mx.zeros((2, 4, 7, 8)), TIMESTEP, CAPTIONS, "latents of 7 x 8 cannot be cut into patches of 2 x 2"),
    (mx.zeros((2, 4, 0, 8)), TIMESTEP, CAPTIONS, "latents of 0 x 8 cannot be cut"),
    (LATENTS, mx.zeros((3,)), CAPTIONS, r"timestep must be an MLX array \[2\], one for each item, found \[3\]"),
    (LATENTS, mx.array(0.5), CAPTIONS, r"timestep must be .* found \[\]"),
    (LATENTS, 0.5, CAPTIONS, "timestep must be .* found float"),
    (LATENTS, [0.5, 0.5], CAPTIONS, r"timestep must be .* found \[float, float\]"),
    (LATENTS, TIMESTEP, mx.zeros((2, 5, 47)), r"\[2, L, 48\] or a list of 2 arrays \[L_i, 48\], found \[2, 5, 47\]"),
    (LATENTS, TIMESTEP, mx.zeros((1, 5, 48)), r"caption_features must be .* found \[1, 5, 48\]"),
    (LATENTS, TIMESTEP, mx.zeros((5, 48)), r"caption_features must be .* found \[5, 48\]"),
    (LATENTS, TIMESTEP, mx.array(0.0), r"caption_features must be .* found \[\]"),
    (LATENTS, TIMESTEP, [mx.zeros((5, 48))], r"caption_features must be .* found \[\[5, 48\]\]"),
    (LATENTS, TIMESTEP, [mx.zeros((5, 48)), None], r"caption_features must be .* found \[\[5, 48\], NoneType\]"),
    (LATENTS, TIMESTEP, None, "caption_features must be .* found NoneType"),
    (LATENTS, TIMESTEP, np.zeros((2, 5, 48)), "caption_features must be .* found ndarray"),
    (LATENTS, TIMESTEP, [mx.zeros((5, 48)), mx.zeros((0, 48))], "a caption needs at least one token"),
]


@pytest.mark.parametrize(("latents", "timestep", "captions", "message"), BAD_INPUTS)
def test_bad_inputs_are_refused_in_one_line(
    latents: Any, timestep: Any, captions: Any, message: str, model: Transformer
) -> None:
    """Inputs that are no arrays, or of a wrong shape, give an InputError of one line with what was found."""
    with pytest.raises(InputError, match=message) as caught:
        model(latents, timestep, captions)
    assert "\n" not in str(caught.value)


def test_several_patch_sizes_need_a_choice() -> None:
    """A model with several patch sizes asks for patch_size=, refuses others, and computes with each of its own."""
    transformer = Transformer(TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1)))
    inputs = _inputs(5)
    with pytest.raises(InputError, match=r"several patch sizes, \[1, 2\]: say patch_size="):
        transformer(*inputs)
    for wrong in (4, 2.0, "2", True, [2]):
        with pytest.raises(InputError, match=r"is not one of this model's \[1, 2\]"):
            transformer(*inputs, patch_size=wrong)
    by_patch = [transformer(*inputs, patch_size=patch) for patch in (1, 2)]
    assert by_patch[0].shape == by_patch[1].shape == inputs[0].shape
    assert not mx.array_equal(*by_patch)


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_keys_and_values(n_kv_heads: int) -> None:
    """A model with fewer K and V heads equals the one with their rows repeated, at every stage, to fp32 rounding."""
    case = next(case for case in CASES if case.transformer.n_kv_heads == n_kv_heads < case.transformer.n_heads)
    tensors = weights(ours.shapes(case))
    values = {**case.transformer.to_dict(), "n_kv_heads": case.transformer.n_heads}
    full = Transformer(TransformerConfig.from_dict(values))
    repeated = repeat_kv(tensors, case.transformer)
    full.load_weights([(name, mx.array(value)) for name, value in repeated.items()])
    found, wanted = ours.stages(case), ours.stages(case, transformer=full)
    assert list(found) == list(wanted)
    for name, array in found.items():
        assert relative_l2(array, wanted[name]) <= 2e-6, name


def test_the_final_norm_has_its_own_epsilon() -> None:
    """The final LayerNorm's epsilon is 1e-6 whatever norm_eps is, which shows in activations near a thousandth."""
    config = TransformerConfig.tiny(norm_eps=0.01)
    final = Transformer(config).all_final_layer["2-1"]
    x = 1e-3 * np.random.default_rng(0).standard_normal((1, 3, config.dim)).astype(np.float32)
    temb = mx.zeros((1, config.temb_dim))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    wanted = final.linear(mx.array(normed) * (1 + final.adaLN_modulation[1].bias))
    assert _error(final(mx.array(x), temb), wanted) <= 1e-5


def test_weights_follow_the_seed() -> None:
    """Two models of one seed have equal weights, two seeds differ in every tensor, and what is no seed is refused."""
    first, again, other = (dict(tree_flatten(Transformer(CONFIG, seed=s).parameters())) for s in (0, 0, 1))
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not any(mx.array_equal(first[name], other[name]) for name in first)
    for seed in (-1, 2**64, 1.0, "1", None, True):
        with pytest.raises(InputError, match=r"seed must be an integer from 0 to 2\^64 - 1"):
            Transformer(CONFIG, seed=seed)  # type: ignore[arg-type]


def test_synthetic_activations_stay_near_one() -> None:
    """Synthetic weights keep the velocity's spread between 0.1 and 10, so that timings and errors mean something."""
    latents, timestep, captions = _inputs(5, 40, size=(16, 16))
    spread = float(np.array(Transformer(CONFIG)(latents, timestep, captions)).std())
    assert 0.1 < spread < 10


@DTYPES
def test_parameters_and_bytes_are_counted(dtype: mx.Dtype) -> None:
    """count_parameters and weight_bytes count every tensor once, also as the sum over stages."""
    transformer = Transformer(CONFIG, dtype=dtype)
    arrays = [array for _, array in tree_flatten(transformer.parameters())]
    total = sum(array.size for array in arrays)
    assert count_parameters(transformer) == total
    assert weight_bytes(transformer) == total * dtype.size == sum(array.nbytes for array in arrays)
    assert count_parameters([transformer.layers[0], transformer.layers[1]]) == 2 * count_parameters(
        transformer.layers[0]
    )
    stages = transformer.stages(*_inputs(5))
    assert sum(stage.parameters for stage in stages) == total
    assert sum(stage.weight_bytes for stage in stages) == total * dtype.size


def test_quantized_weights_count_as_what_they_stand_for() -> None:
    """A layer quantized to 4 bits has as many parameters as before and fewer bytes."""
    import mlx.nn as nn

    transformer = Transformer(CONFIG)
    before, bytes_before = count_parameters(transformer), weight_bytes(transformer)
    for block in transformer.layers:
        block.feed_forward.w1 = nn.QuantizedLinear.from_linear(block.feed_forward.w1, group_size=32, bits=4)
    assert count_parameters(transformer) == before
    assert weight_bytes(transformer) < bytes_before


def test_nothing_trains_unless_asked(model: Transformer) -> None:
    """A new model is frozen: it has parameters and no trainable ones."""
    assert not tree_flatten(model.trainable_parameters())
    assert all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))
