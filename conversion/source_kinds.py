"""What a source is: which way of writing weights, which published model, which classes; told by names and shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from ..configuration.presets import PRESETS, Preset
from .augreg import AUGREG, AUGREG_JAX
from .coco_classes import COCO_CLASSES
from .deit import DEIT
from .detector import DETECTOR, FOUR_LEVELS
from .dinov2 import ADAPTER_IS_NEW, DINOV2, DINOV2_HUGGING_FACE, DINOV2_TIMM_GIANT
from .mapping import Rename, Shape, Split, State, Table, expand, first_match, match, target_patterns
from .source_files import SourceError, SourceFiles

AUGREG_WIDTH = 1024  # DeiT and AugReg share their names; the published AugReg is the only one of this width


@dataclass(frozen=True)
class Kind:
    """A way of writing weights. family: the `source_kind` of the presets that start from it; None for detectors."""

    table: Table
    family: str | None
    recognises: Callable[[State], bool]


def _rows(state: State, name: str) -> int:
    return state[name].shape[0] if name in state and state[name].dim() else 0


def _is_plain_vit(state: State) -> bool:
    return "blocks.0.attn.qkv.weight" in state and not _is_dinov2(state)


def _is_dinov2(state: State) -> bool:
    return "blocks.0.ls1.gamma" in state or "blocks.0.gamma1" in state


def _has_packed_swiglu(state: State) -> bool:
    fc2 = state.get("blocks.0.mlp.fc2.weight")
    return fc2 is not None and _rows(state, "blocks.0.mlp.fc1.weight") == 2 * fc2.shape[-1]


OURS: Table = (Rename("{rest}", "{rest}"), *ADAPTER_IS_NEW)

KINDS: dict[str, Kind] = {
    "vit-adapter": Kind(OURS, "vit-adapter", lambda state: "layers.0.attention.q_proj.weight" in state),
    "detector": Kind(DETECTOR, None, lambda state: "rpn_head.rpn_conv.weight" in state),
    "dinov2-timm-giant": Kind(
        DINOV2_TIMM_GIANT, "dinov2", lambda state: _is_dinov2(state) and _has_packed_swiglu(state)
    ),
    "dinov2": Kind(DINOV2, "dinov2", _is_dinov2),
    "dinov2-hf": Kind(
        DINOV2_HUGGING_FACE,
        "dinov2",
        lambda state: any(name.endswith("encoder.layer.0.layer_scale1.lambda1") for name in state),
    ),
    "augreg-jax": Kind(AUGREG_JAX, "augreg", lambda state: "Transformer/encoderblock_0/LayerNorm_0/scale" in state),
    "augreg": Kind(
        AUGREG, "augreg", lambda state: _is_plain_vit(state) and _rows(state, "norm.weight") == AUGREG_WIDTH
    ),
    "deit": Kind(DEIT, "deit", _is_plain_vit),
}
"""The sources, most particular first: the first that recognises a state dict reads it."""


def recognise(files: SourceFiles) -> str:
    """The kind of a source.

    Raises: SourceError: it is none of them.
    """
    for name, kind in KINDS.items():
        if kind.recognises(files.state):
            return name
    shown = ", ".join(list(files.state)[:5])
    raise SourceError(f"{files.name}: the names ({shown}, ...) are those of no known source: {', '.join(KINDS)}")


def choose_preset(files: SourceFiles, kind: str) -> str:
    """The published model that a source's shapes belong to. Among detectors, `1x` in the file's name tells the 1x row.

    Raises: SourceError: no published model has these shapes.
    """
    shapes = _our_shapes(files.state, kind_of(kind).table)
    family = kind_of(kind).family
    one_x = family is None and "_1x_" in files.name
    for name, preset in PRESETS.items():
        if name.endswith("-1x") == one_x and _fits(preset, shapes, family):
            return name
    width = shapes.get("embeddings.patch_embeddings.projection.bias", (0,))[0]
    raise SourceError(
        f"{files.name}: no published model has {_depth(shapes)} blocks of width {width}; give --preset or --config"
    )


def preset_config(preset: str, files: SourceFiles, kind: str) -> ViTAdapterConfig | MaskRcnnConfig:
    """The configuration of a preset: a backbone's, or with a detector source a detector's, with the source's classes.

    Raises: SourceError: there is no such preset.
    """
    if preset not in PRESETS:
        raise SourceError(f"there is no preset {preset}; there are {', '.join(PRESETS)}")
    backbone = ViTAdapterConfig(**{**PRESETS[preset].backbone, "out_indices": FOUR_LEVELS})
    if kind_of(kind).table is not DETECTOR:
        return backbone
    id2label, label2id = labels_in(files)
    return MaskRcnnConfig(backbone_config=backbone, id2label=id2label, label2id=label2id, **PRESETS[preset].detector)


def class_names(files: SourceFiles) -> list[str]:
    """The detector's class names: those in the file, COCO's for 80 classes, numbered ones otherwise."""
    count = _rows(files.state, "roi_head.mask_head.conv_logits.weight")
    stated = files.meta.get("CLASSES")
    if isinstance(stated, list | tuple) and len(stated) == count:
        return [str(label) for label in stated]
    return list(COCO_CLASSES) if count == len(COCO_CLASSES) else placeholder_labels(count)


def kind_of(name: str) -> Kind:
    """The kind of this name.

    Raises: SourceError: there is none.
    """
    if name not in KINDS:
        raise SourceError(f"there is no kind {name}; there are {', '.join(KINDS)}")
    return KINDS[name]


def labels_in(files: SourceFiles) -> tuple[dict[int, str], dict[str, int]]:
    """id2label and label2id of a detector source."""
    classes = class_names(files)
    return dict(enumerate(classes)), {label: index for index, label in enumerate(classes)}


def placeholder_labels(count: int) -> list[str]:
    """What transformers calls classes without names."""
    return [f"LABEL_{index}" for index in range(count)]


def _our_shapes(state: State, table: Table) -> dict[str, Shape]:
    """The source's shapes under our backbone's names, as far as the table goes (a split tensor by its first part)."""
    shapes: dict[str, Shape] = {}
    rows = [row for row in table if isinstance(row, Rename | Split)]
    for source, tensor in state.items():
        found = first_match(rows, source, lambda row: (row.source,))
        if found is not None:
            row, values = found
            shapes[expand(target_patterns(row)[0], values).removeprefix("backbone.")] = tuple(tensor.shape)
    return shapes


def _depth(shapes: Mapping[str, Shape]) -> int:
    return sum(match("layers.{i}.norm1.weight", name) is not None for name in shapes)


def _fits(preset: Preset, shapes: Mapping[str, Shape], family: str | None) -> bool:
    """Whether a published detector (family None), or a preset that starts from this family, has these shapes."""
    published = preset.box_ap is not None if family is None else preset.source_kind == family
    if not published:
        return False
    config = ViTAdapterConfig(**preset.backbone)
    grid = (config.image_size // config.patch_size) ** 2
    return (
        shapes.get("embeddings.patch_embeddings.projection.bias") == (config.hidden_size,)
        and _depth(shapes) == config.num_hidden_layers
        and ("layers.0.mlp.gate_proj.weight" in shapes) == config.use_swiglu_ffn
        and (family is not None or shapes.get("embeddings.position_embeddings", (0, 0))[1] == 1 + grid)
    )
