"""The region proposal network (Ren et al., "Faster R-CNN", NeurIPS 2015) on a feature pyramid.

Shape letters: B batch, A anchors of a cell, N anchors of a picture over all levels, H and W rows and columns of a
level.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from .anchors import base_anchors, cells_within, grid_anchors
from .boxes import clip_boxes, decode_boxes, encode_boxes
from .matching import Sample, match, sample

PAD_MULTIPLE = 32
"""A picture counts as padded to multiples of this, whatever larger size its batch has."""


class RpnPrediction(NamedTuple):
    """Raw predictions for every anchor, in the order level, row, column, anchor.

    Attributes:
        objectness: (B, N) logits.
        box_deltas: (B, N, 4).
        anchors: (N, 4) xyxy in pixels of the padded input.
        grids: (H, W) of each level.
    """

    objectness: Tensor
    box_deltas: Tensor
    anchors: Tensor
    grids: list[tuple[int, int]]


class Proposals(NamedTuple):
    """Proposals of one picture, best first, without gradient.

    Attributes:
        boxes: (n, 4) xyxy in pixels of the padded input, within the picture.
        scores: (n,) probabilities.
    """

    boxes: Tensor
    scores: Tensor


class RegionProposalNetwork(nn.Module):
    """Scores and refines the anchors of all levels with shared convolutions."""

    def __init__(self, config: MaskRcnnConfig):
        super().__init__()
        self.config = config
        num_anchors = len(config.anchor_ratios)
        self.convolution = nn.Conv2d(config.fpn_channels, config.rpn_channels, 3, padding=1)
        self.objectness = nn.Conv2d(config.rpn_channels, num_anchors, 1)
        self.box_deltas = nn.Conv2d(config.rpn_channels, 4 * num_anchors, 1)

    def forward(self, pyramid: Sequence[Tensor]) -> RpnPrediction:
        """Levels (B, C, H, W), finest first → predictions, at least in float32."""
        objectness, box_deltas, anchors = [], [], []
        grids = [(feature.shape[-2], feature.shape[-1]) for feature in pyramid]
        for feature, grid, stride in zip(pyramid, grids, self.config.anchor_strides, strict=True):
            hidden = self.convolution(feature).relu()
            objectness.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            box_deltas.append(self.box_deltas(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
            base = base_anchors(stride, self.config.anchor_scale, self.config.anchor_ratios, feature.device)
            anchors.append(grid_anchors(grid, stride, base))
        precision = torch.promote_types(pyramid[0].dtype, torch.float32)
        return RpnPrediction(
            torch.cat(objectness, dim=1).to(precision),
            torch.cat(box_deltas, dim=1).to(precision),
            torch.cat(anchors).to(precision),
            grids,
        )

    @torch.no_grad()
    def propose(self, prediction: RpnPrediction, image_sizes: Tensor, *, training: bool) -> list[Proposals]:
        """The best boxes of each picture, suppressed within each level.

        Args:
            image_sizes: (B, 2) height and width of each picture within the padded input.
            training: Whether to take the training numbers of candidates and proposals.
        """
        config = self.config
        pre_nms = config.rpn_pre_nms_top_n_train if training else config.rpn_pre_nms_top_n_test
        post_nms = config.rpn_post_nms_top_n_train if training else config.rpn_post_nms_top_n_test
        probabilities = prediction.objectness.sigmoid()
        candidates, levels = self._best_of_each_level(prediction, probabilities, pre_nms)
        stds = prediction.box_deltas.new_ones(4)
        proposals = []
        for scores, deltas, chosen, size in zip(
            probabilities, prediction.box_deltas, candidates, image_sizes, strict=True
        ):
            scores = scores[chosen]
            boxes = clip_boxes(decode_boxes(deltas[chosen], prediction.anchors[chosen], stds), size)
            large = (boxes[:, 2:] - boxes[:, :2] > config.rpn_min_box_size).all(dim=1)
            boxes, scores = boxes[large], scores[large]
            kept = batched_nms(boxes, scores, levels[large], config.rpn_nms_threshold)[:post_nms]
            proposals.append(Proposals(boxes[kept], scores[kept]))
        return proposals

    def _best_of_each_level(self, prediction: RpnPrediction, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Anchors with the best scores (B, N) of each level, (B, n), and the level of each place, (n,)."""
        indices, levels, first = [], [], 0
        sizes = [height * width * len(self.config.anchor_ratios) for height, width in prediction.grids]
        for level, scores_of_level in enumerate(scores.split(sizes, dim=1)):
            best = scores_of_level.topk(min(count, scores_of_level.shape[1]), dim=1).indices
            indices.append(best + first)
            levels.append(torch.full((best.shape[1],), level, device=best.device))
            first += scores_of_level.shape[1]
        return torch.cat(indices, dim=1), torch.cat(levels)

    def loss(self, prediction: RpnPrediction, image_sizes: Tensor, objects: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Classification and regression loss of sampled anchors (Faster R-CNN, equation 1, with L1).

        Both are sums over the batch, divided by the number of sampled anchors; a picture counts at least one positive
        and one negative.

        Args:
            objects: Boxes (G, 4) of each picture's objects.
        """
        stds = prediction.box_deltas.new_ones(4)
        classification: Any = 0  # a tensor from the first picture on, as the regression
        regression: Any = 0
        count = 0
        for logits, deltas, size, boxes in zip(
            prediction.objectness, prediction.box_deltas, image_sizes, objects, strict=True
        ):
            used = self.anchors_in_picture(prediction, size)
            matched, (positive, negative) = self.assign(prediction.anchors[used], boxes)
            sampled_logits = logits[used[torch.cat([positive, negative])]]
            is_object = torch.zeros_like(sampled_logits)
            is_object[: len(positive)] = 1
            classification += F.binary_cross_entropy_with_logits(sampled_logits, is_object, reduction="sum")
            targets = encode_boxes(boxes[matched[positive]], prediction.anchors[used[positive]], stds)
            regression += F.l1_loss(deltas[used[positive]], targets, reduction="sum")
            count += max(len(positive), 1) + max(len(negative), 1)
        return classification / count, regression / count

    def anchors_in_picture(self, prediction: RpnPrediction, image_size: Tensor) -> Tensor:
        """Indices of the anchors whose cell begins inside the picture, padded to multiples of 32 on its own: (n,)."""
        padded = (image_size + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE
        inside = [
            cells_within(grid, stride, padded).repeat_interleave(len(self.config.anchor_ratios))
            for grid, stride in zip(prediction.grids, self.config.anchor_strides, strict=True)
        ]
        return torch.cat(inside).nonzero().flatten()

    def assign(self, anchors: Tensor, objects: Tensor) -> tuple[Tensor, Sample]:
        """The object of each anchor as `match` gives it, and the anchors that enter the loss."""
        config = self.config
        matched = match(
            objects,
            anchors,
            positive_iou=config.rpn_positive_iou,
            negative_iou=config.rpn_negative_iou,
            min_positive_iou=config.rpn_min_positive_iou,
        )
        return matched, sample(matched, config.rpn_batch_size_per_image, config.rpn_positive_fraction)
