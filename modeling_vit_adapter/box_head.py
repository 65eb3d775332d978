"""The box head (Girshick, "Fast R-CNN", ICCV 2015): classes and refined boxes of proposals.

Shape letters: G objects of a picture, R regions of the batch, K classes. The background is class K, the last.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from .boxes import clip_boxes, decode_boxes, encode_boxes
from .matching import match, sample


class SampledRegions(NamedTuple):
    """Regions of one picture that enter the losses: positives first.

    Attributes:
        boxes: (n, 4).
        objects: (positives,) index of the object of each positive.
        indices: (n,) which of ground truth followed by proposals each region is.
    """

    boxes: Tensor
    objects: Tensor
    indices: Tensor

    @property
    def positive_boxes(self) -> Tensor:
        return self.boxes[: len(self.objects)]


class Detections(NamedTuple):
    """Detections of one picture, best first.

    Attributes:
        boxes: (n, 4) xyxy in pixels of the padded input.
        scores: (n,) class probabilities.
        labels: (n,) classes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class BoxHead(nn.Module):
    """Two linear layers, then class scores and one set of box deltas for each class."""

    def __init__(self, config: MaskRcnnConfig):
        super().__init__()
        self.config = config
        self.num_classes = cast(int, config.num_labels)  # a detector's configuration names its classes
        self.fc1 = nn.Linear(config.fpn_channels * config.box_roi_size**2, config.box_head_dim)
        self.fc2 = nn.Linear(config.box_head_dim, config.box_head_dim)
        self.class_scores = nn.Linear(config.box_head_dim, self.num_classes + 1)
        self.box_deltas = nn.Linear(config.box_head_dim, 4 * self.num_classes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (R, C, S, S) → scores (R, K + 1) before the softmax and deltas (R, K, 4), both at least in
        float32."""
        hidden = self.fc2(self.fc1(regions.flatten(1)).relu()).relu()
        precision = torch.promote_types(hidden.dtype, torch.float32)
        scores, deltas = self.class_scores(hidden), self.box_deltas(hidden)
        return scores.to(precision), deltas.unflatten(1, (-1, 4)).to(precision)

    @torch.no_grad()
    def sample_regions(self, proposals: Tensor, objects: Tensor) -> SampledRegions:
        """Regions of one picture for the losses, among its objects' boxes (G, 4) followed by its proposals (n, 4)."""
        config = self.config
        matched = match(
            objects,
            proposals,
            positive_iou=config.box_positive_iou,
            negative_iou=config.box_positive_iou,
            min_positive_iou=config.box_positive_iou,
        )
        # Ground truth among the proposals: without it the head sees no positives early on.
        candidates = torch.cat([objects.to(proposals.dtype), proposals])
        matched = torch.cat([torch.arange(len(objects), device=matched.device), matched])
        positive, negative = sample(matched, config.box_batch_size_per_image, config.box_positive_fraction)
        indices = torch.cat([positive, negative])
        return SampledRegions(candidates[indices], matched[positive], indices)

    def loss(
        self,
        scores: Tensor,
        deltas: Tensor,
        sampled: Sequence[SampledRegions],
        objects: Sequence[Tensor],
        classes: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy over all sampled regions, and L1 of the true class's deltas over the positives; both divided
        by the number of all sampled regions.

        Args:
            scores, deltas: Predictions for the sampled regions, picture by picture.
            objects: Boxes (G, 4) of each picture's objects.
            classes: (G,) classes of each picture's objects.
        """
        true_classes, positive, targets = [], [], []
        stds = deltas.new_tensor(self.config.box_delta_stds)
        first = 0
        for regions, boxes, labels in zip(sampled, objects, classes, strict=True):
            true_class = labels.new_full((len(regions.boxes),), self.num_classes)
            true_class[: len(regions.objects)] = labels[regions.objects]
            true_classes.append(true_class)
            positive.append(torch.arange(first, first + len(regions.objects), device=scores.device))
            targets.append(encode_boxes(boxes[regions.objects].to(deltas.dtype), regions.positive_boxes, stds))
            first += len(regions.boxes)
        true_class, rows = torch.cat(true_classes), torch.cat(positive)
        classification = F.cross_entropy(scores, true_class, reduction="sum")
        regression = F.l1_loss(deltas[rows, true_class[rows]], torch.cat(targets), reduction="sum")
        count = max(first, 1)
        return classification / count, regression / count

    def detect(self, scores: Tensor, deltas: Tensor, proposals: Tensor, image_size: Tensor) -> Detections:
        """Detections of one picture: every class's boxes above the score threshold, suppressed within their class.

        Args:
            scores: (n, K + 1) before the softmax.
            deltas: (n, K, 4).
            proposals: (n, 4).
            image_size: (2,) height and width of the picture within the padded input.
        """
        config = self.config
        probabilities = scores.softmax(dim=1)[:, :-1]
        regions, labels = (probabilities > config.score_threshold).nonzero().unbind(dim=1)
        confidences = probabilities[regions, labels]
        stds = deltas.new_tensor(config.box_delta_stds)
        boxes = clip_boxes(decode_boxes(deltas[regions, labels], proposals[regions], stds), image_size)
        kept = batched_nms(boxes, confidences, labels, config.nms_threshold)[: config.detections_per_image]
        return Detections(boxes[kept], confidences[kept], labels[kept])
