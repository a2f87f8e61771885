"""The result tables: one Arrow schema each, units in the column names.

Every table starts with the columns `run_key, experiment, device, weights_kind, arm`, so that tables of several runs can
be stacked. A notebook supplies `arm` and the table's own columns; the store fills in the rest.
"""

from zimage.errors import ExperimentError

import pandas as pd
import pyarrow as pa

SHARED = (
    pa.field("run_key", pa.string()),
    pa.field("experiment", pa.string()),
    pa.field("device", pa.string()),
    pa.field("weights_kind", pa.string()),  # "trained" or "synthetic"
    pa.field("arm", pa.string()),
)


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([*SHARED, *(pa.field(name, kind) for name, kind in columns.items())])


_TEXT, _FLOAT, _INT, _BOOL = pa.string(), pa.float64(), pa.int64(), pa.bool_()

SCHEMAS: dict[str, pa.Schema] = {
    "stages": _schema(
        stage=_TEXT, view=_TEXT, time_s=_FLOAT, time_low_s=_FLOAT, time_high_s=_FLOAT,
        parameters=_INT, flops=_FLOAT, bytes=_INT, peak_bytes=_INT,
    ),
    "operations": _schema(
        stage=_TEXT, operation=_TEXT, time_s=_FLOAT, time_low_s=_FLOAT, time_high_s=_FLOAT, flops=_FLOAT, bytes=_INT,
        intensity_flop_per_byte=_FLOAT, attained_fraction=_FLOAT, bound=_TEXT,
    ),
    "samples": _schema(
        scope=_TEXT, process=_INT, trial=_INT, quad=_INT, position=_INT, kind=_TEXT, regime=_TEXT, time_s=_FLOAT,
        dropped=_BOOL,
    ),
    "ablation": _schema(
        baseline=_TEXT, scope=_TEXT, regime=_TEXT, ratio=_FLOAT, ratio_low=_FLOAT, ratio_high=_FLOAT, p_value=_FLOAT,
        verdict=_TEXT, reason=_TEXT, verdict_without_drops=_TEXT, quads=_INT, dropped_quads=_INT, noise_floor=_FLOAT,
    ),
    "gains": _schema(
        baseline=_TEXT, scope=_TEXT, blocks=_INT, time_s=_FLOAT, saved_s=_FLOAT, saved_low_s=_FLOAT,
        saved_high_s=_FLOAT, floor_s=_FLOAT,
    ),
    "quality": _schema(
        step=_INT, metric=_TEXT, baseline=_TEXT, value=_FLOAT, low=_FLOAT, high=_FLOAT, count=_INT,
    ),
    "memory": _schema(stage=_TEXT, metric=_TEXT, bytes=_INT),
    "footprint": _schema(
        model=_TEXT, kind=_TEXT, height=_INT, width=_INT, batch=_INT, caption_tokens=_INT, weight_bytes=_INT,
        predicted_bytes=_INT, measured_bytes=_INT, error=_FLOAT,
    ),
    "loading": _schema(
        round=_INT, time_s=_FLOAT, result_bytes=_INT, peak_bytes=_INT, bandwidth_bytes_per_s=_FLOAT,
    ),
    "modules": _schema(
        path=_TEXT, parameters=_INT, bytes=_INT, flops=_FLOAT, time_s=_FLOAT, time_low_s=_FLOAT, time_high_s=_FLOAT,
        share=_FLOAT,
    ),
    "scaling": _schema(
        height=_INT, width=_INT, batch=_INT, caption_tokens=_INT, use=_TEXT, time_s=_FLOAT, time_low_s=_FLOAT,
        time_high_s=_FLOAT, predicted_s=_FLOAT, error=_FLOAT, flops=_FLOAT, mfu=_FLOAT, tokens=_INT, steps=_INT,
        images_per_hour=_FLOAT, sustained_s=_FLOAT, sustained_low_s=_FLOAT, sustained_high_s=_FLOAT,
        sustained_images_per_hour=_FLOAT,
    ),
    "axes": _schema(
        axis=_TEXT, height=_INT, width=_INT, batch=_INT, caption_tokens=_INT, beside_height=_INT, beside_width=_INT,
        beside_batch=_INT, beside_caption_tokens=_INT, tokens=_INT, ratio=_FLOAT, ratio_low=_FLOAT, ratio_high=_FLOAT,
        predicted_ratio=_FLOAT, verdict=_TEXT,
    ),
    "crossover": _schema(
        method=_TEXT, tokens=_FLOAT, tokens_low=_FLOAT, tokens_high=_FLOAT, side_px=_FLOAT, attention_s=_FLOAT,
        linear_s=_FLOAT, note=_TEXT,
    ),
    "sensitivity": _schema(
        unit=_TEXT, kind=_TEXT, quantization=_TEXT, step=_INT, bytes_saved=_INT, velocity_error=_FLOAT,
        end_error=_FLOAT, damage_per_byte=_FLOAT,
    ),
    "additivity": _schema(
        what=_TEXT, metric=_TEXT, changes=_INT, predicted=_FLOAT, measured=_FLOAT, ratio=_FLOAT,
    ),
    "pareto": _schema(
        baseline=_TEXT, time_ratio=_FLOAT, time_ratio_low=_FLOAT, time_ratio_high=_FLOAT, bytes=_INT, bytes_low=_INT,
        bytes_high=_INT, error=_FLOAT, error_low=_FLOAT, error_high=_FLOAT, category=_TEXT, dominated_by=_TEXT,
    ),
    "power": _schema(
        scope=_TEXT, regime=_TEXT, steps=_INT, time_s=_FLOAT, energy_j=_FLOAT, power_w=_FLOAT, clock_hz=_FLOAT,
        memory_clock_hz=_FLOAT, temperature_c=_FLOAT, throttle=_TEXT,
    ),
    "environment": _schema(key=_TEXT, value=_TEXT),
}  # fmt: skip

