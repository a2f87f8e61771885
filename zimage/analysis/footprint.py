"""How much memory a step takes, before anything is allocated, and whether that fits.

The model: weights, inputs and RoPE's tables are held throughout. Temporaries are not freed when they are last used but
when the batch of operations they belong to has run, and the host is several batches ahead of the device.

- On a GPU, MLX closes a batch after a number of operations or a number of input elements (its `MLX_MAX_OPS_PER_BUFFER`
  and `MLX_MAX_MB_PER_BUFFER`, whose "MB" counts elements, as MLX 0.32 sets them) and lets ten run while it fills the
  next. All that those eleven batches allocate is taken to be alive at once: a host that is slower than the device holds
  less, so that small steps are overestimated.
- On a CPU, that is what was measured around attention: 23 arrays of the residual stream's size and two of attention
  scores. Half precision computes in fp32 there and has 26, and beside those 23 at times a block's weights in fp32.
- In packed blocks on a CPU, operations that unpack stand between the others, and fewer activations are alive: around
  attention 11 arrays (14 of half precision) and a block's weights unpacked in fp32; where weights are larger than
  activations, those of two blocks (two and a half) and 6 arrays (16). Measured with `8bit`, `4bit`, `mxfp4` layers on
  two models of 3 and 6 main blocks at four sizes each, weights included: from 4 % below what was held to 23 % above.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from zimage import recipes
from zimage.analysis import cost, units
from zimage.config import TransformerConfig
from zimage.errors import InputError
from zimage.lengths import Lengths
from zimage.recipes import Asked, Packing

DeviceKind = Literal["cpu", "cuda", "metal"]
Verdict = Literal["fits", "tight", "cannot fit", "unknown"]

# Operations, and input elements, after which a batch is closed: on CUDA that of an H100, which holds the most.
_BATCH = {"cuda": (100, 1000 * 2**20), "metal": (50, 50 * 2**20)}
_BATCHES_ALIVE = 11
# One modulated block as MLX computes it on a GPU: kernels; and elements read, in arrays of the residual stream's size.
_KERNELS = 50
_READ = 49
_LINEARS = 8  # in a block, each of which is unpacked by one kernel more where weights are packed
_CPU_ARRAYS, _CPU_ARRAYS_OF_HALF, _CPU_SCORES = 23, 26, 2
# By bytes of a value: arrays around attention; arrays, and blocks unpacked, where that is more.
_CPU_PACKED = {4: (11, 6, 2.0), 2: (14, 16, 2.5)}


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes of a step: the weights, all that is alive besides them at the worst moment, and their sum."""

    weight_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return self.weight_bytes + self.activation_bytes


def require_kind(device: object) -> None:
    """Raise InputError unless it is a kind of device."""
    if device not in get_args(DeviceKind):
        raise InputError(f"device must be cpu, cuda or metal, found {device!r:.60}")


def step_bytes(
    config: TransformerConfig,
    height: int,
    width: int,
    batch: int = 1,
    caption_tokens: int | Sequence[int] = 32,
    dtype: str = "bfloat16",
    quantization: Asked | Packing | None = None,
    patch_size: int | None = None,
    device: DeviceKind = "cuda",
) -> Footprint:
    """The Footprint of one step evaluated at once, by one model, of images of `height` x `width` pixels.

    Raises InputError or ConfigError for what the model does not take and for an unknown kind of device.
    """
    require_kind(device)
    packing = recipes.packing(config, quantization)
    operations = cost.step(config, height, width, batch, caption_tokens, dtype, packing or None, patch_size)
    found, _ = cost.token_lengths(config, height, width, batch, caption_tokens, patch_size)
    item = cost.item_bytes(dtype)
    unpacked = 0
    if packing and device != "metal":  # Metal multiplies packed weights as they are
        stages = cost.by_stage([operation for operation in operations if operation.module in packing])
        unpacked = max((stage.parameters for stage in stages), default=0)
    if device == "cpu":
        alive = _alive_on_cpu(config, found, item, unpacked, operations)
        if packing and _some_block_is_plain(operations, packing):
            alive = max(alive, _alive_on_cpu(config, found, item, 0, operations))
    else:
        alive = _alive_on_gpu(config, found, item, unpacked, operations, device)
    return Footprint(cost.whole(operations).weight_bytes, _held(config, found, item, (height, width)) + alive)


def _held(config: TransformerConfig, found: Lengths, item: int, pixels: tuple[int, int]) -> int:
    """Bytes of the inputs and of RoPE's tables, which stay for the whole step."""
    batch = len(found.captions)
    rows, columns = config.latent_size(*pixels)
    latents = batch * config.in_channels * rows * columns * item
    captions = batch * max(found.captions) * config.cap_feat_dim * item
    items = batch if found.ragged else 1
    tables = 4 * config.head_dim * (items * (found.image + found.joint) + found.caption)
    return latents + captions + tables


