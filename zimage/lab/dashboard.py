"""The pages: one for each experiment and an index, readable from the file system without a network and without MLX.

    results/index.html, results/<experiment>/index.html, results/assets/plotly.min.js

Everything that a run supplied reaches the page escaped: text through the templates, figures as JSON without markup.
"""

import base64
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zimage import __version__
from zimage.analysis import over_runs, units
from zimage.analysis.findings import Brief, Finding
from zimage.analysis.findings import findings as findings_of
from zimage.analysis.matching import OF_THE_MODEL
from zimage.analysis.trends import Trend
from zimage.analysis.trends import findings as findings_of_trend
from zimage.errors import StoreError
from zimage.lab import claims, gain_sections, pareto_sections, trends
from zimage.lab.cases import case
from zimage.lab.files import write_atomically
from zimage.lab.labels import of_parameters, telling
from zimage.lab.sections import Cell, Head, Link, Section, Shown, Table, of_weights
from zimage.lab.store import Run, Store
from zimage.lab.trend_sections import across_versions
from zimage.machine import MOMENTARY, doubts

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

WORDS = {"": "observed", "inconclusive": "undecided"}  # a finding's tag, where it is not the verdict itself
IN_BRIEF = 6  # findings that a terminal shows
ON_A_CARD = 4
ON_A_PAGE = 10
IN_A_LABEL = 4  # items of a list
VERSIONS_ON_A_PAGE = 12  # of a trend
ACRONYMS = {"qkv": "QKV", "rope": "RoPE", "cfg": "CFG", "sdpa": "SDPA", "dit": "DiT"}
_SYNTHETIC = "Synthetic weights are seeded random numbers: times and sizes are real, errors and pictures mean little."


@dataclass(frozen=True)
class Fact:
    """One line of a page's head: a name, what is so, and the tag it is shown as, if any."""

    name: str
    text: str
    tag: str = ""


@dataclass(frozen=True)
class Case:
    """The newest completed run of one notebook with one set of swept parameters on one device."""

    run: Run
    label: str
    tables: dict[str, pd.DataFrame]
    findings: list[Finding]
    trend: Trend | None = None  # across versions, where the store has several


@dataclass(frozen=True)
class Experiment:
    """All that a page says, read from the store once."""

    name: str
    question: str
    runs: list[Run]
    failed: list[Run]
    groups: dict[str, list[Case]]  # by notebook
    joint: list[tuple[Case, Finding]]  # what several cases say together, with one of them
    problems: list[str]
    earlier: str = ""  # what `earlier` says

    @property
    def cases(self) -> list[Case]:
        """The cases of all notebooks."""
        return [one for cases in self.groups.values() for one in cases]

    @property
    def completed(self) -> int:
        """How many of the runs completed."""
        return sum(run.completed for run in self.runs)

    def about(self) -> tuple[str, str]:
        """The devices and the kinds of weights of what is shown."""
        shown = [one.run for one in self.cases] or self.runs
        return " and ".join(dict.fromkeys(run.device for run in shown)), weights_kinds(shown)

    def lines(self) -> list[tuple[Case, Finding]]:
        """Every finding with its case, in the order of the page: first what several runs say together."""
        return [*self.joint, *((one, finding) for one in self.cases for finding in one.findings)]


def build(store: Store, experiments: Iterable[str] | None = None, single_file: bool = False) -> list[Path]:
    """Write the pages of `experiments` (default: all) and the index; returns the pages' paths, the index last.

    With `single_file` every page holds plotly's script and its pictures itself and can be sent around alone. A file is
    replaced whole or not at all. Raises StoreError for an unknown experiment or an unwritable place.
    """
    known = store.experiments()
    chosen = known if experiments is None else list(dict.fromkeys(experiments))
    for name in chosen:
        if name not in known:
            raise StoreError(f"{store.root}: no experiment {name!r}; there are: {', '.join(known) or 'none'}")
    if not single_file:
        _write(store.root / "assets" / "plotly.min.js", get_plotlyjs())
    pages = []
    read = {name: _read(store, name) for name in known}
    judged, problems = claims.on_page(store)
    for name in chosen:
        pages.append(store.root / name / "index.html")
        published = [(one.device, claim) for one in judged for claim in one.of_experiment(name)]
        _write(pages[-1], _experiment_page(read[name], published, single_file))
    pages.append(store.root / "index.html")
    cards = [_card(read[name]) for name in known]
    _write(
        pages[-1],
        _render("index.html", title="Experiments · zimage", cards=cards, claims=judged, problems=problems),
    )
    return pages


