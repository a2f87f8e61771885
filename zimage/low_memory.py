"""Steps in less memory, at a price in time: weights that stay on disk, products a part at a time, nothing held twice.

None of it changes the output by more than rounding, and reading weights from disk not by a bit.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from zimage.errors import InputError, WeightsError, require_integer
from zimage.layers import as_class, clone
from zimage.modulation import Modulation
from zimage.transformer import Transformer, TransformerBlock, weight_bytes
from zimage.transforms import blocks, fuse_gate_up, fuse_qkv
from zimage.weights import Unread, require_room

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

_PARTS = ("noise_refiner", "context_refiner", "layers")
_Signature = tuple[int, int, int]


def chunk_feed_forward(model: Transformer, rows: int = 1024) -> Transformer:
    """The model whose feed-forwards compute `rows` tokens at a time, so that two such parts' hidden activations exist.

    The output is the same up to rounding. Each part is computed at once instead of being left to `mx.eval`: a call
    cannot be inside `mx.compile`, and blocks are not compiled, with `compile_blocks` either. Inputs of no more rows are
    computed as without it. Raises InputError for rows below 1.
    """
    require_integer("rows", rows, 1)
    new = clone(model)
    for _, block in blocks(new):
        block.feed_forward.rows_at_once = rows
    return new


def block_by_block(model: Transformer, transform: Callable[[Transformer], Transformer]) -> Transformer:
    """`transform(model)`, of `fuse_qkv` or `fuse_gate_up`, of a model that is given up: block after block is replaced.

    Peak memory is then the model and one block, where new weights for all blocks would lie beside the old ones. The
    argument becomes the result. Raises InputError for other transforms, which may change more than each block for
    itself, and as the transform does: the blocks before the one that it refuses are changed then, and all can be used.
    """
    if transform not in (fuse_qkv, fuse_gate_up):
        raise InputError(
            f"block_by_block takes zimage.transforms.fuse_qkv or fuse_gate_up, found {transform!r:.60}; apply it to "
            "the whole model"
        )
    empty = clone(model)
    for part in _PARTS:
        empty[part] = []
    for part in _PARTS:
        for i in range(len(model[part])):
            alone = clone(empty)
            alone[part] = [model[part][i]]
            model[part][i] = transform(alone)[part][0]
            del alone  # and with it the old block
            mx.clear_cache()
    return model


def streamed(source: str | Path, dtype: str | None = None, resident: int = 0, ahead: int = 1) -> Transformer:
    """The model of `source` whose main blocks stay on disk: each is read when it is to run, and dropped after it.

    source, dtype: as for `load_transformer`, of a source that has files; packed weights are read as they are stored.
    resident: so many of the first main blocks are in memory like all other weights. ahead: while a block computes, so
    many of the next are being read, within one call; weights of 1 + ahead blocks are held at most, and none between
    calls. The output is that of the loaded model bit for bit. Blocks on disk compute at once, so that a call cannot be
    inside `mx.compile`; they are neither compiled nor joined, whatever `compile_blocks` and `join_blocks` do to others,
    and transforms that make new weights refuse them: convert the source instead.

    Raises as `load_transformer`, of what is held at most; InputError for a source without files and for other numbers;
    a call of the model raises WeightsError where a file is gone or was changed meanwhile.
    """
    require_integer("ahead", ahead, 0)
    unread = Unread.of(source, dtype)
    require_integer("resident", resident, 0, unread.info.config.n_layers)
    model = unread.model()
    reader = BlockReader(unread, resident, ahead)
    layers, model.layers = model.layers, model.layers[:resident]
    read = sorted(weight_bytes(block) for block in layers[resident:])[-1 - ahead :]
    require_room(
        f"{unread.info.source}: its weights in memory",
        weight_bytes(model) + sum(read),
        "let fewer blocks stay there, or ",
    )
    unread.read([array for _, array in tree_flatten(model.parameters())])
    model.layers += [_streamed(block, reader, i) for i, block in enumerate(layers) if i >= resident]
    return model


class BlockReader:
    """Reads main blocks of a source, from the number `first` on, as they are asked for; `ahead` of them in advance."""

    def __init__(self, unread: Unread, first: int, ahead: int) -> None:
        self._unread, self._ahead = unread, ahead
        self._count = unread.info.config.n_layers
        self._files = {i: unread.files(f"layers.{i}") for i in range(first, self._count)}
        self._seen = {file: _signature(file) for files in self._files.values() for file in files}
        self._reading: dict[int, dict[str, mx.array]] = {}

    def take(self, number: int) -> dict[str, mx.array]:
        """The arrays of block `number` by their names below it, read; the next blocks are being read from now on.

        Raises WeightsError where a file is gone, was changed, or cannot be read.
        """
        wanted = range(number, min(number + 1 + self._ahead, self._count))
        self._reading = {i: arrays for i, arrays in self._reading.items() if i in wanted}  # of a call that was ended
        self._begin(number)
        arrays = self._reading.pop(number)
        self._wait(number, list(arrays.values()))
        for i in wanted[1:]:
            self._begin(i)
        return arrays

    @property
    def reading(self) -> list[int]:
        """The numbers of the blocks that are being read, or were and wait to be taken."""
        return sorted(self._reading)

    def _begin(self, number: int) -> None:
        if number in self._reading:
            return
        self._require_unchanged(number)
        arrays = self._unread.arrays(f"layers.{number}")
        mx.async_eval(list(arrays.values()))  # type: ignore[no-untyped-call]
        self._reading[number] = arrays

    def _wait(self, number: int, arrays: Sequence[mx.array]) -> None:
        try:
            self._unread.read(arrays)
        finally:
            self._require_unchanged(number)

    def _require_unchanged(self, number: int) -> None:
        for file in self._files[number]:
            if _signature(file) != self._seen[file]:
                raise WeightsError(f"{file}: changed while its model was in use; make the model anew")


def _signature(file: Path) -> _Signature:
    """What tells whether a file is still the one that it was."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror}; its model reads from it in every step") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


class StreamedBlock(TransformerBlock):
    """A main block whose own arrays are never read: those it computes with come from a BlockReader in every call."""

    streamed = True
    reader: BlockReader
    number: int

    def __call__(
        self,
        x: mx.array,
        rotation: mx.array,
        mask: mx.array | None = None,
        temb: mx.array | Modulation | None = None,
    ) -> mx.array:
        block = clone(self)
        block.update(tree_unflatten(list(self.reader.take(self.number).items())))
        out = block.forward(x, rotation, mask, temb)
        mx.eval(out)  # before its weights are dropped, or the graph would hold them
        return out


def _streamed(block: TransformerBlock, reader: BlockReader, number: int) -> StreamedBlock:
    new = as_class(StreamedBlock, block)
    new.reader, new.number = reader, number
    return new
