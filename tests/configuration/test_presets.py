"""The presets against the published tables."""

import pytest

from vit_adapter import MaskRcnnConfig, ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS

# Box and mask AP on COCO val2017 as published; ours have none.
PUBLISHED = {
    "deit-tiny": (46.0, 41.0),
    "deit-small": (48.2, 42.8),
    "deit-base": (49.6, 43.6),
    "augreg-large": (52.1, 46.0),
    "dinov2-small": (51.5, 45.6),
    "dinov2-base": (54.1, 47.8),
    "dinov2-large": (55.3, 49.0),
    "deit-tiny-1x": (41.1, 37.5),
    "deit-small-1x": (44.7, 39.9),
    "deit-base-1x": (47.0, 41.8),
    "augreg-large-1x": (48.7, 43.3),
    "dinov2-giant": (None, None),
    "tiny": (None, None),
}


def test_every_published_row_is_there_with_its_accuracy():
    assert {name: (preset.box_ap, preset.mask_ap) for name, preset in PRESETS.items()} == PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_valid_configurations(name):
    preset = PRESETS[name]
    backbone = ViTAdapterConfig(**preset.backbone, out_indices=[1, 2, 3, 4])
    MaskRcnnConfig(backbone_config=backbone, **preset.detector)


def test_a_row_of_the_1x_table_has_the_model_of_its_3x_row():
    for name in ("deit-tiny", "deit-small", "deit-base", "augreg-large"):
        assert PRESETS[f"{name}-1x"].backbone == PRESETS[name].backbone


def test_the_giant_is_the_published_vit_g_in_four_stages_of_ten():
    config = ViTAdapterConfig(**PRESETS["dinov2-giant"].backbone)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1536, 40, 24)
    assert config.use_swiglu_ffn and config.intermediate_size == 4096
    assert (config.deformable_num_heads, config.deformable_value_size) == (24, 768)
    assert config.interaction_indexes == [[0, 9], [10, 19], [20, 29], [30, 39]]
    assert config.window_sizes == ([14] * 9 + [0]) * 4
