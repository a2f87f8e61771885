"""Small decisions in which implementations of Z-Image differ: what each is, and who makes it. Needs no MLX.

`details` and `execution` have a transform of each name, and `measure.settings` what is set for a whole process.
"""

from collections.abc import Sequence
from typing import NamedTuple

from zimage.errors import InputError
from zimage.names import require_each_once


class Practice(NamedTuple):
    """One decision: what it is, and who makes it."""

    what: str
    who: str


_GO = "Ollama"  # its Go implementation, x/imagegen/models/zimage
_MLX = "any MLX program's choice"
_UNKNOWN = "nobody we know"

OUTPUT: dict[str, Practice] = {  # what changes the output, be it by a rounding
    "with_all_ones_mask": Practice("a boolean mask of ones in every attention", "diffusers before pull request 12955"),
    "with_additive_mask": Practice("an additive mask of zeros in every attention", "mflux"),
    "bf16_positions": Practice("RoPE positions rounded to bfloat16", _GO),
    "zero_pad_tokens": Practice("zeros in place of the learned pad tokens", f"{_GO}, which has none"),
    "unpadded_image": Practice("image tokens not padded to a multiple of 32", _GO),
    "captions_512": Practice("captions of 512 rows, zeros after their own, embedded as if they were tokens", _GO),
    "fp32_residual": Practice("the residual stream and its norms in float32", "mflux beside float16 blocks"),
    "fp32_embedding": Practice("a float32 timestep embedding, which promotes every activation after it", _GO),
    "bf16_timestep": Practice("the timestep rounded to bfloat16: 38.1 becomes 38", _GO),
    "bf16_latents": Practice("latents in bfloat16 between the steps", _GO),
    "norms_in_dtype": Practice("RMS norms of plain operations, each rounded to the activations' dtype", _UNKNOWN),
    "norms_composed": Practice("RMS norms of plain operations in float32", "code without a fused norm"),
}
EXECUTION: dict[str, Practice] = {  # what leaves the output as it is, but for the rounding of a compiled operation
    "compile_operations": Practice("norms, RoPE and SwiGLU compiled, each by itself", "mlx-lm, of its SwiGLU"),
    "compile_blocks": Practice("every block compiled", "zimage.fast on a GPU"),
    "compile_step": Practice("the whole step compiled", _MLX),
    "submit_every_block": Practice("every block handed to the device as soon as it is built", _MLX),
    "submit_every_2nd": Practice("blocks handed over in pairs", _MLX),
    "submit_every_4th": Practice("blocks handed over in fours", _MLX),
    "submit_at_the_end": Practice("all blocks handed over after the last one", _MLX),
    "submit_early": Practice("blocks handed over in parts of a certain size", "zimage.fast"),
    "eval_every_block": Practice("a wait for the device after every block", _MLX),
    "eval_every_stage": Practice("a wait for the device after every stage", _MLX),
}
SETTINGS: dict[str, Practice] = {  # of a process; they leave the output as it is
    "no_buffer_cache": Practice("freed buffers given back at once: a cache limit of 0", _MLX),
    "wired_limit": Practice("the recommended working set kept wired, on Metal", "mlx-lm"),
}
ALL = OUTPUT | EXECUTION | SETTINGS


def chosen(details: Sequence[str]) -> list[str]:
    """The names of decisions that these stand for, "all" for ALL. Raises InputError unless each is known, and once."""
    listed = details if isinstance(details, (list, tuple)) else []
    names = [name for asked in listed for name in (ALL if asked == "all" else [asked])]
    require_each_once("details", names, ["all", *ALL])
    return names


def require_variables(texts: Sequence[str]) -> None:
    """Raise InputError unless all of these are environment variables of MLX."""
    for text in texts:
        variable(text)


def variable(text: str) -> dict[str, str]:
    """An environment variable of MLX from "MLX_NAME=VALUE". Raises InputError for what is none."""
    name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not name.startswith("MLX_") or not name.isidentifier() or not equals or not value:
        raise InputError(f'a variable of MLX is "MLX_NAME=VALUE", found {text!r:.80}')
    return {name: value}
