"""Names of scopes and orders, whose work needs a model, for those who ask for them where none is. Needs no MLX."""

from collections.abc import Collection, Sequence

from zimage.errors import InputError

# Of `scopes.SCOPES`, from the narrowest to the step.
SCOPES = (
    *("qkv", "qkv_norm", "qkv_norm_rope", "attention"),
    *("gate_up", "gate_up_swiglu", "feed_forward", "block", "step"),
)
# Of `orders.ORDERS`, and of `orders.OF_PACKED`, which packed models are needed for.
ORDERS = (
    *("load, step", "stream, step", "load, fuse, step", "load, fuse, drop plain, step"),
    "load, fuse block by block, step",
)
ORDERS_OF_PACKED = (
    *("load, pack, step", "load, pack, drop plain, step", "pack while loading, step", "stream packed, step"),
    *("step, load packed beside it, step", "step, drop, load packed, step"),
    "step, drop, clear cache, load packed, step",
)


def require_each_once(what: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise InputError unless `names`, the value of the argument `what`, are known, each there once, one at least."""
    if not isinstance(names, (list, tuple)) or not names:
        raise InputError(f"{what} must be a list of names, at least one, found {names!r:.80}")
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{what}: {name!r:.80} is not known; known are {', '.join(known)}")
        if name in names[:place]:
            raise InputError(f"{what}: {name!r} is there twice; name each once")


def require_orders(names: Sequence[str], packed: bool = True) -> list[str]:
    """All orders that there are, with packed models or without. Raises InputError unless `names` are among them."""
    known = [*ORDERS, *(ORDERS_OF_PACKED if packed else ())]
    if not isinstance(names, (list, tuple)):
        raise InputError(f"orders must be a list of names, found {names!r:.80}")
    for name in names:
        if name not in known:
            raise InputError(f"order {name!r:.80} is not known; known are {', '.join(map(repr, known))}")
    return known
