"""Back to the original's files, bit for bit."""

import pytest
import torch

from vit_adapter import ViTAdapterBackbone
from vit_adapter.conversion.convert import convert_source
from vit_adapter.conversion.convert_14to16 import patches_14_to_16
from vit_adapter.conversion.detector import config_from_reference
from vit_adapter.conversion.export_reference import export_reference
from vit_adapter.conversion.mapping import CoverageError


def test_a_detector_goes_and_comes_back_bit_for_bit(tmp_path, reference_case):
    case = reference_case("detector_inference")
    torch.save({"state_dict": case.weights, "meta": {"CLASSES": tuple("abcdefg")}}, tmp_path / "in.pth")
    convert_source(tmp_path / "in.pth", tmp_path / "model", config=config_from_reference(case.facts["model_config"]))
    assert export_reference(tmp_path / "model", tmp_path / "out.pth") == []
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert back["meta"]["CLASSES"] == tuple("abcdefg")
    assert back["state_dict"].keys() == case.weights.keys()
    assert all(torch.equal(back["state_dict"][name], tensor) for name, tensor in case.weights.items())


@pytest.mark.parametrize("swiglu", [0, 64], ids=["mlp", "swiglu"])
def test_a_backbone_goes_back_to_the_14_to_16_form(tmp_path, vit_state, small_config, swiglu):
    state = vit_state(24, 2, 4, patch=14, layer_scale="ls1.gamma", swiglu=swiglu, registers=4)
    torch.save(state, tmp_path / "in.pth")
    config = small_config(use_swiglu_ffn=bool(swiglu))
    assert config.intermediate_size == (swiglu or 96)
    convert_source(tmp_path / "in.pth", tmp_path / "model", config=config)
    left = {entry.name for entry in export_reference(tmp_path / "model", tmp_path / "out.pth")}
    expected = patches_14_to_16(state)
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert left == {"cls_token", "register_tokens", "mask_token", "norm.weight", "norm.bias"}
    assert back.keys() == expected.keys() - left
    assert all(torch.equal(back[name], expected[name]) for name in back)


def test_a_trained_backbone_leaves_its_adapter_behind(tmp_path, small_config):
    model = ViTAdapterBackbone(small_config())
    model.save_pretrained(tmp_path / "model")
    left = {entry.name for entry in export_reference(tmp_path / "model", tmp_path / "out.pth")}
    assert left == {
        name for name in model.state_dict() if name.startswith(("spatial_prior.", "stages.", "upsample.", "norms."))
    }


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path, small_config):
    model = ViTAdapterBackbone(small_config())
    state = model.state_dict()
    del state["layers.0.norm1.weight"]
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(CoverageError, match=r"layers\.0\.norm1\.weight"):
        export_reference(tmp_path / "model", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
