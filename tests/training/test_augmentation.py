"""The published augmentation, draw by draw, and the laws of views."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from vit_adapter.modeling_vit_adapter.masks import decode_segmentation, resize_mask, segmentation_as_rle
from vit_adapter.training.augmentation import Crop, Flip, OneOf, Resize, apply, masks_of, parse_steps, view_of
from vit_adapter.training.coco_index import open_coco, read_picture, trainable_objects
from vit_adapter.training.recipe import load_recipe

MASK_SIZE = [5, 8]


class RecordedDraws:
    """Gives out the original's draws in order and checks that they are asked for within the same bounds."""

    def __init__(self, draws):
        self.draws = list(draws)

    def random(self):
        kind, direction = self.draws.pop(0)
        assert kind == "flip"
        return 0.0 if direction else 1.0

    def integers(self, low, high):
        kind, *rest = self.draws.pop(0)
        if kind == "policy":
            assert (low, high) == (0, 2)
            return rest[0]
        bounds, value = rest
        assert [low, high] == (bounds if len(bounds) == 2 else [0, *bounds])
        return value


@pytest.fixture(scope="module")
def published_steps(request):
    return parse_steps(load_recipe(request.config.rootpath / "training/recipes/dinov2_small_3x.yaml").augmentation)


@pytest.fixture(scope="module")
def sample(request, tmp_path_factory):
    folder = request.config.rootpath / "training/sample_coco"
    index = open_coco(folder / "annotations/instances_train2017.json", tmp_path_factory.mktemp("cache"))
    return index, folder / "train2017"


