"""Orders in which a model is brought to its step, to compare what each holds at most.

`python -m zimage.orders NAME JSON` goes through one of them in a process of its own, whose peak no other has raised,
and prints it; `peaks` does that for all of them.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from zimage import arms, backend, inputs, low_memory, transforms
from zimage.errors import ZImageError
from zimage.measure import memory
from zimage.measure.processes import run_to_end
from zimage.names import require_orders
from zimage.sources import plain
from zimage.transformer import Transformer
from zimage.weights import load_transformer

import mlx.core as mx
from mlx.utils import tree_flatten

_Models = dict[str, Transformer]


@dataclass(frozen=True)
class Case:
    """What all orders have in common: a source with files, and the step to be done.

    packed: a source with the same weights packed as `quantization` says; both "" to leave packed models out.
    """

    source: str
    packed: str
    quantization: str
    dtype: str
    height: int
    width: int
    batch: int
    caption_tokens: int
    seed: int
    device: str


class _Run:
    """One order while it is gone through: the models that it has at the moment, and the most that was held."""

    def __init__(self, case: Case) -> None:
        self.case, self.most_bytes = case, 0
        self.models: _Models = {}

    def load(self, name: str = "model", quantization: str | None = None) -> None:
        """Load the model called `name`, packed where that is asked for."""
        self.models[name] = load_transformer(self.case.source, self.case.dtype, quantization)
        self.look()

    def load_packed(self) -> None:
        """Load the model that is stored packed."""
        self.models["packed"] = load_transformer(self.case.packed)
        self.look()

    def step(self) -> None:
        """One step of the newest model."""
        case, model = self.case, [*self.models.values()][-1]
        sizes = (case.height, case.width, case.batch, case.caption_tokens)
        mx.eval(model(*inputs.example(model, case.source, *sizes, case.seed)))
        self.look()

    def look(self) -> None:
        """See what is allocated now: arrays, and the buffers that MLX keeps for reuse."""
        self.most_bytes = max(self.most_bytes, mx.get_active_memory() + mx.get_cache_memory(), mx.get_peak_memory())


def _plain(run: _Run) -> None:
    run.load()
    run.step()


def _fused(run: _Run, drop: bool) -> None:
    run.load("plain")
    run.models["fused"] = arms.transformed(run.models["plain"], ["fuse_qkv", "fuse_gate_up"])
    if drop:
        del run.models["plain"]
    run.look()
    run.step()


def _fused_block_by_block(run: _Run) -> None:
    run.load()
    for transform in (transforms.fuse_qkv, transforms.fuse_gate_up):
        low_memory.block_by_block(run.models["model"], transform)
    run.look()
    run.step()


def _packed(run: _Run, drop: bool) -> None:
    run.load("plain")
    run.models["packed"] = transforms.quantize(run.models["plain"], run.case.quantization)
    if drop:
        del run.models["plain"]
    run.look()
    run.step()


def _packed_while_loading(run: _Run) -> None:
    run.load(quantization=run.case.quantization)
    run.step()


def _streamed(run: _Run, packed: bool) -> None:
    source, dtype = (run.case.packed, None) if packed else (run.case.source, run.case.dtype)
    run.models["model"] = low_memory.streamed(source, dtype)
    run.look()
    run.step()


def _another(run: _Run, drop: bool, clear: bool) -> None:
    run.load()
    run.step()
    if drop:
        del run.models["model"]
    if clear:
        mx.clear_cache()
    run.load_packed()
    run.step()


ORDERS: dict[str, Callable[[_Run], None]] = {
    "load, step": _plain,
    "stream, step": partial(_streamed, packed=False),
    "load, fuse, step": partial(_fused, drop=False),
    "load, fuse, drop plain, step": partial(_fused, drop=True),
    "load, fuse block by block, step": _fused_block_by_block,
}
OF_PACKED: dict[str, Callable[[_Run], None]] = {
    "load, pack, step": partial(_packed, drop=False),
    "load, pack, drop plain, step": partial(_packed, drop=True),
    "pack while loading, step": _packed_while_loading,
    "stream packed, step": partial(_streamed, packed=True),
    "step, load packed beside it, step": partial(_another, drop=False, clear=False),
    "step, drop, load packed, step": partial(_another, drop=True, clear=False),
    "step, drop, clear cache, load packed, step": partial(_another, drop=True, clear=True),
}


def peaks(
    case: Case, names: Sequence[str] = (), timeout_s: float = 600.0, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Rows of a `memory` table: what orders hold at most, each in a process of its own; all of them without `names`.

    peak_bytes: of arrays; allocated_bytes: with the buffers that MLX keeps for reuse, seen between loading, changing
    and stepping; process_bytes: how far the process's own memory rose, which a GPU's is no part of; weight_bytes: of
    the models that are there at the end, what several share counted once and streamed ones whole. Raises InputError as
    `require_orders`, and MeasurementError where an order fails.
    """
    known = require_orders(names, bool(case.packed))
    rows: list[dict[str, Any]] = []
    for name in names or known:
        command = [sys.executable, "-m", "zimage.orders", name, json.dumps(asdict(case))]
        found = json.loads(run_to_end(command, f"the order {name!r}", timeout_s).splitlines()[-1])
        rows += [{"arm": name, "stage": "process", "metric": metric, "bytes": value} for metric, value in found.items()]
        advance()
    return rows


def _report(run: _Run, before: int | None) -> str:
    """What `peaks` reads: the numbers of a finished order as JSON."""
    after = memory.process()["resident_peak_bytes"]
    arrays = [array for model in run.models.values() for _, array in tree_flatten(model.parameters())]
    found = {
        "peak_bytes": mx.get_peak_memory(),
        "allocated_bytes": run.most_bytes,
        "process_bytes": None if before is None or after is None else after - before,
        "weight_bytes": sum({id(array): array.nbytes for array in arrays}.values()),
    }
    return json.dumps({name: value for name, value in found.items() if value is not None})


def main(arguments: list[str]) -> int:
    """Go through the order and report; the exit status."""
    name, text = arguments
    try:
        case = Case(**json.loads(text))
        backend.use_device(case.device)
        square = mx.ones((256, 256))
        mx.eval(square @ square)  # starting the device and its library is no part of any order
        del square
        mx.clear_cache()
        mx.reset_peak_memory()
        run, before = _Run(case), memory.process()["resident_peak_bytes"]
        (ORDERS | OF_PACKED)[name](run)
        print(_report(run, before), flush=True)
    except ZImageError as error:
        print(plain(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
