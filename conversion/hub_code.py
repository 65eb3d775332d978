"""A model folder that brings its own code: it loads with `trust_remote_code=True` where nothing of ours is installed.

transformers takes custom code from one flat folder. The modules that the model needs are copied there, found by
following their relative imports, which become `from .module import name`; `auto_map` in the configurations names the
classes.
"""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

from .hub import CARD, read_model_config
from .model_card import model_card
from .model_folder import new_folder, weight_files

PACKAGE = Path(__file__).resolve().parent.parent
PROCESSOR_FILE = "preprocessor_config.json"

BACKBONE_CLASSES = {
    "AutoConfig": "configuration.configuration_vit_adapter.ViTAdapterConfig",
    "AutoModel": "modeling_vit_adapter.backbone.ViTAdapterBackbone",
    "AutoBackbone": "modeling_vit_adapter.backbone.ViTAdapterBackbone",
}
_DETECTOR = "modeling_vit_adapter.mask_rcnn.MaskRcnnForInstanceSegmentation"
DETECTOR_CLASSES = {
    "AutoConfig": "configuration.configuration_mask_rcnn.MaskRcnnConfig",
    "AutoModel": _DETECTOR,
    "AutoModelForInstanceSegmentation": _DETECTOR,
    "AutoModelForObjectDetection": _DETECTOR,
    "AutoModelForImageSegmentation": _DETECTOR,  # what pipeline("image-segmentation") tries for a path
}
PROCESSOR_CLASSES = {"AutoImageProcessor": "modeling_vit_adapter.image_processing.MaskRcnnImageProcessor"}
"""Auto class → where its class is, below the package."""

_RELATIVE_IMPORT = re.compile(r"^(?P<indent>\s*)from\s+\.+(?:\w+\.)*(?P<module>\w+)\s+import\b", re.MULTILINE)


def export_hub_code(folder: str | Path, out: str | Path) -> None:
    """Copies a model folder to the new folder `out` and adds the code.

    Raises: ValueError: `folder` is no model folder of ours, or `out` exists.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    classes = BACKBONE_CLASSES if config.model_type == "vit_adapter" else DETECTOR_CLASSES
    with new_folder(Path(out)) as new:
        for path in [*weight_files(folder), *folder.glob("*.json")]:
            shutil.copyfile(path, new / path.name)
        if (folder / PROCESSOR_FILE).is_file():
            classes = {**classes, **PROCESSOR_CLASSES}
            _name_classes(new / PROCESSOR_FILE, PROCESSOR_CLASSES)
        _name_classes(new / "config.json", classes)
        modules = {place.rpartition(".")[0] for place in classes.values()}
        for name, source in flat_modules(modules).items():
            (new / f"{name}.py").write_text(source, encoding="utf-8")
        (new / CARD).write_text(model_card(config, Path(out).resolve().name, remote_code=True), encoding="utf-8")


def flat_modules(entries: set[str]) -> dict[str, str]:
    """The source of these modules and of all they import from this package, for one flat folder.

    entries: dotted names below the package.

    Raises: ValueError: two modules have the same last name, or an import is not of the form that transformers follows.
    """
    sources: dict[str, str] = {}
    todo = sorted(entries)
    while todo:
        module = todo.pop()
        if module not in sources:
            sources[module] = (PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
            todo += _imported(module, sources[module])
    flat: dict[str, str] = {}
    for module, source in sources.items():
        name = module.rpartition(".")[2]
        if name in flat:
            raise ValueError(f"two modules are called {name}, but custom code is one flat folder")
        flat[name] = _RELATIVE_IMPORT.sub(r"\g<indent>from .\g<module> import", source)
    return flat


def _imported(module: str, source: str) -> list[str]:
    """The modules of this package that a module imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None:
                raise ValueError(f"{module} says `from . import`, which transformers does not follow")
            found.append(".".join([*module.split(".")[: -node.level], node.module]))
    return found


def _name_classes(path: Path, classes: dict[str, str]) -> None:
    """Adds `auto_map` to a configuration: for each auto class the flat module and the class."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: ".".join(place.split(".")[-2:]) for auto, place in classes.items()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
