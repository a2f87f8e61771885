"""The noise floor: how different from itself the baseline looks, beside a second, separately loaded copy of it."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage.errors import MeasurementError
from zimage.measure.arguments import is_number, require_calls, require_integer, require_pair
from zimage.measure.quads import Quads, Sample, sample_rows
from zimage.measure.samples import Timed
from zimage.measure.statistics import analyse, centre, walsh_averages

import numpy as np

ALPHA = 0.05
_SHARE = 0.95  # of the blocks lie within the floor
_FEWEST_BLOCKS = 20
_MOST_QUADS = 400
_AVERAGES_AT_ONCE = 2**22  # Walsh averages of blocks, whose number grows with the square of the quads


@dataclass(frozen=True)
class NoiseFloor:
    """A baseline compared with its copy: time ratio copy / baseline with its 95 % interval, and the raw evidence.

    `differences` are the log differences of the kept quads; `at` draws the floor from them.
    """

    ratio: float
    low: float
    high: float
    copies_differ: bool
    quads: int
    dropped: Mapping[str, int]
    blocks: int
    seed: int
    differences: tuple[float, ...]
    samples: list[Sample]

    def at(self, quads: int) -> float:
        """The floor of a comparison of that many quads, a |log ratio|.

        The 95th percentile over `blocks` blocks, each of `quads` quads drawn with replacement: the order of every quad
        was drawn independently, so that no quad's difference tells anything of the next. The same for the same seed.
        Beyond 400 quads that of so many, which is a little higher.
        """
        require_integer("quads", quads, 1)
        quads = min(quads, _MOST_QUADS)
        rng = np.random.default_rng([abs(self.seed), quads])
        drawn = rng.choice(np.array(self.differences), (self.blocks, quads))
        at_once = max(1, _AVERAGES_AT_ONCE // quads**2)
        found = [centre(walsh_averages(drawn[i : i + at_once])) for i in range(0, self.blocks, at_once)]
        return float(np.quantile(abs(np.concatenate(found)), _SHARE))

    def __str__(self) -> str:
        warning = (
            "; the two copies differ systematically, though they should do the same: what loads or places them has an "
            "effect of this size, and the floor includes it"
        )
        return (
            f"noise floor {100 * self.at(self.quads):.1f} % at {self.quads} quads: copy / baseline {self.ratio:.3f}, "
            f"95 % CI {self.low:.3f}-{self.high:.3f}{warning if self.copies_differ else ''}"
        )

    def sample_rows(self, scope: str, trial: int = 0) -> list[dict[str, Any]]:
        """The raw samples as rows of the `samples` table."""
        return sample_rows(self.samples, scope, "burst", trial)


def noise_floor(
    baseline: Timed,
    copy: Timed,
    *,
    seed: int,
    quads: int = 40,
    blocks: int = 1000,
    canary: Timed | None = None,
    names: tuple[str, str] = ("baseline", "copy"),
) -> NoiseFloor:
    """Compare `baseline` with a second, separately loaded copy of itself, in `quads` quads as `compare` takes them.

    With a canary at most twice as many are taken. Raises MeasurementError for arguments out of range or a time that is
    not positive.
    """
    require_pair(names)
    require_calls(dict(zip(names, (baseline, copy), strict=True)), canary)
    require_integer("seed", seed)
    require_integer("quads", quads, 6)  # fewer could not show that the copies differ
    require_integer("blocks", blocks, _FEWEST_BLOCKS)
    rng, run = random.Random(seed), Quads((names[0], baseline), (names[1], copy), canary)
    while sum(run.kept) < quads and len(run.kept) < 2 * quads:
        run.take(rng)
    differences = run.differences()
    found = analyse(differences, ALPHA)
    return NoiseFloor(
        found.ratio, found.low, found.high, not found.low <= 1 <= found.high, len(differences), dict(run.dropped),
        blocks, seed, tuple(differences.tolist()), run.samples,
    )  # fmt: skip


def floor_at(noise_floor: float | NoiseFloor | None, quads: int) -> float | None:
    """The floor of a comparison of `quads` quads, however it was given."""
    return noise_floor.at(quads) if isinstance(noise_floor, NoiseFloor) else noise_floor


def require_floor(noise_floor: Any) -> None:
    """Raises MeasurementError unless this is a noise floor, a |log ratio|, or None."""
    if noise_floor is None or isinstance(noise_floor, NoiseFloor):
        return
    if not is_number(noise_floor) or not 0 <= noise_floor < math.inf:
        raise MeasurementError(f"noise_floor must be a |log ratio|, 0 or more, found {noise_floor!r}")
