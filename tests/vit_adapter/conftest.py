"""A small detector folder for the tests of the façade and the command line."""

from pathlib import Path

import pytest
import torch

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor, ViTAdapterConfig


@pytest.fixture(scope="session")
def sample_coco() -> Path:
    """The bundled pictures."""
    return Path(__file__).resolve().parents[2] / "training" / "sample_coco"


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory, sample_coco) -> Path:
    """A detector with random weights for the classes of the bundled pictures, which it sees very small."""
    from vit_adapter.training.data import open_coco

    torch.manual_seed(0)
    index = open_coco(sample_coco / "annotations" / "instances_val2017.json", tmp_path_factory.mktemp("cache"))
    names = dict(enumerate(index.categories.values()))
    backbone = ViTAdapterConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, deformable_num_heads=2, image_size=64,
        spatial_prior_channels=8, out_indices=[1, 2, 3, 4],
    )  # fmt: skip
    config = MaskRcnnConfig(
        backbone_config=backbone, id2label=names, label2id={name: label for label, name in names.items()},
        fpn_channels=16, rpn_channels=16, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_test=30, box_head_dim=32,
        mask_channels=16, detections_per_image=5, score_threshold=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "detector"
    MaskRcnnForInstanceSegmentation(config).save_pretrained(folder)
    MaskRcnnImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    return folder
