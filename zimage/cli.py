"""The command `zimage`: parses, calls, prints.

Exit 0: done; 1: it ran and something failed, or was stopped; 2: it was asked wrongly, and one line says how to mend it.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import zimage
from zimage import compare_commands, run_commands
from zimage.errors import DownloadError, ExperimentError, InputError, StoreError, ZImageError
from zimage.lab import terminal
from zimage.options import AnyPath as _Path
from zimage.options import as_json as _as_json
from zimage.options import force as _force
from zimage.options import results as _results

import click

if TYPE_CHECKING:
    from zimage.lab.store import Store
    from zimage.sources import SourceInfo

_WINDOWS = os.name == "nt"


_quantization = click.option(
    "--quantization",
    metavar="NAME|FILE",
    help="Pack the weights: 2bit to 6bit, 8bit, 4bit-g32, mxfp4, nvfp4, mxfp8, or a recipe (.yaml, .json).",
)


def _adapters(_context: click.Context, _option: click.Parameter, texts: Sequence[str]) -> list[tuple[Path, float]]:
    from zimage import adapters

    return [adapters.parse(text) for text in texts]


_lora = click.option("--lora", multiple=True, callback=_adapters, metavar="FILE[:SCALE]",
                     help="Apply a LoRA adapter; may be repeated.")  # fmt: skip
_check_values = click.option("--check-values", is_flag=True, help="Refuse weights with NaN or infinity.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
             invoke_without_command=True)  # fmt: skip
@click.version_option(zimage.__version__, prog_name="zimage")
@click.pass_context
def cli(context: click.Context) -> None:
    """Profile and ablate the Z-Image diffusion transformer on MLX."""
    if context.invoked_subcommand is None:
        terminal.say(context.get_help())


@cli.command(name="list")
@_as_json
@_results
def list_command(as_json: bool, results: Path) -> None:
    """List the experiments and their runs."""
    from zimage.lab import listing
    from zimage.lab.store import Store

    store = Store(results)
    content = listing.store_content(store)
    terminal.show(content, as_json, lambda: listing.store_lines(store, content))
    terminal.skipped(content["problems"])


@cli.command()
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@_as_json
@_results
def clean(yes: bool, dry_run: bool, as_json: bool, results: Path) -> int:
    """Remove failed and superseded runs, after asking; nothing else.

    Superseded is a run that the last sweep did not ask for, where a newer one differs from it in nothing but the
    notebook's code; runs of other versions, commits and sources of zimage stay, for a trend is made of them.
    """
    from zimage.lab import cleaning
    from zimage.lab.store import Store

    return cleaning.clean(Store(results), yes, dry_run, as_json)


@cli.command()
@click.argument("what")
@_as_json
@_results
def show(what: str, as_json: bool, results: Path) -> None:
    """Show a run, an experiment, or a checkpoint source.

    WHAT is a run's key or the start of it, experiment/key, an experiment, or a source.
    """
    from zimage.lab import listing
    from zimage.lab.store import Store

    store = Store(results)
    if what in store.experiments():
        content = listing.store_content(store, [what])
        terminal.show(content, as_json, lambda: listing.store_lines(store, content))
        terminal.skipped(content["problems"])
        return
    try:
        found = store.find(what)
    except StoreError as no_run:
        if " fits " in str(no_run):
            raise
        content = listing.source_content(_source(what, no_run, store))
        terminal.show(content, as_json, lambda: listing.source_lines(content))
        return
    terminal.show(listing.run_content(found), as_json, lambda: listing.run_lines(found))


@cli.command()
@click.argument("source")
@click.argument("directory", type=_Path(), metavar="DIR")
@click.option("--dtype", metavar="NAME", help="bfloat16 or float32; as suits the device if left out.")
@_quantization
@_lora
@_check_values
def convert(
    source: str, directory: Path, dtype: str | None, quantization: str | None, lora: list[tuple[Path, float]],
    check_values: bool,
) -> None:  # fmt: skip
    """Change SOURCE as asked and save it in the new folder DIR.

    DIR gets safetensors with a config.json. Only one tensor is in memory at a time, so a model can be packed that does
    not fit unpacked.
    """
    from zimage import sources, weights

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a half-written folder is removed
    started = time.monotonic()
    with ExitStack() as stack:
        weights.convert(
            source, directory, dtype, quantization, lora, check_values,
            lambda total: stack.enter_context(terminal.transfer(f"writing {directory}", total)),
        )  # fmt: skip
    info, took = sources.describe(directory), time.monotonic() - started
    terminal.say(f"{directory}: {len(info.tensors)} tensors, {info.bytes:,} bytes, in {took:.1f} s")


@cli.command()
@click.argument("repository", metavar="REPOSITORY")
@click.option("--revision", metavar="REV", help="A branch, tag or commit; main if left out.")
@_as_json
def fetch(repository: str, revision: str | None, as_json: bool) -> None:
    """Download the transformer of a Hugging Face repository.

    REPOSITORY is org/name, or org/name@REV. Only the transformer is downloaded, into the hub's cache. What was
    downloaded before is not downloaded again, also of a file that was not finished.
    """
    from zimage import hub

    plan = hub.plan(repository, revision)
    size = f"{plan.name}: {len(plan.files)} file{'s' * (len(plan.files) > 1)}, {plan.bytes:,} bytes"
    to_come = plan.missing_bytes
    terminal.note(f"{size}, {to_come:,} of them to download to {plan.cache}")
    with terminal.transfer(plan.name, to_come) as on:
        folder = hub.download(plan, on)
    content = {
        "source": plan.name, "commit": plan.commit, "files": [file.name for file in plan.files], "bytes": plan.bytes,
        "downloaded_bytes": to_come, "folder": str(folder),
    }  # fmt: skip
    terminal.show(content, as_json, lambda: [f"{size}, in {folder}; `zimage show {plan.name}` describes it"])


@cli.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--source", default="digits", show_default=True, help="The model that draws.")
@click.option("--steps", type=int, default=20, show_default=True, help="Euler steps.")
@click.option("--shift", type=float, default=1.0, show_default=True, help="Shift of the noise levels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise to start from.")
@_quantization
@_lora
@_check_values
@_force
@click.option("--out", type=_Path(), metavar="FILE.png",
              help="The picture's file; digits-LABELS.png if left out.")  # fmt: skip
def generate(
    prompts: tuple[str, ...], source: str, steps: int, shift: float, seed: int, quantization: str | None,
    lora: list[tuple[Path, float]], check_values: bool, force: bool, out: Path | None,
) -> None:  # fmt: skip
    """Draw PROMPT as a PNG. A prompt of a digits model is a label, such as 7; several are drawn as one grid."""
    from zimage import digits, scheduler, sources, weights
    from zimage.digits import picture
    from zimage.digits.data import SIZE
    from zimage.lab import fitting
    from zimage.lab.files import write_atomically

    from PIL import Image

    info = sources.describe(source)
    table = digits.table_of(info)
    if table is None:
        raise InputError(
            f"{source}: drawing from a text prompt needs the text encoder and the VAE, which this version does not "
            "have; --source digits draws digits, and so does a source with a captions.safetensors of its labels"
        )
    labels = digits.labels_in(" ".join(prompts))
    scheduler.sigmas(steps, shift)  # refused before anything is loaded
    path = _picture_path(out, "".join(map(str, labels)))
    height, width = (length * info.config.pixels_per_latent for length in SIZE)
    fit = zimage.fits(info, height, width, digits.batch_size(len(labels)), 1, None, quantization)
    fitting.judge(f"drawing with {source}", fit, ["--quantization"] * (quantization is None), force)
    started = time.monotonic()
    with terminal.progress(
        f"drawing {len(labels)} digit{'s' * (len(labels) > 1)}", steps * digits.batches(len(labels))
    ) as on:
        model = weights.load_transformer(source, None, quantization, lora, check_values)
        drawn = digits.draw(model, labels, steps, shift, seed, on, table)
    pixels = Image.fromarray(picture.grid(drawn.images, scale=32))
    write_atomically(path, lambda draft: pixels.save(draft, format="PNG"), "choose another file with --out")
    terminal.say(f"{path}: {steps} steps in {time.monotonic() - started:.1f} s")


def _picture_path(out: Path | None, labels: str) -> Path:
    path = out or Path(f"digits-{labels if len(labels) <= 40 else f'{labels[:40]}-and-{len(labels) - 40}-more'}.png")
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: the picture is a PNG; end the file's name in .png")
    try:
        if path.is_dir():
            raise InputError(f"--out {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise InputError(f"--out {path}: there is no folder {path.parent}; make it first")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror or error}; choose another file") from None
    return path


@cli.command()
@click.option("--single-file", is_flag=True, help="Put plotly's script into each page, so that it can be sent around.")
@_as_json
@_results
def report(single_file: bool, as_json: bool, results: Path) -> None:
    """Build the pages again from what is stored; needs no MLX."""
    from zimage.lab import dashboard
    from zimage.lab.store import Store

    store = Store(results)
    names = store.experiments()
    if not names:
        raise StoreError(f"{results}: no runs to report on; `zimage sweep EXPERIMENT.yaml` makes some")
    pages = dashboard.build(store, None, single_file=single_file)
    found = {name: dashboard.findings(store, name) for name in names}
    content = {
        "pages": [str(page) for page in pages],
        "findings": {name: brief.sentence for name, brief in found.items()},
    }
    terminal.skipped([problem for name in names for problem in store.scan(name)[1]])

    def lines() -> list[str]:
        columns = terminal.columns()
        text = []
        for name, brief in found.items():
            first, *others = brief.lines(columns)
            text += [f"{name}: {first}", *others]
        return [*text, *map(terminal.link, pages)]

    terminal.show(content, as_json, lines)


@cli.command(name="claims")
@click.option("--claims", "file", type=_Path(), metavar="FILE",
              help="The claims; the project's experiments/claims.yaml if left out.")  # fmt: skip
@_as_json
@_results
def claims_command(file: Path | None, as_json: bool, results: Path) -> None:
    """Judge published claims on the results.

    They are judged for each device that results are from. Needs no MLX.
    """
    from zimage.lab import claims
    from zimage.lab.store import Store

    published, store = claims.read(file or claims.nearest(Path.cwd())), Store(results)
    judged, problems = claims.judgements(published, store)
    terminal.skipped(problems)
    terminal.show(claims.content(judged), as_json, lambda: claims.lines(judged, store))


@cli.command()
@click.option("--full", is_flag=True, help="Also measure sustained rates and packed products; takes minutes.")
@_as_json
@_results
def doctor(full: bool, as_json: bool, results: Path) -> int:
    """Check this machine: device, libraries, and how fast they are."""
    from dataclasses import asdict

    from zimage import backend
    from zimage.measure import peaks

    expected_s = peaks.expected_s(full, backend.build_kind())
    if full:
        terminal.note(f"measuring sustained rates and packed products: about {expected_s:.0f} s")
    with terminal.progress("measuring", expected_s) as on:
        checks = backend.doctor(results, full, on)
    signs = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}
    width = max(len(check.name) for check in checks)

    def lines() -> list[str]:
        text = []
        for check in checks:
            text.append(f"{signs[check.status]}  {check.name:{width}}  {check.value}")
            if check.advice:
                text.append(f"      {'':{width}}  -> {check.advice}")
        return text

    terminal.show([asdict(check) for check in checks], as_json, lines)
    return 1 if any(check.status == "fail" for check in checks) else 0


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[JUPYTERLAB_OPTION]...")
def lab(options: tuple[str, ...]) -> None:
    """Open JupyterLab on notebooks/, with its own options passed on."""
    from importlib.util import find_spec

    if find_spec("jupyterlab") is None:
        raise ExperimentError(f"JupyterLab is not installed for {sys.executable}: pip install jupyterlab")
    here = Path.cwd()
    folder = next((f / "notebooks" for f in (here, *here.parents) if (f / "notebooks").is_dir()), None)
    if folder is None:
        raise ExperimentError(f"{here}: no notebooks/ folder here or above; go to the project's folder first")
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder), *options])


for command in (run_commands.run, run_commands.sweep, compare_commands.compare, compare_commands.trend):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Every error a user can cause is one line and an exit status."""
    if _WINDOWS:
        print("zimage: MLX does not run on Windows itself; install zimage inside WSL2 (Ubuntu)", file=sys.stderr)
        return 2
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: what goes there is not wanted
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = cli.main(given, prog_name="zimage", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # `| head` has seen enough; click makes an exit of it, and only of it
        terminal.mute_output()
        return 0
    except (OSError, click.ClickException, ZImageError) as error:
        return _explain(error, given)
    except (KeyboardInterrupt, click.Abort):
        terminal.complain("stopped")
        return 1
    return status if isinstance(status, int) else 0


def _explain(error: Exception, given: Sequence[str]) -> int:
    """Say in one line what went wrong; gives the exit status."""
    if isinstance(error, OSError):
        return _refused_by_system(error)
    line = str(error)
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "zimage"
        if path == "zimage" and given and given[0] in cli.commands:  # click's parser forgets whose options it parses
            path = f"zimage {given[0]}"
        line = f"{' '.join(error.format_message().split())} (see {path} -h)"
    terminal.complain(line)
    return 1 if isinstance(error, DownloadError) else 2


def _refused_by_system(error: OSError) -> int:
    """The line and the status for what the operating system refused and nothing nearer has put into words."""
    place = f"{error.filename}: " if error.filename else ""
    terminal.complain(f"{place}{error.strerror or error}")
    if error.filename != terminal.OUTPUT:
        return 2
    terminal.mute_output()
    return 1  # what was asked for is done, but could not be told


def _source(what: str, no_run: StoreError, store: "Store") -> "SourceInfo":
    """The source that `what` names; where it names none, the error is about what it looks like."""
    from zimage import sources

    try:
        return sources.describe(what)
    except ZImageError as error:
        experiment, _, key = what.rpartition("/")
        looks_like_run = experiment in store.experiments() if experiment else set(key) <= set("0123456789abcdef")
        if not looks_like_run and "/" not in what and not Path(what).exists() and ":" not in what:
            known = f"`zimage list` shows the runs in {store.root}, and a source is {sources.KNOWN_SOURCES}"
            raise StoreError(f"no run, experiment or checkpoint {what!r}: {known}") from None
        raise (no_run if looks_like_run else error) from None


if __name__ == "__main__":
    sys.exit(main())
