"""Configuration of the Mask R-CNN detector, with the numbers of the published ViT-Adapter detectors as defaults.

He et al., "Mask R-CNN", ICCV 2017, https://arxiv.org/abs/1703.06870, on the feature pyramid of Lin et al., CVPR 2017,
https://arxiv.org/abs/1612.03144.
"""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_vit_adapter import ViTAdapterConfig

NUM_BACKBONE_LEVELS = 4

# Overlaps, probabilities and fractions.
SHARES = (
    *("rpn_nms_threshold", "rpn_positive_iou", "rpn_negative_iou", "rpn_min_positive_iou", "rpn_positive_fraction"),
    *("box_positive_iou", "box_positive_fraction", "score_threshold", "nms_threshold", "mask_threshold"),
)


@strict
class MaskRcnnConfig(PreTrainedConfig):
    r"""What a Mask R-CNN detector is, on any transformers backbone with four levels at strides 4, 8, 16 and 32.

    What is the same in every published configuration is no field: loss weights of 1, delta means of 0, RPN delta
    deviations of 1, adaptive RoIAlign sampling, ground truth among the proposals, low-quality matching.

    Args:
        backbone_config: Configuration (or its dictionary) of any registered transformers backbone that returns four
            maps. `None`: the default ViT-Adapter.
        fpn_channels: Channels of every level of the feature pyramid.
        num_fpn_levels: Levels of the pyramid; those beyond the backbone's four are subsampled from the last.
        anchor_scale: Side of the square anchor over the stride of its level.
        anchor_ratios: Height over width of the anchors at each cell.
        anchor_strides: Stride in pixels of each level of the pyramid, finest first.
        rpn_channels: Channels of the RPN's shared convolution.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: Anchors of a level that enter the suppression.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: Proposals of a picture, best of all levels.
        rpn_nms_threshold: IoU above which the lower-scored proposal of a level is suppressed.
        rpn_min_box_size: Proposals must be wider and higher than this, in pixels.
        rpn_positive_iou, rpn_negative_iou: Anchors at or above the first are positive, below the second negative.
        rpn_min_positive_iou: Least IoU at which an object still takes its best anchors.
        rpn_batch_size_per_image, rpn_positive_fraction: Anchors sampled for the loss, and the largest share of
            positives among them.
        roi_finest_scale: Side in pixels of the boxes that go to the finest level's upper bound: a box of side s is
            pooled from level floor(log2(s / roi_finest_scale)).
        box_roi_size: Side of the pooled feature of the box head.
        box_head_dim: Width of the box head's two linear layers.
        box_positive_iou: IoU at which a proposal belongs to an object.
        box_batch_size_per_image, box_positive_fraction: Proposals sampled for the loss, and the largest share of
            positives among them.
        box_delta_stds: The box head's deltas are divided by these, (x, y, w, h).
        score_threshold: Least class probability of a detection.
        nms_threshold: IoU above which the lower-scored detection of the same class is suppressed.
        detections_per_image: Detections of a picture, K.
        mask_roi_size: Side of the pooled feature of the mask head.
        mask_target_size: Side of the mask logits, twice `mask_roi_size`.
        mask_num_convs, mask_channels: Depth and width of the mask head.
        mask_threshold: Probability at which a pixel belongs to the object.
        id2label, label2id: The classes; the background is not counted.
        initializer_range: Kept for transformers; the heads have initialisations of their own.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has the wrong type, or fields contradict each other; the
            message names both sides.
        ValueError: `backbone_config` is a dictionary of no registered model type.
    """

    model_type = "mask_rcnn"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type=ViTAdapterConfig.model_type,
            init_kwargs={"out_indices": [1, 2, 3, 4]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    fpn_channels: int = 256
    num_fpn_levels: int = 5
    anchor_scale: float | int = 8
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    anchor_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32, 64)
    rpn_channels: int = 256
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_threshold: float | int = 0.7
    rpn_min_box_size: float | int = 0
    rpn_positive_iou: float | int = 0.7
    rpn_negative_iou: float | int = 0.3
    rpn_min_positive_iou: float | int = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float | int = 0.5
    roi_finest_scale: float | int = 56
    box_roi_size: int = 7
    box_head_dim: int = 1024
    box_positive_iou: float | int = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float | int = 0.25
    box_delta_stds: list[float | int] | tuple[float | int, ...] = (0.1, 0.1, 0.2, 0.2)
    score_threshold: float | int = 0.05
    nms_threshold: float | int = 0.5
    detections_per_image: int = 100
    mask_roi_size: int = 14
    mask_target_size: int = 28
    mask_num_convs: int = 4
    mask_channels: int = 256
    mask_threshold: float | int = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in ("anchor_ratios", "anchor_strides", "box_delta_stds"):
            setattr(self, name, list(getattr(self, name)))
        if isinstance(self.backbone_config, dict):
            model_type = self.backbone_config.get("model_type")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"backbone_config has the model_type {model_type}, but one that transformers knows was expected, "
                    'such as "vit_adapter" or "resnet".'
                )
        super().__post_init__(**kwargs)

    def validate_backbone(self):
        out_indices = getattr(self.backbone_config, "out_indices", None)
        if out_indices is None or len(out_indices) != NUM_BACKBONE_LEVELS:
            raise ValueError(
                "The detector needs a backbone with four maps at strides 4, 8, 16 and 32, but the backbone_config of "
                f"type {self.backbone_config.model_type} has out_indices {out_indices}: give it four, [1, 2, 3, 4] "
                "for most transformers backbones."
            )

    def validate_pyramid(self):
        if self.num_fpn_levels < NUM_BACKBONE_LEVELS:
            raise ValueError(
                f"num_fpn_levels is {self.num_fpn_levels}, but the pyramid holds at least the backbone's four levels."
            )
        if len(self.anchor_strides) != self.num_fpn_levels:
            raise ValueError(
                f"anchor_strides has {len(self.anchor_strides)} entries, but one for each of the num_fpn_levels "
                f"{self.num_fpn_levels} levels was expected."
            )
        doubled = [self.anchor_strides[0] * 2**level for level in range(self.num_fpn_levels)]
        if self.anchor_strides != doubled:
            raise ValueError(
                f"anchor_strides is {self.anchor_strides}, but each level has twice the stride of the one before: "
                f"{doubled}."
            )

    def validate_anchors(self):
        if not self.anchor_ratios or min(self.anchor_ratios) <= 0 or self.anchor_scale <= 0:
            raise ValueError(
                f"anchor_ratios is {self.anchor_ratios} and anchor_scale {self.anchor_scale}, but at least one ratio "
                "and numbers above 0 were expected."
            )

    def validate_shares(self):
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a number from 0 to 1 was expected.")

    def validate_heads(self):
        if self.mask_target_size != 2 * self.mask_roi_size:
            raise ValueError(
                f"mask_target_size is {self.mask_target_size}, but the mask head doubles mask_roi_size "
                f"{self.mask_roi_size}: {2 * self.mask_roi_size} was expected."
            )
        if len(self.box_delta_stds) != 4:
            raise ValueError(f"box_delta_stds is {self.box_delta_stds}, but four numbers (x, y, w, h) were expected.")
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou {self.rpn_negative_iou} is above rpn_positive_iou {self.rpn_positive_iou}: an "
                "anchor would be both."
            )
        if not self.id2label:
            raise ValueError("id2label is empty, but a detector needs at least one class.")


AutoConfig.register(MaskRcnnConfig.model_type, MaskRcnnConfig, exist_ok=True)

__all__ = ["MaskRcnnConfig"]