def findings(store: Store, experiment: str, keys: Collection[str] | None = None) -> Brief:
    """What the experiment found, or those of its runs that have these keys, in brief."""
    page = _read(store, experiment, keys)
    texts = _shorts(page)
    failed = f"{len(page.failed)} of {_runs(len(page.runs), 'failed')}" if page.failed else ""
    devices, kinds = page.about()
    return Brief(devices or "no device yet", kinds, texts[:IN_BRIEF], max(len(texts) - IN_BRIEF, 0), failed)


def earlier(store: Store, experiment: str) -> str:
    """How many completed runs the page of an experiment no longer shows and what lists them; "" where there are none.

    For a terminal: the command names the store, unless it is the one that commands take by themselves.
    """
    runs = store.runs(experiment)
    command = f"zimage show {experiment}"
    if store.root != Path("results"):
        command += f" --results {shlex.quote(str(store.root))}"
    return _earlier(runs, store.current_or(experiment, runs), "its page", command)


def weights_kind(run: Run) -> str:
    """`trained`, `synthetic`, or "" where the run did not say."""
    kind = run.mapping("weights").get("kind")
    return kind if kind in ("trained", "synthetic") else ""


def weights_kinds(runs: Iterable[Run]) -> str:
    """The kinds of weights of several runs: one of them, `trained and synthetic` in the runs' order, or ""."""
    return " and ".join(dict.fromkeys(filter(None, map(weights_kind, runs))))


def _read(store: Store, name: str, keys: Collection[str] | None = None) -> Experiment:
    every, problems = store.scan(name)
    runs = every
    try:
        asked = store.experiment(name)
        runs, swept = store.current(name), store.swept(name)
    except StoreError:  # scan has reported it already
        asked, swept = {}, []
    unseen = _earlier(every, runs, "this page", f"zimage show {name}")
    runs = [run for run in runs if keys is None or run.key in keys]
    for parameter in OF_THE_MODEL:
        if parameter not in swept and len({of_parameters(run, [parameter]) for run in runs if run.completed}) > 1:
            swept = [*swept, parameter]
    newest: dict[tuple[str, str, str], Run] = {}
    for run in sorted((r for r in runs if r.completed), key=lambda r: str(r.meta["started"])):
        newest[run.notebook, run.device, of_parameters(run, swept)] = run
    chosen = [run for run in runs if run in newest.values()]
    groups, comparable = dict[str, list[Case]](), trends.grouped(every)
    mixed = " and " in weights_kinds(chosen)
    for run in chosen:
        siblings = [r for r in chosen if r.notebook == run.notebook]
        differ = len({of_parameters(r, swept) for r in siblings}) > 1
        label = of_parameters(run, telling(siblings, swept), IN_A_LABEL) if differ else ""
        if len({r.device for r in siblings}) > 1:
            label = f"{run.device}, {label}".rstrip(", ")
        if mixed and (kind := weights_kind(run)):
            label = f"{label}, {_of_weights(kind)}".lstrip(", ")
        tables = {}
        for table in run.tables():
            try:
                tables[table] = run.table(table)
            except StoreError as error:
                problems += [str(error)] if str(error) not in problems else []
        trend = None
        with _reported(run, problems):
            trend = trends.of(run, comparable[run.notebook, run.device], VERSIONS_ON_A_PAGE)
        with _reported(run, problems):
            found = [*findings_of(tables), *(findings_of_trend(trend) if trend else [])]
            one = Case(run, label, tables, found, trend)
            groups.setdefault(run.notebook, []).append(one)
    joint = []
    for notebook, cases in groups.items():
        told = set[int]()
        for kind in dict.fromkeys(weights_kind(one.run) for one in cases):
            alike = [one for one in cases if weights_kind(one.run) == kind]
            with _reported(alike[0].run, problems):
                if found := over_runs.step([(one.label, one.tables) for one in alike]):
                    label = _of_weights(kind) if mixed else ""
                    joint += [(replace(alike[0], label=label), finding) for finding in found]
                    told |= {id(one) for one in alike}
        groups[notebook] = [
            replace(one, findings=[replace(f, short="") for f in one.findings]) if id(one) in told else one
            for one in cases
        ]
    question = asked.get("question")
    failed = [run for run in runs if not run.completed]
    asks = question if isinstance(question, str) else ""
    return Experiment(name, asks, runs, failed, groups, joint, problems, unseen)


