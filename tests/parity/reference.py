"""diffusers' ZImageTransformer2DModel on a parity case, its stages captured by hooks. Needs the parity extra."""

from typing import Any

from tests.parity.cases import Array, Case, inputs, repeat_kv, to_bfloat16, weights
from zimage.lengths import padded

import diffusers
import numpy as np
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

# It says at every cast to bf16 that it keeps no module in fp32.
diffusers.utils.logging.set_verbosity_error()


def model(case: Case, rounded: bool = False) -> ZImageTransformer2DModel:
    """The reference in fp32 with the case's seeded weights, which may be `rounded` to bf16 values.

    The reference has no grouped queries: it gets the rows of K and V repeated instead.
    """
    config = case.transformer
    values = config.to_dict()
    del values["pixels_per_latent"]
    values["n_kv_heads"] = config.n_heads
    reference = ZImageTransformer2DModel(**values).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    for name in shapes:
        if name.endswith((".to_k.weight", ".to_v.weight")):
            shapes[name] = (config.n_kv_heads * config.head_dim, config.dim)
    tensors = repeat_kv(weights(shapes), config)
    if rounded:
        tensors = {name: to_bfloat16(value) for name, value in tensors.items()}
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return reference


def stages(case: Case, dtype: torch.dtype = torch.float32, rounded: bool = False) -> dict[str, Array]:
    """Each stage's output by our stage names, and `velocity`: the valid rows of every item, concatenated.

    `rounded` rounds weights and inputs to bf16 values first, whatever `dtype` the model then computes in. The timestep
    is never rounded.
    """
    reference = model(case, rounded).to(dtype)
    latents, timestep, captions = inputs(case)
    if rounded:
        latents, captions = to_bfloat16(latents), [to_bfloat16(c) for c in captions]
    lengths = [padded(n) for n in case.captions]
    image = padded(case.size[0] * case.size[1] // case.patch**2)
    found: dict[str, Array] = {}

    def keep(name: str, rows: list[int] | None) -> None:
        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            array = (args[0] if name == "joined" else output).float().numpy()
            found[name] = array if rows is None else np.concatenate([a[:n] for a, n in zip(array, rows, strict=True)])

        modules[name].register_forward_hook(hook)

    modules = {"t_embedder": reference.t_embedder}
    keep("t_embedder", None)
    for part, rows in (
        ("noise_refiner", [image] * len(lengths)),
        ("context_refiner", lengths),
        ("layers", [image + n for n in lengths]),
    ):
        for i, block in enumerate(getattr(reference, part)):
            modules[f"{part}.{i}"] = block
            keep(f"{part}.{i}", rows)
    _keep_embedders(reference, found, image, lengths)
    with torch.no_grad():
        output = reference(
            [torch.from_numpy(x)[:, None].to(dtype) for x in latents],
            torch.from_numpy(timestep),
            [torch.from_numpy(c).to(dtype) for c in captions],
            patch_size=case.patch,
            return_dict=False,
        )[0]
    found["velocity"] = torch.stack(list(output)).float().numpy()[:, :, 0]
    return found


def _keep_embedders(
    reference: ZImageTransformer2DModel, found: dict[str, Array], image: int, lengths: list[int]
) -> None:
    """The embedders' outputs after padding, which the reference has only inside `_prepare_sequence`."""
    prepare = reference._prepare_sequence
    names = iter([("x_embedder", [image] * len(lengths)), ("cap_embedder", lengths)])

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        name, rows = next(names)
        found[name] = np.concatenate([a[:n].float().numpy() for a, n in zip(result[0], rows, strict=True)])
        return result

    reference._prepare_sequence = watched
