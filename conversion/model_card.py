"""The model card of a converted model: where it comes from, what was published about it, how to use it."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.presets import PRESETS

RELEASE = "https://github.com/czczup/ViT-Adapter/tree/main/detection"
SCHEDULES = {"1x": "12 epochs at one scale", "3x": "36 epochs with multi-scale crops"}

BASE_MODELS = {
    "deit-tiny": "facebook/deit-tiny-patch16-224",
    "deit-small": "facebook/deit-small-patch16-224",
    "deit-base": "facebook/deit-base-patch16-224",
    "augreg-large": "timm/vit_large_patch16_384.augreg_in21k_ft_in1k",
    "dinov2-small": "facebook/dinov2-small",
    "dinov2-base": "facebook/dinov2-base",
    "dinov2-large": "facebook/dinov2-large",
    "dinov2-giant": "facebook/dinov2-giant",
}
"""Preset (of either schedule) → the pre-trained ViT's page on the Hub."""

MIXED_NORMALISATION = (
    "The published configuration of this row trains with mean and deviation 127.5 on every channel, but its test "
    "pipeline inherits the ImageNet values. The preprocessor of this folder has those of the test, by which the "
    "published accuracy was presumably measured; fine-tuning as published takes 127.5."
)

DETECTOR_USAGE = """\
import torch
{import_line}from PIL import Image
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

processor = AutoImageProcessor.from_pretrained("{name}"{trust})
model = AutoModelForInstanceSegmentation.from_pretrained("{name}"{trust}).eval()
picture = Image.open("picture.jpg")
with torch.no_grad():
    outputs = model(**processor(picture, return_tensors="pt"))
(found,) = processor.post_process_instance_segmentation(
    outputs, threshold=0.5, target_sizes=[(picture.height, picture.width)]
)
for segment in found["segments_info"]:
    mask = found["segmentation"] == segment["id"]
    print(model.config.id2label[segment["label_id"]], segment["score"], int(mask.sum()), "pixels")
"""

BACKBONE_USAGE = """\
from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, ViTAdapterConfig

config = MaskRcnnConfig(backbone_config=ViTAdapterConfig.from_pretrained("{name}"))
model = MaskRcnnForInstanceSegmentation.from_pretrained("{name}", config=config)
"""

CITATION = """\
@inproceedings{chen2023vitadapter,
  title={Vision Transformer Adapter for Dense Predictions},
  author={Chen, Zhe and Duan, Yuchen and Wang, Wenhai and He, Junjun and Lu, Tong and Dai, Jifeng and Qiao, Yu},
  booktitle={ICLR},
  year={2023}
}
"""


def labels_of(config: PreTrainedConfig) -> list[str]:
    """The class names of a model, in the order of their indices."""
    labels = {int(index): label for index, label in (config.id2label or {}).items()}
    return [labels[index] for index in sorted(labels)]


def published_name(preset: str) -> str:
    """The stem of the file in which the original release published a preset's detector."""
    family, size = preset.removesuffix("-1x").split("-")
    return f"mask_rcnn_{family}_adapter_{size}_fpn_{_schedule(preset)}_coco"


def is_published(config: PreTrainedConfig) -> bool:
    """Whether a detector comes from a file of the published name and shapes: only then is its accuracy known."""
    origin = getattr(config, "provenance", None) or {}
    preset = origin.get("preset") or ""
    if not isinstance(config, MaskRcnnConfig) or preset not in PRESETS or PRESETS[preset].box_ap is None:
        return False
    return re.match(published_name(preset) + r"\b", origin["source"]) is not None


