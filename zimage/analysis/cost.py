"""What one denoising step costs on paper: FLOPs and bytes of every operation, from a config and the shapes of a batch.

What is counted:

- A matrix product of [m, k] and [k, n] is 2 m n k FLOPs. What is done to its result on the way (a bias, the tanh of the
  gates, the SiLU before the final modulation) is not counted.
- Attention is its two products over the padded lengths that are computed, masked positions included; its softmax is not
  counted.
- An elementwise operation has the FLOPs an element that stand below, an exponential or a root counting as one.
- Bytes are the least that must move: every input read once, every result written once, weights as they are stored. What
  an implementation moves beyond that (casts, copies, unpacked weights, attention scores) is not counted; that is what
  the attained fraction shows. Activations are in `dtype`; timesteps, frequencies and RoPE's tables in fp32.
- Parameters are those of the model but for the embedders and final layers of the other patch sizes. Pad tokens belong
  to the operations `pad`, which move nothing where nothing is padded.

Positions beyond the config's `axes_lens` are not refused here; the model refuses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zimage import recipes
from zimage.config import TIMESTEP_HIDDEN, TIMESTEP_WIDTH, TransformerConfig
from zimage.errors import InputError
from zimage.lengths import Lengths, lengths
from zimage.recipes import Asked, Packing

Kind = Literal["matmul", "attention", "elementwise"]
BYTES = {"bfloat16": 2, "float32": 4}
FUSIONS = ("qkv", "gate_up", "norm_rope", "residual_norm")
_LARGEST_BATCH = 2**24  # far above what any device takes, and still counted in a moment
UNATTRIBUTED = "unattributed"  # the operation that stands for what a stage takes beyond its operations

# FLOPs an element
RMS_NORM = 4  # square, sum, times the root's inverse, times the weight
LAYER_NORM = 5  # sum, minus the mean, square, sum, times the root's inverse
SCALE = 1  # times one plus a scale, or a gate, which are counted once an item and so not at all
ADD = 1
SILU = 4  # negate, exp, add, divide
ROPE = 3  # four products and two sums a pair
SINUSOID = 3  # angle, cosine and sine of each frequency


@dataclass(frozen=True)
class Operation:
    """One operation of a step. `bytes` is all that moves, `weight_bytes` the weights' part of it, as stored.

    `module` is the path of the module it belongs to, a stage's name first.
    """

    stage: str
    operation: str
    flops: int
    bytes: int
    weight_bytes: int
    parameters: int
    kind: Kind
    module: str


@dataclass(frozen=True)
class Total:
    """Sums over the operations of a stage, or of a module and all below it; the whole model's path is ''."""

    path: str
    parameters: int
    weight_bytes: int
    flops: int
    bytes: int


def token_counts(batch: int, caption_tokens: int | Sequence[int]) -> tuple[int, ...]:
    """The caption tokens of every item of a batch, from one number for all or one for each.

    Raises InputError for anything but a batch of 1 to 2^24 and as many positive integers.
    """
    if not _whole(batch) or not 1 <= batch <= _LARGEST_BATCH:
        raise InputError(f"batch must be an integer from 1 to {_LARGEST_BATCH}, found {batch!r}")
    given: Any = caption_tokens
    counts = tuple(given) if isinstance(given, (list, tuple)) else (given,) * batch
    if len(counts) != batch or not all(_whole(n) and n >= 1 for n in counts):
        raise InputError(
            f"caption_tokens must be a positive integer or one for each of the {batch} items, found {caption_tokens!r}"
        )
    return counts


def token_lengths(
    config: TransformerConfig,
    height: int,
    width: int,
    batch: int,
    caption_tokens: int | Sequence[int],
    patch_size: int | None,
) -> tuple[Lengths, int]:
    """The batch's Lengths and its patch size. Raises InputError or ConfigError for what the model does not take."""
    known = config.all_patch_size
    if patch_size is None and len(known) > 1:
        raise InputError(f"this model has several patch sizes, {list(known)}: say patch_size=")
    patch = known[0] if patch_size is None else patch_size
    size = config.latent_size(height, width)
    if patch in known and any(count % patch for count in size):  # else `lengths` says what is wrong
        step = patch * config.pixels_per_latent
        raise InputError(f"height and width of this model's images are multiples of {step}, found {height} x {width}")
    return lengths(config, size, patch, token_counts(batch, caption_tokens)), patch


