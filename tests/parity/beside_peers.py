"""Time one denoising step of the small config here, in diffusers and in mflux, taking turns on this CPU in fp32.

    python tests/parity/beside_peers.py [--mflux-python PYTHON] [--rounds 20] [--size 256]

Medians, as the parity tests print them; `notebooks/peers.ipynb` compares in quads. mflux pins another MLX, so it needs
its own interpreter; without it only diffusers, from the parity extra, stands beside us. It runs as a file and not as a
module, because the package of the tests gives BLAS one thread.
"""

import argparse
import random
import sys
from contextlib import ExitStack

import zimage
from zimage import peers
from zimage.measure import Program, Resident

import numpy as np

CAPTION_TOKENS = 32


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mflux-python")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    sizes = {"height": args.size, "width": args.size, "caption_tokens": CAPTION_TOKENS}
    on = {"dtype": "float32", "device": "cpu"}
    config = zimage.TransformerConfig.small()
    pythons = {"diffusers": sys.executable} | ({"mflux": args.mflux_python} if args.mflux_python else {})
    commands = {peer: peers.command(peer, python, config, **sizes, **on) for peer, python in pythons.items()}
    ours = Program("zimage.arms:step", {"source": "synthetic:small", **sizes, **on})
    times: dict[str, list[float]] = {peer: [] for peer in ("zimage", *commands)}
    order, rng = list(times), random.Random(0)
    with ExitStack() as stack:
        running = {peer: stack.enter_context(Resident(arm)) for peer, arm in {"zimage": ours, **commands}.items()}
        for i in range(args.rounds):
            rng.shuffle(order)
            for peer in order:
                if peer == "mflux" and i % 5:
                    continue  # it takes seconds
                running[peer]()  # one untimed step after the switch
                times[peer].append(running[peer]())
    quartiles = {peer: np.quantile(found, [0.25, 0.5, 0.75]) for peer, found in times.items()}
    print(f"one step, small config, {args.size} px, fp32, batch 1, {CAPTION_TOKENS} caption tokens")
    for peer, (low, median, high) in quartiles.items():
        beside = "" if peer == "zimage" else f"   zimage takes {quartiles['zimage'][1] / median:.3f} of its time"
        print(f"{peer:10} {median:8.4f} s  (quartiles {low:.4f}-{high:.4f}, n {len(times[peer])}){beside}")


if __name__ == "__main__":
    main()
