"""The digits model that ships: its files, its captions, and how good its digits are."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from tests.digits.drawing import First
from zimage import digits, sources, transforms, weights
from zimage.config import TransformerConfig
from zimage.digits.data import SIZE, to_images, to_latents
from zimage.digits.quality import quality
from zimage.digits.train import CONFIG
from zimage.errors import InputError
from zimage.scheduler import sample
from zimage.transformer import Transformer

import mlx.core as mx
import numpy as np
import pytest

FOLDER = Path(str(files("zimage") / "digits" / "weights"))


@pytest.fixture(scope="module")
def model() -> Transformer:
    """The digits model in fp32."""
    return weights.load_transformer("digits", dtype="float32")


def test_the_files_are_small_and_bfloat16() -> None:
    """What ships is under 7 MB altogether, and its tensors are bf16."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 7_000_000
    info = sources.describe("digits")
    assert (info.kind, info.dtypes, info.quantization) == ("trained", ["BF16"], None)


def test_the_config_is_the_documented_one() -> None:
    """The weights have the config that train.py trains: width 192, three heads of 64, axes 16, 24 and 24, 3 + 1 + 1."""
    config = sources.describe("digits").config
    assert config == CONFIG
    assert (config.dim, config.n_heads, config.head_dim, config.axes_dims) == (192, 3, 64, (16, 24, 24))
    assert (config.n_layers, config.n_refiner_layers, config.pixels_per_latent, config.in_channels) == (3, 1, 1, 1)
    assert config.latent_size(8, 8) == SIZE


def test_the_documents_beside_the_weights_are_true() -> None:
    """The README beside the weights states origin, licences and the number of parameters; config.json is plain JSON."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    count = sum(int(np.prod(tensor.shape)) for tensor in sources.describe("digits").tensors.values())
    assert f"{count / 1e6:.1f} million parameters" in text
    for word in ("CC BY 4.0", "MIT", "10.24432/C50P49", "python -m zimage.digits.train"):
        assert word in text
    assert json.loads((FOLDER / "config.json").read_text())["dim"] == 192


MODES = [f"{bits}bit{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("", "-g32", "-g64")] + [
    "mxfp4",
    "nvfp4",
    "mxfp8",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_quantization_fits(mode: str, model: Transformer) -> None:
    """Every quantization with groups of 64 or fewer packs the digits model, which still gives a finite velocity."""
    packed = transforms.quantize(model, mode)
    velocity = packed(mx.zeros((1, 1, 8, 8)), mx.array([0.5]), digits.captions([3]))
    assert mx.isfinite(velocity).all().item()


@pytest.mark.parametrize("label", [10, -1, 3.0, "3", None, True, [1], 2**70], ids=repr)
def test_other_labels_are_refused(label: object) -> None:
    """A label that is not an integer from 0 to 9 gives one line that repeats it."""
    with pytest.raises(InputError, match="integers 0 to 9, found"):
        digits.captions([3, label])  # type: ignore[list-item]


def test_captions_are_one_token_of_the_configs_width() -> None:
    """Each label gives one token, its own, as a list of arrays [1, F]."""
    found = digits.captions(range(10))
    assert [caption.shape for caption in found] == [(1, CONFIG.cap_feat_dim)] * 10
    assert len({bytes(memoryview(caption)) for caption in found}) == 10
    again = digits.captions(np.array([7, 3]))
    assert [mx.array_equal(a, found[k]).item() for a, k in zip(again, (7, 3), strict=True)] == [True, True]


@pytest.mark.parametrize(("text", "labels"), [("7", [7]), ("7 3 1", [7, 3, 1]), ("012", [0, 1, 2]), (" 9\n", [9])])
def test_labels_in_a_text(text: str, labels: list[int]) -> None:
    """A text of digits, with spaces or without, is their labels in order."""
    assert digits.labels_in(text) == labels


@pytest.mark.parametrize("text", ["", " ", "x", "-1", "1.5", "a seven", "²", "٣"])
def test_other_texts_are_refused(text: str) -> None:
    """A text that holds anything but digits gives one line."""
    with pytest.raises(InputError, match="draws digits such as 7"):
        digits.labels_in(text)


def test_a_digit_does_not_depend_on_its_batch(model: Transformer) -> None:
    """Digit i is what its own seed, seed + i, draws, also beyond a batch; and it is what zimage.sample gives."""
    steps: list[int] = []
    labels = [k % 10 for k in range(52)]
    many = digits.draw(model, labels, steps=1, seed=4, on_step=lambda: steps.append(1))
    assert len(steps) == digits.batches(52) == 2
    assert (many.images.shape, many.labels.tolist()) == ((52, 8, 8), labels)
    assert 0 <= many.images.min() < 0.1 and 0.9 < many.images.max() <= 1
    one = digits.draw(model, [labels[51]], steps=1, seed=4 + 51)
    assert np.allclose(one.images[0], many.images[51], atol=1e-5)
    latents = sample(model, digits.captions([labels[51]]), (8, 8), steps=1, shift=1.0, seed=55)
    assert np.array_equal(to_images(np.array(latents)), one.images)


def test_drawing_nothing_gives_nothing(model: Transformer) -> None:
    """No labels give an empty array of images."""
    assert digits.draw(model, []).images.shape == (0, 8, 8)


@pytest.mark.parametrize("options", [{"steps": 0}, {"shift": 0.0}, {"seed": -1}])
def test_bad_settings_are_refused(options: dict[str, float], model: Transformer) -> None:
    """Impossible steps, shifts and seeds give an InputError."""
    with pytest.raises(InputError):
        digits.draw(model, [1], **options)  # type: ignore[arg-type]


def test_images_and_latents_are_each_others_inverse() -> None:
    """Ink from 0 to 1 becomes latents from -1 to 1 with one channel, and comes back; beyond that it is clipped."""
    images = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 8, 8)
    latents = to_latents(images)
    assert (latents.shape, latents.min(), latents.max()) == ((2, 1, 8, 8), -1, 1)
    assert np.allclose(to_images(latents), images, atol=1e-7)
    assert to_images(latents * 5).max() == 1 and to_images(latents * 5).min() == 0


def test_five_hundred_digits_are_digits(first_digits: First) -> None:
    """Of 500 digits drawn in 20 steps at least 97 % are read as their label, and they vary as real ones do.

    Pixel variance within each class is 0.65 to 1.35 of the real one, and the median distance to the nearest training
    image 0.8 to 1.2 of what held-out images have: they are neither ten prototypes nor copies.
    """
    judged = quality(first_digits(500))
    assert judged.accuracy >= 0.97
    assert 0.65 <= judged.variance_ratio.min() and judged.variance_ratio.max() <= 1.35, judged.variance_ratio
    assert 0.8 <= judged.nearest_ratio <= 1.2


def test_drawing_loads_no_scikit_learn() -> None:
    """Drawing digits needs neither scikit-learn nor its import time."""
    code = "import sys, zimage; zimage.digits.captions([7]); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_the_trained_config_has_no_other_default() -> None:
    """CONFIG is a valid config that survives its own dictionary."""
    assert TransformerConfig.from_dict(CONFIG.to_dict()) == CONFIG
