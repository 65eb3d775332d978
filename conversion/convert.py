"""From a source of weights to a `from_pretrained` folder: recognise, choose the model, convert, write, verify.

A backbone source becomes a backbone folder with the converted tensors only; the adapter's are listed as new in
`config.provenance`, and `from_pretrained` initialises them. A detector source becomes a complete detector folder.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from ..configuration.presets import PRESETS, Preset
from ..modeling_vit_adapter.backbone import ViTAdapterBackbone
from ..modeling_vit_adapter.image_processing import MaskRcnnImageProcessor
from ..modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from .augreg import AUGREG, AUGREG_JAX
from .coco_classes import COCO_CLASSES
from .deit import DEIT
from .detector import DETECTOR, backbone_config_from_reference, config_from_reference, expected_shapes
from .dinov2 import ADAPTER_IS_NEW, DINOV2, DINOV2_HUGGING_FACE, DINOV2_TIMM_GIANT
from .mapping import Conversion, Rename, Shape, Split, State, Table, convert, expand, match
from .model_card import model_card
from .model_folder import MAX_SHARD_BYTES, new_folder, verify_weights, write_model_folder
from .source_files import SourceError, SourceFiles, read_source

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


@dataclass(frozen=True)
class ConversionReport:
    """What was done.

    seconds: by phase (read, hash, convert_and_write, verify).
    """

    folder: Path
    kind: str
    preset: str | None
    conversion: Conversion
    seconds: dict[str, float]


def convert_source(
    source: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    preset: str | None = None,
    config: ViTAdapterConfig | MaskRcnnConfig | None = None,
    revision: str | None = None,
    card_name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    """Converts a file, a Hugging Face folder or a Hub id into the new model folder `out`.

    kind: one of `KINDS`, recognised by the names otherwise. preset: a published model, chosen by the shapes otherwise.
    config: for a model that is none of the published ones, in place of a preset. card_name: how the model card's
    snippet names the model, a Hub id for instance; the folder's name otherwise.

    Raises:
        SourceError: the source cannot be read or told what it is.
        CoverageError: the source does not cover the model, or holds what the model has no place for.
        ValueError: `out` exists.
    """
    seconds, clock = {}, time.perf_counter()
    files = read_source(source, revision)
    name = kind or recognise(files)
    table = _kind(name).table
    if config is None:
        preset = preset or choose_preset(files, name)
        config = preset_config(preset, files, name)
    elif isinstance(config, MaskRcnnConfig) and config.id2label == dict(
        enumerate(_placeholders(len(config.id2label)))
    ):
        config.id2label, config.label2id = _labels(files)
    model_class = MaskRcnnForInstanceSegmentation if isinstance(config, MaskRcnnConfig) else ViTAdapterBackbone
    if (model_class is MaskRcnnForInstanceSegmentation) != (table is DETECTOR):
        raise SourceError(f"{source}: holds a {name}, which cannot become a {model_class.__name__}")
    seconds["read"] = time.perf_counter() - clock

    clock = time.perf_counter()
    digests = files.digests()
    seconds["hash"] = time.perf_counter() - clock

    clock = time.perf_counter()
    with torch.no_grad():
        conversion = convert(files.state, table, expected_shapes(model_class, config))
    config.architectures = [model_class.__name__]
    config.dtype = next(tensor.dtype for tensor in conversion.tensors.values() if tensor.is_floating_point())
    config.provenance = provenance(files.name, digests, name, preset, conversion)
    with new_folder(Path(out)) as folder:
        processor = image_processor(preset) if table is DETECTOR else None
        card = model_card(config, card_name or Path(out).resolve().name)
        write_model_folder(folder, config, conversion.tensors, card, processor, max_shard_bytes)
        verifying = time.perf_counter()
        verify_weights(folder, conversion.tensors)
        seconds["verify"] = time.perf_counter() - verifying
    seconds["convert_and_write"] = time.perf_counter() - clock - seconds["verify"]
    return ConversionReport(Path(out), name, preset, conversion, seconds)


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
    shapes = _our_shapes(files.state, _kind(kind).table)
    family = _kind(kind).family
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
    backbone = ViTAdapterConfig(**PRESETS[preset].backbone, out_indices=[1, 2, 3, 4])
    if _kind(kind).table is not DETECTOR:
        return backbone
    id2label, label2id = _labels(files)
    return MaskRcnnConfig(backbone_config=backbone, id2label=id2label, label2id=label2id, **PRESETS[preset].detector)


def class_names(files: SourceFiles) -> list[str]:
    """The detector's class names: those in the file, COCO's for 80 classes, numbered ones otherwise."""
    count = _rows(files.state, "roi_head.mask_head.conv_logits.weight")
    stated = files.meta.get("CLASSES")
    if isinstance(stated, list | tuple) and len(stated) == count:
        return [str(label) for label in stated]
    return list(COCO_CLASSES) if count == len(COCO_CLASSES) else _placeholders(count)


def read_config(path: str | Path) -> ViTAdapterConfig | MaskRcnnConfig:
    """A configuration from a JSON file: one of ours, or the original's resolved one (whole, or its `model` part).

    Raises: SourceError: the file is missing or no such configuration. ValueError: our model cannot express it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path}: no readable JSON file ({error})") from error
    content = content.get("model", content) if isinstance(content, dict) else {}
    readers: dict[str | None, Callable[[dict[str, Any]], ViTAdapterConfig | MaskRcnnConfig]] = {
        "MaskRCNN": config_from_reference,
        "ViTAdapter": backbone_config_from_reference,
        ViTAdapterConfig.model_type: ViTAdapterConfig.from_dict,
        MaskRcnnConfig.model_type: MaskRcnnConfig.from_dict,
    }
    kind = content.get("model_type", content.get("type"))
    if kind not in readers:
        raise SourceError(f"{path}: holds neither our configuration nor the original's (model_type or type is {kind})")
    return readers[kind](content)


