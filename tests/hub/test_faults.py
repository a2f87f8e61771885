"""A fetch that is interrupted, damaged or refused, and what the command says."""

import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.checkpoints import INDEX
from tests.hub.making import NAME, SHARD_BYTES, SHARDS, TOKEN, blobs, cache, failed, files_in, partials, refused
from tests.hub.server import CHUNK, Hub, blob_id
from tests.test_cli import zimage
from zimage import hub, sources
from zimage.hub import fetching

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

# Interrupted, damaged, full


def test_a_cut_connection_is_taken_up_where_it_broke(server: Hub) -> None:
    """After a cut the rest is asked for, several times if need be, and no byte is sent twice."""
    server.cut_after = {SHARDS[1]: [50_000, 20_000, 7, 10_000]}
    hub.fetch(NAME)
    parts = server.sent(SHARDS[1])
    assert [seen.range for seen in parts] == [None, *(f"bytes={n}-" for n in (50_000, 70_000, 70_007, 80_007))]
    assert sum(seen.sent for seen in parts) == SHARD_BYTES
    assert len(server.sent(SHARDS[0])) == len(server.sent(SHARDS[2])) == 1


def test_a_server_that_keeps_cutting_leaves_what_came(server: Hub, sharded: Path) -> None:
    """When no attempt brings anything the fetch fails, keeps what it has, and the next one continues there."""
    server.cut_after = {SHARDS[1]: [50_000, 0, 0]}
    line = failed(NAME)
    assert f"`zimage fetch {NAME}` continues" in line
    assert [path.stat().st_size for path in partials()] == [50_000]
    assert "not in the Hugging Face cache" in refused(hub.cached, NAME)
    server.seen.clear()
    assert hub.plan(NAME).missing_bytes == 2 * SHARD_BYTES - 50_000
    assert sources.describe(hub.fetch(NAME)).digest == sources.describe(sharded).digest
    assert [(seen.range, seen.sent) for seen in server.sent(SHARDS[1])] == [("bytes=50000-", SHARD_BYTES - 50_000)]
    assert server.sent(SHARDS[0]) == []


def test_a_server_that_gives_no_parts_sends_the_whole_again(server: Hub, sharded: Path) -> None:
    """Where the server ignores that only the rest is wanted, the file is right all the same."""
    server.ranges = False
    server.cut_after = {SHARDS[0]: [50_000]}
    moved: list[int] = []
    plan = hub.plan(NAME)
    expected = plan.missing_bytes
    assert sources.describe(hub.download(plan, moved.append)).digest == sources.describe(sharded).digest
    assert sum(moved) == expected


def command(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "zimage.cli", *arguments], text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def wait_for_part(least: int) -> None:
    until = time.monotonic() + 60
    while not any(_bytes(path) >= least for path in partials()):
        assert time.monotonic() < until, "no download began"
        time.sleep(0.01)


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # complete since it was listed, and called otherwise now
        return 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_fetch_continues(how: signal.Signals, server: Hub, sharded: Path) -> None:
    """Killed or stopped in a shard, the next fetch sends only that shard's rest and the shards after it."""
    server.delay_s = 0.02
    with command("fetch", NAME) as process:
        wait_for_part(5 * CHUNK)
        process.send_signal(how)
        out, err = process.communicate(timeout=30)
    assert out == ""
    if how == signal.SIGINT:
        assert (process.returncode, err.strip()) == (1, "zimage: stopped")
    (partial,) = partials()
    have = partial.stat().st_size
    assert have >= 5 * CHUNK
    server.delay_s = 0.0
    assert sources.describe(hub.fetch(NAME)).digest == sources.describe(sharded).digest
    (name,) = [
        n for n in SHARDS if hashlib.sha256((sharded / "transformer" / n).read_bytes()).hexdigest() == partial.stem
    ]
    before, after = server.sent(name)
    assert (after.range, after.sent) == (f"bytes={have}-", SHARD_BYTES - have)
    assert before.sent <= have + 16 * CHUNK
    assert all(len(server.sent(other)) == 1 for other in SHARDS if other != name)


@pytest.mark.parametrize("name", [f"transformer/{SHARDS[2]}", "model_index.json", "transformer/config.json"])
def test_damaged_files_are_removed(name: str, server: Hub, sharded: Path) -> None:
    """A large or small file with other content than the hub lists costs one line, is removed, and comes right later."""
    server.wrong = {name}
    line = failed(NAME)
    assert f"{name} came damaged" in line and "fetch again" in line
    data = (sharded / name).read_bytes()
    digest = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else blob_id(data)
    assert not (blobs() / digest).exists()
    assert partials() == []
    server.wrong = set()
    assert (hub.fetch(NAME) / name).read_bytes() == data


