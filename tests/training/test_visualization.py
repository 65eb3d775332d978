"""Drawn pictures and curves."""

import numpy as np
import pytest
from PIL import Image

from vit_adapter.modeling_vit_adapter.masks import encode_mask
from vit_adapter.training.visualization import draw_instances, draw_loss_curve, side_by_side

NAMES = {1: "cat", 2: "dog"}


def instance(category_id=1, **others):
    mask = np.zeros((60, 100), dtype=bool)
    mask[30:50, 20:80] = True
    return {"category_id": category_id, "bbox": [20, 30, 60, 20], "segmentation": encode_mask(mask), **others}


def test_masks_are_tinted_and_the_rest_is_untouched():
    image = Image.new("RGB", (100, 60), (100, 100, 100))
    drawn = np.asarray(draw_instances(image, [instance(score=0.9)], NAMES))
    assert drawn.shape == (60, 100, 3)
    assert (drawn[40, 50] != 100).any()
    assert (drawn[55:] == 100).all()
    assert (drawn[:10, 85:] == 100).all()
    assert (np.asarray(image) == 100).all()


def test_classes_have_colours_of_their_own():
    image = Image.new("RGB", (100, 60))
    cat, dog = (np.asarray(draw_instances(image, [instance(number)], NAMES))[40, 50] for number in (1, 2))
    assert not np.array_equal(cat, dog)


def test_the_first_instance_lies_on_top():
    image = Image.new("RGB", (100, 60))
    both = np.asarray(draw_instances(image, [instance(1), instance(2)], NAMES))
    alone = np.asarray(draw_instances(image, [instance(1)], NAMES))
    assert np.array_equal(both[49, 50], alone[49, 50])  # the outline


def test_pictures_stand_side_by_side():
    pair = side_by_side([Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 30), "blue")], ["left", "right"])
    pixels = np.asarray(pair)
    assert pair.width == 40 + 20 + 8
    assert pixels[-1, 0].tolist() == [255, 0, 0]
    assert pixels[-1, -1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("count", [1, 5])
def test_a_loss_curve_is_written(tmp_path, count):
    records = [
        {"step": step, "loss": 3 / step, "loss_cls": 1 / step, "learning_rate": 1e-3} for step in range(1, count + 1)
    ]
    draw_loss_curve(records, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (1080, 600)
