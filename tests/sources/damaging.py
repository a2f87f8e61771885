"""Damages checkpoints by the thousand and describes them, in a process that may use little memory and time.

    python -m tests.sources.damaging FOLDER CASES/PART/PARTS   a JSON object of what became of every PARTS-th case
    python -m tests.sources.damaging FOLDER SOURCE             the same for one source as it is

Every case is seeded by the kind of its file and its number, so any of them can be had again.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ollama_store import GGUF, JSON, TENSOR, Layer, Stored, blob, write_blobs, write_manifest
from zimage import sources
from zimage.config import TransformerConfig
from zimage.errors import ZImageError
from zimage.sources.published import shapes

ROOM = 512 << 20
CASE_S = 5.0
LONGEST_LINE = 3000
SMALL = TransformerConfig.tiny(dim=32, n_heads=1, axes_dims=(8, 12, 12), n_layers=1, n_refiner_layers=1, cap_feat_dim=4)
WIDE = TransformerConfig.tiny(dim=128, n_heads=1, axes_dims=(32, 48, 48), n_layers=1, n_refiner_layers=1)
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED = "layers.0.attention.to_q"
CONFIG_VALUES = {"_class_name": "ZImageTransformer2DModel", **SMALL.to_dict()}
NAMES = [
    "", ".", "..", "../x", "../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "a\0b",
    "\n", "\x1b[2J", "\ud800",
    "\u202e", "é", "x" * 300, "x" * 5000, "\n" * 4000, "..safetensors", "../a.safetensors", "/a.safetensors",
    "\0.safetensors",
    "\ud800.safetensors", f"{'x' * 300}.safetensors", FILE, "__metadata__", "quantization", "weight_map",
    "layers", "mode", "bits",
    f"{PACKED}.weight", f"{PACKED}.scales", "x_pad_token", "layers.0.attention.qkv.weight",
    "layers.0.attention.qkv",
    "model.diffusion_model.x", "norm_final.weight", "all_final_layer.0-1.linear.bias",
    "all_final_layer.9999-1.linear.bias",
    "layers.1.attention_norm1.weight", "layers.2147483646.attention_norm1.weight", "x.lora_A.weight", "x.scale",
    "x_scale",
    "weight_scale", "transformer/", "data", "quant_type", "group_size", "sha256:../../x", f"sha256:{'0' * 64}",
    "int4", "int8",
    TENSOR, JSON, GGUF, "affine", "mxfp4", "U8", "F8_E4M3", "F64", "U32", "BOOL",
]  # fmt: skip
LEAVES: list[Any] = [
    None, True, False, 0, -0.0, 1, 2, 3, -1, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"),
    float("nan"), 2**31 - 1, 2**31,
    2**48 - 1, 2**48, 2**63 - 1, 2**63, 2**64, 10**400, -(10**4000), [], {}, [[]], [0], [-1], [1, 2, 3],
    [2**40] * 16, [0] * 17, [2**47, 0],
    list(range(3000)), {"a": {}}, [{}], {"dtype": "F32"}, {"bits": 4}, {"bits": [4]}, {"quant_method": "x\n"},
    {"quant_method": []},
    {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]},
    {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]},
]  # fmt: skip
TEXTS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"1" * 5000, b"1" * 4000, b"0.5", b"null", b"true", b"[]",
    b"{}", b'""', b'"', b"\\",
    b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0",
    b",", b":", b"{", b"[", b"]", b"}",
    b"[" * 900, b"[" * 100_000, b'{"a":' * 900, b'{"a":' * 20_000, b"[" * 500 + b"]" * 500,
    b'"' + b"x" * 20_000 + b'"', b"\xe2\x80\xae",
    b"//", b"/* */", b"'", b"\n", b"0x10", b"1_0", b"\xd9\xa1",
]  # fmt: skip


@dataclass
class Tally:
    """What became of the cases."""

    read: int = 0
    refused: int = 0
    bad: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    slowest_s: float = 0.0

    def describe(self, case: str, source: str) -> str:
        """Describe and check `source`; the line of a refusal."""
        line, start = "", time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, CASE_S)
        try:
            sources.describe(source).check()
            self.read += 1
        except ZImageError as error:
            line = str(error)
            self.refused += 1
            if not line.isprintable() or not 0 < len(line) < LONGEST_LINE:
                self.bad.append(f"{case}: a line of {len(line)}: {line[:300]!r}")
        except BaseException as error:  # whatever it is, it is what is looked for
            self.bad.append(f"{case}: {type(error).__name__}: {str(error)[:300]!r}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
        return line


class _TooLongError(BaseException):
    """A case took longer than it may."""


def _ring(*_: object) -> None:
    raise _TooLongError


def limit() -> None:
    """From here on: little more memory than there is in use, and an end to every case."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, _ring)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """JSON with one to three things wrong, in what it says or in its bytes."""
    if rng.random() < 0.55:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = _changed(rng, value)
        content = json.dumps(value).encode()
        if rng.random() < 0.8:
            return content
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        end = min(end, at + rng.choice((1, 4, 40, 4000)))
        kind = rng.randrange(7)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(len(raw) + 1)
                raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = rng.choice(TEXTS)
        elif kind == 3:
            del raw[at:end]
        elif kind == 4:
            raw[end:end] = raw[at:end]
        elif kind == 5:
            _replace_value(rng, raw)
        else:
            _repeat_key(rng, raw)
    return bytes(raw)


def _changed(rng: random.Random, value: Any) -> Any:
    """Change one thing at a random depth."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
        return deepcopy(rng.choice(LEAVES)) if rng.random() < 0.6 else rng.choice(NAMES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    other = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    kind = rng.randrange(10)
    if kind == 0:
        value[key], value[other] = value[other], value[key]
    elif kind == 1 and isinstance(value, dict):
        value[rng.choice(NAMES)] = value.pop(key)
    elif kind == 2 and isinstance(value, dict):
        value[rng.choice(NAMES)] = value[key] if rng.random() < 0.5 else deepcopy(rng.choice(LEAVES))
    elif kind == 3:
        del value[key]
    elif kind == 4 and isinstance(value, list):
        value.append(value[key])
    elif kind == 5:
        value[key] = [value[key]]
    elif kind == 6 and isinstance(value[key], int):
        value[key] += rng.choice((-1, 1, 2**20, 2**31, -(2**33)))
    elif kind == 7 and isinstance(value[key], str):
        text, at = value[key], rng.randrange(len(value[key]) + 1)
        value[key] = text[:at] + rng.choice(NAMES) + text[at:]
    else:
        value[key] = _changed(rng, value[key])
    return value


def _replace_value(rng: random.Random, raw: bytearray) -> None:
    """Put something else in the place of what follows a colon."""
    at = raw.find(b":", rng.randrange(len(raw) + 1))
    end = min((raw.find(mark, at) for mark in b",}" if raw.find(mark, at) > 0), default=len(raw))
    if at > 0:
        raw[at + 1 : end] = rng.choice(TEXTS)


def _repeat_key(rng: random.Random, raw: bytearray) -> None:
    """Let an entry of an object stand there twice."""
    at = raw.find(b'"', rng.randrange(len(raw) + 1))
    end = raw.find(b",", at)
    if 0 < at < end:
        raw[at:at] = raw[at : end + 1]


def header_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """A safetensors header and how many bytes of data it speaks of."""
    sizes = {"F32": 4, "BF16": 2, "U32": 4}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = sizes[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return json.dumps(header).encode(), at


def write(path: Path, header: bytes, data: int, length: int | None = None) -> None:
    """A safetensors file whose data are a hole."""
    with path.open("wb") as f:
        f.write((len(header) if length is None else length).to_bytes(8, "little") + header)
        f.truncate(max(8 + len(header) + data, 0))


def published(config: TransformerConfig, packed: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor, one layer packed in 4 bits and groups of 32 if asked."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {name: ("BF16", shape) for name, shape in shapes(config)}
    if packed:
        rows, width = found[f"{PACKED}.weight"][1]
        found[f"{PACKED}.weight"] = ("U32", (rows, width // 8))
        found |= {f"{PACKED}.{leaf}": ("BF16", (rows, width // 32)) for leaf in ("scales", "biases")}
    return found


def comfy() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names as ComfyUI's single file has them, the projections fused."""
    found = {}
    for name, (dtype, shape) in published(SMALL).items():
        new = name.replace(".to_out.0.", ".out.").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
        new = new.replace("all_final_layer.2-1", "final_layer").replace("all_x_embedder.2-1", "x_embedder")
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            new = name.replace("to_q", "qkv")
        rows = 3 * shape[0] if ".to_q." in name else shape[0]
        found[f"model.diffusion_model.{new}"] = (dtype, (rows, *shape[1:]))
    return found


Write = Callable[[random.Random], None]


def kinds(folder: Path) -> dict[str, tuple[str, Write]]:
    """For each kind of file its source, and what damages that file; the rest of the source stays sound."""
    found: dict[str, tuple[str, Write]] = {}
    for kind, tensors, config in (
        ("header", published(SMALL, packed=True), CONFIG_VALUES),
        ("header without config", published(WIDE), None),
        ("ComfyUI's header", comfy(), CONFIG_VALUES),
    ):
        own = folder / kind
        own.mkdir()
        if config is not None:
            (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
        found[kind] = (str(own), _headers(own / FILE, *header_of(tensors)))

    own = folder / "config"
    own.mkdir()
    write(own / FILE, *header_of(published(SMALL, packed=True)))
    entry = {"group_size": 32, "bits": 4, "mode": "affine", PACKED: {"group_size": 32, "bits": 4}}
    found["config"] = (str(own), _json(own / "config.json", {**CONFIG_VALUES, "quantization": entry}))

    own = folder / "index"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(CONFIG_VALUES), encoding="utf-8")
    where = {name: f"{i % 2}.safetensors" for i, name in enumerate(published(SMALL))}
    for file in ("0.safetensors", "1.safetensors"):
        shard = {name: entry for name, entry in published(SMALL).items() if where[name] == file}
        write(own / file, *header_of(shard))
    found["index"] = (str(own), _json(own / INDEX, {"metadata": {"total_size": 1}, "weight_map": where}))
    return found | _ollama(folder)


def _ollama(folder: Path) -> dict[str, tuple[str, Write]]:
    config = Layer(JSON, "transformer/config.json", json.dumps(CONFIG_VALUES).encode())
    plain = {n: Stored("BF16", shape, bytes(2 * _size(shape))) for n, (_, shape) in published(SMALL).items()}
    one = f"{PACKED}.weight"
    weight = {
        one: Stored("U32", (32, 4), bytes(512)),
        f"{one}.scale": Stored("BF16", (32, 1), bytes(64)),
        f"{one}.bias": Stored("BF16", (32, 1), bytes(64)),
    }
    tensors = [
        Layer(TENSOR, f"transformer/{one}", blob(weight, {"quant_type": "int4", "group_size": "32"})),
        Layer(TENSOR, "transformer/x_pad_token", blob({"data": plain["x_pad_token"]})),
        Layer(TENSOR, "transformer/rest", blob({n: t for n, t in plain.items() if n not in (one, "x_pad_token")})),
    ]
    root = folder / "store"
    write_blobs(root, [config, *tensors])
    entries = [layer.entry for layer in (config, *tensors, Layer(TENSOR, "vae/x", b""))]
    path = write_manifest(root, {}, "registry.ollama.ai/library/a/latest")

    own = Layer(TENSOR, f"transformer/{one}", blob({"data": weight[one]}))  # its blob is what is damaged
    loose = [{**layer.entry, "size": None} for layer in (config, *tensors[1:], own)]
    write_manifest(root, {"layers": loose}, "registry.ollama.ai/library/b/latest")
    length = int.from_bytes(tensors[0].content[:8], "little")
    target = root / "blobs" / f"sha256-{own.digest}"
    return {
        "manifest": ("ollama:a", _json(path, {"schemaVersion": 2, "layers": entries})),
        "blob": ("ollama:b", _headers(target, tensors[0].content[8 : 8 + length], 640)),
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _json(path: Path, value: Any) -> Write:
    content = json.dumps(value).encode()
    path.write_bytes(content)

    def again(rng: random.Random) -> None:
        path.write_bytes(damaged(rng, content))

    return again


def _headers(path: Path, header: bytes, data: int) -> Write:
    write(path, header, data)

    def again(rng: random.Random) -> None:
        if rng.random() < 0.9:
            write(path, damaged(rng, header), data)
        else:
            length = rng.choice((0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)))
            write(path, header, data + rng.choice((-data, -1, 0, 1, -len(header) - data - 4)), length)

    return again


def main(folder: Path, what: str) -> None:
    """Run the cases, or look at one source, and print what became of them."""
    os.environ["OLLAMA_MODELS"] = str(folder / "store")
    tally = Tally()
    cases, *part = what.split("/")
    if not cases.isdecimal():
        limit()
        line = tally.describe(what, what)
    else:
        line, found = "", kinds(folder)
        limit()
        for kind, (source, _) in found.items():
            tally.describe(kind, source)
        if tally.refused or tally.bad:
            raise SystemExit(f"a sound source is refused: {tally}")
        each, (first, parts) = int(cases) // len(found), map(int, part)
        for kind, (source, again) in found.items():
            before = tally.refused
            for case in range(first, each, parts):
                rng = random.Random(f"{kind} {case}")
                again(rng)
                tally.describe(f"{kind} {case}", source)
            tally.reasons[kind] = tally.refused - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({**vars(tally), "bad": tally.bad[:20], "bads": len(tally.bad), "line": line, "peak_mb": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