def image_processor(preset: str | None) -> MaskRcnnImageProcessor:
    """The preset's test-time preprocessing."""
    if preset is None:
        return MaskRcnnImageProcessor()
    # Presets state the normalisation in grey levels, the processor of values between 0 and 1.
    return MaskRcnnImageProcessor(
        image_mean=[round(level / 255, 6) for level in PRESETS[preset].image_mean],
        image_std=[round(level / 255, 6) for level in PRESETS[preset].image_std],
    )


def provenance(
    source: str, files: Mapping[str, Any], kind: str, preset: str | None, conversion: Conversion
) -> dict[str, Any]:
    """Where the weights come from, for config.json."""
    return {
        "source": source,
        "files": files,
        "kind": kind,
        "preset": preset,
        "converter": f"vit-adapter {package_version()}",
        "dropped": _by_reason(conversion.dropped),
        "filled": _by_reason(conversion.filled),
        "new": _by_reason(conversion.new),
    }


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("vit-adapter")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def load_backbone(backbone: ViTAdapterBackbone, source: str | Path) -> Conversion:
    """Fills a backbone from any backbone source, or from a converted or trained backbone folder.

    Only the adapter may stay as it was initialised; `new` of what is returned names it.

    Raises: SourceError: the source cannot be read. CoverageError: it does not fit the backbone.
    """
    files = read_source(source)
    conversion = convert(files.state, _kind(recognise(files)).table, expected_shapes(type(backbone), backbone.config))
    backbone.load_state_dict(conversion.tensors, strict=False)
    return conversion


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise SourceError(f"there is no kind {name}; there are {', '.join(KINDS)}")
    return KINDS[name]


def _labels(files: SourceFiles) -> tuple[dict[int, str], dict[str, int]]:
    """id2label and label2id of a detector source."""
    classes = class_names(files)
    return dict(enumerate(classes)), {label: index for index, label in enumerate(classes)}


def _placeholders(count: int) -> list[str]:
    """What transformers calls classes without names."""
    return [f"LABEL_{index}" for index in range(count)]


def _our_shapes(state: State, table: Table) -> dict[str, Shape]:
    """The source's shapes under our backbone's names, as far as the table goes (a split tensor by its first part)."""
    shapes: dict[str, Shape] = {}
    for source, tensor in state.items():
        for row in table:
            values = match(row.source, source) if isinstance(row, Rename | Split) else None
            if values is not None:
                target = row.targets[0] if isinstance(row, Split) else row.target
                shapes[expand(target, values).removeprefix("backbone.")] = tuple(tensor.shape)
                break
    return shapes


def _depth(shapes: Mapping[str, Shape]) -> int:
    return sum(match("layers.{i}.norm1.weight", name) is not None for name in shapes)


def _fits(preset: Preset, shapes: Mapping[str, Shape], family: str | None) -> bool:
    if preset.box_ap is None if family is None else preset.source_kind != family:
        return False
    config = ViTAdapterConfig(**preset.backbone)
    grid = (config.image_size // config.patch_size) ** 2
    return (
        shapes.get("embeddings.patch_embeddings.projection.bias") == (config.hidden_size,)
        and _depth(shapes) == config.num_hidden_layers
        and ("layers.0.mlp.gate_proj.weight" in shapes) == config.use_swiglu_ffn
        and (family is not None or shapes.get("embeddings.position_embeddings", (0, 0))[1] == 1 + grid)
    )


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return grouped
