"""Anchors of the region proposal network (Ren et al., "Faster R-CNN", NeurIPS 2015), one scale a level.

Shape letters: A anchors of a cell, H and W rows and columns of a level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(stride: int, scale: float, ratios: Sequence[float], device: torch.device | None = None) -> Tensor:
    """Anchors around (0, 0), (A, 4) xyxy, each of area (scale * stride)²; `ratios` are height over width."""
    roots = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()
    half_heights, half_widths = 0.5 * scale * stride * roots, 0.5 * scale * stride / roots
    return torch.stack([-half_widths, -half_heights, half_widths, half_heights], dim=-1)


def grid_anchors(grid: tuple[int, int], stride: int, base: Tensor) -> Tensor:
    """Anchors of every cell of a level, centred at (column * stride, row * stride): (H * W * A, 4) xyxy, in the order
    row, column, anchor."""
    y, x = (torch.arange(size, device=base.device, dtype=base.dtype) * stride for size in grid)
    centers = torch.cartesian_prod(y, x).flip(-1)  # (H * W, 2) as (x, y)
    return (centers.repeat(1, 2)[:, None] + base).flatten(0, 1)


def cells_within(grid: tuple[int, int], stride: int, size: Tensor) -> Tensor:
    """Which cells of a level begin inside a picture of `size` (2,), (height, width): (H * W,) bool."""
    rows, columns = (
        torch.arange(cells, device=size.device) * stride < side for cells, side in zip(grid, size, strict=True)
    )
    return (rows[:, None] & columns).flatten()
