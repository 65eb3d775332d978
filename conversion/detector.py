"""The published detectors: names and configurations of the original release (mmdetection 2.x) ↔ ours.

Every function is strict: a name, a shape or a number that our model cannot express exactly is an error.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from ..modeling_vit_adapter.backbone import ViTAdapterBackbone
from ..modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from .mapping import Rename, Shape, Split, State, Table, convert, prefixed, revert

TRANSFORMER: Table = (
    Rename("blocks.{i}.norm{n}.{leaf}", "layers.{i}.norm{n}.{leaf}"),
    Split(  # the rows are (3, heads, head_dim)
        "blocks.{i}.attn.qkv.{leaf}",
        (
            "layers.{i}.attention.q_proj.{leaf}",
            "layers.{i}.attention.k_proj.{leaf}",
            "layers.{i}.attention.v_proj.{leaf}",
        ),
    ),
    Rename("blocks.{i}.attn.proj.{leaf}", "layers.{i}.attention.o_proj.{leaf}"),
    Rename("blocks.{i}.mlp.fc{n}.{leaf}", "layers.{i}.mlp.fc{n}.{leaf}"),
    # The giant's SwiGLU. The original's model has none, but its 14-to-16 script passes the names on.
    Split("blocks.{i}.mlp.w12.{leaf}", ("layers.{i}.mlp.gate_proj.{leaf}", "layers.{i}.mlp.up_proj.{leaf}")),
    Rename("blocks.{i}.mlp.w3.{leaf}", "layers.{i}.mlp.down_proj.{leaf}"),
)
"""Transformer blocks as timm, DeiT, DINOv2 and the original name them; layer scale is each source's own."""

EMBEDDINGS: Table = (
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename("patch_embed.proj.{leaf}", "embeddings.patch_embeddings.projection.{leaf}"),
)

LAYER_SCALE: Table = (Rename("blocks.{i}.gamma{n}", "layers.{i}.layer_scale{n}.scale"),)

ADAPTER: Table = (
    Rename("level_embed", "spatial_prior.level_embeddings"),
    # In the stem every convolution is followed by a batch norm and an activation: modules 0, 1, 2; 3, 4, 5; 6, 7, 8.
    Rename("spm.stem.0.{leaf}", "spatial_prior.stem.0.convolution.{leaf}"),
    Rename("spm.stem.1.{leaf}", "spatial_prior.stem.0.normalization.{leaf}"),
    Rename("spm.stem.3.{leaf}", "spatial_prior.stem.1.convolution.{leaf}"),
    Rename("spm.stem.4.{leaf}", "spatial_prior.stem.1.normalization.{leaf}"),
    Rename("spm.stem.6.{leaf}", "spatial_prior.stem.2.convolution.{leaf}"),
    Rename("spm.stem.7.{leaf}", "spatial_prior.stem.2.normalization.{leaf}"),
    Rename("spm.conv{n}.0.{leaf}", "spatial_prior.downsamples.{n-2}.convolution.{leaf}"),
    Rename("spm.conv{n}.1.{leaf}", "spatial_prior.downsamples.{n-2}.normalization.{leaf}"),
    Rename("spm.fc{n}.{leaf}", "spatial_prior.projections.{n-1}.{leaf}"),
    Rename("interactions.{s}.injector.gamma", "stages.{s}.injector.scale"),
    Rename("interactions.{s}.injector.feat_norm.{leaf}", "stages.{s}.injector.source_norm.{leaf}"),
    Rename("interactions.{s}.injector.attn.{rest}", "stages.{s}.injector.attention.{rest}"),
    Rename("interactions.{s}.injector.{rest}", "stages.{s}.injector.{rest}"),
    Rename("interactions.{s}.extractor.feat_norm.{leaf}", "stages.{s}.extractors.0.source_norm.{leaf}"),
    Rename("interactions.{s}.extractor.attn.{rest}", "stages.{s}.extractors.0.attention.{rest}"),
    Rename("interactions.{s}.extractor.ffn.dwconv.dwconv.{leaf}", "stages.{s}.extractors.0.ffn.depthwise.{leaf}"),
    Rename("interactions.{s}.extractor.{rest}", "stages.{s}.extractors.0.{rest}"),
    Rename("interactions.{s}.extra_extractors.{j}.feat_norm.{leaf}", "stages.{s}.extractors.{j+1}.source_norm.{leaf}"),
    Rename("interactions.{s}.extra_extractors.{j}.attn.{rest}", "stages.{s}.extractors.{j+1}.attention.{rest}"),
    Rename(
        "interactions.{s}.extra_extractors.{j}.ffn.dwconv.dwconv.{leaf}",
        "stages.{s}.extractors.{j+1}.ffn.depthwise.{leaf}",
    ),
    Rename("interactions.{s}.extra_extractors.{j}.{rest}", "stages.{s}.extractors.{j+1}.{rest}"),
    Rename("up.{leaf}", "upsample.{leaf}"),
    Rename("norm{n}.{leaf}", "norms.{n-1}.{leaf}"),
)

