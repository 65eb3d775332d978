"""The commands as they are typed: what they say, and their exit codes."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, ViTAdapterBackbone, ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS
from vit_adapter.conversion.__main__ import add_commands, main

README = Path(__file__).resolve().parents[2] / "conversion" / "README.md"


@pytest.fixture
def deit_tiny(tmp_path, vit_state):
    """A file laid out as the published DeiT-T, named as it is."""
    file = tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    state = vit_state(192, 12, 14) | {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    torch.save({"model": state}, file)
    return file


def test_convert_recognises_converts_and_says_what_it_did(deit_tiny, tmp_path, capsys):
    assert main(["convert", str(deit_tiny), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for sentence in (
        "recognised as deit, converted as deit-tiny",
        "used 147 tensors of the source",
        "dropped 1: the published detectors keep neither class nor register tokens (cls_token)",
        "filled 24: the source has no layer scale",
        "every tensor read back and compared",
    ):
        assert sentence in said
    assert ViTAdapterConfig.from_pretrained(tmp_path / "out").hidden_size == 192


def test_convert_as_a_module_is_the_same(deit_tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vit_adapter.conversion", "convert", deit_tiny, "out", "--preset", "deit-tiny"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_broken_law_of_coverage_shows_the_table_and_exits_with_1(deit_tiny, tmp_path, capsys):
    checkpoint = torch.load(deit_tiny, weights_only=True)
    checkpoint["model"]["blocks.3.surprise"] = torch.zeros(2)
    torch.save(checkpoint, deit_tiny)
    assert main(["convert", str(deit_tiny), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "PROBLEM  blocks.3.surprise [2]: no row of the table names it" in said
    assert "used     blocks.11.norm2.bias -> layers.11.norm2.bias" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "missing.pth", "out"],
        ["convert", "{file}", "{folder}"],
        ["convert", "{file}", "out", "--config", "missing.json"],
        ["convert", "{file}", "out", "--config", "x.json", "--preset", "deit-tiny"],
        ["convert-14to16", "{file}"],
        ["export", "missing", "out"],
        ["push", "missing", "me/model"],
    ],
    ids=" ".join,
)
def test_input_at_fault_is_one_sentence_and_exit_code_2(deit_tiny, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([part.format(file=deit_tiny, folder=tmp_path) for part in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_unwritable_place_is_one_sentence(deit_tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    assert main(["convert", str(deit_tiny), str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


ON_A_FULL_DISK = """
import resource, sys
from vit_adapter.conversion.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond this fails, as on a full disk
sys.exit(max(main(words.split()) for words in sys.argv[1:]))
"""


def test_a_full_disk_is_one_sentence_and_nothing_is_left(tmp_path, deit_tiny, small_config, vit_state):
    torch.save(vit_state(48, 2, 37, patch=14, layer_scale="ls1.gamma"), tmp_path / "dinov2.pth")
    ViTAdapterBackbone(small_config()).save_pretrained(tmp_path / "backbone")
    before = sorted(tmp_path.iterdir())
    commands = [
        f"convert {deit_tiny.name} out",
        "convert-14to16 dinov2.pth",
        "export backbone back.pth --format reference",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, *commands], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    sentences = done.stderr.splitlines()
    assert len(sentences) == 3 and all(sentence.startswith("error: ") for sentence in sentences)
    assert sorted(tmp_path.iterdir()) == before


def test_the_originals_configuration_converts_a_detector_of_another_size(tmp_path, reference_case, capsys):
    case = reference_case("detector_inference")
    torch.save({"state_dict": case.weights, "meta": {"CLASSES": tuple("abcdefg")}}, tmp_path / "in.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model": case.facts["model_config"]}))
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "in.pth"), str(out), "--config", str(tmp_path / "config.json")]) == 0
    assert list(MaskRcnnConfig.from_pretrained(out).id2label.values()) == list("abcdefg")
    assert main(["export", str(out), str(tmp_path / "back.pth"), "--format", "reference"]) == 0
    assert main(["export", str(out), str(tmp_path / "code")]) == 0
    assert (tmp_path / "code" / "mask_rcnn.py").is_file()
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[name], tensor) for name, tensor in case.weights.items())
    capsys.readouterr()


def test_a_published_detector_of_full_size_loads_bit_for_bit(tmp_path, detector_state, capsys):
    file = tmp_path / "mask_rcnn_deit_adapter_tiny_fpn_1x_coco.pth.tar"
    state = detector_state("deit-tiny")
    torch.save({"meta": {"epoch": 12, "iter": 87960, "hook_msgs": {}}, "state_dict": state}, file)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    assert "converted as deit-tiny-1x" in capsys.readouterr().out
    model = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_068_512
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "41.1 box AP and 37.5 mask AP" in card
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "back.pth"), "--format", "reference"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def readme_lines() -> list[str]:
    return README.read_text(encoding="utf-8").splitlines()


def test_every_command_of_the_readme_parses():
    commands = [line.split("#")[0].split() for line in readme_lines() if line.startswith("vit-adapter ")]
    commands += [re.findall(r"`vit-adapter (.*?)`", line)[0].split() for line in readme_lines() if "| `vit-ad" in line]
    parsed = [words[1:] if words[0] == "vit-adapter" else words for words in commands]
    plain = [words for words in parsed if "[--preset" not in words]
    assert len(plain) >= 12
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    for words in plain:
        assert callable(parser.parse_args(words).run)


def test_the_readme_names_every_published_source():
    text = README.read_text(encoding="utf-8")
    sources = {preset.source for preset in PRESETS.values() if preset.source}
    for source in sources:
        assert source in text or source.startswith("L_16-i21k-300ep-")
