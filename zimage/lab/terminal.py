"""How every command speaks: results on standard output, as lines or as JSON, and the rest on standard error."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

OUTPUT = "standard output"
_NARROWEST = 40  # columns that text is wrapped to


def say(text: str) -> None:
    """Print a text. An OSError of a full disk or a closed terminal names OUTPUT as its file."""
    try:
        click.echo(text)
    except OSError as error:
        error.filename = OUTPUT
        raise


def show(content: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
    """Print a result: `content` as JSON, or what `lines` makes of it."""
    say(json.dumps(content, indent=2, ensure_ascii=False) if as_json else "\n".join(lines()))


def skipped(problems: Sequence[str]) -> None:
    """Tell what was left out, a line each."""
    for problem in problems:
        complain(f"skipped: {problem}")


def link(page: Path) -> str:
    """A path, or on a terminal an address to click on."""
    return page.resolve().as_uri() if sys.stdout.isatty() else str(page)


def columns() -> int:
    """How many columns a line on standard output may take: the terminal's, or any number where it is none."""
    return max(shutil.get_terminal_size().columns, _NARROWEST) if sys.stdout.isatty() else sys.maxsize


def complain(line: str) -> None:
    """One line on standard error, with the command's name."""
    click.echo(f"zimage: {' '.join(line.splitlines())}", err=True)


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[..., None]]:
    """A bar with the time left on a terminal, nothing in a pipe; calling what it gives moves it by one, or as told."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount=1.0: bar.advance(task, amount)


@contextmanager
def transfer(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, speed and the time left on a terminal, nothing in a pipe; what it gives takes bytes moved."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda moved: bar.advance(task, moved)


def note(line: str) -> None:
    """One line on standard error before or after long work, for who watches: nothing in a pipe."""
    if sys.stderr.isatty():
        click.echo(line, err=True)


def mute_output() -> None:
    """Send what is still to be written to standard output nowhere, as Python does it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