_KEYS = {  # what a row is about, so it cannot be missing
    "stages": ("stage", "view"),
    "operations": ("stage", "operation"),
    "ablation": ("scope",),
    "gains": ("scope",),
    "quality": ("metric",),
    "memory": ("stage", "metric"),
    "footprint": ("model", "kind", "height", "width", "predicted_bytes"),
    "loading": ("round",),
    "modules": ("path",),
    "scaling": ("height", "width", "use"),
    "axes": ("axis",),
    "crossover": ("method",),
    "sensitivity": ("unit", "kind"),
    "additivity": ("what", "metric"),
    "pareto": ("category",),
    "power": ("scope",),
}


def unusable(name: str, found: pa.Schema) -> str | None:
    """Why a stored table with the columns `found` cannot be used as `name`, or None; what it lacks otherwise is null.

    It needs the columns that say what its rows are about, and text or numbers in those where the schema has such.
    """
    missing = [column for column in ("arm", *_KEYS.get(name, ())) if column not in found.names]
    if missing:
        return f"column{'s' * (len(missing) > 1)} {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    for field in SCHEMAS[name]:
        if field.name not in found.names or pa.types.is_null(found.field(field.name).type):
            continue
        holds, wanted = _kind(found.field(field.name).type), _kind(field.type)
        if holds != wanted:
            return f"column {field.name} holds {holds} in place of {wanted}"
    return None


def _kind(of: pa.DataType) -> str:
    """What a column of that type holds, in words."""
    if pa.types.is_dictionary(of):
        return _kind(of.value_type)
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return "text"
    return "numbers" if pa.types.is_integer(of) or pa.types.is_floating(of) else str(of)


def complete(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns of the table called `name` that it lacks, as missing values."""
    return frame.reindex(columns=[*frame.columns, *(c for c in SCHEMAS[name].names if c not in frame.columns)])


def conform(name: str, frame: pd.DataFrame) -> pa.Table:
    """`frame` as an Arrow table of the schema called `name`; columns it lacks are null.

    Raises ExperimentError for an unknown table, an unknown column, values of the wrong type, or a row that does not
    say what it is about.
    """
    schema = SCHEMAS.get(name)
    if schema is None:
        raise ExperimentError(f"table {name!r} is not known; the tables are {', '.join(SCHEMAS)}")
    unknown = [str(c) for c in frame.columns if c not in schema.names]
    if unknown:
        raise ExperimentError(f"table {name!r}: unknown column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    full = frame.reindex(columns=schema.names)
    for column in _KEYS.get(name, ()):
        if full[column].isna().any():
            raise ExperimentError(f"table {name!r}: column {column!r} has missing values; every row needs one")
    try:
        return pa.Table.from_pandas(full, schema=schema, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ExperimentError(f"table {name!r}: {' '.join(str(error).split())}") from None
