"""The box head: sampling, losses and detections by hand and against the reference."""

import math

import pytest
import torch

from vit_adapter import MaskRcnnConfig
from vit_adapter.modeling_vit_adapter.box_head import BoxHead, SampledRegions


def head(**arguments) -> BoxHead:
    return BoxHead(MaskRcnnConfig(**{"fpn_channels": 2, "box_head_dim": 4, "num_labels": 2, **arguments}))


def test_ground_truth_stands_in_front_of_the_proposals():
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    proposals = torch.tensor([[50.0, 50.0, 60.0, 60.0], [0.0, 0.0, 10.0, 8.0]])
    sampled = head().sample_regions(proposals, objects)
    assert sampled.indices.tolist() == [0, 2, 1] and sampled.objects.tolist() == [0, 0]
    assert sampled.positive_boxes.tolist() == [[0, 0, 10, 10], [0, 0, 10, 8]]


def test_losses_are_divided_by_all_sampled_regions():
    regions = SampledRegions(
        boxes=torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]),
        objects=torch.tensor([0]),
        indices=torch.tensor([0, 1]),
    )
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 0] = 100  # of another class: no loss
    classification, regression = head().loss(
        torch.zeros(2, 3), deltas, [regions], [torch.tensor([[1.0, 0.0, 11.0, 10.0]])], [torch.tensor([1])]
    )
    assert classification.item() == pytest.approx(math.log(3))
    assert regression.item() == pytest.approx(0.1 / 0.1 / 2)  # a tenth of the width over the deviation 0.1


def test_background_is_the_last_class():
    regions = SampledRegions(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(0, dtype=torch.long), torch.tensor([0]))
    scores = torch.tensor([[0.0, 0.0, 50.0]])
    nothing = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)]
    classification, regression = head().loss(scores, torch.zeros(1, 2, 4), [regions], *nothing)
    assert classification.item() == pytest.approx(0, abs=1e-6) and regression.item() == 0


def test_detections_of_different_classes_do_not_suppress_each_other():
    scores = torch.tensor([[0.45, 0.45, 0.1]]).log()
    boxes = torch.tensor([[2.0, 3.0, 12.0, 9.0]])
    found = head().detect(scores, torch.zeros(1, 2, 4), boxes, torch.tensor([20, 20]))
    assert sorted(found.labels.tolist()) == [0, 1] and found.scores.tolist() == pytest.approx([0.45, 0.45])


def test_detections_are_limited_and_above_the_threshold():
    scores = torch.tensor([[0.6, 0.04, 0.36], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]).log()
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [10.0, 0.0, 15.0, 5.0], [0.0, 10.0, 5.0, 15.0]])
    found = head(detections_per_image=2, score_threshold=0.05).detect(
        scores, torch.zeros(3, 2, 4), boxes, torch.tensor([20, 20])
    )
    assert found.labels.tolist() == [0, 0] and found.scores.tolist() == pytest.approx([0.7, 0.6])


def test_a_box_clipped_flat_at_the_border_survives():
    # The reference has no size filter after the box head.
    found = head().detect(
        torch.tensor([[0.9, 0.05, 0.05]]).log(), torch.zeros(1, 2, 4), torch.tensor([[30.0, 0.0, 40.0, 5.0]]),
        torch.tensor([20, 20]),
    )  # fmt: skip
    assert found.boxes[0].tolist() == [20, 0, 20, 5]


def test_scores_and_deltas_equal_the_reference(reference_case):
    case = reference_case("roi_levels_and_heads")
    model = head(fpn_channels=8, box_head_dim=24, num_labels=5)
    names = {"fc_cls": "class_scores", "fc_reg": "box_deltas", "shared_fcs.0": "fc1", "shared_fcs.1": "fc2"}
    model.load_state_dict(
        {
            f"{ours}.{leaf}": case.weights[f"bbox_head.{theirs}.{leaf}"]
            for theirs, ours in names.items()
            for leaf in ("weight", "bias")
        }
    )
    scores, deltas = model(case.tensors["roi_feats_7"])
    torch.testing.assert_close(scores, case.tensors["cls_score"], rtol=0, atol=5e-4)
    torch.testing.assert_close(deltas.flatten(1), case.tensors["bbox_pred"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("case_name", ["multi", "multi_nolimit", "multi_nothing"])
def test_post_processing_equals_the_reference(case_name, reference_case):
    case = reference_case("nms")
    tensors, multi = case.tensors, case.facts["multi"]
    limit = multi["max_num"] if case_name == "multi" else 10_000
    threshold = 1.0 if case_name == "multi_nothing" else multi["score_thr"]
    model = head(
        num_labels=6, detections_per_image=limit, score_threshold=threshold, nms_threshold=multi["iou_threshold"]
    )
    # The stored boxes are decoded already: here each is a proposal of one class, with deltas of zero. Some begin
    # outside the picture, so all are moved inside it.
    shift = 64
    boxes = tensors["multi.boxes"].reshape(-1, 4) + shift
    of_class = torch.eye(6).repeat(len(tensors["multi.boxes"]), 1) * tensors["multi.scores"][:, :6].reshape(-1, 1)
    logits = torch.cat([of_class, 1 - of_class.sum(1, keepdim=True)], dim=1).log()
    found = model.detect(logits, torch.zeros(len(boxes), 6, 4), boxes, torch.tensor([10_000, 10_000]))
    expected = tensors[f"{case_name}.dets"]
    assert torch.equal(found.labels, tensors[f"{case_name}.labels"])
    torch.testing.assert_close(found.boxes - shift, expected[:, :4], rtol=0, atol=2e-2)
    torch.testing.assert_close(found.scores, expected[:, 4], rtol=0, atol=1e-4)
