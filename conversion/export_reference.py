"""Back to the original's files: our detector as its `.pth`, our backbone as the output of its 14-to-16 script."""

from pathlib import Path
from typing import Any, NamedTuple

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..modeling_vit_adapter.backbone import ViTAdapterBackbone
from .detector import EMBEDDINGS, LAYER_SCALE, TRANSFORMER, expected_shapes, state_to_reference
from .hub import read_model_config
from .mapping import revert
from .model_card import labels_of
from .model_folder import read_weights, write_checkpoint

VIT_MODULES = ("embeddings.", "layers.")


class LeftBehind(NamedTuple):
    """A tensor that the exported file lacks, and why."""

    name: str
    reason: str


def export_reference(folder: str | Path, out: str | Path) -> list[LeftBehind]:
    """Writes the model in `folder` as `out`, a `.pth` of the original's form, bit-equal for every tensor it holds.

    A detector becomes mmdetection's checkpoint (`meta` with the class names, `state_dict`). A backbone becomes a plain
    state dict of its ViT, as after the original's 14-to-16 script, without what the model never took over.

    Raises: CoverageError: a tensor of the model is missing or has no counterpart.
    """
    folder, out = Path(folder), Path(out)
    config = read_model_config(folder)
    state = read_weights(folder)
    checkpoint: dict[str, Any]
    left: list[LeftBehind] = []
    if isinstance(config, MaskRcnnConfig):
        checkpoint = {"meta": {"CLASSES": tuple(labels_of(config))}, "state_dict": state_to_reference(state, config)}
    else:
        shapes = expected_shapes(ViTAdapterBackbone, config)
        vit = {name: shape for name, shape in shapes.items() if name.startswith(VIT_MODULES)}
        taken = {name: tensor for name, tensor in state.items() if name.startswith(VIT_MODULES)}
        checkpoint = revert(taken, EMBEDDINGS + LAYER_SCALE + TRANSFORMER, vit)
        dropped = (getattr(config, "provenance", None) or {}).get("dropped", {})
        left += [LeftBehind(name, reason) for reason, names in dropped.items() for name in names]
        left += [LeftBehind(name, "the adapter's own") for name in state if name not in taken]
    write_checkpoint(out, checkpoint)
    return left
