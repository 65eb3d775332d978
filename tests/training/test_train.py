"""Whole runs of a very small detector: what they write, how they stop and go on, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vit_adapter import MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor
from vit_adapter.training.recipe import load_recipe
from vit_adapter.training.train import main, train
from vit_adapter.training.training_run import StopRequested, TrainingRun

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "training" / "sample_coco"

SMALL = {
    "extends": str(ROOT / "training" / "recipes" / "sample.yaml"),
    "backbone": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "deformable_num_heads": 2,
        "spatial_prior_channels": 8,
        "drop_path_rate": 0.2,
    },
    "detector": {
        "fpn_channels": 16,
        "rpn_channels": 16,
        "box_head_dim": 16,
        "mask_channels": 8,
        "rpn_post_nms_top_n_test": 20,
    },
    "augmentation": [{"flip": None}, {"resize": {"short_sides": [64, 96], "long_side": 128}}],
    "eval_short_side": 64,
    "eval_long_side": 128,
    "total_batch_size": 2,
    "batch_size": 1,
    "max_steps": 4,
    "warmup_steps": 2,
    "evaluate_on_train": False,
    "val_annotations": None,
    "val_images": None,
    "log_every_steps": 1,
    "overwrite": False,
    "draw_pictures": 2,
    "cpu_threads": 1,
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe; the file's path."""

    def write_recipe(**settings):
        path = tmp_path / "small.yaml"
        folders = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
        path.write_text(yaml.safe_dump({**SMALL, **folders, **settings}))
        return path

    return write_recipe


@pytest.fixture
def data(tmp_path):
    """A copy of the sample's training part, to spoil."""
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE / "train2017", folder / "train2017")
    shutil.copy(SAMPLE / "annotations" / "instances_train2017.json", folder / "annotations.json")
    return folder


def settings_for(data):
    return {"train_annotations": str(data / "annotations.json"), "train_images": str(data / "train2017")}


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_run_writes_model_metrics_and_pictures(tmp_path, write):
    path = write(
        evaluate_on_train=True,
        val_annotations=str(SAMPLE / "annotations" / "instances_val2017.json"),
        val_images=str(SAMPLE / "val2017"),
    )
    metrics = train(load_recipe(path))
    run = tmp_path / "run"
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 4
    assert metrics["last_loss"] > 0
    assert set(metrics["evaluation"]) == {"train", "val"}
    assert metrics["evaluation"]["train"]["mask"]["AP50"] >= 0
    steps = [line["step"] for line in lines(run) if "loss" in line]
    assert steps == [1, 2, 3, 4]
    # The warm-up reaches the full rate after two steps.
    assert [line["learning_rate"] for line in lines(run)[:3]] == pytest.approx([5e-7, 2.5025e-4, 5e-4])
    for picture in [run / "loss_curve.png", *(run / "predictions").glob("*/*.png")]:
        with Image.open(picture) as image:
            image.load()
    assert len(list((run / "predictions").glob("*/*.png"))) == 4

    model = MaskRcnnForInstanceSegmentation.from_pretrained(run / "model").eval()
    processor = MaskRcnnImageProcessor.from_pretrained(run / "model")
    assert model.config.id2label[0] == "person"
    inputs = processor(next(iter((SAMPLE / "val2017").glob("*.jpg"))), return_tensors="pt")
    assert inputs["pixel_values"].shape[2] in (64, 96, 128)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).scores).all()
    card = (run / "model" / "README.md").read_text()
    assert "recipe `small`" in card and "Only the training pictures" in card


