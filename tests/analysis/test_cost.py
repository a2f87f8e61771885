"""FLOPs, bytes and parameters of a step, against the model, the published tensors, and arithmetic by hand."""

from typing import Any

import zimage
from zimage import fusing, lengths, operations, transforms
from zimage.analysis import cost
from zimage.config import TransformerConfig
from zimage.errors import ConfigError, InputError
from zimage.sources import published
from zimage.transformer import Transformer

import mlx.core as mx
import pytest

TURBO = TransformerConfig.turbo()
CONFIGS = {
    "tiny": TransformerConfig.tiny(),
    "no_refiners": TransformerConfig.tiny(n_refiner_layers=0),
    "no_qk_norm": TransformerConfig.tiny(qk_norm=False),
    "grouped": TransformerConfig.tiny(n_heads=4, n_kv_heads=2, axes_dims=(4, 6, 6)),
    "turbo": TURBO,
}
FORWARD = [
    "adaln", "attention_norm1", "to_q", "to_k", "to_v", "qk_norm", "rope", "sdpa", "to_out", "attention_residual",
    "ffn_norm1", "w1", "w3", "swiglu", "w2", "ffn_residual",
]  # fmt: skip


def _of(operations: list[cost.Operation], stage: str) -> dict[str, cost.Operation]:
    return {o.operation: o for o in operations if o.stage == stage}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_published_tensors(name: str) -> None:
    """All parameters of a config with one patch size are counted, and each part of the model has its own."""
    config = CONFIGS[name]
    wanted: dict[str, int] = {}
    for tensor, shape in published.shapes(config):
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        part = published.part_of(tensor)
        wanted[part] = wanted.get(part, 0) + size
    tree = {t.path: t for t in cost.by_module(cost.step(config, 64, 64))}
    assert {part: tree[part].parameters for part in wanted} == wanted
    assert tree[""].parameters == sum(wanted.values())


def test_turbo_has_its_published_size() -> None:
    """The published shape has 6,154,908,736 parameters, of two bytes each in bf16."""
    total = cost.whole(cost.step(TURBO, 1024, 1024))
    assert total.parameters == 6_154_908_736
    assert total.weight_bytes == 2 * 6_154_908_736


def test_only_the_chosen_patch_size_is_counted() -> None:
    """Of a config with two patch sizes, the other one's embedder and final layer are left out."""
    config = TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1))
    everything = sum(s[0] * (s[1] if len(s) == 2 else 1) for _, s in published.shapes(config))
    D, C, T = config.dim, config.in_channels, config.temb_dim
    other = (C * D + D) + (C * D + C) + (T * D + D)
    assert cost.whole(cost.step(config, 64, 64, patch_size=2)).parameters == everything - other


