"""The judge of digits: it passes real ones, and sees prototypes, copies and noise for what they are."""

from zimage.analysis import reading
from zimage.digits.data import Digits, real
from zimage.digits.picture import MOST_COLUMNS, MOST_ROWS, grid, side_by_side
from zimage.digits.quality import frechet_distance, judged, logits, quality, recognised
from zimage.errors import InputError

import numpy as np
import pandas as pd
import pytest


def test_the_split_is_fixed_and_in_proportion() -> None:
    """1437 images are for training and 360 held out, the same each time, with every label in both."""
    train, held_out = real()
    assert (train.images.shape, held_out.images.shape) == ((1437, 8, 8), (360, 8, 8))
    assert np.array_equal(real()[0].images, train.images)
    assert np.bincount(held_out.labels).min() >= 34
    assert (train.images.min(), train.images.max(), train.images.dtype) == (0, 1, np.float32)
    shared = {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}
    assert not shared


def test_held_out_images_pass() -> None:
    """Real images that were held out are recognised, vary like real ones and are as near as held-out ones: ratio 1."""
    judged = quality(real()[1])
    assert judged.accuracy >= 0.97
    assert 0.8 < judged.variance_ratio.min() and judged.variance_ratio.max() < 1.2
    assert judged.nearest_ratio == 1


def test_ten_prototypes_fail_by_their_variance() -> None:
    """Ten memorised digits, drawn again and again, are recognised but have no variance."""
    train, _ = real()
    read = recognised(train)
    prototypes = np.stack([train.images[(train.labels == k) & read][0] for k in range(10)])
    judged = quality(Digits(np.tile(prototypes, (50, 1, 1)), np.tile(np.arange(10), 50)))
    assert judged.accuracy >= 0.97
    assert judged.variance_ratio.max() < 1e-6


def test_blurred_means_fail_by_their_variance() -> None:
    """Digits half-way to their class's mean are recognised, but have a quarter of the variance."""
    train, _ = real()
    means = np.stack([train.images[train.labels == k].mean(axis=0) for k in range(10)])
    judged = quality(Digits((train.images + means[train.labels]) / 2, train.labels))
    assert judged.accuracy >= 0.97
    assert judged.variance_ratio.max() < 0.35


def test_copies_fail_by_their_nearness() -> None:
    """Training images themselves, and slightly changed ones, are recognised and varied, but too near."""
    train, _ = real()
    noise = np.random.default_rng(0).normal(0, 0.02, train.images.shape).astype(np.float32)
    assert quality(train).nearest_ratio == 0
    judged = quality(Digits(np.clip(train.images + noise, 0, 1), train.labels))
    assert judged.accuracy >= 0.97
    assert judged.nearest_ratio < 0.5


def test_noise_fails_everywhere() -> None:
    """Noise is read right one time in ten, varies too much and is far from any image."""
    images = np.random.default_rng(0).random((500, 8, 8)).astype(np.float32)
    judged = quality(Digits(images, np.arange(500) % 10))
    assert judged.accuracy < 0.3
    assert judged.variance_ratio.min() > 1.35
    assert judged.nearest_ratio > 1.2


def test_wrong_labels_are_not_recognised() -> None:
    """Real images under the next label's name are read as what they are, so not as that label."""
    held_out = real()[1]
    assert recognised(Digits(held_out.images, (held_out.labels + 1) % 10)).mean() < 0.02


def test_real_digits_are_nearer_to_real_ones_than_noise() -> None:
    """Held-out digits are distributed as real ones are, within the interval; noise and a single class are far off."""
    train, held_out = real()
    near = frechet_distance(held_out)
    assert near.low == 0 and near.count == 360 and near.high < 2
    noise = np.random.default_rng(0).random((100, 8, 8)).astype(np.float32)
    sevens = train.images[train.labels == 7][:100]
    for images in (noise, sevens):
        assert frechet_distance(Digits(images, np.arange(100) % 10)).low > 10
    with pytest.raises(InputError, match="two samples at least of every label"):
        frechet_distance(Digits(sevens[:10], np.arange(10)))


def test_the_logits_are_what_the_classifier_reads() -> None:
    """The largest of the ten logits is the label that the classifier reads."""
    held_out = real()[1]
    found = logits(held_out.images)
    assert found.shape == (360, 10)
    assert np.array_equal(found.argmax(axis=1) == held_out.labels, recognised(held_out))