@pytest.mark.parametrize("stop_after", [3, 7])
def test_stopping_and_going_on_changes_no_bit(tmp_path, write, monkeypatch, stop_after):
    through = load_recipe(write(max_steps=9, evaluate_every_epochs=1), ["--output_dir", str(tmp_path / "through")])
    train(through)

    stopped = load_recipe(write(max_steps=9), ["--output_dir", str(tmp_path / "stopped")])
    take_step = TrainingRun.take_step

    def take_step_and_ask(run, step):
        run.stop_requested = step == stop_after - 1
        return take_step(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "take_step", take_step_and_ask)
        with pytest.raises(StopRequested, match=f"stopped after step {stop_after} of 9"):
            train(stopped)
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    # What a crash after the checkpoint would leave behind is done again.
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": stop_after + 1, "loss": 0.0}) + "\n")
    train(stopped)

    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("through", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert lines(tmp_path / "through") == lines(tmp_path / "stopped")


def test_frozen_batch_norms_keep_their_statistics(tmp_path, write):
    path = write(max_steps=9)  # an epoch has seven steps
    for name, epoch in (("free", "null"), ("second", "1"), ("first", "0")):
        train(load_recipe(path, ["--output_dir", str(tmp_path / name), "--freeze_batch_norm_epoch", epoch]))
    seen = {
        name: load_file(tmp_path / name / "model" / "model.safetensors")["backbone.norms.0.num_batches_tracked"].item()
        for name in ("free", "second", "first")
    }
    assert seen == {"free": 2 * 9, "second": 2 * 7, "first": 0}


def test_a_finished_run_is_not_overwritten_unasked(write, capsys):
    path = str(write(max_steps=1))
    assert main([path]) == 0
    assert main([path]) == 2
    assert "there is a finished run" in capsys.readouterr().err
    assert main([path, "--overwrite", "true"]) == 0


def test_an_unfinished_run_of_other_settings_is_not_continued(tmp_path, write, capsys):
    path = str(write(max_steps=1))
    assert main([path]) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert main([path, "--weight_decay", "0.1"]) == 2
    assert "unfinished run with other settings (weight_decay 0.05 -> 0.1)" in capsys.readouterr().err


def refused(capsys, path, *overrides):
    """The sentence with which a run is refused."""
    capsys.readouterr()
    assert main([str(path), *overrides]) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert "Traceback" not in error
    return sentences[0]


def test_wrong_input_is_refused_before_anything_is_written(tmp_path, write, data, capsys):
    path = write(**settings_for(data))
    assert "there is no such recipe" in refused(capsys, tmp_path / "none.yaml")
    assert "did you mean num_epochs" in refused(capsys, path, "--num_epoch", "3")
    assert "a number was expected" in refused(capsys, path, "--learning_rate", "high")
    assert "there is no such annotation file" in refused(capsys, path, "--train_annotations", "none.json")
    assert "there is no such folder" in refused(capsys, path, "--train_images", "none")
    assert "ViTAdapterConfig has no field 'depth'" in refused(capsys, path, "--backbone", "{depth: 3}")
    assert "does not divide hidden_size" in refused(capsys, path, "--backbone", "{num_attention_heads: 5}")
    assert "are not there: download them" in refused(capsys, path, "--backbone_weights", "none.pth")
    assert "not a model folder" in refused(capsys, path, "--model", str(tmp_path), "--preset", "null")
    assert "is no multiple" in refused(capsys, path, "--total_batch_size", "3", "--batch_size", "2")
    (data / "train2017" / "000000051191.jpg").unlink()
    assert "1 of 13 pictures" in refused(capsys, path)
    (data / "annotations.json").write_text("[1, 2]")
    assert "not COCO" in refused(capsys, path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_picture_is_named(write, data, capsys, num_workers):
    for picture in (data / "train2017").glob("*.jpg"):
        picture.write_bytes(picture.read_bytes()[:3000])
    sentence = refused(capsys, write(**settings_for(data), num_workers=num_workers))
    assert sentence.startswith(f"error: {data / 'train2017'}")
    assert "cannot be read whole" in sentence


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(tmp_path, write, capsys):
    sentence = refused(capsys, write(image_std=[1e-40] * 3))
    assert "of step 0 is not finite, on the pictures" in sentence
    assert not (tmp_path / "run" / "model").exists()


def test_a_detector_of_other_classes_needs_new_class_layers(tmp_path, write, data, capsys):
    assert main([str(write(max_steps=1))]) == 0
    content = json.loads((data / "annotations.json").read_text())
    content["categories"] = [entry for entry in content["categories"] if entry["id"] == 1]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 1]
    (data / "annotations.json").write_text(json.dumps(content))
    changed = write(
        **settings_for(data),
        preset=None,
        backbone={},
        detector={},
        model=str(tmp_path / "run" / "model"),
        max_steps=1,
        output_dir=str(tmp_path / "second"),
    )
    sentence = refused(capsys, changed)
    assert "the model has 80 classes (person, bicycle, car, …), but the data has 1 (person)" in sentence
    assert main([str(changed), "--replace_classes", "true"]) == 0
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "second"))
    assert after["box_head.class_scores.weight"].shape == (2, 16)
    assert after["mask_head.mask_logits.weight"].shape[0] == 1
    # The warm-up's first step moves a weight by about a thousandth of the rate.
    torch.testing.assert_close(after["box_head.fc1.weight"], before["box_head.fc1.weight"], atol=2e-6, rtol=0)


def test_pre_trained_weights_fill_the_backbone(tmp_path, write):
    settings = {"max_steps": 1, "seed": 1}
    assert main([str(write(**settings))]) == 0
    trained = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path / "run" / "model").backbone
    trained.save_pretrained(tmp_path / "backbone")
    second = {"seed": 2, "backbone_weights": str(tmp_path / "backbone"), "output_dir": str(tmp_path / "second")}
    assert main([str(write(**settings | second))]) == 0
    found = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path / "second" / "model").backbone
    # The warm-up's first step moves a weight by about a thousandth of the rate.
    assert found.layers[0].mlp.fc1.weight.std() > 1e-3
    torch.testing.assert_close(found.layers[0].mlp.fc1.weight, trained.layers[0].mlp.fc1.weight, atol=2e-6, rtol=0)


def test_usage_is_shown(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "learning_rate, weight_decay" in capsys.readouterr().out


def test_an_installation_that_is_missing_is_said_in_a_sentence():
    without_packages = [sys.executable, "-S", str(ROOT / "training" / "train.py"), "recipe.yaml"]
    done = subprocess.run(without_packages, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "vit_adapter is not installed: run `pip install -e .` in the repository's folder\n"


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def test_two_processes_share_a_run(tmp_path, write):
    arguments = {"evaluate_on_train": True, "backbone": {**SMALL["backbone"], "drop_path_rate": 0.0}}
    path = write(**arguments, max_steps=2, output_dir=str(tmp_path / "two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "training" / "train.py"), str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train(load_recipe(path, ["--output_dir", str(tmp_path / "one")]))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    # The same two pictures and weights; only the sampled anchors and proposals differ.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.05)


def test_sigterm_saves_and_ends_the_run_cleanly(tmp_path, write):
    path = write(max_steps=None, num_epochs=100000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training" / "train.py"), str(path)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert "the same command goes on from there" in error
    assert (tmp_path / "run" / "checkpoints").is_dir()
