"""How a model is streamed from disk, as plain numbers; `low_memory.streamed` does it. Needs no MLX."""

from typing import Any, NamedTuple

from zimage.errors import InputError, require_integer


class Stream(NamedTuple):
    """How a model is streamed: the share of its main blocks that stays in memory, and the blocks read ahead."""

    share: float
    ahead: int

    @classmethod
    def of(cls, values: object) -> "Stream":
        """From a list of the two. Raises InputError for what is none, and for numbers out of range."""
        pair: Any = values if isinstance(values, (list, tuple)) and len(values) == 2 else (None, None)
        kept, early = pair
        if isinstance(kept, bool) or not isinstance(kept, (int, float)) or not 0 <= kept <= 1:
            raise InputError(
                "a stream is a list of the share of main blocks that stays in memory, from 0 to 1, and of the blocks "
                f"read ahead, found {values!r:.60}"
            )
        require_integer("blocks read ahead", early, 0)
        return cls(kept, early)
