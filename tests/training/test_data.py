"""COCO files as indices, pictures and batches; and what is said about wrong ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vit_adapter.training.augmentation import Resize
from vit_adapter.training.coco_index import find_pictures, open_coco, read_picture, trainable_objects
from vit_adapter.training.data import TrainingBatches, TrainingPictures, collate, orientation_batches

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def annotation(**changes):
    return {
        "id": 1,
        "image_id": 7,
        "category_id": 3,
        "bbox": [2, 2, 10, 10],
        "area": 100,
        "iscrowd": 0,
        "segmentation": SQUARE,
        **changes,
    }


def content(**changes):
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [annotation()],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    """Writes an annotation file and opens it."""

    def write_and_open(data):
        path = tmp_path / "annotations.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return open_coco(path, tmp_path / "cache")

    return write_and_open


@pytest.fixture
def pictures(tmp_path, write):
    """A data set of a wide, a tall and a background picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = {"a.png": (60, 40), "b.png": (40, 60), "c.png": (50, 50)}
    for name, size in sizes.items():
        Image.new("RGB", size, (10, 20, 30)).save(folder / name)
    images = [
        {"id": number, "file_name": name, "height": height, "width": width}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    annotations = [annotation(image_id=0), annotation(image_id=0, category_id=9), annotation(image_id=1)]

    def make(**options):
        arguments = {"steps": (), "mean": (10, 20, 30), "std": (1, 2, 4), "seed": 0, **options}
        return TrainingPictures(write(content(images=images, annotations=annotations)), folder, **arguments)

    return make


def test_categories_become_classes_in_ascending_order_of_their_ids(write):
    index = write(content())
    assert dict(index.categories) == {3: "cat", 9: "dog"}
    assert index.labels() == {3: 0, 9: 1}


def test_classes_of_a_model_are_matched_by_name(write):
    index = write(content())
    assert index.labels({"dog": 0, "cow": 1, "cat": 2}) == {3: 2, 9: 0}
    with pytest.raises(ValueError, match="the category 'dog' is none of the model's 1 classes"):
        index.labels({"cat": 0})


def test_an_index_is_made_once_for_the_same_content(tmp_path, write):
    write(content())
    (table,) = (tmp_path / "cache").glob("*/pictures.arrow")
    made = table.stat().st_mtime_ns
    write(content())
    assert table.stat().st_mtime_ns == made
    write(content(annotations=[]))
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"iscrowd": 1},
        {"ignore": True},
        {"area": 0},
        {"bbox": [2, 2, 0.5, 10]},
        {"bbox": [70, 2, 10, 10]},
        {"bbox": [-20, 2, 10, 10]},
    ],
)
def test_objects_that_the_reference_leaves_out_are_left_out(write, changes):
    index = write(content(annotations=[annotation(**changes), annotation(area=50)]))
    assert trainable_objects(index.pictures[0]) == [1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [2, 2, 0, 10]}, "box without area"),
        ({"bbox": [2, 2, 10]}, "box that is not four finite numbers"),
        ({"bbox": [2, 2, None, 10]}, "box that is not four finite numbers"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least three x, y pairs"),
        ({"segmentation": {"size": [1, 1], "counts": [1]}}, "must have the picture's size"),
    ],
)
def test_annotations_that_cannot_be_used_are_counted_and_said(write, caplog, changes, reason):
    index = write(content(annotations=[annotation(**changes), annotation()]))
    assert len(index.pictures[0]["boxes"]) == 1
    assert reason in next(iter(index.skipped))
    assert "skipped annotations: 1 x" in caplog.text


def test_a_missing_area_is_the_masks(write):
    bare = annotation()
    del bare["area"]
    assert write(content(annotations=[bare])).pictures[0]["areas"] == [100]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("", "not JSON: Expecting value in line 1, column 1"),
        ('{"images": [}', "not JSON: Expecting value in line 1, column 13"),
        ("[]", "not COCO: an object with images, annotations, categories was expected"),
        ({"images": [], "annotations": []}, "not COCO: the list 'categories' is missing"),
        (content(images=[{"id": 7}]), "image 7: 'file_name' is None, not a text"),
        (content(images=[{"id": "x", "file_name": "a", "height": 1, "width": 1}]), "'id' is 'x', not a whole number"),
        (content(annotations=[annotation(image_id=8)]), "is of image 8, which is not listed"),
        (content(annotations=[annotation(category_id=80)]), "has the category 80, which is not listed"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "the category id 3 is given twice"),
        (content(categories=[{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]), "two categories have the name 'a'"),
        (content(images=[{"id": 7, "file_name": "a", "height": 9, "width": 9}] * 2), "the image id 7 is given twice"),
        (content(images=[{"id": 7, "file_name": "a", "height": 0, "width": 9}]), "the image 7 is 0 x 9 pixels"),
        *(
            (
                content(images=[{"id": 7, "file_name": name, "height": 9, "width": 9}]),
                "leads out of the picture folder",
            )
            for name in ("../a.png", "/etc/a.png", "x/../../a.png", "C:\\a.png", "")
        ),
    ],
)
def test_a_file_that_is_not_coco_is_refused_in_a_sentence(write, data, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        write(data)
    assert "annotations.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json: there is no such annotation file"):
        open_coco(tmp_path / "nothing.json", tmp_path)


