"""ViT-Adapter and Mask R-CNN for transformers. Importing this package registers the auto classes."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "modeling_vit_adapter").is_dir():
    __path__.append(str(_root))  # a checkout: the sub-packages are the folders beside this one

try:
    __version__ = version("vit-adapter")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