BACKBONE: Table = EMBEDDINGS + LAYER_SCALE + TRANSFORMER + ADAPTER

DETECTOR: Table = (
    *prefixed(BACKBONE, "backbone.", "backbone."),
    Rename("neck.lateral_convs.{i}.conv.{leaf}", "neck.lateral_convolutions.{i}.{leaf}"),
    Rename("neck.fpn_convs.{i}.conv.{leaf}", "neck.output_convolutions.{i}.{leaf}"),
    Rename("rpn_head.rpn_conv.{leaf}", "rpn.convolution.{leaf}"),
    Rename("rpn_head.rpn_cls.{leaf}", "rpn.objectness.{leaf}"),
    Rename("rpn_head.rpn_reg.{leaf}", "rpn.box_deltas.{leaf}"),
    Rename("roi_head.bbox_head.shared_fcs.{i}.{leaf}", "box_head.fc{i+1}.{leaf}"),
    Rename("roi_head.bbox_head.fc_cls.{leaf}", "box_head.class_scores.{leaf}"),
    Rename("roi_head.bbox_head.fc_reg.{leaf}", "box_head.box_deltas.{leaf}"),
    Rename("roi_head.mask_head.convs.{i}.conv.{leaf}", "mask_head.convolutions.{i}.{leaf}"),
    Rename("roi_head.mask_head.upsample.{leaf}", "mask_head.upsample.{leaf}"),
    Rename("roi_head.mask_head.conv_logits.{leaf}", "mask_head.mask_logits.{leaf}"),
)


FOUR_LEVELS = [1, 2, 3, 4]
"""`out_indices` of a backbone that returns its maps at strides 4, 8, 16 and 32, as a detector takes them."""


def expected_shapes(model_class: type[PreTrainedModel], config: ViTAdapterConfig | MaskRcnnConfig) -> dict[str, Shape]:
    """Name and shape of every parameter and buffer that a model of this configuration saves; allocates no weights."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def backbone_state_from_reference(state: State, config: ViTAdapterConfig) -> dict[str, torch.Tensor]:
    """The original's backbone (names without `backbone.`) under our names.

    Raises: CoverageError: a tensor is missing, unknown or of another shape.
    """
    return convert(state, BACKBONE, expected_shapes(ViTAdapterBackbone, config)).tensors


def backbone_state_to_reference(state: State, config: ViTAdapterConfig) -> dict[str, torch.Tensor]:
    """The inverse of `backbone_state_from_reference`, bit for bit."""
    return revert(state, BACKBONE, expected_shapes(ViTAdapterBackbone, config))


def state_from_reference(state: State, config: MaskRcnnConfig) -> dict[str, torch.Tensor]:
    """The original's whole detector under our names.

    Raises: CoverageError: a tensor is missing, unknown or of another shape.
    """
    return convert(state, DETECTOR, expected_shapes(MaskRcnnForInstanceSegmentation, config)).tensors


def state_to_reference(state: State, config: MaskRcnnConfig) -> dict[str, torch.Tensor]:
    """The inverse of `state_from_reference`, bit for bit."""
    return revert(state, DETECTOR, expected_shapes(MaskRcnnForInstanceSegmentation, config))


# --- configuration -------------------------------------------------------------------------------------------------

BACKBONE_FIELDS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path_rate",
    "patch_size": "patch_size",
    "img_size": "image_size",
    "in_chans": "num_channels",
    "interaction_indexes": "interaction_indexes",
    "conv_inplane": "spatial_prior_channels",
    "n_points": "deformable_num_points",
    "deform_num_heads": "deformable_num_heads",
    "deform_ratio": "deformable_value_ratio",
    "cffn_ratio": "conv_ffn_ratio",
    "init_values": "injector_scale_init",
    "add_vit_feature": "add_vit_features",
}
"""The original's argument → our field of the same meaning."""

