"""Features of regions of interest from a feature pyramid (Lin et al., CVPR 2017; He et al., ICCV 2017).

Shape letters: R regions of all pictures, C channels, S side of the pooled feature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align

from .boxes import box_area


def roi_levels(boxes: Tensor, num_levels: int, finest_scale: float) -> Tensor:
    """The level of each box (R, 4), 0 the finest: (R,).

    FPN, equation 1, with the reference's numbers: level 0 below twice `finest_scale`, one more at each doubling.
    """
    sides = box_area(boxes).sqrt()
    return (sides / finest_scale + 1e-6).log2().floor().clamp(0, num_levels - 1).long()


def pool_regions(
    features: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int, finest_scale: float
) -> Tensor:
    """RoIAlign of each box on its own level, half-pixel aligned, with as many samples as the box covers pixels.

    Args:
        features: Levels (B, C, H, W), finest first.
        strides: Stride of each level.
        boxes: Boxes (n, 4) of each picture in pixels of the input.
        side: S.

    Returns:
        (R, C, S, S) in the features' dtype, picture by picture; sampled at least in float32.
    """
    # In bfloat16 a coordinate beyond 1024 pixels would be off by up to four.
    precision = torch.promote_types(features[0].dtype, torch.float32)
    numbered = [functional.pad(of_picture, (1, 0), value=picture) for picture, of_picture in enumerate(boxes)]
    regions = torch.cat(numbered).to(precision)  # (R, 5) as (picture, x1, y1, x2, y2)
    levels = roi_levels(regions[:, 1:], len(features), finest_scale)
    pooled = features[0].new_zeros(len(regions), features[0].shape[1], side, side)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        on_level = (levels == level).nonzero().flatten()
        aligned = roi_align(feature.to(precision), regions[on_level], side, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = pooled.index_copy(0, on_level, aligned.to(pooled.dtype))
    return pooled
