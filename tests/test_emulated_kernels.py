"""The kernels' own sources in CUDA's and Metal's spelling, run on this CPU, give what their composed forms give."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from unittest.mock import patch

from tests.emulation.device import COMPILER, NO_SLICES, Device, Slice
from zimage import trust
from zimage.kernels import dequantize, stream
from zimage.kernels.catalogue import KERNELS
from zimage.kernels.native import MOST_THREADS, Kernel, compare, normal
from zimage.quantization import MODES

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to compile the kernels' sources with")
few = settings(max_examples=12, derandomize=True)
CASES: list[tuple[str, trust.Request]] = [
    ("cuda", {"kernel": "qk_norm_rope", "dtype": "bfloat16", "head_dim": 128}),
    ("cuda", {"kernel": "qk_norm_rope", "dtype": "float32", "head_dim": 16}),
    ("metal", {"kernel": "qk_norm_rope", "dtype": "float16", "head_dim": 256}),
    ("cuda", {"kernel": "residual_norm_modulate", "dtype": "bfloat16", "width": 3840}),
    ("metal", {"kernel": "residual_norm_modulate", "dtype": "bfloat16", "width": 3840}),
    ("cuda", {"kernel": "residual_norm_modulate", "dtype": "float32", "width": 6152}),
    ("metal", {"kernel": "residual_norm_modulate", "dtype": "float16", "width": 72}),
    ("cuda", {"kernel": "swiglu", "dtype": "bfloat16"}),
    ("metal", {"kernel": "swiglu", "dtype": "float32"}),
    ("cuda", {"kernel": "flash_attention", "dtype": "bfloat16", "head_dim": 128}),
]
CASES += [
    (here, {"kernel": "dequantize", "dtype": dtype, "mode": mode, "bits": bits, "group_size": group})
    for here, dtype, mode, bits, group in [
        ("cuda", "bfloat16", "affine", 4, 64), ("cuda", "bfloat16", "affine", 8, 64),
        ("cuda", "bfloat16", "affine", 2, 32), ("cuda", "float32", "affine", 3, 32),
        ("cuda", "bfloat16", "affine", 5, 128), ("cuda", "float32", "affine", 6, 64),
        ("metal", "float32", "affine", 4, 128), ("metal", "float16", "affine", 8, 32),
        ("metal", "bfloat16", "affine", 3, 64), ("metal", "float32", "affine", 5, 32),
        ("cuda", "bfloat16", "mxfp4", 4, 32), ("cuda", "bfloat16", "nvfp4", 4, 16),
        ("cuda", "bfloat16", "mxfp8", 8, 32), ("metal", "float32", "nvfp4", 4, 16),
        ("metal", "float32", "mxfp8", 8, 32),
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with patch.object(stream, "_GROUPS", 4):  # few tokens are enough then for a group to have several
        yield Device(tmp_path_factory.mktemp("kernels"))


def sliced(*numbers: int) -> dict[int, Slice]:
    return dict.fromkeys(numbers, Slice())


def problem(
    gpu: Device, here: str, kernel: Kernel, example: tuple[object, ...], slices: Mapping[int, Slice] = NO_SLICES
) -> str:
    launch = kernel.prepare(MOST_THREADS[here], *example)
    assert launch is not None
    return compare(gpu.run(here, kernel, launch, slices), kernel.composed, example, kernel.roundings)


@pytest.mark.parametrize(("here", "case"), CASES, ids=[f"{here} {trust.key(case)}" for here, case in CASES])
def test_a_kernel_gives_what_its_composed_form_gives(here: str, case: trust.Request, gpu: Device) -> None:
    """On its own examples every kernel passes the check that it must pass on the user's device."""
    kernel = KERNELS[case["kernel"]]
    assert [problem(gpu, here, kernel, example) for example in kernel.examples(case)] == [""] * len(
        list(kernel.examples(case))
    )


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**16)
)
@few
def test_queries_and_keys_of_any_lengths_and_strides(
    batch: int, length: int, queries: int, keys: int, own_tables: bool, seed: int
) -> None:
    """QK norm and RoPE for any numbers of items, tokens and heads, read out of larger arrays."""
    q, k = normal(seed, batch, length, queries, 32), normal(seed + 1, batch, length, keys, 32)
    norms = [(1 + 0.1 * normal(seed + n, 32), eps) for n, eps in ((2, 1e-5), (3, 0.5))]
    angles = normal(seed + 4, batch if own_tables else 1, length, 1, 16)
    example = (q, k, *norms, mx.stack([mx.cos(angles), mx.sin(angles)]))
    assert problem(_shared(), "cuda", KERNELS["qk_norm_rope"], example, slices=sliced(0, 1, 4)) == ""


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 60), *[st.booleans()] * 3, st.integers(0, 2**16))
@few
def test_streams_of_any_lengths_and_forms(
    batch: int, length: int, groups: int, adds: bool, norms: bool, modulated: bool, seed: int
) -> None:
    """The stream's kernel in each of its forms, with strided inputs, and with one to four tokens for a group."""
    W = 2056
    x, change = normal(seed, batch, length, W), 2 * normal(seed + 1, batch, length, W)
    after, before = [(1 + 0.1 * normal(seed + n, W), eps) for n, eps in ((2, 1e-5), (3, 0.5))]
    scale, gate = [normal(seed + n, batch, 1, W) if modulated else None for n in (4, 5)]
    adding = (change, gate, after) if adds or not norms else (None, None, None)
    example = (x, *adding, *((before, scale) if norms else (None, None)))
    with patch.object(stream, "_GROUPS", groups):
        assert problem(_shared(), "cuda", KERNELS["residual_norm_modulate"], example, slices=sliced(0)) == ""