def test_a_refused_file_leaves_nothing_behind(tmp_path, write):
    with pytest.raises(ValueError, match="not listed"):
        write(content(annotations=[annotation(image_id=8)]))
    assert not (tmp_path / "cache").exists()


def test_missing_pictures_are_listed(tmp_path, write):
    with pytest.raises(ValueError, match=r"1 of 1 pictures of .*annotations\.json are missing: a\.png"):
        find_pictures(write(content()), tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder of pictures"):
        find_pictures(write(content()), tmp_path / "nowhere")


@pytest.mark.parametrize(("size", "cause"), [((40, 60), "EXIF orientation"), ((61, 40), "another picture")])
def test_a_picture_of_another_size_than_annotated_is_refused(tmp_path, write, size, cause):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=cause):
        read_picture(tmp_path, write(content()).pictures[0])


def test_pictures_without_annotations_are_kept_on_request(pictures):
    assert len(pictures()) == 2
    assert len(pictures(keep_background=True)) == 3
    assert pictures(keep_background=True)[0, 2]["labels"]["masks"].shape == (0, 50, 50)


def test_a_data_set_without_usable_pictures_is_refused(tmp_path, write):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no picture has a usable object"):
        TrainingPictures(write(content(annotations=[])), tmp_path, steps=(), mean=(0,) * 3, std=(1,) * 3, seed=0)


def test_a_picture_is_normalised_and_labelled(pictures):
    sample = pictures()[0, 0]
    assert torch.equal(sample["pixel_values"], torch.zeros(3, 40, 60))
    assert sample["labels"]["boxes"].tolist() == [[2, 2, 12, 12]] * 2
    assert sample["labels"]["class_labels"].tolist() == [0, 1]
    assert sample["labels"]["masks"].sum((1, 2)).tolist() == [100, 100]


def test_augmentation_depends_on_seed_epoch_and_picture_only(pictures):
    steps = (Resize(tuple(range(33, 97))),)
    first, again, other_seed = pictures(steps=steps), pictures(steps=steps), pictures(steps=steps, seed=1)
    sizes = [first[epoch, 0]["pixel_values"].shape for epoch in range(8)]
    assert sizes == [again[epoch, 0]["pixel_values"].shape for epoch in range(8)]
    assert sizes != [other_seed[epoch, 0]["pixel_values"].shape for epoch in range(8)]
    assert len(set(sizes)) > 4


def test_a_batch_is_padded_with_zeros_to_multiples_of_32(pictures):
    data = pictures(mean=(0, 0, 0))
    batch = collate([data[0, 0], data[0, 1]])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 60, 60 * 40]
    assert torch.equal(batch["pixel_values"][0, 0] != 0, batch["pixel_mask"][0] == 1)
    assert batch["image_ids"] == [0, 1]


def test_batches_hold_pictures_of_one_orientation_and_steps_are_full():
    is_wide = np.array([True] * 7 + [False] * 4)
    batches = orientation_batches(is_wide, batch_size=2, total_batch_size=4, seed=0, epoch=0)
    assert len(batches) == 4 + 2
    assert all(len({bool(is_wide[i]) for i in batch}) == 1 for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(11))


def test_epochs_differ_and_repeat_exactly():
    is_wide = np.arange(20) % 3 > 0
    arguments = {"batch_size": 2, "total_batch_size": 4, "seed": 0}
    epochs = [orientation_batches(is_wide, epoch=epoch, **arguments) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_processes_and_accumulation_share_out_the_same_steps():
    is_wide = np.arange(13) % 3 > 0
    arguments = {"batch_size": 1, "num_epochs": 2}
    alone = list(TrainingBatches(is_wide, accumulation=4, **arguments))
    shared = [
        list(TrainingBatches(is_wide, accumulation=2, processes=2, process=rank, **arguments)) for rank in range(2)
    ]
    assert len(alone) == 2 * sum(map(len, shared)) // 2
    for step in range(len(alone) // 4):
        together = [batch for part in shared for batch in part[2 * step : 2 * step + 2]]
        assert sorted(together) == sorted(alone[4 * step : 4 * step + 4])


def test_batches_go_on_from_any_step():
    is_wide = np.arange(13) % 3 > 0
    arguments = {"batch_size": 2, "accumulation": 2, "num_epochs": 3}
    everything = TrainingBatches(is_wide, **arguments)
    rest = TrainingBatches(is_wide, first_step=5, **arguments)
    assert list(everything)[10:] == list(rest)
    assert (len(everything), len(rest)) == (len(list(everything)), len(list(rest)))


def test_max_steps_ends_the_training():
    assert TrainingBatches(np.array([True] * 4), batch_size=1, num_epochs=9, max_steps=6).last_step == 6
