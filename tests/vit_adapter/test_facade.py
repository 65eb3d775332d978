"""What `import vit_adapter` does, however it is installed, and what its archives hold."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoImageProcessor, pipeline

from vit_adapter import MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configuration", "modeling_vit_adapter", "conversion", "kernels", "training")
TRY_IT = (
    "import vit_adapter, vit_adapter.training.recipe, vit_adapter.kernels.native as native; "
    "print(vit_adapter.__version__, native._csrc().is_dir(), vit_adapter.ViTAdapterConfig.__module__)"
)


def run_without_site(paths: list[Path], folder: Path) -> str:
    """What `TRY_IT` prints where only these paths and the other packages are known, not the editable install."""
    search = os.pathsep.join(map(str, [*paths, sysconfig.get_path("purelib")]))
    environment = {**os.environ, "PYTHONPATH": search}
    command = [sys.executable, "-S", "-c", TRY_IT]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def build(hook: str, out: Path) -> Path:
    """An archive of the checkout, by the build backend's hook."""
    command = [
        sys.executable,
        "-c",
        f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})",
    ]  # fmt: skip
    subprocess.run(command, cwd=checkout_copy(out / "checkout"), check=True, capture_output=True)
    (archive,) = [path for path in out.iterdir() if path.is_file()]
    return archive


def checkout_copy(folder: Path) -> Path:
    """The files of the checkout, so that building leaves nothing in it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/reference/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


def test_configurations_are_registered_by_their_type(detector_folder):
    assert AutoConfig.from_pretrained(detector_folder).model_type == "mask_rcnn"
    assert type(AutoImageProcessor.from_pretrained(detector_folder)).__name__ == "MaskRcnnImageProcessor"


@pytest.mark.parametrize("task", ["image-segmentation", "object-detection"])
def test_pipelines_take_a_folder_or_a_loaded_model(task, detector_folder, sample_coco):
    picture = str(min((sample_coco / "val2017").glob("*.jpg")))
    model = MaskRcnnForInstanceSegmentation.from_pretrained(detector_folder)
    processor = MaskRcnnImageProcessor.from_pretrained(detector_folder)
    from_folder = pipeline(task, model=str(detector_folder))(picture, threshold=0.0)
    from_model = pipeline(task, model=model, image_processor=processor)(picture, threshold=0.0)
    assert from_folder and [found["label"] for found in from_folder] == [found["label"] for found in from_model]


def test_the_checkout_works_from_its_root_without_installation(tmp_path):
    assert run_without_site([ROOT], tmp_path).split()[1:] == [
        "True",
        "vit_adapter.configuration.configuration_vit_adapter",
    ]


def test_the_bare_folder_names_are_refused():
    command = [sys.executable, "-c", "import configuration"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "import vit_adapter.configuration instead" in result.stderr


def test_the_wheel_holds_everything_that_runs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                assert f"vit_adapter/{path.relative_to(ROOT).as_posix()}" in held, path
    assert {"vit_adapter/py.typed", "vit_adapter/cli.py"} <= held


def test_an_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    version, has_sources, _ = run_without_site([tmp_path / "site"], tmp_path).split()
    assert (version, has_sources) == ("0.1.0", "True")


def test_the_source_archive_holds_tests_and_papers(tmp_path):
    archive = build("build_sdist", tmp_path)
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    expected = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "tests/conftest.py"}
    assert expected | {f"{folder}/__init__.py" for folder in FOLDERS if folder != "kernels"} <= held
