"""The run key: a digest of everything that decides what a run would compute and measure."""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.errors import BackendError, InputError
from zimage.lab.notebook import Notebook

if TYPE_CHECKING:
    from zimage.recipes import Recipe
    from zimage.sources import SourceInfo

NAMED_FACTS = ("device", "mlx", "driver", "blas", "kernels", "tuning")  # of the machine, in a run's key
_OF_ARMS = ("arms", "modes")  # parameters that list arms or packings, of which any may be a recipe's file
KEY_LENGTH = 16  # hex digits: 64 bits
_FACTS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Weights:
    """The weights that a run's `source` parameter names."""

    source: str
    kind: str
    digest: str


@dataclass(frozen=True)
class Identity:
    """A run's key and what it is made of."""

    key: str
    digests: dict[str, str]
    weights: Weights | None
    facts: dict[str, str]  # about the device that the run is for
    recipe: dict[str, Any] | None = None  # what is in the file that the run's `quantization` parameter names, if one
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)  # and in those that its arms name, by their labels


def identify(notebook: Notebook, parameters: dict[str, Any], root: Path) -> Identity:
    """The identity of the run of `notebook` with all its `parameters`, on the device that its `device` asks for.

    root: the folder that the run will work in, so that a relative `source` means the same here. A recipe counts with
    its content, and where it is an arm with its name, not by its path. Raises WeightsError for a source that cannot be
    had, InputError for a recipe, and BackendError for a device.
    """
    facts = device_facts(str(parameters.get("device", "auto")))
    source = parameters.get("source")
    weights = _weights(source, root) if isinstance(source, str) else None
    digests = {"notebook": _digest(*notebook.code), "sources": sources_digest()}
    if weights is not None:
        digests["weights"] = weights.digest
    recipe, others = recipe_in(parameters, root), recipes_of_arms(parameters, root)
    if recipe is not None:
        digests["recipe"] = recipe.digest
        parameters = {**parameters, "quantization": None}
    if others:
        digests |= {f"recipe {name}": other.digest for name, other in others.items()}
        parameters = {**parameters, **_without_folders(parameters)}
    chosen = {k: v for k, v in facts.items() if k in NAMED_FACTS or k.startswith("MLX_")}
    ingredients = {"parameters": parameters, "digests": digests, "facts": chosen}
    key = _digest(json.dumps(ingredients, sort_keys=True, allow_nan=False))[:KEY_LENGTH]
    contents = {name: other.content for name, other in others.items()}
    return Identity(key, digests, weights, facts, None if recipe is None else recipe.content, contents)


def recipe_in(parameters: dict[str, Any], root: Path) -> "Recipe | None":
    """The recipe in the file that `quantization` names for a run in the folder `root`; None where it names no file.

    Raises InputError for a file that is no recipe.
    """
    from zimage import recipes

    asked = parameters.get("quantization")
    if not recipes.is_file(asked):
        return None
    with chdir(root):
        return recipes.read(asked)


def recipes_of_arms(parameters: dict[str, Any], root: Path) -> "dict[str, Recipe]":
    """The recipes in the files that `arms` and `modes` name for a run in the folder `root`, by their labels.

    Raises InputError for a file that is no recipe, and for different recipes in files of one name.
    """
    from zimage import recipes

    found: dict[str, Recipe] = {}
    with chdir(root):
        for file in filter(None, (recipes.file_of(arm) for arms in _arms(parameters).values() for arm in arms)):
            recipe, name = recipes.read(file), str(recipes.label(file))
            if found.setdefault(name, recipe).content != recipe.content:
                raise InputError(f"{file}: another recipe's file is called {name} too, and so would its arm; rename it")
    return found


def _arms(parameters: dict[str, Any]) -> dict[str, list[Any]]:
    named = {name: parameters.get(name) for name in _OF_ARMS}
    return {name: value for name, value in named.items() if isinstance(value, list)}


def _without_folders(parameters: dict[str, Any]) -> dict[str, list[Any]]:
    """The parameters that name arms, with the labels of recipes in place of their files."""
    from zimage import recipes

    def named(arm: Any) -> Any:
        file = recipes.file_of(arm)
        return arm if file is None else arm.replace(file, str(recipes.label(file)), 1)

    return {name: [named(arm) for arm in arms] for name, arms in _arms(parameters).items()}


def weights_meta(weights: Weights | None) -> dict[str, str] | None:
    """`weights` as run.json holds them."""
    return None if weights is None else asdict(weights)


def _digest(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


@functools.cache
def sources_digest() -> str:
    """A digest of the installed zimage's Python files, by relative path."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix())
    parts = [(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    return _digest(*(text for part in parts for text in part))


@functools.cache
def _weights(source: str, root: Path) -> Weights:
    info = described(source, root)
    with chdir(root):  # where the paths of a relative source lead somewhere
        return Weights(source, str(info.kind), str(info.digest))


@functools.cache
def described(source: str, root: Path) -> "SourceInfo":
    """The source that runs in the folder `root` find under this name. Raises WeightsError or ConfigError for none."""
    from zimage import sources

    with chdir(root):
        return sources.describe(source)


@functools.cache
def device_facts(device: str = "auto", python: str = "") -> dict[str, str]:
    """The facts about this machine and `device`, asked of another process so that this one need not load MLX.

    python: the interpreter whose zimage is asked; this one's where it is "". Raises BackendError where it cannot be.
    """
    # Where warnings are errors, runpy's remark that the package has loaded the module already would be one. Another
    # interpreter has a zimage of its own, which one in the folder that we are in must not stand for.
    command = [python or sys.executable, "-W", "ignore", *(["-P"] if python else []), "-m", "zimage.backend", device]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_FACTS_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise BackendError(f"the device did not answer within {_FACTS_TIMEOUT_S:.0f} s; run zimage doctor") from None
    except (OSError, ValueError) as error:
        raise BackendError(f"{python}: cannot be started: {error}; name a Python interpreter") from None
    try:
        facts = json.loads(answer.stdout)
    except ValueError:
        facts = None
    if answer.returncode != 0 or not isinstance(facts, dict) or "device" not in facts:
        said = [line for line in answer.stderr.strip().splitlines() if line.strip()]
        reason = said[-1] if said else f"exit status {answer.returncode}"
        own = ("zimage: device ", "zimage: no GPU ")  # what was asked of a device that is well
        if not python and answer.returncode == 2 and reason.startswith(own):
            raise BackendError(reason.removeprefix("zimage: "))
        asked, doctor = "the device", "zimage doctor"
        if python:
            asked, doctor = f"{python}: its zimage", f"{python} -m zimage doctor"
        raise BackendError(f"{asked} cannot be asked ({reason.removeprefix('zimage: ')}); run {doctor}")
    return {str(name): str(value) for name, value in facts.items()}


def versions() -> dict[str, str]:
    """Versions of what takes part in a run."""
    found = {"python": platform.python_version()}
    for name in ("zimage", "mlx", "numpy", "pandas", "pyarrow", "papermill", "nbclient", "ipykernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
