"""Anchors: by hand and against the reference, exactly."""

import torch

from vit_adapter.modeling_vit_adapter.anchors import base_anchors, cells_within, grid_anchors


def test_anchors_run_row_column_ratio_around_the_corner_of_their_cell():
    anchors = grid_anchors((1, 2), 4, base_anchors(4, 2, [1.0, 4.0]))
    assert anchors.tolist() == [[-4, -4, 4, 4], [-2, -8, 2, 8], [0, -4, 8, 4], [2, -8, 6, 8]]


def test_cells_that_begin_inside_the_picture_count():
    inside = cells_within((2, 3), 8, torch.tensor([8, 17]))
    assert inside.tolist() == [True, True, True, False, False, False]


def test_anchors_and_flags_equal_the_reference(reference_case):
    case = reference_case("anchors")
    for level, stride in enumerate(case.facts["strides"]):
        base = base_anchors(stride, case.facts["scales"][0], case.facts["ratios"])
        assert torch.equal(base, case.tensors[f"base_anchors.{level}"])
        for index, sizes in enumerate(case.facts["feature_sizes"]):
            anchors = grid_anchors(tuple(sizes[level]), stride, base)
            assert torch.equal(anchors, case.tensors[f"set{index}.anchors.{level}"])
            padded = torch.tensor(case.facts["pad_shape_for_valid_flags"][index])
            valid = cells_within(tuple(sizes[level]), stride, padded).repeat_interleave(len(base))
            assert torch.equal(valid, case.tensors[f"set{index}.valid.{level}"].bool())
