"""The plain vision transformer (Dosovitskiy et al., ICLR 2021): one block for DeiT, AugReg, DINOv2 and DINOv3.

Shape letters: B batch, N patch tokens, P prefix (class and register) tokens, C channels, M heads, D channels of a
head. Prefix tokens, where a model keeps any, stand in front of the patch tokens.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .token_pyramid import Grid

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary position embedding, each (N, D)."""


class PatchEmbeddings(nn.Module):
    """Pictures (B, 3, H, W) into one token a patch, (B, N, C), row by row."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """Patch tokens with their positions, behind the prefix tokens where the model keeps any.

    The stored grid of position embeddings is resized to the picture's by bicubic interpolation without antialiasing,
    as in the reference. Its slot 0 belongs to the class token: without prefix tokens it is never read.
    """

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        self.patch_embeddings = PatchEmbeddings(config)
        self.side = config.image_size // config.patch_size
        self.num_prefix_tokens = config.num_prefix_tokens
        if config.num_prefix_tokens:
            self.prefix_tokens = nn.Parameter(torch.zeros(1, config.num_prefix_tokens, config.hidden_size))
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.side**2, config.hidden_size))
        else:
            self.register_parameter("position_embeddings", None)

    def forward(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        tokens = self.patch_embeddings(pixel_values)
        if self.position_embeddings is not None:
            tokens = tokens + self.interpolate_positions(grid)
        if not self.num_prefix_tokens:
            return tokens
        prefix: Tensor = self.prefix_tokens
        if self.position_embeddings is not None:  # only the class token, the first, has a position
            prefix = torch.cat([prefix[:, :1] + self.position_embeddings[:, :1], prefix[:, 1:]], dim=1)
        return torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)

    def interpolate_positions(self, grid: Grid) -> Tensor:
        """Position embeddings of a grid: (1, N, C)."""
        positions = self.position_embeddings[:, 1:]
        if grid == (self.side, self.side):
            return positions
        square = positions.transpose(1, 2).unflatten(2, (self.side, self.side))
        # Half precision moves bicubic weights visibly.
        square = square if square.dtype == torch.float64 else square.float()
        resized = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(positions.dtype)


class RotaryPositions(nn.Module):
    """Rotary embedding of two-dimensional positions (Siméoni et al., "DINOv3", 2025, section 3.2).

    Patch centres run from -1 to 1 along each axis; half of a head's channel pairs turn with y, half with x.
    """

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta

    def forward(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> Rotation:
        exponents = torch.arange(0, 1, 4 / self.head_dim, dtype=torch.float32, device=device)
        frequencies = self.theta**-exponents  # (D / 4,)
        y, x = (2 * (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size - 1 for size in grid)
        centers = torch.cartesian_prod(y, x)  # (N, 2) as (y, x)
        angles = 2 * torch.pi * centers[:, :, None] * frequencies  # (N, 2, D / 4)
        angles = angles.flatten(1).tile(2)  # (N, D)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, rotation: Rotation, num_prefix_tokens: int) -> Tensor:
    """Turn the channel pairs (i, i + D / 2) of the patch tokens of queries or keys (B, M, P + N, D)."""
    cosines, sines = rotation
    prefix, patches = states.split([num_prefix_tokens, states.shape[-2] - num_prefix_tokens], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cosines + torch.cat([-second, first], dim=-1) * sines], dim=-2)


def to_windows(states: Tensor, grid: Grid, window: int) -> Tensor:
    """Cut (B, M, N, D) from the top left into windows, (B * windows, M, window², D).

    The map is padded at the right and bottom with zeros. Padded positions have key zero: they do take part in the
    softmax, with logit 0 and a value of zero, as in the reference.
    """
    states = states.unflatten(2, grid)
    bottom, right = -grid.height % window, -grid.width % window
    if bottom or right:
        states = F.pad(states, (0, 0, 0, right, 0, bottom))
    states = states.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, M, rows, window, columns, window, D)
    return states.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def from_windows(windows: Tensor, grid: Grid, window: int) -> Tensor:
    """The inverse of `to_windows` on attention outputs (B * windows, window², M, D): (B, N, M, D), padding cut off."""
    rows, columns = -(-grid.height // window), -(-grid.width // window)
    states = windows.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns))
    states = states.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H, W, M, D)
    return states[:, : grid.height, : grid.width].flatten(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Softmax attention written out: ((B, N, M, D), weights (B, M, N, N))."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class ViTAttention(nn.Module):
    """Self-attention over all tokens, or over the patch tokens within windows.

    Args:
        window: Side of the windows in patches; 0 for global attention. Windows leave out the prefix tokens.
    """

    def __init__(self, config: ViTAdapterConfig, window: int):
        super().__init__()
        self.config = config
        self.window = window
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.num_prefix_tokens = 0 if window else config.num_prefix_tokens
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, grid: Grid, rotation: Rotation | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, M, P + N, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            query, key = (rotate(states, rotation, self.num_prefix_tokens) for states in (query, key))
        if self.window:
            query, key, value = (to_windows(states, grid, self.window) for states in (query, key, value))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states, weights = attend(self, query, key, value, None, scaling=self.scaling, **kwargs)
        if self.window:
            states = from_windows(states, grid, self.window)
        return self.o_proj(states.flatten(2)), weights


class MLP(nn.Module):
    """The two-layer feed-forward network."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        inner_size = cast(int, config.intermediate_size)  # derived by the configuration where it was None
        self.fc1 = nn.Linear(config.hidden_size, inner_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """The gated feed-forward network of DINOv2 ViT-g (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: ViTAdapterConfig):
        super().__init__()
        inner_size = cast(int, config.intermediate_size)  # derived by the configuration where it was None
        self.gate_proj = nn.Linear(config.hidden_size, inner_size)
        self.up_proj = nn.Linear(config.hidden_size, inner_size)
        self.down_proj = nn.Linear(inner_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al., ICCV 2021)."""

    def __init__(self, size: int, initial_value: float):
        super().__init__()
        self.initial_value = initial_value
        self.scale = nn.Parameter(torch.full((size,), float(initial_value)))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.scale


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): drops a residual branch for whole pictures of the batch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate)).to(branch.dtype)


