"""From a COCO annotation file and a folder of pictures to training batches.

The file is read once and kept as an Arrow table, memory-mapped and shared by all processes: one row a picture, with
the masks of its objects as run-length codes at the picture's own size. Everything random about a picture is drawn from
a generator seeded with (seed, epoch, position), so that any batch can be made again.

N: objects of a picture. H, W: height and width of a batch. h, w: of one picture in it. Boxes are xyxy in pixels.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from pycocotools import mask as coco_mask
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from vit_adapter.modeling_vit_adapter.image_reading import load_image
from vit_adapter.modeling_vit_adapter.masks import segmentation_as_rle
from vit_adapter.training.augmentation import Step, apply, masks_of, view_of

logger = logging.getLogger(__name__)

INDEX_VERSION = 1  # part of an index's name: another layout is another index
SMALLEST_SIDE = 32  # pictures with a shorter side are not trained on
SIZE_DIVISOR = 32
MISSING_FILES_SHOWN = 20

ROW = datasets.Features(
    {
        "image_id": datasets.Value("int64"),
        "file_name": datasets.Value("string"),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "boxes": datasets.List(datasets.List(datasets.Value("float64"), length=4)),  # x, y, width, height
        "category_ids": datasets.List(datasets.Value("int64")),
        "areas": datasets.List(datasets.Value("float64")),
        "is_crowd": datasets.List(datasets.Value("bool")),
        "is_ignored": datasets.List(datasets.Value("bool")),
        "run_lengths": datasets.List(datasets.Value("string")),  # counts of COCO's compressed RLE
    }
)


@dataclass(frozen=True)
class CocoIndex:
    """The content of a COCO annotation file.

    Attributes:
        source: The annotation file.
        pictures: One row a picture, in the file's order, with the columns of `ROW`.
        categories: Name by category id, ids ascending.
        skipped: How many annotations cannot be used, by reason.
    """

    source: Path
    pictures: datasets.Dataset
    categories: Mapping[int, str]
    skipped: Mapping[str, int]

    def labels(self, label2id: Mapping[str, int] | None = None) -> dict[int, int]:
        """Class index by category id: ascending ids, or a model's classes matched by name.

        Raises:
            ValueError: the model has no class of a category's name.
        """
        if label2id is None:
            return {category_id: label for label, category_id in enumerate(self.categories)}
        unknown = [name for name in self.categories.values() if name not in label2id]
        if unknown:
            raise ValueError(
                f"{self.source}: the category {unknown[0]!r} is none of the model's {len(label2id)} classes "
                f"({_some(label2id)}): evaluate with the annotations' own model, or train on these categories"
            )
        return {category_id: label2id[name] for category_id, name in self.categories.items()}


def open_coco(annotations: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> CocoIndex:
    """The index of a COCO annotation file, made if this content has not been seen before.

    Args:
        cache_dir: Where indices are kept; None: `vit_adapter` in the cache folder of `datasets`.

    Raises:
        ValueError: the file is missing or is not COCO; the sentence says where it fails.
    """
    source = Path(annotations)
    if not source.is_file():
        raise ValueError(f"{source}: there is no such annotation file")
    root = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "vit_adapter"
    folder = root / f"coco-{_digest(source)}-v{INDEX_VERSION}"
    if not folder.is_dir():
        _write_index(source, folder)
    about = json.loads((folder / "about.json").read_text())
    index = CocoIndex(
        source=source,
        pictures=datasets.Dataset.from_file(str(folder / "pictures.arrow")),
        categories={int(category_id): name for category_id, name in about["categories"].items()},
        skipped=about["skipped"],
    )
    if index.skipped:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in index.skipped.items())
        logger.warning("%s: skipped annotations: %s", source, reasons)
    return index


def find_pictures(index: CocoIndex, folder: str | os.PathLike[str]) -> Path:
    """The folder, once every picture of the index is known to be in it.

    Raises:
        ValueError: the folder or pictures are missing; the sentence lists them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder of pictures")
    by_parent = defaultdict(list)
    for name in index.pictures["file_name"]:
        by_parent[PurePosixPath(name).parent].append(name)
    missing = []
    for parent, names in by_parent.items():
        present = set(os.listdir(root / parent)) if (root / parent).is_dir() else set()
        missing += [name for name in names if PurePosixPath(name).name not in present]
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} of {len(index.pictures)} pictures of {index.source} are missing: {_some(missing)}"
        )
    return root


