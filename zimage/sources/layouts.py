"""Other tools' names for the published tensors, and files that zimage does not read, told apart by what they hold.

ComfyUI's single file keeps the original training code's names (Lumina): one attention.qkv for three projections. mflux
saves its own module names. Both were taken from what those tools read and write: ComfyUI's z_image_to_diffusers and
mflux 0.24's saved models.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zimage.errors import WeightsError
from zimage.sources.files import TensorInfo, plain

FLOATS = ("F32", "BF16", "F16")
_COMFY_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_COMFY_OTHERS = ("text_encoders.", "vae.", "first_stage_model.", "cond_stage_model.")  # of a full checkpoint
_PATCH = "2-1"  # the one patch size that both tools know
_RENAMED = [
    (re.compile(r"^x_embedder\."), f"all_x_embedder.{_PATCH}."),
    (re.compile(r"^final_layer\."), f"all_final_layer.{_PATCH}."),
    (re.compile(r"\.attention\.q_norm\."), ".attention.norm_q."),
    (re.compile(r"\.attention\.k_norm\."), ".attention.norm_k."),
    (re.compile(r"\.attention\.out\."), ".attention.to_out.0."),
    (re.compile(r"^t_embedder\.linear1\."), "t_embedder.mlp.0."),
    (re.compile(r"^t_embedder\.linear2\."), "t_embedder.mlp.2."),
    (re.compile(r"^(all_final_layer\.\d+-1)\.adaLN_modulation\.0\."), r"\1.adaLN_modulation.1."),
]
_UNUSED = ("norm_final.weight",)  # stands in the training code's model, which never calls it
_FUSED = ".attention.qkv.weight"
_BF16 = "use the bf16 weights (Tongyi-MAI/Z-Image-Turbo, or ComfyUI's z_image_turbo_bf16.safetensors)"
_AND_PACK = f"{_BF16} and pack them here with --quantization"


@dataclass(frozen=True)
class _Foreign:
    """Tensors by which a format is known that zimage does not read, and what to say of it."""

    names: re.Pattern[str]
    told: str


_FOREIGN = (
    _Foreign(
        re.compile(r"(^|\.)siglip_|^model\.diffusion_model\.siglip_"),
        f"this is the omni variant of Z-Image, which zimage does not support; {_BF16}",
    ),
    _Foreign(
        re.compile(r"(^|\.)(scale_weight|scale_input|weight_scale|weight_scale_2|input_scale|comfy_quant|scaled_fp8)$"),
        f"these are scaled fp8 or fp4 weights in ComfyUI's format, which zimage does not read; {_AND_PACK}",
    ),
    _Foreign(
        re.compile(
            r"\.((absmax|quant_map|nested_absmax|qweight|qzeros|wscales|proj_down|smooth_factor)$|quant_state\.)"
        ),
        f"these weights were packed by another library (bitsandbytes, GPTQ or Nunchaku); {_AND_PACK}",
    ),
    _Foreign(
        re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight$|\.lora\.(up|down)\.weight$"),
        "this is a LoRA adapter, not a checkpoint; give it with --lora beside a source",
    ),
    _Foreign(
        re.compile(r"^control_(layers|noise_refiner|all_x_embedder)\."),
        "this is a ControlNet for Z-Image, which zimage does not support; give the transformer itself",
    ),
)


def refuse_foreign(where: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise WeightsError for tensors of a format that is known and not read, with the reason and the way out."""
    for name, tensor in tensors.items():
        if name.startswith(_COMFY_OTHERS):
            continue
        for foreign in _FOREIGN:
            if foreign.names.search(name):
                raise WeightsError(f"{where}: tensor {plain(name)}: {foreign.told}")
        if tensor.dtype.startswith("F8_"):
            raise WeightsError(
                f"{where}: tensor {plain(name)} has dtype {tensor.dtype}, expected {' or '.join(FLOATS)}: fp8 weights "
                f"have lost what packing here would keep; {_AND_PACK}"
            )


def published(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by published name, whichever of the known layouts they came in; unknown names stay as they are.

    Raises WeightsError where two tensors would have one name.
    """
    found: dict[str, TensorInfo] = {}
    prefix = next((p for p in _COMFY_PREFIXES if any(name.startswith(p) for name in tensors)), "")
    for stored, tensor in tensors.items():
        if prefix == _COMFY_PREFIXES[0] and stored.startswith(_COMFY_OTHERS):
            continue
        name = stored.removeprefix(prefix)
        if name in _UNUSED:
            continue
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        for own, part in _parts(name, tensor).items():
            if own in found:
                both = f"tensors {plain(found[own].stored)} and {plain(stored)} are both {plain(own)}"
                raise WeightsError(f"{tensor.file}: {both}; keep one")
            found[own] = part
    return found


def _parts(name: str, tensor: TensorInfo) -> dict[str, TensorInfo]:
    """A tensor by its name, or by three names where it holds the rows of three projections."""
    if not name.endswith(_FUSED):
        return {name: tensor}
    attention = name.removesuffix(".qkv.weight")
    shape = tensor.shape
    if len(shape) != 2 or shape[0] <= shape[1] or (shape[0] - shape[1]) % 2 or not shape[1]:
        raise WeightsError(
            f"{tensor.file}: tensor {plain(tensor.stored)} has shape {list(shape)}, expected the rows of three "
            "projections; download the file again"
        )
    keys = (shape[0] - shape[1]) // 2  # as many as queries, or fewer where heads share keys
    return {
        f"{attention}.to_q.weight": tensor.rows(0, shape[1]),
        f"{attention}.to_k.weight": tensor.rows(shape[1], keys),
        f"{attention}.to_v.weight": tensor.rows(shape[1] + keys, keys),
    }
