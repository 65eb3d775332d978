"""Model cards: what is claimed, by whom, and a snippet that runs."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from vit_adapter import MaskRcnnConfig, ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS
from vit_adapter.conversion.convert import convert_source
from vit_adapter.conversion.detector import config_from_reference
from vit_adapter.conversion.model_card import (
    BASE_MODELS,
    MIXED_NORMALISATION,
    is_published,
    model_card,
    published_name,
)

ROWS = [name for name, preset in PRESETS.items() if preset.box_ap is not None]


def detector_config(preset: str, source: str) -> MaskRcnnConfig:
    """A published detector's configuration with a provenance."""
    backbone = ViTAdapterConfig(**PRESETS[preset].backbone, out_indices=[1, 2, 3, 4])
    config = MaskRcnnConfig(backbone_config=backbone, num_labels=80)
    config.provenance = {
        "source": source,
        "files": {source: {"bytes": 193191613, "sha256": "0" * 64}},
        "kind": "detector",
        "preset": preset,
        "converter": "vit-adapter 0",
        "resized": {},
        "dropped": {},
        "filled": {},
        "new": {},
    }
    return config


@pytest.mark.parametrize("preset", ROWS)
def test_a_published_file_has_its_published_accuracy_as_reported_by_the_authors(preset):
    source = f"{published_name(preset)}.pth.tar"
    config = detector_config(preset, source)
    assert is_published(config)
    card = ModelCard(model_card(config, "me/model"))
    assert card.data.base_model == BASE_MODELS[preset.removesuffix("-1x")]
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-segmentation"
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["box AP"].metric_value == PRESETS[preset].box_ap
    assert results["mask AP"].metric_value == PRESETS[preset].mask_ap
    assert all("authors" in result.source_name and not result.verified for result in results.values())
    assert f"{PRESETS[preset].box_ap} box AP" in card.text and "not measured again" in card.text
    assert "0" * 64 in card.text


def test_the_names_of_the_published_files_are_those_of_the_manifests(manifest):
    for preset in ROWS:
        if not preset.endswith("-1x"):
            assert published_name(preset) == manifest(preset)["config_name"]


def test_only_dinov2_large_speaks_of_its_mixed_normalisation():
    spoken = {
        preset
        for preset in ROWS
        if MIXED_NORMALISATION in model_card(detector_config(preset, f"{published_name(preset)}.pth"), "x")
    }
    assert spoken == {"dinov2-large"}


@pytest.mark.parametrize("source", ["my_own.pth", "mask_rcnn_dinov2_adapter_small_fpn_3x_coco2.pth"])
def test_a_file_of_another_name_claims_no_accuracy(source):
    config = detector_config("dinov2-small", source)
    card = ModelCard(model_card(config, "me/model"))
    assert not is_published(config)
    assert card.data.eval_results is None
    assert "51.5" not in card.text


def snippet(card: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return found


def test_the_snippet_of_a_detector_runs(tmp_path, reference_case, monkeypatch, capsys):
    case = reference_case("detector_inference")
    torch.save({"state_dict": case.weights}, tmp_path / "in.pth")
    convert_source(tmp_path / "in.pth", tmp_path / "model", config=config_from_reference(case.facts["model_config"]))
    Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    code = snippet((tmp_path / "model" / "README.md").read_text(encoding="utf-8"))
    exec(compile(code, "card", "exec"), {})
    assert all(line.endswith("pixels") for line in capsys.readouterr().out.splitlines())


def test_the_snippet_of_a_backbone_runs(tmp_path, vit_state, small_config, monkeypatch):
    torch.save(vit_state(24, 2, 4), tmp_path / "in.pth")
    convert_source(tmp_path / "in.pth", tmp_path / "model", config=small_config())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet((tmp_path / "model" / "README.md").read_text(encoding="utf-8")), "card", "exec"), names)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    loaded = names["model"].backbone.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_the_snippet_of_a_folder_with_its_own_code_trusts_it():
    code = snippet(model_card(detector_config("deit-tiny", "x.pth"), "me/model", remote_code=True))
    assert code.count("trust_remote_code=True") == 2
    assert "vit_adapter" not in code
