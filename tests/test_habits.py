"""What holds for the repository as a whole: style, types, what may import what, and what is never committed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zimage

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "zimage"
# Lowest first. A module imports from its own row and from those below it, never from above.
ROWS = (
    {"config", "errors", "lengths", "quantization", "strict", "yaml_lines"},
    {
        *("measure", "backend", "blas", "choices", "doctor", "machine", "names", "practices", "reusing", "sensors"),
        *("streams", "transform_names", "trust"),
    },
    {"sources", "hub"},
    {"adapters", "recipes", "recipe_files", "mixing"},
    {"kernels", "rope", "patchify", "rounding", "launching", "caching", "contents"},
    {"transformer", "layers", "modulation"},
    {"transforms", "fusing", "half", "tuning", "step_caching", "details", "execution"},
    {"saving", "weights"},
    {"low_memory"},
    {
        *("loaders", "pipeline", "digits", "scheduler", "inputs", "arms", "operations", "peers", "quality"),
        *("sensitivity", "scopes", "ladder", "orders", "levers", "ablation"),
    },
    {"analysis"},
    {"lab"},
    {"options", "compare_commands", "run_commands", "cli", "__main__"},
)
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}
# Results are read and drawn again on machines that have no MLX.
WITHOUT_MLX = (
    *("analysis", "lab.store", "lab.dashboard", "measure.statistics", "measure.samples", "measure.comparison"),
    *("measure.processes", "measure.fresh", "measure.loading"),
    *("measure.arguments", "measure.quads", "measure.floor", "measure.blocks", "measure.power"),
    *("lab.comparing", "lab.rerunning", "lab.trends", "compare_commands", "options"),
    *("lab.claims", "lab.fitting", "quantization", "recipes", "recipe_files", "mixing", "lengths", "sources", "hub"),
    *("names", "practices", "reusing", "streams", "transform_names", "ladder", "levers", "lab.values", "lab.notebook"),
    "adapters",
)
HEAVY = ("mlx.core", "jupyterlab", "jupyter_client", "papermill", "plotly", "pandas", "pyarrow", "torch", "sklearn")
LARGEST_BYTES = 10_000_000


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `zimage`; the package itself is ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _below_zimage(name: str) -> Iterator[str]:
    """`zimage.a.b` as `a.b`, `zimage` as ''; nothing for other packages."""
    if name == "zimage" or name.startswith("zimage."):
        yield name.removeprefix("zimage").removeprefix(".")


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules below `zimage` that a file imports anywhere in it, also as lazy attributes of `zimage` itself."""
    names = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _below_zimage(alias.name)
                names = names or (alias.name.split(".")[0] == "zimage" and alias.asname is None)
        elif isinstance(node, ast.ImportFrom) and node.module == "zimage":
            for alias in node.names:
                yield from _attribute(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from _below_zimage(node.module or "")
    if names:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "zimage":
                yield from _attribute(node.attr)


def _attribute(name: str) -> Iterator[str]:
    """The module that `zimage.<name>` brings in."""
    if name in ROW_OF:
        yield name
    elif name in zimage._HOMES:
        yield from _below_zimage(zimage._HOMES[name])
    else:
        yield ""


def _upward(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that don't point down."""
    own = ROW_OF[module.split(".")[0]]
    return [name for name in _imports(tree) if name and ROW_OF.get(name.split(".")[0], len(ROWS)) > own]


def _names_mlx(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name == "mlx" or name.startswith("mlx.") for name in names):
            return True
    return False


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def _passes(*command: str) -> None:
    done = _run(sys.executable, "-m", *command)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    """`ruff check` passes on the whole repository."""
    _passes("ruff", "check", "--no-cache", ".")


def test_files_are_formatted() -> None:
    """`ruff format` would change no file."""
    _passes("ruff", "format", "--no-cache", "--check", ".")


def test_types_check() -> None:
    """Strict mypy passes on the package."""
    _passes("mypy")


@pytest.mark.parametrize("module", [name for name in _modules() if name])
def test_imports_point_down(module: str) -> None:
    """A module has a place among the rows and imports only from its own row and those below."""
    assert module.split(".")[0] in ROW_OF, f"zimage.{module} has no row: give it one, in the layout's order"
    assert not _upward(module, _parse(_modules()[module]))


def test_the_package_itself_imports_only_what_prepares_mlx() -> None:
    """zimage/__init__.py imports backend and errors; the rest is for type checkers and loads on first use."""
    tree = _parse(_modules()[""])
    at_run_time = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    assert set(_imports(ast.Module(at_run_time, []))) <= {"backend", "errors"}


@pytest.mark.parametrize(
    ("module", "code", "upward"),
    [
        ("measure.timing", "def f():\n    from zimage.transformer import Transformer", ["transformer"]),
        ("measure.timing", "import zimage\nmodel = zimage.load_transformer('digits')", ["weights"]),
        ("transformer", "from zimage import scheduler, rope, __version__", ["scheduler"]),
        ("analysis.plots", "import zimage.lab.store", ["lab.store"]),
        ("rope", "from zimage.nowhere import x", ["nowhere"]),
        ("lab.sweep", "import zimage\nfrom zimage import sources\nprint(zimage.__version__)", []),
    ],
)
def test_the_import_rule_sees_every_way_to_import(module: str, code: str, upward: list[str]) -> None:
    """Imports inside functions, from the package, and lazy attributes of it are all held to the rule."""
    assert _upward(module, ast.parse(code)) == upward


def _without_mlx() -> list[str]:
    return [name for name in _modules() if any(name == part or name.startswith(f"{part}.") for part in WITHOUT_MLX)]


def test_what_reads_results_does_not_name_mlx() -> None:
    """Modules that work without MLX don't import it, not even inside a function."""
    assert {"lab.store", "lab.dashboard", "analysis.plots"} <= set(_without_mlx())
    assert [name for name in _without_mlx() if _names_mlx(_parse(_modules()[name]))] == []
    assert _names_mlx(_parse(_modules()["transformer"]))


def test_what_reads_results_loads_without_mlx() -> None:
    """Modules that work without MLX can be imported where importing it fails, so nothing they import loads it."""
    code = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx" or name.startswith("mlx."):
            raise ImportError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
try:
    importlib.import_module("zimage.transformer")
except ImportError:
    print("blocked")
"""
    done = _run(sys.executable, "-W", "error", "-c", code, *(f"zimage.{name}" for name in _without_mlx()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked"


def test_importing_zimage_is_quick_and_loads_nothing_heavy() -> None:
    """`import zimage` takes less than 0.3 s (the best of five) and loads none of the heavy packages."""
    code = f"""
import json, sys, time
start = time.perf_counter()
import zimage
time_s = time.perf_counter() - start
print(json.dumps([time_s, [name for name in {HEAVY} if name in sys.modules]]))
"""
    times = []
    for _ in range(5):
        done = _run(sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        time_s, loaded = json.loads(done.stdout)
        assert loaded == []
        times.append(time_s)
        if time_s < 0.3:
            break
    assert min(times) < 0.3, times


def test_lazy_names_exist() -> None:
    """Every public name of the package that has a file can be reached, and an unknown one is an AttributeError."""
    modules = _modules()
    for name, home in zimage._HOMES.items():
        if home.removeprefix("zimage.") in modules:
            assert getattr(zimage, name) is not None
    for name in zimage._MODULES:
        if name in modules:
            assert getattr(zimage, name).__name__ == f"zimage.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zimage.nothing


def _notebooks() -> list[Path]:
    return sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def test_notebooks_hold_no_outputs_and_are_parameterized() -> None:
    """Every notebook is without outputs and has one parameters cell of typed single assignments."""
    for path in _notebooks():
        cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), f"{path.name} has outputs"
        tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1, f"{path.name} has {len(tagged)} parameters cells"
        for node in ast.parse("".join(tagged[0]["source"]), type_comments=True).body:
            typed = isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Assign) and node.type_comment)
            assert typed, f"{path.name}, parameters cell, line {node.lineno}: one assignment with its type"


def _committed() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = _run("git", "ls-files", "-z")
    assert listed.returncode == 0, listed.stderr
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_committed_file_is_large() -> None:
    """No file under version control is larger than 10 MB."""
    files = _committed()
    assert files
    assert [str(path) for path in files if path.stat().st_size > LARGEST_BYTES] == []


def _unsafe(tree: ast.AST) -> list[str]:
    """Calls and imports that run what a file holds: pickles, evaluated text, YAML objects, shells."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    banned = {
        "yaml": {"unsafe_load", "full_load", "load_all", "Loader", "UnsafeLoader", "FullLoader"},
        "os": {"system"},
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
            found.append(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module in banned:
            found += [f"{node.module}.{a.name}" for a in node.names if a.name in banned[node.module]]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            found += [f"{name}.{node.attr}"] if node.attr in banned.get(name, ()) else []
        elif isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(node: ast.Call) -> list[str]:
    """What is unsafe about one call, by its name or its arguments."""
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_true(name: str) -> bool:
        value = given.get(name)
        return value is not None and not (isinstance(value, ast.Constant) and value.value is False)

    called = ast.unparse(node.func)
    found = [called] if called in ("eval", "exec", "compile", "__import__", "torch.load") else []
    found += [f"{called}({name}=)" for name in ("allow_pickle", "shell") if is_true(name)]
    if called in ("yaml.load", "yaml.load_all") and "Loader" not in given:
        found.append(f"{called} without Loader=")
    return found


def test_nothing_runs_what_a_file_holds() -> None:
    """The package never unpickles, evaluates text, loads YAML objects or starts a shell."""
    unsafe = {name: _unsafe(_parse(path)) for name, path in _modules().items()}
    assert {name: found for name, found in unsafe.items() if found} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import full_load",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "torch.load(path)",
    ],
)
def test_unsafe_code_is_recognised(code: str) -> None:
    """The check for unsafe code finds each kind of it, and leaves mx.eval and safe loaders alone."""
    assert _unsafe(ast.parse(code))
    assert not _unsafe(ast.parse("mx.eval(x); model.eval(); yaml.safe_load(t); np.load(p, allow_pickle=False)"))


def test_every_test_states_its_claim() -> None:
    """Every test function of the suite has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(_parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
        if not ast.get_docstring(node)
    ]
    assert silent == []
