"""Golden tensors: the reference's stages on every case, thinned to what a repository can hold. Needs no torch."""

import zlib
from pathlib import Path

from tests.parity.cases import Array, Case, inputs, weights

import numpy as np
from safetensors import safe_open

FOLDER = Path(__file__).parent.parent / "golden"
ROWS = 12


def path(case: Case) -> Path:
    """Where the case's goldens lie."""
    return FOLDER / f"{case.name}.safetensors"


def subset(case: Case, stages: dict[str, Array]) -> dict[str, Array]:
    """The velocity whole, and of each stage some rows: the first, the last (often padding), and seeded others."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    kept = {}
    for name in sorted(stages):
        array = stages[name]
        if name != "velocity" and len(array) > ROWS:
            others = rng.choice(len(array) - 2, ROWS - 2, replace=False) + 1
            array = array[np.sort([0, *others, len(array) - 1])]
        kept[name] = np.ascontiguousarray(array)
    return kept


def digest(case: Case, shapes: dict[str, tuple[int, ...]]) -> str:
    """A checksum of the case's weights and inputs, which tells changed cases from a changed model."""
    latents, timestep, captions = inputs(case)
    tensors = weights(shapes)
    checksum = 0
    for array in (latents, timestep, *captions, *(tensors[name] for name in sorted(tensors))):
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{checksum:08x}"


def load(case: Case) -> tuple[dict[str, Array], dict[str, str]]:
    """The case's committed goldens by stage name, and their metadata."""
    with safe_open(path(case), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict
