"""Talking to the hub: what it lists, receiving a file, and every way in which that fails as one line."""

import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import zimage
from zimage.errors import DownloadError, WeightsError
from zimage.hub.cache import MAIN, Plan, RemoteFile, cache_folder, size_of
from zimage.sources import plain

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ASKING_S = 30
_WAITS_S = (1.0, 2.0, 4.0, 8.0)  # between attempts that brought no new bytes
_PASSING = (408, 429, 500, 502, 503, 504)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _shown_endpoint() -> str:
    """The hub's address without a password that may stand in it. Raises WeightsError where it is none."""
    try:
        parts = urlsplit(_endpoint())
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme not in ("http", "https") or not _endpoint().isprintable() or " " in _endpoint():
        raise WeightsError("HF_ENDPOINT is not an address such as https://huggingface.co; mend or unset it")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"


@contextmanager
def told(repository: str, revision: str) -> Iterator[None]:
    """Keep the library's own messages back, and turn what goes wrong into one line."""
    endpoint = _shown_endpoint()
    again = f"`zimage fetch {repository}{'' if revision == MAIN else f'@{revision}'}` continues"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub import errors
        from huggingface_hub.utils import logging as its_logging

        verbosity = its_logging.get_verbosity()
        its_logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        except errors.GatedRepoError:
            raise WeightsError(
                f"{repository} is gated: accept its terms at {endpoint}/{repository}, then `hf auth login` or set "
                "HF_TOKEN, and fetch again"
            ) from None
        except errors.RepositoryNotFoundError:
            raise WeightsError(
                f"{endpoint} has no model repository {repository}, or it is private: check the name, or `hf auth login`"
            ) from None
        except errors.RevisionNotFoundError:
            raise WeightsError(
                f"{repository} has no revision {revision}; its branches and tags are at {endpoint}/{repository}"
            ) from None
        except errors.OfflineModeIsEnabled:
            raise WeightsError(f"{repository}: the hub's offline mode is on; unset HF_HUB_OFFLINE") from None
        except errors.HfHubHTTPError as error:
            raise _refusal(error.response.status_code, repository, endpoint, again) from None
        except errors.HTTPError as error:
            reason = plain(error) if str(error) else type(error).__name__
            raise DownloadError(
                f"{endpoint} cannot be reached: {reason}; check the network, a proxy and HF_ENDPOINT, then {again}"
            ) from None
        except OSError as error:
            place = plain(error.filename or cache_folder())
            raise DownloadError(f"{place}: {error.strerror or plain(error)}; mend that, then {again}") from None
        finally:
            its_logging.set_verbosity(verbosity)


def _refusal(status: int, repository: str, endpoint: str, again: str) -> WeightsError:
    if status == 401:
        return WeightsError(f"{endpoint} does not accept the token for {repository}; `hf auth login` or set HF_TOKEN")
    if status == 403:
        return WeightsError(f"{endpoint} gives no access to {repository}; see {endpoint}/{repository} for its terms")
    return DownloadError(f"{endpoint} answers with status {status} for {repository}; later, {again}")


def _headers() -> dict[str, str]:
    """What a request carries; the token among it is never shown. Raises WeightsError for what cannot be a token."""
    from huggingface_hub.utils import build_hf_headers

    try:
        headers: dict[str, str] = build_hf_headers(library_name="zimage", library_version=zimage.__version__)
    except Exception as error:  # it may ask another service for a token, and fails as that does
        raise WeightsError(f"no token could be had ({type(error).__name__}); `hf auth login` or set HF_TOKEN") from None
    if not all(" " <= c <= "~" for c in headers.get("authorization", "")):
        raise WeightsError("the token holds characters that no token has; `hf auth login` again or mend HF_TOKEN")
    return {**headers, "Accept-Encoding": "identity"}


def listing(repository: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
    """The revision's commit, and its files by name."""
    from huggingface_hub import HfApi, errors

    _headers()
    try:
        info = HfApi(endpoint=_endpoint()).model_info(
            repository, revision=revision, files_metadata=True, timeout=_ASKING_S
        )
        files = {}
        for sibling in info.siblings or ():
            lfs = sibling.lfs
            size, digest = (sibling.size, sibling.blob_id) if lfs is None else (lfs.size, lfs.sha256)
            if not isinstance(size, int) or size < 0 or not _DIGEST.fullmatch(str(digest)):
                raise ValueError("no size or no digest")
            files[str(sibling.rfilename)] = RemoteFile(str(sibling.rfilename), size, str(digest))
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise ValueError("no commit")
    except (errors.HTTPError, OSError):
        raise
    except Exception as error:  # the library takes apart what came and fails at any point of it
        raise DownloadError(
            f"{_shown_endpoint()} does not answer as the hub does ({type(error).__name__}); check HF_ENDPOINT and proxy"
        ) from None
    return commit, files


def receive(plan: Plan, file: RemoteFile, advance: Callable[[int], None]) -> str:
    """Append to the partial file what it lacks, in several attempts where need be; give the digest of the whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError

    partial = plan.partial(file)
    if partial.is_symlink() or size_of(partial) > file.size:
        partial.unlink()
    url = hf_hub_url(plan.repository, file.name, revision=plan.commit, endpoint=_endpoint())
    waits = iter(_WAITS_S)
    with partial.open("a+b") as out:
        digest = _hasher(file)
        out.seek(0)
        while chunk := out.read(2**20):
            digest.update(chunk)
        while (have := out.tell()) < file.size:
            failed: Exception = DownloadError(f"{plan.repository}: the server sends only a part of {plain(file.name)}")
            try:
                for chunk, begins in _chunks(url, have):
                    if begins and out.tell():  # the server does not give parts: all of it again
                        advance(-out.tell())
                        out.seek(0)
                        out.truncate()
                        digest = _hasher(file)
                    out.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
                    if out.tell() > file.size:
                        break
            except HTTPError as error:
                if getattr(getattr(error, "response", None), "status_code", _PASSING[0]) not in _PASSING:
                    raise
                failed = error
            if out.tell() < file.size:
                waits = iter(_WAITS_S) if out.tell() > have else waits
                wait = next(waits, None)
                if wait is None:
                    raise failed
                time.sleep(wait)
    return digest.hexdigest()


def _chunks(url: str, start: int) -> Iterator[tuple[bytes, bool]]:
    """The bytes at `url` from `start` on; each with whether they begin the file although its rest was asked for."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status

    headers = {**_headers(), **({"Range": f"bytes={start}-"} if start else {})}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        begins = start > 0 and response.status_code != 206
        for chunk in response.iter_bytes():
            yield chunk, begins
            begins = False


def _hasher(file: RemoteFile) -> Any:
    """What computes the file's digest: SHA-256, or for what lies in git itself, its SHA-1 over length and content."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
