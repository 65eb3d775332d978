"""Small models that the tests of this folder share."""

from collections.abc import Callable

import pytest
import torch

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, ViTAdapterConfig
from vit_adapter.conversion.detector import (
    backbone_config_from_reference,
    backbone_state_from_reference,
    config_from_reference,
    state_from_reference,
)
from vit_adapter.modeling_vit_adapter.backbone import ViTAdapterBackbone


@pytest.fixture(scope="session")
def reference_backbone() -> Callable[..., ViTAdapterBackbone]:
    """The backbone of a reference case, with the case's weights."""

    def build(case, weights=None) -> ViTAdapterBackbone:
        config = backbone_config_from_reference(case.facts["config"])
        model = ViTAdapterBackbone(config)
        model.load_state_dict(backbone_state_from_reference(weights or case.weights, config))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def reference_detector(reference_case) -> Callable[[], MaskRcnnForInstanceSegmentation]:
    """The detector of the reference cases, with their weights."""

    def build() -> MaskRcnnForInstanceSegmentation:
        case = reference_case("detector_inference")
        config = config_from_reference(case.facts["model_config"])
        model = MaskRcnnForInstanceSegmentation(config)
        model.load_state_dict(state_from_reference(case.weights, config))
        return model.eval()

    return build


@pytest.fixture
def small_backbone_config() -> ViTAdapterConfig:
    return ViTAdapterConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        deformable_num_heads=2,
        image_size=64,
        window_sizes=[3, 0, 3, 0],
        interaction_indexes=[[0, 1], [2, 3]],
        spatial_prior_channels=8,
        drop_path_rate=0.0,
        out_indices=[1, 2, 3, 4],
    )


@pytest.fixture
def small_detector_config(small_backbone_config) -> MaskRcnnConfig:
    return MaskRcnnConfig(
        backbone_config=small_backbone_config,
        num_labels=3,
        fpn_channels=16,
        rpn_channels=16,
        rpn_pre_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_train=40,
        rpn_post_nms_top_n_test=40,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=24,
        box_head_dim=32,
        mask_channels=16,
        detections_per_image=10,
        score_threshold=0.0,
    )


@pytest.fixture
def small_detector(small_detector_config) -> MaskRcnnForInstanceSegmentation:
    torch.manual_seed(0)
    return MaskRcnnForInstanceSegmentation(small_detector_config)
