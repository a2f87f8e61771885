"""The model beside tensors that diffusers' model computed earlier: parity without torch."""

from tests.parity import goldens, ours
from tests.parity.cases import CASES, Case, first_beyond, relative_l2

import mlx.core as mx
import pytest

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_every_stage_matches_its_golden(case: Case) -> None:
    """In fp32 every stage is within 3e-5 of its golden and the output within 1e-5, relative L2."""
    wanted, metadata = goldens.load(case)
    assert metadata["digest"] == goldens.digest(case, ours.shapes(case)), "the case changed: run make_goldens again"
    stages = ours.stages(case)
    thinned = goldens.subset(case, stages)
    assert set(thinned) == set(wanted)
    beyond = first_beyond({name: thinned[name] for name in stages}, wanted)
    assert beyond is None, f"{case.name}: {beyond}"


@every_case
def test_bfloat16_stays_near_the_golden(case: Case) -> None:
    """In bf16, weights and inputs rounded too, the velocity is within 4 % of its fp32 golden: twice what is usual."""
    wanted, _ = goldens.load(case)
    assert relative_l2(ours.stages(case, mx.bfloat16)["velocity"], wanted["velocity"]) <= 0.04


def test_the_goldens_are_those_of_the_cases_and_small() -> None:
    """Every golden file belongs to a case, and together they take less than 1.5 MB."""
    files = list(goldens.FOLDER.iterdir())
    assert {file.name for file in files} == {goldens.path(case).name for case in CASES}
    assert sum(file.stat().st_size for file in files) < 1.5e6
