"""The feature pyramid by hand and against the reference."""

import torch

from vit_adapter.modeling_vit_adapter.feature_pyramid import FeaturePyramid


def identity_pyramid(num_levels: int) -> FeaturePyramid:
    """One channel, convolutions that change nothing."""
    pyramid = FeaturePyramid([1, 1], 1, num_levels)
    for convolution in [*pyramid.lateral_convolutions, *pyramid.output_convolutions]:
        torch.nn.init.dirac_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    return pyramid


def test_coarser_levels_are_added_to_the_finer_by_nearest_neighbour():
    fine, coarse = torch.zeros(1, 1, 2, 4), torch.tensor([[[[1.0, 2.0]]]])
    levels = identity_pyramid(2)([fine, coarse])
    assert levels[0].squeeze().tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_further_levels_are_every_second_pixel():
    levels = identity_pyramid(4)([torch.zeros(1, 1, 6, 8), torch.arange(12.0).reshape(1, 1, 3, 4)])
    assert levels[2].squeeze().tolist() == [[0, 2], [8, 10]] and levels[3].squeeze().tolist() == 0


def test_levels_equal_the_reference(reference_case, reference_detector):
    case = reference_case("detector_inference")
    model = reference_detector()
    with torch.no_grad():
        levels = model.neck(model.backbone(case.pictures("u8")).feature_maps)
    assert len(levels) == 5
    for level in (2, 3, 4):  # each holds what all coarser ones add to it
        torch.testing.assert_close(levels[level], case.tensors[f"fpn.{level}"], rtol=0, atol=5e-4)
