"""Box arithmetic: by hand, as laws, and against the reference."""

import pytest
import torch

from vit_adapter.modeling_vit_adapter.boxes import MAX_LOG_SCALE, box_iou, clip_boxes, decode_boxes, encode_boxes

ONES = torch.ones(4)


def test_iou_of_boxes_that_can_be_checked_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 4.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    others = torch.tensor([[2.0, 0.0, 6.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    expected = torch.tensor([[4 / 12, 0.0], [0.5, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(box_iou(boxes, others), expected)


def test_iou_of_empty_boxes_is_zero():
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_decode_inverts_encode():
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = (
        torch.cat([corner, corner + 5 + 90 * torch.rand(50, 2, generator=generator)], dim=1)
        for corner in 200 * torch.rand(2, 50, 2, generator=generator)
    )
    stds = torch.tensor([0.1, 0.1, 0.2, 0.2])
    decoded = decode_boxes(encode_boxes(boxes, anchors, stds), anchors, stds)
    torch.testing.assert_close(decoded, boxes, rtol=0, atol=1e-3)  # float32 at coordinates of some hundred pixels


def test_deltas_of_a_box_shifted_by_its_width_and_doubled_in_height():
    anchor, box = torch.tensor([0.0, 0.0, 10.0, 20.0]), torch.tensor([10.0, -10.0, 20.0, 30.0])
    expected = torch.tensor([1.0, 0.0, 0.0, 0.693147])  # the last is log 2
    torch.testing.assert_close(encode_boxes(box, anchor, ONES), expected)


def test_only_the_scales_are_clamped():
    decoded = decode_boxes(torch.tensor([[100.0, 0.0, 100.0, 0.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), ONES)
    width = 16 * torch.tensor(MAX_LOG_SCALE).exp()
    torch.testing.assert_close(decoded, torch.tensor([[1608 - width / 2, 0, 1608 + width / 2, 16]]))


def test_boxes_are_clipped_to_height_and_width():
    clipped = clip_boxes(torch.tensor([[-5.0, 3.0, 30.0, 40.0]]), torch.tensor([10, 20]))
    assert clipped.tolist() == [[0, 3, 20, 10]]


@pytest.mark.parametrize("kind", ["rpn", "roi"])
def test_the_coder_equals_the_reference(kind, reference_case):
    case = reference_case("bbox_coder")
    rois, deltas = case.tensors["rois"], case.tensors["deltas"].unflatten(1, (-1, 4))
    stds = torch.tensor(case.facts["stds"][kind], dtype=torch.float32)
    decoded = decode_boxes(deltas, rois[:, None], stds)
    tolerance = {"rtol": 1e-6, "atol": 1e-4}
    torch.testing.assert_close(decoded.flatten(1), case.tensors[f"{kind}.decoded_unclipped"], **tolerance)
    clipped = clip_boxes(decoded, torch.tensor(case.facts["max_shape"]))
    torch.testing.assert_close(clipped.flatten(1), case.tensors[f"{kind}.decoded_clipped"], **tolerance)
    # The first six regions have no extent and cannot be encoded.
    encoded = encode_boxes(case.tensors[f"{kind}.gt"], rois[6:], stds)
    torch.testing.assert_close(encoded, case.tensors[f"{kind}.encoded"], **tolerance)