BACKBONE_DEFAULTS = {
    "mlp_ratio": 4,
    "qkv_bias": True,
    "drop_path_rate": 0.0,
    "patch_size": 16,
    "img_size": 224,
    "in_chans": 3,
    "conv_inplane": 64,
    "n_points": 4,
    "deform_num_heads": 6,
    "deform_ratio": 1.0,
    "cffn_ratio": 0.25,
    "init_values": 0.0,
    "add_vit_feature": True,
    "pretrain_size": 224,
    "window_attn": False,
    "window_size": 14,
    "with_cffn": True,
    "use_extra_extractor": True,
    "layer_scale": True,
}
"""What the original assumes where a configuration says nothing."""

BACKBONE_CONSTANTS = {"type": "ViTAdapter", "drop_rate": 0.0, "attn_drop_rate": 0.0, "freeze_vit": False}
BACKBONE_IRRELEVANT = {"pretrained", "with_cp", "num_classes", "init_cfg"}
"""Arguments that change no number: where weights come from, gradient checkpointing, an unused head."""

DETECTOR_FIELDS: dict[str, tuple[str, ...]] = {
    "fpn_channels": (
        "neck.out_channels",
        "rpn_head.in_channels",
        "roi_head.bbox_roi_extractor.out_channels",
        "roi_head.bbox_head.in_channels",
        "roi_head.mask_roi_extractor.out_channels",
        "roi_head.mask_head.in_channels",
    ),
    "num_fpn_levels": ("neck.num_outs",),
    "rpn_channels": ("rpn_head.feat_channels",),
    "anchor_scale": ("rpn_head.anchor_generator.scales",),
    "anchor_ratios": ("rpn_head.anchor_generator.ratios",),
    "anchor_strides": ("rpn_head.anchor_generator.strides",),
    "rpn_pre_nms_top_n_train": ("train_cfg.rpn_proposal.nms_pre",),
    "rpn_pre_nms_top_n_test": ("test_cfg.rpn.nms_pre",),
    "rpn_post_nms_top_n_train": ("train_cfg.rpn_proposal.max_per_img",),
    "rpn_post_nms_top_n_test": ("test_cfg.rpn.max_per_img",),
    "rpn_nms_threshold": ("train_cfg.rpn_proposal.nms.iou_threshold", "test_cfg.rpn.nms.iou_threshold"),
    "rpn_min_box_size": ("train_cfg.rpn_proposal.min_bbox_size", "test_cfg.rpn.min_bbox_size"),
    "rpn_positive_iou": ("train_cfg.rpn.assigner.pos_iou_thr",),
    "rpn_negative_iou": ("train_cfg.rpn.assigner.neg_iou_thr",),
    "rpn_min_positive_iou": ("train_cfg.rpn.assigner.min_pos_iou",),
    "rpn_batch_size_per_image": ("train_cfg.rpn.sampler.num",),
    "rpn_positive_fraction": ("train_cfg.rpn.sampler.pos_fraction",),
    "box_roi_size": ("roi_head.bbox_roi_extractor.roi_layer.output_size", "roi_head.bbox_head.roi_feat_size"),
    "box_head_dim": ("roi_head.bbox_head.fc_out_channels",),
    "box_delta_stds": ("roi_head.bbox_head.bbox_coder.target_stds",),
    "box_positive_iou": (
        "train_cfg.rcnn.assigner.pos_iou_thr",
        "train_cfg.rcnn.assigner.neg_iou_thr",
        "train_cfg.rcnn.assigner.min_pos_iou",
    ),
    "box_batch_size_per_image": ("train_cfg.rcnn.sampler.num",),
    "box_positive_fraction": ("train_cfg.rcnn.sampler.pos_fraction",),
    "score_threshold": ("test_cfg.rcnn.score_thr",),
    "nms_threshold": ("test_cfg.rcnn.nms.iou_threshold",),
    "detections_per_image": ("test_cfg.rcnn.max_per_img",),
    "mask_roi_size": ("roi_head.mask_roi_extractor.roi_layer.output_size",),
    "mask_num_convs": ("roi_head.mask_head.num_convs",),
    "mask_channels": ("roi_head.mask_head.conv_out_channels",),
    "mask_target_size": ("train_cfg.rcnn.mask_size",),
    "mask_threshold": ("test_cfg.rcnn.mask_thr_binary",),
}
"""Our field → every place where the original states it; they have to agree."""

