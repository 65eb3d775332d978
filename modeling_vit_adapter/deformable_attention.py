"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021) over fixed grids.

Shape letters: B batch, Q query tokens, S source tokens, C channels, M heads, D channels of a head, L source levels,
P points.
"""

import math

import torch
from torch import Tensor, nn

from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from ..kernels.ms_deform_attn import ms_deform_attn
from .token_pyramid import Grid

Grids = tuple[Grid, ...]


class DeformableAttention(nn.Module):
    """Every query looks at P points of each source level around its own position and adds up what it finds.

    Args:
        num_levels: Levels of the source.
    """

    def __init__(self, config: ViTAdapterConfig, num_levels: int):
        super().__init__()
        self.num_heads = config.deformable_num_heads
        self.num_levels = num_levels
        self.num_points = config.deformable_num_points
        num_samples = self.num_heads * num_levels * self.num_points
        self.sampling_offsets = nn.Linear(config.hidden_size, 2 * num_samples)
        self.attention_weights = nn.Linear(config.hidden_size, num_samples)
        self.value_proj = nn.Linear(config.hidden_size, config.deformable_value_size)
        self.output_proj = nn.Linear(config.deformable_value_size, config.hidden_size)

    def forward(self, query: Tensor, source: Tensor, query_grids: Grids, source_grids: Grids) -> Tensor:
        """Queries (B, Q, C) on their grids and sources (B, S, C) on theirs → (B, Q, C)."""
        value = self.value_proj(source).unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, 2))  # (B, Q, M, L * P, 2)
        logits = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))  # (B, Q, M, L * P)
        sampled = ms_deform_attn(value, offsets, logits, source_grids, query_grids, self.num_points)
        return self.output_proj(sampled)

    def initial_offsets(self) -> Tensor:
        """Bias of the offsets at construction: each head looks into a direction of its own, its points at 1, 2, ... P
        pixels (along the larger coordinate): (M * L * P * 2,)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (M, 2) as (x, y)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        radii = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * radii[:, None]  # (M, 1, P, 2)
        return offsets.expand(-1, self.num_levels, -1, -1).flatten()