@pytest.mark.parametrize("quantization", [None, "4bit-g32", "8bit", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stages_store_what_the_models_stages_store(quantization: str | None, dtype: str) -> None:
    """Parameters and bytes of weights of every stage are those of the model, packed or not, in its order."""
    config = TransformerConfig.tiny(dim=192, n_heads=6)
    model = Transformer(config, dtype=getattr(mx, dtype))
    if quantization is not None:
        model = transforms.quantize(model, quantization)
    stages = model.stages(mx.zeros((1, 4, 8, 8)), mx.zeros((1,)), mx.zeros((1, 5, config.cap_feat_dim)))
    operations = cost.step(config, 64, 64, caption_tokens=5, dtype=dtype, quantization=quantization)
    found = [(t.path, t.parameters, t.weight_bytes) for t in cost.by_stage(operations)]
    assert found == [(s.name, s.parameters, s.weight_bytes) for s in stages]


def test_a_block_has_its_operations_in_order() -> None:
    """A main block's operations have the agreed names; refiners of captions have no modulation."""
    operations = cost.step(CONFIGS["tiny"], 64, 64)
    assert list(_of(operations, "layers.0")) == ["join", *FORWARD]
    assert list(_of(operations, "layers.1")) == FORWARD
    assert list(_of(operations, "noise_refiner.0")) == FORWARD
    assert list(_of(operations, "context_refiner.0")) == FORWARD[1:]
    assert list(_of(operations, "t_embedder")) == ["sinusoid", "mlp.0", "mlp.1", "mlp.2"]
    assert list(_of(operations, "x_embedder")) == ["patchify", "linear", "pad"]
    assert list(_of(operations, "cap_embedder")) == ["norm", "linear", "pad"]
    assert list(_of(operations, "final_layer")) == ["adaln", "norm", "linear", "unpatchify"]


def test_the_first_turbo_block_by_hand() -> None:
    """FLOPs and bytes of a block at 1024 px (4128 tokens, bf16), written out."""
    found = _of(cost.step(TURBO, 1024, 1024), "layers.0")
    L, D, H, V = 4128, 3840, 10240, 2
    assert found["to_q"].flops == 2 * L * D * D
    assert found["to_q"].bytes == V * (L * D + D * D + L * D)
    assert found["w1"].flops == found["w2"].flops == 2 * L * D * H
    assert found["sdpa"].flops == 4 * L * L * D
    assert found["sdpa"].bytes == V * 4 * L * D
    assert found["adaln"].flops == 2 * 256 * 4 * D
    assert found["adaln"].bytes == V * (256 + 256 * 4 * D + 4 * D + 4 * D)
    assert found["attention_norm1"].flops == 5 * L * D
    assert found["attention_norm1"].bytes == V * (2 * L * D + D + D)
    assert found["qk_norm"].bytes == V * (4 * L * D + 2 * 128)
    assert found["rope"].flops == 3 * 2 * L * D
    assert found["rope"].bytes == V * 4 * L * D + 4 * L * 128
    assert found["attention_residual"].flops == 6 * L * D
    assert found["ffn_residual"].bytes == V * (3 * L * D + D + D)
    assert found["swiglu"].flops == 5 * L * H
    assert found["swiglu"].bytes == V * 3 * L * H
    assert found["join"].bytes == V * 2 * L * D
    assert found["join"].flops == 0


def test_the_known_total_of_a_turbo_step() -> None:
    """A step at 1024 px has the 55.1 TFLOP that the matmul peaks are compared with."""
    assert cost.whole(cost.step(TURBO, 1024, 1024)).flops == pytest.approx(55.1e12, rel=0.005)


def test_fusing_keeps_flops_and_reads_the_input_once() -> None:
    """Fused projections have the FLOPs and weights of the separate ones and save the repeated reads of their input."""
    plain = cost.step(TURBO, 512, 512)
    fused = cost.step(TURBO, 512, 512, fused=("qkv", "gate_up"))
    a, b = _of(plain, "layers.1"), _of(fused, "layers.1")
    read = 1056 * 3840 * 2
    assert "to_q" not in b
    assert "w1" not in b
    assert b["to_qkv"].flops == sum(a[n].flops for n in ("to_q", "to_k", "to_v"))
    assert b["to_qkv"].bytes == sum(a[n].bytes for n in ("to_q", "to_k", "to_v")) - 2 * read
    assert b["w13"].bytes == a["w1"].bytes + a["w3"].bytes - read
    assert cost.whole(fused).flops == cost.whole(plain).flops
    assert cost.whole(fused).weight_bytes == cost.whole(plain).weight_bytes


@pytest.mark.parametrize("config", [TURBO, CONFIGS["no_qk_norm"]], ids=["turbo", "no_qk_norm"])
def test_kernels_keep_flops_and_save_passes(config: TransformerConfig) -> None:
    """A kernel that does several operations has their FLOPs and parameters and saves passes over what lies between,

    in every block, with modulation and without. Names are those of the operation view.
    """
    plain = cost.step(config, 512, 512)
    fused = cost.step(config, 512, 512, fused=("norm_rope", "residual_norm"))
    for stage in ("layers.1", "context_refiner.0"):
        a, b = _of(plain, stage), _of(fused, stage)
        rows, heads = (1056 if stage == "layers.1" else 32), 2 if config.qk_norm else 0
        parts = {"attention_residual_norm": ("attention_residual", "ffn_norm1")}
        if config.qk_norm:
            parts["qk_norm_rope"] = ("qk_norm", "rope")
        for name, covered in parts.items():
            assert b[name].flops == sum(a[n].flops for n in covered)
            assert b[name].parameters == sum(a[n].parameters for n in covered)
            assert not set(covered) & set(b)
        saved = sum(o.bytes for o in a.values()) - sum(o.bytes for o in b.values())
        assert saved == 2 * rows * config.dim * (1 + 2 * heads)
    assert cost.whole(fused).flops == cost.whole(plain).flops
    assert cost.whole(fused).parameters == cost.whole(plain).parameters
    model = fusing.fuse_residual_norm(fusing.fuse_norm_rope(Transformer(CONFIGS["no_refiners"])))
    viewed = [o.name for o in operations.operations(model.layers[0])]
    forward = cost.step(CONFIGS["no_refiners"], 64, 64, fused=("norm_rope", "residual_norm"))
    assert list(_of(forward, "layers.1")) == viewed


def test_grouped_queries_have_smaller_keys() -> None:
    """With half as many key heads, to_k and to_v are half of to_q, and the two products are not smaller."""
    config = CONFIGS["grouped"]
    found = _of(cost.step(config, 64, 64), "layers.1")
    assert 2 * found["to_k"].flops == 2 * found["to_v"].flops == found["to_q"].flops
    assert found["sdpa"].flops == 4 * 64 * 64 * config.dim  # 16 image tokens padded to 32, and the caption's 32


def test_padding_is_computed() -> None:
    """Image and caption are padded to multiples of 32 before the blocks, not before the embedders."""
    config = CONFIGS["tiny"]
    operations = cost.step(config, 48, 112, caption_tokens=33)  # 21 image tokens
    D = config.dim
    assert _of(operations, "x_embedder")["linear"].flops == 2 * 21 * 16 * D
    assert _of(operations, "x_embedder")["pad"].bytes == 2 * ((21 + 32) * D + D)
    assert _of(operations, "cap_embedder")["linear"].flops == 2 * 33 * 48 * D
    assert _of(operations, "cap_embedder")["pad"].bytes == 2 * ((33 + 64) * D + D) + 64
    assert _of(operations, "noise_refiner.0")["to_q"].flops == 2 * 32 * D * D
    assert _of(operations, "context_refiner.0")["to_q"].flops == 2 * 64 * D * D
    assert _of(operations, "layers.0")["to_q"].flops == 2 * 96 * D * D
    assert _of(operations, "final_layer")["linear"].flops == 2 * 21 * D * 16


def test_nothing_padded_moves_nothing() -> None:
    """Where nothing is padded the pad tokens are counted as stored and move no bytes."""
    operations = cost.step(TURBO, 512, 512, caption_tokens=32)
    for stage in ("x_embedder", "cap_embedder"):
        pad = _of(operations, stage)["pad"]
        assert (pad.bytes, pad.parameters, pad.weight_bytes) == (0, 3840, 7680)


def test_a_ragged_batch_computes_its_longest_with_tables_and_masks() -> None:
    """Shorter captions cost as much as the longest; each item then has its own tables, and a mask is read."""
    config = CONFIGS["tiny"]
    even = cost.step(config, 64, 64, batch=2, caption_tokens=40)
    ragged = cost.step(config, 64, 64, batch=2, caption_tokens=[5, 40])
    assert cost.whole(ragged).flops == cost.whole(even).flops
    a, b = _of(even, "layers.0"), _of(ragged, "layers.0")
    length, head = 96, config.head_dim
    assert b["rope"].bytes - a["rope"].bytes == 4 * length * head
    assert b["sdpa"].bytes - a["sdpa"].bytes == 2 * 2 * length
    image = _of(ragged, "noise_refiner.0")["sdpa"].bytes
    assert image == _of(even, "noise_refiner.0")["sdpa"].bytes


def test_a_huge_batch_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting a step does not go through the items of a batch for each operation."""
    rounded = []
    real = lengths.padded
    monkeypatch.setattr(lengths, "padded", lambda *n: rounded.append(n) or real(*n))
    one, many = (cost.whole(cost.step(TURBO, 512, 512, batch)).flops for batch in (1, 10_000))
    assert many == 10_000 * one
    assert len(rounded) < 1000


def test_module_tree_adds_up() -> None:
    """Every module's totals are those of its stages and operations, parents before children, the whole first."""
    operations = cost.step(CONFIGS["tiny"], 64, 64)
    tree = cost.by_module(operations)
    rows = {t.path: t for t in tree}
    assert tree[0].path == ""
    assert len(rows) == len(tree)
    paths = ["layers", "layers.0", "layers.0.attention", "layers.0.attention.to_q"]
    assert [p for p in rows if p in paths] == paths
    assert rows["layers"].flops == rows["layers.0"].flops + rows["layers.1"].flops
    block = _of(operations, "layers.0")
    names = ("to_q", "to_k", "to_v", "qk_norm", "rope", "sdpa", "to_out")
    assert rows["layers.0.attention"].flops == sum(block[n].flops for n in names)
    assert rows[""].bytes == sum(o.bytes for o in operations)
    assert "layers.0.attention.to_out.0" in rows
    assert "layers.0.attention.to_out" not in rows
    stages = {t.path: t for t in cost.by_stage(operations)}
    assert all(rows[path] == total for path, total in stages.items())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"height": 60}, ConfigError, "height 60 is not a positive multiple of 8"),
        ({"batch": 0}, InputError, "batch must be an integer from 1 to 16777216, found 0"),
        ({"batch": 10**12}, InputError, "batch must be an integer from 1 to 16777216, found 1000000000000"),
        ({"caption_tokens": 0}, InputError, "caption_tokens must be a positive integer"),
        ({"caption_tokens": [3, 4]}, InputError, "one for each of the 1 items"),
        ({"caption_tokens": True}, InputError, "caption_tokens must be"),
        ({"caption_tokens": 3.5}, InputError, "caption_tokens must be"),
        ({"caption_tokens": "32"}, InputError, "caption_tokens must be"),
        ({"quantization": 4}, InputError, "unknown quantization 4"),
        ({"fused": None}, InputError, "fused must be a list"),
        ({"dtype": "float16"}, InputError, "dtype 'float16' is not supported"),
        ({"quantization": "9bit"}, InputError, "unknown quantization '9bit'"),
        ({"quantization": "4bit-g128"}, InputError, r"adaLN_modulation.0: input width 64 is not divisible"),
        ({"patch_size": 3}, InputError, "patch_size 3 is not one of"),
        ({"fused": ("kv",)}, InputError, "fused must be a list of qkv, gate_up, norm_rope"),
        ({"fused": "qkv"}, InputError, "fused must be a list"),
    ],
)
def test_impossible_steps_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    """What no model computes is one error that names it."""
    given = {"height": 64, "width": 64, **values}
    with pytest.raises(error, match=message):
        cost.step(CONFIGS["tiny"], **given)


def test_several_patch_sizes_need_one() -> None:
    """A config with two patch sizes asks which."""
    config = TransformerConfig.tiny(all_patch_size=(1, 2), all_f_patch_size=(1, 1))
    with pytest.raises(InputError, match="say patch_size="):
        cost.step(config, 64, 64)


def test_digits_are_counted_too() -> None:
    """The model that ships with the package, whose latents are pixels, has all its parameters counted."""
    config = zimage.load_transformer("digits").config
    wanted = sum(s[0] * (s[1] if len(s) == 2 else 1) for _, s in published.shapes(config))
    assert cost.whole(cost.step(config, 8, 8, caption_tokens=1, dtype="float32")).parameters == wanted
