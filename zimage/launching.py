"""When work reaches the device: calls compiled once, and a step handed over in parts while the rest is being built.

Neither changes what is computed.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from zimage.contents import Contents

import mlx.core as mx
import mlx.nn as nn

_calls: dict[tuple[int, str], tuple[Contents, Callable[..., Any]]] = {}  # by the module's id and the method


def compiled(module: nn.Module, method: str) -> Callable[..., Any]:
    """`module.<method>` as MLX compiles it, traced at its first use for each set of shapes and dtypes.

    Made once for a module, made again after one of its arrays or children was replaced, and dropped with it. What an
    assignment to a part of an array changes is not seen. Where MLX finds no compiler, on a CPU, the call is a plain
    one.
    """
    key = (id(module), method)
    made = _calls.get(key)
    if made is None:
        weakref.finalize(module, _calls.pop, key, None)
    elif made[0].same():
        return made[1]
    contents = Contents(module)
    with suppress(ValueError):  # inside another of MLX's transformations nothing can be computed
        mx.eval(contents.arrays())  # or every call would compute them again
    owner = weakref.ref(module)  # or the module would keep itself alive

    def call(*arguments: Any) -> Any:
        return getattr(owner(), method)(*arguments)

    _calls[key] = contents, mx.compile(call)
    return _calls[key][1]


def by_rows(call: Callable[[mx.array], mx.array], x: mx.array, rows: int) -> mx.array:
    """`call` of x [..., D], computed at once for `rows` rows at a time, so that only two such parts' temporaries exist.

    `call` takes and gives [1, any number of rows, any width], each row for itself. A part waits on the device while the
    next is being built. Where x has no more rows, this is `call(x)`.
    """
    flat = x.reshape(1, -1, x.shape[-1])
    if flat.shape[1] <= rows:
        return call(x)
    parts: list[mx.array] = []
    for first in range(0, flat.shape[1], rows):
        parts.append(call(flat[:, first : first + rows]))
        mx.async_eval(parts[-1])  # type: ignore[no-untyped-call]
        mx.eval(parts[-2:-1])
    return mx.concatenate(parts, axis=1).reshape(*x.shape[:-1], -1)


_LOOK_S = 1e-4
_LOOKS = 15  # a block of the published shape that is on the device meanwhile takes longer than all of them


def _until_freed(held: int, waiting: int) -> None:
    """Give MLX's own thread a moment to free what a part held that is done, or a third part comes beside the two.

    held: bytes in use when the step began; waiting: of temporary arrays in the parts on the device, about.
    """
    for _ in range(_LOOKS):
        if mx.get_active_memory() - held <= 1.25 * waiting:
            return
        time.sleep(_LOOK_S)


class Policy(Protocol):
    """When a step's arrays are handed over; every_stage: also after stages that are no block."""

    @property
    def every_stage(self) -> bool:
        """Whether it hears of every stage, or of blocks alone."""

    def start(self) -> Callable[..., None]:
        """A new step: what to call with the arrays that each block computes, and the bytes of weights it unpacks."""


@dataclass(frozen=True)
class Every:
    """Hand over what is built after every `blocks`-th block, without a bound on what waits."""

    blocks: int
    every_stage = False

    def start(self) -> Callable[..., None]:
        """A new step: what to call with the arrays that each block computes."""
        count = 0

        def submit(arrays: Sequence[mx.array], _unpacked_bytes: int = 0) -> None:
            nonlocal count
            count += 1
            if count % self.blocks == 0:
                mx.async_eval(arrays)  # type: ignore[no-untyped-call]

        return submit


@dataclass(frozen=True)
class Barrier:
    """Wait after every block, or after every stage, until the device has computed it."""

    every_stage: bool

    def start(self) -> Callable[..., None]:
        """A new step: what to call with the arrays that each block or stage computes."""
        return lambda arrays, _unpacked_bytes=0: mx.eval(arrays)


ALIVE = 20  # times the bytes of a block's output that all its temporary arrays take together, about


@dataclass(frozen=True)
class Submission:
    """Hand a step's blocks to the device in parts, and wait for the oldest where too much is on the device already.

    part_bytes: of temporary arrays in a part, at least; the first block is a part by itself, so that the device has
    work at once, and where blocks are small they go together, for handing over costs the host time. waiting_bytes: of
    temporary arrays on the device, at most, but one part always waits there while the next is being built. Temporary
    are a block's activations, and its weights where they are unpacked for a product.
    """

    part_bytes: int
    waiting_bytes: int
    every_stage = False

    def start(self) -> Callable[..., None]:
        """A new step: what to call with the arrays that each block computes, and the bytes of weights it unpacks."""
        waiting: deque[tuple[Sequence[mx.array], int]] = deque()
        last: Sequence[mx.array] | None = None
        built = 0
        held = mx.get_active_memory()

        def submit(arrays: Sequence[mx.array], unpacked_bytes: int = 0) -> None:
            nonlocal last, built
            new = [array for array in arrays if not any(array is old for old in last or ())]
            built += ALIVE * sum(array.nbytes for array in new) + unpacked_bytes
            first, last = last is None, arrays
            if built < self.part_bytes and not first:
                return
            mx.async_eval(arrays)  # type: ignore[no-untyped-call]
            waiting.append((arrays, built))
            built = 0
            while len(waiting) > 1 and sum(size for _, size in waiting) > self.waiting_bytes:
                mx.eval(waiting.popleft()[0])
                _until_freed(held, sum(size for _, size in waiting))

        return submit
