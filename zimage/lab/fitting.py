"""Whether runs fit their device, judged before the first of them starts."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage import backend, machine
from zimage.analysis import fitting
from zimage.analysis.fitting import Device, Fit
from zimage.errors import InputError, ZImageError
from zimage.lab import keys, terminal
from zimage.lab.runner import Job

if TYPE_CHECKING:
    from zimage.sources import SourceInfo

SHOWN_PIXELS = (512, 1024)  # sizes that `zimage show` speaks of, for models of latents with 8 pixels each
_SIZES = ("height", "width", "batch", "caption_tokens")
_OPTIONS = ("dtype", "quantization")
_Size = tuple[int, int, int, int]


def of_job(job: Job) -> Fit | None:
    """Whether a run fits the device that it is for, at the largest size it takes.

    None where that cannot be known: the notebook lacks the parameters that say what it computes, the device does not
    tell its memory, or the model does not take such parameters, which `check` refuses.
    """
    try:
        found = _largest(job)
    except ZImageError:
        return None
    return None if found is None else found[1]


def _largest(job: Job) -> tuple[_Size, Fit] | None:
    """The size of a run that needs the most memory, and its Fit. Raises InputError for sizes that no model takes."""
    values, device = job.parameters, Device.of(job.facts)
    if device is None or (device.total_bytes is None and device.recommended_bytes is None):
        return None
    sizes, options = _sizes(values), [values.get(name) for name in _OPTIONS]
    if not isinstance(values.get("source"), str):
        return None
    if not all(value is None or isinstance(value, str) for value in options):
        return None
    try:
        options[1] = keys.recipe_in(values, job.root) or options[1]
    except InputError:
        return None
    fits = {size: _fit(values["source"], job.root, size, tuple(options), job.notebook.models, device) for size in sizes}
    known = {size: fit for size, fit in fits.items() if fit is not None}
    return max(known.items(), key=lambda item: item[1].need_bytes) if known else None


def _sizes(values: Mapping[str, Any]) -> list[_Size]:
    """What a run takes as (height, width, batch, caption tokens): its own `sizes`, or the one that its parameters name.

    Those left out that are no such size.
    """
    listed = values.get("sizes")
    given = listed if isinstance(listed, list) else [[values.get(name) for name in _SIZES]]
    return [
        (size[0], size[1], size[2], size[3])
        for size in given
        if isinstance(size, list) and len(size) == len(_SIZES) and all(type(value) is int for value in size)
    ]


@functools.cache  # the runs of a sweep are often of one size
def _fit(source: str, root: Path, size: _Size, options: tuple[Any, ...], models: float, device: Device) -> Fit | None:
    (height, width, batch, tokens), (dtype, quantization) = size, options
    try:
        info = keys.described(source, root)
    except ZImageError:
        return None  # the run says what is wrong with its source
    return fitting.fits(info, height, width, batch, tokens, dtype, quantization, models, device=device)


def check(jobs: Sequence[Job], force: bool) -> None:
    """Raise InputError where runs cannot fit, or only note it if `force`; note too where one is above what is advised.

    One line names the first such run and how many there are. Raises InputError too for a run whose model does not take
    its sizes, dtype or packing, whatever `force` is.
    """
    found = []
    for job in jobs:
        try:
            largest = _largest(job)
        except ZImageError as error:
            raise InputError(f"{job.notebook.path.name}: {error}; nothing was started") from None
        found += [(job, *largest)] if largest is not None else []
    for verdict in ("cannot fit", "tight"):
        such = [one for one in found if one[-1].verdict == verdict]
        if not such:
            continue
        job, size, fit = such[0]
        count = f" (and {len(such) - 1} more of {len(jobs)} runs)" if len(such) > 1 else ""
        judge(f"{_run(job, size)}{count}", fit, _ways_out(job, fit), force)


def judge(what: str, fit: Fit, ways_out: Sequence[str], force: bool) -> None:
    """Note that `what` is tight, or that it cannot fit if `force`; else raise InputError for the latter.

    ways_out: what to take instead, beside --force.
    """
    if fit.verdict == "cannot fit" and not force:
        ways = ", or ".join([*ways_out, "--force to try all the same"])
        raise InputError(f"{what} cannot fit: {fit.reason}; nothing was started; take {ways}")
    if fit.verdict in ("cannot fit", "tight"):
        terminal.note(f"{what}: {fit.reason}")


def content(fit: Fit | None) -> dict[str, Any] | None:
    """A Fit for programs."""
    if fit is None:
        return None
    limits = {"recommended_bytes": fit.device.recommended_bytes, "memory_bytes": fit.device.total_bytes}
    return {"verdict": fit.verdict, "need_bytes": fit.need_bytes, **limits}


def shown_steps(info: "SourceInfo") -> list[dict[str, Any]]:
    """What a step of a source takes at SHOWN_PIXELS in the dtype that suits this machine, without loading MLX.

    A verdict only for CPUs: what a GPU has only MLX knows. None of it for models that take other sizes, and where MLX
    is missing.
    """
    build = backend.build_kind()
    device_type = {"cpu": "cpu", "missing": "", "source": ""}.get(build, "gpu")
    total = machine.host_memory_bytes() if build == "cpu" else machine.UNKNOWN
    device = Device.of({"device_type": device_type, "mlx_build": build, "memory_bytes": total})
    if device is None or info.config.pixels_per_latent != 8:
        return []
    try:
        found = [(pixels, fitting.fits(info, pixels, pixels, device=device)) for pixels in SHOWN_PIXELS]
    except ZImageError:
        return []
    return [{"height": pixels, "width": pixels, "dtype": fit.dtype, "fit": content(fit)} for pixels, fit in found]


def shown_line(steps: Sequence[dict[str, Any]]) -> str:
    """`shown_steps` in words."""
    from zimage.analysis import units

    told = []
    for step in steps:
        fit = step["fit"]
        verdict = "" if fit["verdict"] == "unknown" else f" ({fit['verdict']} here)"
        told.append(f"{step['height']} px about {units.size(fit['need_bytes'])}{verdict}")
    return f"{', '.join(told)}, in {steps[0]['dtype']}"


def _ways_out(job: Job, fit: Fit) -> list[str]:
    total, ways = fit.device.total_bytes, []
    if total is not None and fit.models * fit.step.weight_bytes < total:
        ways.append("a smaller size")
    if "dtype" in job.parameters and fit.dtype == "float32":
        ways.append("dtype bfloat16")
    if job.parameters.get("quantization", "") is None:
        ways.append("a quantization")
    return ways


def _run(job: Job, size: _Size) -> str:
    height, width, batch, _ = size
    return f"{job.notebook.name}: {job.parameters['source']} at {height} x {width} px, batch {batch}"
