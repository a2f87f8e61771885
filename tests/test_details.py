"""Details that change the output, each beside a computation of its own; and what each is refused beside."""

from collections.abc import Callable

from tests.synthetic import synthetic
from tests.test_operations import _check_all_blocks
from tests.test_transforms import CONFIGS, arrays, error, run, same_bits
from zimage import (
    arms,
    details,
    execution,
    inputs,
    kernels,
    practices,
    rope,
    scheduler,
    transforms,
)
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.measure import settings
from zimage.patchify import Layout, geometry, patchify, unpatchify
from zimage.transformer import State, Transformer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

LONG = TransformerConfig.tiny(axes_lens=(1024, 64, 64))  # tiny has no place for long captions
IMAGE = (6, 4)  # latent rows and columns: 6 tokens, padded to 32


def call(model: Transformer, caption_tokens: int, timestep: float = 0.3) -> mx.array:
    """The velocity of one item."""
    latents, caption = given(model, caption_tokens)
    return model(latents, mx.array([timestep]), caption)


def given(model: Transformer, caption_tokens: int) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(5), 2)
    latents = mx.random.normal((1, model.config.in_channels, *IMAGE), key=keys[0])
    return latents, mx.random.normal((1, caption_tokens, model.config.cap_feat_dim), key=keys[1])


def by_hand(
    model: Transformer,
    caption: mx.array,
    image_length: int,
    place: Callable[[NDArray[np.int64]], NDArray[np.int64]] = lambda positions: positions,
) -> mx.array:
    """The velocity of one item whose caption is these tokens [1, L, D], padded already, from a model's plain modules.

    image_length: of its tokens with padding; place: what is done to positions before RoPE.
    """
    latents, _ = given(model, 1)
    rows, columns = IMAGE[0] // 2, IMAGE[1] // 2

    def rotation(positions: NDArray[np.int64]) -> mx.array:
        return mx.array(rope.table(place(positions), model.config))[:, None, :, None, :]

    temb = model.t_embedder(mx.array([0.3 * model.config.t_scale]), model.dtype)
    image = model.all_x_embedder["2-1"](patchify(latents.astype(model.dtype), 2))
    pad = mx.broadcast_to(model.x_pad_token, (1, image_length - rows * columns, image.shape[2]))
    image = mx.concatenate([image, pad], axis=1)
    length = caption.shape[1]
    image_rotation = rotation(rope.image_positions(rows, columns, length, image_length))
    caption_rotation = rotation(rope.caption_positions(length))
    for block in model.noise_refiner:
        image = block.forward(image, image_rotation, None, temb)
    for block in model.context_refiner:
        caption = block.forward(caption, caption_rotation, None, None)
    joint, both = mx.concatenate([image, caption], axis=1), mx.concatenate([image_rotation, caption_rotation], axis=2)
    for block in model.layers:
        joint = block.forward(joint, both, None, temb)
    return unpatchify(model.all_final_layer["2-1"](joint[:, : rows * columns], temb), IMAGE, 2)


def embedded(model: Transformer, features: mx.array) -> mx.array:
    norm, linear = model.cap_embedder
    found: mx.array = linear(norm(features))
    return found


def with_pad_tokens(model: Transformer, caption: mx.array, length: int) -> mx.array:
    pad = mx.broadcast_to(model.cap_pad_token, (1, length - caption.shape[1], caption.shape[2]))
    return mx.concatenate([caption, pad], axis=1)


def test_the_plain_model_by_hand() -> None:
    """What the details are compared with below gives the published model's output where nothing is changed."""
    model = synthetic(LONG)
    caption = with_pad_tokens(model, embedded(model, given(model, 20)[1]), 32)
    assert error(by_hand(model, caption, 32), call(model, 20)) < 1e-6