class ViTLayer(GradientCheckpointingLayer):
    """A transformer block: attention and feed-forward network, each normalised first, scaled and added.

    Args:
        index: Position of the block in the transformer: it decides on window and drop path.
    """

    layer_scale1: nn.Module
    layer_scale2: nn.Module

    def __init__(self, config: ViTAdapterConfig, index: int):
        super().__init__()
        window = cast(Sequence[int], config.window_sizes)[index]  # filled by the configuration where it was None
        self.num_untouched_tokens = config.num_prefix_tokens if window else 0
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAttention(config, window)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if config.use_swiglu_ffn else MLP(config)
        if config.layerscale_value is None:
            self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        else:
            self.layer_scale1 = LayerScale(config.hidden_size, config.layerscale_value)
            self.layer_scale2 = LayerScale(config.hidden_size, config.layerscale_value)
        self.drop_path = DropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(self, tokens: Tensor, grid: Grid, rotation: Rotation | None = None, **kwargs) -> Tensor:
        """Tokens (B, P + N, C) of a grid of N patches → the same shape."""
        untouched, tokens = tokens.tensor_split([self.num_untouched_tokens], dim=1)
        attended, _ = self.attention(self.norm1(tokens), grid, rotation, **kwargs)
        tokens = tokens + self.drop_path(self.layer_scale1(attended))
        tokens = tokens + self.drop_path(self.layer_scale2(self.mlp(self.norm2(tokens))))
        return torch.cat([untouched, tokens], dim=1) if self.num_untouched_tokens else tokens
