"""Which way each linear layer's product is computed fastest on this device: what `tuning` measured, kept for later.

Choices lie in the user's cache folder and hold for as long as device, driver, MLX, BLAS and the ways' sources stay the
same. MLX is not loaded here.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from zimage import blas, trust

# The simplest first. `tuning` has what each of them computes.
FLOATING = ("whole", "rows split", "padded")
PACKED = ("unpacked", "packed", "unpacked, rows split", "unpacked wide", "unpacked wide, rows split")
_DECIDING = ("device", "driver", "mlx", "mlx_build", "blas", "os")
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Product:
    """A linear layer's product as far as its time depends on it: x [rows, inputs] with weights [outputs, inputs].

    weights: a dtype, or a packing such as "affine 4 bits, group 64"; dtype: of x.
    """

    weights: str
    dtype: str
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Of the product alone, without unpacking."""
        return 2 * self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        kind = self.weights if self.weights == self.dtype else f"{self.weights}, {self.dtype}"
        return f"{kind}: {self.rows} x {self.inputs} to {self.outputs}"


@dataclass(frozen=True)
class Choice:
    """The way a product is computed, and why: its time ratio to the baseline, the way without any tuning.

    ratio, with its 95 % interval, comes from `quads` quads, or from single calls where quads is 0, which then had to be
    far apart; 1 where the baseline stays. tried: all ways that were timed.
    """

    way: str
    baseline: str
    ratio: float
    low: float
    high: float
    quads: int
    tried: tuple[str, ...]

    def __str__(self) -> str:
        others = [way for way in self.tried if way != self.baseline]
        if self.way == self.baseline:
            return f"{self.way}" + (f"; {', '.join(others)} not preferred" if others else "")
        evidence = f"{self.low:.3f} to {self.high:.3f}, {self.quads} quads" if self.quads else "single calls"
        return f"{self.way}, {self.ratio:.3f} of the time of {self.baseline} ({evidence})"


def kept(facts: Mapping[str, str]) -> dict[str, Choice]:
    """The choices made on this device as `facts` describe it, by the product's text. Only known ways are among them."""
    found = _content(facts).get("choices")
    entries = found.items() if isinstance(found, dict) else ()
    return {product: choice for product, entry in entries if (choice := _choice(entry)) is not None}


def keep(facts: Mapping[str, str], made: Mapping[str, Choice]) -> None:
    """Keep choices beside those there are; one that takes the place of another way is remembered as made again."""
    folder = blas.cache_folder()
    if folder is None or not made:
        return
    before = kept(facts)
    again = _again(facts) | {p: c.way for p, c in made.items() if p in before and before[p].way != c.way}
    entries = {product: asdict(choice) for product, choice in (before | dict(made)).items()}
    content = {"identity": _identity(facts), "choices": entries, "again": again}
    with suppress(OSError):  # a full disk costs another measurement, and nothing else
        blas.write_atomically(_path(folder, facts), lambda draft: draft.write_text(json.dumps(content)))


def in_force(facts: Mapping[str, str]) -> str:
    """How choices were made here, as part of a run's key: "as first measured", or "measured again <digest>".

    A model's layers are computed in other ways only after `tuning.tuned`, which measures every product that there is no
    choice for, once. So what a run with it computes follows from what its key has anyway (device, driver, MLX, BLAS,
    sources, and the parameters with the shapes), whether the run itself made the choices or found them. Were the digest
    one of all choices, the first run of a sweep to tune would change the keys of those before it, which would then be
    done again. Only a choice that was measured again and came out as another way makes a run another run: those, and
    only those, are in the digest. The choices themselves are copied into each run.
    """
    again = _again(facts)
    digest = hashlib.sha256(json.dumps(again, sort_keys=True).encode()).hexdigest()
    return f"measured again {digest[:12]}" if again else "as first measured"


def copied(facts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The choices kept, as a run holds them."""
    return {product: asdict(choice) for product, choice in kept(facts).items()}


def _content(facts: Mapping[str, str]) -> dict[str, Any]:
    """What the file of this device holds; nothing where it cannot be read, or is of another device or version."""
    folder = blas.cache_folder()
    try:
        if folder is None:
            return {}
        with _path(folder, facts).open(encoding="utf-8") as file:  # whatever lies there is not read to its end
            content = json.loads(file.read(_LARGEST_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("identity") == _identity(facts) else {}


def _again(facts: Mapping[str, str]) -> dict[str, str]:
    found = _content(facts).get("again")
    entries = found.items() if isinstance(found, dict) else ()
    return {product: way for product, way in entries if isinstance(way, str)}


def _choice(entry: Any) -> Choice | None:
    """An entry of the file as a Choice; None where it is none."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Choice)}:
        return None
    ways, numbers = (entry["way"], entry["baseline"]), (entry["ratio"], entry["low"], entry["high"])
    known = any(all(way in names for way in ways) for names in (FLOATING, PACKED))
    positive = all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
    tried = entry["tried"]
    listed = isinstance(tried, (list, tuple)) and all(isinstance(way, str) for way in tried)
    if not (known and positive and listed and isinstance(entry["quads"], int)):
        return None
    return Choice(**{**entry, "tried": tuple(tried)})


def _path(folder: Path, facts: Mapping[str, str]) -> Path:
    return folder / f"choices-{facts['device']}.json"


def _identity(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: facts.get(name, "") for name in _DECIDING} | {"sources": _sources_digest()}


@functools.cache
def _sources_digest() -> str:
    """A digest of what the ways are made of: `tuning` and the kernels."""
    source = (Path(__file__).parent / "tuning.py").read_text(encoding="utf-8")
    return hashlib.sha256((trust.sources_digest() + source).encode()).hexdigest()
