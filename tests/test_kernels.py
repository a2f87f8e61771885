"""SiLU and attention against fp64, on the CPU's own path and on MLX's."""

from zimage import kernels

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float32]
few = settings(max_examples=25, deadline=None, derandomize=True)
both_paths = pytest.mark.parametrize("own", [True, False], ids=["powers of two", "MLX's own"])


@pytest.fixture
def path(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU's path or MLX's, whatever the device."""
    monkeypatch.setattr(kernels, "_fp32_on_cpu", lambda _: own)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def silu_in_fp64(x: Array) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide * np.exp(-np.logaddexp(0, -wide))


def attention_in_fp64(q: Array, k: Array, v: Array, scale: float, mask: Array | None) -> NDArray[np.float64]:
    """The definition, with K and V repeated for grouped queries."""
    wide = [np.repeat(a, q.shape[1] // a.shape[1], axis=1).astype(np.float64) for a in (q, k, v)]
    scores = wide[0] @ wide[1].swapaxes(-1, -2) * scale
    scores = scores if mask is None else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ wide[2]


def attention(q: Array, k: Array, v: Array, scale: float, mask: NDArray[np.generic] | None = None) -> Array:
    given_mask = None if mask is None else mx.array(mask)
    return np.array(kernels.attention(mx.array(q), mx.array(k), mx.array(v), scale, given_mask))


def error(found: Array, wanted: NDArray[np.floating]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def inputs(seed: int, batch: int, kv_heads: int, groups: int, length: int, width: int) -> tuple[Array, Array, Array]:
    return (
        normal(seed, batch, kv_heads * groups, length, width),
        normal(seed + 1, batch, kv_heads, length, width),
        normal(seed + 2, batch, kv_heads, length, width),
    )


def padding(seed: int, batch: int, length: int) -> Array:
    """A mask [B, 1, 1, L] that hides some of every item's keys, never all of them."""
    hidden = np.arange(length) >= np.random.default_rng(seed).integers(1, length + 1, batch)[:, None]
    return np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, None]


shapes = {
    "seed": st.integers(0, 1000), "batch": st.integers(1, 3), "kv_heads": st.integers(1, 3),
    "groups": st.integers(1, 3), "length": st.integers(1, 70), "width": st.sampled_from([8, 32, 64, 128]),
    "masked": st.booleans(),
}  # fmt: skip


@few
@given(**shapes)
def test_attention_is_the_definition_on_either_path(
    seed: int, batch: int, kv_heads: int, groups: int, length: int, width: int, masked: bool
) -> None:
    """For any shape, grouped or not, masked or not, both paths are within 2e-6 of fp64, and of each other."""
    q, k, v = inputs(seed, batch, kv_heads, groups, length, width)
    mask = padding(seed, batch, length) if masked else None
    wanted = attention_in_fp64(q, k, v, width**-0.5, mask)
    found = []
    for own in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_fp32_on_cpu", lambda _, own=own: own)
            found.append(attention(q, k, v, width**-0.5, mask))
        assert error(found[-1], wanted) <= 2e-6
    assert error(found[0], found[1]) <= 2e-6


@both_paths
@pytest.mark.usefixtures("path")
def test_hidden_keys_have_no_weight() -> None:
    """Keys under -inf don't matter, whatever they hold; so attention over the others alone is the same."""
    q, k, v = inputs(0, 1, 2, 2, 12, 32)
    mask = np.where(np.arange(12) >= 7, np.float32(-np.inf), np.float32(0))[None, None, None]
    whole = attention(q, k, v, 0.2, mask)
    k[:, :, 7:], v[:, :, 7:] = 1e3, -1e3
    assert np.array_equal(attention(q, k, v, 0.2, mask), whole)
    alone = attention_in_fp64(q, k[:, :, :7], v[:, :, :7], 0.2, None)
    assert error(whole, alone) <= 2e-6


@both_paths
@pytest.mark.usefixtures("path")
def test_a_mask_may_be_boolean() -> None:
    """True lets a query see a key and False hides it: the same as adding 0 and -inf."""
    q, k, v = inputs(0, 2, 2, 2, 12, 32)
    mask = padding(5, 2, 12)
    assert np.isinf(mask).any()
    found = attention(q, k, v, 0.2, mask == 0)
    assert error(found, attention_in_fp64(q, k, v, 0.2, mask)) <= 2e-6
    assert (
        error(attention(q, k, v, 0.2, np.ones((1, 1, 1, 12), np.bool_)), attention_in_fp64(q, k, v, 0.2, None)) <= 2e-6
    )


@both_paths
@pytest.mark.usefixtures("path")
def test_a_mask_may_differ_from_row_to_row() -> None:
    """A mask [B, 1, L, L] with other values in every row is added to the scores."""
    q, k, v = inputs(4, 2, 1, 3, 9, 32)
    mask = normal(9, 2, 1, 9, 9, scale=3.0)
    mask[:, :, np.triu_indices(9, 1)[0], np.triu_indices(9, 1)[1]] = -np.inf
    assert error(attention(q, k, v, 0.2, mask), attention_in_fp64(q, k, v, 0.2, mask)) <= 2e-6


@both_paths
@pytest.mark.usefixtures("path")
def test_large_scores_do_not_overflow() -> None:
    """Scores of +-1e4 give finite results: the value of the key that wins in each row."""
    q, k, v = inputs(1, 2, 2, 1, 16, 32)
    found = attention(q, k, v, 2000.0)
    scores = q @ k.swapaxes(-1, -2) * 2000.0
    assert np.abs(scores).max() > 1e4
    best = np.take_along_axis(v, scores.argmax(-1)[..., None], axis=2)
    second = np.partition(scores, -2, axis=-1)
    clear = second[..., -1] - second[..., -2] > 50
    assert clear.mean() > 0.9
    assert np.isfinite(found).all()
    assert np.allclose(found[clear], best[clear], rtol=1e-6)


