"""The original's 14-to-16 script, value for value."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_adapter.conversion.convert_14to16 import convert_14to16, main, patches_14_to_16
from vit_adapter.conversion.source_files import SourceError

SCRIPT = Path(__file__).resolve().parents[2] / "conversion" / "convert_14to16.py"


@pytest.fixture
def before_and_after(reference_case):
    """The reference checkpoint and what the original's script made of it. What it passed on is filled with noise."""
    case = reference_case("convert_14to16")
    passed_on = {name: torch.randn(shape) for name, shape in case.facts["in"].items()}
    before = {name: case.tensors.get(f"in.{name}", passed_on[name]) for name in case.facts["in"]}
    after = {name: case.tensors.get(f"out.{name}", passed_on.get(name)) for name in case.facts["out"]}
    return before, after


def test_a_checkpoint_becomes_what_the_original_script_makes_of_it(before_and_after):
    before, after = before_and_after
    ours = patches_14_to_16(before)
    assert ours.keys() == after.keys()
    for name, tensor in after.items():
        if name == "patch_embed.proj.weight":
            torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(ours[name], tensor)


def test_the_file_is_written_beside_its_source(before_and_after, tmp_path):
    before, after = before_and_after
    torch.save(before, tmp_path / "dinov2_vits14_pretrain.pth")
    out = convert_14to16(tmp_path / "dinov2_vits14_pretrain.pth")
    assert out == tmp_path / "dinov2_vits14_pretrain_14to16.pth"
    assert torch.load(out, weights_only=True).keys() == after.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dinov2_vits14_pretrain.pth",
        "dinov2_vits14_pretrain_14to16.pth",
    ]


def test_the_script_runs_by_its_path(before_and_after, tmp_path):
    torch.save(before_and_after[0], tmp_path / "weights.pth")
    done = subprocess.run(
        [sys.executable, SCRIPT, "weights.pth"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "weights_14to16.pth").is_file()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("weights.bin", {}, r"called \.pth"),
        ("missing.pth", None, "no such file"),
        ("weights.pth", {"conv1.weight": torch.zeros(1)}, "no DINOv2 checkpoint"),
        (
            "weights.pth",
            {"blocks.0.ls1.gamma": torch.zeros(2), "patch_embed.proj.weight": torch.zeros(2, 3, 16, 16)},
            "14 x 14 pixels",
        ),
    ],
)
def test_another_file_is_refused_with_exit_code_2(tmp_path, capsys, name, content, sentence):
    if content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(SourceError, match=sentence):
        convert_14to16(tmp_path / name)
    assert main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
