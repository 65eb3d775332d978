"""From a file to a `from_pretrained` folder."""

import json

import pytest
import torch
from transformers import AutoBackbone, AutoImageProcessor, AutoModelForInstanceSegmentation

from vit_adapter import (
    MaskRcnnConfig,
    MaskRcnnForInstanceSegmentation,
    MaskRcnnImageProcessor,
    ViTAdapterBackbone,
    ViTAdapterConfig,
)
from vit_adapter.conversion.convert import convert_source, image_processor, load_backbone, read_config
from vit_adapter.conversion.detector import config_from_reference, state_from_reference
from vit_adapter.conversion.mapping import CoverageError
from vit_adapter.conversion.source_files import SourceError, file_digest

ADAPTER = ("spatial_prior.", "stages.", "upsample.", "norms.")
PUBLISHED = ["deit-tiny", "deit-small", "deit-base", "augreg-large", "dinov2-small", "dinov2-base", "dinov2-large"]


@pytest.fixture
def small_dinov2(tmp_path, vit_state):
    """A small DINOv2 file with 14-pixel patches and registers."""
    file = tmp_path / "small_reg4.pth"
    torch.save(vit_state(24, 2, 4, patch=14, layer_scale="ls1.gamma", registers=4), file)
    return file


@pytest.fixture
def small_detector(tmp_path, reference_case):
    """The reference detector's weights as mmdetection saves them."""
    file = tmp_path / "detector.pth"
    classes = tuple(f"thing {index}" for index in range(7))
    meta = {"CLASSES": classes, "mmdet_version": "2.22.0", "epoch": 36}
    torch.save({"meta": meta, "state_dict": reference_case("detector_inference").weights, "optimizer": {}}, file)
    return file


def test_a_backbone_becomes_a_folder_of_the_converted_tensors_only(small_dinov2, small_config, tmp_path):
    report = convert_source(small_dinov2, tmp_path / "out", config=small_config())
    assert report.kind == "dinov2"
    torch.manual_seed(1)
    model, info = ViTAdapterBackbone.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == set(report.conversion.new)
    assert all(name.startswith(ADAPTER) for name in report.conversion.new)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in report.conversion.tensors.items())
    torch.manual_seed(1)
    again = ViTAdapterBackbone.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], again[name]) for name in loaded)  # the user's seed decides on the new ones


def test_a_backbone_inside_a_detector_leaves_adapter_neck_and_heads_new(small_dinov2, small_config, tmp_path):
    report = convert_source(small_dinov2, tmp_path / "out", config=small_config())
    backbone_config = ViTAdapterConfig.from_pretrained(tmp_path / "out")
    config = MaskRcnnConfig(backbone_config=backbone_config, num_labels=3, fpn_channels=16, box_head_dim=16)
    model, info = MaskRcnnForInstanceSegmentation.from_pretrained(
        tmp_path / "out", config=config, output_loading_info=True
    )
    expected = {f"backbone.{name}" for name in report.conversion.new}
    expected |= {name for name in model.state_dict() if not name.startswith("backbone.")}
    assert set(info["missing_keys"]) == expected
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], t) for name, t in report.conversion.tensors.items())


def test_a_detector_becomes_a_complete_folder_with_the_reference_outputs(small_detector, tmp_path, reference_case):
    case = reference_case("detector_inference")
    config = config_from_reference(case.facts["model_config"])
    report = convert_source(small_detector, tmp_path / "out", config=config)
    assert report.kind == "detector"
    assert not report.conversion.new
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "out").eval()
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "out"), MaskRcnnImageProcessor)
    expected = state_from_reference(case.weights, config)
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    with torch.no_grad():
        maps = model.backbone(case.pictures("u8")).feature_maps
        pyramid = model.neck(maps)
    for level in (2, 3, 4):
        torch.testing.assert_close(pyramid[level], case.tensors[f"fpn.{level}"], atol=5e-4, rtol=0)


def test_provenance_says_where_every_tensor_came_from(small_dinov2, small_config, tmp_path):
    convert_source(small_dinov2, tmp_path / "out", config=small_config())
    provenance = ViTAdapterConfig.from_pretrained(tmp_path / "out").provenance
    assert provenance["source"] == small_dinov2.name
    assert provenance["files"][small_dinov2.name] == {
        "sha256": file_digest(small_dinov2),
        "bytes": small_dinov2.stat().st_size,
    }
    dropped = {name: reason for reason, names in provenance["dropped"].items() for name in names}
    assert dropped["register_tokens"] == dropped["cls_token"]
    kernel = "embeddings.patch_embeddings.projection.weight"
    assert provenance["resized"] == {"[24, 3, 14, 14] became [24, 3, 16, 16]": [kernel]}
    new = [name for names in provenance["new"].values() for name in names]
    assert "upsample.weight" in new and "embeddings.position_embeddings" not in new