def test_a_group_gets_more_tokens_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 groups at least, then up to four tokens each; every token has a group, whatever the batch."""
    monkeypatch.setattr(stream, "_GROUPS", 256)
    cases = {
        (1, 1): 1, (1, 288): 288, (1, 511): 511, (1, 512): 256, (1, 1056): 264, (1, 4128): 1032, (2, 256): 128,
        (2, 521): 131,
    }  # fmt: skip
    for (batch, length), groups in cases.items():
        x, norm = mx.zeros((batch, length, 8)), (mx.zeros((8,)), 1e-5)
        launch = stream.RESIDUAL_NORM_MODULATE.prepare(1024, x, None, None, None, norm, None)
        assert launch is not None and launch.threads == (32 * groups, batch, 1)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**16))
@few
def test_swiglu_of_any_width(batch: int, length: int, eighths: int, seed: int) -> None:
    """SwiGLU for any width in eights, gate and up as halves of a product; large gates neither overflow nor give NaN."""
    gate, up = 60 * normal(seed, batch, length, 8 * eighths), normal(seed + 1, batch, length, 8 * eighths)
    assert problem(_shared(), "cuda", KERNELS["swiglu"], (gate, up), slices=sliced(0, 1)) == ""


LAYOUTS = [
    None, Slice(), Slice(turned=True), Slice(4, 4), Slice(3, 2), Slice(step=2), Slice(1, 0, 3, turned=True),
]  # fmt: skip


@given(
    st.integers(1, 3), st.integers(1, 400), st.integers(1, 400), st.integers(1, 2), st.integers(1, 3),
    st.sampled_from([0.1, 2, 8, 30]), st.tuples(*[st.sampled_from(LAYOUTS)] * 3), st.integers(0, 2**16),
)  # fmt: skip
@settings(few, max_examples=40, deadline=None)
def test_attention_of_any_lengths_and_strides(
    batch: int, length: int, count: int, shared: int, queries: int, sharpness: float,
    layouts: tuple[Slice | None, ...], seed: int,
) -> None:  # fmt: skip
    """For any numbers of items, queries, keys and heads, flat scores and sharp ones, and wherever the inputs lie."""
    q = (sharpness * normal(seed, batch, length, queries * shared, 128)).astype(mx.bfloat16)
    k, v = (normal(seed + n, batch, count, shared, 128).astype(mx.bfloat16) for n in (1, 2))
    slices = {number: layout for number, layout in enumerate(layouts) if layout is not None}
    assert problem(_shared(), "cuda", KERNELS["flash_attention"], (q, k, v, 128**-0.5), slices) == ""


@pytest.mark.parametrize("count", [1, 95, 96, 97, 192, 193, 288, 289])
def test_attention_to_whole_tiles_of_keys_and_one_more(count: int, gpu: Device) -> None:
    """One to four tiles of keys, full ones and such with a single key, for as many queries as a group has and one."""
    q = normal(count, 1, 193, 1, 128).astype(mx.bfloat16)
    k, v = (normal(count + n, 1, count, 1, 128).astype(mx.bfloat16) for n in (1, 2))
    assert problem(gpu, "cuda", KERNELS["flash_attention"], (q, k, v, 128**-0.5)) == ""


PACKINGS = [*[("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)], *[(mode, *sizes) for mode, sizes in MODES.items()]]


@given(st.sampled_from(PACKINGS), st.integers(1, 70), st.integers(1, 9), st.integers(-20, 20), st.integers(0, 2**16))
@few
def test_dequantize_of_any_size(packing: tuple[str, int, int], rows: int, groups: int, power: int, seed: int) -> None:
    """Every packed weight comes out as MLX's own dequantize gives it, also in a last thread group that isn't full."""
    mode, bits, group = packing
    values = 2.0**power * normal(seed, rows, 2 * groups * group)
    weight, scales, *biases = mx.quantize(values, group_size=group, bits=bits, mode=mode)
    example = (weight, scales, biases[0] if biases else None, group, bits, mode, mx.float32)
    assert problem(_shared(), "cuda", KERNELS["dequantize"], example) == ""


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32)])
def test_every_code_and_scale_of_narrow_numbers(mode: str, group: int, gpu: Device) -> None:
    """All numbers of 4 and 8 bits under scales of all sizes, as MLX reads them; NaN where it has it."""
    codes = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    weight = mx.array(np.ascontiguousarray(codes.T if mode == "mxfp8" else codes)).view(mx.uint32)
    width = weight.shape[1] * (4 if mode == "mxfp8" else 8)
    scales = mx.array(np.resize(np.arange(1, 127, dtype=np.uint8), (256, width // group)))
    example = (weight, scales, None, group, *((8, mode) if mode == "mxfp8" else (4, mode)), mx.float32)
    launch = KERNELS["dequantize"].prepare(256, *example)
    assert launch is not None
    for here in ("cuda", "metal"):
        (found,) = gpu.run(here, KERNELS["dequantize"], launch)
        assert np.array_equal(np.array(found), np.array(dequantize(*example)), equal_nan=True)


@pytest.mark.parametrize(
    ("name", "what", "instead"),
    [
        ("qk_norm_rope", "LANES / 2; mask > 0", "LANES / 4; mask > 0"),
        ("qk_norm_rope", "a * sines.values[i] + b", "b * sines.values[i] + a"),
        ("qk_norm_rope", "own * k_strides[2]", "head * k_strides[2]"),
        ("residual_norm_modulate", "    BARRIER();\n", ""),
        ("residual_norm_modulate", "1 + factors[i]", "factors[i]"),
        (
            "residual_norm_modulate",
            "if (column < W) {\n          float v[8];\n          zimage::widen(values[j], v);\n          for",
            "{ float v[8]; zimage::widen(values[j], v); for",
        ),
        ("residual_norm_modulate", "own + LANES", "own"),
        ("residual_norm_modulate", "token % 2 * 2", "0 * 2"),
        ("residual_norm_modulate", "first + tokens < length ? first + tokens : length", "first + tokens"),
        ("residual_norm_modulate", "token < end", "token < first + 1"),
        ("swiglu", "  if (column < width) {", "  {"),
        ("dequantize", "if (chunk < chunks)", ""),
        ("dequantize", "chunk * 8 / GROUP", "chunk / GROUP"),
        ("dequantize", "chunk * BITS % 4 * 8", "0"),
        ("dequantize", "packed[word + 1]", "packed[word]"),
        ("dequantize", "word + 1 < words", "true"),
        ("flash_attention", "hopper::await(left + 8 * slot, parity)", "hopper::await(left + 8 * slot, parity ^ 1)"),
        ("flash_attention", "hopper::await(left + 8 * slot, parity);", ""),
        ("flash_attention", "  hopper::await(full + 8 * slot, parity);  // the last", "  //"),
        ("flash_attention", "hopper::arrive(full + 8 * before)", "hopper::arrive(full + 8 * slot)"),
        ("flash_attention", "make_gate(left + 8 * i, ALL / 32)", "make_gate(left + 8 * i, ALL / 32 - 1)"),
        ("flash_attention", "make_gate(full + 8 * i, 128)", "make_gate(full + 8 * i, 127)"),
        ("flash_attention", "bring_keys(tile + 3)", "bring_keys(tile + 2)"),
        ("flash_attention", "start_values(before);\n    hopper", "start_values(slot);\n    hopper"),
        ("flash_attention", "await_copies<1>();\n      hopper", "await_copies<2>();\n      hopper"),
        ("flash_attention", "hopper::await_products<1>(s);", "hopper::await_products<2>(s);"),
        ("flash_attention", "soften(tile);\n    hopper::await_products<0>(o);", "soften(tile);"),
        ("flash_attention", "hopper::begin_products();\n    start_scores(slot)", "start_scores(slot)"),
        ("flash_attention", "if ((tile + 1) * KEYS > count) {", "if (false) {"),
        ("flash_attention", "lane % 4 * 2 + i % 2 >= count", "lane % 4 * 2 + i % 2 > count"),
        ("flash_attention", "o[i] *= factors[i / 2 % 2]", "o[i] *= 1"),
        ("flash_attention", "sums[r] *= factors[r];", ""),
        ("flash_attention", "head / (heads / k_shape[2])", "head % k_shape[2]"),
        ("flash_attention", "item * v_strides[0]", "item * k_strides[0]"),
        ("flash_attention", "part % 8 ^ row", "part % 8"),
        ("flash_attention", "bool is = i < there", "bool is = i <= there"),
        ("flash_attention", "strides[1] * sizeof(T)", "0"),
        ("flash_attention", "strides[3] == 1 &&", ""),
    ],
)
def test_a_wrong_kernel_is_found(name: str, what: str, instead: str, gpu: Device) -> None:
    """A change of one place is found: as a wrong result, a touch of others' memory, a wait without end or too short."""
    kernel = KERNELS[name]
    assert what in kernel.body + kernel.header
    request = {"dtype": "float32", "head_dim": 32, "width": 2056, "mode": "affine", "bits": 3, "group_size": 64}
    layouts = [NO_SLICES]
    if name == "flash_attention":
        request |= {"dtype": "bfloat16", "head_dim": 128}
        layouts += [{1: Slice(8, 4), 2: Slice()}, {0: Slice(step=2)}]
    wrong = replace(kernel, body=kernel.body.replace(what, instead), header=kernel.header.replace(what, instead))
    for example, slices in product(kernel.examples(request), layouts):
        try:
            if problem(gpu, "cuda", wrong, example, slices):
                return
        except AssertionError as error:
            if "the kernel ended with" not in str(error):
                raise
            return
    pytest.fail("nothing was found")


_SHARED: list[Device] = []


@pytest.fixture(autouse=True)
def _share(gpu: Device) -> None:
    """Hypothesis takes no fixtures of a function's, so its tests find the device here."""
    _SHARED[:] = [gpu]


def _shared() -> Device:
    return _SHARED[0]
