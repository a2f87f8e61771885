"""Serves one denoising step of a peer's transformer: `python step.py JOB`, the job as JSON (see `peers.command`).

Needs only the peer's own package and its array framework, and nothing of zimage but where another zimage is the peer.
It warms up, prints `ready`, then does one synchronised step for every line on standard input and prints its seconds.
"""

import importlib
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 3


def diffusers(job: dict[str, Any]) -> Callable[[], Any]:
    """A step of diffusers' ZImageTransformer2DModel."""
    import torch
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    torch.set_grad_enabled(False)
    cuda = job["device"] != "cpu" and torch.cuda.is_available()
    device, dtype = "cuda" if cuda else "cpu", getattr(torch, job["dtype"])
    config = {name: value for name, value in job["config"].items() if name != "pixels_per_latent"}
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = ZImageTransformer2DModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    for option in job["options"]:
        if option == "compile":
            for block in [*model.layers, *model.noise_refiner, *model.context_refiner]:
                block.compile()
        elif option.startswith("attention="):
            model.set_attention_backend(option.removeprefix("attention="))
        else:
            sys.exit(f"diffusers knows no option {option}")
    made = {"device": device, "dtype": dtype}
    size = (config["in_channels"], 1, job["rows"], job["columns"])
    latents = [torch.randn(size, **made) for _ in range(job["batch"])]
    captions = [torch.randn(job["caption_tokens"], config["cap_feat_dim"], **made) for _ in range(job["batch"])]
    timestep = torch.full((job["batch"],), 0.5, **made)
    patch = {"patch_size": config["all_patch_size"][0], "f_patch_size": config["all_f_patch_size"][0]}

    def step() -> None:
        model(latents, timestep, captions, return_dict=False, **patch)
        if cuda:
            torch.cuda.synchronize()

    return step


def mflux(job: dict[str, Any]) -> Callable[[], Any]:
    """A step of mflux's ZImageTransformer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    if job["device"] == "cpu":
        mx.set_default_device(mx.Device(mx.cpu))
    _without_command_line("mflux.models.z_image.model.z_image_transformer")
    module = importlib.import_module("mflux.models.z_image.model.z_image_transformer.transformer")
    config, dtype = job["config"], getattr(mx, job["dtype"])
    alike = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "norm_eps", "qk_norm", "cap_feat_dim")
    sizes = {name: config[name] for name in (*alike, "rope_theta", "t_scale", "axes_dims", "axes_lens")}
    model = module.ZImageTransformer(patch_size=config["all_patch_size"][0], **sizes)

    def random(weight: mx.array) -> mx.array:
        return (mx.random.normal(weight.shape) * 0.02 if weight.ndim > 1 else weight).astype(dtype)

    model.update(tree_map(random, model.parameters()))
    options = list(job["options"])
    for bits in (4, 8):
        if f"{bits}bit" in options:
            options.remove(f"{bits}bit")
            nn.quantize(model, bits=bits, group_size=64, class_predicate=_packable)
    mx.eval(model.parameters())
    latents = mx.random.normal((config["in_channels"], 1, job["rows"], job["columns"])).astype(dtype)
    captions = mx.random.normal((job["caption_tokens"], config["cap_feat_dim"])).astype(dtype)
    timestep, sigmas = mx.array([0.5], dtype=dtype), mx.linspace(1, 0, 10).astype(dtype)
    mx.eval(latents, captions, timestep, sigmas)

    def forward(x: mx.array, cap_feats: mx.array) -> mx.array:
        return model(x=x, timestep=timestep, sigmas=sigmas, cap_feats=cap_feats)

    if "compile" in options:
        options.remove("compile")
        forward = mx.compile(forward, inputs=[model.state])
    if options:
        sys.exit(f"mflux knows no option {options[0]}")
    return lambda: mx.eval(forward(latents, captions))


def zimage(job: dict[str, Any]) -> Callable[[], Any]:
    """A step of the zimage that this interpreter has, of whatever version."""
    from zimage import arms

    import mlx.core as mx

    work = arms.step(**job["arguments"])
    return lambda: mx.eval(work())


def _packable(_path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0


def _without_command_line(name: str) -> None:
    """Make `import a.b.c` run only what lies below it: mflux's packages import its whole command line."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.submodule_search_locations is None:
        sys.exit(f"{top} is not installed for {sys.executable}")
    folder, dotted = Path(spec.submodule_search_locations[0]), top
    for part in ("", *parts):
        if part:
            folder, dotted = folder / part, f"{dotted}.{part}"
        bare = types.ModuleType(dotted)
        bare.__path__ = [str(folder)]
        sys.modules[dotted] = bare


def main(text: str) -> None:
    """Serve the job."""
    job = json.loads(text)
    step = {"diffusers": diffusers, "mflux": mflux, "zimage": zimage}[job["peer"]](job)
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
