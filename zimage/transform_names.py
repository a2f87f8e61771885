"""The names of `arms.TRANSFORMS`, for those who ask for transforms where no model is. Needs no MLX."""

from collections.abc import Sequence

from zimage import practices
from zimage.errors import InputError, nearest

FAST = (  # what makes the fast step, in this order
    *("fuse_qkv", "fuse_gate_up", "fuse_modulation", "fuse_norm_rope", "flash_attention", "fuse_residual_norm"),
    *("fuse_swiglu", "join_blocks", "compile_blocks", "submit_early", "keep_captions"),
)
KNOWN = (
    *("fuse_qkv", "fuse_gate_up", "fuse_modulation", "fuse_norm_rope", "flash_attention", "fuse_residual_norm"),
    *("fuse_swiglu", "wide_dequantize", "fuse_qkv_copied", "join_blocks", "keep_captions", "chunk_feed_forward"),
    *practices.EXECUTION,
    *practices.OUTPUT,
    *("tea_cache_flux", "reuse_by_timestep", "reuse_every_2nd", "fast", "tuned"),
    *(f"quantize_input_{mode}_emulated" for mode in ("int8", "fp8", "mxfp8", "nvfp4")),
)


def require_known(names: Sequence[str]) -> None:
    """Raise InputError unless all of these are names of transforms."""
    if not isinstance(names, (list, tuple)):
        raise InputError(f"transforms must be a list of names, found {names!r}")
    for name in names:
        if not isinstance(name, str) or name not in KNOWN:
            near = nearest(name, KNOWN)
            hint = f"did you mean {near!r}?" if near else f"known are {', '.join(KNOWN)}"
            raise InputError(f"transform {name!r} is not known; {hint}")


def several(names: Sequence[str]) -> list[str]:
    """These names with those of FAST for "fast". Raises InputError unless they are two different ones at least."""
    require_known(names)
    changes = [change for name in names for change in (FAST if name == "fast" else [name])]
    if len(changes) < 2 or len(set(changes)) < len(changes):
        raise InputError(f"transforms must be two different ones at least, found {names}")
    return changes
