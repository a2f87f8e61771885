"""Operations with more than one way to compute them, each way giving the same answer up to rounding.

Kernels of our own for GPUs lie in modules of this package, each beside the operations it does at once; `native` says
when one of them runs.

On a CPU in fp32, MLX evaluates `exp` one scalar at a time but `power` two and a half times as fast, and in place, so
softmax and SiLU go through powers of two there; elsewhere MLX's own fused operations are used. BLAS has fp32 products
only, and MLX's own of half precision take twenty times as long there: linear layers and attention of half precision
compute in fp32 on a CPU, and round what they give.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

_LOG2E = math.log2(math.e)
_LARGEST_EXPONENT = 126.0  # of a power of two whose gradient is still finite in fp32


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _fp32_on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and _on_cpu()


def _half_on_cpu(x: mx.array) -> bool:
    return x.dtype in (mx.bfloat16, mx.float16) and _on_cpu()


def _on_cuda() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu and mx.cuda.is_available()


def _unpacks() -> bool:
    """Whether products unpack their weights first."""
    return _on_cpu() or _on_cuda()


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), any shape."""
    if _fp32_on_cpu(x):
        return x / (1 + mx.power(2.0, mx.minimum(x * -_LOG2E, _LARGEST_EXPONENT)))
    return nn.silu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, of any one shape."""
    return silu(gate) * up


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """softmax(q k^T * scale + mask) v for q [B, N, L, D], k and v [B, N_kv, L, D] with N a multiple of N_kv.

    mask is additive, of q's dtype, or boolean, True where a query sees a key; it is the same for all heads, and
    broadcasts to [B, 1, L, L].
    """
    if _half_on_cpu(q):
        mask = mask if mask is None or mask.dtype == mx.bool_ else mask.astype(mx.float32)
        wide_q, wide_k, wide_v = (a.astype(mx.float32) for a in (q, k, v))
        return _by_powers_of_two(wide_q, wide_k, wide_v, scale, mask).astype(q.dtype)
    if _fp32_on_cpu(q):
        return _by_powers_of_two(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _by_powers_of_two(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Attention in fp32."""
    B, N, L, D = q.shape
    groups = (B, k.shape[1], N // k.shape[1], L)
    queries = (q * (scale * _LOG2E)).reshape(*groups, D)
    scores = queries @ k[:, :, None].swapaxes(-1, -2)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask[..., None, :, :], scores, -math.inf)
    elif mask is not None:
        scores = scores + mask[..., None, :, :] * _LOG2E
    weights = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    out = (weights @ v[:, :, None]) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(B, N, L, D)


def dequantize(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
    dtype: mx.Dtype,
) -> mx.array:
    """Packed weights [out, in * bits / 32] as floating-point ones [out, in] of `dtype`."""
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=dtype)


class Linear(nn.Linear):
    """MLX's linear layer, which multiplies in fp32 on a CPU whatever its dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _half_on_cpu(x):
            y: mx.array = super().__call__(x)
            return y
        y = _wide_product(x, self.weight)
        return (y + self.bias if "bias" in self else y).astype(x.dtype)


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x weight^T for x [..., in] and weight [out, in], computed in fp32 on a CPU and rounded to x's dtype."""
    return _wide_product(x, weight).astype(x.dtype) if _half_on_cpu(x) else x @ weight.T


def _wide_product(x: mx.array, weight: mx.array) -> mx.array:
    return x.astype(mx.float32) @ weight.T.astype(mx.float32)


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's quantized layer, which unpacks its weights before each product where that is faster.

    On a CPU, MLX's quantized product runs scalar code, 28 to 75 times slower than unpacking and an optimised BLAS in
    fp32, 170 times in bf16. On CUDA with many rows it compiles for a minute at first use and then takes 3.7 times as
    long (4128 rows, 3840 to 11520, 4 bits, H100, MLX 0.32.4). On Metal it is used as it is.
    """

    unpack: Callable[..., mx.array] = staticmethod(dequantize)
    ways: Mapping[int, Callable[..., mx.array]] = MappingProxyType({})  # by rows of x, where `tuning` has chosen

    def __call__(self, x: mx.array) -> mx.array:
        way = self.ways.get(x.size // x.shape[-1])
        if way is not None:
            return way(self, x)
        if not _unpacks():
            return super().__call__(x)
        weight = self.unpack(
            self.weight, self.scales, self.get("biases"), self.group_size, self.bits, self.mode, x.dtype
        )
        y = product(x, weight)
        return y + self.bias if "bias" in self else y

    def unpacked_bytes(self, itemsize: int) -> int:
        """Bytes that the weights take unpacked, `itemsize` each; 0 where products take them packed."""
        return self.weight.size * 32 // self.bits * itemsize if _unpacks() else 0
