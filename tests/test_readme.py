"""The README's promises: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from vit_adapter.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture
def workplace(tmp_path, monkeypatch, detector_folder) -> Path:
    """A folder like the repository's, with a small detector in place of the one that `make train` writes."""
    (tmp_path / "runs" / "sample").mkdir(parents=True)
    (tmp_path / "runs" / "sample" / "model").symlink_to(detector_folder)
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_of_the_readme_runs(code, workplace):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [command for command in SHELL if command.startswith("vit-adapter ")])
def test_commands_of_the_readme_are_understood(command):
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("command", [command for command in SHELL if command.startswith("accelerate launch ")])
def test_training_commands_of_the_readme_name_files_and_settings_that_exist(command):
    from vit_adapter.training.recipe import load_recipe

    _, _, script, recipe, *settings = shlex.split(command)
    assert (ROOT / script).is_file()
    load_recipe(str(ROOT / recipe), settings)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_recipe_is_in_the_readme():
    recipes = {path.stem for path in (ROOT / "training" / "recipes").glob("*.yaml")} - {"sample", "own_data"}
    assert {recipe for recipe in recipes if f"`{recipe}`" not in README} == set()
