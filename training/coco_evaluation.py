"""Box and mask AP as the COCO benchmark and the published detectors measure it, judged by pycocotools.

T: IoU thresholds 0.50, 0.55, …, 0.95. R: recall levels. K: categories. A: areas all, small, medium, large. M: limits
on the detections of a picture, of which the largest is read.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vit_adapter.modeling_vit_adapter.image_processing import MaskRcnnImageProcessor
from vit_adapter.modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from vit_adapter.training.coco_index import CocoIndex, read_picture

DETECTION_LIMITS = [100, 300, 1000]
AREAS = ("all", "small", "medium", "large")
KINDS = {"box": "bbox", "mask": "segm"}

Result = dict[str, Any]


@torch.no_grad()
def detect(
    model: MaskRcnnForInstanceSegmentation,
    processor: MaskRcnnImageProcessor,
    index: CocoIndex,
    root: Path,
    *,
    rows: Iterable[int],
    device: torch.device | str = "cpu",
    seen: Callable[[], Any] | None = None,
) -> list[Result]:
    """What a detector finds in some of a data set's pictures, one picture at a time.

    Args:
        rows: Which pictures.
        seen: Called after each picture.

    Returns:
        COCO results, with the picture's row as `image_id` and the data set's own category ids.
    """
    model.eval()
    label2id = {str(name): int(label) for label, name in (model.config.id2label or {}).items()}
    category_ids = {label: category_id for category_id, label in index.labels(label2id).items()}
    results = []
    for row_number in rows:
        row = index.pictures[row_number]
        inputs = processor(read_picture(root, row), return_tensors="pt").to(device)
        outputs = model(**inputs)
        (found,) = processor.post_process_coco(outputs, [(row["height"], row["width"])])
        results += [
            {**result, "image_id": row_number, "category_id": category_ids[result["category_id"]]}
            for result in found
            if result["category_id"] in category_ids
        ]
        if seen is not None:
            seen()
    return results


def evaluate_results(results: Sequence[Result], index: CocoIndex, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Accuracy of detections in percent.

    Args:
        results: As `detect` returns them; those with values that are not finite are left out.
        rows: The pictures that were looked at; None: all.

    Returns:
        For "box" and "mask" each: AP, AP50, AP75, AP_small, AP_medium, AP_large, and per_class, AP by category name;
        None where the data set has no such object.
    """
    rows = range(len(index.pictures)) if rows is None else rows
    ground_truth = _as_coco(index, rows, _ground_truth(index, rows))
    finite = [result for result in results if math.isfinite(result["score"]) and np.isfinite(result["bbox"]).all()]
    metrics = {}
    for name, kind in KINDS.items():
        found = _as_coco(index, rows, _detections(finite, kind))
        evaluation = COCOeval(ground_truth, found, kind)
        evaluation.params.maxDets = DETECTION_LIMITS
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        metrics[name] = _summary(evaluation, index.categories)
    return metrics


def best_line(metrics: Mapping[str, Any]) -> str:
    """The numbers people ask for, in one line."""
    parts = []
    for name in KINDS:
        values = [metrics[name][key] for key in ("AP", "AP50", "AP75")]
        shown = " / ".join("none" if value is None else f"{value:.1f}" for value in values)
        parts.append(f"{name} AP / AP50 / AP75 {shown}")
    return ", ".join(parts)


def _ground_truth(index: CocoIndex, rows: Iterable[int]) -> list[Result]:
    annotations = []
    for row_number in rows:
        row = index.pictures[row_number]
        columns = ("boxes", "category_ids", "areas", "is_crowd", "is_ignored", "run_lengths")
        for box, category_id, area, is_crowd, is_ignored, counts in zip(*(row[name] for name in columns), strict=True):
            annotations.append(
                {
                    "image_id": row_number,
                    "category_id": category_id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(is_crowd),
                    "ignore": int(is_ignored),
                    "segmentation": {"size": [row["height"], row["width"]], "counts": counts},
                }
            )
    return annotations


def _detections(results: Iterable[Result], kind: str) -> list[Result]:
    """Results as annotations; their size is the box's for box AP and the mask's for mask AP, as in the reference."""
    annotations = []
    for result in results:
        annotation = {"iscrowd": 0, **result}
        if kind == "bbox":
            annotation["area"] = result["bbox"][2] * result["bbox"][3]
        else:
            annotation["area"] = float(coco_mask.area(result["segmentation"]))
        annotations.append(annotation)
    return annotations


def _as_coco(index: CocoIndex, rows: Iterable[int], annotations: list[Result]) -> COCO:
    """pycocotools' container. Annotations are numbered from 1: it takes the id 0 for "no match"."""
    pictures = index.pictures.select_columns(["height", "width"])
    coco = COCO()
    coco.dataset = {
        "images": [{"id": row_number, **pictures[row_number]} for row_number in rows],
        "categories": [{"id": category_id, "name": name} for category_id, name in index.categories.items()],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _summary(evaluation: COCOeval, categories: Mapping[int, str]) -> dict[str, Any]:
    precision = evaluation.eval["precision"][..., -1]  # (T, R, K, A); -1 where there is no object
    thresholds = evaluation.params.iouThrs
    summary: dict[str, Any] = {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[np.isclose(thresholds, 0.5)][..., 0]),
        "AP75": _mean(precision[np.isclose(thresholds, 0.75)][..., 0]),
    }
    for number, area in enumerate(AREAS[1:], start=1):
        summary[f"AP_{area}"] = _mean(precision[..., number])
    summary["per_class"] = {
        categories[category_id]: _mean(precision[:, :, number, 0])
        for number, category_id in enumerate(evaluation.params.catIds)
    }
    return summary


def _mean(precision: np.ndarray) -> float | None:
    present = precision[precision > -1]
    return 100 * float(present.mean()) if present.size else None
