"""Z-Image in MLX, with the tools to measure what a change to it does to time, memory and output."""

from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zimage import backend
from zimage.errors import BackendError

__version__ = "0.1.0"

_HOMES = {
    "TransformerConfig": "zimage.config",
    "Transformer": "zimage.transformer",
    "load_transformer": "zimage.weights",
    "save_transformer": "zimage.saving",
    "sample": "zimage.scheduler",
    "ablate": "zimage.ablation",
    "fast": "zimage.arms",
    "fits": "zimage.analysis.fitting",
}
_MODULES = (
    "ablation",
    "adapters",
    "analysis",
    "arms",
    "config",
    "details",
    "digits",
    "errors",
    "execution",
    "half",
    "inputs",
    "kernels",
    "layers",
    "lab",
    "low_memory",
    "measure",
    "mixing",
    "operations",
    "orders",
    "patchify",
    "peers",
    "quality",
    "quantization",
    "recipes",
    "rope",
    "rounding",
    "saving",
    "scheduler",
    "sensitivity",
    "sources",
    "step_caching",
    "transformer",
    "transforms",
    "weights",
)
__all__ = ["__version__", "backend", *_HOMES, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from zimage.ablation import ablate as ablate
    from zimage.analysis.fitting import fits as fits
    from zimage.arms import fast as fast
    from zimage.config import TransformerConfig as TransformerConfig
    from zimage.saving import save_transformer as save_transformer
    from zimage.scheduler import sample as sample
    from zimage.transformer import Transformer as Transformer
    from zimage.weights import load_transformer as load_transformer


# Before MLX is imported, by us or by the caller: its BLAS and its environment variables cannot be changed afterwards.
# Where MLX is missing, results can still be read: what needs MLX asks again, and then the error comes.
with suppress(BackendError):
    backend.prepare()


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import zimage` costs nothing."""
    if name in _HOMES:
        return getattr(_import(_HOMES[name]), name)
    if name in _MODULES:
        return _import(f"zimage.{name}")
    raise AttributeError(f"module 'zimage' has no attribute {name!r}")


def _import(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("mlx") or "libmlx" in str(error):
            backend.prepare()  # says in one line what is missing and how to get it
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
