"""The kernels' composed forms against their definitions in fp64 NumPy, over random shapes and dtypes."""

from typing import Any

from zimage.kernels import dequantize, swiglu
from zimage.kernels.flash import attend
from zimage.kernels.heads import norm_then_rotate
from zimage.kernels.native import BOUNDS
from zimage.kernels.stream import residual_norm_modulate

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

few = settings(max_examples=25, derandomize=True)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
sizes = st.integers(1, 7)
Wide = NDArray[np.float64]


class Draw:
    """Seeded arrays in a dtype, each with its values in fp64."""

    def __init__(self, seed: int, dtype: str) -> None:
        self._random, self._dtype = np.random.default_rng(seed), getattr(mx, dtype)

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> tuple[mx.array, Wide]:
        values = mean + scale * self._random.standard_normal(shape)
        array = mx.array(values.astype(np.float32)).astype(self._dtype)
        return array, wide(array)


def wide(array: mx.array) -> Wide:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def close(found: Any, wanted: Wide, dtype: str) -> bool:
    """Within four times the bound that a kernel has to keep: the composed form rounds after every operation."""
    assert found.dtype == getattr(mx, dtype) and found.shape == wanted.shape
    scale = np.abs(wanted) + np.sqrt(np.mean(wanted**2))
    return bool(np.all(np.abs(wide(found) - wanted) <= 4 * BOUNDS[dtype] * scale))


def rms_norm(x: Wide, weight: Wide, eps: float) -> Wide:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


@given(sizes, sizes, sizes, sizes, st.integers(1, 20), st.booleans(), dtypes, st.integers(0, 2**16))
@few
def test_queries_and_keys(
    batch: int, length: int, queries: int, keys: int, half: int, own_tables: bool, dtype: str, seed: int
) -> None:
    """Normed over each head, then adjacent pairs turned as complex numbers."""
    draw = Draw(seed, dtype)
    angles = np.random.default_rng(seed).uniform(0, 6.3, (batch if own_tables else 1, length, 1, half))
    rotation = mx.array(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))
    (q, q_wide), (k, k_wide) = draw(batch, length, queries, 2 * half), draw(batch, length, keys, 2 * half)
    (q_weight, q_scale), (k_weight, k_scale) = draw(2 * half, mean=1), draw(2 * half, mean=1)
    found = norm_then_rotate(q, k, (q_weight, 1e-5), (k_weight, 0.25), rotation)
    for one, x, weight, eps in zip(found, (q_wide, k_wide), (q_scale, k_scale), (1e-5, 0.25), strict=True):
        normed = rms_norm(x, weight, eps)
        turned = (normed[..., 0::2] + 1j * normed[..., 1::2]) * np.exp(1j * angles)
        assert close(one, np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape), dtype)


@given(sizes, sizes, st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(), dtypes, st.integers(0, 2**16))
@few
def test_the_stream(
    batch: int, length: int, width: int, adds: bool, norms: bool, modulated: bool, dtype: str, seed: int
) -> None:
    """x + tanh(gate) norm(change), and its norm times one plus the scale; what is not asked for is None."""
    draw = Draw(seed, dtype)
    (x, stream), (change, y) = draw(batch, length, width), draw(batch, length, width, scale=3)
    (after, w2), (before, w) = draw(width, mean=1, scale=0.1), draw(width, mean=1, scale=0.1)
    (gate, g), (scale, s) = draw(batch, 1, width, scale=0.5), draw(batch, 1, width, scale=0.5)
    adding = (change, gate if modulated else None, (after, 1e-5)) if adds else (None, None, None)
    norming = ((before, 0.25), scale if modulated else None) if norms else (None, None)
    new, normed = residual_norm_modulate(x, *adding, *norming)
    assert (new is None, normed is None) == (not adds, not norms)
    if adds:
        stream = stream + rms_norm(y, w2, 1e-5) * (np.tanh(g) if modulated else 1)
        assert close(new, stream, dtype)
    if norms:
        assert close(normed, rms_norm(stream, w, 0.25) * (1 + s if modulated else 1), dtype)


@given(sizes, sizes, sizes, st.integers(1, 3), st.integers(1, 3), dtypes, st.integers(0, 2**16))
@few
def test_attention_to_all(batch: int, length: int, count: int, shared: int, groups: int, dtype: str, seed: int) -> None:
    """Each query's mean of the values, weighted by exp of its scores; queries of a group share keys and values."""
    draw = Draw(seed, dtype)
    (q, q_wide) = draw(batch, length, shared * groups, 8)
    (k, k_wide), (v, v_wide) = draw(batch, count, shared, 8), draw(batch, count, shared, 8)
    keys, values = (np.repeat(a, groups, axis=2) for a in (k_wide, v_wide))
    weights = np.exp(0.5 * np.einsum("blnd,bmnd->bnlm", q_wide, keys))
    wanted = np.einsum("bnlm,bmnd->blnd", weights / weights.sum(-1, keepdims=True), values)
    assert close(attend(q, k, v, 0.5), wanted, dtype)


@given(sizes, sizes, st.integers(1, 40), dtypes, st.integers(0, 2**16))
@few
def test_the_gate(batch: int, length: int, width: int, dtype: str, seed: int) -> None:
    """silu(gate) * up."""
    draw = Draw(seed, dtype)
    (gate, g), (up, u) = draw(batch, length, width, scale=4), draw(batch, length, width)
    assert close(swiglu(gate, up), g * np.exp(-np.logaddexp(0, -g)) * u, dtype)


@given(
    *(sizes, st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), dtypes, st.integers(0, 2**16))
)
@few
def test_packed_weights(rows: int, groups: int, bits: int, group: int, dtype: str, seed: int) -> None:
    """scale * q + bias, q taken from the 32-bit words with the lowest bits first."""
    values, _ = Draw(seed, dtype)(rows, groups * group)
    packed, scales, biases = mx.quantize(values, group_size=group, bits=bits)
    words = np.array(packed)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
    q = words.reshape(rows, groups, group)
    wanted = (wide(scales)[..., None] * q + wide(biases)[..., None]).reshape(rows, groups * group)
    assert close(dequantize(packed, scales, biases, group, bits, "affine", getattr(mx, dtype)), wanted, dtype)
