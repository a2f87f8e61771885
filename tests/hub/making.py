"""What the tests of the hub share: what is published on it, and looking into the cache."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zimage import hub
from zimage.errors import DownloadError, WeightsError, ZImageError

import numpy as np
import pytest

NAME = "org/z-image"
VALUES = {f"part.{i}.weight": np.arange(30_000, dtype=np.float32).reshape(2, -1) + i for i in range(3)}
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SHARD_BYTES = 120_088
TOKEN = "hf_QzTopSecretValue"
PROXIES = [name for p in ("http", "https", "all") for name in (f"{p}_proxy", f"{p}_proxy".upper())]
UNSET = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME", *PROXIES,
)  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def cache() -> Path:
    return Path(os.environ["HF_HOME"]) / "hub"


def blobs() -> Path:
    return cache() / f"models--{NAME.replace('/', '--')}" / "blobs"


def partials() -> list[Path]:
    return sorted(blobs().glob("*.incomplete"))


def one_line(error: BaseException) -> str:
    line = str(error)
    assert line.isprintable() and len(line) < 1500, repr(line)
    return line


def refused(call: Callable[..., Any], *arguments: Any, kind: type[ZImageError] = WeightsError) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert type(caught.value) is kind
    return one_line(caught.value)


def failed(*arguments: Any) -> str:
    """The one line with which a fetch fails that was asked for rightly."""
    return refused(hub.fetch, *arguments, kind=DownloadError)
