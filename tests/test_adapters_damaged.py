"""Damaged LoRA adapters by the thousand: each is read or refused in one line."""

import json
import random
from pathlib import Path
from typing import Any

from tests.loras import STYLES, Array, named, pairs, write
from zimage import adapters
from zimage.config import TransformerConfig
from zimage.errors import InputError, WeightsError

import numpy as np
import pytest

SMALL = TransformerConfig.tiny(dim=8, n_heads=1, axes_dims=(4, 2, 2), n_layers=1, n_refiner_layers=1, cap_feat_dim=4)
SMALL_PAIRS = pairs(SMALL, rank=2)
WORDS = [
    *STYLES["diffusers"](""), *STYLES["Kohya"]("x"), "lora_unet_", "transformer.", "base_model.model.", "text_encoder.",
    ".dora_scale", ".lokr_w1", ".diff", "__metadata__", "qkv", "out", "to_q", "layers", "noise_refiner", "0", "999", "",
    ".", "_", "\n", "\ud800", "é",
]  # fmt: skip
LEAVES: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**63, 1e308, "F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "U4", "",
    [], [0], [2, 8], [2**40, 2**40], [[]], {}, {"r": 3}, '{"r": 9}', '{"transformer.r": 2}',
]  # fmt: skip
MET = (
    "not valid JSON", "unknown dtype", "the header is damaged", "bytes, expected", "is not part",
    "does not have", "has no up", "has no down", "are both the", "has shape", "has dtype", "NaN or Inf", "says rank 9",
    "text encoder", "cut short",
)  # fmt: skip


def _renamed(rng: random.Random, name: str) -> str:
    """A name with a piece of another tool's names put in, taken out or put elsewhere."""
    cut, end = sorted((rng.randint(0, len(name)), rng.randint(0, len(name))))
    return rng.choice([
        name[:cut] + rng.choice(WORDS) + name[cut:], name[:cut] + name[end:], rng.choice(WORDS) + name,
        name + rng.choice(WORDS), name.replace(".", "_"), name.replace("_", "."), name.replace("lora_A", "lora_B"),
        f"text_encoder.{name}",
    ])  # fmt: skip


def _damaged_header(rng: random.Random, header: dict[str, Any]) -> None:
    """Change one thing in a header: swap two entries, or change one value of an entry or the metadata."""
    name, other = rng.choice(list(header)), rng.choice(list(header))
    kind = rng.randrange(3)
    if kind == 0:
        header[name], header[other] = header[other], header[name]
    elif kind == 1 and isinstance(header[name], dict) and header[name]:
        header[name][rng.choice(list(header[name]))] = rng.choice(LEAVES)
    else:
        header[rng.choice([name, "__metadata__"])] = rng.choice(LEAVES)


def _damaged_tensors(rng: random.Random, tensors: dict[str, Array]) -> None:
    """Change one thing that leaves the file a sound safetensors file: a name, a dtype, a shape or a value."""
    name = rng.choice(list(tensors))
    value = np.array(tensors.pop(name))
    kind = rng.randrange(7)
    if kind == 0:
        tensors[_renamed(rng, name)] = value
    elif kind == 1:
        tensors[rng.choice(list(tensors)) if tensors else name] = value
    elif kind == 2:
        with np.errstate(over="ignore", invalid="ignore"):
            tensors[name] = value.astype(rng.choice(["<f2", "<f8", "<i8", "|i1", "<u2"]))
    elif kind == 3:
        tensors[name] = rng.choice([value.T.copy(), value[:-1].copy(), value[None]] if value.ndim else [value[None]])
    elif kind == 4:
        flat = value.astype("<f4").ravel()
        flat[rng.randrange(1 + flat.size) :][:1] = rng.choice([np.nan, np.inf, 0, 3e38])
        tensors[name] = flat.reshape(value.shape)
    elif kind == 5:
        tensors |= {name: value, rng.choice(list(STYLES.values()))("layers.0.attention.to_q")[rng.randrange(3)]: value}
    # else it stays away


@pytest.mark.parametrize("style", ["diffusers", "Kohya", "dots"])
def test_damaged_files_are_refused_or_read(style: str, tmp_path: Path) -> None:
    """Each of 1200 files with damaged bytes, header or tensors is read, or refused in one line; all reasons occur."""
    rng = random.Random(style)
    lines: list[str] = []
    for case in range(1200):
        tensors = named(SMALL_PAIRS, style, rng.choice([None, 1.0]))
        for _ in range(rng.randint(1, 3) if case % 2 else 0):
            _damaged_tensors(rng, tensors)
        settings = rng.choice([None, None, None, rng.choice(LEAVES), *LEAVES[-2:]])
        metadata = None if settings is None else {"lora_adapter_metadata": settings}
        path = write(tmp_path / "adapter.safetensors", tensors, metadata)
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        if case % 4 == 0:
            header = json.loads(content[8 : 8 + length])
            _damaged_header(rng, header)
            raw = json.dumps(header).encode()
            path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        elif case % 4 == 2:
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content) if rng.random() < 0.5 else 8 + length)] = rng.randrange(256)
            path.write_bytes(content[: rng.randint(0, len(content))] if rng.random() < 0.2 else content)
        try:
            for update in adapters.read(path, SMALL).values():
                update.values()
        except (WeightsError, InputError) as error:
            lines.append(str(error))
    assert [line for line in lines if not line.isprintable()] == []
    assert len(lines) > 700
    assert [reason for reason in MET if not any(reason in line for line in lines)] == []
