"""What names a repository, and what is found of it in the cache."""

import re
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import CONFIG, write_single
from tests.hub.making import NAME, SHARDS, UNSET, VALUES, cache, refused
from tests.hub.server import Hub
from zimage import hub, sources

import pytest
from huggingface_hub import snapshot_download

# What looks like a repository


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("Tongyi-MAI/Z-Image-Turbo@v1.0", ("Tongyi-MAI/Z-Image-Turbo", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a_b/c.d-e@", ("a_b/c.d-e", "")),
        *((text, None) for text in (
            "", "name", "a/b/c", "/a/b", "a/", "/b", "./a", "../a", "~/a", "a/b--c", "a/b..c", "a/.b", "a/b-", "a b/c",
            "a/b\n", "ä/b", "a:b/c", "ollama:a/b", "a/b.git", "folder/model.safetensors", "@a/b", f"a/{'b' * 97}",
        )),
    ],
)  # fmt: skip
def test_a_repository_is_told_from_other_texts(text: str, parts: tuple[str, str | None] | None) -> None:
    """`org/name` with or without a revision is split; paths, other schemes and impossible names are not."""
    assert hub.split(text) == parts


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("datasets/org/name",), ("is a dataset",)),
        (("spaces/org/name",), ("is a space",)),
        (("name",), ("names no repository", "org/name")),
        (("https://huggingface.co/org/name",), ("names no repository",)),
        (("org/na\nme",), ("names no repository",)),
        (("org/name@",), ("''", "no revision")),
        (("org/name", "../../x"), ("no revision",)),
        (("org/name", "a/../b"), ("no revision",)),
        (("org/name", "/etc"), ("no revision",)),
        (("org/name", "-x"), ("no revision",)),
        (("org/name", "a b"), ("no revision",)),
        (("org/name", "x" * 300), ("no revision",)),
        (("org/name@v1", "v2"), ("'v2'", "give one revision")),
    ],
)
def test_what_names_no_revision_of_a_model_is_refused(
    asked: tuple[str, ...], words: tuple[str, ...], server: Hub
) -> None:
    """Data sets, spaces, impossible names and revisions are refused alike by cached and fetch, without a request."""
    for call in (hub.cached, hub.fetch):
        line = refused(call, *asked)
        assert all(word in line for word in words), line
    assert server.seen == []


# The cache


def make_snapshot(commit: str, *refs: str, repository: str = NAME, where: Path | None = None) -> Path:
    folder = (where or cache()) / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    write_single(snapshot / "transformer", VALUES)
    for ref in refs:
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return snapshot


FIRST, SECOND, THIRD = "1234567890" * 4, "1234abcdef" * 4, "fedcba9876" * 4


def test_cached_repositories_are_found_by_any_of_their_names(server: Hub) -> None:
    """main, a branch, a tag, a pull request, a full and a short commit lead to the snapshot, as for the library."""
    first, second = make_snapshot(FIRST, "main"), make_snapshot(SECOND, "v1.0", "refs/pr/3")
    third = make_snapshot(THIRD)
    found = {None: first, "main": first, "v1.0": second, "refs/pr/3": second, FIRST: first, THIRD: third}
    for revision, snapshot in found.items():
        assert hub.cached(NAME, revision) == snapshot
        assert Path(snapshot_download(NAME, revision=revision, cache_dir=cache(), local_files_only=True)) == snapshot
    assert hub.cached(f"{NAME}@v1.0") == hub.cached(NAME, "1234a") == second
    assert hub.cached(NAME, "fedc") == third
    assert sources.describe(hub.cached(NAME)).config == CONFIG
    assert server.seen == []


