"""Levels and pooled features of regions."""

import pytest
import torch

from vit_adapter.modeling_vit_adapter.roi_pooling import pool_regions, roi_levels


@pytest.mark.parametrize(("side", "level"), [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (448, 3), (5000, 3)])
def test_a_box_belongs_to_the_level_of_its_side(side, level):
    assert roi_levels(torch.tensor([[7.0, 3.0, 7 + side, 3 + side]]), 4, 56).tolist() == [level]


def test_a_box_without_extent_belongs_to_the_finest_level():
    assert roi_levels(torch.tensor([[5.0, 5.0, 5.0, 9.0]]), 4, 56).tolist() == [0]


def test_pooling_a_ramp_gives_the_centres_of_the_bins():
    ramp = torch.arange(16.0).expand(1, 1, 8, 16)  # the value is the column; pixel centres lie half a pixel in
    pooled = pool_regions([ramp], [4], [torch.tensor([[8.0, 4.0, 40.0, 20.0]])], 2, 56)
    # From column 2 to 10 in pixels of the map: bins centred at 4 and 8, half a pixel less as a column.
    torch.testing.assert_close(pooled, torch.tensor([[[[3.5, 7.5], [3.5, 7.5]]]]))


def test_no_regions_give_an_empty_feature_with_a_gradient():
    feature = torch.randn(1, 3, 4, 4, requires_grad=True)
    pooled = pool_regions([feature], [4], [torch.zeros(0, 4)], 7, 56)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7) and feature.grad.eq(0).all()


def test_levels_and_features_equal_the_reference(reference_case):
    case = reference_case("roi_levels_and_heads")
    features = [case.tensors[f"feat_int8.{level}"].float() / 32 for level in range(4)]
    rois = case.tensors["rois"]
    finest_scale = case.facts["finest_scale"]
    assert torch.equal(roi_levels(rois[:, 1:], 4, finest_scale), case.tensors["levels"])

    # Our regions come picture by picture; the reference's in the order given.
    order = torch.cat([(rois[:, 0] == picture).nonzero().flatten() for picture in range(2)])
    boxes = [rois[rois[:, 0] == picture, 1:] for picture in range(2)]
    pooled = torch.empty(len(rois), 8, 7, 7)
    pooled[order] = pool_regions(features, case.facts["strides"], boxes, 7, finest_scale)
    torch.testing.assert_close(pooled, case.tensors["roi_feats_7"], rtol=1e-5, atol=1e-5)
    larger = torch.empty(len(rois), 8, 14, 14)
    larger[order] = pool_regions(features, case.facts["strides"], boxes, 14, finest_scale)
    torch.testing.assert_close(larger[:6], case.tensors["roi_feats_14_first6"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        larger.double().sum((2, 3)), case.tensors["roi_feats_14_sum"], rtol=1e-5, atol=1e-3
    )  # sums of 196 float32 values


def test_boxes_keep_their_place_where_features_are_bfloat16():
    levels = [torch.randn(1, 2, 1344 // stride, 64 // stride).bfloat16() for stride in (4, 8)]
    boxes = [torch.tensor([[3.3, 1025.3, 60.7, 1090.1], [1.2, 1201.4, 63.0, 1340.6]])]
    expected = pool_regions([level.float() for level in levels], (4, 8), boxes, 7, 56)
    pooled = pool_regions(levels, (4, 8), boxes, 7, 56)
    assert torch.equal(pooled, expected.bfloat16())
