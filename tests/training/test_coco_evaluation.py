"""AP as the reference reads it, on detections whose AP is known."""

import json

import numpy as np
import pytest

from vit_adapter.modeling_vit_adapter.masks import encode_mask
from vit_adapter.training.coco_evaluation import best_line, evaluate_results
from vit_adapter.training.coco_index import open_coco

HEIGHT, WIDTH = 120, 200


def bitmap(left, top, width, height):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return encode_mask(mask)


def result(box, *, row=0, category=3, score=0.9, mask=None):
    return {
        "image_id": row,
        "category_id": category,
        "bbox": [float(side) for side in box],
        "score": score,
        "segmentation": bitmap(*(mask or box)),
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Two pictures, three objects: a small and a large cat, a medium dog; all annotation ids are 0."""
    folder = tmp_path_factory.mktemp("evaluation")
    objects = [(0, 3, (10, 10, 20, 20)), (0, 9, (50, 50, 50, 40)), (1, 3, (5, 5, 150, 100))]
    content = {
        "images": [
            {"id": number + 70, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (0, 1)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 11, "name": "cow"}],
        "annotations": [
            {
                "id": 0,
                "image_id": row + 70,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": bitmap(*box),
            }
            for row, category, box in objects
        ],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return open_coco(path, folder / "cache")


PERFECT = [
    result((10, 10, 20, 20)),
    result((50, 50, 50, 40), category=9),
    result((5, 5, 150, 100), row=1),
]


def test_perfect_detections_have_an_ap_of_100(index):
    metrics = evaluate_results(PERFECT, index)
    for kind in ("box", "mask"):
        for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"):
            assert metrics[kind][name] == pytest.approx(100), (kind, name)
        assert metrics[kind]["per_class"] == {"cat": pytest.approx(100), "dog": pytest.approx(100), "cow": None}


def test_no_detections_have_an_ap_of_0(index):
    metrics = evaluate_results([], index)
    assert metrics["box"]["AP"] == metrics["mask"]["AP50"] == 0
    assert metrics["mask"]["per_class"] == {"cat": 0, "dog": 0, "cow": None}
    assert best_line(metrics) == "box AP / AP50 / AP75 0.0 / 0.0 / 0.0, mask AP / AP50 / AP75 0.0 / 0.0 / 0.0"


def test_one_of_two_objects_found_is_half_the_recall(index):
    metrics = evaluate_results(PERFECT[1:], index)
    # Precision is 1 at the recall levels 0, 0.01, ..., 0.5 and 0 above: 51 of 101.
    assert metrics["box"]["per_class"]["cat"] == pytest.approx(100 * 51 / 101)


def test_a_box_of_iou_two_thirds_counts_at_the_lower_four_thresholds(index):
    shifted = result((60, 50, 50, 40), category=9)  # overlap 40 of 60 columns
    metrics = evaluate_results([PERFECT[0], shifted, PERFECT[2]], index)
    assert metrics["box"]["per_class"]["dog"] == pytest.approx(40)
    assert metrics["box"]["AP50"] == pytest.approx(100)
    assert metrics["box"]["AP75"] == pytest.approx(50)


def test_boxes_and_masks_are_judged_apart(index):
    thin_mask = result((5, 5, 150, 100), row=1, mask=(5, 5, 150, 10))
    metrics = evaluate_results([*PERFECT[:2], thin_mask], index)
    assert metrics["box"]["AP"] == pytest.approx(100)
    assert metrics["mask"]["per_class"]["cat"] < 60


def test_false_detections_are_sized_by_their_box_and_by_their_mask(index):
    # Ahead of the true detection, it halves the precision of its own size class only.
    wrong = result((90, 5, 100, 110), score=0.99, mask=(180, 5, 10, 10))
    metrics = evaluate_results([*PERFECT, wrong], index)
    assert metrics["box"]["AP_small"] == pytest.approx(100)
    assert metrics["box"]["AP_large"] == pytest.approx(50)
    assert metrics["mask"]["AP_small"] == pytest.approx(50)
    assert metrics["mask"]["AP_large"] == pytest.approx(100)


def test_more_than_a_hundred_detections_of_a_picture_count(index):
    wrong = [result((100 + i % 50, 60, 30, 30), category=9, score=0.5) for i in range(150)]
    late = result((50, 50, 50, 40), category=9, score=0.1)
    assert evaluate_results([PERFECT[0], PERFECT[2], *wrong, late], index)["box"]["per_class"]["dog"] > 0


def test_detections_that_are_not_finite_are_left_out(index):
    wrong = [{**PERFECT[0], "score": float("nan")}, {**PERFECT[0], "bbox": [float("inf"), 0.0, 1.0, 1.0]}]
    assert evaluate_results([*PERFECT, *wrong], index) == evaluate_results(PERFECT, index)


def test_only_the_pictures_looked_at_count(index):
    metrics = evaluate_results([PERFECT[2]], index, rows=[1])
    assert metrics["box"]["AP"] == pytest.approx(100)
    assert metrics["box"]["per_class"] == {"cat": pytest.approx(100), "dog": None, "cow": None}