def read_picture(root: Path, row: Mapping[str, Any]) -> torch.Tensor:
    """The picture of a row as (3, h, w) uint8 RGB.

    Raises:
        ValueError: it cannot be read, or has another size than the annotations say.
    """
    path = root / row["file_name"]
    image = np.array(load_image(path))
    said, found = (row["height"], row["width"]), image.shape[:2]
    if said != found:
        turned = said == found[::-1]
        cause = (
            "they were made before its EXIF orientation was applied" if turned else "they belong to another picture"
        )
        raise ValueError(
            f"{path}: the picture is {found[0]} x {found[1]} (height x width), but the annotations say "
            f"{said[0]} x {said[1]}: {cause}"
        )
    return torch.from_numpy(image).permute(2, 0, 1)


def trainable_objects(row: Mapping[str, Any]) -> list[int]:
    """Which of a row's objects are trained on: not crowds, not ignored, not empty and not wholly outside."""
    chosen = []
    for index, (left, top, width, height) in enumerate(row["boxes"]):
        visible_width = min(left + width, row["width"]) - max(left, 0)
        visible_height = min(top + height, row["height"]) - max(top, 0)
        is_object = not row["is_crowd"][index] and not row["is_ignored"][index]
        is_seen = row["areas"][index] > 0 and width >= 1 and height >= 1 and visible_width > 0 and visible_height > 0
        if is_object and is_seen:
            chosen.append(index)
    return chosen


