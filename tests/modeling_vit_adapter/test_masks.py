"""Pasting, run lengths, polygons and nearest-neighbour resizing of masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from vit_adapter.modeling_vit_adapter import masks
from vit_adapter.modeling_vit_adapter.masks import (
    decode_segmentation,
    encode_mask,
    paste_mask,
    paste_mask_as_rle,
    paste_region,
    rasterize_polygons,
    resize_mask,
    segmentation_as_rle,
)

SAMPLE = Path(__file__).parents[2] / "training" / "sample_coco"

# A triangle, a rectangle partly outside on the left and above, and one reaching the right and lower border.
POLYGONS = [[2, 1, 9, 2, 4, 6], [-3, -2, 3, -2, 3, 3, -3, 3], [7, 5, 12, 5, 12, 8, 7, 8]]
HEIGHT, WIDTH = 8, 12


@pytest.fixture
def pasted(reference_case) -> dict[str, np.ndarray]:
    """Boxes (10, 4), mask probabilities (10, 28, 28) and the reference's masks (10, 90, 130)."""
    case = reference_case("masks").tensors
    return {
        "boxes": case["boxes"].numpy(),
        "probabilities": case["mask_logits"].sigmoid().numpy(),
        "masks": case["pasted_binary"].numpy().astype(bool),
    }


def test_pasting_equals_the_reference(pasted):
    """Also for boxes partly outside the picture and of no width. A few pixels may round otherwise elsewhere."""
    for mask, box, expected in zip(pasted["probabilities"], pasted["boxes"], pasted["masks"], strict=True):
        assert (paste_mask(mask, box, 90, 130) != expected).sum() <= 4


def test_pasting_as_run_lengths_encodes_the_pasted_mask(pasted, monkeypatch):
    monkeypatch.setattr(masks, "STRIP_PIXELS", 300)  # several strips a mask
    for mask, box in zip(pasted["probabilities"], pasted["boxes"], strict=True):
        rle = paste_mask_as_rle(mask, box, 90, 130)
        assert rle == encode_mask(paste_mask(mask, box, 90, 130))


def test_a_full_mask_pasted_fills_exactly_its_box():
    mask = paste_mask(np.ones((28, 28), dtype=np.float32), [2, 1, 7, 4], 6, 9)
    expected = np.zeros((6, 9), dtype=bool)
    expected[1:4, 2:7] = True
    np.testing.assert_array_equal(mask, expected)


def test_a_pasted_mask_keeps_its_orientation():
    halves = np.zeros((4, 4), dtype=np.float32)
    halves[:2, 2:] = 1  # the upper right quarter
    mask = paste_mask(halves, [0, 0, 8, 4], 4, 8)
    assert mask[:2, 4:].all() and mask.sum() == 8


@pytest.mark.parametrize("box", [[20, 1, 25, 4], [-9, 1, -4, 4], [2, 30, 7, 33], [2, -33, 7, -30]])
def test_a_box_outside_the_picture_pastes_nothing(box):
    probabilities = np.ones((28, 28), dtype=np.float32)
    assert not paste_mask(probabilities, box, 6, 9).any()
    assert paste_mask_as_rle(probabilities, box, 6, 9) == encode_mask(np.zeros((6, 9), dtype=bool))


def test_the_pasted_region_is_one_pixel_wider_than_the_box_and_within_the_picture():
    assert paste_region([2.5, 3.0, 4.5, 5.0], 20, 30) == (1, 2, 6, 6)
    assert paste_region([-5, -5, 100, 100], 20, 30) == (0, 0, 30, 20)


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((3, 5)),
        np.ones((3, 5)),
        np.eye(4, 6),
        1 - np.eye(4, 6),
        np.array([[0, 1, 1], [0, 1, 1]]),  # full columns side by side: one run
        np.array([[1, 0, 0], [0, 0, 1]]),  # the first and the last pixel
    ],
)
def test_encoding_equals_pycocotools(mask):
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_mask(mask) == {"size": list(mask.shape), "counts": expected["counts"].decode()}


def test_decoding_inverts_encoding():
    mask = np.random.default_rng(0).random((13, 7)) < 0.4
    np.testing.assert_array_equal(decode_segmentation(encode_mask(mask), 13, 7), mask)


