"""The adapter around the ViT's blocks: injectors bring the prior into the ViT, extractors its features into the prior.

Chen et al., ICLR 2023, sections 3.4 and 3.5.

Shape letters: B batch, N tokens of the ViT, S tokens of the prior over its three levels, C channels.

What may be checkpointed takes and returns plain tensors: a tensor inside another object loses its gradient there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .deformable_attention import DeformableAttention, Grids
from .spatial_prior import NUM_TOKEN_LEVELS
from .token_pyramid import TokenPyramid
from .vision_transformer import DropPath


class Injector(GradientCheckpointingLayer):
    """Adds what the ViT's tokens find in the prior to them, with a learned scale for each channel (equation 1)."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        self.initial_scale = config.injector_scale_init
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.source_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeformableAttention(config, num_levels=NUM_TOKEN_LEVELS)
        self.scale = nn.Parameter(torch.full((config.hidden_size,), float(config.injector_scale_init)))

    def forward(self, vit: Tensor, prior: Tensor, vit_grids: Grids, prior_grids: Grids) -> Tensor:
        """ViT tokens (B, N, C) and prior tokens (B, S, C) → ViT tokens."""
        found = self.attention(self.query_norm(vit), self.source_norm(prior), vit_grids, prior_grids)
        return vit + self.scale * found


class ConvFeedForward(nn.Module):
    """A feed-forward network with a depthwise 3 x 3 convolution, shared by all levels, before its activation."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.depthwise = nn.Conv2d(intermediate_size, intermediate_size, 3, padding=1, groups=intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, tokens: Tensor, grids: Grids) -> Tensor:
        hidden = TokenPyramid(self.fc1(tokens), grids).map_levels(self.depthwise)
        return self.fc2(F.gelu(hidden.tokens))


class Extractor(GradientCheckpointingLayer):
    """Adds what the prior's tokens find in the ViT to them, followed by a feed-forward network (equations 2 and 3)."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.source_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeformableAttention(config, num_levels=1)
        intermediate_size = int(config.hidden_size * config.conv_ffn_ratio)
        self.ffn = ConvFeedForward(config.hidden_size, intermediate_size) if intermediate_size else None
        if self.ffn is not None:
            self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, prior: Tensor, vit: Tensor, prior_grids: Grids, vit_grids: Grids) -> Tensor:
        """Prior tokens (B, S, C) and ViT tokens (B, N, C) → prior tokens."""
        prior = prior + self.attention(self.query_norm(prior), self.source_norm(vit), prior_grids, vit_grids)
        if self.ffn is None:
            return prior
        return prior + self.drop_path(self.ffn(self.ffn_norm(prior), prior_grids))


class AdapterStage(nn.Module):
    """One interaction: what stands before and behind a stage of the ViT's blocks.

    Args:
        num_extractors: 1, and more in the last stage.
    """

    def __init__(self, config: ViTAdapterConfig, num_extractors: int):
        super().__init__()
        self.injector = Injector(config)
        self.extractors = nn.ModuleList(Extractor(config) for _ in range(num_extractors))

    def inject(self, vit: TokenPyramid, prior: TokenPyramid) -> TokenPyramid:
        """The ViT's tokens, enriched by the prior."""
        return vit.with_tokens(self.injector(vit.tokens, prior.tokens, vit.grids, prior.grids))

    def extract(self, prior: TokenPyramid, vit: TokenPyramid) -> TokenPyramid:
        """The prior's tokens, enriched by the ViT."""
        for extractor in self.extractors:
            prior = prior.with_tokens(extractor(prior.tokens, vit.tokens, prior.grids, vit.grids))
        return prior