def test_positions_are_rounded_as_bfloat16_has_them() -> None:
    """With 300 caption tokens the output is that of positions which MLX rounded, and another than the plain one."""
    model = synthetic(LONG)
    detailed = details.bf16_positions(model)

    def place(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        rounded = mx.array(positions).astype(mx.float32).astype(mx.bfloat16)
        return np.array(rounded.astype(mx.int32)).astype(np.int64)

    assert [*place(np.array([256, 257, 258, 259, 513]))] == [256, 256, 258, 260, 512]
    caption = with_pad_tokens(model, embedded(model, given(model, 300)[1]), 320)
    found = call(detailed, 300)
    assert error(found, by_hand(model, caption, 32, place)) < 1e-6
    assert error(found, call(model, 300)) > 1e-4


def test_short_positions_are_not_rounded() -> None:
    """Where no position is beyond 256, on digits among others, not a bit changes."""
    model = synthetic(LONG)
    assert mx.array_equal(call(details.bf16_positions(model), 200), call(model, 200))


def test_a_position_that_is_rounded_out_of_the_table_is_refused() -> None:
    """A row that bfloat16 rounds up to axes_lens is an error, not a wrong gather."""
    config = TransformerConfig.tiny(axes_lens=(64, 260, 8))
    geometry(config, (520, 4), 2, (5,))
    with pytest.raises(InputError, match=r"row position 260 is beyond axes_lens\[1\] = 260"):
        geometry(config, (520, 4), 2, (5,), Layout(bf16_positions=True))


def test_zeros_in_place_of_the_learned_pad_tokens() -> None:
    """The output is that of a caption followed by rows of zeros, and of an image followed by them."""
    model = synthetic(LONG)
    caption = embedded(model, given(model, 20)[1])
    caption = mx.concatenate([caption, mx.zeros((1, 12, caption.shape[2]))], axis=1)
    found = call(details.zero_pad_tokens(model), 20)
    bare = synthetic(LONG)
    bare.x_pad_token = mx.zeros_like(bare.x_pad_token)
    assert error(found, by_hand(bare, caption, 32)) < 1e-6
    assert error(found, call(model, 20)) > 1e-3


def test_an_image_without_padding() -> None:
    """The output is that of the image's six tokens alone beside the padded caption."""
    model = synthetic(LONG)
    caption = with_pad_tokens(model, embedded(model, given(model, 20)[1]), 32)
    found = call(details.unpadded_image(model), 20)
    assert error(found, by_hand(model, caption, 6)) < 1e-6
    assert error(found, call(model, 20)) > 1e-4


def test_captions_of_512_rows() -> None:
    """The output is that of a caption with embedded rows of zeros after its own; a longer one is left as it is."""
    model = synthetic(LONG)
    features = mx.concatenate([given(model, 20)[1], mx.zeros((1, 492, LONG.cap_feat_dim))], axis=1)
    detailed = details.captions_512(model)
    assert error(call(detailed, 20), by_hand(model, embedded(model, features), 32)) < 1e-6
    assert mx.array_equal(call(detailed, 600), call(model, 600))
    ragged = [given(model, n)[1][0] for n in (3, 40)]  # as long as each other now, and nothing is masked
    latents = mx.concatenate([given(model, 1)[0]] * 2)
    both = detailed(latents, mx.array([0.3, 0.3]), ragged)
    for i, one in enumerate(ragged):
        assert error(both[i : i + 1], detailed(latents[:1], mx.array([0.3]), one[None])) < 1e-5


def test_layouts_add_up() -> None:
    """Details of padding and positions go together, in any order."""
    model = synthetic(LONG)
    names = ["captions_512", "bf16_positions", "unpadded_image", "zero_pad_tokens"]
    found = [call(arms.transformed(model, some), 20) for some in (names, names[::-1])]
    assert mx.array_equal(*found) and error(found[0], call(details.captions_512(model), 20)) > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_that_hide_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both reach every attention, boolean ones or additive zeros of its dtype, and change nothing but a rounding."""
    model = transforms.cast(synthetic(CONFIGS["plain"]), dtype)
    wanted, ragged, seen = call(model, 32), run(model), []
    attention = kernels.attention

    def watched(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
        seen.append((mask.dtype, mask.shape[-1] == q.shape[2], mx.all(mask == (mask.dtype == mx.bool_)).item()))
        return attention(q, k, v, scale, mask)

    monkeypatch.setattr(kernels, "attention", watched)
    count = len([*transforms.blocks(model)])
    for name, expected in (("with_all_ones_mask", mx.bool_), ("with_additive_mask", model.dtype)):
        seen.clear()
        found = call(arms.transformed(model, [name]), 32)
        assert seen == [(expected, True, True)] * count
        assert error(found, wanted) <= (1e-6 if dtype == "float32" else 0.02)
        seen.clear()
        assert error(run(arms.transformed(model, [name])), ragged) <= (1e-6 if dtype == "float32" else 0.02)
        assert len(seen) == count


def test_a_residual_stream_in_float32() -> None:
    """The stream is in fp32 and what blocks multiply in bf16, with shared weights; a block's sums are those of fp32."""
    wide = synthetic(CONFIGS["plain"])
    model = transforms.cast(wide, "bfloat16")
    detailed = details.fp32_residual(model)
    state = State(*given(model, 20)[:1], mx.array([0.3]), given(model, 20)[1])
    for stage in detailed.stages(state.latents, state.timestep, state.caption_features)[:-2]:
        state = stage(state)
    assert state.joint is not None and state.joint.dtype == mx.float32
    block, plain = detailed.layers[-1], model.layers[-1]
    assert all(plain.attention[name].weight is block.attention[name].weight for name in ("to_q", "to_k", "to_v"))
    assert plain.feed_forward.w2.weight is block.feed_forward.w2.weight
    change, gate = (mx.random.normal((1, n, 192), dtype=mx.bfloat16, key=mx.random.key(n)) for n in (64, 1))
    after, normed = block.after_attention(state.joint, change, gate, None)
    wanted = state.joint + mx.tanh(gate.astype(mx.float32)) * stream_norm(change, plain.attention_norm2)
    assert after.dtype == mx.float32 and normed.dtype == mx.bfloat16
    assert error(after, wanted) < 3e-3
    errors = [error(one(*example_of(wide)), wide(*example_of(wide))) for one in (detailed, model)]
    assert 0 < errors[0] < errors[1]


def stream_norm(x: mx.array, norm: nn.RMSNorm) -> mx.array:
    wide = np.array(x.astype(mx.float32)).astype(np.float64)
    scaled = wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + norm.eps)
    return mx.array((scaled * np.array(norm.weight.astype(mx.float32))).astype(np.float32))


