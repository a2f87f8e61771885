"""Timings and how they are judged. Knows callables, not models; nothing else reports a timing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Comparison": "comparison",
    "compare": "comparison",
    "compare_many": "comparison",
    "Sampler": "power",
    "joules_per_step": "power",
    "timed": "timing",
    "trial": "timing",
}
_MODULES = ("peaks", "power")
__all__ = [*_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from zimage.measure import peaks as peaks
    from zimage.measure import power as power
    from zimage.measure.comparison import Comparison as Comparison
    from zimage.measure.comparison import compare as compare
    from zimage.measure.comparison import compare_many as compare_many
    from zimage.measure.power import Sampler as Sampler
    from zimage.measure.power import joules_per_step as joules_per_step
    from zimage.measure.timing import timed as timed
    from zimage.measure.timing import trial as trial


def __getattr__(name: str) -> Any:
    """Import on first use: some of it needs MLX, and reading results must not."""
    if name in _HOMES:
        return getattr(import_module(f"zimage.measure.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"zimage.measure.{name}")
    raise AttributeError(f"module 'zimage.measure' has no attribute {name!r}")
