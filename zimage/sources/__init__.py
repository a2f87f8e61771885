"""Where weights come from: finding a checkpoint, and reading what its files say about themselves.

Nothing here imports MLX or reads tensor values, except to compute a digest.
"""

import os
from importlib.resources import files as package_files
from pathlib import Path

from zimage.config import TransformerConfig
from zimage.errors import WeightsError
from zimage.sources.files import (
    Header,
    TensorInfo,
    inside,
    parse_json,
    plain,
    read_header,
    read_json,
    read_whole_header,
    readable,
)
from zimage.sources.folders import read_file, read_folder
from zimage.sources.info import SourceInfo
from zimage.sources.ollama import SCHEME, read_model
from zimage.sources.published import linears

__all__ = [
    "KNOWN_SOURCES", "Header", "SourceInfo", "TensorInfo", "describe", "inside", "linears", "parse_json", "plain",
    "read_header", "read_json", "read_whole_header", "readable",
]  # fmt: skip

_PRESETS = {
    "turbo": TransformerConfig.turbo,
    "block": TransformerConfig.block,
    "small": TransformerConfig.small,
    "tiny": TransformerConfig.tiny,
}
KNOWN_SOURCES = (
    "a diffusers folder (its root or its transformer/), a .safetensors file, ollama:NAME[:TAG], org/name in the "
    f"Hugging Face cache, 'digits', or {', '.join(repr(f'synthetic:{name}') for name in _PRESETS)}"
)


def describe(source: str | Path) -> SourceInfo:
    """Find `source` and read its config and headers. Raises WeightsError or ConfigError when it is not a checkpoint.

    "digits" and the synthetic sources are what they say in every folder; a folder called digits is "./digits". A path
    that exists wins over a repository of that name. Nothing is downloaded.
    """
    text = str(source)
    with readable(text):
        scheme, _, preset = text.partition(":")
        if scheme == "synthetic" and preset in _PRESETS:
            return SourceInfo(text, "synthetic", _PRESETS[preset](), {})
        if text == "digits":
            return read_folder(text, Path(str(package_files("zimage") / "digits" / "weights")))
        if text.startswith(SCHEME):
            return read_model(text)
        path = Path(os.path.expanduser(text))
        if text.strip() and path.is_dir():
            return read_folder(text, path)
        if path.is_file():
            return read_file(text, path)
        from zimage import hub

        repository = hub.split(text)
        if repository is not None:
            return read_folder(text, hub.cached(*repository))
    raise WeightsError(f"no checkpoint at {plain(repr(text))}: a source is {KNOWN_SOURCES}")
