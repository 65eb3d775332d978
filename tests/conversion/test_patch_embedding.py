"""Kernels and position embeddings of another size."""

import pytest
import torch
from torch.nn.functional import interpolate

from vit_adapter.conversion.patch_embedding import resize_patches, resize_positions


def test_a_constant_kernel_stays_the_same_constant():
    resized = resize_patches(torch.full((2, 3, 14, 14), 0.5), (2, 3, 16, 16))
    assert resized.shape == (2, 3, 16, 16)
    assert torch.equal(resized, torch.full((2, 3, 16, 16), 0.5))


def test_a_ramp_stays_a_ramp_between_the_first_and_last_pixel_centre():
    ramp = torch.arange(14.0).expand(1, 1, 14, 14)
    resized = resize_patches(ramp, (1, 1, 16, 16))[0, 0, 5]
    centres = (torch.arange(16.0) + 0.5) * 14 / 16 - 0.5
    torch.testing.assert_close(resized, centres.clamp(0, 13), atol=1e-5, rtol=0)


def test_a_kernel_of_the_right_size_is_passed_on_as_it_is():
    kernel = torch.randn(2, 3, 16, 16)
    assert resize_patches(kernel, (2, 3, 16, 16)) is kernel


def test_a_kernel_keeps_its_precision():
    assert resize_patches(torch.zeros(2, 3, 14, 14, dtype=torch.float16), (2, 3, 16, 16)).dtype == torch.float16


def test_a_kernel_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="patch kernel"):
        resize_patches(torch.zeros(2, 588), (2, 3, 16, 16))


def test_positions_keep_the_class_token_and_resize_the_grid_row_by_row():
    positions = torch.randn(1, 1 + 9, 2)
    resized = resize_positions(positions, (1, 1 + 25, 2))
    assert torch.equal(resized[:, 0], positions[:, 0])
    grid = interpolate(positions[0, 1:, 1].view(1, 1, 3, 3), size=(5, 5), mode="bicubic")
    torch.testing.assert_close(resized[0, 1:, 1].view(5, 5), grid[0, 0], atol=1e-6, rtol=0)


def test_positions_of_the_right_grid_are_passed_on_as_they_are():
    positions = torch.randn(1, 10, 2)
    assert resize_positions(positions, (1, 10, 2)) is positions


def test_positions_without_a_class_token_get_a_slot_of_zeros():
    positions = torch.randn(1, 9, 2)
    resized = resize_positions(positions, (1, 10, 2))
    assert torch.equal(resized[:, 1:], positions)
    assert not resized[:, 0].any()


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match="there are 12"):
        resize_positions(torch.zeros(1, 12, 2), (1, 10, 2))
