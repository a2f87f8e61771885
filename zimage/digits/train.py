"""Train the small digits model by flow matching, and save it with its label embeddings.

    python -m zimage.digits.train --out DIR [--steps N] [--seed N]

Minutes on one GPU. At every report the averaged weights draw 500 digits, which are judged against the real ones.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage import digits, transforms, weights
from zimage.config import TransformerConfig
from zimage.digits.data import real, to_latents
from zimage.digits.quality import DigitQuality, quality
from zimage.errors import InputError, ZImageError
from zimage.transformer import Transformer

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

CONFIG = TransformerConfig(
    all_patch_size=(1,), all_f_patch_size=(1,), in_channels=1, dim=192, n_layers=3, n_refiner_layers=1, n_heads=3,
    n_kv_heads=3, norm_eps=1e-5, qk_norm=True, cap_feat_dim=64, rope_theta=256.0, t_scale=1000.0,
    axes_dims=(16, 24, 24), axes_lens=(64, 32, 32), pixels_per_latent=1,
)  # fmt: skip
AVERAGE_DECAY = 0.999


class Trainee(nn.Module):
    """The transformer and the table of label embeddings [10, F] that stand for its captions."""

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        self.transformer = Transformer(config, seed)
        self.transformer.unfreeze()
        self.captions = mx.random.normal((10, config.cap_feat_dim), key=mx.random.key(seed + 1))
        _start_as_identity(self.transformer)

    def velocity(self, latents: mx.array, timestep: mx.array, labels: mx.array) -> mx.array:
        """The model's velocity for labels [B]."""
        return self.transformer(latents, timestep, self.captions[labels][:, None])


def _start_as_identity(model: Transformer) -> None:
    """Norms at one; modulation and output at zero, so that every block starts as the identity."""
    for path, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.weight = mx.ones_like(module.weight)
        elif isinstance(module, nn.Linear):
            if "adaLN_modulation" in path or path.endswith("-1.linear"):
                module.weight = mx.zeros_like(module.weight)
            if "bias" in module:
                module.bias = mx.zeros_like(module.bias)


def loss(trainee: Trainee, data: mx.array, labels: mx.array, noise: mx.array, timestep: mx.array) -> mx.array:
    """Mean squared error of the velocity at `timestep` [B]: data [B, C, H, W] against noise of the same shape."""
    t = timestep[:, None, None, None]
    predicted = trainee.velocity((1 - t) * noise + t * data, timestep, labels)
    return mx.mean(mx.square(predicted - (data - noise)))


def train(
    steps: int = 5000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    report_every: int = 1000,
    judged: int = 500,
    config: TransformerConfig = CONFIG,
    report: Callable[[dict[str, Any], Trainee], None] = lambda _figures, _average: None,
) -> Trainee:
    """Train from scratch and return the exponentially averaged weights. Reproducible up to the device's rounding.

    At every report the averaged weights draw `judged` digits (at least 20, or 0 for none), which are judged.
    """
    train_set, _ = real()
    data, labels = mx.array(to_latents(train_set.images)), mx.array(train_set.labels)
    trainee, average = Trainee(config, seed), Trainee(config, seed)
    if steps < 1 or batch < 1 or report_every < 1:
        raise InputError(f"steps, batch and report_every must be at least 1, found {steps}, {batch}, {report_every}")
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, learning_rate, 200), optim.cosine_decay(learning_rate, max(steps - 200, 1))], [200]
    )
    optimizer = optim.AdamW(learning_rate=schedule, weight_decay=weight_decay)
    value_and_grad = nn.value_and_grad(trainee, loss)

    def update(key: mx.array) -> mx.array:
        pick, noise_key, time_key = mx.random.split(key, 3)
        index = mx.random.randint(0, len(train_set.labels), (batch,), key=pick)
        noise = mx.random.normal((batch, *data.shape[1:]), key=noise_key)
        timestep = mx.random.uniform(shape=(batch,), key=time_key)
        value, gradients = value_and_grad(trainee, data[index], labels[index], noise, timestep)
        optimizer.update(trainee, gradients)
        blend = lambda a, b: AVERAGE_DECAY * a + (1 - AVERAGE_DECAY) * b  # noqa: E731
        average.update(tree_map(blend, average.parameters(), trainee.parameters()))
        return value

    state = [trainee.state, average.state, optimizer.state]
    if mx.default_device() == mx.Device(mx.gpu):
        update = mx.compile(update, inputs=state, outputs=state)
    keys = mx.random.split(mx.random.key(seed + 2), steps)
    mx.eval(state, keys, data, labels)
    start, losses = time.perf_counter(), []
    for i in range(steps):
        losses.append(update(keys[i]))
        mx.eval(state, losses[-1])
        if (i + 1) % report_every == 0 or i + 1 == steps:
            recent = float(np.mean([x.item() for x in losses[-report_every:]]))
            figures = {"step": i + 1, "seconds": round(time.perf_counter() - start, 1), "loss": round(recent, 4)}
            report({**figures, **(summary(judge(average, judged)) if judged else {})}, average)
    return average


def judge(trainee: Trainee, count: int = 500) -> DigitQuality:
    """The quality of `count` digits drawn by `trainee`, labels in turn from 0 to 9."""
    return quality(digits.draw(trainee.transformer, np.arange(count) % 10, table=trainee.captions))


def summary(judged: DigitQuality) -> dict[str, float]:
    """The figures of a quality report, rounded."""
    low, high = float(judged.variance_ratio.min()), float(judged.variance_ratio.max())
    figures = {"accuracy": judged.accuracy, "variance_low": low, "variance_high": high, "nearest": judged.nearest_ratio}
    return {name: round(value, 4) for name, value in figures.items()}


def save(trainee: Trainee, directory: Path) -> None:
    """Save the transformer in bf16 as a checkpoint folder, with `captions.safetensors` beside it."""
    weights.save_transformer(transforms.cast(trainee.transformer, "bfloat16"), directory)
    mx.save_safetensors(str(directory / "captions.safetensors"), {"captions": trainee.captions})


def _show(figures: dict[str, Any], _average: Trainee) -> None:
    print(json.dumps(figures), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        weights.require_free(args.out)  # rather now than after the training
        save(train(steps=args.steps, seed=args.seed, report=_show), args.out)
    except ZImageError as error:
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    main()
