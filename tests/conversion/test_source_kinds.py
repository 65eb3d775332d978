"""What a source is: told by names and shapes alone."""

import json
from pathlib import Path

import pytest
import torch

from vit_adapter import MaskRcnnForInstanceSegmentation, ViTAdapterBackbone
from vit_adapter.configuration.presets import PRESETS
from vit_adapter.conversion.coco_classes import COCO_CLASSES
from vit_adapter.conversion.detector import expected_shapes
from vit_adapter.conversion.mapping import convert
from vit_adapter.conversion.source_files import SourceError, SourceFiles
from vit_adapter.conversion.source_kinds import KINDS, choose_preset, class_names, preset_config, recognise

ADAPTER = ("spatial_prior.", "stages.", "upsample.", "norms.")
PUBLISHED = ["deit-tiny", "deit-small", "deit-base", "augreg-large", "dinov2-small", "dinov2-base", "dinov2-large"]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_published_detector_is_recognised_by_its_shapes(preset, detector_state):
    files = SourceFiles("model.pth", {}, detector_state(preset, device="meta"))
    assert recognise(files) == "detector"
    assert choose_preset(files, "detector") == preset
    config = preset_config(preset, files, "detector")
    done = convert(files.state, KINDS["detector"].table, expected_shapes(MaskRcnnForInstanceSegmentation, config))
    assert not done.new and not done.dropped and not done.filled
    assert tuple(config.id2label.values()) == COCO_CLASSES


@pytest.mark.parametrize("preset", ["deit-tiny", "deit-small", "deit-base", "augreg-large"])
def test_the_1x_row_is_known_by_its_name(preset, detector_state):
    family, size = preset.split("-")
    state = detector_state(preset, device="meta")
    files = SourceFiles(f"mask_rcnn_{family}_adapter_{size}_fpn_1x_coco.pth", {}, state)
    assert choose_preset(files, "detector") == f"{preset}-1x"


@pytest.mark.parametrize(
    ("preset", "kind", "layout"),
    [
        ("deit-tiny", "deit", {"side": 14}),
        ("deit-small", "deit", {"side": 14}),
        ("deit-base", "deit", {"side": 14}),
        ("augreg-large", "augreg", {"side": 24}),
        ("dinov2-small", "dinov2", {"side": 37, "patch": 14, "layer_scale": "ls1.gamma"}),
        ("dinov2-base", "dinov2", {"side": 37, "patch": 14, "layer_scale": "ls1.gamma", "registers": 4}),
        ("dinov2-large", "dinov2", {"side": 37, "patch": 14, "layer_scale": "ls1.gamma"}),
        ("dinov2-giant", "dinov2", {"side": 37, "patch": 14, "layer_scale": "ls1.gamma", "swiglu": 4096}),
    ],
)
def test_every_published_backbone_is_recognised_and_leaves_exactly_the_adapter_new(preset, kind, layout, vit_state):
    backbone = PRESETS[preset].backbone
    state = vit_state(backbone["hidden_size"], backbone["num_hidden_layers"], **layout, device="meta")
    files = SourceFiles("weights.pth", {}, state)
    assert recognise(files) == kind
    assert choose_preset(files, kind) == preset
    config = preset_config(preset, files, kind)
    shapes = expected_shapes(ViTAdapterBackbone, config)
    done = convert(state, KINDS[kind].table, shapes)
    assert set(done.new) == {name for name in shapes if name.startswith(ADAPTER)}


def test_class_names_come_from_the_file_else_from_coco_else_are_numbered(reference_case, detector_state):
    seven = reference_case("detector_inference").weights
    assert class_names(SourceFiles("x", {}, seven, {"CLASSES": tuple("abcdefg")})) == list("abcdefg")
    assert class_names(SourceFiles("x", {}, seven, {"CLASSES": ("too", "few")})) == [f"LABEL_{i}" for i in range(7)]
    assert class_names(SourceFiles("x", {}, seven)) == [f"LABEL_{index}" for index in range(7)]
    assert class_names(SourceFiles("x", {}, detector_state("deit-tiny", "meta"))) == list(COCO_CLASSES)


def test_coco_classes_are_those_of_the_sample():
    folder = Path(__file__).resolve().parents[2] / "training" / "sample_coco" / "annotations"
    content = json.loads((folder / "instances_val2017.json").read_text(encoding="utf-8"))
    named = sorted(content["categories"], key=lambda category: category["id"])
    assert tuple(category["name"] for category in named) == COCO_CLASSES


def test_names_of_no_known_source_are_shown():
    with pytest.raises(SourceError, match=r"conv1\.weight"):
        recognise(SourceFiles("resnet.pth", {}, {"conv1.weight": torch.zeros(1)}))
