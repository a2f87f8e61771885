"""All sections of one run's tables, in the order of the page: what is most telling comes first."""

from zimage.analysis import reading
from zimage.analysis.findings import Tables, baseline_arm
from zimage.lab import (
    cost_sections,
    detail_sections,
    gain_sections,
    memory_sections,
    pareto_sections,
    quality_sections,
    reuse_sections,
    sensitivity_sections,
)
from zimage.lab.sections import Section, Shown, by_arm, loading, samples, some, stages, verdicts


def case(tables: Tables, pictures: list[Shown], id: str, compared: bool = True) -> tuple[list[Section], list[Section]]:
    """The open and the collapsed sections of one run's tables, most telling first.

    Without `compared` the verdicts are left to an overview of several runs.
    """
    of_memory = memory_sections.sections(tables, id)
    shown = [*of_memory]
    others: list[Section] = []
    if (frame := some(tables, "pareto")) is not None and (part := pareto_sections.front(frame, id)) is not None:
        shown.append(part)
    if compared and (frame := some(tables, "ablation")) is not None:
        shown.append(verdicts(gain_sections.narrowed(tables, frame), id))
    shown += reuse_sections.sections(tables, id)
    shown += gain_sections.sections(tables, id)
    shown += detail_sections.details(tables)
    memory = some(tables, "memory")
    staged = memory is not None and len(reading.by_stage(memory)) > 0  # a profile's memory has a section of its own
    part = by_arm({**tables, "memory": memory.iloc[:0]} if staged and memory is not None else tables, id)
    if part and not of_memory:
        shown.append(part)
    shown += sensitivity_sections.sections(tables, id)
    if pictures:
        shown.append(_pictures(tables, pictures))
    if (frame := some(tables, "quality")) is not None and quality_sections.says_more(frame):
        shown.append(quality_sections.quality(frame, id))
    if (frame := some(tables, "stages")) is not None:
        # What a page is about comes first: a profile's only other table is its memory.
        place = len(shown) if "ablation" in tables else 0
        shown.insert(place, stages(frame, id))
    if (frame := some(tables, "operations")) is not None:
        profiled = cost_sections.operations(frame, id)
        shown += profiled[:1]
        others = profiled[1:]
    if staged and memory is not None and not of_memory:
        shown.append(cost_sections.memory(memory, id))
    if (frame := some(tables, "scaling")) is not None:
        shown.append(cost_sections.scaling(frame, id))
        shown += [part for part in [cost_sections.images(frame)] if part is not None]
    for name, section in (("axes", cost_sections.axes), ("crossover", cost_sections.crossover)):
        if (frame := some(tables, name)) is not None:
            shown.append(section(frame, id))
    if (frame := some(tables, "loading")) is not None:
        shown.append(loading(frame, id))
    return shown, [*others, *_folds(tables, id, compared)]


def _pictures(tables: Tables, pictures: list[Shown]) -> Section:
    """What shows all arms first, then the arms in the order of the tables."""
    arms = [baseline_arm(tables), *reading.arms(tables.get("ablation")), *reading.arms(tables.get("quality"))]
    order = {f"_{arm}": place for place, arm in reversed([*enumerate(arms)]) if arm}

    def place_of(picture: Shown) -> int:
        return -1 if picture.wide else min((n for e, n in order.items() if picture.name.endswith(e)), default=99)

    return Section("Pictures", "Enlarged without smoothing.", pictures=sorted(pictures, key=place_of))


def _folds(tables: Tables, id: str, compared: bool) -> list[Section]:
    folds: list[Section] = []
    if (frame := some(tables, "stages")) is not None and (part := cost_sections.overhead(frame)) is not None:
        folds.append(part)
    folds += gain_sections.folds(tables, id, compared)
    if (frame := some(tables, "modules")) is not None:
        folds.append(cost_sections.modules(frame))
    if (frame := some(tables, "power")) is not None:
        folds.append(cost_sections.power(frame))
    if (frame := some(tables, "samples")) is not None and (part := samples(frame, id)) is not None:
        folds.append(part)
    return folds
