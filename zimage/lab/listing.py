"""What the store holds, as data for programs and as lines for people."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from zimage.lab import fitting
from zimage.lab.progress import span
from zimage.lab.runner import describe_failure
from zimage.lab.store import Run, Store
from zimage.measure import peaks

if TYPE_CHECKING:
    from zimage.sources import SourceInfo


def store_content(store: Store, names: list[str] | None = None) -> dict[str, Any]:
    """The experiments (default: all) with their runs, and a line for everything unreadable."""
    experiments, problems = [], []
    for name in store.experiments() if names is None else names:
        runs, unreadable = store.scan(name)
        problems += unreadable
        asked = set() if unreadable and not runs else {run.key for run in store.current_or(name, runs)}
        experiments.append(
            {
                "name": name,
                "question": _question(store, name),
                "runs": [{**_summary(run), "current": run.key in asked} for run in runs],
            }
        )
    return {"results": str(store.root), "experiments": experiments, "problems": problems}


def store_lines(store: Store, content: dict[str, Any]) -> list[str]:
    """`store_content` for a terminal: one line a run, with the parameters that tell runs apart."""
    lines: list[str] = []
    for experiment in content["experiments"]:
        runs = experiment["runs"]
        done = sum(run["status"] == "completed" for run in runs)
        failed = len(runs) - done
        lines.append(f"{experiment['name']}: {done} completed{f', {failed} failed' if failed else ''}")
        if experiment["question"]:
            lines.append(f"  {experiment['question']}")
        telling = _telling(runs)
        for run in runs:
            shown = " ".join(f"{k}={v}" for k, v in run["parameters"].items() if k in telling)
            state = "" if run["current"] else " (superseded)"
            weights = f"{run['weights']} weights  " if run["weights"] else ""
            tail = f"{weights}{run['device']}  {run['started'][:16].replace('T', ' ')}  {span(run['duration_s'])}"
            lines.append(f"  {run['key']}  {run['status']:9}  {run['notebook']}  {shown}  {tail}{state}")
    return lines or [f"{store.root}: no runs yet; `zimage sweep EXPERIMENT.yaml` or `zimage run NOTEBOOK` makes some"]


def run_content(run: Run) -> dict[str, Any]:
    """One run: its run.json, and what it kept."""
    tables = {name: len(run.table(name)) for name in run.tables()}
    pictures = [{"name": p.name, "path": str(p.path), "caption": p.caption} for p in run.pictures()]
    kept = {"tables": tables, "pictures": pictures, "recipes_written": [str(path) for path in run.recipes()]}
    return {**run.meta, "experiment": run.experiment, "path": str(run.path), **kept}


def run_lines(run: Run) -> list[str]:
    """One run for a terminal."""
    meta, content = run.meta, run_content(run)
    weights, measured = meta.get("weights"), peaks.lines(meta.get("peaks"))
    lines = [
        f"{run.experiment}/{run.key}: {run.status}",
        f"  notebook    {run.notebook} (as executed: {run.path / 'notebook.ipynb'})",
        f"  parameters  {', '.join(f'{k}={v}' for k, v in run.parameters.items()) or 'none'}",
        f"  weights     {weights['source']} ({weights['kind']}, {weights['digest'][:16]})" if weights else "",
        f"  recipe      {json.dumps(meta['recipe'])}" if "recipe" in meta else "",
        *(f"  recipe      {name}: {json.dumps(content)}" for name, content in run.mapping("recipes").items()),
        f"  device      {run.device}, MLX {meta['environment'].get('mlx', 'unknown')}",
        f"  peaks       {'; '.join(f'{name} {rate}' for name, rate in measured)}" if measured else "",
        f"  started     {meta['started']}, took {span(meta['duration_s'])}",
        f"  tables      {', '.join(f'{name} ({rows} rows)' for name, rows in content['tables'].items()) or 'none'}",
        f"  pictures    {', '.join(picture['path'] for picture in content['pictures'])}" if content["pictures"] else "",
        *(f"  recipes written  {path}" for path in content["recipes_written"]),
        f"  error       {describe_failure(run)}" if not run.completed else "",
    ]
    return [line for line in lines if line]


def source_content(info: "SourceInfo") -> dict[str, Any]:
    """A checkpoint source without its tensors' values."""
    from zimage.errors import ZImageError

    try:
        info.check()
        problem = None
    except ZImageError as error:
        problem = str(error)
    parts = info.parameters() if problem is None else {}
    return {
        "source": info.source,
        "kind": info.kind,
        "config": info.config.to_dict(),
        "quantization": info.quantization,
        "layers_by_packing": _layers_by_packing(info) if problem is None else {},
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "tensors": len(info.tensors),
        "files": len(info.files),
        "dtypes": list(info.dtypes),
        "bytes": info.bytes,
        "digest": info.digest,
        "steps": fitting.shown_steps(info) if problem is None else [],
        "problem": problem,
    }


