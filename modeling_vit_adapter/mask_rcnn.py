"""Mask R-CNN (He et al., ICCV 2017) on any transformers backbone with four levels, with the numbers of the published
ViT-Adapter detectors.

Shape letters: B batch, H and W height and width of the padded input in pixels, K detections of a picture, T side of a
predicted mask, G objects of a picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .backbone import ParentsInitialize, ViTAdapterBackbone
from .box_head import BoxHead, Detections, SampledRegions
from .feature_pyramid import FeaturePyramid
from .mask_head import MaskHead, mask_targets, polygon_mask_targets
from .roi_pooling import pool_regions
from .rpn import RegionProposalNetwork, RpnPrediction

PADDING_LABEL = -1

Labels = Sequence[Mapping[str, Any]]


@dataclass
class MaskRcnnOutput(ModelOutput):
    """What the detector returns.

    Attributes:
        loss: Sum of the five losses; only with labels.
        loss_dict: loss_rpn_cls, loss_rpn_bbox, loss_cls, loss_bbox, loss_mask; only with labels.
        pred_boxes: (B, K, 4) xyxy in pixels of the padded input, best first; only when not training, as all that
            follows.
        scores: (B, K) class probabilities, 0 where there are fewer detections.
        pred_labels: (B, K) classes, -1 where there are fewer detections.
        pred_masks: (B, K, T, T) logits of the predicted class within the box.
        image_sizes: (B, 2) height and width of each picture within the padded input.
        hidden_states, attentions: The backbone's, where asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_boxes: Tensor | None = None
    scores: Tensor | None = None
    pred_labels: Tensor | None = None
    pred_masks: Tensor | None = None
    image_sizes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MaskRcnnPreTrainedModel(ParentsInitialize, PreTrainedModel):
    """Initialisation, and what the model can do within transformers."""

    config: MaskRcnnConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means: a Trainer divides them by its accumulation steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation of neck and heads; a backbone initialises itself."""
        if isinstance(module, FeaturePyramid):
            for convolution in [*module.lateral_convolutions, *module.output_convolutions]:
                _init(convolution, init.xavier_uniform_)
        elif isinstance(module, RegionProposalNetwork):
            for convolution in (module.convolution, module.objectness, module.box_deltas):
                _init(convolution, init.normal_, std=0.01)
        elif isinstance(module, BoxHead):
            _init(module.fc1, init.xavier_uniform_)
            _init(module.fc2, init.xavier_uniform_)
            _init(module.class_scores, init.normal_, std=0.01)
            _init(module.box_deltas, init.normal_, std=0.001)
        elif isinstance(module, MaskHead):
            for convolution in [*module.convolutions, module.upsample, module.mask_logits]:
                fan_out = convolution.out_channels * math.prod(convolution.kernel_size)
                _init(convolution, init.normal_, std=math.sqrt(2 / fan_out))


def _init(layer: Any, fill: Any, **arguments: float) -> None:
    fill(layer.weight, **arguments)
    init.zeros_(layer.bias)


class MaskRcnnForInstanceSegmentation(MaskRcnnPreTrainedModel):
    """Boxes, classes and masks of the objects in pictures."""

    def __init__(self, config: MaskRcnnConfig):
        super().__init__(config)
        self.backbone = _build_backbone(cast(PreTrainedConfig, config.backbone_config))
        self.neck = FeaturePyramid(self.backbone.channels, config.fpn_channels, config.num_fpn_levels)
        self.rpn = RegionProposalNetwork(config)
        self.box_head = BoxHead(config)
        self.mask_head = MaskHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | None = None,
        **kwargs,
    ) -> MaskRcnnOutput:
        """Losses where there are labels, detections where the model is not training.

        Args:
            pixel_values: (B, 3, H, W), normalised; H and W multiples of 32.
            pixel_mask: (B, H, W), 1 where the picture is: a rectangle from the top-left corner. `None`: everywhere.
            labels: One dictionary a picture: `boxes` (G, 4) xyxy in pixels of the padded input; `class_labels` (G,);
                `masks` (G, h, w), bitmaps with h ≤ H and w ≤ W from the top-left corner, zero beyond, or `polygons`,
                for each object a list of flat x, y sequences in pixels of the padded input; `ignored_boxes` (M, 4) has
                no effect, as in the reference.

        Raises:
            ValueError: Inputs contradict each other or the configuration; the message names both sides.
        """
        for output in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, output):
                kwargs.setdefault(output, True)
        backbone_output = self.backbone.forward_with_filtered_kwargs(pixel_values, **kwargs)
        pyramid = self.neck(backbone_output.feature_maps)
        self._check_strides(pyramid, pixel_values)
        predictions = self.rpn(pyramid)
        # Only now: a GPU is waited for at each look at values, which from here on happens anyway.
        image_sizes = _image_sizes(pixel_values, pixel_mask)

        loss: Tensor | None = None
        loss_dict: dict[str, Tensor] | None = None
        if labels is not None:
            _check_labels(labels, len(pixel_values), self.box_head.num_classes)
            loss_dict = self._losses(pyramid, predictions, image_sizes, labels)
            loss = cast(Tensor, sum(loss_dict.values()))

        detections = {} if self.training else self._detections(pyramid, predictions, image_sizes)
        return MaskRcnnOutput(
            loss=loss,
            loss_dict=loss_dict,
            **detections,
            hidden_states=backbone_output.hidden_states,
            attentions=backbone_output.attentions,
        )

    def _losses(
        self, pyramid: Sequence[Tensor], predictions: RpnPrediction, image_sizes: Tensor, labels: Labels
    ) -> dict[str, Tensor]:
        boxes = [label["boxes"].to(predictions.anchors) for label in labels]
        classes = [label["class_labels"].to(predictions.anchors.device, torch.long) for label in labels]
        loss_rpn_cls, loss_rpn_bbox = self.rpn.loss(predictions, image_sizes, boxes)

        proposals = self.rpn.propose(predictions, image_sizes, training=True)
        sampled = [
            self.box_head.sample_regions(proposal.boxes, objects)
            for proposal, objects in zip(proposals, boxes, strict=True)
        ]
        scores, deltas = self.box_head(self._pool(pyramid, [regions.boxes for regions in sampled], "box"))
        loss_cls, loss_bbox = self.box_head.loss(scores, deltas, sampled, boxes, classes)

        positives = [regions.positive_boxes for regions in sampled]
        positive_classes = torch.cat(
            [labels_of_one[regions.objects] for labels_of_one, regions in zip(classes, sampled, strict=True)]
        )
        logits = self.mask_head(self._pool(pyramid, positives, "mask"), positive_classes)
        targets = [
            self._mask_targets(label, regions, size)
            for label, regions, size in zip(labels, sampled, image_sizes.tolist(), strict=True)
        ]
        loss_mask = self.mask_head.loss(logits, torch.cat(targets).to(logits.dtype))
        return {
            "loss_rpn_cls": loss_rpn_cls,
            "loss_rpn_bbox": loss_rpn_bbox,
            "loss_cls": loss_cls,
            "loss_bbox": loss_bbox,
            "loss_mask": loss_mask,
        }

    def _mask_targets(self, label: Mapping[str, Any], regions: SampledRegions, image_size: Sequence[int]) -> Tensor:
        side, boxes = self.config.mask_target_size, regions.positive_boxes
        if len(boxes) == 0:
            return boxes.new_zeros(0, side, side)
        height, width = image_size
        if "polygons" in label:
            return polygon_mask_targets(label["polygons"], regions.objects, boxes, side, (height, width))
        masks = label["masks"].to(boxes.device)
        missing = max(height - masks.shape[-2], 0), max(width - masks.shape[-1], 0)
        if any(missing):
            masks = nn.functional.pad(masks, (0, missing[1], 0, missing[0]))
        return mask_targets(masks, regions.objects, boxes, side)

    @torch.no_grad()
    def _detections(
        self, pyramid: Sequence[Tensor], predictions: RpnPrediction, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        proposals = [proposal.boxes for proposal in self.rpn.propose(predictions, image_sizes, training=False)]
        scores, deltas = self.box_head(self._pool(pyramid, proposals, "box"))
        counts = [len(boxes) for boxes in proposals]
        detections = [
            self.box_head.detect(*of_one_picture)
            for of_one_picture in zip(scores.split(counts), deltas.split(counts), proposals, image_sizes, strict=True)
        ]
        regions = self._pool(pyramid, [found.boxes for found in detections], "mask")
        masks = self.mask_head(regions, torch.cat([found.labels for found in detections]))
        return {**self._pad(detections, masks), "image_sizes": image_sizes}

    def _pad(self, detections: Sequence[Detections], masks: Tensor) -> dict[str, Tensor]:
        """Detections of all pictures with K places each, so that outputs of batches and processes fit together."""
        shape = (len(detections), self.config.detections_per_image)
        padded = {
            "pred_boxes": masks.new_zeros(*shape, 4),
            "scores": masks.new_zeros(shape),
            "pred_labels": torch.full(shape, PADDING_LABEL, device=masks.device),
            "pred_masks": masks.new_zeros(*shape, *masks.shape[-2:]),
        }
        masks_of_pictures = masks.split([len(found.boxes) for found in detections])
        for picture, (found, masks_of_one) in enumerate(zip(detections, masks_of_pictures, strict=True)):
            places = (picture, slice(len(found.boxes)))
            padded["pred_boxes"][places] = found.boxes.to(masks.dtype)
            padded["scores"][places] = found.scores.to(masks.dtype)
            padded["pred_labels"][places] = found.labels
            padded["pred_masks"][places] = masks_of_one
        return padded

    def _pool(self, pyramid: Sequence[Tensor], boxes: Sequence[Tensor], head: str) -> Tensor:
        """RoIAlign on the backbone's four levels, with the side of the "box" or the "mask" head."""
        side = self.config.box_roi_size if head == "box" else self.config.mask_roi_size
        num_levels = len(self.backbone.channels)
        strides = self.config.anchor_strides[:num_levels]
        return pool_regions(pyramid[:num_levels], strides, boxes, side, self.config.roi_finest_scale)

    def _check_strides(self, pyramid: Sequence[Tensor], pixel_values: Tensor) -> None:
        sides = tuple(pixel_values.shape[-2:])
        for feature, stride in zip(pyramid[: len(self.backbone.channels)], self.config.anchor_strides, strict=False):
            if tuple(size * stride for size in feature.shape[-2:]) != sides:
                raise ValueError(
                    f"The backbone gave a map of {feature.shape[-2]} x {feature.shape[-1]} for an input of "
                    f"{sides[0]} x {sides[1]} pixels, but stride {stride} was expected: the input's sides must be "
                    "multiples of 32, and the backbone's out_indices must name the maps at strides 4, 8, 16 and 32."
                )


