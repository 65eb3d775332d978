"""The detector that a recipe starts from, and the image processor that goes with it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from vit_adapter.configuration.configuration_mask_rcnn import MaskRcnnConfig
from vit_adapter.configuration.configuration_vit_adapter import ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS, Preset
from vit_adapter.conversion.convert import load_backbone
from vit_adapter.modeling_vit_adapter.backbone import ViTAdapterBackbone
from vit_adapter.modeling_vit_adapter.image_processing import MaskRcnnImageProcessor
from vit_adapter.modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from vit_adapter.training.recipe import Recipe

FOUR_LEVELS = [1, 2, 3, 4]
WHITE = 255


class StartingPoint(NamedTuple):
    """What training begins with.

    Attributes:
        model: The detector, with the data's classes.
        processor: How its pictures are prepared at test time.
        mean, std: (3,) normalisation of RGB in 0 to 255 in training.
    """

    model: MaskRcnnForInstanceSegmentation
    processor: MaskRcnnImageProcessor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def starting_point(recipe: Recipe, categories: Mapping[int, str]) -> StartingPoint:
    """Builds or loads the detector of a recipe.

    Args:
        categories: Name by category id, ids ascending: the classes to learn.

    Raises:
        ValueError: weights are missing or damaged, or belong to other classes or another architecture.
    """
    id2label = dict(enumerate(categories.values()))
    torch.manual_seed(recipe.seed)
    if recipe.model is not None:
        model, processor = _trained(recipe.model, id2label, replace_classes=recipe.replace_classes)
    else:
        model, processor = _from_preset(PRESETS[str(recipe.preset)], recipe, id2label)
    processor.size = {"shortest_edge": recipe.eval_short_side, "longest_edge": recipe.eval_long_side}
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return StartingPoint(
        model=model,
        processor=processor,
        mean=tuple(recipe.image_mean or [WHITE * value for value in processor.image_mean]),
        std=tuple(recipe.image_std or [WHITE * value for value in processor.image_std]),
    )


def _from_preset(
    preset: Preset, recipe: Recipe, id2label: dict[int, str]
) -> tuple[MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor]:
    backbone = _known("backbone", {**preset.backbone, **recipe.backbone}, ViTAdapterConfig)
    detector = _known("detector", {**preset.detector, **recipe.detector}, MaskRcnnConfig)
    arguments: dict[str, Any] = {**detector, **_classes(id2label)}
    try:
        config = MaskRcnnConfig(
            backbone_config=ViTAdapterConfig(**backbone | {"out_indices": FOUR_LEVELS}), **arguments
        )
    except StrictDataclassError as error:
        raise ValueError(f"backbone, detector: {error.__cause__}") from error
    model = MaskRcnnForInstanceSegmentation(config)
    if recipe.backbone_weights is not None:
        _fill(cast(ViTAdapterBackbone, model.backbone), recipe.backbone_weights, preset)
    processor = MaskRcnnImageProcessor(
        image_mean=[value / WHITE for value in preset.image_mean],
        image_std=[value / WHITE for value in preset.image_std],
    )
    return model, processor


def _fill(backbone: ViTAdapterBackbone, path: Path, preset: Preset) -> None:
    """Fills the ViT of a backbone; what the file does not hold, the adapter, keeps its initialisation."""
    if not path.exists():
        name = f" ({preset.source})" if preset.source else ""
        raise ValueError(
            f"{path}: the pre-trained weights{name} are not there: download them, or give another --backbone_weights"
        )
    load_backbone(backbone, path)


def _trained(
    folder: Path, id2label: dict[int, str], *, replace_classes: bool
) -> tuple[MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a model folder, there is no config.json in it")
    config = MaskRcnnConfig.from_pretrained(folder)
    known = dict(config.id2label or {})
    if known != id2label and not replace_classes:
        raise ValueError(
            f"{folder}: the model has {len(known)} classes ({_shown(known)}), but the data has "
            f"{len(id2label)} ({_shown(id2label)}): add --replace_classes true to give it new class layers"
        )
    for name, value in _classes(id2label).items():
        setattr(config, name, value)
    try:
        model = MaskRcnnForInstanceSegmentation.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=replace_classes
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error})") from error
    return model, MaskRcnnImageProcessor.from_pretrained(folder)


def _known(what: str, given: Mapping[str, Any], kind: type) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(f"{what}: {kind.__name__} has no field {unknown[0]!r}")
    return dict(given)


def _classes(id2label: dict[int, str]) -> dict[str, Any]:
    return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}


def _shown(id2label: Mapping[Any, str]) -> str:
    names = list(id2label.values())
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
