"""What a notebook calls to keep a table or a picture with its run.

The runner says where through the environment: ZIMAGE_RUN_DIR, ZIMAGE_RUN_KEY, ZIMAGE_EXPERIMENT, ZIMAGE_DEVICE and
ZIMAGE_WEIGHTS_KIND. Without them, by hand in JupyterLab or under papermill alone, the same calls just show what they
are given.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.errors import ExperimentError
from zimage.lab.files import NAME, write_atomically, write_json

if TYPE_CHECKING:
    from zimage.recipes import Recipe

    import numpy as np
    import pandas as pd
    from PIL.Image import Image


def record(name: str, frame: "pd.DataFrame") -> None:
    """Keep `frame` as the table `name` of this run; a second call with the same name appends its rows.

    `name` is one of zimage.analysis.tables.SCHEMAS. The frame has that table's columns and `arm`; columns it lacks are
    null, and run_key, experiment, device and, where the frame does not say it, weights_kind are filled in here. Raises
    ExperimentError for anything that does not fit, by hand just as in a run.
    """
    from zimage.analysis.tables import conform

    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise ExperimentError(f"record({name!r}, ...): got {type(frame).__name__}; give a pandas DataFrame")
    if not frame.columns.is_unique:
        doubled = [str(column) for column in frame.columns[frame.columns.duplicated()]]
        raise ExperimentError(f"table {name!r}: column {doubled[0]!r} occurs twice; give each column once")
    folder = _run_folder()
    if folder is None:
        conform(name, frame)
        _show(frame)
        return
    shared = {column: os.environ.get(f"ZIMAGE_{column.upper()}", "") for column in ("run_key", "experiment", "device")}
    kind = os.environ.get("ZIMAGE_WEIGHTS_KIND") or None  # none where a run has no weights
    append_rows(folder, name, frame.assign(**shared, weights_kind=frame.get("weights_kind", kind)))


def append_rows(run_folder: Path, name: str, frame: "pd.DataFrame") -> None:
    """Write `frame`, shared columns included, to the run's table `name`, after the rows it already has."""
    from zimage.analysis.tables import conform
    from zimage.lab.store import read_table

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = conform(name, frame)
    path = run_folder / "tables" / f"{name}.parquet"
    if path.exists():
        rows = pa.concat_tables([read_table(path, name), rows])
    write_atomically(path, lambda draft: pq.write_table(rows, draft))


def record_picture(name: str, image: "Image | np.ndarray[Any, Any]", caption: str = "") -> None:
    """Keep `image` as the PNG `name` of this run, in place of an earlier one of that name.

    image: a PIL image, or uint8 of shape [H, W], [H, W, 3] or [H, W, 4]. Raises ExperimentError for anything else.
    """
    picture = _as_image(name, image)
    if not NAME.fullmatch(name):
        raise ExperimentError(f"picture name {name!r}: use letters, digits, '_', '-' and '.'")
    folder = _run_folder()
    if folder is None:
        _show(picture, caption)
        return
    path = folder / "pictures" / f"{name}.png"
    write_json(path.with_name(f"{name}.json"), {"caption": caption})
    write_atomically(path, lambda draft: picture.save(draft, format="PNG"))


def record_recipe(name: str, recipe: "Recipe", comments: Sequence[str] = ()) -> None:
    """Keep a quantization recipe as the file `recipes/NAME.yaml` of this run, which opens with the lines `comments`.

    Raises ExperimentError for a name that a file cannot have.
    """
    from zimage import recipe_files

    if not NAME.fullmatch(name):
        raise ExperimentError(f"recipe name {name!r}: use letters, digits, '_', '-' and '.'")
    folder = _run_folder()
    if folder is not None:
        (folder / "recipes").mkdir(exist_ok=True)
        recipe_files.write(folder / "recipes" / f"{name}.yaml", recipe, comments)
    print(recipe_files.text(recipe, comments), end="")


def _as_image(name: str, image: "Image | np.ndarray[Any, Any]") -> "Image":
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise ExperimentError(f"picture {name!r}: got {type(image).__name__}; give a PIL image or a uint8 array")
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not fits or 0 in image.shape:
        raise ExperimentError(
            f"picture {name!r}: got {image.dtype} of shape {list(image.shape)}; "
            "give uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _run_folder() -> Path | None:
    folder = os.environ.get("ZIMAGE_RUN_DIR")
    return Path(folder) if folder else None


def _show(thing: Any, caption: str = "") -> None:
    """Display in a notebook, print elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display

        interactive = get_ipython() is not None
    except ImportError:
        interactive = False
    if caption:
        print(caption)
    if interactive:
        display(thing)  # type: ignore[no-untyped-call]
    else:
        print(thing)
