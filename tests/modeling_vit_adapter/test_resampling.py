"""Target sizes and OpenCV's bilinear resizing."""

import numpy as np
import pytest
import torch

from vit_adapter.modeling_vit_adapter.resampling import resize_bilinear, resized_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # transformers: 1066
        ((640, 425), (1205, 800)),
        ((400, 640), (800, 1280)),
        ((427, 1000), (569, 1333)),  # the long side limits
        ((1, 4000), (1, 1333)),  # 0.3 pixels: the reference would make it 0
        ((1, 1), (800, 800)),
    ],
)
def test_a_picture_is_made_as_large_as_both_edges_allow(size, expected):
    assert resized_size(*size, shortest_edge=800, longest_edge=1333) == expected


def test_either_edge_may_be_left_out():
    assert resized_size(100, 300, shortest_edge=50, longest_edge=None) == (50, 150)
    assert resized_size(100, 300, shortest_edge=None, longest_edge=150) == (50, 150)


def test_resizing_to_the_same_size_changes_nothing():
    picture = torch.randint(0, 256, (3, 7, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_bilinear(picture, 7, 11), picture)


def test_a_row_is_interpolated_between_pixel_centres_and_constant_beyond_them():
    row = torch.tensor([[[0, 100]]], dtype=torch.uint8)
    assert resize_bilinear(row, 1, 4).tolist() == [[[0, 25, 75, 100]]]
    assert resize_bilinear(row.mT, 4, 1).tolist() == [[[0], [25], [75], [100]]]


@pytest.mark.parametrize("size", [(19, 31), (5, 23), (40, 3), (1, 1)])
def test_resizing_is_within_a_grey_level_of_torch(size):
    """torch.nn.functional.interpolate in float32; OpenCV's weights are 2048ths and bits are dropped: 1 at most."""
    picture = torch.randint(0, 256, (3, 13, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = resize_bilinear(picture, *size).float()
    expected = torch.nn.functional.interpolate(picture[None].float(), size, mode="bilinear", antialias=False)[0]
    torch.testing.assert_close(ours, expected, atol=1, rtol=0)


def test_black_and_white_survive_resizing():
    picture = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1).expand(2, 5, 9)
    for size in ((3, 4), (11, 29)):
        assert np.unique(resize_bilinear(picture, *size)[0]).tolist() == [0]
        assert np.unique(resize_bilinear(picture, *size)[1]).tolist() == [255]