def example_of(model: Transformer) -> tuple[mx.array, mx.array, mx.array]:
    latents, caption = given(model, 20)
    return latents, mx.array([0.3]), caption


def test_a_timestep_embedding_in_float32() -> None:
    """It is that of the same weights in fp32, and every activation that follows modulation is in fp32 too."""
    model = transforms.cast(synthetic(CONFIGS["plain"]), "bfloat16")
    detailed, wide = details.fp32_embedding(model), transforms.cast(model, "float32")
    found = detailed.t_embedder(mx.array([300.0]), model.dtype)
    assert found.dtype == mx.float32
    assert error(found, wide.t_embedder(mx.array([300.0]), mx.float32)) < 1e-5
    state = State(*given(model, 20)[:1], mx.array([0.3]), given(model, 20)[1])
    for stage in detailed.stages(state.latents, state.timestep, state.caption_features)[:-1]:
        state = stage(state)
    assert state.joint is not None and state.joint.dtype == mx.float32
    assert same_bits(arrays(detailed), arrays(model))


def test_a_timestep_in_bfloat16() -> None:
    """38.1 of 1000 becomes 38, bit for bit, whatever the activations are in."""
    for dtype in ("float32", "bfloat16"):
        model = transforms.cast(synthetic(CONFIGS["plain"]), dtype)
        detailed = details.bf16_timestep(model)
        found = detailed.t_embedder(mx.array([38.1]), model.dtype)
        assert found.dtype == model.dtype
        assert mx.array_equal(found, model.t_embedder(mx.array([38.0]), model.dtype))
        assert error(call(detailed, 20, 0.0381), call(model, 20, 0.038)) < 1e-6
        assert not mx.array_equal(call(detailed, 20, 0.0381), call(model, 20, 0.0381))


def test_latents_in_bfloat16() -> None:
    """A trajectory's latents and its Euler steps are rounded to bfloat16, and a step alone stays as it is."""
    model = synthetic(LONG)
    detailed = details.bf16_latents(model)
    assert mx.array_equal(call(detailed, 20), call(model, 20))
    captions = [given(model, 20)[1][0]]

    def bf16(x: mx.array) -> mx.array:
        return x.astype(mx.bfloat16).astype(mx.float32)

    latents, levels = bf16(scheduler.noise(model, 1, IMAGE, seed=1)), scheduler.sigmas(3, 3.0)
    for sigma, next_sigma in zip(levels[:-1], levels[1:], strict=True):
        velocity = bf16(model(latents, mx.array([1 - sigma]), captions))
        latents = bf16(latents + bf16(bf16(mx.array(sigma - next_sigma)) * velocity))
    found = scheduler.sample(detailed, captions, IMAGE, steps=3, shift=3.0, seed=1)
    assert found.dtype == mx.bfloat16 and error(found, latents) < 2e-3
    assert error(found, scheduler.sample(model, captions, IMAGE, steps=3, shift=3.0, seed=1)) > 1e-4


def test_norms_of_plain_operations() -> None:
    """In fp32 they are the published norms; in bf16 one rounds after every operation, and the other once at the end.

    What MLX adds up is not rounded in between: the sum of many squares below 1 goes on growing beyond 256 in bf16.
    """
    plain = synthetic(CONFIGS["plain"])
    assert error(run(arms.transformed(plain, ["norms_composed"])), run(plain)) < 1e-6
    assert mx.sum(mx.ones((4096,), dtype=mx.bfloat16)).item() == 4096
    narrow = transforms.cast(plain, "bfloat16")
    x = mx.random.normal((1, 40, 192), key=mx.random.key(2)).astype(mx.bfloat16)
    norm = narrow.layers[0].attention_norm1
    wanted = stream_norm(x, norm)
    found = {
        name: arms.transformed(narrow, [name] if name else []).layers[0].before_attention(x, None)
        for name in ("", "norms_composed", "norms_in_dtype")
    }
    rounded = wanted.astype(mx.bfloat16)
    assert error(found["norms_composed"], rounded) < 1e-4
    errors = {name: error(one, wanted) for name, one in found.items()}
    assert errors["norms_composed"] < 2.0**-8 and errors["norms_composed"] < errors["norms_in_dtype"] < 2.0**-6


