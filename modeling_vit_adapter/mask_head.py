"""The mask head (He et al., "Mask R-CNN", ICCV 2017): a mask of the predicted class for each detection.

Shape letters: G objects of a picture, R regions, K classes, S side of the pooled feature, T = 2 S side of a mask.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from .masks import rasterize_polygons

Polygons = Sequence[Sequence[Sequence[float]]]
"""For each object its polygons, each x1, y1, x2, y2, ... in pixels of the padded input."""


class MaskHead(nn.Module):
    """Convolutions, a learned doubling of the resolution, one map of logits for each class."""

    def __init__(self, config: MaskRcnnConfig):
        super().__init__()
        widths = [config.fpn_channels] + [config.mask_channels] * config.mask_num_convs
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, config.mask_channels, 3, padding=1) for width in widths[: config.mask_num_convs]
        )
        self.upsample = nn.ConvTranspose2d(widths[-1], config.mask_channels, 2, stride=2)
        num_classes = cast(int, config.num_labels)  # a detector's configuration names its classes
        self.mask_logits = nn.Conv2d(config.mask_channels, num_classes, 1)

    def forward(self, regions: Tensor, labels: Tensor) -> Tensor:
        """Pooled features (R, C, S, S) and classes (R,) → logits of those classes (R, T, T), at least in float32."""
        hidden = regions
        for convolution in self.convolutions:
            hidden = convolution(hidden).relu()
        logits = self.mask_logits(self.upsample(hidden).relu())
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return chosen.to(torch.promote_types(chosen.dtype, torch.float32))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean binary cross entropy over (R, T, T); 0, with a gradient of 0, where there are no regions."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / max(logits.numel(), 1)


def mask_targets(masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Each object's mask inside a box: RoIAlign of the bitmap, at least one half: (R, side, side) of 0 and 1.

    Args:
        masks: (G, H, W) bitmaps of a picture's objects.
        objects: (R,) index of the object of each box.
        boxes: (R, 4) xyxy in pixels of the bitmaps; what lies outside is clipped.
    """
    height, width = masks.shape[-2:]
    limit = boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    regions = torch.cat([objects[:, None].to(boxes.dtype), clipped], dim=1)
    aligned = roi_align(masks[:, None].to(boxes.dtype), regions, side, 1.0, sampling_ratio=0, aligned=True)
    return (aligned[:, 0] >= 0.5).to(boxes.dtype)


def polygon_mask_targets(
    polygons: Polygons, objects: Tensor, boxes: Tensor, side: int, image_size: tuple[int, int]
) -> Tensor:
    """As `mask_targets`, for objects given as polygons: only the pixels around each polygon are ever drawn.

    Args:
        image_size: Height and width of the picture within the padded input.
    """
    height, width = image_size
    clipped = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    targets = boxes.new_zeros(len(boxes), side, side)
    for index in objects.unique().tolist():
        bitmap, left, top = rasterize_polygons(polygons[index], height, width)
        rows = (objects == index).nonzero().flatten()
        shifted = clipped[rows] - boxes.new_tensor([left, top, left, top])
        regions = F.pad(shifted, (1, 0))
        drawn = torch.from_numpy(bitmap).to(boxes)[None, None]
        aligned = roi_align(drawn, regions, side, 1.0, sampling_ratio=0, aligned=True)
        targets[rows] = (aligned[:, 0] >= 0.5).to(boxes.dtype)
    return targets
