"""From a source of weights to a `from_pretrained` folder: recognise, choose the model, convert, write, verify.

A backbone source becomes a backbone folder with the converted tensors only; the adapter's are listed as new in
`config.provenance`, and `from_pretrained` initialises them. A detector source becomes a complete detector folder.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from ..configuration.presets import PRESETS
from ..modeling_vit_adapter.backbone import ViTAdapterBackbone
from ..modeling_vit_adapter.image_processing import MaskRcnnImageProcessor
from ..modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from .detector import DETECTOR, backbone_config_from_reference, config_from_reference, expected_shapes
from .mapping import Conversion, convert
from .model_card import labels_of, model_card
from .model_folder import MAX_SHARD_BYTES, new_folder, refuse_existing, verify_weights, write_model_folder
from .source_files import SourceError, read_source
from .source_kinds import choose_preset, kind_of, labels_in, placeholder_labels, preset_config, recognise


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
    refuse_existing(Path(out))
    files = read_source(source, revision)
    name = kind or recognise(files)
    table = kind_of(name).table
    if config is None:
        preset = preset or choose_preset(files, name)
        config = preset_config(preset, files, name)
    else:
        config = copy.deepcopy(config)
        labels = labels_of(config)
        if table is DETECTOR and labels == placeholder_labels(len(labels)):
            config.id2label, config.label2id = labels_in(files)
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


def read_config(path: str | Path) -> ViTAdapterConfig | MaskRcnnConfig:
    """A configuration from a JSON file: one of ours, or the original's resolved one (whole, or its `model` part).

    Raises: SourceError: the file is missing, no such configuration, or one that our model cannot express.
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
    try:
        return readers[kind](content)
    except (StrictDataclassError, ValueError) as error:
        raise SourceError(f"{path}: {' '.join(str(error).split())}") from error


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
        "resized": _by_reason(conversion.resized),
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
    conversion = convert(
        files.state, kind_of(recognise(files)).table, expected_shapes(type(backbone), backbone.config)
    )
    backbone.load_state_dict(conversion.tensors, strict=False)
    return conversion


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return grouped
