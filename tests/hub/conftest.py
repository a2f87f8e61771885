"""Every test here has a hub of its own on this machine, and an empty cache."""

from collections.abc import Iterator
from pathlib import Path

from tests.checkpoints import write_sharded
from tests.hub.making import NAME, SHARD_BYTES, SHARDS, UNSET, VALUES
from tests.hub.server import Hub, serve
from zimage.hub import network

import pytest
from huggingface_hub import close_session, constants


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A published folder with shards, and beside them variants, pickles and other models; gives its root."""
    root = tmp_path / "published"
    folder = write_sharded(root / "transformer", VALUES)
    assert [(folder / shard).stat().st_size for shard in SHARDS] == [SHARD_BYTES] * 3
    (root / "model_index.json").write_text("{}")
    (root / "README.md").write_text("words")
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    for other in ("vae", "text_encoder"):
        (root / other).mkdir()
        (root / other / "config.json").write_text("{}")
        (root / other / "model.safetensors").write_bytes(b"of another model")
    return root


@pytest.fixture(autouse=True)
def server(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that publishes `sharded`, an empty cache, no token, and hardly any waiting between attempts."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(network, "_WAITS_S", (0.01, 0.01))
    with serve() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add(NAME, sharded)
        yield running
        close_session()