NUM_CLASSES = ("roi_head.bbox_head.num_classes", "roi_head.mask_head.num_classes")

DETECTOR_CONSTANTS: dict[str, Any] = {
    "type": "MaskRCNN",
    "neck.type": "FPN",
    "rpn_head.type": "RPNHead",
    "rpn_head.anchor_generator.type": "AnchorGenerator",
    "rpn_head.bbox_coder.type": "DeltaXYWHBBoxCoder",
    "rpn_head.bbox_coder.target_means": [0.0, 0.0, 0.0, 0.0],
    "rpn_head.bbox_coder.target_stds": [1.0, 1.0, 1.0, 1.0],
    "rpn_head.loss_cls.type": "CrossEntropyLoss",
    "rpn_head.loss_cls.use_sigmoid": True,
    "rpn_head.loss_cls.loss_weight": 1.0,
    "rpn_head.loss_bbox.type": "L1Loss",
    "rpn_head.loss_bbox.loss_weight": 1.0,
    "roi_head.type": "StandardRoIHead",
    "roi_head.bbox_roi_extractor.type": "SingleRoIExtractor",
    "roi_head.bbox_roi_extractor.roi_layer.type": "RoIAlign",
    "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 0,
    "roi_head.bbox_roi_extractor.featmap_strides": [4, 8, 16, 32],
    "roi_head.bbox_head.type": "Shared2FCBBoxHead",
    "roi_head.bbox_head.bbox_coder.type": "DeltaXYWHBBoxCoder",
    "roi_head.bbox_head.bbox_coder.target_means": [0.0, 0.0, 0.0, 0.0],
    "roi_head.bbox_head.reg_class_agnostic": False,
    "roi_head.bbox_head.loss_cls.type": "CrossEntropyLoss",
    "roi_head.bbox_head.loss_cls.use_sigmoid": False,
    "roi_head.bbox_head.loss_cls.loss_weight": 1.0,
    "roi_head.bbox_head.loss_bbox.type": "L1Loss",
    "roi_head.bbox_head.loss_bbox.loss_weight": 1.0,
    "roi_head.mask_roi_extractor.type": "SingleRoIExtractor",
    "roi_head.mask_roi_extractor.roi_layer.type": "RoIAlign",
    "roi_head.mask_roi_extractor.roi_layer.sampling_ratio": 0,
    "roi_head.mask_roi_extractor.featmap_strides": [4, 8, 16, 32],
    "roi_head.mask_head.type": "FCNMaskHead",
    "roi_head.mask_head.loss_mask.type": "CrossEntropyLoss",
    "roi_head.mask_head.loss_mask.use_mask": True,
    "roi_head.mask_head.loss_mask.loss_weight": 1.0,
    "train_cfg.rpn.assigner.type": "MaxIoUAssigner",
    "train_cfg.rpn.assigner.match_low_quality": True,
    "train_cfg.rpn.assigner.ignore_iof_thr": -1,
    "train_cfg.rpn.sampler.type": "RandomSampler",
    "train_cfg.rpn.sampler.neg_pos_ub": -1,
    "train_cfg.rpn.sampler.add_gt_as_proposals": False,
    "train_cfg.rpn.allowed_border": -1,
    "train_cfg.rpn.pos_weight": -1,
    "train_cfg.rpn_proposal.nms.type": "nms",
    "train_cfg.rcnn.assigner.type": "MaxIoUAssigner",
    "train_cfg.rcnn.assigner.match_low_quality": True,
    "train_cfg.rcnn.assigner.ignore_iof_thr": -1,
    "train_cfg.rcnn.sampler.type": "RandomSampler",
    "train_cfg.rcnn.sampler.neg_pos_ub": -1,
    "train_cfg.rcnn.sampler.add_gt_as_proposals": True,
    "train_cfg.rcnn.pos_weight": -1,
    "test_cfg.rpn.nms.type": "nms",
    "test_cfg.rcnn.nms.type": "nms",
}
"""What is the same in every published detector, and therefore no field of `MaskRcnnConfig`."""

DETECTOR_IRRELEVANT = {"train_cfg.rpn.debug", "train_cfg.rcnn.debug", "pretrained", "init_cfg"}


