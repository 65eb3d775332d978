"""The region proposal network: proposals and losses by hand and against the reference."""

import math

import pytest
import torch
from torchvision.ops import batched_nms, nms

from vit_adapter import MaskRcnnConfig
from vit_adapter.modeling_vit_adapter.rpn import RegionProposalNetwork, RpnPrediction


def one_level_rpn(**arguments) -> RegionProposalNetwork:
    values = {"rpn_batch_size_per_image": 4, "rpn_positive_fraction": 0.5, **arguments}
    return RegionProposalNetwork(MaskRcnnConfig(fpn_channels=4, rpn_channels=4, anchor_ratios=[1.0], **values))


def prediction_of(anchors: list[list[float]], logits: list[float]) -> RpnPrediction:
    """A prediction for one picture with all anchors in one row of the finest level, and deltas of zero."""
    grids = [(1, len(anchors)), (0, 0), (0, 0), (0, 0), (0, 0)]
    return RpnPrediction(torch.tensor([logits]), torch.zeros(1, len(anchors), 4), torch.tensor(anchors), grids)


def test_predictions_run_level_row_column_anchor():
    rpn = RegionProposalNetwork(MaskRcnnConfig(fpn_channels=4, rpn_channels=4))
    pyramid = [torch.randn(2, 4, 2**k, 3 * 2**k) for k in (4, 3, 2, 1, 0)]
    prediction = rpn(pyramid)
    hidden = rpn.convolution(pyramid[1]).relu()
    first = 16 * 48 * 3  # anchors of the finest level
    row, column, anchor = 5, 7, 2
    place = first + (row * 24 + column) * 3 + anchor
    torch.testing.assert_close(prediction.objectness[1, place], rpn.objectness(hidden)[1, anchor, row, column])
    deltas = rpn.box_deltas(hidden)[1, 4 * anchor : 4 * anchor + 4, row, column]
    torch.testing.assert_close(prediction.box_deltas[1, place], deltas)
    center = prediction.anchors[place].reshape(2, 2).mean(0)
    assert center.tolist() == [pytest.approx(column * 8), pytest.approx(row * 8)]


def test_proposals_are_clipped_suppressed_and_sorted():
    anchors = [[-5.0, 0.0, 5.0, 10.0], [0.0, 0.0, 5.0, 10.0], [20.0, 0.0, 30.0, 10.0], [50.0, 50.0, 60.0, 60.0]]
    rpn = one_level_rpn()
    (proposals,) = rpn.propose(prediction_of(anchors, [1.0, 0.5, 2.0, 3.0]), torch.tensor([[32, 40]]), training=False)
    # The second equals the clipped first; the last is clipped to nothing.
    assert proposals.boxes.tolist() == [[20, 0, 30, 10], [0, 0, 5, 10]]
    assert proposals.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))])


def test_proposals_are_limited_before_and_after_suppression():
    anchors = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(6)]
    rpn = one_level_rpn(rpn_pre_nms_top_n_test=4, rpn_post_nms_top_n_test=2)
    prediction = prediction_of(anchors, [0.0, 5.0, 1.0, 4.0, 3.0, 2.0])
    (proposals,) = rpn.propose(prediction, torch.tensor([[64, 200]]), training=False)
    assert proposals.boxes[:, 0].tolist() == [20, 60]
    (proposals,) = rpn.propose(prediction, torch.tensor([[64, 200]]), training=True)
    assert len(proposals.boxes) == 6


def test_loss_of_one_positive_and_one_negative_anchor():
    rpn = one_level_rpn()
    prediction = prediction_of([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 110.0, 110.0]], [0.0, 0.0])
    objects = [torch.tensor([[1.0, 0.0, 11.0, 10.0]])]  # shifted by a tenth of the anchor's width
    classification, regression = rpn.loss(prediction, torch.tensor([[128, 128]]), objects)
    assert classification.item() == pytest.approx(2 * math.log(2) / 2)
    assert regression.item() == pytest.approx(0.1 / 2)


def test_a_picture_without_objects_counts_one_phantom_positive():
    rpn = one_level_rpn()
    prediction = prediction_of([[0.0, 0.0, 10.0, 10.0]], [0.0])
    classification, regression = rpn.loss(prediction, torch.tensor([[32, 32]]), [torch.zeros(0, 4)])
    assert classification.item() == pytest.approx(math.log(2) / 2) and regression.item() == 0


def test_anchors_in_the_padding_of_the_batch_are_left_out():
    rpn = one_level_rpn()
    grids = [(64 // stride, 96 // stride) for stride in (4, 8, 16, 32)] + [(1, 2)]
    total = sum(rows * columns for rows, columns in grids)
    prediction = RpnPrediction(torch.zeros(1, total), torch.zeros(1, total, 4), torch.zeros(total, 4), grids)
    # 33 pixels are padded to 64 columns: 16 of 24 cells of the finest level, and so on; rows all count.
    inside = rpn.anchors_in_picture(prediction, torch.tensor([64, 33]))
    assert len(inside) == 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1 * 1


def test_suppression_equals_the_reference(reference_case):
    tensors = reference_case("nms").tensors
    boxes, scores, indices = tensors["boxes"], tensors["scores"], tensors["idxs"]
    for threshold in (0.5, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), tensors[f"agnostic_{threshold}.keep"])
        assert torch.equal(batched_nms(boxes, scores, indices, threshold), tensors[f"batched_{threshold}.keep"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_and_proposals_equal_the_reference(dtype, reference_case, reference_detector):
    case = reference_case("detector_inference")
    model = reference_detector().to(dtype)
    with torch.no_grad():
        prediction = model.rpn(model.neck(model.backbone(case.pictures("u8", dtype)).feature_maps))
    sizes = [height * width * 3 for height, width in prediction.grids]
    objectness, deltas = prediction.objectness.split(sizes, 1), prediction.box_deltas.split(sizes, 1)
    for level in range(1, 5):  # the finest level is in the proposals
        expected = case.tensors[f"rpn_cls.{level}"].permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(objectness[level], expected.to(dtype), rtol=0, atol=5e-4)
        expected = case.tensors[f"rpn_bbox.{level}"].permute(0, 2, 3, 1).reshape(2, -1, 4)
        torch.testing.assert_close(deltas[level], expected.to(dtype), rtol=0, atol=5e-4)

    sizes = torch.tensor([meta["img_shape"][:2] for meta in case.facts["img_metas"]])
    for picture, proposals in enumerate(model.rpn.propose(prediction, sizes, training=False)):
        expected = case.tensors[f"proposals.{picture}"].to(dtype)
        torch.testing.assert_close(proposals.boxes, expected[:, :4], rtol=0, atol=2e-2)
        torch.testing.assert_close(proposals.scores, expected[:, 4], rtol=0, atol=1e-4)
