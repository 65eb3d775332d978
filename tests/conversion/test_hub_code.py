"""Model folders that bring their own code, loaded where nothing of ours is installed."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor, ViTAdapterBackbone
from vit_adapter.conversion.hub_code import DETECTOR_CLASSES, export_hub_code, flat_modules

STRANGER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForInstanceSegmentation, pipeline

try:
    import vit_adapter
    raise SystemExit("the package is there")
except ModuleNotFoundError:
    pass
detector, backbone = sys.argv[1:]
torch.set_num_threads(1)
picture = Image.new("RGB", (90, 64), (200, 30, 60))
config = AutoConfig.from_pretrained(detector, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(detector, trust_remote_code=True)
sums = []
for auto_class in (AutoModel, AutoModelForInstanceSegmentation):
    model = auto_class.from_pretrained(detector, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    sums.append(outputs.scores.double().sum().item())
found = {
    task: len(pipeline(task, model=detector, trust_remote_code=True)(picture, threshold=0.0))
    for task in ("image-segmentation", "object-detection")
}
body = AutoModel.from_pretrained(backbone, trust_remote_code=True)
ours = sorted(name for name in sys.modules if name.split(".")[0] == "vit_adapter")
print(json.dumps({"sums": sums, "found": found, "backbone": type(body).__name__, "ours": ours}))
"""


@pytest.fixture
def folders(tmp_path, small_config) -> tuple[Path, Path]:
    """A detector's and a backbone's model folder, small and random."""
    torch.manual_seed(0)
    config = MaskRcnnConfig(
        backbone_config=small_config(),
        num_labels=3,
        fpn_channels=16,
        rpn_channels=16,
        box_head_dim=32,
        mask_channels=16,
        rpn_post_nms_top_n_test=20,
        detections_per_image=5,
        score_threshold=0.0,
    )
    MaskRcnnForInstanceSegmentation(config).save_pretrained(tmp_path / "detector")
    size = {"shortest_edge": 64, "longest_edge": 96}
    MaskRcnnImageProcessor(size=size).save_pretrained(tmp_path / "detector")
    ViTAdapterBackbone(small_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "detector", tmp_path / "backbone"


@pytest.fixture
def without_the_package(tmp_path) -> dict[str, str]:
    """An environment with every installed package but ours."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "vit_adapter" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PYTHONPATH": str(packages),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }


def test_the_folder_loads_where_the_package_is_not_installed(folders, without_the_package, tmp_path):
    exported = [tmp_path / f"{folder.name}_code" for folder in folders]
    for folder, out in zip(folders, exported, strict=True):
        export_hub_code(folder, out)
    done = subprocess.run(  # -S: without the site-packages of this interpreter
        [sys.executable, "-S", "-c", STRANGER, *exported],
        env=without_the_package,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    model = MaskRcnnForInstanceSegmentation.from_pretrained(folders[0]).eval()
    picture = torch.zeros(64, 90, 3, dtype=torch.uint8) + torch.tensor([200, 30, 60], dtype=torch.uint8)
    inputs = MaskRcnnImageProcessor.from_pretrained(folders[0])(picture.numpy(), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).scores.double().sum().item()
    assert said["sums"] == pytest.approx([expected] * 2, rel=1e-5)  # another number of threads, another order of sums
    assert said["found"]["object-detection"] > 0
    assert said["backbone"] == "ViTAdapterBackbone"
    assert said["ours"] == []


def test_the_code_is_one_flat_folder_that_names_no_package_of_ours(folders, tmp_path):
    export_hub_code(folders[0], tmp_path / "out")
    modules = {path.stem for path in (tmp_path / "out").glob("*.py")}
    assert {"mask_rcnn", "backbone", "configuration_mask_rcnn", "image_processing", "ms_deform_attn"} <= modules
    for path in (tmp_path / "out").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module in modules) == (1, True)
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("vit_adapter")


def test_the_configuration_names_a_class_for_every_auto_class(folders, tmp_path):
    export_hub_code(folders[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"].keys() == {*DETECTOR_CLASSES, "AutoImageProcessor"}
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing.MaskRcnnImageProcessor"}
    for place in config["auto_map"].values():
        module, name = place.split(".")
        tree = ast.parse((tmp_path / "out" / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_source_folder_is_left_alone(folders, tmp_path):
    before = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    export_hub_code(folders[0], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == before


def test_modules_are_followed_through_imports_inside_functions(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "entry.py").write_text("def f():\n    from ..two.leaf import g\n    return g\n")
    (tmp_path / "two" / "leaf.py").write_text("def g(): pass\n")
    monkeypatch.setattr("vit_adapter.conversion.hub_code.PACKAGE", tmp_path)
    assert flat_modules({"one.entry"}) == {
        "entry": "def f():\n    from .leaf import g\n    return g\n",
        "leaf": "def g(): pass\n",
    }


def test_two_modules_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "same.py").write_text("from ..two.same import g\n")
    (tmp_path / "two" / "same.py").write_text("g = 1\n")
    monkeypatch.setattr("vit_adapter.conversion.hub_code.PACKAGE", tmp_path)
    with pytest.raises(ValueError, match="two modules are called same"):
        flat_modules({"one.same"})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "bert"}'])
def test_another_folder_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"vit_adapter or mask_rcnn|no model folder"):
        export_hub_code(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
