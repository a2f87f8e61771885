"""Checkpoints written by diffusers, loaded by us and by diffusers again; needs the `parity` extra."""

import warnings
from pathlib import Path
from types import ModuleType

from tests.checkpoints import tensors
from tests.parity import ours
from tests.parity.cases import CASES, Case, relative_l2
from tests.sources.test_layouts import SHAPED, comfy
from zimage import sources, weights

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.parity

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The reference's module. Importing torch and diffusers warns of things that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.parity import reference
    return reference


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("case", [BY_NAME["plain"], BY_NAME["patch_1"]], ids=lambda case: case.name)
def test_what_diffusers_saves_loads(case: Case, shards: bool, tmp_path: Path, reference: ModuleType) -> None:
    """A folder that diffusers writes, in one file or sharded, loads and gives its output within 1e-5."""
    options = {"max_shard_size": "200KB"} if shards else {}
    reference.model(case).save_pretrained(tmp_path / "transformer", **options)
    info = sources.describe(tmp_path)
    assert (len(info.files) > 1) == shards
    model = weights.load_transformer(tmp_path, dtype="float32")
    found = ours.stages(case, transformer=model)["velocity"]
    assert relative_l2(found, reference.stages(case)["velocity"]) <= 1e-5


def test_diffusers_loads_what_we_save(tmp_path: Path, reference: ModuleType) -> None:
    """A folder that we write is read by diffusers with the same values under the same names."""
    case = BY_NAME["plain"]
    model = ours.model(case)
    weights.save_transformer(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = reference.ZImageTransformer2DModel.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    ours_by_name = {name: np.array(array) for name, array in weights.transforms.tensors(model).items()}
    theirs = {name: tensor.numpy() for name, tensor in loaded.state_dict().items()}
    assert set(theirs) == set(ours_by_name)
    assert all(np.array_equal(theirs[name], array) for name, array in ours_by_name.items())


@pytest.mark.usefixtures("reference")
def test_comfyuis_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """diffusers' own conversion of a ComfyUI file and our loading of it give the same values under the same names."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert
    values = comfy(dict(tensors(SHAPED)), "model.diffusion_model.")
    save_file(values, tmp_path / "a.safetensors")
    theirs = convert({name: torch.from_numpy(value) for name, value in values.items()})
    model = weights.load_transformer(tmp_path / "a.safetensors", dtype="float32")
    ours_by_name = {name: np.array(array) for name, array in weights.transforms.tensors(model).items()}
    assert set(theirs) == set(ours_by_name)
    assert all(np.array_equal(theirs[name].numpy(), array) for name, array in ours_by_name.items())
