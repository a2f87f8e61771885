"""Downloading a transformer into the hub's cache: only what it consists of, checked, and continued where it stopped.

The cache's layout is the hub's own, so that its other tools find what lies here and the other way round. The files'
bytes are received here and not by `hf_hub_download`: in huggingface_hub 2 that begins a file that was cut short from
its first byte again, which for shards of several gigabytes is a long way.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from zimage.config import TransformerConfig
from zimage.errors import ConfigError, DownloadError, WeightsError
from zimage.hub import network
from zimage.hub.cache import Plan, RemoteFile, asked, cache_folder, repository_folder
from zimage.sources.files import plain

_LARGEST_JSON = 50_000_000
_SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_INDEX = ".safetensors.index.json"
_CAPTIONS = "captions.safetensors"
_LOCK_TIMEOUT_S = 0.5


def fetch(repository: str, revision: str | None = None, advance: Callable[[int], None] = lambda _: None) -> Path:
    """Download a repository's transformer into the local cache, as far as it is not there; give the snapshot's folder.

    advance is called with the number of bytes whenever some have come. Raises what `plan` and `download` raise.
    """
    return download(plan(repository, revision), advance)


def plan(repository: str, revision: str | None = None) -> Plan:
    """Ask the hub what `repository` holds, and choose what a transformer needs of it; gets its config and index.

    Raises WeightsError where there is no such repository or revision, where it is gated, or holds no transformer in
    the diffusers layout; ConfigError where its config is of another model; DownloadError where the hub cannot be asked.
    """
    repository, revision = asked(repository, revision)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise WeightsError(f"{repository}: {name} is set, so nothing is downloaded; unset it, then fetch again")
    with network.told(repository, revision):
        commit, listing = network.listing(repository, revision)
        prefix, weights = _transformer(repository, listing)
        whole = Plan(repository, revision, commit, cache_folder(), ())
        config = _json(whole, listing[f"{prefix}config.json"])
        try:
            TransformerConfig.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{repository}: {prefix}config.json is not of this model: {plain(error)}") from None
        names = [f"{prefix}config.json", f"{prefix}{weights}", f"{prefix}{_CAPTIONS}", "model_index.json"]
        if weights.endswith(_INDEX):
            shards = _shards(_json(whole, listing[f"{prefix}{weights}"]), f"{repository}: {prefix}{weights}")
            absent = [shard for shard in shards if f"{prefix}{shard}" not in listing]
            if absent:
                raise WeightsError(f"{repository}: {prefix}{weights} names {plain(absent[0])}, which is not there")
            names += [f"{prefix}{shard}" for shard in shards]
    files = tuple(listing[name] for name in names if name in listing)
    return Plan(repository, revision, commit, whole.cache, files)


def download(plan: Plan, advance: Callable[[int], None] = lambda _: None) -> Path:
    """Download what `plan` lists and the cache lacks, check it, and give the snapshot's folder.

    The snapshot and the revision's name appear when all files are there. Interrupted, it leaves what came, and
    continues from there the next time. Raises DownloadError where the network, the server or the disk does not play
    along, WeightsError where the hub refuses.
    """
    with network.told(plan.repository, plan.revision):
        _check_space(plan)
        for file in plan.files:
            _get(plan, file, advance)
        for file in plan.files:
            _link(plan, file)
        if not plan.commit.startswith(plan.revision):
            _write(repository_folder(plan.cache, plan.repository) / "refs" / plan.revision, plan.commit)
    return plan.snapshot


def _transformer(repository: str, listing: Mapping[str, RemoteFile]) -> tuple[str, str]:
    """The folder of the transformer, "transformer/" or "", and in it the index or the one file of weights."""
    for prefix in ("transformer/", ""):
        inside = {name.removeprefix(prefix) for name in listing if name.startswith(prefix)}
        weights = _weights(sorted(name for name in inside if "/" not in name))
        if weights is not None and "config.json" in inside:
            return prefix, weights
    found = sorted(name for name in listing if name.endswith(".safetensors"))
    if not found:
        raise WeightsError(f"{repository} holds no .safetensors files; zimage reads no pickles and no GGUF")
    more = f" (and {len(found) - 8} more)" if len(found) > 8 else ""
    raise WeightsError(
        f"{repository} has no transformer/ and no root with a config.json and weights; `hf download {repository} FILE "
        f"--local-dir DIR` takes one of its files: {plain(', '.join(found[:8]))}{more}"
    )


def _weights(names: list[str]) -> str | None:
    """The index or the single file of weights among a folder's names; variants such as fp16 only where nothing else."""
    for name in (*(f"{single}.index.json" for single in _SINGLE_FILES), *_SINGLE_FILES):
        if name in names:
            return name
    for ending in (_INDEX, ".safetensors"):
        found = [name for name in names if name.endswith(ending) and name != _CAPTIONS]
        if len(found) == 1:
            return found[0]
    return None