@pytest.mark.parametrize("number", range(8))
def test_the_published_policy_replays_every_draw(reference_case, published_steps, sample, number):
    case = reference_case("train_transforms")
    facts = case.facts["samples"][number]
    index, folder = sample
    row = next(row for row in index.pictures if row["image_id"] == facts["image_id"])
    chosen = trainable_objects(row)
    boxes = np.array([row["boxes"][i] for i in chosen])
    boxes[:, 2:] += boxes[:, :2]
    start = view_of(read_picture(folder, row), boxes)
    labels = [list(index.categories).index(row["category_ids"][i]) for i in chosen]
    assert torch.equal(torch.from_numpy(start.boxes), case.tensors[f"{number}.raw_boxes"])
    assert labels == case.tensors[f"{number}.raw_labels"].tolist()

    draws = RecordedDraws(facts["draws"])
    view = apply(published_steps, start, draws)

    assert draws.draws == []
    assert [*view.size, 3] == facts["img_shape"]
    assert torch.equal(torch.from_numpy(view.boxes), case.tensors[f"{number}.gt_bboxes"])
    assert [labels[i] for i in view.kept] == case.tensors[f"{number}.gt_labels"].tolist()

    run_lengths = [{"size": facts["ori"], "counts": row["run_lengths"][i]} for i in chosen]
    height, width = view.size
    for mask, expected in zip(masks_of(view, run_lengths), facts["mask_rle"], strict=True):
        padded = coco_mask.decode(expected).astype(bool)
        assert np.array_equal(mask.numpy(), padded[:height, :width])
        assert not padded[height:].any() and not padded[:, width:].any()

    normalise = case.facts["pipeline"][-4]
    mean, std = (torch.tensor(normalise[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (view.image.float() - mean) * (1 / std)
    # The stored crop starts at (20, 20). The resizer repeats OpenCV's bits, so only float32's rounding is left.
    expected = case.tensors[f"{number}.img_crop"].permute(2, 0, 1)
    torch.testing.assert_close(pixels[:, 20:84, 20:84], expected, atol=1e-6, rtol=0)
    sums = torch.tensor(facts["image_sum_rgb"], dtype=torch.float64)
    torch.testing.assert_close(pixels.double().sum((1, 2)), sums, atol=0.2, rtol=1e-6)


def test_masks_equal_those_of_bitmaps_resized_step_by_step(published_steps):
    height, width = 60, 90
    segmentations = [[[10, 8, 70.5, 15, 40, 55.2]], [[1, 1, 20, 2, 15, 30], [60, 40, 89, 41, 75, 59]]]
    run_lengths = [segmentation_as_rle(one, height, width) for one in segmentations]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = np.array([[10, 8, 70.5, 55.2], [1, 1, 89, 59]])
    steps = (Flip(), Resize((41, 77), 200), Crop(30, 50), Resize((64,), 80))
    for seed in range(20):
        view = apply(steps, view_of(image, boxes), np.random.default_rng(seed))

        draws = np.random.default_rng(seed)
        bitmaps = np.stack([decode_segmentation(one, height, width) for one in segmentations])
        follower = view_of(image, boxes)
        for step in steps:
            before, follower = follower, step(follower, draws)
            if isinstance(step, Resize):
                bitmaps = resize_mask(bitmaps, *follower.size)
            elif isinstance(step, Flip):
                flipped = not np.array_equal(before.columns, follower.columns)
                bitmaps = bitmaps[:, :, ::-1] if flipped else bitmaps
            else:
                top = _start(before.rows, follower.rows)
                left = _start(before.columns, follower.columns)
                bitmaps = bitmaps[:, top : top + follower.size[0], left : left + follower.size[1]]
        assert np.array_equal(masks_of(view, run_lengths).numpy(), bitmaps[view.kept])


def _start(sources, window):
    """Where a window begins; any place with the same sources will do."""
    return next(i for i in range(len(sources)) if np.array_equal(sources[i : i + len(window)], window))


def test_flip_mirrors_boxes_and_pixels():
    image = torch.arange(3 * 5 * 8, dtype=torch.uint8).reshape(3, 5, 8)
    view = Flip(1.0)(view_of(image, np.array([[1, 2, 4, 5]])), np.random.default_rng(0))
    assert view.boxes.tolist() == [[4, 2, 7, 5]]
    assert torch.equal(view.image, image.flip(-1))


def test_an_object_without_mask_pixels_stays_if_its_box_is_in_the_window():
    class Corner:
        def integers(self, low, high):
            return low

    run_lengths = [segmentation_as_rle([[5, 0, 8, 0, 8, 5, 5, 5]], *MASK_SIZE)]
    image = torch.zeros(3, *MASK_SIZE, dtype=torch.uint8)
    view = Crop(4, 4)(view_of(image, np.array([[2, 0, 8, 5]])), Corner())
    assert view.boxes.tolist() == [[2, 0, 4, 4]]
    assert not masks_of(view, run_lengths).any()


def test_a_window_may_hold_no_object():
    class Corner:
        def integers(self, low, high):
            return low

    image = torch.zeros(3, *MASK_SIZE, dtype=torch.uint8)
    view = Crop(3, 3)(view_of(image, np.array([[4, 4, 8, 5]])), Corner())
    assert view.boxes.shape == (0, 4)
    assert masks_of(view, []).shape == (0, 3, 3)


def test_boxes_are_clipped_to_the_picture_and_objects_beyond_it_left_out():
    boxes = np.array([[-4.0, 2.0, 10.0, 99.0], [40.0, 0.0, 45.0, 5.0]])
    view = view_of(torch.zeros(3, 30, 40, dtype=torch.uint8), boxes)
    assert view.boxes.tolist() == [[0, 2, 10, 30]] and view.kept.tolist() == [0]


def test_the_long_side_limits_the_resize():
    image = torch.zeros(3, 10, 40, dtype=torch.uint8)
    view = Resize((20,), 60)(view_of(image, np.zeros((0, 4))), np.random.default_rng(0))
    assert view.size == (15, 60)


def test_steps_are_read_as_the_recipe_describes_them():
    described = [
        {"flip": None},
        {"one_of": [[{"resize": {"short_sides": [4, 5]}}], [{"crop": dict.fromkeys(SIDES, 3)}]]},
    ]
    assert parse_steps(described) == (Flip(0.5), OneOf(((Resize((4, 5)),), (Crop(3, 3),))))


SIDES = ("smallest", "largest")


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ("flip", "an augmentation is a list of steps"),
        ([{"rotate": {}}], "knows the steps flip, resize, crop and one_of, but got 'rotate'"),
        ([{"flip": {"chance": 1}}], "the step flip takes probability"),
        ([{"crop": {"smallest": -1, "largest": 2}}], "numbers of at least 0"),
        ([{"crop": {"smallest": 1}}], "the step crop takes smallest, largest"),
        ([{"one_of": []}], "one_of takes a list of branches"),
        ([{"resize": {"short_sides": 800}}], "the step resize"),
        (["flip"], "one name with its arguments"),
    ],
)
def test_a_wrong_step_is_named(described, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_steps(described)
