"""A data set's annotations as an Arrow table, memory-mapped and shared by all processes.

One row a picture, with the masks of its objects as run-length codes at the picture's own size. A COCO annotation file
is read once; its index is found again by the file's content.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from pycocotools import mask as coco_mask

from vit_adapter.modeling_vit_adapter.image_reading import load_image
from vit_adapter.modeling_vit_adapter.masks import segmentation_as_rle

logger = logging.getLogger(__name__)

INDEX_VERSION = 1  # part of an index's name: another layout is another index
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