def _shards(index: Any, place: str) -> list[str]:
    """The files that an index names, each once."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{place} has no weight_map from tensor names to files")
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise WeightsError(f"{place} names {plain(repr(file))}, which is not a .safetensors file name")
    return sorted(set(weight_map.values()))


def _json(plan: Plan, file: RemoteFile) -> Any:
    """The content of a small file of the repository, downloaded where it is not there yet."""
    if file.size > _LARGEST_JSON:
        raise WeightsError(f"{plan.repository}: {plain(file.name)} has {file.size:,} bytes, too many for what it is")
    try:
        return json.loads(_get(plan, file, lambda _: None).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{plan.repository}: {plain(file.name)} is not valid JSON: {plain(error)}") from None


def _check_space(plan: Plan) -> None:
    there = next(folder for folder in (plan.cache, *plan.cache.parents) if folder.exists())
    free, needed = shutil.disk_usage(there).free, plan.missing_bytes
    if needed > free:
        raise DownloadError(
            f"{plan.name} needs {needed:,} bytes more, and {plan.cache} has {free:,} free; make room, or set "
            "HF_HUB_CACHE to a folder on another disk"
        )


def _get(plan: Plan, file: RemoteFile, advance: Callable[[int], None]) -> Path:
    """The file's content in the cache, downloaded as far as it is not there, and checked."""
    from huggingface_hub.utils import WeakFileLock

    blob, partial = plan.blob(file), plan.partial(file)
    lock = plan.cache / ".locks" / repository_folder(plan.cache, plan.repository).name / f"{file.digest}.lock"
    if (there := plan.present(file)) is not None:
        return there
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=_LOCK_TIMEOUT_S))  # the one that the hub's other tools take
        except TimeoutError:
            raise DownloadError(
                f"another process is downloading {plain(file.name)} of {plan.repository}; wait for it, then fetch again"
            ) from None
        if plan.present(file) is None:  # nobody finished it before the lock was ours
            digest = network.receive(plan, file, advance)
            if digest != file.digest:
                partial.unlink()
                raise DownloadError(
                    f"{plan.repository}: {plain(file.name)} came damaged, with the digest {digest[:12]} and not "
                    f"{file.digest[:12]}, and was removed; fetch again"
                )
            os.replace(partial, blob)
    return blob


def _link(plan: Plan, file: RemoteFile) -> None:
    """Show the content under the file's name in the snapshot."""
    blob, shown = plan.blob(file), plan.snapshot / file.name
    if not blob.exists() or (shown.exists() and shown.samefile(blob)):
        return
    shown.parent.mkdir(parents=True, exist_ok=True)
    shown.unlink(missing_ok=True)
    try:
        shown.symlink_to(os.path.relpath(blob, shown.parent))
    except OSError:  # a disk without symlinks: the content itself goes there, as the hub's own tools do it
        os.replace(blob, shown)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="ascii")
        os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink()
