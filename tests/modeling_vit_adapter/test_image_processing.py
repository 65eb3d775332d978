"""MaskRcnnImageProcessor: to the model's input, and back to the pictures."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import pipeline

from vit_adapter.modeling_vit_adapter.image_processing import MaskRcnnImageProcessor, load_image, prepare_labels
from vit_adapter.modeling_vit_adapter.masks import decode_segmentation, encode_mask

PICTURES = Path(__file__).parents[2] / "training" / "sample_coco" / "val2017"


@pytest.fixture
def processor() -> MaskRcnnImageProcessor:
    """A processor that neither resizes nor normalises, so that results can be checked by hand."""
    return MaskRcnnImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=True)


@pytest.mark.parametrize("statistics", ["imagenet", "half"])
@pytest.mark.parametrize("index", range(3))
def test_real_pictures_equal_the_references_input(reference_case, statistics, index):
    """The README allows a grey level of the resizer; ours is OpenCV's, so only float32 rounding remains."""
    case = reference_case("preprocess")
    numbers, image = case.facts["normalisation"][statistics], case.facts["images"][index]
    processor = MaskRcnnImageProcessor(
        image_mean=[value / 255 for value in numbers["mean"]], image_std=[value / 255 for value in numbers["std"]]
    )
    inputs = processor(PICTURES / image["file_name"], return_tensors="pt")
    pixels = inputs["pixel_values"][0]
    assert list(pixels.shape) == image["tensor_shape"]
    assert pixels.dtype == torch.float32
    height, width = image["img_shape"][:2]
    assert inputs["pixel_mask"].sum() == inputs["pixel_mask"][0, :height, :width].sum() == height * width
    crop = case.tensors[f"{statistics}.{index}.crop_bottom_right"]
    top, left = image["crops"]["bottom_right"]
    ours = pixels[:, top : top + crop.shape[1], left : left + crop.shape[2]]
    torch.testing.assert_close(ours, crop, atol=1e-6, rtol=0)
    sums = pixels.double().sum(dim=(1, 2))
    # Rounding of float32 over two million pixels.
    torch.testing.assert_close(sums, torch.tensor(image["sum_rgb"][statistics], dtype=torch.float64), atol=0.1, rtol=0)
    if statistics == "imagenet":
        for dim, name in ((1, "col_mean"), (2, "row_mean")):
            expected = case.tensors[f"{statistics}.{index}.{name}"]
            torch.testing.assert_close(pixels.double().mean(dim), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("index", range(3))
def test_resized_real_pictures_equal_opencvs_bit_for_bit(reference_case, index):
    case = reference_case("preprocess")
    image = case.facts["images"][index]
    processor = MaskRcnnImageProcessor(do_rescale=False, do_normalize=False)
    pixels = processor(PICTURES / image["file_name"], return_tensors="pt")["pixel_values"][0]
    top, left = image["crops"]["middle"]
    ours = pixels[:, top : top + 80, left : left + 80].flip(0).permute(1, 2, 0)
    assert torch.equal(ours, case.tensors[f"resized_bgr_crop.{index}"])
    assert pixels.sum(dim=(1, 2)).flip(0).tolist() == image["resized_sum_bgr"]


def test_a_batch_is_padded_right_and_below_to_a_common_multiple_of_32(processor):
    pictures = [torch.full((3, 40, 20), 7, dtype=torch.uint8), torch.full((3, 10, 65), 9, dtype=torch.uint8)]
    inputs = processor(pictures, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 64, 96)
    assert inputs["pixel_mask"].shape == (2, 64, 96)
    for picture, pixels, mask in zip(pictures, inputs["pixel_values"], inputs["pixel_mask"], strict=True):
        height, width = picture.shape[1:]
        assert torch.equal(pixels[:, :height, :width], picture)
        assert pixels.sum() == picture.sum()
        assert mask[:height, :width].all() and mask.sum() == height * width


def test_a_batch_of_pictures_of_one_size_equals_its_singles():
    pictures = [load_image(PICTURES / "000000565778.jpg"), load_image(PICTURES / "000000565778.jpg").rotate(180)]
    processor = MaskRcnnImageProcessor(size={"shortest_edge": 100, "longest_edge": 200})
    together = processor(pictures, return_tensors="pt")["pixel_values"]
    for picture, pixels in zip(pictures, together, strict=True):
        assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 10, "longest_edge": 100}, (10, 20)),
        ({"shortest_edge": 10, "longest_edge": 15}, (8, 15)),  # 7.5 rounds up
        ({"shortest_edge": 10}, (10, 20)),
        ({"longest_edge": 10}, (5, 10)),
        ({"height": 7, "width": 9}, (7, 9)),
        ({"max_height": 100, "max_width": 10}, (5, 10)),
    ],
)
def test_every_form_of_size_is_obeyed(size, expected):
    processor = MaskRcnnImageProcessor(size=size, pad_size_divisor=1)
    picture = torch.zeros(3, 40, 80, dtype=torch.uint8)
    assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, *expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (3, 50)])