@few
@given(
    seed=st.integers(0, 1000), shape=st.lists(st.integers(1, 9), max_size=4), scale=st.sampled_from([0.1, 1.0, 30.0])
)
def test_silu_is_the_definition_on_either_path(seed: int, shape: list[int], scale: float) -> None:
    """For any shape, both paths are within 2e-6 of fp64, and of each other."""
    x = normal(seed, *shape, scale=scale)
    found = []
    for own in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_fp32_on_cpu", lambda _, own=own: own)
            found.append(np.array(kernels.silu(mx.array(x))))
        assert found[-1].shape == x.shape
        assert error(found[-1], silu_in_fp64(x)) <= 2e-6
    assert error(found[0], found[1]) <= 2e-6


EXTREMES = [-3e38, -1e4, -128.0, -100.0, -89.0, -88.0, -64.0, -20.0, -1.0, 0.0, 1.0, 20.0, 88.0, 100.0, 1e4, 3e38]


@both_paths
@pytest.mark.usefixtures("path")
def test_silu_of_extremes_is_finite() -> None:
    """From -3e38 to 3e38 SiLU is right to 2e-6 of its size, or within 4 of nothing at the lowest float."""
    x = np.array(EXTREMES, np.float32)
    found, wanted = np.array(kernels.silu(mx.array(x))), silu_in_fp64(x)
    assert np.isfinite(found).all()
    assert np.allclose(found[1:], wanted[1:], rtol=2e-6, atol=1e-33)
    assert abs(found[0]) <= 4


@both_paths
@pytest.mark.usefixtures("path")
def test_gradients_of_silu_are_finite_and_right() -> None:
    """SiLU's gradient is finite from -1e4 to 1e4 and within 1e-5 of sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    x = np.array(EXTREMES[1:-1], np.float32)
    found = np.array(mx.grad(lambda a: kernels.silu(a).sum())(mx.array(x)))
    s = 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, 700)))
    assert np.allclose(found, s * (1 + x * (1 - s)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.2, 500.0])
def test_gradients_of_attention_agree(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of q, k and v are finite on both paths, with a mask and large scores, and agree at usual sizes."""
    q, k, v = (mx.array(a) for a in inputs(2, 2, 2, 1, 10, 32))
    mask = mx.array(padding(5, 2, 10))
    found = []
    for own in (True, False):
        monkeypatch.setattr(kernels, "_fp32_on_cpu", lambda _, own=own: own)
        total = lambda q, k, v: (kernels.attention(q, k, v, scale, mask) ** 2).sum()  # noqa: E731
        found.append([np.array(g) for g in mx.grad(total, argnums=(0, 1, 2))(q, k, v)])
        assert all(np.isfinite(g).all() for g in found[-1])
    if scale < 1:
        assert all(error(a, b) <= 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_dtypes_are_kept(dtype: mx.Dtype) -> None:
    """Both operations give the dtype they were given."""
    q, k, v = (mx.array(a).astype(dtype) for a in inputs(3, 1, 1, 2, 5, 32))
    assert kernels.attention(q, k, v, 0.2, mx.zeros((1, 1, 1, 5), dtype)).dtype == dtype
    assert kernels.silu(q).dtype == dtype


@few
@given(st.lists(st.floats(-126, 126, width=32), min_size=1, max_size=64))
def test_powers_of_two(exponents: list[float]) -> None:
    """2^x is within 3e-7 of its size for every x from -126 to 126, at whole numbers and half way between them too."""
    x = np.array([*exponents, *np.arange(-126, 126.5, 0.5)], np.float32)
    wanted = 2.0 ** x.astype(np.float64)
    assert np.abs(np.array(kernels.power_of_two(mx.array(x)), np.float64) / wanted - 1).max() <= 3e-7


def test_powers_of_two_at_the_ends() -> None:
    """From -127 down they are exactly 0, between that and the smallest normal float smaller than it; NaN stays NaN."""
    low = mx.array([-127.0, -127.5, -1e30, -np.inf])
    assert kernels.power_of_two(low).tolist() == [0, 0, 0, 0]
    assert bool((mx.abs(kernels.power_of_two(mx.linspace(-127, -126, 1000))) < 2.0**-125).all())
    assert bool(mx.isnan(kernels.power_of_two(mx.array([np.nan]))).all())


@pytest.mark.skipif(not kernels._on_cpu(), reason="what half precision does on a CPU")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_half_precision_computes_in_fp32_on_a_cpu(dtype: mx.Dtype) -> None:
    """Linear layers and attention give what fp32 gives for the same values, rounded once."""
    x = mx.array(normal(0, 1, 40, 64)).astype(dtype)
    layer = kernels.Linear(64, 96)
    layer.set_dtype(dtype)
    wide = x.astype(mx.float32) @ layer.weight.astype(mx.float32).T + layer.bias.astype(mx.float32)
    assert layer(x).dtype == dtype
    assert bool(mx.array_equal(layer(x), wide.astype(dtype)))
    q, k, v = (mx.array(a).astype(dtype) for a in inputs(1, 1, 2, 1, 40, 32))
    mask = mx.array(padding(5, 1, 40))
    for given_mask in (None, mask, mask == 0):
        narrow_mask = given_mask if given_mask is None or given_mask.dtype == mx.bool_ else given_mask.astype(dtype)
        wide = kernels.attention(*(a.astype(mx.float32) for a in (q, k, v)), 0.2, given_mask)
        assert bool(mx.array_equal(kernels.attention(q, k, v, 0.2, narrow_mask), wide.astype(dtype)))