def model_card(config: PreTrainedConfig, name: str, remote_code: bool = False) -> str:
    """README.md of a model folder.

    name: how the snippet names the model, a folder or a Hub id. remote_code: whether the folder brings its own code.
    """
    origin = getattr(config, "provenance", None) or {}
    parts = [
        f"---\n{_metadata(config, origin, name).to_yaml()}\n---\n",
        _title(config, origin, name),
        "## Use\n\n```python\n" + _usage(config, name, remote_code) + "```\n",
        _accuracy(config, origin),
        _origin(origin),
        f"## Citation\n\n```bibtex\n{CITATION}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _metadata(config: PreTrainedConfig, origin: dict[str, Any], name: str) -> ModelCardData:
    detector = isinstance(config, MaskRcnnConfig)
    preset = origin.get("preset") or ""
    published = is_published(config)
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-segmentation" if detector else "image-feature-extraction",
        tags=["vit-adapter", *(["mask-rcnn", "instance-segmentation", "object-detection"] if detector else [])],
        datasets=["detection-datasets/coco"] if published else None,
        base_model=BASE_MODELS.get(preset.removesuffix("-1x")),
        model_name=name.split("/")[-1] if published else None,
        eval_results=_eval_results(preset) if published else None,
    )


def _eval_results(preset: str) -> list[EvalResult]:
    values = {
        "object-detection": ("box AP", PRESETS[preset].box_ap),
        "instance-segmentation": ("mask AP", PRESETS[preset].mask_ap),
    }
    return [
        EvalResult(
            task_type=task,
            dataset_type="detection-datasets/coco",
            dataset_name="COCO 2017",
            dataset_split="val",
            metric_type="mAP",
            metric_name=metric,
            metric_value=value,
            source_name="reported by the authors of ViT-Adapter",
            source_url=RELEASE,
        )
        for task, (metric, value) in values.items()
    ]


def _title(config: PreTrainedConfig, origin: dict[str, Any], name: str) -> str:
    if isinstance(config, MaskRcnnConfig):
        what = (
            f"Instance segmentation by Mask R-CNN with a ViT-Adapter backbone ({len(labels_of(config))} classes). "
            "All weights are there."
        )
    else:
        what = (
            "A pre-trained ViT in the form of a ViT-Adapter backbone. Only the ViT's weights are there: the adapter's "
            "are new and are initialised when the model is loaded, so train it before use."
        )
    return f"# {name}\n\n{what}\n"


def _usage(config: PreTrainedConfig, name: str, remote_code: bool) -> str:
    if not isinstance(config, MaskRcnnConfig):
        return BACKBONE_USAGE.format(name=name)
    return DETECTOR_USAGE.format(
        name=name,
        trust=", trust_remote_code=True" if remote_code else "",
        import_line="" if remote_code else "import vit_adapter  # registers the classes with transformers\n",
    )


def _accuracy(config: PreTrainedConfig, origin: dict[str, Any]) -> str:
    if not isinstance(config, MaskRcnnConfig):
        return ""
    if not is_published(config):
        return "## Accuracy\n\nThe source is none of the published files by name, so nothing is claimed here.\n"
    preset = origin["preset"]
    schedule = _schedule(preset)
    return (
        f"## Accuracy\n\nThe source is `{published_name(preset)}`, trained for {SCHEDULES[schedule]} ({schedule}). On "
        f"COCO val2017 its authors [report]({RELEASE}) {PRESETS[preset].box_ap} box AP and {PRESETS[preset].mask_ap} "
        "mask AP; these are their numbers and were not measured again for this card.\n"
        + (f"\n{MIXED_NORMALISATION}\n" if preset == "dinov2-large" else "")
    )


def _origin(origin: dict[str, Any]) -> str:
    if not origin:
        return ""
    lines = [
        "## Origin\n",
        f"Converted by {origin['converter']} from `{origin['source']}` (kind {origin['kind']}):\n",
        "| file | bytes | sha256 |\n|---|---|---|",
        *(f"| {file} | {facts['bytes']} | {facts['sha256']} |" for file, facts in sorted(origin["files"].items())),
        "",
        "Every tensor of the source is used or dropped for a written reason, every tensor of the model is filled or "
        "listed as new; after writing, every tensor was read back and compared bit for bit with what was converted.",
    ]
    for verb in ("resized", "dropped", "filled", "new"):
        for reason, names in sorted(origin[verb].items()):
            shown = ", ".join(f"`{name}`" for name in names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            lines.append(f"\n- {verb}, {len(names)}: {shown}: {reason}.")
    return "\n".join(lines) + "\n"


def _schedule(preset: str) -> str:
    return "1x" if preset.endswith("-1x") else "3x"