def test_all_three_forms_of_run_lengths_are_one_mask():
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:, 1:3] = True
    uncompressed = {"size": [3, 4], "counts": [4, 2, 1, 2, 3]}
    compressed = encode_mask(mask)
    for segmentation in (uncompressed, compressed, {**compressed, "counts": compressed["counts"].encode()}):
        np.testing.assert_array_equal(decode_segmentation(segmentation, 3, 4), mask)
        assert segmentation_as_rle(segmentation, 3, 4) == compressed


def test_polygons_of_an_object_are_united():
    together = decode_segmentation(POLYGONS, HEIGHT, WIDTH)
    each = [decode_segmentation([polygon], HEIGHT, WIDTH) for polygon in POLYGONS]
    np.testing.assert_array_equal(together, np.logical_or.reduce(each))
    assert together[:3, :3].all() and not together[6, 0]


def _laid_into_the_picture(polygons: list, height: int, width: int) -> np.ndarray:
    part, left, top = rasterize_polygons(polygons, height, width)
    whole = np.zeros((height, width), dtype=bool)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return whole


@pytest.mark.parametrize("polygons", [*([polygon] for polygon in POLYGONS), POLYGONS, [[20, 1, 25, 1, 22, 4]]])
def test_the_part_around_polygons_laid_into_the_picture_is_the_whole_mask(polygons):
    expected = decode_segmentation(polygons, HEIGHT, WIDTH)
    np.testing.assert_array_equal(_laid_into_the_picture(polygons, HEIGHT, WIDTH), expected)


def test_the_part_around_real_polygons_laid_into_the_picture_is_the_whole_mask():
    """Slanted edges round differently when polygons are moved: real ones have many."""
    data = json.loads((SAMPLE / "annotations" / "instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    checked = 0
    for entry in data["annotations"]:
        if isinstance(entry["segmentation"], list):
            size = sizes[entry["image_id"]]
            expected = decode_segmentation(entry["segmentation"], *size)
            np.testing.assert_array_equal(_laid_into_the_picture(entry["segmentation"], *size), expected)
            checked += 1
    assert checked > 50


def test_the_part_around_polygons_has_a_border_of_zeros_inside_the_picture():
    part, left, top = rasterize_polygons([[3, 3, 6, 3, 6, 5, 3, 5]], HEIGHT, WIDTH)
    assert (left, top) == (2, 2)
    assert part.sum() == 6 == part[1:-1, 1:-1].sum()


@pytest.mark.parametrize(
    ("segmentation", "sentence"),
    [
        ([], "list of polygons or a run-length dict"),
        (None, "list of polygons or a run-length dict"),
        ([[1, 2, 3, 4]], "at least three x, y pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three x, y pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite"),
        ({"size": [4, 3], "counts": [12]}, r"the picture's size \[3, 4\]"),
        ({"size": [3, 4], "counts": [4, 2]}, "add up to 3 x 4"),
        ({"size": [3, 4]}, "add up to 3 x 4"),
    ],
)
def test_an_unreadable_segmentation_is_refused_with_the_reason(segmentation, sentence):
    with pytest.raises(ValueError, match=sentence):
        decode_segmentation(segmentation, 3, 4)


def test_a_long_polygon_is_quoted_in_short():
    with pytest.raises(ValueError, match=r"\.\.\.$") as error:
        decode_segmentation([[1.5] * 200_001], 3, 4)
    assert len(str(error.value)) < 200


def test_a_mask_is_resized_to_its_nearest_neighbours():
    mask = np.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(
        resize_mask(mask, 4, 5), [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6], [4, 4, 5, 5, 6]]
    )
    np.testing.assert_array_equal(resize_mask(mask, 1, 2), [[1, 2]])
    np.testing.assert_array_equal(resize_mask(mask, 2, 3), mask)
    assert resize_mask(np.stack([mask] * 3), 4, 5).shape == (3, 4, 5)


def test_run_lengths_without_pycocotools_name_the_package(monkeypatch):
    monkeypatch.setattr(masks, "coco_mask", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        encode_mask(np.ones((2, 3)))