def test_what_is_not_in_the_cache_is_said() -> None:
    """An absent repository names the fetch that gets it, an absent revision also those that are there."""
    assert f"`zimage fetch {NAME}` gets it" in refused(hub.cached, NAME)
    assert f"{NAME} is not in the Hugging Face cache, {cache()}" in refused(hub.cached, NAME)
    make_snapshot(SECOND, "v1.0")
    make_snapshot(FIRST)
    there = f"but not its main, only {FIRST[:12]}, v1.0 = {SECOND[:12]}; `zimage fetch {NAME}` gets it"
    assert there in refused(hub.cached, NAME)
    assert re.search(rf"not its v2, only .*; `zimage fetch {NAME}@v2` gets it", refused(hub.cached, NAME, "v2"))
    assert "several commits start with 1234" in refused(hub.cached, NAME, "1234")
    (cache() / "models--org--z-image" / "refs" / "main").write_text(THIRD)  # as an interrupted download leaves it
    assert "but not its main" in refused(hub.cached, NAME)
    (cache() / "models--org--z-image" / "refs" / "main").write_bytes(b"../../\xff\n")
    assert "but not its main" in refused(hub.cached, NAME)


def test_an_unfinished_snapshot_is_for_the_loader_to_refuse() -> None:
    """A snapshot that lacks a shard is found; describing it names the file that is not there."""
    snapshot = hub.fetch(NAME)
    (snapshot / "transformer" / SHARDS[1]).unlink()
    assert hub.cached(NAME) == snapshot
    assert SHARDS[1] in refused(sources.describe, snapshot)


def test_where_the_cache_lies_is_asked_at_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_CACHE wins over HF_HOME and that over XDG_CACHE_HOME and the home folder, read when called."""
    for name in (*UNSET, "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    steps = (
        ("HOME", tmp_path / "user", tmp_path / "user" / ".cache" / "huggingface" / "hub"),
        ("XDG_CACHE_HOME", tmp_path / "xdg", tmp_path / "xdg" / "huggingface" / "hub"),
        ("HF_HOME", "~/hf", tmp_path / "user" / "hf" / "hub"),
        ("HUGGINGFACE_HUB_CACHE", tmp_path / "old", tmp_path / "old"),
        ("HF_HUB_CACHE", "$HOME/direct", tmp_path / "user" / "direct"),
    )
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for name, value, place in steps:
        monkeypatch.setenv(name, str(value))
        assert str(place) in refused(hub.cached, NAME)
        made = make_snapshot(FIRST, "main", where=place)
        assert hub.cached(NAME) == made
    library = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(library.stdout.strip()) == place


def test_looking_in_the_cache_loads_no_library() -> None:
    """Finding a cached repository imports neither huggingface_hub nor MLX."""
    code = """
import sys
from zimage import hub
try:
    hub.cached("org/there-is-none")
except Exception as error:
    print(type(error).__name__, [m for m in ("huggingface_hub", "mlx.core") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "WeightsError []"


def test_a_repository_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Hub) -> None:
    """`org/name` and `org/name@REV` describe what was fetched, links and all; a folder of that name wins."""
    snapshot = hub.fetch(NAME)
    asked = len(server.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    info = sources.describe(NAME)
    assert info.tensors == sources.describe(snapshot).tensors
    assert all(path.is_symlink() for path in info.files)
    assert sources.describe(f"{NAME}@{snapshot.name}").digest == info.digest
    assert len(server.seen) == asked
    assert f"`zimage fetch {NAME}-2` gets it" in refused(sources.describe, f"{NAME}-2")
    monkeypatch.chdir(tmp_path)
    changed = {name: value + 1 for name, value in VALUES.items()}
    write_single(tmp_path / NAME, changed)
    assert sources.describe(NAME).digest != info.digest


def test_blobs_may_lie_in_a_shared_store_and_files_nowhere_else(tmp_path: Path) -> None:
    """A blob that is itself a link is followed; a file of a snapshot that leads elsewhere than to the blobs is not."""
    snapshot = hub.fetch(NAME)
    shard = snapshot / "transformer" / SHARDS[0]
    blob = shard.resolve()
    blob.rename(tmp_path / "stored")
    blob.symlink_to(tmp_path / "stored")
    assert set(sources.describe(NAME).tensors) == set(VALUES)
    shard.unlink()
    shard.symlink_to(tmp_path / "stored")
    assert "a link out of the checkpoint's folder" in refused(sources.describe, NAME)