def _earlier(every: Sequence[Run], current: Sequence[Run], page: str, command: str) -> str:
    """What `earlier` says, of all runs and of those that the newest sweep asks for; command: what lists the runs.

    It counts no run with whose parameters a newer one has completed on its device: nothing is lost from sight there.
    """
    done = [run for run in current if run.completed]
    asked, shown = {run.key for run in current}, {_measured(run) for run in done}
    kept = sum(run.completed and run.key not in asked and _measured(run) not in shown for run in every)
    if not kept:
        return ""
    start = "" if done else "The newest sweep has no completed run. "
    are, their, them = ("run is", "its files", "it") if kept == 1 else ("runs are", "their files", "them")
    return (
        f"{start}{kept} earlier completed {are} no longer on {page}, as the newest sweep asks for others; "
        f"{their} are kept, and `{command}` lists {them}."
    )


def _measured(run: Run) -> tuple[str, str, str]:
    """What a run measured: notebook, device and all parameters."""
    return run.notebook, run.device, of_parameters(run, sorted(run.parameters))


@contextmanager
def _reported(run: Run, problems: list[str]) -> Iterator[None]:
    """Let a run whose tables hold what no figure or finding can be made of cost a line, not the whole page."""
    try:
        yield
    except StoreError as error:
        problems += [str(error)] if str(error) not in problems else []
    except Exception as error:  # whatever pandas or plotly make of odd values
        problems.append(f"{run.path}: its tables cannot be shown: {type(error).__name__}: {_one_line(error)[:200]}")


def _experiment_page(
    page: Experiment, published: list[tuple[str, tuple[str, str, str, list[str]]]], single_file: bool
) -> str:
    """The page; published: claims that its runs are behind, each with the device, as `claims.Shown` has them."""
    devices, kinds = page.about()
    facts = [Fact("Device", devices or "none yet")]
    if kinds:
        facts.append(Fact("Weights", kinds, kinds))
    facts.append(Fact("Measured", _newest(page.runs)))
    facts.append(Fact("Runs", _runs(page.completed, "completed")))
    if page.failed:
        facts.append(Fact("Failed", f"{len(page.failed)}", "failed"))
    several = len(page.groups) > 1
    groups = [
        _group(f"g{i}", n, c, several, single_file, page.problems) for i, (n, c) in enumerate(page.groups.items())
    ]
    several_devices = len({device for device, _ in published}) > 1
    lines = [
        {
            "verdict": verdict,
            "word": verdict,
            "text": f"Published: {statement}",
            "evidence": [*([device] if several_devices else []), *evidence[:1]],
        }
        for device, (verdict, statement, _, evidence) in published
    ]
    lines += [
        {
            "verdict": f.verdict,
            "word": WORDS.get(f.verdict, f.verdict),
            "text": f.text,
            "evidence": [*([one.label] if one.label else []), *f.evidence],
        }
        for one, f in page.lines()
    ]
    problems = [
        {
            "text": f"{_stem(r.notebook)}: {_one_line(r.meta.get('error')) or 'failed, no error was kept'}",
            "links": _links(r),
        }
        for r in page.failed
    ] + [{"text": text, "links": []} for text in page.problems]
    content = {
        "name": page.name,
        "title": page.question or page.name,
        "facts": facts,
        "earlier": page.earlier,
        "caveats": [*([_SYNTHETIC] if "synthetic" in kinds else []), *doubts([one.run.facts for one in page.cases])],
        "findings": lines,
        "most": ON_A_PAGE,
        "problems": problems,
        "problems_title": "Not everything worked" if page.cases else "Nothing has completed yet",
        "groups": groups,
        "closing": [_run_list(page), _environment(page)],
    }
    # plotly's script is its own release file; only the end of a script element would have to be kept out of it.
    inline = Markup(get_plotlyjs().replace("</script", "<\\/script")) if single_file else None
    return _render(
        "experiment.html", title=f"{page.question or page.name} · zimage", page=content, plotly_inline=inline
    )


