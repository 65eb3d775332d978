"""The mask head: logits and mask targets by hand and against the reference."""

import math

import pytest
import torch

from vit_adapter import MaskRcnnConfig
from vit_adapter.modeling_vit_adapter.mask_head import MaskHead, mask_targets, polygon_mask_targets
from vit_adapter.modeling_vit_adapter.masks import decode_segmentation


def test_the_logits_are_those_of_the_asked_class(reference_case):
    case = reference_case("roi_levels_and_heads")
    model = MaskHead(MaskRcnnConfig(fpn_channels=8, mask_channels=8, num_labels=5))
    state = {}
    for leaf in ("weight", "bias"):
        for index in range(4):
            state[f"convolutions.{index}.{leaf}"] = case.weights[f"mask_head.convs.{index}.conv.{leaf}"]
        state[f"upsample.{leaf}"] = case.weights[f"mask_head.upsample.{leaf}"]
        state[f"mask_logits.{leaf}"] = case.weights[f"mask_head.conv_logits.{leaf}"]
    model.load_state_dict(state)
    for label in range(5):
        logits = model(case.tensors["roi_feats_14_first6"], torch.full((6,), label))
        torch.testing.assert_close(logits, case.tensors["mask_pred_first6"][:, label], rtol=0, atol=5e-4)


def test_the_loss_is_the_mean_over_all_pixels():
    model = MaskHead(MaskRcnnConfig(fpn_channels=2, mask_channels=2))
    targets = torch.zeros(3, 28, 28)
    targets[0] = 1
    assert model.loss(torch.zeros(3, 28, 28), targets).item() == pytest.approx(math.log(2))


def test_without_regions_the_loss_is_zero_and_every_parameter_has_a_gradient():
    model = MaskHead(MaskRcnnConfig(fpn_channels=2, mask_channels=2))
    logits = model(torch.zeros(0, 2, 14, 14), torch.zeros(0, dtype=torch.long))
    loss = model.loss(logits, torch.zeros(0, 28, 28))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in model.parameters())


def test_a_target_is_the_mask_seen_through_the_box():
    masks = torch.zeros(2, 4, 8)
    masks[1, :, 4:] = 1
    target = mask_targets(masks, torch.tensor([1]), torch.tensor([[2.0, 0.0, 6.0, 4.0]]), side=4)
    assert target.tolist() == [[[0, 0, 1, 1]] * 4]


def test_targets_equal_the_reference(reference_case):
    tensors = reference_case("masks").tensors
    targets = mask_targets(tensors["gt_masks"], tensors["gt_index"], tensors["proposals"], side=28)
    assert torch.equal(targets, tensors["mask_targets"].float())


@pytest.mark.parametrize(
    "polygons",
    [
        [[3.0, 2.0, 30.0, 4.5, 25.0, 33.0, 6.0, 28.0]],
        [[0.0, 0.0, 12.0, 0.0, 12.0, 9.0, 0.0, 9.0], [20.0, 20.0, 39.9, 20.0, 30.0, 31.5]],
        [[-8.0, 5.0, 50.0, 10.0, 20.0, 60.0]],  # beyond the picture on three sides
    ],
)
def test_targets_of_polygons_equal_those_of_their_bitmaps(polygons):
    height, width = 36, 40
    bitmap = torch.from_numpy(decode_segmentation(polygons, height, width))[None]
    boxes = torch.tensor(
        [[0.0, 0.0, 40.0, 36.0], [2.5, 1.5, 28.0, 30.0], [15.0, 18.0, 40.0, 36.0], [9.0, 9.0, 9.5, 9.5]]
    )
    objects = torch.zeros(len(boxes), dtype=torch.long)
    expected = mask_targets(bitmap, objects, boxes, side=28)
    found = polygon_mask_targets([polygons], objects, boxes, side=28, image_size=(height, width))
    assert torch.equal(found, expected)
