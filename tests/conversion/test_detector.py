"""The original's detectors: every published name, shape and number, both ways."""

import copy
from typing import Any

import pytest
import torch

from vit_adapter import MaskRcnnConfig, ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS
from vit_adapter.conversion.detector import (
    BACKBONE_CONSTANTS,
    DETECTOR_CONSTANTS,
    DETECTOR_FIELDS,
    backbone_config_from_reference,
    backbone_state_from_reference,
    backbone_state_to_reference,
    config_from_reference,
    state_from_reference,
    state_to_reference,
)
from vit_adapter.conversion.mapping import CoverageError

PUBLISHED = ["deit-tiny", "deit-small", "deit-base", "augreg-large", "dinov2-small", "dinov2-base", "dinov2-large"]


def changed(model: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the nested configuration with one value replaced or added."""
    model = copy.deepcopy(model)
    *parents, last = path.split(".")
    part = model
    for parent in parents:
        part = part[parent]
    part[last] = value
    return model


def other_than(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "Other"
    return [other_than(entry) for entry in value] if isinstance(value, list) else value + 1


@pytest.fixture
def published_model(manifest) -> dict[str, Any]:
    return manifest("dinov2-small")["resolved_config"]["model"]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_published_name_and_shape_maps_both_ways(preset, manifest, detector_state):
    config = config_from_reference(manifest(preset)["resolved_config"]["model"])
    state = detector_state(preset, device="meta")
    back = state_to_reference(state_from_reference(state, config), config)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_configuration_is_the_preset(preset, manifest):
    config = config_from_reference(manifest(preset)["resolved_config"]["model"])
    expected = MaskRcnnConfig(
        backbone_config=ViTAdapterConfig(**PRESETS[preset].backbone, out_indices=[1, 2, 3, 4]),
        num_labels=80,
        **PRESETS[preset].detector,
    )
    assert config.to_dict() == expected.to_dict()


def test_a_detector_comes_back_bit_for_bit(reference_case):
    case = reference_case("detector_inference")
    config = config_from_reference(case.facts["model_config"])
    back = state_to_reference(state_from_reference(case.weights, config), config)
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[name], case.weights[name]) for name in back)


def test_a_backbone_comes_back_bit_for_bit(reference_case):
    case = reference_case("backbone_augreg_like")
    config = backbone_config_from_reference(case.facts["config"])
    back = backbone_state_to_reference(backbone_state_from_reference(case.weights, config), config)
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[name], case.weights[name]) for name in back)


def test_query_key_and_value_are_thirds_of_the_fused_rows(reference_case):
    case = reference_case("backbone_deit_like")
    ours = backbone_state_from_reference(case.weights, backbone_config_from_reference(case.facts["config"]))
    fused = case.weights["blocks.2.attn.qkv.weight"]
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        width = fused.shape[1]
        assert torch.equal(ours[f"layers.2.attention.{part}.weight"], fused[index * width : (index + 1) * width])


@pytest.mark.parametrize("direction", [state_from_reference, state_to_reference])
def test_an_added_removed_or_reshaped_tensor_is_refused(direction, manifest, detector_state):
    config = config_from_reference(manifest("deit-tiny")["resolved_config"]["model"])
    state = detector_state("deit-tiny", device="meta")
    if direction is state_to_reference:
        state = state_from_reference(state, config)
    some = next(name for name in state if name.endswith("upsample.weight"))
    for spoiled in (
        state | {"backbone.surprise": torch.zeros(1)},
        {name: tensor for name, tensor in state.items() if name != some},
        state | {some: torch.zeros(3, 3)},
    ):
        with pytest.raises(CoverageError):
            direction(spoiled, config)


@pytest.mark.parametrize("path", DETECTOR_CONSTANTS)
def test_another_value_of_what_our_model_holds_constant_is_refused(path, published_model):
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        config_from_reference(changed(published_model, path, other_than(DETECTOR_CONSTANTS[path])))


@pytest.mark.parametrize("name", BACKBONE_CONSTANTS)
def test_another_backbone_than_the_published_kind_is_refused(name, published_model):
    with pytest.raises(ValueError, match=f"backbone.{name}"):
        config_from_reference(changed(published_model, f"backbone.{name}", other_than(BACKBONE_CONSTANTS[name])))


@pytest.mark.parametrize("field", [field for field, paths in DETECTOR_FIELDS.items() if len(paths) > 1])
def test_numbers_that_the_original_states_twice_have_to_agree(field, published_model):
    path = DETECTOR_FIELDS[field][-1]
    with pytest.raises(ValueError, match=path.replace(".", r"\.")):
        config_from_reference(changed(published_model, path, 0.123))


@pytest.mark.parametrize("path", ["backbone.surprise", "rpn_head.surprise", "train_cfg.rcnn.sampler.surprise"])
def test_an_unknown_number_is_refused(path, published_model):
    with pytest.raises(ValueError, match="surprise"):
        config_from_reference(changed(published_model, path, 1))


def test_a_missing_number_is_named(published_model):
    del published_model["test_cfg"]["rcnn"]["score_thr"]
    with pytest.raises(ValueError, match=r"does not state test_cfg\.rcnn\.score_thr"):
        config_from_reference(published_model)


def test_a_backbone_pretrained_at_another_size_than_it_stores_is_refused(published_model):
    with pytest.raises(ValueError, match="pretrain_size"):
        config_from_reference(changed(published_model, "backbone.pretrain_size", 224))


@pytest.mark.parametrize(
    ("argument", "value", "field", "expected"),
    [
        ("window_size", 7, "window_sizes", [7, 7, 0] * 4),
        ("window_attn", False, "window_sizes", [0] * 12),
        ("with_cffn", False, "conv_ffn_ratio", 0),
        ("use_extra_extractor", False, "num_extra_extractors", 0),
        ("layer_scale", False, "layerscale_value", None),
        ("init_values", 0.1, "injector_scale_init", 0.1),
        ("add_vit_feature", False, "add_vit_features", False),
        ("with_cp", True, "out_indices", [1, 2, 3, 4]),
    ],
)
def test_every_switch_of_the_original_backbone_has_its_field(argument, value, field, expected, published_model):
    config = backbone_config_from_reference(published_model["backbone"] | {argument: value})
    assert getattr(config, field) == expected


def test_a_window_without_a_size_is_refused(published_model):
    with pytest.raises(ValueError, match="window_size"):
        backbone_config_from_reference(published_model["backbone"] | {"window_size": None})


def test_windows_for_some_blocks_only_are_refused(published_model):
    with pytest.raises(ValueError, match="each of 12 blocks, but holds 3"):
        backbone_config_from_reference(published_model["backbone"] | {"window_size": [14, 14, None]})