def item_bytes(dtype: str) -> int:
    """Bytes of a value of `dtype`. Raises InputError unless it is "bfloat16" or "float32"."""
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise InputError(f"dtype {dtype!r} is not supported; use {' or '.join(BYTES)}")
    return BYTES[dtype]


def step(
    config: TransformerConfig,
    height: int,
    width: int,
    batch: int = 1,
    caption_tokens: int | Sequence[int] = 32,
    dtype: str = "bfloat16",
    quantization: Asked | Packing | None = None,
    patch_size: int | None = None,
    fused: Sequence[str] = (),
) -> list[Operation]:
    """Every operation of one step in the order of the forward pass, for images of `height` x `width` pixels.

    `caption_tokens` is one count for all items or one for each. `quantization` packs linear layers of the blocks as
    `transforms.quantize` does, or is each layer's packing by its published path. `fused` may hold "qkv" (one `to_qkv`
    instead of three projections), "gate_up" (one `w13` instead of two), "norm_rope" (`qk_norm_rope` instead of QK norm
    and RoPE) and "residual_norm" (`attention_residual_norm` instead of `attention_residual` and `ffn_norm1`). Raises
    InputError or ConfigError for what the model does not take.
    """
    found, patch = token_lengths(config, height, width, batch, caption_tokens, patch_size)
    if not isinstance(fused, (list, tuple)) or any(name not in FUSIONS for name in fused):
        raise InputError(f"fused must be a list of {', '.join(FUSIONS)}, found {fused!r}")
    packing = recipes.packing(config, quantization)
    return _Step(config, found, patch, item_bytes(dtype), packing, tuple(fused)).write()


def by_stage(operations: Sequence[Operation]) -> list[Total]:
    """The totals of every stage, in the order of the forward pass."""
    return _totals([(o.stage, o) for o in operations])


def by_module(operations: Sequence[Operation]) -> list[Total]:
    """The totals of every module, each before what is in it: '' for the whole, `layers`, `layers.0`, ...

    A module's totals include operations that are its own, such as RoPE and SDPA of `layers.0.attention`; the QK norm's
    parameters are the attention's.
    """
    return _totals([(path, o) for o in operations for path in _with_parents(o.module)])


def whole(operations: Sequence[Operation]) -> Total:
    """The totals of the whole step; the path is ''."""
    return _totals([("", o) for o in operations])[0]


def _with_parents(path: str) -> list[str]:
    """'' and every module on the way to `path`. Lists of layers are none, but for lists of whole blocks."""
    parts = path.split(".")
    ends = [n for n in range(1, len(parts)) if n == 1 or not parts[n].isdigit()]
    return ["", *(".".join(parts[:n]) for n in ends), path]


def _totals(parts: Sequence[tuple[str, Operation]]) -> list[Total]:
    sums: dict[str, list[int]] = {}
    for path, o in parts:
        total = sums.setdefault(path, [0, 0, 0, 0])
        for i, value in enumerate((o.parameters, o.weight_bytes, o.flops, o.bytes)):
            total[i] += value
    return [Total(path, *total) for path, total in sums.items()]


