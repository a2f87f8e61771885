"""What of a repository is fetched, with the real huggingface_hub beside it."""

import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints import INDEX, SINGLE, write_config, write_index, write_single
from tests.hub.making import NAME, SHARD_BYTES, SHARDS, VALUES, blobs, cache, files_in, one_line, partials, refused
from tests.hub.server import Hub
from zimage import hub, sources
from zimage.errors import ZImageError
from zimage.hub import fetching

import numpy as np
import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
from safetensors.numpy import save_file

# What is fetched


def test_only_what_the_transformer_consists_of_is_fetched(server: Hub, sharded: Path) -> None:
    """Config, index, the shards it names and model_index.json come; no variant, pickle, text encoder or VAE."""
    plan = hub.plan(NAME)
    wanted = {"model_index.json", *(f"transformer/{name}" for name in ("config.json", INDEX, *SHARDS))}
    assert {file.name for file in plan.files} == wanted
    assert plan.bytes == sum((sharded / name).stat().st_size for name in wanted)
    moved: list[int] = []
    expected = plan.missing_bytes
    snapshot = hub.download(plan, moved.append)
    assert files_in(snapshot) == wanted
    assert sum(moved) == expected >= 3 * SHARD_BYTES
    assert all((snapshot / name).read_bytes() == (sharded / name).read_bytes() for name in wanted)
    assert sum(seen.sent for seen in server.seen) == plan.bytes
    assert snapshot == hub.cached(NAME) == cache() / "models--org--z-image" / "snapshots" / plan.commit
    fetched = sources.describe(snapshot)
    assert fetched.digest == sources.describe(sharded).digest
    assert partials() == []


def test_what_is_there_is_not_fetched_again(server: Hub) -> None:
    """A second fetch asks what there is and downloads nothing."""
    hub.fetch(NAME)
    server.seen.clear()
    assert hub.plan(NAME).missing_bytes == 0
    hub.fetch(NAME)
    assert server.sent() == []


def test_a_root_that_is_the_transformer_is_fetched(tmp_path: Path, server: Hub) -> None:
    """Of a repository that is a saved folder come config, weights and label embeddings."""
    write_single(tmp_path / "saved", VALUES)
    save_file({"labels": np.zeros((10, 4), np.float32)}, tmp_path / "saved" / "captions.safetensors")
    (tmp_path / "saved" / "README.md").write_text("words")
    server.add(NAME, tmp_path / "saved")
    snapshot = hub.fetch(NAME)
    assert files_in(snapshot) == {"config.json", SINGLE, "captions.safetensors"}
    info = sources.describe(snapshot)
    assert info.captions is not None
    assert info.digest == sources.describe(tmp_path / "saved").digest


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ((SINGLE, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"), SINGLE),
        (("model.safetensors", "x.safetensors"), "model.safetensors"),
        (("0.safetensors", "captions.safetensors"), "0.safetensors"),
    ],
)
def test_one_file_of_weights_is_chosen_among_several(
    files: tuple[str, ...], chosen: str, tmp_path: Path, server: Hub
) -> None:
    """The published name wins over variants and other files; the only file is taken under any name."""
    write_config(tmp_path / "a" / "transformer")
    for file in files:
        save_file(VALUES, tmp_path / "a" / "transformer" / file)
    server.add(NAME, tmp_path / "a")
    captions = {"transformer/captions.safetensors"} if "captions.safetensors" in files else set()
    assert files_in(hub.fetch(NAME)) == {"transformer/config.json", f"transformer/{chosen}"} | captions


def test_a_repack_is_refused_with_the_way_to_take_a_file(tmp_path: Path, server: Hub) -> None:
    """A repository in another layout names its .safetensors files and the command that downloads one."""
    for i in range(10):
        path = tmp_path / "a" / "split_files" / f"model_{i}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    server.add(NAME, tmp_path / "a")
    line = refused(hub.fetch, NAME)
    assert "split_files/model_0.safetensors" in line
    assert f"`hf download {NAME} FILE --local-dir DIR`" in line
    assert "and 2 more" in line
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.gguf").write_bytes(b"weights")
    server.add(NAME, tmp_path / "a")
    assert "no .safetensors files" in refused(hub.fetch, NAME)
    assert server.sent() == []


