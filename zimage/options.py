"""Options and types that several commands share."""

import os
from pathlib import Path
from typing import Any

import click


class AnyPath(click.Path):
    """A path that was named: an empty word would mean the folder one happens to be in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("it is empty; name a file or folder ('.' is the one you are in)", param, ctx)
        return Path(value)


results = click.option(
    "--results", type=AnyPath(), default=Path("results"), show_default=True, metavar="DIR",
    help="Folder of the results.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


def _forcing(_context: click.Context, _option: click.Parameter, force: bool) -> bool:
    if force:
        os.environ["ZIMAGE_FORCE"] = "1"  # for loading too, here and in the processes of runs
    return force


force = click.option("--force", is_flag=True, envvar="ZIMAGE_FORCE", callback=_forcing,
                     help="Also try what cannot fit the device's memory.")  # fmt: skip