def test_extreme_pictures_pass(height, width):
    inputs = MaskRcnnImageProcessor()(Image.new("RGB", (width, height), "red"), return_tensors="pt")
    assert inputs["pixel_mask"].sum() > 0
    assert all(side % 32 == 0 for side in inputs["pixel_values"].shape[-2:])


def test_antialiasing_is_an_option_and_off_by_default():
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, ::4] = 255
    options = {"size": {"height": 8, "width": 8}, "do_rescale": False, "do_normalize": False, "pad_size_divisor": 1}
    plain = MaskRcnnImageProcessor(**options)
    smooth = MaskRcnnImageProcessor(**options, antialias=True)
    assert plain.antialias is False
    # A quarter of the rows is white; every sample falls between a white and a black one.
    assert plain(picture)["pixel_values"].unique().tolist() == [128]
    assert smooth(picture)["pixel_values"].float().mean().item() == pytest.approx(64, abs=10)
    assert torch.equal(plain(picture, antialias=True)["pixel_values"], smooth(picture)["pixel_values"])


def test_file_names_pil_images_arrays_and_tensors_give_the_same_input(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    path = tmp_path / "picture.png"
    image.save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    processor = MaskRcnnImageProcessor(size={"shortest_edge": 40, "longest_edge": 90})
    expected = processor(image, return_tensors="pt")["pixel_values"]
    arrays = (pixels, pixels.astype(np.float32) / 255, pixels.astype(np.uint16) * 257)
    tensors = (tensor, tensor.float() / 255, tensor.double())
    for same in (path, str(path), [image], [path], *arrays, *tensors):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)


def test_grey_arrays_become_three_equal_channels(processor):
    grey = np.arange(20 * 32, dtype=np.int64).reshape(20, 32) % 256
    for picture in (grey, torch.from_numpy(grey), Image.fromarray(grey.astype(np.uint8))):
        inputs = processor(picture, return_tensors="pt", do_rescale=True, rescale_factor=1.0)
        for channel in inputs["pixel_values"][0]:
            assert torch.equal(channel[:20].int(), torch.from_numpy(grey).int())


def test_a_picture_with_an_exif_orientation_is_turned_upright(processor):
    image = Image.new("RGB", (40, 20))
    image.getexif()[0x0112] = 6
    mask = processor(image, return_tensors="pt")["pixel_mask"]
    assert mask[0, :40, :20].all() and mask.sum() == 800


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"^{path}: .*web page"):
        MaskRcnnImageProcessor()(path)


def test_saving_and_loading_changes_nothing(tmp_path):
    processor = MaskRcnnImageProcessor(
        image_mean=[0.5] * 3, antialias=True, pad_size_divisor=16, size={"height": 9, "width": 5}
    )
    processor.save_pretrained(tmp_path)
    loaded = MaskRcnnImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    saved = json.loads(MaskRcnnImageProcessor().to_json_string())
    assert saved["size"] == {"shortest_edge": 800, "longest_edge": 1333}
    assert (saved["antialias"], saved["pad_size_divisor"], saved["resample"]) == (False, 32, 2)


def _annotation(**changes: object) -> dict:
    polygon = [2, 1, 8, 1, 8, 5, 2, 5]
    return {"id": 1, "bbox": [2, 1, 6, 4], "category_id": 3, "area": 24, "segmentation": [polygon], **changes}


def test_labels_hold_boxes_classes_masks_and_crowds_of_the_resized_picture():
    processor = MaskRcnnImageProcessor(size={"height": 20, "width": 60})
    crowd = _annotation(iscrowd=1, bbox=[0, 0, 10, 5], segmentation=encode_mask(np.ones((10, 20))))
    annotations = {"image_id": 7, "annotations": [_annotation(), crowd, _annotation(category_id=0)]}
    inputs = processor(Image.new("RGB", (20, 10)), annotations, return_tensors="pt")
    (labels,) = inputs["labels"]
    assert labels.keys() == {"boxes", "class_labels", "masks", "ignored_boxes"}
    assert labels["boxes"].tolist() == [[6, 2, 24, 10]] * 2
    assert labels["class_labels"].tolist() == [3, 0]
    assert labels["ignored_boxes"].tolist() == [[0, 0, 30, 10]]
    expected = torch.zeros(20, 60, dtype=torch.bool)
    expected[2:10, 6:24] = True
    assert torch.equal(labels["masks"], expected.expand(2, 20, 60))