def test_another_models_weights_are_not_downloaded(tmp_path: Path, server: Hub) -> None:
    """A repository whose config is of another model is refused before its weights come."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 2560}')
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    server.add(NAME, tmp_path / "a")
    with pytest.raises(ZImageError, match=r"config\.json is not of this model") as caught:
        hub.fetch(NAME)
    one_line(caught.value)
    assert [seen.path.rpartition("/")[2] for seen in server.sent()] == ["config.json"]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "absent.safetensors"}, "absent.safetensors, which is not there"),
        ({"a": "../config.json"}, "not a .safetensors file name"),
        ({"a": "../x.safetensors"}, "not a .safetensors file name"),
        ({"a": "..\\x.safetensors"}, "not a .safetensors file name"),
        ({"a": 7}, "not a .safetensors file name"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_of_absent_or_other_files_is_refused(weight_map: Any, words: str, tmp_path: Path, server: Hub) -> None:
    """An index that names files the repository lacks, or anything but files beside it, is refused."""
    write_config(tmp_path / "a" / "transformer")
    write_index(tmp_path / "a" / "transformer", weight_map)
    server.add(NAME, tmp_path / "a")
    assert words in refused(hub.fetch, NAME)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'"text"'])
def test_a_config_that_is_none_is_refused(content: bytes, tmp_path: Path, server: Hub) -> None:
    """A config that is not JSON, or not an object, costs one line."""
    folder = write_single(tmp_path / "a", VALUES)
    (folder / "config.json").write_bytes(content)
    server.add(NAME, folder)
    with pytest.raises(ZImageError, match=r"config\.json") as caught:
        hub.fetch(NAME)
    one_line(caught.value)


def test_an_endless_config_is_not_read(monkeypatch: pytest.MonkeyPatch, server: Hub) -> None:
    """A config larger than any config is not downloaded."""
    monkeypatch.setattr(fetching, "_LARGEST_JSON", 100)
    assert "too many for what it is" in refused(hub.fetch, NAME)
    assert server.sent() == []


def test_a_revision_is_fetched_under_its_name(server: Hub) -> None:
    """A tag is found in the cache under its name and not as main; a short commit is found as such."""
    server.repositories[NAME].revisions = ("main", "v1.0", "refs/pr/3")
    commit = server.repositories[NAME].commit
    snapshot = hub.fetch(f"{NAME}@v1.0")
    assert hub.cached(NAME, "v1.0") == snapshot
    assert "not its main" in refused(hub.cached, NAME)
    assert hub.fetch(NAME, "refs/pr/3") == hub.cached(NAME, "refs/pr/3") == snapshot
    assert hub.fetch(NAME, commit[:8]) == hub.cached(NAME, commit[:8]) == snapshot
    assert files_in(cache() / "models--org--z-image" / "refs") == {"v1.0", "refs/pr/3"}
    assert len(server.sent(SHARDS[0])) == 1


def test_a_moved_branch_brings_only_what_changed(server: Hub, sharded: Path) -> None:
    """After a new commit, files with the same content are shown in its snapshot without being downloaded."""
    old = hub.fetch(NAME)
    (sharded / "model_index.json").write_text('{"new": 1}')
    server.add(NAME, sharded)
    server.seen.clear()
    new = hub.fetch(NAME)
    assert new != old
    assert [seen.path.rpartition("/")[2] for seen in server.sent()] == ["model_index.json"]
    assert hub.cached(NAME) == new
    assert sources.describe(new).digest == sources.describe(old).digest


# Beside the hub's other tools


def test_the_library_finds_what_was_fetched(server: Hub) -> None:
    """The library sees a fetched snapshot as its own: no warning, and no byte of it downloaded again."""
    snapshot = hub.fetch(NAME)
    scan = scan_cache_dir(cache())
    assert list(scan.warnings) == []
    assert [(repo.repo_id, repo.nb_files) for repo in scan.repos] == [(NAME, 6)]
    assert Path(snapshot_download(NAME, cache_dir=cache(), local_files_only=True)) == snapshot
    server.seen.clear()
    for name in ("model_index.json", f"transformer/{SHARDS[0]}"):
        got = hf_hub_download(NAME, name, cache_dir=cache(), endpoint=server.url)
        assert Path(got) == snapshot / name
    assert server.sent() == []


def test_what_the_library_downloaded_is_not_fetched_again(server: Hub, sharded: Path) -> None:
    """Files that the library put into the cache, under the same revision, count as there."""
    hf_hub_download(NAME, f"transformer/{SHARDS[0]}", cache_dir=cache(), endpoint=server.url)
    hf_hub_download(NAME, "transformer/config.json", cache_dir=cache(), endpoint=server.url)
    server.seen.clear()
    assert sources.describe(hub.fetch(NAME)).digest == sources.describe(sharded).digest
    assert server.sent(SHARDS[0]) == server.sent("config.json") == []
    assert len(server.sent(SHARDS[1])) == 1


def test_a_cache_without_symlinks_holds_the_files_themselves(monkeypatch: pytest.MonkeyPatch, server: Hub) -> None:
    """Where symlinks cannot be made the snapshot holds the files, once, and they are not fetched again."""

    def none(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", none)
    snapshot = hub.fetch(NAME)
    assert not any(path.is_symlink() for path in snapshot.rglob("*"))
    assert list(blobs().iterdir()) == []
    server.seen.clear()
    assert hub.fetch(NAME) == snapshot
    assert server.sent() == []
