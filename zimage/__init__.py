"""Z-Image in MLX, with the tools to measure what a change to it does to time, memory and output."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "TransformerConfig": "zimage.config",
    "Transformer": "zimage.transformer",
    "load_transformer": "zimage.weights",
    "save_transformer": "zimage.weights",
    "sample": "zimage.scheduler",
}
_MODULES = (
    "analysis",
    "backend",
    "config",
    "digits",
    "errors",
    "lab",
    "measure",
    "patchify",
    "rope",
    "scheduler",
    "transformer",
    "transforms",
    "weights",
)
__all__ = ["__version__", *_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from zimage.config import TransformerConfig as TransformerConfig
    from zimage.scheduler import sample as sample
    from zimage.transformer import Transformer as Transformer
    from zimage.weights import load_transformer as load_transformer
    from zimage.weights import save_transformer as save_transformer


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import zimage` costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"zimage.{name}")
    raise AttributeError(f"module 'zimage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
