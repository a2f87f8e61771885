"""The transformer's config: what it accepts, what it refuses, and the published model built from it."""

import json
from pathlib import Path
from typing import Any

from zimage.config import TransformerConfig
from zimage.errors import ConfigError
from zimage.transformer import Transformer, count_parameters, weight_bytes

import pytest
from mlx.utils import tree_flatten

DATA = Path(__file__).parent / "data"
PUBLISHED = json.loads((DATA / "published_config.json").read_text())
WRONG = [
    ("dim", 64.0, "dim must be an integer"),
    ("dim", "64", "dim must be an integer"),
    ("dim", True, "dim must be an integer"),
    ("dim", None, "dim must be an integer"),
    ("dim", 0, "at least 1"),
    ("dim", 10**12, "dim must be an integer"),
    ("n_layers", 0, "n_layers must be an integer of at least 1"),
    ("n_refiner_layers", -1, "n_refiner_layers must be an integer of at least 0"),
    ("n_heads", 7, "dim 3840 is not divisible by n_heads 7"),
    ("n_kv_heads", 4, "n_heads 30 is not divisible by n_kv_heads 4"),
    ("n_kv_heads", 60, "n_heads 30 is not divisible by n_kv_heads 60"),
    ("norm_eps", 0, "norm_eps must be a positive number"),
    ("norm_eps", "1e-5", "norm_eps must be a positive number"),
    ("norm_eps", True, "norm_eps must be a positive number"),
    ("rope_theta", float("nan"), "rope_theta must be a positive number"),
    ("rope_theta", float("inf"), "rope_theta must be a positive number"),
    ("t_scale", 10**400, "t_scale must be a positive number"),
    ("t_scale", -1.0, "t_scale must be a positive number"),
    ("qk_norm", 1, "qk_norm must be true or false"),
    ("qk_norm", "true", "qk_norm must be true or false"),
    ("axes_dims", 128, "axes_dims must be a list of integers"),
    ("axes_dims", [], "axes_dims must be a list of integers"),
    ("axes_dims", [32, 96], "three values each"),
    ("axes_dims", [32, 48, 50], "sum to 130, but dim / n_heads = 3840 / 30 = 128"),
    ("axes_dims", [31, 48, 49], "axes_dims must be even"),
    ("axes_dims", [32, 48, 48.0], "axes_dims must be an integer"),
    ("axes_lens", [1536, 512], "three values each"),
    ("axes_lens", [1536, 512, 0], "axes_lens must be an integer of at least 1"),
    ("all_patch_size", 2, "all_patch_size must be a list of integers"),
    ("all_patch_size", [True], "all_patch_size must be an integer"),
    ("all_patch_size", [2, 2], "names a patch size twice"),
    ("all_patch_size", [1, 2], "all_f_patch_size must be 1 for each of the 2 patch sizes"),
    ("all_f_patch_size", [2], "images have one frame"),
    ("siglip_feat_dim", 1152, "the omni variant"),
    ("siglip_feat_dim", 0, "the omni variant"),
    ("pixels_per_latent", 0, "pixels_per_latent must be an integer of at least 1"),
]


def test_the_published_config_loads_as_it_is() -> None:
    """The published config.json gives the turbo preset, and every key that starts with an underscore is ignored."""
    assert "_class_name" in PUBLISHED
    assert TransformerConfig.from_dict(PUBLISHED) == TransformerConfig.turbo()
    assert TransformerConfig.from_dict({**PUBLISHED, "_diffusers_version": "0.36.0"}) == TransformerConfig.turbo()


def test_what_may_be_absent_is_null_and_eight() -> None:
    """Without siglip_feat_dim and pixels_per_latent a config has null and 8; a loader's quantization is not its own."""
    values = {name: value for name, value in PUBLISHED.items() if name != "siglip_feat_dim"}
    config = TransformerConfig.from_dict({**values, "quantization": {"bits": 4}, "quantization_config": {"bits": 4}})
    assert (config.siglip_feat_dim, config.pixels_per_latent) == (None, 8)
    assert config == TransformerConfig.turbo()


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_value_is_refused_in_one_line(name: str, value: Any, message: str) -> None:
    """A wrong type or a size that doesn't fit gives a ConfigError of one line that names the key."""
    with pytest.raises(ConfigError, match=message) as caught:
        TransformerConfig.from_dict({**PUBLISHED, name: value})
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    """A key that no config has is named, and so are those there are."""
    with pytest.raises(ConfigError, match=r"unknown config key n_head, 7; known are all_patch_size, .*n_heads"):
        TransformerConfig.from_dict({**PUBLISHED, "n_head": 30, 7: 1})


@pytest.mark.parametrize("name", [key for key in PUBLISHED if key not in ("_class_name", "siglip_feat_dim")])
def test_every_missing_key_is_named(name: str) -> None:
    """A config without one of the published keys is refused with that key's name."""
    with pytest.raises(ConfigError, match=f"^missing config key {name}$"):
        TransformerConfig.from_dict({key: value for key, value in PUBLISHED.items() if key != name})


@pytest.mark.parametrize("values", [None, [], "config.json", 3])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    """A config that is no mapping gives a ConfigError and not an error from inside."""
    with pytest.raises(ConfigError, match="a config is a mapping"):
        TransformerConfig.from_dict(values)


@pytest.mark.parametrize("config", [TransformerConfig.turbo(), TransformerConfig.tiny(n_heads=4, axes_dims=(4, 6, 6))])
def test_a_config_survives_json(config: TransformerConfig) -> None:
    """to_dict gives JSON values that from_dict reads back to an equal config, with an equal hash."""
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_latent_size_counts_pixels() -> None:
    """latent_size divides pixels by pixels_per_latent, and refuses what doesn't divide."""
    assert TransformerConfig.turbo().latent_size(1024, 512) == (128, 64)
    assert TransformerConfig.tiny(pixels_per_latent=1).latent_size(8, 7) == (8, 7)
    for size, name in (((1020, 512), "height 1020"), ((512, 0), "width 0"), ((8.0, 8), "height 8.0")):
        with pytest.raises(ConfigError, match=name):
            TransformerConfig.turbo().latent_size(*size)  # type: ignore[arg-type]


def test_the_published_tensors_are_built_from_the_config() -> None:
    """The turbo config gives the published checkpoint's 521 names and shapes, and 6,154,908,736 parameters."""
    published = json.loads((DATA / "published_tensors.json").read_text())
    model = Transformer(TransformerConfig.turbo())  # its weights are never computed
    built = {name: list(array.shape) for name, array in tree_flatten(model.parameters())}
    assert len(built) == 521
    assert built == published
    assert count_parameters(model) == 6_154_908_736
    assert weight_bytes(model) == 4 * 6_154_908_736
    parts = model.stages(*_turbo_inputs())
    assert sum(stage.parameters for stage in parts) == 6_154_908_736


def test_the_block_is_a_part_of_the_published_model() -> None:
    """The block config has tensors of the published names and shapes only, one whole block of each kind among them."""
    published = json.loads((DATA / "published_tensors.json").read_text())
    built = {
        name: list(array.shape) for name, array in tree_flatten(Transformer(TransformerConfig.block()).parameters())
    }
    assert built.items() <= published.items()
    for kind in ("noise_refiner", "context_refiner", "layers"):
        assert {n for n in built if n.startswith(kind)} == {n for n in published if n.startswith(f"{kind}.0.")}


def _turbo_inputs() -> tuple[Any, Any, Any]:
    import mlx.core as mx

    return mx.zeros((1, 16, 8, 8)), mx.zeros((1,)), mx.zeros((1, 5, 2560))
