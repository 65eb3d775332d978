"""The feature pyramid network (Lin et al., CVPR 2017).

Shape letters: B batch, C channels, H and W rows and columns of a level.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, top-down addition, 3 x 3 output convolutions; no norms, no activations.

    Args:
        in_channels: Channels of each of the backbone's maps, finest first.
        channels: Channels of every level of the pyramid.
        num_levels: Levels of the pyramid; those beyond the backbone's are every second pixel of the one before.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_levels: int):
        super().__init__()
        self.num_levels = num_levels
        self.lateral_convolutions = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.output_convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_in, H, W), finest first → levels (B, C, H, W), finest first."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral_convolutions, features, strict=True)]
        for level in reversed(range(len(levels) - 1)):
            levels[level] = levels[level] + F.interpolate(levels[level + 1], size=levels[level].shape[-2:])
        outputs = [convolution(level) for convolution, level in zip(self.output_convolutions, levels, strict=True)]
        while len(outputs) < self.num_levels:
            outputs.append(outputs[-1][..., ::2, ::2])
        return outputs