def test_left_overs_that_cannot_be_right_are_replaced(sharded: Path) -> None:
    """A partial file that is too long or a link, and a complete one of the wrong length, do not survive a fetch."""
    digests = [hashlib.sha256((sharded / "transformer" / name).read_bytes()).hexdigest() for name in SHARDS]
    blobs().mkdir(parents=True)
    (blobs() / f"{digests[0]}.incomplete").write_bytes(b"x" * (SHARD_BYTES + 1))
    (blobs() / digests[1]).write_bytes(b"short")
    (blobs() / f"{digests[2]}.incomplete").symlink_to("/dev/zero")
    assert sources.describe(hub.fetch(NAME)).digest == sources.describe(sharded).digest


def test_too_little_space_is_said_before_anything_large_comes(
    monkeypatch: pytest.MonkeyPatch, server: Hub, sharded: Path
) -> None:
    """A fetch that would not fit is refused with both numbers; what is there already counts as there."""
    needed = hub.plan(NAME).missing_bytes
    usage = shutil.disk_usage(sharded)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    line = failed(NAME)
    assert f"needs {needed:,} bytes more" in line and f"{needed - 1:,} free" in line and "HF_HUB_CACHE" in line
    assert server.sent(".safetensors") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    hub.fetch(NAME)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    hub.fetch(NAME)


def test_a_write_that_fails_costs_one_line_and_nothing_that_came(server: Hub) -> None:
    """Where the system takes no more bytes, as on a full disk, one line says so and the next fetch continues."""
    limit = 20 * CHUNK

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with command("fetch", NAME, preexec_fn=small_files) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(rf"zimage: [^\n]+: File too large; [^\n]+`zimage fetch {NAME}` continues\n", err), err
    assert [path.stat().st_size for path in partials()] == [limit]
    hub.fetch(NAME)
    assert sum(seen.sent for seen in server.sent(SHARDS[0])[1:]) == SHARD_BYTES - limit
    assert files_in(hub.cached(NAME) / "transformer") == {"config.json", INDEX, *SHARDS}


def test_a_cache_that_is_no_folder_is_named() -> None:
    """A cache, or a place in it, that cannot be written costs one line that names it."""
    cache().parent.mkdir()
    cache().write_text("a file")
    assert str(cache()) in failed(NAME)


