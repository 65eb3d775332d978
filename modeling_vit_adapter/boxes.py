"""Boxes as plain tensors. A box is xyxy in pixels, without any "+ 1"; deltas are (dx, dy, dw, dh)."""

import math

import torch
from torch import Tensor

# A decoded box is at most 1000 / 16 times as wide or high as its anchor: the clamp of Fast R-CNN's code, kept since.
MAX_LOG_SCALE = math.log(1000 / 16)
MIN_UNION = 1e-6


def box_area(boxes: Tensor) -> Tensor:
    """Areas (...,) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each pair: (N, 4) and (M, 4) → (N, M); 0 where both are empty."""
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    intersection = width * height
    union = box_area(boxes)[:, None] + box_area(others) - intersection
    return intersection / union.clamp(min=MIN_UNION)


def encode_boxes(boxes: Tensor, anchors: Tensor, stds: Tensor) -> Tensor:
    """Deltas that turn anchors into boxes, over `stds` (Girshick et al., R-CNN, CVPR 2014, appendix C).

    The law: decode_boxes(encode_boxes(b, a, s), a, s) == b, unless a side is clamped.

    Args:
        boxes, anchors: (..., 4) of positive width and height.
        stds: (4,).
    """
    anchor_centers, anchor_sizes = _centers_and_sizes(anchors)
    centers, sizes = _centers_and_sizes(boxes)
    return torch.cat([(centers - anchor_centers) / anchor_sizes, (sizes / anchor_sizes).log()], dim=-1) / stds


def decode_boxes(deltas: Tensor, anchors: Tensor, stds: Tensor) -> Tensor:
    """Anchors moved and stretched by deltas; the inverse of `encode_boxes`, nothing clipped: (..., 4)."""
    shifts, log_scales = (deltas * stds).split(2, dim=-1)
    anchor_centers, anchor_sizes = _centers_and_sizes(anchors)
    centers = anchor_centers + anchor_sizes * shifts
    half_sizes = 0.5 * anchor_sizes * log_scales.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return torch.cat([centers - half_sizes, centers + half_sizes], dim=-1)


def clip_boxes(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Boxes (..., 4) cut to a picture of `image_size` (2,), (height, width)."""
    height, width = image_size.to(boxes.dtype)
    limit = torch.stack([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def _centers_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    top_left, bottom_right = boxes.split(2, dim=-1)
    return (top_left + bottom_right) * 0.5, bottom_right - top_left
