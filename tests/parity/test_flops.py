"""Our FLOPs beside those that `torch.utils.flop_counter` sees diffusers' model perform, module by module.

Both count matrix products and the two products of attention: of every linear layer and attention of the blocks, of the
timestep embedder, and of the final layer's modulation, over exactly the same rows. Neither counts what is elementwise
there; ours has that apart. Three linear layers are computed on other rows: the reference embeds images and captions
after it has padded them, and puts captions and padding through its final layer too. For those three, FLOPs a row agree.

Run with `pytest -m parity`; needs the `parity` extra.
"""

import warnings
from types import ModuleType

from tests.parity.cases import CASES, Case, inputs
from zimage.analysis import cost
from zimage.lengths import lengths

import pytest

pytestmark = pytest.mark.parity

BY_NAME = {case.name: case for case in CASES}
NOTHING_PADDED = Case("nothing_padded", (16, 16), (32, 32))
COUNTED = [
    NOTHING_PADDED,
    *(BY_NAME[name] for name in ("odd_token_count", "patch_1", "two_patch_sizes", "no_refiners")),
    *(BY_NAME[name] for name in ("no_qk_norm", "ragged_batch_of_3", "batch_of_2_equally_padded", "wide")),
]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The reference's module. Importing torch and diffusers warns of things that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.parity import reference
    return reference


def _theirs(case: Case, reference: ModuleType) -> dict[str, int]:
    """FLOPs of one forward pass by module path of the reference, and of the whole as ''."""
    torch = reference.torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    latents, timestep, captions = inputs(case)
    model = reference.model(case)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            [torch.from_numpy(x)[:, None] for x in latents],
            torch.from_numpy(timestep),
            [torch.from_numpy(c) for c in captions],
            patch_size=case.patch,
            return_dict=False,
        )
    root = f"{type(model).__name__}."
    counts = counter.get_flop_counts().items()
    return {"": counter.get_total_flops()} | {
        name.removeprefix(root): sum(found.values()) for name, found in counts if name.startswith(root)
    }


def _ours(case: Case) -> dict[str, cost.Operation]:
    """The products of a step by the reference's module paths; attention's own by the path of its module."""
    config = case.transformer
    height, width = (n * config.pixels_per_latent for n in case.size)
    operations = cost.step(config, height, width, len(case.captions), case.captions, "float32", patch_size=case.patch)
    renamed = {"x_embedder.": f"all_x_embedder.{case.patch}-1.", "final_layer.": f"all_final_layer.{case.patch}-1."}

    def path(module: str) -> str:
        for ours, theirs in renamed.items():
            module = module.replace(ours, theirs) if module.startswith(ours) else module
        return module.replace("-1.linear", "-1") if module.startswith("all_x") else module

    return {path(o.module): o for o in operations if o.kind != "elementwise"}


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_flops_agree_with_the_counter_of_torch(case: Case, reference: ModuleType) -> None:
    """Every module's FLOPs and the total are the counter's, exactly; of three layers, those of a row."""
    theirs, ours = _theirs(case, reference), _ours(case)
    found = lengths(case.transformer, case.size, case.patch, case.captions)
    B = len(case.captions)
    rows = {  # ours, theirs
        f"all_x_embedder.{case.patch}-1": (B * found.image_tokens, B * found.image),
        "cap_embedder.1": (B * max(case.captions), sum(found.items)),
        f"all_final_layer.{case.patch}-1.linear": (B * found.image_tokens, B * found.joint),
    }
    assert set(rows) <= set(ours)
    expected = dict.fromkeys(ours, 0)
    for path, operation in ours.items():
        own, other = rows.get(path, (1, 1))
        flops_of_a_row, rest = divmod(operation.flops, own)
        assert rest == 0
        expected[path] = flops_of_a_row * other
    counted = {
        path: theirs[path] - sum(theirs[f"{path}.{name}"] for name in ("to_q", "to_k", "to_v", "to_out.0"))
        if ours[path].kind == "attention"
        else theirs[path]
        for path in ours
    }
    assert counted == expected
    assert theirs[""] == sum(expected.values())


def test_where_nothing_is_padded_only_the_final_layer_differs(reference: ModuleType) -> None:
    """With images and captions of whole multiples of 32 tokens the totals differ by the captions' final rows alone."""
    case = NOTHING_PADDED
    theirs, ours = _theirs(case, reference), _ours(case)
    config = case.transformer
    unread = 2 * len(case.captions) * 32 * config.dim * case.patch**2 * config.in_channels
    assert theirs[""] - sum(o.flops for o in ours.values()) == unread
