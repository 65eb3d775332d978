"""The one type for token sequences, and with it the only geometry of the repository.

Shape letters: B batch, N tokens of all levels, C channels, H and W height and width of a level in tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Rows and columns of one level of tokens."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class TokenPyramid:
    """Tokens of one or several levels, finest level first, row by row within a level.

    The plain ViT is a pyramid of one grid, the spatial prior one of three.

    Attributes:
        tokens: (B, N, C), N the sum of the grids' areas.
        grids: Height and width of each level.

    Raises:
        ValueError: The grids hold another number of tokens than `tokens` has.
    """

    tokens: Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self):
        expected = sum(grid.area for grid in self.grids)
        if self.tokens.shape[1] != expected:
            sizes = ", ".join(f"{grid.height} x {grid.width}" for grid in self.grids)
            raise ValueError(f"The grids {sizes} hold {expected} tokens, but got {self.tokens.shape[1]}.")

    @classmethod
    def from_maps(cls, maps: Sequence[Tensor]) -> "TokenPyramid":
        """Maps (B, C, H, W), finest first, as one sequence of tokens."""
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
        return cls(tokens, tuple(Grid(*feature.shape[-2:]) for feature in maps))

    def maps(self) -> list[Tensor]:
        """Each level as a map (B, C, H, W): a view whose memory is laid out channels last."""
        levels = self.tokens.split([grid.area for grid in self.grids], dim=1)
        return [level.transpose(1, 2).unflatten(2, grid) for level, grid in zip(levels, self.grids, strict=True)]

    def with_tokens(self, tokens: Tensor) -> "TokenPyramid":
        """The same grids with other tokens."""
        return TokenPyramid(tokens, self.grids)

    def map_levels(self, function: Callable[[Tensor], Tensor]) -> "TokenPyramid":
        """A function of maps (B, C, H, W), applied to each level on its own."""
        return TokenPyramid.from_maps([function(feature) for feature in self.maps()])
