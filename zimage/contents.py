"""What a module consists of, to tell whether it is still what it was."""

import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Contents:
    """What a module consists of: the items of its own container and of all below it. They are compared in every call.

    names: of the items that are looked at, all if empty. The module itself is not kept alive, only what is below it.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] = ()) -> None:
        self._own = weakref.ref(module)
        self._items: list[tuple[Any, Any]] = [(k, v) for k, v in module.items() if k in names or not names]
        self._count = None if names else len(module)
        self._sizes: list[tuple[Any, int]] = []
        self._below: list[tuple[Any, Any, Any]] = []
        for _, value in self._items:
            self._add(value)

    def _add(self, container: Any) -> None:
        if not isinstance(container, (dict, list)):
            return
        self._sizes.append((container, len(container)))
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            self._below.append((container, key, value))
            self._add(value)

    def arrays(self) -> list[mx.array]:
        """All arrays."""
        values = [value for _, value in self._items] + [value for _, _, value in self._below]
        return [value for value in values if isinstance(value, mx.array)]

    def same(self) -> bool:
        """Whether every place still holds what it held."""
        own = self._own()
        try:
            return (
                own is not None
                and (self._count is None or len(own) == self._count)
                and all(own[key] is value for key, value in self._items)
                and all(len(container) == size for container, size in self._sizes)
                and all(container[key] is value for container, key, value in self._below)
            )
        except (KeyError, IndexError):
            return False