def _group(
    id: str, notebook: str, cases: list[Case], several: bool, inline: bool, problems: list[str]
) -> dict[str, Any]:
    compared = [one.tables["ablation"].assign(case=one.label) for one in cases if "ablation" in one.tables]
    overview: list[Section] = []
    with _reported(cases[0].run, problems):
        placed = [(one.run, one.tables["pareto"]) for one in cases if "pareto" in one.tables]
        fronts = [(run.parameters, run.device, weights_kind(run), frame) for run, frame in placed]
        overview += pareto_sections.pools(fronts, id)
        if len(compared) > 1:
            section = gain_sections.overview([one.tables for one in cases], pd.concat(compared), f"{id}-all")
            runs = [one.run for one in cases if "ablation" in one.tables]
            section = replace(section, note=f"{section.note}{_difference(runs)}")
            overview += of_weights([section], weights_kinds(runs))
    parts = []
    for place, one in enumerate(cases):
        key = f"{id}-c{place}"
        sections: list[Section] = []
        folds: list[Section] = []
        with _reported(one.run, problems):
            shown = [
                Shown(p.name, _data_uri(p.path) if inline else _href(p.path, one.run), p.caption)
                for p in one.run.pictures()
            ]
            sections, folds = case(one.tables, shown, key, compared=not overview)
            if one.trend is not None:
                sections.append(across_versions(one.trend, key))
        parts.append(
            {
                "id": key,
                "label": one.label or one.run.key,
                "sections": of_weights(sections, weights_kind(one.run)),
                "folds": of_weights(folds, weights_kind(one.run)),
                "run": one.run.key[:12],
                "links": _links(one.run),
                "recipes": [Link(path.name, _href(path, one.run)) for path in one.run.recipes()],
                "trend": one.trend is not None,
            }
        )
    title = _stem(notebook) if several else "Results"
    return {"id": id, "title": title, "cases": parts, "overview": overview}


def _run_list(page: Experiment) -> Section:
    shown = {one.run.key for one in page.cases}
    heads = [
        Head("Run"),
        Head("Notebook"),
        Head("Status"),
        Head("Started"),
        Head("Took", True),
        Head("Parameters"),
        Head("Files"),
    ]
    rows = [
        [
            Cell(run.key[:12]),
            Cell(_stem(run.notebook)),
            Cell(run.status + ("" if run.key in shown or not run.completed else ", superseded")),
            Cell(units.date(run.meta["started"])),
            Cell(units.seconds(run.meta["duration_s"]), "num"),
            Cell(of_parameters(run, run.parameters), "free"),
            Cell("", links=tuple(_links(run))),
        ]
        for run in page.runs
    ]
    return Section(f"Every run ({len(rows)})", table=Table("Every run", heads, rows))


def _environment(page: Experiment) -> Section:
    """What all runs recorded of their machine; a fact in which they differ shows every value."""
    parts = {"environment": "", "versions": "version of ", "weights": "weights "}
    facts = [(f"{prefix}{n}", v) for part, prefix in parts.items() for n, v in _recorded(page.runs, part).items()]
    rows = [[Cell(name), Cell(_values(name, several), "free")] for name, several in sorted(facts)]
    return Section("Environment", table=Table("Environment", [Head("Fact"), Head("Value")], rows))