class TrainingPictures(Dataset):
    """Augmented, normalised pictures with their objects, by (epoch, position among the pictures trained on).

    Args:
        steps: The augmentation.
        mean, std: (3,) normalisation of RGB in 0 to 255.
        label2id: Classes of the model; None: the categories in ascending order of their ids.
        keep_background: Whether pictures without annotations are kept.
    """

    def __init__(
        self,
        index: CocoIndex,
        folder: str | os.PathLike[str],
        *,
        steps: Sequence[Step],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        label2id: Mapping[str, int] | None = None,
        keep_background: bool = False,
    ) -> None:
        self.index = index
        self.root = find_pictures(index, folder)
        self.steps = tuple(steps)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self.seed = seed
        self.labels = index.labels(label2id)
        heights, widths = np.array(index.pictures["height"]), np.array(index.pictures["width"])
        annotated = np.array([keep_background or bool(ids) for ids in index.pictures["category_ids"]], dtype=bool)
        self.rows = np.flatnonzero(annotated & (np.minimum(heights, widths) >= SMALLEST_SIDE))
        self.is_wide = widths[self.rows] > heights[self.rows]
        if not self.rows.size:
            raise ValueError(f"{index.source}: no picture has a usable object and sides of at least {SMALLEST_SIDE}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        row = self.index.pictures[int(self.rows[position])]
        chosen = trainable_objects(row)
        boxes = np.array([row["boxes"][i] for i in chosen], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        draws = np.random.default_rng([self.seed, epoch, position])
        view = apply(self.steps, view_of(read_picture(self.root, row), boxes), draws)
        size = [row["height"], row["width"]]
        run_lengths = [{"size": size, "counts": row["run_lengths"][i]} for i in chosen]
        classes = [self.labels[row["category_ids"][chosen[i]]] for i in view.kept]
        return {
            "image_id": row["image_id"],
            "pixel_values": view.image.float().sub_(self.mean).mul_(self.scale),
            "labels": {
                "boxes": torch.from_numpy(view.boxes),
                "class_labels": torch.tensor(classes, dtype=torch.int64),
                "masks": masks_of(view, run_lengths),
            },
        }


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch, padded with zeros at the right and bottom to the largest sides, rounded up to multiples of 32.

    Returns:
        `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) int64 with 1 where the picture is, `labels`, one dict a
        picture, and `image_ids`.
    """
    sizes = [sample["pixel_values"].shape[-2:] for sample in samples]
    height, width = (math.ceil(max(sides) / SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
    pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    for mask, (h, w) in zip(pixel_mask, sizes, strict=True):
        mask[:h, :w] = 1
    return {
        "image_ids": [sample["image_id"] for sample in samples],
        "pixel_values": torch.stack(
            [
                functional.pad(sample["pixel_values"], (0, width - w, 0, height - h))
                for sample, (h, w) in zip(samples, sizes, strict=True)
            ]
        ),
        "pixel_mask": pixel_mask,
        "labels": [sample["labels"] for sample in samples],
    }


def orientation_batches(
    is_wide: np.ndarray, *, batch_size: int, total_batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of an epoch, in random order, each with pictures that are all wide or all not.

    Pictures are repeated to fill each of the two groups to a multiple of `total_batch_size`, the pictures of one
    optimizer step over all processes, so that every step is full.
    """
    generator = np.random.default_rng([seed, epoch])
    batches = []
    for orientation in (False, True):
        group = generator.permutation(np.flatnonzero(is_wide == orientation))
        filled = np.resize(group, math.ceil(len(group) / total_batch_size) * total_batch_size)
        batches += filled.reshape(-1, batch_size).tolist()
    return [batches[i] for i in generator.permutation(len(batches))]


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process from a step of the training to its end, as lists of (epoch, position).

    Args:
        batch_size: Pictures of a process at a time.
        accumulation: Batches of a process in one optimizer step.
        first_step: Optimizer steps already taken.
        num_epochs, max_steps: Length of the training; the smaller holds.
    """

    def __init__(
        self,
        is_wide: np.ndarray,
        *,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        first_step: int = 0,
        num_epochs: int,
        max_steps: int | None = None,
    ) -> None:
        self.is_wide = is_wide
        self.batch_size = batch_size
        self.batches_per_step = accumulation * processes
        self.processes = processes
        self.process = process
        self.seed = seed
        self.first_step = first_step
        total_batch_size = batch_size * self.batches_per_step
        self.steps_per_epoch = sum(
            math.ceil(np.count_nonzero(is_wide == orientation) / total_batch_size) for orientation in (False, True)
        )
        self.last_step = num_epochs * self.steps_per_epoch
        if max_steps is not None:
            self.last_step = min(self.last_step, max_steps)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.batches_per_step // self.processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known_epoch, batches = None, []
        for step in range(self.first_step, self.last_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != known_epoch:
                known_epoch, batches = epoch, self._epoch(epoch)
            start = step_in_epoch * self.batches_per_step
            for batch in batches[start + self.process : start + self.batches_per_step : self.processes]:
                yield [(epoch, position) for position in batch]

    def _epoch(self, epoch: int) -> list[list[int]]:
        return orientation_batches(
            self.is_wide,
            batch_size=self.batch_size,
            total_batch_size=self.batch_size * self.batches_per_step,
            seed=self.seed,
            epoch=epoch,
        )


def _write_index(source: Path, folder: Path) -> None:
    """Writes the index beside its place and moves it there whole; a process that comes second keeps the first's."""
    categories, rows, skipped = _read_coco(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"{folder.parent}: the index of {source} cannot be written ({error.strerror}): give another cache_dir"
        ) from error
    try:
        with ArrowWriter(features=ROW, path=str(unfinished / "pictures.arrow")) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        (unfinished / "about.json").write_text(json.dumps({"categories": categories, "skipped": skipped}))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_coco(source: Path) -> tuple[dict[int, str], list[dict[str, Any]], dict[str, int]]:
    """Categories, rows and skipped annotations of a COCO file, checked."""
    content = _parsed(source)
    names = {}
    for entry in content["categories"]:
        _check(source, "category", entry, {"id": int, "name": str})
        if entry["id"] in names:
            raise ValueError(f"{source}: the category id {entry['id']} is given twice")
        names[entry["id"]] = entry["name"]
    if len(set(names.values())) < len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise ValueError(f"{source}: two categories have the name {twice!r}")

    rows = {}
    for entry in content["images"]:
        _check(source, "image", entry, {"id": int, "file_name": str, "height": int, "width": int})
        if entry["id"] in rows:
            raise ValueError(f"{source}: the image id {entry['id']} is given twice")
        if min(entry["height"], entry["width"]) < 1:
            raise ValueError(f"{source}: the image {entry['id']} is {entry['height']} x {entry['width']} pixels")
        rows[entry["id"]] = _empty_row(source, entry)

    skipped: Counter[str] = Counter()
    for number, entry in enumerate(content["annotations"]):
        _check(source, f"annotation (number {number})", entry, {"image_id": int, "category_id": int, "bbox": list})
        if entry["image_id"] not in rows:
            raise ValueError(f"{source}: the annotation {number} is of image {entry['image_id']}, which is not listed")
        if entry["category_id"] not in names:
            raise ValueError(
                f"{source}: the annotation {number} has the category {entry['category_id']}, which is not listed "
                f"({_some(sorted(names))})"
            )
        reason = _add_object(rows[entry["image_id"]], entry)
        if reason:
            skipped[reason] += 1
    return {key: names[key] for key in sorted(names)}, list(rows.values()), dict(skipped)


def _parsed(source: Path) -> dict[str, Any]:
    try:
        content = json.loads(source.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a JSON file ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        raise ValueError(f"{source}: not COCO: an object with {', '.join(parts)} was expected, but it holds a list")
    for part in parts:
        if not isinstance(content.get(part), list):
            raise ValueError(f"{source}: not COCO: the list {part!r} is missing")
    return content


def _check(source: Path, what: str, entry: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{source}: an entry of kind {what} is no object, but {entry!r}")
    for key, kind in kinds.items():
        if not isinstance(entry.get(key), kind) or isinstance(entry.get(key), bool):
            words = {int: "a whole number", str: "a text", list: "a list"}[kind]
            raise ValueError(f"{source}: {what} {entry.get('id', '')}: {key!r} is {entry.get(key)!r}, not {words}")


def _empty_row(source: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    name = entry["file_name"]
    pure: PurePath = PureWindowsPath(name)  # understands both separators
    if pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts or not pure.parts:
        raise ValueError(f"{source}: the file name {name!r} of image {entry['id']} leads out of the picture folder")
    return {
        "image_id": entry["id"],
        "file_name": name,
        "height": entry["height"],
        "width": entry["width"],
        **{key: [] for key in ("boxes", "category_ids", "areas", "is_crowd", "is_ignored", "run_lengths")},
    }


def _add_object(row: dict[str, Any], entry: Mapping[str, Any]) -> str | None:
    """Adds an annotation to its picture's row, or says why it cannot be used."""
    box = entry["bbox"]
    if len(box) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in box):
        return "box that is not four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return "box without area"
    if not entry.get("segmentation"):
        return "no segmentation"
    try:
        rle = segmentation_as_rle(entry["segmentation"], row["height"], row["width"])
    except ValueError as error:
        return str(error)
    row["boxes"].append([float(side) for side in box])
    row["category_ids"].append(entry["category_id"])
    row["areas"].append(float(entry["area"]) if "area" in entry else float(coco_mask.area(rle)))
    row["is_crowd"].append(bool(entry.get("iscrowd", 0)))
    row["is_ignored"].append(bool(entry.get("ignore", 0)))
    row["run_lengths"].append(rle["counts"])
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:24]


def _some(items: Sequence[Any] | Mapping[Any, Any]) -> str:
    shown = [str(item) for item in list(items)[:MISSING_FILES_SHOWN]]
    return ", ".join(shown) + (", …" if len(items) > MISSING_FILES_SHOWN else "")
