"""The arrows of the house, read from the source: no folder and no module imports one above it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each folder and what it may import.
FOLDERS = {
    "configuration": set(),
    "kernels": set(),
    "modeling_vit_adapter": {"configuration", "kernels"},
    "conversion": {"modeling_vit_adapter", "configuration", "kernels"},
    "training": {"conversion", "modeling_vit_adapter", "configuration", "kernels"},
    "vit_adapter": {"training", "conversion", "modeling_vit_adapter", "configuration", "kernels"},
}

# Layers within modeling_vit_adapter: a module imports only from layers above its own line.
MODELING_LAYERS = [
    {"token_pyramid", "boxes", "masks", "image_reading", "resampling"},
    {"vision_transformer", "deformable_attention", "anchors", "matching", "roi_pooling", "feature_pyramid"},
    {"spatial_prior", "rpn", "box_head", "mask_head", "image_processing"},
    {"interaction"},
    {"backbone"},
    {"mask_rcnn"},
]

# What may travel to the Hub as custom code imports nothing else from outside (transformers demands what it finds).
TRAVELLERS = ("configuration", "modeling_vit_adapter", "kernels")
TRAVEL_PACKAGES = {"torch", "torchvision", "transformers", "numpy", "PIL", "huggingface_hub"}

STANDARD_LIBRARY = sys.stdlib_module_names
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[list[str], int]]:
    """Dotted name and line of everything a file imports, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield [*base, *(node.module.split(".") if node.module else []), alias.name], node.lineno


def imported(path: Path) -> Iterator[tuple[list[str], int]]:
    package = ["vit_adapter", path.parent.name] if path.parent.name != "vit_adapter" else ["vit_adapter"]
    return imports(ast.parse(path.read_text(encoding="utf-8")), package)


def upward_arrows(path: Path) -> list[str]:
    found = []
    for name, line in imported(path):
        if name[0] == "vit_adapter":
            target = name[1] if len(name) > 1 and name[1] in FOLDERS else "vit_adapter"
        elif name[0] in FOLDERS and name[0] != "kernels":  # `kernels` from outside is the PyPI package
            target = f"{name[0]} under a second name"
        else:
            continue
        if target != path.parent.name and target not in FOLDERS[path.parent.name]:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_downwards(path):
    assert upward_arrows(path) == []


def test_an_upward_arrow_hidden_in_a_function_is_found():
    tree = ast.parse("def f():\n    from ..training.data import load\n")
    assert list(imports(tree, ["vit_adapter", "kernels"])) == [(["vit_adapter", "training", "data", "load"], 2)]


def test_modules_of_the_model_import_only_from_lower_layers():
    layer_of = {name: layer for layer, names in enumerate(MODELING_LAYERS) for name in names}
    paths = [path for path in SOURCES if path.parent.name == "modeling_vit_adapter" and path.stem != "__init__"]
    assert {path.stem for path in paths} == set(layer_of)
    for path in paths:
        for name, line in imported(path):
            if name[:2] == ["vit_adapter", "modeling_vit_adapter"]:
                assert layer_of[name[2]] < layer_of[path.stem], f"{path.name}:{line} imports {name[2]}"


@pytest.mark.parametrize("folder", TRAVELLERS)
def test_custom_code_for_the_hub_demands_no_other_package(folder):
    # native.py builds the operator and stays at home; imports inside `try` are exempt in transformers as well.
    for path in sorted((ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            statement.lineno for node in ast.walk(tree) if isinstance(node, ast.Try) for statement in ast.walk(node)
            if isinstance(statement, ast.Import | ast.ImportFrom)
        }  # fmt: skip
        for name, line in imported(path):
            known = name[0] in TRAVEL_PACKAGES | {"vit_adapter"} or name[0] in STANDARD_LIBRARY
            assert known or line in guarded, f"{path.relative_to(ROOT)}:{line} imports {name[0]}"


def test_module_base_names_are_unique():
    names = [path.stem for path in SOURCES if not path.stem.startswith("__")]
    assert len(names) == len(set(names))


def test_kernels_is_a_namespace():
    # With an __init__.py it would hide the PyPI package `kernels` from transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_hides_a_library_when_its_folder_leads_the_path():
    assert not {"datasets", "evaluate", "transformers", "torch", "accelerate"} & {path.stem for path in SOURCES}
