"""Our model on a parity case: its stages' outputs by name, in the layout the reference gives them."""

from tests.parity.cases import Array, Case, inputs, weights
from zimage.lengths import padded
from zimage.transformer import State, Transformer

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def model(case: Case, dtype: mx.Dtype = mx.float32, tensors: dict[str, Array] | None = None) -> Transformer:
    """A model with `tensors`, or with the case's seeded weights."""
    transformer = Transformer(case.transformer)
    if tensors is None:
        tensors = weights(shapes(case))
    transformer.load_weights([(name, mx.array(value).astype(dtype)) for name, value in tensors.items()])
    return transformer


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every tensor name of the case's model, and its shape."""
    return {name: array.shape for name, array in tree_flatten(Transformer(case.transformer).parameters())}


def stages(case: Case, dtype: mx.Dtype = mx.float32, transformer: Transformer | None = None) -> dict[str, Array]:
    """Each stage's output by stage name, and `velocity`, from the case's inputs rounded to `dtype` (not the timestep).

    Sequences are given as the valid rows of every item, concatenated: rows that only fill up a ragged batch are left
    out, because nothing reads them.
    """
    latents, timestep, captions = inputs(case)
    x, t, c = mx.array(latents).astype(dtype), mx.array(timestep), [mx.array(a).astype(dtype) for a in captions]
    transformer = model(case, dtype) if transformer is None else transformer
    lengths = [padded(n) for n in case.captions]
    state, found = State(x, t, c), {}
    for stage in transformer.stages(x, t, c, patch_size=case.patch):
        state = stage(state)
        found[stage.name] = _numpy(_output(stage.name, state), stage.name, lengths)
    found["velocity"] = found.pop("final_layer")
    return found


def _output(name: str, state: State) -> mx.array:
    part = name.split(".")[0]
    fields = {
        "t_embedder": state.temb, "x_embedder": state.image, "noise_refiner": state.image,
        "cap_embedder": state.caption, "context_refiner": state.caption, "layers": state.joint,
        "final_layer": state.velocity,
    }  # fmt: skip
    array = fields[part]
    assert array is not None
    return array


def _numpy(array: mx.array, name: str, lengths: list[int]) -> Array:
    values = np.array(array.astype(mx.float32))
    part = name.split(".")[0]
    if part in ("cap_embedder", "context_refiner"):
        return np.concatenate([v[:n] for v, n in zip(values, lengths, strict=True)])
    if part == "layers":
        image = values.shape[1] - max(lengths)
        return np.concatenate([v[: image + n] for v, n in zip(values, lengths, strict=True)])
    return values.reshape(-1, values.shape[-1]) if part in ("x_embedder", "noise_refiner") else values
