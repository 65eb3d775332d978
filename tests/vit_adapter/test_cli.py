"""The command line on real pictures, and bad input in one sentence with exit code 2."""

import json
import shutil

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file

from vit_adapter.cli import main


def sentence_of(capsys) -> str:
    """The one line of an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_predict_writes_a_coco_file_and_a_drawing_of_each_picture(detector_folder, sample_coco, tmp_path):
    pictures = sorted((sample_coco / "val2017").glob("*.jpg"))[:2]
    arguments = ["predict", str(detector_folder), *map(str, pictures), "--out", str(tmp_path), "--threshold", "0"]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [str(path) for path in pictures]
    assert len(content["categories"]) == 80 and len(content["annotations"]) == 10
    for annotation in content["annotations"]:
        image = content["images"][annotation["image_id"] - 1]
        decoded = coco_mask.decode(annotation["segmentation"])
        assert decoded.shape == (image["height"], image["width"]) and decoded.sum() == annotation["area"]
    for path in pictures:
        with Image.open(path) as picture, Image.open(tmp_path / f"{path.stem}.png") as drawn:
            assert drawn.size == picture.size


def test_pictures_of_one_name_get_drawings_of_their_own(detector_folder, sample_coco, tmp_path):
    picture = min((sample_coco / "val2017").glob("*.jpg"))
    (tmp_path / "other").mkdir()
    twin = shutil.copy(picture, tmp_path / "other" / picture.name)
    assert main(["predict", str(detector_folder), str(picture), str(twin), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_evaluate_prints_box_and_mask_ap_over_all_and_for_each_class(detector_folder, sample_coco, tmp_path, capsys):
    annotations, images = sample_coco / "annotations" / "instances_val2017.json", sample_coco / "val2017"
    arguments = ["evaluate", str(detector_folder), "--annotations", str(annotations), "--images", str(images)]
    assert main([*arguments, "--out", str(tmp_path / "metrics.json")]) == 0
    printed = capsys.readouterr().out
    assert "box AP / AP50 / AP75" in printed and "person" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"box", "mask"} and len(metrics["mask"]["per_class"]) == 80


def test_info_says_what_a_model_is_and_which_operator_runs(detector_folder, capsys):
    assert main(["info", str(detector_folder)]) == 0
    printed = capsys.readouterr().out
    assert "Mask R-CNN on vit_adapter" in printed and "80: person" in printed
    assert "deformable attention: " in printed


def test_info_of_the_reference_operator_names_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("VIT_ADAPTER_MSDA", "reference")
    assert main(["info"]) == 0
    assert "reference (VIT_ADAPTER_MSDA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jpg", None, "missing.jpg"),
        ("empty.jpg", b"", "empty"),
        ("page.jpg", b"<!DOCTYPE html><html></html>", "web page"),
        ("noise.png", b"\x89PNG\r\n\x1a\n garbage", "noise.png"),
    ],
)
def test_a_picture_that_cannot_be_read_ends_in_one_sentence_before_anything_is_written(
    name, content, words, detector_folder, sample_coco, tmp_path, capsys
):
    good, bad = min((sample_coco / "val2017").glob("*.jpg")), tmp_path / name
    if content is not None:
        bad.write_bytes(content)
    assert main(["predict", str(detector_folder), str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    assert words in sentence_of(capsys) and not (tmp_path / "out").exists()


def test_a_folder_in_place_of_a_picture_ends_in_one_sentence(detector_folder, sample_coco, tmp_path, capsys):
    assert main(["predict", str(detector_folder), str(sample_coco), "--out", str(tmp_path / "out")]) == 2
    assert "a picture was expected, but this is a folder" in sentence_of(capsys)


def test_a_device_that_is_not_there_ends_in_one_sentence(detector_folder, sample_coco, tmp_path, capsys):
    picture, out = min((sample_coco / "val2017").glob("*.jpg")), tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(detector_folder), str(picture), "--out", str(out), "--device", "abacus"])
    assert stop.value.code == 2
    assert '"abacus" is no device of this machine' in capsys.readouterr().err and not out.exists()


def test_a_folder_that_is_no_model_ends_in_one_sentence(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert str(tmp_path) in sentence_of(capsys)


def test_a_missing_model_ends_in_one_sentence(capsys):
    assert main(["info", "./nowhere/at-all"]) == 2
    assert "no such folder" in sentence_of(capsys)


def test_a_backbone_folder_is_no_detector(tmp_path, capsys):
    from vit_adapter import ViTAdapterConfig

    ViTAdapterConfig().save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    assert "of type vit_adapter, but a detector was expected" in sentence_of(capsys)


def test_damaged_weights_end_in_one_sentence(detector_folder, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(detector_folder, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert main(["info", str(folder)]) == 2
    assert "the model cannot be loaded" in sentence_of(capsys)


def test_missing_tensors_end_in_one_sentence(detector_folder, tmp_path, capsys):
    folder = tmp_path / "incomplete"
    shutil.copytree(detector_folder, folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("mask_head.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["info", str(folder)]) == 2
    assert "lacks 12 of the detector's tensors" in sentence_of(capsys)


def test_weights_for_another_number_of_classes_end_in_one_sentence(detector_folder, tmp_path, capsys):
    folder = tmp_path / "other-classes"
    shutil.copytree(detector_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["box_head.class_scores.bias"] = torch.zeros(12)
    state["box_head.class_scores.weight"] = torch.zeros(12, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["info", str(folder)]) == 2
    assert "box_head.class_scores" in sentence_of(capsys)


def test_annotations_that_are_no_coco_end_in_one_sentence(detector_folder, sample_coco, tmp_path, capsys):
    annotations = tmp_path / "list.json"
    annotations.write_text("[1, 2]")
    arguments = ["evaluate", str(detector_folder), "--annotations", str(annotations)]
    assert main([*arguments, "--images", str(sample_coco / "val2017")]) == 2
    assert str(annotations) in sentence_of(capsys)


def test_classes_that_the_model_lacks_end_in_one_sentence(detector_folder, sample_coco, tmp_path, capsys):
    annotations = tmp_path / "unknown.json"
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "unicorn"}]}
    annotations.write_text(json.dumps(content))
    arguments = ["evaluate", str(detector_folder), "--annotations", str(annotations)]
    assert main([*arguments, "--images", str(sample_coco / "val2017")]) == 2
    assert "unicorn" in sentence_of(capsys)


def test_an_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
