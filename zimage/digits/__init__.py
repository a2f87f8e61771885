"""A small trained Z-Image that ships with the package: 8x8 handwritten digits, drawn on request.

The architecture is the published one at another size: one latent channel of 8 x 8 pixels, and a caption of one token,
the learned embedding of the label. `train` says how it was trained; the weights lie in `weights/`.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.resources import files
from numbers import Integral

from zimage import scheduler
from zimage.digits.data import SIZE, Digits, to_images
from zimage.errors import InputError, WeightsError
from zimage.sources import SourceInfo, plain
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np

LABELS = range(10)
STEPS = 20
_BATCH = 50


@lru_cache(maxsize=1)
def _table() -> mx.array:
    loaded = mx.load(str(files("zimage") / "digits" / "weights" / "captions.safetensors"))
    assert isinstance(loaded, dict)
    return loaded["captions"].astype(mx.float32)


def table_of(source: SourceInfo) -> mx.array | None:
    """The label embeddings [10, F] in fp32 of a digits model, from captions.safetensors beside its config.

    None for a source without that file, which is no digits model. Raises WeightsError for a file that holds no such
    table.
    """
    path = source.captions
    if path is None:
        return None
    shape = (len(LABELS), source.config.cap_feat_dim)
    try:
        loaded = mx.load(str(path))
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read: {plain(error)}") from None
    table = loaded.get("captions") if isinstance(loaded, dict) else None
    if table is None or table.shape != shape or not mx.issubdtype(table.dtype, mx.floating):
        raise WeightsError(f"{path}: expected one tensor captions of shape {list(shape)}, the label embeddings")
    return table.astype(mx.float32)


def captions(labels: Iterable[int]) -> list[mx.array]:
    """Caption features of digits 0 to 9: a list of [1, F], one for each label. Raises InputError for other labels."""
    return [_table()[label][None] for label in _checked(labels)]


def labels_in(text: str) -> list[int]:
    """The digits that a text such as "7", "7 3 1" or "0123456789" asks for. Raises InputError for other texts."""
    letters = "".join(text.split())
    if not letters or any(letter not in "0123456789" for letter in letters):
        raise InputError(f"the digits model draws digits such as 7 or 0123456789, found {text!r}")
    return [int(letter) for letter in letters]


def draw(
    model: Transformer,
    labels: Iterable[int],
    steps: int = STEPS,
    shift: float = 1.0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
    table: mx.array | None = None,
) -> Digits:
    """Digits drawn by Euler steps: images [N, 8, 8] in 0..1 and their labels [N].

    `seed + i` is the seed of digit i, so a digit doesn't depend on how many are drawn. `on_step()` is called after each
    step of each batch, of which there are `batches(N)`. `table` [10, F] replaces the label embeddings that ship. Raises
    InputError for other labels, steps, shifts or seeds.
    """
    wanted = _checked(labels)
    embeddings = _table() if table is None else table
    images = [np.zeros((0, *SIZE), np.float32)]
    for start in range(0, len(wanted), _BATCH):
        features = embeddings[mx.array(wanted[start : start + _BATCH])][:, None]
        latents = scheduler.sample(model, features, SIZE, steps, shift, seed + start, lambda _i, _latents: on_step())
        images.append(to_images(np.array(latents)))
    return Digits(np.concatenate(images), np.array(wanted, np.int64))


def batch_size(count: int) -> int:
    """How many of `count` digits `draw` draws at once at most."""
    return min(count, _BATCH)


def batches(count: int) -> int:
    """How many batches `draw` takes for `count` digits."""
    return -(-count // _BATCH)


def _checked(labels: Iterable[int]) -> list[int]:
    given = list(labels) if isinstance(labels, Iterable) else [labels]
    for label in given:
        if not isinstance(label, Integral) or isinstance(label, bool) or label not in LABELS:
            raise InputError(f"the digits model draws the integers 0 to 9, found {label!r}")
    return [int(label) for label in given]