def test_two_fetches_do_not_write_one_file(monkeypatch: pytest.MonkeyPatch, server: Hub, sharded: Path) -> None:
    """What another process downloads at the moment is refused, and once that has finished it, not downloaded again."""
    data = (sharded / "transformer" / SHARDS[0]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    lock = cache() / ".locks" / "models--org--z-image" / f"{digest}.lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        assert f"another process is downloading transformer/{SHARDS[0]}" in failed(NAME)
    monkeypatch.setattr(fetching, "_LOCK_TIMEOUT_S", 30)
    with ThreadPoolExecutor() as other:
        with WeakFileLock(lock):
            waiting = other.submit(hub.fetch, NAME)
            while not server.sent("model_index.json"):
                time.sleep(0.01)
            time.sleep(0.05)
            (blobs() / digest).write_bytes(data)
        assert files_in(waiting.result() / "transformer") == {"config.json", INDEX, *SHARDS}
    assert server.sent(SHARDS[0]) == []


# Refusals of the hub, and no hub at all


def gate(server: Hub) -> None:
    server.repositories[NAME].gated = True


def gate_with_token(server: Hub) -> None:
    gate(server)
    os.environ["HF_TOKEN"] = TOKEN


def hide(server: Hub) -> None:
    server.repositories[NAME].private = True


def drop(server: Hub) -> None:
    del server.repositories[NAME]


def drop_with_token(server: Hub) -> None:
    drop(server)
    os.environ["HF_TOKEN"] = TOKEN


def move(server: Hub) -> None:
    server.repositories[NAME].revisions = ("other",)


def wrong_token(server: Hub) -> None:
    server.token = "another"
    os.environ["HF_TOKEN"] = TOKEN


def odd_token(_: Hub) -> None:
    os.environ["HF_TOKEN"] = f"{TOKEN}\x01"


def forbid(server: Hub) -> None:
    server.api_status = 403
    os.environ["HF_TOKEN"] = TOKEN


def api_fails(server: Hub) -> None:
    server.api_status = 500


def files_fail(server: Hub) -> None:
    server.file_status = 503


def file_gone(server: Hub) -> None:
    server.file_status = 410


def is_no_hub(server: Hub) -> None:
    server.api_body = b"<html>Welcome to the hotel's network</html>"


def lists_nothing(server: Hub) -> None:
    server.api_body = b'{"id": "org/z-image", "sha": "../../x", "siblings": [{"rfilename": "a"}]}'


def lists_rubbish(server: Hub) -> None:
    server.api_body = b'[{"siblings": 7}]'


def is_down(_: Hub) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["HF_ENDPOINT"] = f"http://user:password@127.0.0.1:{free.getsockname()[1]}"


def offline(_: Hub) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


def no_address(_: Hub) -> None:
    os.environ["HF_ENDPOINT"] = "huggingface.co"


def bad_port(_: Hub) -> None:
    os.environ["HF_ENDPOINT"] = "http://user:password@localhost:port"


@pytest.mark.parametrize(
    ("trouble", "status", "words"),
    [
        (gate, 2, ("is gated", f"/{NAME}", "hf auth login")),
        (gate_with_token, 2, ("is gated", f"/{NAME}")),
        (hide, 2, ("no model repository", "hf auth login")),
        (drop, 2, ("no model repository", "check the name")),
        (drop_with_token, 2, ("no model repository", "check the name")),
        (move, 2, ("has no revision main",)),
        (wrong_token, 2, ("does not accept the token",)),
        (odd_token, 2, ("characters that no token has",)),
        (forbid, 2, ("gives no access",)),
        (api_fails, 1, ("status 500",)),
        (files_fail, 1, ("status 503", "continues")),
        (file_gone, 1, ("status 410",)),
        (is_no_hub, 1, ("does not answer as the hub does", "HF_ENDPOINT")),
        (lists_nothing, 1, ("does not answer as the hub does",)),
        (lists_rubbish, 1, ("does not answer as the hub does",)),
        (is_down, 1, ("http://127.0.0.1:", "cannot be reached", "Connection refused")),
        (offline, 2, ("HF_HUB_OFFLINE is set",)),
        (no_address, 2, ("HF_ENDPOINT is not an address",)),
        (bad_port, 2, ("HF_ENDPOINT is not an address",)),
    ],
)
def test_every_refusal_is_one_line(
    trouble: Callable[[Hub], None], status: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    server: Hub, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever the hub, the network or the settings refuse: one line, the right status, no secret, no folder."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):  # what the troubles set is put back
        monkeypatch.setenv(name, os.environ.get(name, ""))
    trouble(server)
    found, out, err = zimage(capfd, "fetch", NAME)
    assert (found, out) == (status, ""), err
    assert re.fullmatch(r"zimage: [^\n]+\n", err), err
    assert all(word in err for word in words), err
    assert "Secret" not in err and "password" not in err
    assert not (cache() / "models--org--z-image" / "snapshots").exists()


def test_a_server_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch, server: Hub) -> None:
    """A download of which nothing comes any more is given up after the library's timeout."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.delay_s = 0.5
    assert "cannot be reached" in failed(NAME)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub gets the token, the host that large files come from does not, and nothing prints it."""
    hide(server)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    status, out, err = zimage(capfd, "fetch", NAME, "--json")
    assert (status, err) == (0, "")
    assert TOKEN not in out
    for seen in server.seen:
        assert seen.token == (None if seen.path.startswith("/cdn/") else TOKEN)


# The command


def test_the_command_says_what_is_there_and_how_to_use_it(server: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """In a pipe a fetch prints one line and nothing else: files, bytes, the folder, and the command that shows it."""
    status, out, err = zimage(capfd, "fetch", NAME)
    plan = hub.plan(NAME)
    assert (status, err) == (0, "")
    assert out == f"{NAME}: 6 files, {plan.bytes:,} bytes, in {plan.snapshot}; `zimage show {NAME}` describes it\n"
    server.repositories[NAME].revisions = ("main", "v1")
    status, out, _ = zimage(capfd, "fetch", NAME, "--revision", "v1", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["source"] == f"{NAME}@v1"
    assert (told["bytes"], told["downloaded_bytes"]) == (plan.bytes, 0)
    assert (told["commit"], told["folder"]) == (plan.commit, str(plan.snapshot))
    assert len(told["files"]) == 6


def test_the_library_says_nothing_itself(server: Hub) -> None:
    """Warnings that the server sends, and the library logs, do not reach the terminal: an error stays one line."""
    server.api_status = 500
    with command("fetch", NAME) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"zimage: [^\n]+status 500[^\n]+\n", err), err


def test_a_terminal_is_shown_the_progress(server: Hub) -> None:
    """On a terminal a fetch says beforehand how much it is, and draws a bar with speed and the time left."""
    server.delay_s = 0.01
    ours, theirs = pty.openpty()
    with command("fetch", NAME, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            shown += chunk
            if not chunk:
                break
        out, _ = process.communicate(timeout=30)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0 and out.count("\n") == 1
    assert re.search(rf"{NAME}: 6 files, [0-9,]+ bytes, 360,[0-9]+ of them to download", text)
    assert "/360.3 kB" in text and "kB/s" in text and re.search(r"0:\d\d", text)