def _build_backbone(config: PreTrainedConfig) -> Any:
    # Typed Any: there is no one type for a PreTrainedModel that is a BackboneMixin as well.
    # Our own class is built directly: as custom code on the Hub it is not registered with AutoBackbone, and its
    # configuration may come from another copy of the module, so that only the model type tells.
    ours = config.model_type == ViTAdapterConfig.model_type
    return ViTAdapterBackbone(cast(ViTAdapterConfig, config)) if ours else AutoBackbone.from_config(config)


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Height and width of each picture within the padded input: (B, 2)."""
    batch, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return torch.tensor([[height, width]], device=pixel_values.device).expand(batch, 2)
    if pixel_mask.shape != (batch, height, width):
        raise ValueError(
            f"pixel_mask has shape {tuple(pixel_mask.shape)}, but {(batch, height, width)} was expected from "
            "pixel_values."
        )
    inside = pixel_mask.to(pixel_values.device) != 0
    sizes = torch.stack([inside[:, :, 0].sum(1), inside[:, 0].sum(1)], dim=1)
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    if not torch.equal(inside, rows[:, :, None] & columns[:, None]) or not sizes.all():
        raise ValueError("pixel_mask must be 1 in a rectangle from each picture's top-left corner, and 0 elsewhere.")
    return sizes


def _check_labels(labels: Labels, batch: int, num_classes: int) -> None:
    if len(labels) != batch:
        raise ValueError(f"There are labels for {len(labels)} pictures, but pixel_values holds {batch}.")
    for picture, label in enumerate(labels):
        boxes, classes = label.get("boxes"), label.get("class_labels")
        masks = label.get("polygons", label.get("masks", () if classes is not None and len(classes) == 0 else None))
        if boxes is None or classes is None or masks is None:
            raise ValueError(
                f"The labels of picture {picture} hold {', '.join(sorted(label))}, but boxes, class_labels, and where "
                "there are objects masks or polygons were expected."
            )
        if boxes.shape != (len(classes), 4) or len(masks) != len(classes):
            raise ValueError(
                f"The labels of picture {picture} hold boxes {tuple(boxes.shape)}, {len(masks)} masks and "
                f"{len(classes)} classes, but one of each was expected for every object."
            )
        sides = boxes[:, 2:] - boxes[:, :2]
        if not (sides.isfinite() & (sides > 0)).all():
            raise ValueError(
                f"The labels of picture {picture} hold a box without area, or one that is not finite: leave such "
                "objects out, and give boxes as x1, y1, x2, y2."
            )
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(
                f"The class_labels of picture {picture} run from {classes.min()} to {classes.max()}, but the model "
                f"has {num_classes} classes, numbered from 0."
            )


__all__ = ["MaskRcnnForInstanceSegmentation", "MaskRcnnOutput", "MaskRcnnPreTrainedModel"]