@pytest.mark.parametrize("name", ["norms_in_dtype", "norms_composed", "compile_operations"])
def test_the_operations_of_a_block_are_those_of_the_detail(name: str) -> None:
    """A block taken apart for a profile computes what the block with the detail does, bit for bit."""
    model = transforms.cast(synthetic(CONFIGS["plain"]), "bfloat16")
    _check_all_blocks(arms.transformed(model, [name]), inputs.Inputs(*example_of(model)))


@pytest.mark.parametrize("name", [*details.TRANSFORMS, *execution.TRANSFORMS])
def test_a_detail_leaves_the_model_as_it_was(name: str) -> None:
    """The argument gives the same bits afterwards, from the same arrays."""
    model = transforms.cast(synthetic(LONG), "bfloat16")
    before, held = call(model, 20), arrays(model)
    mx.eval(before)
    call(arms.transformed(model, [name]), 20)
    assert mx.array_equal(call(model, 20), before)
    assert all(arrays(model)[key] is array for key, array in held.items())


def test_every_practice_has_its_transform_or_setting() -> None:
    """practices describes what details, execution and measure.settings do, by the names that arms knows."""
    assert [*practices.OUTPUT] == [*details.TRANSFORMS] and [*practices.EXECUTION] == [*execution.TRANSFORMS]
    assert [*practices.SETTINGS] == [*settings.SETTINGS]
    assert set(arms.TRANSFORMS) >= {*practices.OUTPUT, *practices.EXECUTION}
    assert all(known.what and known.who for known in practices.ALL.values())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["fuse_residual_norm", "norms_in_dtype"], "layers|noise_refiner.*computes residual_norm_modulate by a kernel"),
        (["fuse_norm_rope", "norms_composed"], "computes norm_then_rotate by a kernel"),
        (["fuse_residual_norm", "fp32_residual"], "computes residual_norm_modulate by a kernel"),
        (["fast", "fp32_embedding"], "computes residual_norm_modulate by a kernel"),
        (["norms_in_dtype", "norms_composed"], "by a kernel or another transform"),
        (["fuse_swiglu", "compile_operations"], "computes swiglu by a kernel"),
        (["norms_in_dtype", "fuse_residual_norm"], "which the kernel would undo"),
        (["compile_operations", "fast"], "which the kernel would undo"),
        (["fp32_residual", "with_additive_mask"], "is a RoundedTransformerBlock"),
        (["with_additive_mask", "with_all_ones_mask"], "is a AdditivelyMaskedTransformerBlock"),
        (["with_all_ones_mask", "fp32_residual"], "is a MaskedTransformerBlock"),
        (["bf16_timestep", "fp32_embedding"], "embedder is a BFloat16TimestepEmbedder"),
        (["fp32_embedding", "fp32_residual"], "embedder is a Float32TimestepEmbedder"),
    ],
)
def test_what_would_undo_a_detail_is_refused(names: list[str], words: str) -> None:
    """Transforms that stand in each other's place are refused in one line, whichever comes first."""
    model = transforms.cast(synthetic(CONFIGS["plain"]), "bfloat16")
    with pytest.raises(InputError, match=words) as caught:
        arms.transformed(model, names)
    assert "\n" not in str(caught.value)


def test_what_has_no_place_is_refused() -> None:
    """In fp32 wider streams and norms in its dtype, and captions that axes_lens has no place for, are refused."""
    for name in ("fp32_residual", "fp32_embedding", "norms_in_dtype"):
        with pytest.raises(InputError, match=f"{name}.*float32 already"):
            arms.transformed(synthetic(LONG), [name])
    with pytest.raises(InputError, match="514 at least, this model has 256"):
        details.captions_512(synthetic(TransformerConfig.tiny()))


def test_details_go_with_kernels_that_they_do_not_touch() -> None:
    """On the fast model, details of padding, positions and timestep do what they do on the plain one."""
    model = synthetic(LONG)
    fast = arms.fast(model)
    for name in ("bf16_positions", "zero_pad_tokens", "captions_512", "bf16_timestep", "with_additive_mask"):
        wanted = call(arms.transformed(model, [name]), 300)
        assert error(call(arms.transformed(fast, [name]), 300), wanted) < 1e-5
        assert error(call(arms.fast(arms.transformed(model, [name])), 300), wanted) < 1e-5
