"""ViT-Adapter and Mask R-CNN for transformers. Importing this package registers the auto classes."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "modeling_vit_adapter").is_dir():
    __path__.append(str(_root))  # a checkout: the sub-packages are the folders beside this one

from transformers import (  # noqa: E402
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
)

from .configuration.configuration_mask_rcnn import MaskRcnnConfig  # noqa: E402
from .configuration.configuration_vit_adapter import ViTAdapterConfig  # noqa: E402
from .modeling_vit_adapter.backbone import ViTAdapterBackbone  # noqa: E402
from .modeling_vit_adapter.image_processing import MaskRcnnImageProcessor  # noqa: E402
from .modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation  # noqa: E402

# The configurations register themselves with AutoConfig, where they are defined.
AutoBackbone.register(ViTAdapterConfig, ViTAdapterBackbone, exist_ok=True)
AutoModel.register(ViTAdapterConfig, ViTAdapterBackbone, exist_ok=True)
for _auto_model in (
    AutoModel,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForImageSegmentation,  # what pipeline("image-segmentation") tries for a path
):
    _auto_model.register(MaskRcnnConfig, MaskRcnnForInstanceSegmentation, exist_ok=True)
for _config in (ViTAdapterConfig, MaskRcnnConfig):
    AutoImageProcessor.register(
        _config, image_processor_classes={"torchvision": MaskRcnnImageProcessor}, exist_ok=True
    )

try:
    __version__ = version("vit-adapter")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "MaskRcnnConfig",
    "MaskRcnnForInstanceSegmentation",
    "MaskRcnnImageProcessor",
    "ViTAdapterBackbone",
    "ViTAdapterConfig",
]