def backbone_config_from_reference(arguments: Mapping[str, Any]) -> ViTAdapterConfig:
    """The original's backbone arguments as our configuration, which returns all four maps.

    Raises: ValueError: an argument is unknown or has a value that our backbone cannot express.
    """
    known = BACKBONE_FIELDS.keys() | BACKBONE_DEFAULTS.keys() | BACKBONE_CONSTANTS.keys() | BACKBONE_IRRELEVANT
    _refuse_unknown("backbone", arguments.keys() - known)
    for name, value in BACKBONE_CONSTANTS.items():
        _require(f"backbone.{name}", arguments.get(name, value), value)
    values = {**BACKBONE_DEFAULTS, **arguments}
    _require("backbone.pretrain_size", values["pretrain_size"], values["img_size"])
    depth = _stated(values, "depth", "backbone.")
    windowed, sizes = (_per_block(values, name, depth) for name in ("window_attn", "window_size"))
    fields: dict[str, Any] = {ours: _stated(values, theirs, "backbone.") for theirs, ours in BACKBONE_FIELDS.items()}
    if not values["with_cffn"]:
        fields["conv_ffn_ratio"] = 0
    fields["window_sizes"] = [_window(*pair) for pair in zip(windowed, sizes, strict=True)]
    fields["layerscale_value"] = 1.0 if values["layer_scale"] else None
    fields["num_extra_extractors"] = 2 if values["use_extra_extractor"] else 0
    fields["out_indices"] = FOUR_LEVELS
    return ViTAdapterConfig(**fields)


def config_from_reference(model: Mapping[str, Any]) -> MaskRcnnConfig:
    """The original's resolved `model` dictionary as our configuration.

    Raises: ValueError: a number is missing, unknown, stated twice with different values, or one that our model holds
    constant with another value.
    """
    backbone = backbone_config_from_reference(_stated(model, "backbone"))
    stated = _flatten({name: part for name, part in model.items() if name != "backbone"})
    places = {path for paths in DETECTOR_FIELDS.values() for path in paths}
    known = places | DETECTOR_CONSTANTS.keys() | DETECTOR_IRRELEVANT | {*NUM_CLASSES, "neck.in_channels"}
    _refuse_unknown("detector", stated.keys() - known)
    for path, value in DETECTOR_CONSTANTS.items():
        _require(path, _stated(stated, path), value)
    _require("neck.in_channels", _stated(stated, "neck.in_channels"), [backbone.hidden_size] * 4)
    fields = {name: _agreed(stated, paths) for name, paths in DETECTOR_FIELDS.items()}
    scales = fields["anchor_scale"]
    if len(scales) != 1:
        raise ValueError(f"rpn_head.anchor_generator.scales should hold one scale, but holds {scales}")
    fields["anchor_scale"] = scales[0]
    fields["num_labels"] = _agreed(stated, NUM_CLASSES)
    return MaskRcnnConfig(backbone_config=backbone, **fields)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted path; lists are values."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _stated(values: Mapping[str, Any], path: str, prefix: str = "") -> Any:
    if path not in values:
        raise ValueError(f"the original's configuration does not state {prefix}{path}")
    return values[path]


def _agreed(stated: Mapping[str, Any], paths: tuple[str, ...]) -> Any:
    """The one value that all these places state."""
    value = _stated(stated, paths[0])
    for path in paths[1:]:
        _require(path, _stated(stated, path), value)
    return value


def _require(path: str, got: Any, expected: Any) -> None:
    got = list(got) if isinstance(got, tuple) else got
    if got != expected:
        raise ValueError(f"{path} should be {expected!r} for our model to be the same, but the original has {got!r}")


def _refuse_unknown(part: str, names: set[str]) -> None:
    if names:
        raise ValueError(f"the {part} configuration states what we do not know: {', '.join(sorted(names))}")


def _per_block(values: Mapping[str, Any], name: str, depth: int) -> list[Any]:
    """A value for every block, which the original may state once for all."""
    value = values[name]
    entries = list(value) if isinstance(value, list | tuple) else [value] * depth
    if len(entries) != depth:
        raise ValueError(f"backbone.{name} should hold one entry for each of {depth} blocks, but holds {len(entries)}")
    return entries


def _window(windowed: bool, size: int | None) -> int:
    if windowed and not size:
        raise ValueError("backbone.window_size should be a number wherever window_attn is on, but is None")
    return size if windowed and size else 0
