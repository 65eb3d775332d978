"""Embeddings from one grid to another: the patch kernel from 14 to 16 pixels, the position embeddings to another side.

C: channels of the tokens, k: side of a patch in pixels, n: side of the grid of position embeddings.
"""

import math

import torch
from torch.nn import functional as F

from .mapping import Shape


def resize_patches(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The patch kernel (C, 3, k, k) at the side that `shape` asks for, as the original release does it.

    Bilinear without antialiasing, and the values are not rescaled: a constant kernel stays the same constant, so
    that a 16-pixel patch answers a flat picture 16²/14² times as strongly.

    Raises: ValueError: not a square kernel of four dimensions.
    """
    if kernel.dim() != 4 or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"a patch kernel (C, 3, k, k) was expected, but its shape is {list(kernel.shape)}")
    if kernel.shape[2:] == tuple(shape[2:]):
        return kernel
    resized = F.interpolate(kernel.float(), size=tuple(shape[2:]), mode="bilinear", align_corners=False)
    return resized.to(kernel.dtype)


def resize_positions(positions: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Position embeddings (1, 1 + n², C) on the grid that `shape` asks for; the class token's slot 0 is kept.

    A source without that slot (1, n², C) gets a slot of zeros: the detectors drop the class token anyway. Bicubic
    without antialiasing; an equal grid is passed on bit for bit.

    Raises: ValueError: neither n² nor 1 + n² positions.
    """
    if positions.dim() != 3 or positions.shape[0] != 1:
        raise ValueError(
            f"position embeddings (1, 1 + n², C) were expected, but their shape is {list(positions.shape)}"
        )
    count = positions.shape[1]
    if math.isqrt(count) ** 2 == count:
        positions = torch.cat([positions.new_zeros(1, 1, positions.shape[2]), positions], dim=1)
    elif math.isqrt(count - 1) ** 2 != count - 1:
        raise ValueError(
            f"a square grid of positions was expected, with or without a class token, but there are {count}"
        )
    if positions.shape[1] == shape[1]:
        return positions
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(shape[1] - 1)
    class_token, grid = positions[:, :1], positions[:, 1:]
    grid = grid.unflatten(1, (old, old)).movedim(3, 1)  # (1, C, n, n)
    resized = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([class_token, resized.to(positions.dtype).flatten(2).mT], dim=1)
