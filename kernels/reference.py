"""Multi-scale deformable attention in plain PyTorch: the definition that the native operator must agree with.

Zhu et al., "Deformable DETR", 2021, eq. 3, https://arxiv.org/abs/2010.04159

B: pictures, S: source tokens over all levels, Q: queries, M: heads, D: channels of a head, L: source levels,
P: points a level. Grids are (height, width) pairs, one a level, in the order of the tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def ms_deform_attn_reference(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    source_grids: Sequence[tuple[int, int]],
    query_grids: Sequence[tuple[int, int]],
    points: int,
) -> Tensor:
    """Attention of every query over points around its own place; see `ms_deform_attn` for the arguments."""
    precise = torch.promote_types(value.dtype, torch.float32)
    weights = logits.to(precise).softmax(-1)
    centres = _query_centres(query_grids, value.device, precise)  # (Q, 2)
    scales = torch.tensor([(width, height) for height, width in source_grids], dtype=precise, device=value.device)
    offsets = offsets.unflatten(3, (len(source_grids), points)).to(precise)  # (B, Q, M, L, P, 2)
    locations = centres[:, None, None, None] + offsets / scales[:, None]
    return ms_deform_attn_sample_reference(value, locations.flatten(3, 4), weights, source_grids)


def ms_deform_attn_sample_reference(
    value: Tensor, locations: Tensor, weights: Tensor, source_grids: Sequence[tuple[int, int]]
) -> Tensor:
    """Weighted sum of bilinear samples at given places; see `ms_deform_attn_sample` for the arguments."""
    batch, _, heads, channels = value.shape
    precise = torch.promote_types(value.dtype, torch.float32)
    levels = value.to(precise).split([height * width for height, width in source_grids], dim=1)
    # grid_sample counts -1 to 1 from edge to edge, which is 0 to 1 of the locations.
    coordinates = 2 * locations.to(precise).unflatten(3, (len(source_grids), -1)) - 1
    coordinates = coordinates.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * M, Q, P, 2)
    samples = [
        grid_sample(
            level.permute(0, 2, 3, 1).reshape(batch * heads, channels, *grid),
            level_coordinates,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, grid, level_coordinates in zip(levels, source_grids, coordinates, strict=True)
    ]  # L times (B * M, D, Q, P)
    weights = weights.to(precise).transpose(1, 2).flatten(0, 1)[:, None]  # (B * M, 1, Q, L * P)
    output = (torch.cat(samples, -1) * weights).sum(-1)  # (B * M, D, Q)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _query_centres(query_grids: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres of the cells of the query grids: (Q, 2) as (x, y), 0 to 1 from the top-left corner."""
    centres = []
    for height, width in query_grids:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        centres.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).flatten(0, 1))
    return torch.cat(centres)
