"""Stores made by hand, file by file, for what reads them: realistic, hostile or broken, and with no model involved."""

import json
from pathlib import Path
from typing import Any

from zimage.analysis.pareto import Point, Quantity
from zimage.analysis.pareto import rows as pareto_rows
from zimage.analysis.tables import SCHEMAS

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DEVICE = "cpu-amd-epyc-2c"


def arrow(name: str, frame: pd.DataFrame) -> pa.Table:
    """`frame` as the table `name`, unchecked: whoever reads a store may meet rows that no `record` would write."""
    schema = SCHEMAS[name]
    return pa.Table.from_pandas(frame.reindex(columns=schema.names), schema=schema, preserve_index=False)


def stages(scale: float = 1.0, layers: int = 3) -> pd.DataFrame:
    """A profile in which layers.1 is the largest stage beyond doubt and one stage comes out negative."""
    times = {"t_embedder": 0.11, "x_embedder": -0.03, "cap_embedder": 0.09, "noise_refiner.0": 1.9}
    times |= {"context_refiner.0": 0.7} | {f"layers.{i}": 2.1 + 1.4 * (i == 1) for i in range(layers)}
    times["final_layer"] = 0.31
    rows = [
        {
            "arm": "baseline", "stage": name, "view": "prefix", "time_s": 1e-3 * ms * scale,
            "time_low_s": 1e-3 * (ms - 0.12) * scale, "time_high_s": 1e-3 * (ms + 0.16) * scale,
            "parameters": int(448_000 * max(ms, 0.05)), "bytes": int(1_800_000 * max(ms, 0.05)),
        }
        for name, ms in times.items()
    ]  # fmt: skip
    whole = 1e-3 * sum(times.values()) * scale
    rows.append({"arm": "baseline", "stage": "whole step", "view": "whole", "time_s": whole})
    return pd.DataFrame(rows)


def ablation(*rows: tuple[str, str, str, float, float, float, str]) -> pd.DataFrame:
    """Rows of (arm, baseline, scope, ratio, low, high, verdict)."""
    names = ("arm", "baseline", "scope", "ratio", "ratio_low", "ratio_high", "verdict")
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    frame["reason"] = ["interval too wide" if v == "inconclusive" else None for v in frame["verdict"]]
    return frame.assign(regime="burst", p_value=0.01, quads=20, dropped_quads=1, noise_floor=0.004)


def qkv() -> pd.DataFrame:
    pair = ("fused_qkv", "separate_qkv")
    return ablation(
        (*pair, "qkv", 0.931, 0.918, 0.944, "faster"),
        (*pair, "block", 0.988, 0.969, 1.012, "inconclusive"),
        (*pair, "step", 0.998, 0.994, 1.003, "equivalent"),
    )