def published_path(module: str, patch_size: int) -> str:
    """The path in the model of a linear layer that an operation belongs to; embedders are one a patch size there."""
    stage, _, rest = module.partition(".")
    if stage not in ("x_embedder", "final_layer"):
        return module
    return f"all_{stage}.{patch_size}-1" + ("" if stage == "x_embedder" else f".{rest}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class _Step:
    """Writes down the operations of a step, in the order the model performs them."""

    config: TransformerConfig
    lengths: Lengths
    patch: int
    item: int  # bytes of a value
    packing: Packing
    fused: tuple[str, ...]
    operations: list[Operation] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return len(self.lengths.captions)

    def write(self) -> list[Operation]:
        found, refiners = self.lengths, self.config.n_refiner_layers
        self._embed_timestep()
        self._embed_latents()
        self._embed_captions()
        items = self.batch if found.ragged else 1  # that have tables of their own
        for i in range(refiners):
            self._block(f"noise_refiner.{i}", found.image, items, masked=False, modulation=True)
        for i in range(refiners):
            self._block(f"context_refiner.{i}", found.caption, 1, masked=found.ragged, modulation=False)
        for i in range(self.config.n_layers):
            if i == 0:
                joined = self.batch * found.joint * self.config.dim
                self._elementwise("layers.0", "join", 0, 2 * joined, module="layers.0")
            self._block(f"layers.{i}", found.joint, items, masked=found.ragged, modulation=True)
        self._final_layer()
        return self.operations

    def _embed_timestep(self) -> None:
        B, stage, half = self.batch, "t_embedder", TIMESTEP_WIDTH // 2
        tables = 4 * (B + half)  # timesteps and frequencies in fp32
        self._elementwise(stage, "sinusoid", SINUSOID * B * half, B * TIMESTEP_WIDTH, other_bytes=tables, module=stage)
        self._linear(stage, "mlp.0", f"{stage}.mlp.0", B, TIMESTEP_WIDTH, TIMESTEP_HIDDEN, bias=True)
        hidden = B * TIMESTEP_HIDDEN
        self._elementwise(stage, "mlp.1", SILU * hidden, 2 * hidden, module=f"{stage}.mlp.1")
        self._linear(stage, "mlp.2", f"{stage}.mlp.2", B, TIMESTEP_HIDDEN, self.config.temb_dim, bias=True)

    def _embed_latents(self) -> None:
        stage, D, rows = "x_embedder", self.config.dim, self.batch * self.lengths.image_tokens
        width = self.patch**2 * self.config.in_channels
        self._elementwise(stage, "patchify", 0, 2 * rows * width, module=stage)
        self._linear(stage, "linear", f"{stage}.linear", rows, width, D, bias=True)
        padding = self.lengths.image > self.lengths.image_tokens
        moved = (rows + self.batch * self.lengths.image) * D if padding else 0
        self._elementwise(stage, "pad", 0, moved, parameters=D, module=stage)

    def _embed_captions(self) -> None:
        stage, config, found = "cap_embedder", self.config, self.lengths
        rows, F, D = self.batch * max(found.captions), config.cap_feat_dim, config.dim
        self._elementwise(stage, "norm", RMS_NORM * rows * F, 2 * rows * F, parameters=F, module=f"{stage}.0")
        self._linear(stage, "linear", f"{stage}.1", rows, F, D, bias=True)
        padding = found.captions != (found.caption,) * self.batch
        padded_rows = self.batch * found.caption
        moved, marks = ((rows + padded_rows) * D, padded_rows) if padding else (0, 0)
        self._elementwise(stage, "pad", 0, moved, parameters=D, other_bytes=marks, module=stage)

    def _block(self, stage: str, length: int, table_items: int, masked: bool, modulation: bool) -> None:
        """One transformer block on `length` tokens an item; RoPE's tables are for `table_items` items."""
        config, B = self.config, self.batch
        D, rows = config.dim, B * length
        if modulation:
            self._linear(stage, "adaln", f"{stage}.adaLN_modulation.0", B, config.temb_dim, 4 * D, bias=True)
        self._norm_in(stage, "attention_norm1", rows, modulation)
        self._attention(stage, length, table_items, masked)
        if "residual_norm" in self.fused:
            self._residual_norm(stage, rows, modulation)
        else:
            self._residual(stage, "attention_residual", "attention_norm2", rows, modulation)
            self._norm_in(stage, "ffn_norm1", rows, modulation)
        self._feed_forward(stage, rows)
        self._residual(stage, "ffn_residual", "ffn_norm2", rows, modulation)

    def _norm_in(self, stage: str, name: str, rows: int, modulation: bool) -> None:
        """The norm before attention or feed-forward, with its modulation by a scale [B, D]."""
        D = self.config.dim
        flops, scales = (RMS_NORM + SCALE, self.batch * D) if modulation else (RMS_NORM, 0)
        self._elementwise(stage, name, flops * rows * D, 2 * rows * D + scales, parameters=D, module=f"{stage}.{name}")

    def _residual(self, stage: str, operation: str, norm: str, rows: int, modulation: bool) -> None:
        """The norm after attention or feed-forward, its gate [B, D], and the sum with the residual stream."""
        D = self.config.dim
        flops, gates = (RMS_NORM + SCALE + ADD, self.batch * D) if modulation else (RMS_NORM + ADD, 0)
        moved = 3 * rows * D + gates
        self._elementwise(stage, operation, flops * rows * D, moved, parameters=D, module=f"{stage}.{norm}")

    def _residual_norm(self, stage: str, rows: int, modulation: bool) -> None:
        """Both at once: the sum is written, but not read again for its norm."""
        D = self.config.dim
        flops = 2 * RMS_NORM + ADD + (2 * SCALE if modulation else 0)
        moved = 4 * rows * D + (2 * self.batch * D if modulation else 0)
        self._elementwise(stage, "attention_residual_norm", flops * rows * D, moved, parameters=2 * D, module=stage)

    def _attention(self, stage: str, length: int, table_items: int, masked: bool) -> None:
        config, B, path = self.config, self.batch, f"{stage}.attention"
        D, head, rows = config.dim, config.head_dim, B * length
        queries, keys = config.n_heads * head, config.n_kv_heads * head
        if "qkv" in self.fused:
            projections = [("to_qkv", queries + 2 * keys)]
        else:
            projections = [("to_q", queries), ("to_k", keys), ("to_v", keys)]
        for name, width in projections:
            self._linear(stage, name, f"{path}.{name}", rows, D, width)
        turned = rows * (queries + keys)
        tables = 4 * table_items * length * head
        if config.qk_norm and "norm_rope" in self.fused:
            flops = (RMS_NORM + ROPE) * turned
            self._elementwise(
                stage, "qk_norm_rope", flops, 2 * turned, parameters=2 * head, other_bytes=tables, module=path
            )
        else:
            if config.qk_norm:
                self._elementwise(stage, "qk_norm", RMS_NORM * turned, 2 * turned, parameters=2 * head, module=path)
            self._elementwise(stage, "rope", ROPE * turned, 2 * turned, other_bytes=tables, module=path)
        flops = 2 * 2 * B * config.n_heads * length * length * head
        moved = 2 * rows * (queries + keys) + (rows if masked else 0)
        self._write(stage, "sdpa", "attention", flops, moved * self.item, 0, 0, path)
        self._linear(stage, "to_out", f"{path}.to_out.0", rows, queries, D)

    def _feed_forward(self, stage: str, rows: int) -> None:
        D, H, path = self.config.dim, self.config.hidden_dim, f"{stage}.feed_forward"
        gate_and_up = [("w13", 2 * H)] if "gate_up" in self.fused else [("w1", H), ("w3", H)]
        for name, width in gate_and_up:
            self._linear(stage, name, f"{path}.{name}", rows, D, width)
        self._elementwise(stage, "swiglu", (SILU + SCALE) * rows * H, 3 * rows * H, module=path)
        self._linear(stage, "w2", f"{path}.w2", rows, H, D)

    def _final_layer(self) -> None:
        stage, D, rows = "final_layer", self.config.dim, self.batch * self.lengths.image_tokens
        width = self.patch**2 * self.config.in_channels
        adaln = f"{stage}.adaLN_modulation.1"
        self._linear(stage, "adaln", adaln, self.batch, self.config.temb_dim, D, bias=True)
        moved = 2 * rows * D + self.batch * D
        self._elementwise(stage, "norm", (LAYER_NORM + SCALE) * rows * D, moved, module=stage)
        self._linear(stage, "linear", f"{stage}.linear", rows, D, width, bias=True)
        self._elementwise(stage, "unpatchify", 0, 2 * rows * width, module=stage)

    def _linear(
        self,
        stage: str,
        operation: str,
        module: str,
        rows: int,
        width_in: int,
        width_out: int,
        bias: bool = False,
    ) -> None:
        """A linear layer on `rows` tokens."""
        biases = width_out if bias else 0
        stored = self._stored(module, width_out, width_in) + biases * self.item
        moved = rows * (width_in + width_out) * self.item + stored
        flops, parameters = 2 * rows * width_in * width_out, width_in * width_out + biases
        self._write(stage, operation, "matmul", flops, moved, stored, parameters, module)

    def _stored(self, module: str, rows: int, width: int) -> int:
        """Bytes of a weight matrix [rows, width]. Raises InputError where its parts are packed differently."""
        packing = recipes.of_layer(self.packing, published_path(module, self.patch))
        stored = None if packing is None else packing.stored_bytes(rows, width, self.item)
        return rows * width * self.item if stored is None else stored

    def _elementwise(
        self,
        stage: str,
        operation: str,
        flops: int,
        values: int,
        *,
        module: str,
        parameters: int = 0,
        other_bytes: int = 0,
    ) -> None:
        """An operation that reads and writes `values` activations; `other_bytes` are of other dtypes."""
        stored = parameters * self.item
        moved = values * self.item + other_bytes + (stored if values else 0)
        self._write(stage, operation, "elementwise", flops, moved, stored, parameters, module)

    def _write(
        self, stage: str, operation: str, kind: Kind, flops: int, moved: int, stored: int, parameters: int, module: str
    ) -> None:
        self.operations.append(Operation(stage, operation, flops, moved, stored, parameters, kind, module))