def _rope_bytes(values: int, item: int) -> int:
    """Bytes that RoPE allocates for `values` queries or keys: four half products and their pairs in fp32, and casts."""
    casts = 0 if item == 4 else (4 + item) * values
    return casts + 4 * 4 * values // 2 + 4 * values


def _alive_on_cpu(
    config: TransformerConfig, found: Lengths, item: int, unpacked: int, operations: Sequence[cost.Operation]
) -> int:
    batch = len(found.captions)
    stream = 4 * batch * found.joint * config.dim
    scores = 4 * _CPU_SCORES * batch * config.n_heads * found.joint**2
    if unpacked:
        weights = 4 * unpacked
        attending, arrays, blocks = _CPU_PACKED[item]
        return max(attending * stream + scores + weights, arrays * stream + int(blocks * weights))
    if item == 4:
        return _CPU_ARRAYS * stream + scores
    return max(
        _CPU_ARRAYS_OF_HALF * stream + scores, _CPU_ARRAYS * stream + 4 * _last_block_weights(config, operations)
    )


def _some_block_is_plain(operations: Sequence[cost.Operation], packing: Packing) -> bool:
    """Whether most weights of some main block are not packed, so that its operations are those of a plain one."""
    of_blocks = [operation for operation in operations if operation.stage.startswith("layers.")]
    packed = {one.path: one.parameters for one in cost.by_stage([o for o in of_blocks if o.module in packing])}
    return any(packed.get(one.path, 0) < one.parameters / 2 for one in cost.by_stage(of_blocks))


def _last_block_weights(config: TransformerConfig, operations: Sequence[cost.Operation]) -> int:
    return sum(o.parameters for o in operations if o.stage == f"layers.{config.n_layers - 1}")


def _alive_on_gpu(
    config: TransformerConfig,
    found: Lengths,
    item: int,
    unpacked: int,
    operations: Sequence[cost.Operation],
    device: DeviceKind,
) -> int:
    batch = len(found.captions)
    rows = batch * found.joint
    stream, hidden = rows * config.dim, rows * config.hidden_dim
    queries, keys = rows * config.dim, rows * config.n_kv_heads * config.head_dim
    # Two norms; queries, keys, values; attention, its copy and its projection; gate and up; w2.
    allocated = (2 * stream + queries + 2 * keys + 3 * stream + 2 * hidden + stream + unpacked) * item
    allocated += _rope_bytes(queries, item) + _rope_bytes(keys, item)
    if device == "cuda" and item == 4:  # cuDNN's attention takes 16-bit floats only; else there are scores
        allocated += 2 * batch * config.n_heads * found.joint**2 * item
    kernels = _KERNELS + (_LINEARS if unpacked else 0)
    read = _READ * stream + _last_block_weights(config, operations)
    most_kernels, most_elements = _BATCH[device]
    # A batch is closed by the operation that goes beyond the limit, and holds it.
    in_a_batch = min(most_kernels / kernels, (most_elements + read / kernels) / read)
    blocks = min(_BATCHES_ALIVE * in_a_batch, config.n_layers + config.n_refiner_layers)
    # Whatever the batches, what one operation needs is alive: the stream, its norm, gate and up.
    return max(int(blocks * allocated), (2 * stream + 2 * hidden) * item)


def verdict(
    peak_bytes: int, recommended_bytes: int | None, total_bytes: int | None, models: float = 1
) -> tuple[Verdict, str]:
    """Whether `peak_bytes`, which `models` models and a step take, fit a device, and one sentence that says why.

    More than the total "cannot fit" and is to be refused; more than the recommended working set is "tight", where
    memory may be swapped; "unknown" where neither limit is known.
    """
    needs = "a step needs" if models == 1 else f"{models:g} models and a step need"
    need = f"{needs} about {units.size(peak_bytes)}"
    if total_bytes is not None and peak_bytes > total_bytes:
        return "cannot fit", f"{need}, more than the device's {units.size(total_bytes)}"
    if recommended_bytes is not None and peak_bytes > recommended_bytes:
        return "tight", (
            f"{need}, more than the recommended working set of {units.size(recommended_bytes)}: expect swapping"
        )
    if recommended_bytes is None and total_bytes is None:
        return "unknown", f"{need}; the device's memory is unknown"
    limit = min(value for value in (recommended_bytes, total_bytes) if value is not None)
    return "fits", f"{need} of {units.size(limit)}"
