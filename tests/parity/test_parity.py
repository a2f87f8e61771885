"""The model beside diffusers' `ZImageTransformer2DModel`, stage by stage, with the same weights and inputs.

Run with `pytest -m parity`; needs the `parity` extra.
"""

import warnings
from types import ModuleType

from tests.parity import goldens, ours
from tests.parity.cases import CASES, MID_SIZED, Case, first_beyond, relative_l2, weights

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.parity

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BFLOAT16_CASES = [
    *(BY_NAME[name] for name in ("plain", "patch_1", "many_heads", "deep", "no_qk_norm", "ragged_batch_of_3", "wide")),
    MID_SIZED,
]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The reference's module. Importing torch and diffusers warns of things that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.parity import reference
    return reference


@every_case
def test_every_stage_matches_the_reference(case: Case, reference: ModuleType) -> None:
    """In fp32 every stage is within 3e-5 of the reference and the output within 1e-5, relative L2."""
    found, wanted = ours.stages(case), reference.stages(case)
    assert set(found) == set(wanted)
    beyond = first_beyond(found, wanted)
    assert beyond is None, f"{case.name}: {beyond}"


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("cap_embedder.0.weight", "cap_embedder"),
        ("noise_refiner.0.attention.norm_q.weight", "noise_refiner.0"),
        ("context_refiner.0.ffn_norm2.weight", "context_refiner.0"),
        ("layers.1.attention_norm1.weight", "layers.1"),
    ],
)
def test_a_wrong_norm_weight_is_caught_at_its_stage(tensor: str, stage: str, reference: ModuleType) -> None:
    """One norm whose weights are off by 1e-3 fails the comparison, and the first stage named is the one it is in."""
    case = BY_NAME["plain"]
    tensors = weights(ours.shapes(case))
    tensors[tensor] = tensors[tensor] + np.float32(1e-3)
    found = ours.stages(case, transformer=ours.model(case, tensors=tensors))
    beyond = first_beyond(found, reference.stages(case))
    assert beyond is not None
    assert beyond.startswith(f"{stage}:")


@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=lambda case: case.name)
def test_bfloat16_is_as_near_to_float32_as_the_references(case: Case, reference: ModuleType) -> None:
    """Our bf16 error is at most twice the reference's own, at every stage.

    Both are compared with the reference in fp32 on the same values, rounded to bf16 beforehand: so the errors are those
    of computing in bf16 and not of storing weights and inputs in it, which is the same for both.
    """
    exact = reference.stages(case, rounded=True)
    theirs = reference.stages(case, reference.torch.bfloat16, rounded=True)
    found = ours.stages(case, mx.bfloat16)
    for name, wanted in exact.items():
        error, allowed = relative_l2(found[name], wanted), 2 * relative_l2(theirs[name], wanted)
        assert error <= allowed, f"{case.name}, {name}: bf16 error {error:.2e}, twice the reference's is {allowed:.2e}"


@every_case
def test_the_goldens_are_what_the_script_makes(case: Case, reference: ModuleType) -> None:
    """The committed goldens equal what make_goldens.py writes now, to 1e-6 relative L2."""
    committed, _ = goldens.load(case)
    made = goldens.subset(case, reference.stages(case))
    assert set(committed) == set(made)
    for name, array in made.items():
        assert relative_l2(committed[name], array) <= 1e-6, f"{case.name}, {name}"
