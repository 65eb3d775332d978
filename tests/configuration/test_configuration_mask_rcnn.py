"""MaskRcnnConfig: its backbone, and contradictions in clear words."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ResNetConfig

from vit_adapter import MaskRcnnConfig, ViTAdapterConfig


def test_the_default_backbone_is_a_vit_adapter_with_four_maps():
    backbone = MaskRcnnConfig().backbone_config
    assert isinstance(backbone, ViTAdapterConfig) and backbone.out_indices == [1, 2, 3, 4]


def test_any_registered_backbone_is_built_from_its_dictionary():
    config = MaskRcnnConfig(backbone_config={"model_type": "resnet", "out_indices": [1, 2, 3, 4]})
    assert isinstance(config.backbone_config, ResNetConfig)


def test_saving_and_loading_changes_nothing(tmp_path):
    config = MaskRcnnConfig(id2label={0: "cell", 1: "nucleus"}, label2id={"cell": 0, "nucleus": 1})
    config.save_pretrained(tmp_path / "first")
    loaded = AutoConfig.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert type(loaded) is MaskRcnnConfig
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()


@pytest.mark.parametrize("model_type", [{}, {"model_type": "unheard-of"}])
def test_a_backbone_of_no_known_type_is_named(model_type):
    with pytest.raises(ValueError, match="but one that transformers knows was expected"):
        MaskRcnnConfig(backbone_config={**model_type, "out_indices": [1, 2, 3, 4]})


def test_thresholds_may_be_whole_numbers():
    assert MaskRcnnConfig(nms_threshold=1, box_positive_fraction=1).nms_threshold == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"backbone_config": {"model_type": "resnet"}}, r"type resnet has out_indices \[4\]: give it four"),
        ({"num_fpn_levels": 3}, r"holds at least the backbone's four levels"),
        ({"num_fpn_levels": 4}, r"anchor_strides has 5 entries, but one for each of the num_fpn_levels 4"),
        ({"anchor_strides": [4, 8, 16, 32, 48]}, r"each level has twice the stride of the one before"),
        ({"mask_target_size": 27}, r"the mask head doubles mask_roi_size 14: 28 was expected"),
        ({"box_delta_stds": [0.1, 0.2]}, r"four numbers \(x, y, w, h\) were expected"),
        ({"rpn_negative_iou": 0.8}, r"rpn_negative_iou 0.8 is above rpn_positive_iou 0.7"),
        ({"anchor_ratios": []}, r"at least one ratio and numbers above 0 were expected"),
        ({"anchor_scale": 0}, r"at least one ratio and numbers above 0 were expected"),
        ({"nms_threshold": 1.5}, r"nms_threshold is 1.5, but a number from 0 to 1 was expected"),
        ({"rpn_positive_fraction": -0.1}, r"rpn_positive_fraction is -0.1, but a number from 0 to 1"),
        ({"id2label": {}, "label2id": {}}, r"a detector needs at least one class"),
        ({"detections_per_image": "many"}, r"detections_per_image"),
    ],
)
def test_contradictions_are_named(arguments, sentence):
    with pytest.raises(StrictDataclassError, match=sentence):
        MaskRcnnConfig(**arguments)