def source_lines(content: dict[str, Any]) -> list[str]:
    """`source_content` for a terminal."""
    files = f"{content['files']} file{'s' * (content['files'] > 1)}"
    stored = f"{content['tensors']} tensors in {files}, {content['bytes']:,} bytes"
    parts = content["parameters_by_part"]
    return [
        f"{content['source']}: {content['kind']} weights",
        *([f"  cannot load  {content['problem']}"] if content["problem"] else []),
        *([f"  parameters  {content['parameters']:,}"] if parts else []),
        *(f"    {name:16}{count:>{len(str(content['parameters'])) + 4},}" for name, count in parts.items()),
        f"  stored      {stored if content['tensors'] else 'nothing: the weights are made from a seed'}",
        f"  dtypes      {', '.join(content['dtypes']) or 'as asked for when loading'}",
        f"  quantized   {_packed(content['quantization'], content['layers_by_packing'])}",
        f"  digest      {content['digest']}",
        *([f"  a step      {fitting.shown_line(content['steps'])}"] if content["steps"] else []),
        "  config",
        *(f"    {name}: {value}" for name, value in content["config"].items()),
    ]


def _layers_by_packing(info: "SourceInfo") -> dict[str, int]:
    """How many of the blocks' linear layers are packed in which way, the commonest first, and "none" for the others."""
    from zimage.sources import linears
    from zimage.sources.published import BLOCKS

    if not info.packing:
        return {}
    others = [path for path in linears(info.config) if path.split(".")[0] in BLOCKS and path not in info.packing]
    counts = Counter(map(str, info.packing.values())).most_common()
    return dict(counts) | ({"none": len(others)} if others else {})


def _packed(entry: dict[str, Any] | None, layers: dict[str, int]) -> str:
    """A `quantization` entry, and how many layers are packed in which way, in words."""
    if entry is None:
        return "no"
    if len(layers) <= 1:
        return f"{entry['bits']} bits, {entry['mode']}, group {entry['group_size']}"
    told = [f"{'not packed' if name == 'none' else name} {count}" for name, count in layers.items()]
    return f"layer by layer: {', '.join(told)} of the linear layers in blocks"


def _question(store: Store, name: str) -> str:
    from zimage.errors import StoreError

    try:
        return str(store.experiment(name).get("question", ""))
    except StoreError:
        return ""


def _summary(run: Run) -> dict[str, Any]:
    return {
        "key": run.key,
        "status": run.status,
        "notebook": run.notebook,
        "parameters": run.parameters,
        "device": run.device,
        "weights": str(run.mapping("weights").get("kind", "")),
        "started": run.meta["started"],
        "duration_s": run.meta["duration_s"],
        "error": run.meta.get("error"),
    }


def _telling(runs: list[dict[str, Any]]) -> set[str]:
    """Names of the parameters that are not the same in all runs of one notebook."""
    seen: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for name, value in run["parameters"].items():
            seen.setdefault((run["notebook"], name), set()).add(repr(value))
    return {name for (_, name), values in seen.items() if len(values) > 1}