def test_a_grid_shows_every_pixel_as_a_square() -> None:
    """Images lie row by row, upright, each pixel a square of one grey, ink dark on white, with a gap around."""
    images = np.zeros((3, 8, 8), np.float32)
    images[0, 0, 7] = 1
    images[2, 7, 0] = 0.5
    page = grid(images, columns=2, scale=4)
    assert page.shape == (2 * (32 + 4) + 4, 2 * (32 + 4) + 4)
    assert page.dtype == np.uint8
    dark = np.argwhere(page < 100)
    assert (dark.min(axis=0).tolist(), dark.max(axis=0).tolist()) == ([4, 4 + 28], [7, 4 + 31])
    assert len(dark) == 16
    half = np.argwhere((page >= 100) & (page < 255))
    assert (half.min(axis=0).tolist(), half.max(axis=0).tolist()) == ([40 + 28, 4], [40 + 31, 7])
    assert len(half) == 16


def test_a_grid_is_no_wider_than_its_images() -> None:
    """One image is one cell, however many columns there may be; ink beyond 0 and 1 is clipped."""
    page = grid(np.full((1, 8, 8), 7, np.float32), columns=10, scale=32)
    assert page.shape == (8 * 32 + 2 * 32, 8 * 32 + 2 * 32)
    assert page.min() == grid(np.ones((1, 8, 8), np.float32), scale=32).min()


def test_arms_side_by_side_are_rows_of_one_picture() -> None:
    """Every arm is a row: its name, then its digits as the grid draws them; what is too much is left out."""
    images = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    page = side_by_side({"float32": images, "8bit": images[::-1]}, scale=4)
    digits = grid(images, scale=4)
    height, width = digits.shape
    assert page.shape[0] == 2 * height and page.shape[1] > width
    assert np.array_equal(page[:height, -width:], digits)
    assert np.array_equal(page[height:, -width:], grid(images[::-1], scale=4))
    names = page[:height, :-width], page[height:, :-width]
    assert all(name.min() < 100 for name in names) and not np.array_equal(*names)
    many = side_by_side({f"arm {i}": np.zeros((MOST_COLUMNS + 5, 8, 8), np.float32) for i in range(MOST_ROWS + 5)}, 1)
    assert many.shape[0] == MOST_ROWS * 10 and many.shape[1] < MOST_COLUMNS * 9 + 40
    for bad in ({}, {"a": images, "b": images[:2]}):
        with pytest.raises(InputError, match="side by side"):
            side_by_side(bad)


@pytest.mark.parametrize(
    ("shape", "columns", "scale"), [((0, 8, 8), 10, 8), ((8, 8), 10, 8), ((1, 8, 8), 0, 8), ((1, 8, 8), 10, 0)]
)
def test_nothing_to_draw_is_refused(shape: tuple[int, ...], columns: int, scale: int) -> None:
    """No images, no columns or no scale give an InputError."""
    with pytest.raises(InputError, match="a grid needs images"):
        grid(np.zeros(shape, np.float32), columns, scale)


def test_arms_are_judged_by_what_they_drew() -> None:
    """Each arm has its accuracy and distance with intervals, all but the baseline how much farther off it is; with

    one digit of a label there is no distance.
    """
    _, held_out = real()
    labels = np.arange(40) % 10
    order = np.concatenate([np.flatnonzero(held_out.labels == label)[:4] for label in range(10)])
    order = order.reshape(10, 4).T.ravel()
    some = {"plain": Digits(held_out.images[order], labels), "blank": Digits(0 * held_out.images[order], labels)}
    table = pd.DataFrame(judged(some, "plain"))
    rows = table.set_index(["arm", "metric"])
    assert set(rows.index) == {
        *((arm, metric) for arm in some for metric in ("digit_accuracy", "frechet_distance")),
        ("blank", "frechet_difference"),
    }
    assert rows.loc[("plain", "digit_accuracy"), "value"] > 0.9 > rows.loc[("blank", "digit_accuracy"), "value"]
    near = 1e-6 * rows["value"]  # of forty blanks every resample is the same
    assert (rows["low"] <= rows["value"] + near).all() and (rows["value"] <= rows["high"] + near).all()
    assert set(rows["count"]) == {40}
    assert rows.loc[("blank", "frechet_difference"), ["baseline"]].item() == "plain"
    assert reading.pictures_by_arm(table) == {"blank": "other than plain's"}
    same = pd.DataFrame(judged({"plain": some["plain"], "again": some["plain"]}, "plain"))
    assert reading.pictures_by_arm(same) == {"again": "no difference to plain's found in 40"}
    few = {arm: Digits(one.images[:10], labels[:10]) for arm, one in some.items()}
    assert {row["metric"] for row in judged(few, "plain")} == {"digit_accuracy"}
