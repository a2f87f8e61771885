"""The hub's cache on this machine: its layout, and finding in it what was downloaded. Never asks the network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from zimage.errors import WeightsError
from zimage.sources.files import plain

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[\w+][\w.+@#=,-]*(?:/[\w+][\w.+@#=,-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{4,40}")
_LONGEST_REVISION = 200
MAIN = "main"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; digest is the SHA-256 of a large file, and of a small one what git calls its blob id."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """What a fetch brings: the files of one commit that a transformer consists of, and where they go."""

    repository: str
    revision: str
    commit: str
    cache: Path
    files: tuple[RemoteFile, ...]

    @property
    def name(self) -> str:
        """The source as commands take it, with its revision where that is not main."""
        return self.repository if self.revision == MAIN else f"{self.repository}@{self.revision}"

    @property
    def snapshot(self) -> Path:
        """The folder that shows the commit's files under their names."""
        return repository_folder(self.cache, self.repository) / "snapshots" / self.commit

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded; what an interrupted download left counts as there."""
        sizes = {f.digest: f.size - size_of(self.partial(f)) for f in self.files if self.present(f) is None}
        return sum(max(size, 0) for size in sizes.values())

    def blob(self, file: RemoteFile) -> Path:
        """Where the file's content lies, whatever its name."""
        return repository_folder(self.cache, self.repository) / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Where the file's content grows until it is complete."""
        return self.blob(file).with_name(f"{file.digest}.incomplete")

    def present(self, file: RemoteFile) -> Path | None:
        """The complete file: its blob, or in a cache without symlinks what stands in the snapshot itself."""
        found = (path for path in (self.blob(file), self.snapshot / file.name) if path.is_file())
        return next((path for path in found if path.stat().st_size == file.size), None)


def split(text: str) -> tuple[str, str | None] | None:
    """`org/name` or `org/name@revision` as its two parts; None where a text does not look like a repository.

    A path of one folder in another looks like one too, so look for paths first.
    """
    repository, at, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        return None
    if repository.endswith((".git", ".safetensors")):
        return None
    return repository, revision if at else None


def cached(repository: str, revision: str | None = None) -> Path:
    """The folder of `org/name` (or `org/name@revision`) in the local cache; never asks the network.

    revision: a branch, a tag, or a commit, of which the first digits do; main if left out. Whether the folder holds
    all that its index names is for the loader to say.

    Raises WeightsError where the repository, or that revision of it, was not downloaded.
    """
    repository, revision = asked(repository, revision)
    cache = cache_folder()
    folder = repository_folder(cache, repository)
    get = f"`zimage fetch {repository}{'' if revision == MAIN else f'@{revision}'}` gets it"
    try:
        commits = sorted(p.name for p in _inside(folder / "snapshots") if _COMMIT.fullmatch(p.name) and p.is_dir())
        refs = _refs(folder)
    except OSError as error:
        raise WeightsError(f"{plain(error.filename or folder)}: cannot be read: {error.strerror or error}") from None
    if not commits:
        raise WeightsError(f"{repository} is not in the Hugging Face cache, {cache}; {get}")
    exact = [refs[revision]] if revision in refs else [c for c in commits if c == revision]
    short = commits if _SHORT_COMMIT.fullmatch(revision) else []
    found = exact or [commit for commit in short if commit.startswith(revision)]
    if len(found) == 1 and found[0] in commits:
        return folder / "snapshots" / found[0]
    names = {commit: [ref for ref in sorted(refs) if refs[ref] == commit] for commit in commits}
    there = ", ".join(" = ".join([*names[commit], commit[:12]]) for commit in commits)
    if len(found) > 1:
        raise WeightsError(f"{repository}: several commits start with {revision}: {there}; give more of its digits")
    raise WeightsError(f"{repository} is in the Hugging Face cache, but not its {revision}, only {plain(there)}; {get}")


def asked(repository: str, revision: str | None) -> tuple[str, str]:
    """The repository and the revision asked for. Raises WeightsError where they cannot be such."""
    shown = plain(repr(repository))
    if repository.startswith(("datasets/", "spaces/")):
        raise WeightsError(f"{shown} is a {repository.split('s/')[0]}; a checkpoint is a model repository, org/name")
    parts = split(repository)
    if parts is None:
        raise WeightsError(f"{shown} names no repository; write org/name as in its address, or org/name@revision")
    repository, own = parts
    if own is not None and revision is not None and own != revision:
        raise WeightsError(f"{shown} and the revision {plain(repr(revision))} differ; give one revision")
    given = own if revision is None else revision
    given = MAIN if given is None else given
    if len(given) > _LONGEST_REVISION or ".." in given or not _REVISION.fullmatch(given):
        raise WeightsError(f"{repository}: {plain(repr(given))} is no revision; give a branch, a tag or a commit")
    return repository, given


def cache_folder() -> Path:
    """Where the hub's cache lies: the library's own rule, but read now, as the library does once when imported."""
    get = os.environ.get
    home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    chosen = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(chosen))))


def repository_folder(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}"


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _refs(folder: Path) -> dict[str, str]:
    """The commits that branches and tags stood for when they were downloaded."""
    refs = folder / "refs"
    texts = {p.relative_to(refs).as_posix(): p.read_bytes()[:100] for p in refs.rglob("*") if p.is_file()}
    return {name: text.decode("ascii", "replace").strip() for name, text in texts.items()}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
