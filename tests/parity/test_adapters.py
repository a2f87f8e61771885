"""LoRA adapters beside diffusers: how it names what a file holds, and what its model gives with the update merged."""

import copy
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.loras import CONFIG, STYLES, Pair, delta, named, pairs, write
from tests.parity import ours
from tests.parity.cases import CASES, relative_l2, weights
from zimage import adapters, transforms

import numpy as np
import pytest

pytestmark = pytest.mark.parity

CASE = next(case for case in CASES if case.name == "plain")
# No grouped queries here: diffusers takes equal thirds of a fused projection.
EQUAL = CONFIG.__class__.from_dict({**CONFIG.to_dict(), "n_kv_heads": CONFIG.n_heads})
ATTENTION = "noise_refiner.0.attention"
# The names under which diffusers 0.42.1 expects a file to come that it converts.
CONVERTED = ["ComfyUI", "ComfyUI, down and up", "Kohya", "a named adapter", "no prefix"]


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    """torch, after diffusers' modules were imported: that warns of things that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.parity import reference  # noqa: F401

        import torch
    return torch


def _converted(torch: ModuleType, tensors: dict[str, Any]) -> dict[str, Pair]:
    """What diffusers makes of a file: its pairs by module, alphas folded in."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as convert

    state = convert({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
    found = {}
    for name in state:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            found[module] = (state[name].numpy(), state[name.replace("lora_A", "lora_B")].numpy())
    assert len(state) == 2 * len(found)
    return found


def _same(path: Path, theirs: dict[str, Pair]) -> None:
    read = adapters.read(path, EQUAL)
    assert set(read) == set(theirs)
    for module, update in read.items():
        assert relative_l2(delta(update.values()), delta(theirs[module])) < 1e-6, module


@pytest.mark.parametrize("style", CONVERTED)
@pytest.mark.parametrize("alpha", [None, 1.0, 2.0, 13.0])
def test_every_layer_is_read_as_diffusers_reads_it(
    style: str, alpha: float | None, tmp_path: Path, torch: ModuleType
) -> None:
    """For every linear layer of the model, diffusers' conversion and ours give the same layers and the same updates."""
    tensors = named(pairs(EQUAL), style, alpha)
    _same(write(tmp_path / "a.safetensors", tensors), _converted(torch, tensors))


def test_fused_projections_are_read_as_diffusers_reads_them(tmp_path: Path, torch: ModuleType) -> None:
    """A Kohya file with attention.qkv and attention.out changes the same layers in diffusers, by the same."""
    found = pairs(EQUAL)
    down = found[f"{ATTENTION}.to_q"][0]
    up = np.concatenate([found[f"{ATTENTION}.to_{p}"][1] for p in "qkv"])
    tensors = named({f"{ATTENTION}.qkv": (down, up), f"{ATTENTION}.out": found[f"{ATTENTION}.to_out.0"]}, "Kohya", 2.0)
    _same(write(tmp_path / "a.safetensors", tensors), _converted(torch, tensors))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("style", STYLES)
def test_the_adapted_model_gives_what_diffusers_gives(style: str, tmp_path: Path) -> None:
    """With W + scale * alpha / rank * B A computed in fp64 as its weights, diffusers' model gives our velocity."""
    from tests.parity import reference

    config = CASE.transformer
    found = pairs(config)
    path = write(tmp_path / "a.safetensors", named(found, style, 3.0))
    adapted = transforms.adapt(ours.model(CASE), [(path, 0.5)])
    tensors = weights(ours.shapes(CASE))
    merged = copy.copy(tensors)
    for module, pair in found.items():
        merged[f"{module}.weight"] = (tensors[f"{module}.weight"] + delta(pair, 0.5 * 3.0 / 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "weights", lambda _shapes: merged)
        wanted = reference.stages(CASE)["velocity"]
    assert relative_l2(ours.stages(CASE, transformer=adapted)["velocity"], wanted) <= 1e-5
    assert relative_l2(ours.stages(CASE)["velocity"], wanted) > 0.1
