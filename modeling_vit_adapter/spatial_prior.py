"""The spatial prior module (Chen et al., ICLR 2023, section 3.3): what a plain ViT lacks, local detail, as four maps.

Shape letters: B batch, C channels, H and W height and width of the picture in pixels.
"""

import torch
from torch import Tensor, nn

from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .token_pyramid import TokenPyramid

NUM_TOKEN_LEVELS = 3
"""The prior's levels that take part in the interactions, at strides 8, 16 and 32."""


class ConvNormActivation(nn.Module):
    """3 x 3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, feature: Tensor) -> Tensor:
        return self.normalization(self.convolution(feature)).relu()


class SpatialPrior(nn.Module):
    """A convolutional stem and three strided convolutions, each scale projected to the transformer's width."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        width = config.spatial_prior_channels
        widths = (width, 2 * width, 4 * width, 4 * width)  # at strides 4, 8, 16, 32
        self.stem = nn.Sequential(
            ConvNormActivation(config.num_channels, width, stride=2),
            ConvNormActivation(width, width, stride=1),
            ConvNormActivation(width, width, stride=1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.downsamples = nn.ModuleList(
            ConvNormActivation(widths[level], widths[level + 1], stride=2) for level in range(NUM_TOKEN_LEVELS)
        )
        self.projections = nn.ModuleList(nn.Conv2d(channels, config.hidden_size, 1) for channels in widths)
        self.level_embeddings = nn.Parameter(torch.zeros(NUM_TOKEN_LEVELS, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, TokenPyramid]:
        """Pictures (B, 3, H, W) → the map at stride 4, (B, C, H / 4, W / 4), and the tokens at strides 8, 16, 32."""
        features = [self.stem(pixel_values)]
        for downsample in self.downsamples:
            features.append(downsample(features[-1]))
        finest, *coarser = (
            projection(feature) for projection, feature in zip(self.projections, features, strict=True)
        )
        marked = [
            feature + embedding[:, None, None]
            for feature, embedding in zip(coarser, self.level_embeddings, strict=True)
        ]  # fmt: skip
        return finest, TokenPyramid.from_maps(marked)