def _recorded(runs: Iterable[Run], part: str) -> dict[str, list[str]]:
    """Every value of every fact that runs recorded in a part of their meta, each once."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in run.mapping(part).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: list(several) for name, several in values.items()}


def _difference(runs: Sequence[Run]) -> str:
    """What sets the machines and programs of runs that stand beside each other apart, as a sentence, or ""."""
    recorded = _recorded(runs, "versions") | _recorded(runs, "environment")
    names = sorted(name for name, several in recorded.items() if len(several) > 1 and name not in MOMENTARY)
    return f" These runs differ in {', '.join(names)}; how, stands under Environment." if names else ""


def _values(name: str, several: Iterable[str]) -> str:
    """Every value of a fact; of one that changes from minute to minute, what it ranged over where it is a number."""
    texts = list(several)
    if name in MOMENTARY and len(texts) > 1:
        try:
            ordered = sorted(texts, key=float)
        except ValueError:
            return " | ".join(texts)
        return f"{ordered[0]} to {ordered[-1]}"
    return " | ".join(texts)


def _card(page: Experiment) -> dict[str, Any]:
    texts, (devices, kinds) = _shorts(page), page.about()
    return {
        "name": page.name,
        "title": page.question or page.name,
        "href": f"{quote(page.name)}/index.html",
        "devices": devices,
        "weights": kinds,
        "runs": _runs(page.completed, "done"),
        "failed": len(page.failed),
        "date": _newest(page.runs),
        "lines": [*texts[:ON_A_CARD], *([f"and {more} more"] if (more := len(texts) - ON_A_CARD) > 0 else [])],
    }


def _shorts(page: Experiment) -> list[str]:
    """The findings in brief, each with its case."""
    return [f.short + (f" [{one.label}]" if one.label else "") for one, f in page.lines() if f.short]


def _links(run: Run) -> list[Link]:
    return [
        Link(name, _href(run.path / name, run))
        for name in ("notebook.ipynb", "run.json")
        if (run.path / name).is_file()
    ]


def _data_uri(png: Path) -> str:
    try:
        return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
    except OSError as error:
        raise StoreError(f"{png}: cannot be read: {error.strerror or error}") from None


def _href(path: Path, run: Run) -> str:
    """A path inside a run, relative to its experiment's page."""
    return quote(path.relative_to(run.path.parent).as_posix())


def _stem(notebook: str) -> str:
    words = [ACRONYMS.get(word, word) for word in Path(notebook).stem.split("_")]
    text = " ".join(words).strip()
    return text[:1].upper() + text[1:] or "Notebook"


def _of_weights(kinds: str) -> str:
    return f"{kinds} weights" if kinds else ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split()) if text else ""


def _newest(runs: list[Run]) -> str:
    return units.date(max((str(run.meta["started"]) for run in runs), default=None))


def _runs(number: int, word: str) -> str:
    return f"{number} run{'' if number == 1 else 's'} {word}"


def _tight(text: str) -> str:
    """No line breaks between a number and its percent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _opening(text: str) -> str:
    """A clause as the start of a line: names of arms and stages stay as they are."""
    words = (
        *("the ", "whether ", "no ", "and ", "calibrated ", "of ", "beside ", "attention ", "an ", "a ", "from "),
        *("predicted ", "recipe ", "details ", "variables ", "left out "),
    )
    return text[0].upper() + text[1:] if text.startswith(words) else text


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zimage.lab"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["opening"] = lambda text: _tight(_opening(text))
    environment.filters["tight"] = _tight
    environment.filters["of_weights"] = lambda kind: f"{_of_weights(kind).capitalize()}."
    return environment


def _render(template: str, **values: Any) -> str:
    environment = _templates()
    # Files of this package, not data: they go onto the page as they are.
    css, js = (Markup(environment.get_template(name).render()) for name in ("page.css", "page.js"))
    return environment.get_template(template).render(css=css, js=js, version=__version__, **values)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))
