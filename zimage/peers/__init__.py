"""Other implementations of Z-Image's denoising step, each run by an interpreter of its own that the user names.

A peer needs no zimage: the file `step.py` is given to its interpreter as it is, and speaks the protocol of
`measure.Resident`. Weights are random; the sizes are those of a config.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage.config import TransformerConfig
from zimage.errors import InputError

PEERS = ("diffusers", "mflux")
# What `step.py` knows, for those who ask where no peer is; an option that ends in = takes a value.
OPTIONS = {"diffusers": ("compile", "attention="), "mflux": ("compile", "4bit", "8bit")}
_PROGRAM = Path(__file__).with_name("step.py")
_TIMEOUT_S = 300.0


def require_options(peer: str, options: Sequence[str]) -> None:
    """Raise InputError unless a peer knows all of these options."""
    for option in options:
        own = option.partition("=") if isinstance(option, str) else ("", "", "")
        if own[0] + own[1] not in OPTIONS[peer] or bool(own[1]) != bool(own[2]):
            raise InputError(f"{peer} knows no option {option!r:.80}; it knows {', '.join(OPTIONS[peer])}")


def command(
    peer: str,
    python: str,
    config: TransformerConfig,
    height: int,
    width: int,
    batch: int = 1,
    caption_tokens: int = 32,
    dtype: str = "bfloat16",
    device: str = "auto",
    options: Sequence[str] = (),
) -> list[str]:
    """The command that serves one step of a peer, for images of `height` x `width` pixels.

    device: "cpu", "gpu", or "auto", which is a GPU where the peer finds one. options: "compile" (blocks in diffusers,
    the whole step in mflux), "4bit" or "8bit" (mflux), and "attention=NAME" (diffusers' backend); the peer refuses
    others when it starts. Raises InputError for a peer that is not known or cannot do this, and ConfigError for sizes.
    """
    if peer not in PEERS:
        raise InputError(f"peer {peer!r} is not known; known are {', '.join(PEERS)}")
    if peer == "mflux" and batch != 1:
        raise InputError(f"mflux's transformer takes one image at a time, found batch {batch}")
    if config.n_kv_heads != config.n_heads:
        raise InputError(f"{peer} has no grouped queries, found {config.n_kv_heads} of {config.n_heads} heads")
    rows, columns = config.latent_size(height, width)
    job = {
        "peer": peer, "config": config.to_dict(), "rows": rows, "columns": columns, "batch": batch,
        "caption_tokens": caption_tokens, "dtype": dtype, "device": device, "options": list(options),
    }  # fmt: skip
    return [python, str(_PROGRAM), json.dumps(job)]


def of_zimage(python: str, arguments: Mapping[str, Any]) -> list[str]:
    """The command that serves one step of the zimage which that interpreter has: `arms.step` with these arguments."""
    return [python, str(_PROGRAM), json.dumps({"peer": "zimage", "arguments": dict(arguments)})]


def version(peer: str, python: str) -> str | None:
    """The peer's version in that interpreter, or None where it or its interpreter is not there."""
    asked = f"import importlib.metadata as m; print(m.version({peer!r}))"
    try:
        done = subprocess.run(
            [python, "-c", asked], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