def test_a_large_model_is_sharded_and_loads_whole(small_dinov2, small_config, tmp_path):
    report = convert_source(small_dinov2, tmp_path / "out", config=small_config(), max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded = ViTAdapterBackbone.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in report.conversion.tensors.items())


def test_a_converted_backbone_folder_is_a_source_itself(small_dinov2, small_config, tmp_path):
    report = convert_source(small_dinov2, tmp_path / "out", config=small_config())
    for source in (small_dinov2, tmp_path / "out"):
        backbone = ViTAdapterBackbone(small_config())
        assert set(load_backbone(backbone, source).new) == set(report.conversion.new)
        state = backbone.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in report.conversion.tensors.items())


def test_half_precision_stays_half_precision(tmp_path, vit_state, small_config):
    file = tmp_path / "half.pth"
    torch.save({name: tensor.half() for name, tensor in vit_state(24, 2, 4).items()}, file)
    report = convert_source(file, tmp_path / "out", config=small_config())
    assert {tensor.dtype for tensor in report.conversion.tensors.values()} == {torch.float16}
    assert ViTAdapterConfig.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_nothing_is_written_when_the_law_of_coverage_is_broken(tmp_path, vit_state, small_config):
    file = tmp_path / "weights.pth"
    torch.save(vit_state(24, 2, 4) | {"blocks.0.surprise": torch.zeros(2)}, file)
    with pytest.raises(CoverageError, match=r"blocks\.0\.surprise"):
        convert_source(file, tmp_path / "out", config=small_config())
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_an_existing_folder_is_not_overwritten(small_dinov2, small_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        convert_source(small_dinov2, tmp_path / "out", config=small_config())
    assert (tmp_path / "out" / "precious").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "nonsense"}, "there is no kind nonsense"),
        ({"preset": "nonsense"}, "there is no preset nonsense"),
        ({}, "no published model has 2 blocks of width 24"),
        ({"config": MaskRcnnConfig()}, "cannot become a MaskRcnnForInstanceSegmentation"),
    ],
)
def test_a_wrong_choice_is_one_sentence(small_dinov2, tmp_path, arguments, sentence):
    with pytest.raises(SourceError, match=sentence):
        convert_source(small_dinov2, tmp_path / "out", **arguments)


def test_presets_of_another_size_break_the_law(small_dinov2, tmp_path):
    with pytest.raises(CoverageError):
        convert_source(small_dinov2, tmp_path / "out", preset="dinov2-small")


def test_the_processor_has_the_normalisation_of_the_test():
    half = image_processor("augreg-large")
    assert list(half.image_mean) == [0.5] * 3 and list(half.image_std) == [0.5] * 3
    mixed = image_processor("dinov2-large")  # trained with 127.5, tested with the ImageNet values
    assert list(mixed.image_mean) == [0.485, 0.456, 0.406]
    assert list(mixed.image_std) == [0.229, 0.224, 0.225]


def test_a_configuration_is_read_from_the_originals_json_and_from_ours(tmp_path, manifest):
    published = manifest("dinov2-small")["resolved_config"]
    expected = config_from_reference(published["model"]).to_dict()
    for content in (published, published["model"], expected):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert read_config(tmp_path / "config.json").to_dict() == expected
    (tmp_path / "config.json").write_text(json.dumps(published["model"]["backbone"]))
    assert isinstance(read_config(tmp_path / "config.json"), ViTAdapterConfig)


BAD_CONFIGURATIONS = [
    "",
    "[1]",
    "{}",
    '{"model_type": "bert"}',
    '{"model_type": "vit_adapter", "patch_size": 14}',
    '{"type": "MaskRCNN"}',
]


@pytest.mark.parametrize("content", BAD_CONFIGURATIONS)
def test_another_json_is_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError):
        read_config(tmp_path / "config.json")


def test_a_converted_backbone_is_found_by_the_auto_class(small_dinov2, small_config, tmp_path):
    convert_source(small_dinov2, tmp_path / "out", config=small_config())
    config = ViTAdapterConfig.from_pretrained(tmp_path / "out")
    assert isinstance(AutoBackbone.from_config(config), ViTAdapterBackbone)