def test_a_picture_without_objects_has_empty_labels():
    labels = prepare_labels({"annotations": []}, (10, 20), (20, 40))
    assert labels["boxes"].shape == labels["ignored_boxes"].shape == (0, 4)
    assert labels["class_labels"].shape == (0,)
    assert labels["masks"].shape == (0, 20, 40)


@pytest.mark.parametrize(
    "changes",
    [
        {"area": 0},
        {"ignore": 1},
        {"bbox": [2, 1, 0.9, 4]},
        {"bbox": [2, 1, 6, -4]},
        {"bbox": [20, 1, 6, 4]},
        {"bbox": [2, 10, 6, 4]},
        {"bbox": [-6, 1, 6, 4]},
    ],
)
def test_annotations_that_the_reference_skips_are_left_out(changes):
    labels = prepare_labels({"annotations": [_annotation(**changes), _annotation()]}, (10, 20), (10, 20))
    assert labels["boxes"].tolist() == [[2, 1, 8, 5]]
    assert len(labels["masks"]) == 1


def test_boxes_are_clipped_to_the_picture():
    labels = prepare_labels({"annotations": [_annotation(bbox=[-2, 6, 30, 30])]}, (10, 20), (15, 20))
    assert labels["boxes"].tolist() == [[0, 9, 20, 15]]


def test_an_object_that_rounds_to_nothing_at_the_border_is_left_out():
    sliver = _annotation(bbox=[19.9999999, 2, 5, 5])
    labels = prepare_labels({"annotations": [sliver, _annotation()]}, (10, 20), (10, 20))
    assert len(labels["boxes"]) == len(labels["class_labels"]) == len(labels["masks"]) == 1
    assert (labels["boxes"][:, 2:] > labels["boxes"][:, :2]).all()


def test_no_pictures_at_all_get_one_clear_sentence(processor):
    with pytest.raises(ValueError, match="at least one picture is needed"):
        processor([])


def test_labels_without_segmentations_have_no_masks():
    entry = _annotation()
    del entry["segmentation"]
    assert "masks" not in prepare_labels({"annotations": [entry]}, (10, 20), (10, 20))


