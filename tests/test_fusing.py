"""Transforms that put kernels in: the plain model's bits on a CPU, in any order, and calls of the kernels on a GPU."""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import loras
from tests.parity.cases import relative_l2
from tests.synthetic import synthetic
from tests.test_operations import FUSED, PLAIN, _check_all_blocks, _tiny
from tests.test_transforms import CONFIGS, arrays, every_config, run, same_bits
from tests.test_trust import FACTS
from zimage import arms, backend, blas, fusing, kernels, operations, transforms, trust
from zimage.config import TransformerConfig
from zimage.kernels import flash, heads, native, stream
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest

Transform = Callable[[Transformer], Transformer]
KERNELS: dict[str, Transform] = {
    "fuse_norm_rope": fusing.fuse_norm_rope,
    "flash_attention": fusing.flash_attention,
    "fuse_residual_norm": fusing.fuse_residual_norm,
    "fuse_swiglu": fusing.fuse_swiglu,
    "wide_dequantize": fusing.wide_dequantize,
}
OTHERS: dict[str, Transform] = {
    "fuse_qkv": transforms.fuse_qkv,
    "fuse_gate_up": transforms.fuse_gate_up,
    "quantize": lambda model: transforms.quantize(model, "4bit-g32"),
    "with_all_ones_mask": transforms.with_all_ones_mask,
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def all_kernels(model: Transformer) -> Transformer:
    for transform in KERNELS.values():
        model = transform(model)
    return model


@every_config
@every_kernel
def test_on_a_cpu_a_kernel_changes_no_bit(name: str, config: TransformerConfig) -> None:
    """A fused model gives the plain one's bits here, shares all its arrays, and leaves it as it was."""
    model = transforms.quantize(synthetic(config), "8bit-g32")
    before = run(model)
    fused = KERNELS[name](model)
    assert mx.array_equal(run(fused), before)
    assert mx.array_equal(run(model), before)
    assert all(arrays(fused)[key] is array for key, array in arrays(model).items())
    assert same_bits(arrays(fused), arrays(model))


def test_kernels_change_no_bit_in_bfloat16() -> None:
    """The same holds for all of them together in bf16."""
    model = transforms.cast(synthetic(CONFIGS["plain"]), "bfloat16")
    assert mx.array_equal(run(all_kernels(model)), run(model))


@pytest.mark.parametrize("seed", range(8))
def test_kernels_come_in_any_order_with_other_transforms(seed: int) -> None:
    """Whatever the order, the bits are those of the other transforms alone."""
    order = [*KERNELS, *OTHERS]
    random.Random(seed).shuffle(order)
    plain = fused = synthetic(CONFIGS["grouped queries"])
    for name in order:
        fused = (KERNELS | OTHERS)[name](fused)
        plain = OTHERS[name](plain) if name in OTHERS else plain
    assert mx.array_equal(run(fused), run(plain))
    assert set(arms.TRANSFORMS) >= set(KERNELS)


@pytest.mark.parametrize("quantization", [None, "8bit-g32"])
def test_adapters_go_into_a_model_with_kernels(quantization: str | None, tmp_path: Path) -> None:
    """LoRA adapters do to a model with kernels what they do to one without, merged and beside packed weights."""
    lora = [(loras.write(tmp_path / "lora.safetensors", loras.named(loras.pairs())), 0.5)]
    model = transforms.fuse_qkv(synthetic(loras.CONFIG))
    model = transforms.quantize(model, quantization) if quantization else model
    assert mx.array_equal(run(transforms.adapt(all_kernels(model), lora)), run(transforms.adapt(model, lora)))


def test_unfused_models_save_the_published_tensors() -> None:
    """Kernels hold no weights: unfusing gives the plain model's tensors, and without_kernels the plain operations."""
    model = synthetic(CONFIGS["plain"])
    fused = all_kernels(transforms.fuse_gate_up(transforms.fuse_qkv(model)))
    assert same_bits(transforms.tensors(fused), arrays(model))
    plain = fusing.without_kernels(transforms.unfuse(fused))
    assert same_bits(arrays(plain), arrays(model))
    for _, block in transforms.blocks(plain):
        values = [value for module in block.modules() for value in module.__dict__.values()]
        assert not any(isinstance(value, native.Kernel) for value in values)
    assert isinstance(fused.layers[0].attention.norm_then_rotate, native.Kernel)
    assert isinstance(fused.layers[0].attention.attend_to_all, native.Kernel)


@pytest.mark.parametrize("config", ["plain", "grouped queries", "no QK norm"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_the_operations_of_a_model_with_kernels_are_the_whole_block(config: str, dtype: mx.Dtype) -> None:
    """One after the other they give every block's output bit for bit."""
    model, example = _tiny(CONFIGS[config], dtype)
    _check_all_blocks(all_kernels(transforms.fuse_qkv(model)), example)


@pytest.mark.parametrize("plain", [PLAIN, FUSED], ids=["separate", "fused"])
def test_an_operation_says_what_it_covers(plain: list[str]) -> None:
    """Kernels that do several operations have names of their own, and together all cover the plain ones in order."""
    model = synthetic(CONFIGS["plain"])
    if plain is FUSED:
        model = transforms.fuse_gate_up(transforms.fuse_qkv(model))
    found = operations.operations(all_kernels(model).layers[0])
    assert [name for one in found for name in (one.covers or (one.name,))] == plain
    assert {one.name for one in found} - set(plain) == {"qk_norm_rope", "attention_residual_norm"}


def number(bits: int) -> float:
    """The fp32 number that `native.float_bits` gave these bits of."""
    return float(np.int32(bits).view(np.float32))


class Gpu:
    """A GPU that computes each kernel from the inputs it is started with, and counts."""

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()

    def create(self, name: str, **_about: Any) -> Callable[..., list[mx.array]]:
        compute = getattr(self, name.removeprefix("zimage_"))

        def started(inputs: list[mx.array], template: list[Any], output_dtypes: list[Any], **_: Any) -> list[mx.array]:
            self.started[name.removeprefix("zimage_")] += 1
            found: list[mx.array] = compute(*inputs, **dict(template), dtype=output_dtypes[0])
            return found

        return started

    def qk_norm_rope(
        self, q: mx.array, k: mx.array, *others: mx.array, Q_EPS: int, K_EPS: int, **_: Any
    ) -> list[mx.array]:
        q_weight, k_weight, rotation = others
        return list(heads.norm_then_rotate(q, k, (q_weight, number(Q_EPS)), (k_weight, number(K_EPS)), rotation))

    def flash_attention(self, q: mx.array, k: mx.array, v: mx.array, SCALE_LOG2: int, **_: Any) -> list[mx.array]:
        return [flash.attend(q, k, v, number(SCALE_LOG2) * float(np.log(2)))]

    def residual_norm_modulate(
        self, x: mx.array, *others: mx.array, AFTER_EPS: int, BEFORE_EPS: int, **_: Any
    ) -> list[mx.array]:
        change, gate, after, before, scale = others
        after_norm, before_norm = (after, number(AFTER_EPS)), (before, number(BEFORE_EPS))
        adding = (change, gate if gate.ndim > 1 else None, after_norm) if change.ndim > 1 else (None, None, None)
        norming = (before_norm, scale if scale.ndim > 1 else None) if before.ndim == 1 else (None, None)
        found = stream.residual_norm_modulate(x, *adding, *norming)
        junk = mx.full((8,), sum(self.started.values()), x.dtype)  # as memory that nobody wrote to
        return [junk if one is None else one for one in found]

    def swiglu(self, gate: mx.array, up: mx.array, **_: Any) -> list[mx.array]:
        return [kernels.swiglu(gate, up)]

    def dequantize(
        self, weight: mx.array, scales: mx.array, biases: mx.array, MODE: int, BITS: int, GROUP: int,
        dtype: mx.Dtype, **_: Any,
    ) -> list[mx.array]:  # fmt: skip
        mode = ("affine", "mxfp4", "nvfp4", "mxfp8")[MODE]
        return [kernels.dequantize(weight, scales, None if MODE else biases, GROUP, BITS, mode, dtype)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    native.forget()
    found = Gpu()
    monkeypatch.setattr(native, "platform", lambda: "cuda")
    monkeypatch.setattr(native, "architecture", lambda: trust.HOPPER)
    monkeypatch.setattr(mx.fast, "cuda_kernel", found.create)
    monkeypatch.setattr(backend, "device_facts", lambda: FACTS)
    monkeypatch.setattr(blas, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(trust, "tried", lambda requests, _timeout_s: {trust.key(r): "" for r in requests})
    yield found
    native.forget()


def test_on_a_gpu_every_block_starts_its_kernels(gpu: Gpu) -> None:
    """Each kernel is started as often as its operations come in a step, and the velocity is the plain model's."""
    model = transforms.quantize(synthetic(CONFIGS["plain"]), "4bit-g32")
    wanted = run(model)
    fused = all_kernels(transforms.fuse_gate_up(transforms.fuse_qkv(model)))
    gpu.started.clear()
    assert np.allclose(np.array(run(fused)), np.array(wanted), rtol=1e-5, atol=1e-5)
    blocks = list(transforms.blocks(fused))
    modulated = sum("adaLN_modulation" in block for _, block in blocks)
    assert gpu.started == {
        "qk_norm_rope": len(blocks),
        "residual_norm_modulate": 3 * len(blocks),
        "swiglu": len(blocks),
        "dequantize": 4 * len(blocks) + modulated,  # to_qkv, to_out, w13, w2, and the modulation
    }


def test_the_plain_arm_beside_it_starts_none(gpu: Gpu) -> None:
    """A kernel that one arm has put in runs in no other arm."""
    model = transforms.quantize(synthetic(CONFIGS["plain"]), "4bit-g32")
    all_kernels(model)
    gpu.started.clear()
    run(model)
    assert not gpu.started


def test_a_model_cast_afterwards_says_so(gpu: Gpu) -> None:
    """A kernel put in before the cast was checked for another dtype: it does not run, and one warning says why."""
    model = transforms.cast(fusing.fuse_swiglu(synthetic(CONFIGS["plain"])), "bfloat16")
    gpu.started.clear()
    with pytest.warns(RuntimeWarning, match="swiglu is not used.*apply its transform last") as caught:
        run(model)
    assert len(caught) == 1
    assert not gpu.started


WIDE_HEADS = TransformerConfig.tiny(dim=256, axes_dims=(32, 48, 48))


def velocity(model: Transformer, captions: tuple[int, int]) -> mx.array:
    """The velocity for two items whose captions have so many tokens."""
    config, keys = model.config, mx.random.split(mx.random.key(3), 3)
    latents = mx.random.normal((2, config.in_channels, 6, 4), key=keys[0])
    texts = [mx.random.normal((n, config.cap_feat_dim), key=key) for n, key in zip(captions, keys[1:], strict=True)]
    return model(latents, mx.array([0.3, 0.8]), texts)


def test_attention_without_a_mask_starts_its_kernel(gpu: Gpu) -> None:
    """On a Hopper GPU a bf16 model with heads of 128 starts it once a block, and gives the plain model's velocity."""
    model = transforms.cast(synthetic(WIDE_HEADS), "bfloat16")
    wanted = velocity(model, (40, 40))
    fused = fusing.flash_attention(model)
    gpu.started.clear()
    found = velocity(fused, (40, 40))
    assert gpu.started == {"flash_attention": len(list(transforms.blocks(fused)))}
    assert relative_l2(np.array(found.astype(mx.float32)), np.array(wanted.astype(mx.float32))) < 1e-3


def test_attention_with_a_mask_starts_no_kernel(gpu: Gpu) -> None:
    """Captions of unequal length need one in all blocks but those of the image alone, where the kernel still runs."""
    fused = fusing.flash_attention(transforms.cast(synthetic(WIDE_HEADS), "bfloat16"))
    gpu.started.clear()
    velocity(fused, (5, 40))
    assert gpu.started == {"flash_attention": WIDE_HEADS.n_refiner_layers}
    gpu.started.clear()
    q = mx.zeros((2, 4, 2, 128), mx.bfloat16)
    fused.layers[0].attention.attend(q, q, q, mx.zeros((2, 1, 1, 4), mx.bfloat16))
    assert not gpu.started


def test_attention_elsewhere_stays_as_it_was(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of another architecture the kernel is neither tried nor started, and nothing is said of it."""
    monkeypatch.setattr(native, "architecture", lambda: "sm_100")
    model = transforms.cast(synthetic(WIDE_HEADS), "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = velocity(fusing.flash_attention(model), (40, 40))
    assert mx.array_equal(found, velocity(model, (40, 40)))
    assert not gpu.started and not trust.kept(FACTS)


@pytest.mark.parametrize(("config", "dtype"), [(CONFIGS["plain"], "bfloat16"), (WIDE_HEADS, "float32")])
def test_attention_of_other_models_stays_as_it_was(config: TransformerConfig, dtype: str, gpu: Gpu) -> None:
    """On a Hopper GPU too, in another dtype and with heads of another size, none is started and none warns."""
    model = transforms.cast(synthetic(config), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = velocity(fusing.flash_attention(model), (40, 40))
    assert mx.array_equal(found, velocity(model, (40, 40)))
    assert not gpu.started and not trust.kept(FACTS)