def loading() -> pd.DataFrame:
    """A plain read, a loader that keeps what it reads and one that packs it, each in three rounds."""
    loads = {"plain read": (2.0, 8e9, 8e9), "zimage": (2.2, 8e9, 8.4e9), "zimage 4bit": (3.1, 2.5e9, 2.6e9)}
    rows = [
        {
            "arm": arm, "round": number, "time_s": time_s * scale, "result_bytes": int(result), "peak_bytes": int(peak),
            "bandwidth_bytes_per_s": result / (time_s * scale),
        }
        for arm, (time_s, result, peak) in loads.items()
        for number, scale in ((1, 1.1), (2, 0.95), (3, 1.0))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def quantization() -> dict[str, pd.DataFrame]:
    """Three arms as the quantization notebook records them."""
    arms = ("float32", "8bit", "4bit")
    memory = [
        {"arm": arm, "stage": stage, "metric": metric, "bytes": size}
        for stage, metric, sizes in (
            ("weights", "weight_bytes", (12_800_000, 3_720_000, 2_110_000)),
            ("step", "peak_bytes", (21_000_000, 12_100_000, 10_400_000)),
        )
        for arm, size in zip(arms, sizes, strict=True)
    ]
    quality = [
        {"arm": arm, "metric": "relative_l2_error", "value": error, "weights_kind": "trained"}
        for arm, error in zip(arms, (0.0, 0.0054, 0.0813), strict=True)
    ] + [
        {"arm": arm, "metric": "digit_accuracy", "value": a, "low": a - 0.012, "high": a + 0.009}
        for arm, a in zip(arms, (0.984, 0.982, 0.96), strict=True)
    ]
    times = ablation(
        ("8bit", "float32", "step", 1.284, 1.262, 1.307, "slower"),
        ("4bit", "float32", "step", 1.121, 1.098, 1.143, "slower"),
    )
    return {"ablation": times, "memory": pd.DataFrame(memory), "quality": pd.DataFrame(quality)}


def operations() -> pd.DataFrame:
    """A block's operations under a roof of 8e14 FLOP/s and 3e12 B/s, and what is left over, negative."""
    peak, bandwidth = 8e14, 3e12
    rows = []
    for name, flops, size, attained in (
        ("adaln", 2e9, 6e7, 0.5),
        ("attention_norm1", 1e8, 6.4e7, 0.45),
        ("to_q", 1.2e11, 9e7, 0.62),
        ("qk_norm", 2e8, 1.3e8, 0.5),
        ("rope", 1e8, 1.4e8, 0.3),
        ("sdpa", 2.6e11, 1.2e8, 0.51),
        ("to_out", 1.2e11, 9e7, 0.61),
        ("swiglu", 2e8, 2.5e8, 0.8),
        ("w2", 3.2e11, 2.1e8, 0.77),
    ):
        roof_s, bound = max((flops / peak, "compute"), (size / bandwidth, "memory"))
        time_s = roof_s / attained
        rows.append(
            {
                "operation": name,
                "time_s": time_s,
                "time_low_s": 0.97 * time_s,
                "time_high_s": 1.04 * time_s,
                "flops": flops,
                "bytes": int(size),
                "intensity_flop_per_byte": flops / size,
                "attained_fraction": attained,
                "bound": bound,
            }
        )
    rows.append({"operation": "unattributed", "time_s": -4e-5})
    return pd.DataFrame(rows).assign(arm="baseline", stage="layers.0")  # fmt: skip


def modules() -> pd.DataFrame:
    """A module tree of three levels whose root is the whole step."""
    rows = [("", 100, 1.0), ("layers", 90, 0.9), ("layers.0", 45, 0.45), ("layers.0.attention", 15, 0.2)]
    rows += [("layers.0.attention.to_out.0", 4, 0.1), ("layers.0.feed_forward", 20, 0.2), ("final_layer", 10, 0.1)]
    return pd.DataFrame(
        [
            {"arm": "baseline", "path": path, "parameters": n, "bytes": 2 * n, "flops": 2e6 * n, "time_s": 0.01 * share,
             "share": share}
            for path, n, share in rows
        ]
    )  # fmt: skip


def scaling() -> pd.DataFrame:
    """Times over sizes: three to calibrate with, three held out and 2, 4 and 10 % off."""
    rows = [
        (256, "calibration", 0.0), (512, "calibration", 0.0), (1024, "calibration", 0.0), (384, "held out", 0.04),
        (768, "held out", -0.02), (1536, "held out", 0.1),
    ]  # fmt: skip
    return pd.DataFrame(
        [
            {"arm": "baseline", "height": px, "width": px, "batch": 1, "caption_tokens": 32, "use": use,
             "time_s": 1.3e-7 * px**2, "time_low_s": 1.28e-7 * px**2, "time_high_s": 1.33e-7 * px**2,
             "predicted_s": 1.3e-7 * px**2 * (1 + error), "error": error, "flops": 5e7 * px**2, "mfu": 0.5}
            for px, use, error in rows
        ]
    )  # fmt: skip


def axes() -> pd.DataFrame:
    """One thing at a time: a shape that is the same, one that is not, a batch and a caption, with predictions."""
    rows = [
        ("resolution", (1024, 1024, 1, 32), (512, 512, 1, 32), 3.2, 3.25, "slower"),
        ("aspect", (512, 2048, 1, 32), (1024, 1024, 1, 32), 1.001, 1.0, "equivalent"),
        ("aspect", (2048, 512, 1, 32), (1024, 1024, 1, 32), 1.03, 1.0, "slower"),
        ("batch", (512, 512, 8, 32), (512, 512, 1, 32), 0.86, 0.9, "faster"),
        ("caption", (1024, 1024, 1, 512), (1024, 1024, 1, 32), 1.14, 1.13, "slower"),
    ]
    names = ("height", "width", "batch", "caption_tokens")
    return pd.DataFrame(
        [
            {"axis": axis, **dict(zip(names, size, strict=True)),
             **{f"beside_{n}": v for n, v in zip(names, beside, strict=True)}, "tokens": 4128, "ratio": ratio,
             "ratio_low": 0.996 * ratio, "ratio_high": 1.004 * ratio, "predicted_ratio": predicted, "verdict": verdict}
            for axis, size, beside, ratio, predicted, verdict in rows
        ]
    ).assign(arm="baseline")  # fmt: skip


def crossover() -> pd.DataFrame:
    """A crossing by every method, and the block's times that one of them comes from."""
    found = [("FLOPs alone", 23040, None), ("calibrated rates", 31000, 0.05), ("operations of a block", 18000, 0.03)]
    answers = [
        {"method": method, "tokens": n, "side_px": 16 * n**0.5, "note": "extrapolated" if "block" in method else "",
         "tokens_low": wide and n * (1 - wide), "tokens_high": wide and n * (1 + wide)}
        for method, n, wide in found
    ]  # fmt: skip
    times = [
        {"method": "operations of a block", "tokens": n, "attention_s": 8.3e-11 * n**2, "linear_s": 1.5e-6 * n,
         "note": "measured"}
        for n in (1056, 4128, 9248, 16416)
    ]  # fmt: skip
    return pd.DataFrame([*answers, *times]).assign(arm="baseline")


def pareto() -> pd.DataFrame:
    """Arms as the notebook pareto records them: some on the front, some not to be told from it, two dominated."""
    arms = {  # time ratio and how far its interval reaches, GB, error and how far its interval reaches
        "float32": (3.9, 0.03, 26.1, 0.0, 0.0),
        "bfloat16": (1.0, 0.0, 13.6, 0.011, 0.001),
        "bfloat16 + fast": (0.69, 0.004, 13.6, 0.0109, 0.001),
        "bfloat16 + fast + reuse_every_2nd": (0.36, 0.004, 13.9, 0.34, 0.04),
        "8bit": (1.24, 0.01, 9.5, 0.0165, 0.002),
        "8bit + fast": (0.73, 0.01, 9.4, 0.0161, 0.002),
        "6bit + fast": (0.81, 0.02, 7.8, 0.048, 0.005),
        "4bit + fast": (0.71, 0.006, 6.3, 0.17, 0.02),
        "4bit-g32 + fast": (0.78, 0.01, 6.6, 0.15, 0.02),
        "nvfp4 + fast": (0.77, 0.01, 6.3, 0.19, 0.02),
        "mxfp4 + fast": (0.78, 0.01, 6.1, 0.27, 0.03),
    }
    points = [
        Point(name, Quantity(t - dt, t, t + dt), Quantity.exact(1e9 * size), Quantity(max(e - de, 0), e, e + de))
        for name, (t, dt, size, e, de) in arms.items()
    ]
    paired = {("bfloat16 + fast", "bfloat16"): (0.98, 1.03), ("4bit + fast", "nvfp4 + fast"): (0.8, 0.9)}
    return pd.DataFrame(pareto_rows(points, paired)).assign(baseline="bfloat16", weights_kind="synthetic")


def power() -> pd.DataFrame:
    """One arm's burst, with everything readable, and one whose machine tells nothing."""
    known = {"steps": 100, "time_s": 0.13, "energy_j": 80.0, "power_w": 615.0, "clock_hz": 1.755e9,
             "temperature_c": 61.0, "throttle": "power cap"}  # fmt: skip
    return pd.DataFrame(
        [{"arm": "baseline", "scope": "step", "regime": "burst", **known}, {"arm": "b", "scope": "step"}]
    )


def samples(*arms: str, time_s: float = 0.0112) -> pd.DataFrame:
    random = np.random.default_rng(7)
    rows = []
    for place, arm in enumerate(arms):
        values = time_s * (1 + 0.05 * place) * np.exp(0.02 * random.standard_normal(40))
        rows += [
            {"arm": arm, "trial": 0, "position": i, "kind": "sample" if i > 1 else "warm-up", "time_s": float(v)}
            for i, v in enumerate(values)
        ]
    return pd.DataFrame(rows).assign(dropped=False)


def picture(seed: int, noise: float) -> Image.Image:
    """Two rows of blobs on black: small enough to need enlarging, as digits do."""
    y, x = np.mgrid[0:8, 0:8]
    random = np.random.default_rng(seed)
    cells = [np.exp(-((x - 3.5) ** 2 + (y - 2 - i % 3) ** 2) / (2 + i % 4)) for i in range(10)]
    grid = np.block([[np.pad(c, 1) for c in cells[:5]], [np.pad(c, 1) for c in cells[5:]]])
    return Image.fromarray((255 * np.clip(grid + noise * random.random(grid.shape), 0, 1)).astype("uint8"))


def add_run(
    root: Path,
    experiment: str,
    key: str,
    tables: dict[str, pd.DataFrame] | None = None,
    pictures: dict[str, tuple[Image.Image, str]] | None = None,
    **meta: Any,
) -> Path:
    """Put one run on disk as the store lays it out; `meta` overrides what its run.json says."""
    folder = root / experiment / key
    (folder / "tables").mkdir(parents=True)
    content: dict[str, Any] = {
        "schema": 1, "status": "completed", "experiment": experiment, "run_key": key,
        "notebook": "notebooks/profile_layers.ipynb", "parameters": {"source": "digits", "height": 8, "seed": 0},
        "device": DEVICE, "environment": {"device": DEVICE, "mlx": "0.32.4", "blas": "openblas 0.3.29", "os": "Linux"},
        "weights": {"source": "digits", "kind": "trained", "digest": "9f2c"}, "digests": {},
        "started": "2026-11-24T04:12:09+00:00", "duration_s": 21.4, "versions": {"zimage": "0.1.0"},
        "error": None, "failed_cell": None,
    }  # fmt: skip
    content |= meta
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "notebook.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    for name, frame in (tables or {}).items():
        shared = {"run_key": key, "experiment": experiment, "device": content["device"]}
        pq.write_table(arrow(name, frame.assign(**shared)), folder / "tables" / f"{name}.parquet")
    for name, (image, caption) in (pictures or {}).items():
        (folder / "pictures").mkdir(exist_ok=True)
        image.save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.json").write_text(json.dumps({"caption": caption}))
    return folder


def add_experiment(root: Path, name: str, question: str, keys: list[str]) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    content = {"name": name, "question": question, "notebooks": [], "parameters": {}, "run_keys": keys}
    (root / name / "experiment.json").write_text(json.dumps(content))


def quickstart(root: Path) -> Path:
    """All three notebooks on digits in one experiment, as experiments/quickstart.yaml leaves them."""
    size = {"arm": "baseline", "metric": "peak_bytes"}
    memory = pd.DataFrame(
        [{**size, "stage": s, "bytes": b} for s, b in (("step", 21_000_000), ("layers.1", 9_000_000))]
        + [{**size, "stage": "step", "metric": "predicted_peak_bytes", "bytes": 20_000_000}]
    )
    tables = {"stages": stages(), "samples": samples("baseline"), "memory": memory, "operations": operations()}
    tables |= {"modules": modules(), "power": power().iloc[:1]}
    add_run(root, "quickstart", "aa11aa11aa11", tables)
    error = pd.DataFrame([{"arm": "fused_qkv", "metric": "relative_l2_error", "value": 3.1e-7}])
    tables = {"ablation": qkv(), "samples": samples("separate_qkv", "fused_qkv"), "quality": error}
    add_run(root, "quickstart", "bb22bb22bb22", tables, notebook="notebooks/qkv_fusion.ipynb")
    drawn = {
        f"digits_{arm}": (picture(place, noise), f"{arm}: 0 to 9, 20 Euler steps, seed 0")
        for place, (arm, noise) in enumerate((("float32", 0.0), ("8bit", 0.05), ("4bit", 0.3)))
    }
    tables = {**quantization(), "samples": samples("float32", "8bit", "4bit")}
    add_run(root, "quickstart", "cc33cc33cc33", tables, drawn, notebook="notebooks/quantization.ipynb")
    question = "Where does a step's time go, does fusing QKV help, and what do 4 bits do to time, size and pictures?"
    add_experiment(root, "quickstart", question, ["aa11aa11aa11", "bb22bb22bb22", "cc33cc33cc33"])
    return root


def swept(root: Path) -> Path:
    """One notebook at three sizes of a synthetic model, of which one failed, and a run of an earlier sweep."""
    weights = {"source": "synthetic:turbo", "kind": "synthetic", "digest": "s1"}
    keys = []
    for place, height in enumerate((512, 1024)):
        key = f"{place + 1}d" * 6
        keys.append(key)
        profile = stages(scale=40.0 * height / 512, layers=30)
        tables = {"stages": profile, "ablation": qkv().assign(ratio=lambda f, p=place: f["ratio"] - 0.002 * p)}
        add_run(root, "turbo_sizes", key, tables, parameters={"height": height, "seed": 0}, weights=weights)
    failure = {"status": "failed", "error": "BackendError: out of memory at layers.17: use a smaller height"}
    add_run(root, "turbo_sizes", "3d3d3d3d3d3d", parameters={"height": 2048, "seed": 0}, weights=weights, **failure)
    add_run(root, "turbo_sizes", "4d4d4d4d4d4d", {"stages": stages()}, started="2026-10-01T00:00:00+00:00")
    add_experiment(root, "turbo_sizes", "How does a step grow with the picture?", [*keys, "3d3d3d3d3d3d"])
    return root


def across_versions(root: Path) -> Path:
    """One comparison on three versions of MLX, of which only the last is current; the last loses what fusing gained."""
    parameters = {"source": "digits", "height": 8, "width": 8, "seed": 0, "quads": 40}
    for place, (mlx, shift) in enumerate((("0.31.2", 0.002), ("0.32.4", 0.0), ("0.33.0", 0.055))):
        moved = qkv()
        ends = ["ratio", "ratio_low", "ratio_high"]
        moved[ends] = moved[ends] + shift
        moved.loc[moved["ratio_low"] > 1, ["verdict", "reason"]] = "slower", None
        facts = {"device": DEVICE, "mlx": mlx, "zimage": "0.1.0", "commit": "7cc0d6b00000", "os": "Linux"}
        timed = samples("separate_qkv", "fused_qkv", time_s=0.0112 * (1 - 0.03 * place))
        add_run(
            root, "qkv_fusion", f"{place + 1}f" * 6,
            {"ablation": moved, "samples": timed.assign(scope="step", regime="burst")},
            notebook="notebooks/qkv_fusion.ipynb", parameters=parameters, environment=facts,
            digests={"sources": "5" * 64}, started=f"2026-1{place}-24T04:12:09+00:00",
        )  # fmt: skip
    add_experiment(root, "qkv_fusion", "Does one fused QKV projection beat three on this device?", ["3f" * 6])
    return root