@pytest.mark.parametrize(
    ("annotations", "sentence"),
    [
        ([{"id": 5, "bbox": [1, 2, 3, 4]}], "annotation 5 has no category_id"),
        ([{"category_id": 0}], "an annotation has no bbox"),
        ([_annotation(bbox=[1, 2, 3])], "annotation 1: bbox must be four finite numbers"),
        ([_annotation(bbox=[1, 2, 3, float("nan")])], "annotation 1: bbox must be four finite numbers"),
        ([_annotation(bbox=["1", "2", "3", "4"])], "annotation 1: bbox must be four finite numbers"),
        ([_annotation(bbox=None)], "annotation 1: bbox must be four finite numbers"),
        ([_annotation(category_id="cat")], "annotation 1: category_id must be the index of a class, but got 'cat'"),
        ([_annotation(segmentation=[["1"] * 6])], "annotation 1: a polygon's corners must be finite numbers"),
        ([_annotation(segmentation=[[1, 2, 3]])], "annotation 1: a polygon needs at least three"),
        ([_annotation(segmentation={"size": [5, 5], "counts": [25]})], r"annotation 1: .*picture's size \[10, 20\]"),
        ([_annotation(), {"id": 2, "bbox": [1, 2, 3, 4], "category_id": 0}], "annotation 2 has no segmentation"),
    ],
)
def test_an_unreadable_annotation_is_named(annotations, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare_labels({"annotations": annotations}, (10, 20), (10, 20))


def test_annotations_must_be_in_coco_form_and_as_many_as_the_pictures(processor):
    picture = Image.new("RGB", (20, 10))
    with pytest.raises(ValueError, match="key 'annotations'"):
        processor(picture, [[_annotation()]])
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        processor([picture, picture], {"annotations": []})


def _outputs(boxes: list, scores: list, labels: list, masks: torch.Tensor, image_sizes: list) -> SimpleNamespace:
    return SimpleNamespace(
        pred_boxes=torch.tensor(boxes, dtype=torch.float32),
        scores=torch.tensor(scores),
        pred_labels=torch.tensor(labels),
        pred_masks=masks,
        image_sizes=torch.tensor(image_sizes),
    )


@pytest.fixture
def outputs() -> SimpleNamespace:
    """Two pictures of 10 x 20 and 5 x 10 in the input; three objects, two of them overlapping, and none."""
    boxes = [[[0, 0, 8, 4], [4, 0, 20, 10], [0, 0, 6, 4], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 4]
    scores = [[0.9, 0.8, 0.6, 0.0], [0.0] * 4]
    labels = [[2, 0, 1, -1], [-1] * 4]
    return _outputs(boxes, scores, labels, torch.full((2, 4, 28, 28), 5.0), [[10, 20], [5, 10]])


def test_boxes_come_back_in_pixels_of_the_target(outputs):
    found, nothing = MaskRcnnImageProcessor().post_process_object_detection(
        outputs, threshold=0.7, target_sizes=[(20, 60), (5, 10)]
    )
    assert found["boxes"].tolist() == [[0, 0, 24, 8], [12, 0, 60, 20]]
    assert found["labels"].tolist() == [2, 0]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert nothing["boxes"].shape == (0, 4)


@pytest.mark.parametrize("target_sizes", [None, [(10, 20), (5, 10)], torch.tensor([[10, 20], [5, 10]])])
def test_target_sizes_may_be_none_tuples_or_a_tensor(outputs, target_sizes):
    found = MaskRcnnImageProcessor().post_process_object_detection(outputs, 0.5, target_sizes)
    assert torch.equal(found[0]["boxes"], outputs.pred_boxes[0, :3])


def test_every_picture_needs_a_target_size(outputs):
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        MaskRcnnImageProcessor().post_process_coco(outputs, [(10, 20)])


def test_detections_come_best_first_whatever_their_order(outputs):
    outputs.scores = outputs.scores.flip(1)
    for name in ("pred_boxes", "pred_labels", "pred_masks"):
        setattr(outputs, name, getattr(outputs, name).flip(1))
    found = MaskRcnnImageProcessor().post_process_coco(outputs)[0]
    assert [result["category_id"] for result in found] == [2, 0, 1]


def test_an_id_map_shows_the_best_instance_at_each_pixel(outputs):
    processor = MaskRcnnImageProcessor()
    found, nothing = processor.post_process_instance_segmentation(outputs, 0.5, overlap_mask_area_threshold=0.5)
    expected = torch.full((10, 20), -1, dtype=torch.int32)
    expected[:, 4:] = 1
    expected[:4, :8] = 0  # the third lies wholly behind it
    assert torch.equal(found["segmentation"], expected)
    assert [(info["id"], info["label_id"]) for info in found["segments_info"]] == [(0, 2), (1, 0)]
    assert [info["score"] for info in found["segments_info"]] == pytest.approx([0.9, 0.8])
    assert nothing["segments_info"] == []
    assert torch.equal(nothing["segmentation"], torch.full((5, 10), -1, dtype=torch.int32))


def test_an_instance_is_left_out_of_the_map_when_too_little_of_it_is_visible(outputs):
    (found, _) = MaskRcnnImageProcessor().post_process_instance_segmentation(outputs, overlap_mask_area_threshold=0.9)
    assert [info["label_id"] for info in found["segments_info"]] == [2]  # 10 % of the second are hidden


def test_binary_maps_and_run_lengths_keep_every_instance_whole(outputs):
    processor = MaskRcnnImageProcessor()
    maps, no_maps = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)
    codes, no_codes = processor.post_process_instance_segmentation(outputs, return_coco_annotation=True)
    assert [info["label_id"] for info in maps["segments_info"]] == [2, 0, 1]
    assert maps["segments_info"] == codes["segments_info"]
    assert maps["segmentation"].sum(dim=(1, 2)).tolist() == [32, 160, 24]
    for code, mask in zip(codes["segmentation"], maps["segmentation"], strict=True):
        assert code == encode_mask(mask.numpy())
    assert no_maps["segmentation"].shape == (0, 5, 10)
    assert no_codes["segmentation"] == []
    with pytest.raises(ValueError, match="exclude each other"):
        processor.post_process_instance_segmentation(outputs, return_binary_maps=True, return_coco_annotation=True)


def test_a_higher_mask_threshold_gives_a_smaller_mask(outputs):
    outputs.pred_masks = torch.linspace(-4, 4, 28).expand(2, 4, 28, 28)  # rises from left to right
    processor = MaskRcnnImageProcessor()
    areas = []
    for threshold in (0.2, 0.5, 0.8):
        found, _ = processor.post_process_instance_segmentation(
            outputs, mask_threshold=threshold, return_binary_maps=True
        )
        areas.append(found["segmentation"].sum())
    assert areas[0] > areas[1] > areas[2] > 0


def test_coco_results_take_category_and_image_ids(outputs):
    processor = MaskRcnnImageProcessor()
    found, nothing = processor.post_process_coco(
        outputs, [(20, 60), (5, 10)], threshold=0.7, category_ids=[1, 7, 44], image_ids=[139, 285]
    )
    assert nothing == []
    assert [result["category_id"] for result in found] == [44, 1]
    assert [result["image_id"] for result in found] == [139, 139]
    assert [result["bbox"] for result in found] == [[0, 0, 24, 8], [12, 0, 48, 20]]
    assert decode_segmentation(found[0]["segmentation"], 20, 60).sum() == 24 * 8
    assert json.loads(json.dumps(found)) == found


def _reference_outputs(case: Any) -> SimpleNamespace:
    """The stored detections of both pictures in the frame of the network's input."""
    rows = [case.tensors[f"det_bboxes.{index}"] for index in range(2)]
    return SimpleNamespace(
        pred_boxes=torch.stack([case.tensors[f"mask_roi_boxes.{index}"] for index in range(2)]),
        scores=torch.stack([row[:, 4] for row in rows]),
        pred_labels=torch.stack([case.tensors[f"det_labels.{index}"] for index in range(2)]),
        pred_masks=torch.stack([case.tensors[f"mask_logits.{index}"] for index in range(2)]),
        image_sizes=torch.tensor([meta["img_shape"][:2] for meta in case.facts["img_metas"]]),
    )


def test_coco_results_equal_the_references(reference_case):
    """Boxes within float32 rounding; a few pixels of a mask's edge may fall otherwise on another processor."""
    case = reference_case("detector_inference")
    target_sizes = [tuple(meta["ori_shape"][:2]) for meta in case.facts["img_metas"]]
    results = MaskRcnnImageProcessor().post_process_coco(_reference_outputs(case), target_sizes)
    for ours, reference in zip(results, case.facts["results_original_image"], strict=True):
        assert len(ours) == len(reference) == 40
        for result, expected in zip(ours, reference, strict=True):
            assert result["category_id"] == expected["label"]
            assert result["score"] == expected["score"]
            left, top, width, height = result["bbox"]
            np.testing.assert_allclose([left, top, left + width, top + height], expected["bbox"], atol=1e-4)
            difference = coco_mask.decode(result["segmentation"]) != coco_mask.decode(expected["rle"])
            assert difference.sum() <= 4


@pytest.mark.parametrize("task", ["image-segmentation", "object-detection"])
def test_transformers_pipelines_take_the_processor(task, reference_detector):
    path = PICTURES / "000000565778.jpg"
    processor = MaskRcnnImageProcessor(size={"shortest_edge": 128, "longest_edge": 224})
    found = pipeline(task, model=reference_detector(), image_processor=processor)(str(path), threshold=0.5)
    assert found
    assert all(result["score"] > 0.5 and result["label"].startswith("LABEL_") for result in found)
    if task == "image-segmentation":
        assert all(result["mask"].size == (640, 400) and result["mask"].getbbox() for result in found)
    else:
        boxes = [result["box"] for result in found]
        assert all(0 <= box["xmin"] <= box["xmax"] <= 640 and 0 <= box["ymin"] <= box["ymax"] <= 400 for box in boxes)
        assert max(box["xmax"] for box in boxes) > 224  # in pixels of the picture, not of the input


def test_the_model_takes_the_processors_batch(reference_detector):
    """Pictures of different sizes with real annotations: finite losses, and detections in the pictures' frames."""
    data = json.loads((PICTURES.parent / "annotations" / "instances_val2017.json").read_text())
    images = data["images"][:2]
    annotations = [
        {
            "annotations": [
                {**entry, "category_id": 0} for entry in data["annotations"] if entry["image_id"] == image["id"]
            ]
        }
        for image in images
    ]
    processor = MaskRcnnImageProcessor(size={"shortest_edge": 128, "longest_edge": 224})
    inputs = processor([PICTURES / image["file_name"] for image in images], annotations, return_tensors="pt")
    with torch.no_grad():
        outputs = reference_detector()(**inputs)
    assert torch.isfinite(outputs.loss)
    sizes = [(image["height"], image["width"]) for image in images]
    for results, size in zip(processor.post_process_coco(outputs, sizes), sizes, strict=True):
        assert results and all(result["segmentation"]["size"] == list(size) for result in results)
