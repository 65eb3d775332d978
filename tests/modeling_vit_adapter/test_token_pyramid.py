"""TokenPyramid on grids small enough to follow by hand."""

import pytest
import torch

from vit_adapter.modeling_vit_adapter.token_pyramid import Grid, TokenPyramid


def test_tokens_of_maps_run_row_by_row_and_level_by_level():
    fine = torch.arange(6.0).reshape(1, 1, 2, 3)
    coarse = torch.tensor([[[[6.0], [7.0]]]])
    pyramid = TokenPyramid.from_maps([fine, coarse])
    assert pyramid.grids == (Grid(2, 3), Grid(2, 1))
    assert pyramid.tokens.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_maps_inverts_from_maps():
    maps = [torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 3), torch.randn(2, 5, 1, 2)]
    for returned, given in zip(TokenPyramid.from_maps(maps).maps(), maps, strict=True):
        assert torch.equal(returned, given)


def test_a_function_is_applied_to_each_level_on_its_own():
    maps = [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 1, 2)]
    sums = TokenPyramid.from_maps(maps).map_levels(lambda feature: feature * feature.sum())
    assert sums.tokens.flatten().tolist() == [6] * 6 + [2] * 2


def test_grids_that_hold_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="The grids 2 x 3, 1 x 2 hold 8 tokens, but got 9"):
        TokenPyramid(torch.zeros(1, 9, 4), (Grid(2, 3), Grid(1, 2)))
