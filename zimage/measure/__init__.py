"""Timings and how they are judged. Knows callables, not models; nothing else reports a timing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Comparison": "comparison",
    "NoiseFloor": "floor",
    "Program": "processes",
    "Resident": "processes",
    "by_stage": "memory",
    "compare": "comparison",
    "compare_many": "comparison",
    "Sampler": "power",
    "default_canary": "canary",
    "depth": "profile",
    "in_fresh_processes": "fresh",
    "joules_per_step": "power",
    "noise_floor": "floor",
    "prefix": "profile",
    "slope": "profile",
    "steady": "blocks",
    "sustained": "blocks",
    "timed": "timing",
    "trial": "timing",
    "watch": "memory",
}
_MODULES = ("peaks", "power", "settings")
__all__ = [*_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from zimage.measure import peaks as peaks
    from zimage.measure import power as power
    from zimage.measure import settings as settings
    from zimage.measure.blocks import steady as steady
    from zimage.measure.blocks import sustained as sustained
    from zimage.measure.canary import default_canary as default_canary
    from zimage.measure.comparison import Comparison as Comparison
    from zimage.measure.comparison import compare as compare
    from zimage.measure.comparison import compare_many as compare_many
    from zimage.measure.floor import NoiseFloor as NoiseFloor
    from zimage.measure.floor import noise_floor as noise_floor
    from zimage.measure.fresh import in_fresh_processes as in_fresh_processes
    from zimage.measure.memory import by_stage as by_stage
    from zimage.measure.memory import watch as watch
    from zimage.measure.power import Sampler as Sampler
    from zimage.measure.power import joules_per_step as joules_per_step
    from zimage.measure.processes import Program as Program
    from zimage.measure.processes import Resident as Resident
    from zimage.measure.profile import depth as depth
    from zimage.measure.profile import prefix as prefix
    from zimage.measure.profile import slope as slope
    from zimage.measure.timing import timed as timed
    from zimage.measure.timing import trial as trial


def __getattr__(name: str) -> Any:
    """Import on first use: some of it needs MLX, and reading results must not."""
    if name in _HOMES:
        return getattr(import_module(f"zimage.measure.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"zimage.measure.{name}")
    raise AttributeError(f"module 'zimage.measure' has no attribute {name!r}")
