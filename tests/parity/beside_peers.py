"""Time one denoising step of the small config here, in diffusers and in mflux, taking turns on this CPU in fp32.

    python tests/parity/beside_peers.py [--mflux-python PYTHON] [--rounds 20] [--size 256]

Each peer is a process of its own that does one step when asked. mflux pins another MLX, so it needs its own
interpreter (a virtual environment with `pip install --no-deps mflux` and `mlx[cpu]`); without it only diffusers, from
the parity extra, stands beside us. Every program gets the same sizes: random weights, batch 1, 32 caption tokens. It
runs as a file and not as a module, because the package of the tests gives BLAS one thread.
"""

import argparse
import importlib
import importlib.util
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "dim": 384, "n_layers": 6, "n_refiner_layers": 2, "n_heads": 6, "cap_feat_dim": 256, "axes_dims": [16, 24, 24],
}  # fmt: skip
CAPTION_TOKENS = 32


def _ours(rows: int) -> Callable[[], Any]:
    import zimage
    from zimage import inputs

    import mlx.core as mx

    model = zimage.load_transformer("synthetic:small", "float32")
    example = inputs.example(model, "synthetic:small", rows * 8, rows * 8, 1, CAPTION_TOKENS, seed=0)
    return lambda: mx.eval(model(*example))


def _diffusers(rows: int) -> Callable[[], Any]:
    import torch
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    torch.set_grad_enabled(False)
    model = ZImageTransformer2DModel(**SMALL).eval()
    latents, captions = [torch.randn(16, 1, rows, rows)], [torch.randn(CAPTION_TOKENS, SMALL["cap_feat_dim"])]
    return lambda: model(latents, torch.tensor([0.5]), captions, return_dict=False)


def _mflux(rows: int) -> Callable[[], Any]:
    import mlx.core as mx

    # Its package imports its whole command line; bare parent packages leave that out.
    name = "mflux.models.z_image.model.z_image_transformer"
    spec = importlib.util.find_spec("mflux")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder, dotted = Path(spec.submodule_search_locations[0]), "mflux"
    for part in ("", *name.split(".")[1:]):
        if part:
            folder, dotted = folder / part, f"{dotted}.{part}"
        bare = types.ModuleType(dotted)
        bare.__path__ = [str(folder)]
        sys.modules[dotted] = bare
    model = importlib.import_module(f"{name}.transformer").ZImageTransformer(**SMALL)
    mx.eval(model.parameters())
    latents = mx.random.normal((16, 1, rows, rows))
    captions = mx.random.normal((CAPTION_TOKENS, SMALL["cap_feat_dim"]))
    timestep, sigmas = mx.array([0.5]), mx.linspace(1, 0, 10)
    mx.eval(latents, captions, timestep, sigmas)
    return lambda: mx.eval(model(x=latents, timestep=timestep, sigmas=sigmas, cap_feats=captions))


PEERS = {"zimage": _ours, "diffusers": _diffusers, "mflux": _mflux}


def serve(peer: str, size: int) -> None:
    """Do one step for every line on standard input and print its seconds."""
    step = PEERS[peer](size // 8)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def _start(python: str, peer: str, size: int) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [python, str(Path(__file__).resolve()), "--serve", peer, "--size", str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != "ready":
        if not line and process.poll() is not None:
            sys.exit(f"{peer} did not start with {python}")
    return process


def _ask(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print("step", file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mflux-python")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--serve", choices=list(PEERS))
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.size)
        return
    pythons = {"zimage": sys.executable, "diffusers": sys.executable}
    if args.mflux_python:
        pythons["mflux"] = args.mflux_python
    running = {peer: _start(python, peer, args.size) for peer, python in pythons.items()}
    times: dict[str, list[float]] = {peer: [] for peer in running}
    order = list(running)
    rng = random.Random(0)
    for i in range(args.rounds):
        rng.shuffle(order)
        for peer in order:
            if peer == "mflux" and i % 5:
                continue  # it takes seconds
            _ask(running[peer])  # one untimed step after the switch
            times[peer].append(_ask(running[peer]))
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    quartiles = {peer: [sorted(t)[int(q * (len(t) - 1))] for q in (0.25, 0.5, 0.75)] for peer, t in times.items()}
    ours = quartiles["zimage"][1]
    print(f"one step, small config, {args.size} px, fp32, batch 1, {CAPTION_TOKENS} caption tokens")
    for peer, (low, median, high) in quartiles.items():
        beside = "" if peer == "zimage" else f"   zimage takes {ours / median:.3f} of its time"
        print(f"{peer:10} {median:8.4f} s  (quartiles {low:.4f}-{high:.4f}, n {len(times[peer])}){beside}")


if __name__ == "__main__":
    main()
