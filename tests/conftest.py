"""What all tests share: the reference cases, a small detector, and a watch over files imported under two names."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor, ViTAdapterConfig

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"


@dataclass(frozen=True)
class ReferenceCase:
    """A case computed by the original release; tests/reference/README.md says how.

    Attributes:
        facts: Hyper-parameters and metadata.
        tensors: Inputs and outputs by name.
        weights: The original's state dict.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]

    def pictures(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Network inputs, stored as bytes: exact in float32, padding exactly zero."""
        return (self.tensors[name].to(dtype) - 128) / 64


@pytest.fixture(scope="session")
def reference_case() -> Callable[[str], ReferenceCase]:
    """Load a case by its name."""

    def load(name: str) -> ReferenceCase:
        facts = json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))
        file = REFERENCE / f"{name}.safetensors"
        stored = load_file(file) if file.exists() else {}
        weights = {key.removeprefix("w."): tensor for key, tensor in stored.items() if key.startswith("w.")}
        tensors = {key: tensor for key, tensor in stored.items() if not key.startswith("w.")}
        return ReferenceCase(facts, tensors, weights)

    return load


@pytest.fixture(scope="session")
def sample_coco() -> Path:
    """The bundled pictures."""
    return ROOT / "training" / "sample_coco"


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory, sample_coco) -> Path:
    """A detector with random weights for the classes of the bundled pictures, which it sees very small."""
    from vit_adapter.training.coco_index import open_coco

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


@pytest.fixture(scope="session", autouse=True)
def no_file_is_imported_under_two_names():
    yield
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and ROOT in Path(file).resolve().parents and ".venv" not in Path(file).parts:
            names[file].add(name)
    assert not {file: sorted(found) for file, found in names.items() if len(found) > 1}
