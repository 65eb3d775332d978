"""Checkpoints: whole or not there, the newest found, the oldest removed."""

import os
import subprocess
import sys

import pytest
import torch

from vit_adapter.training import checkpointing
from vit_adapter.training.checkpointing import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    seed_step,
)


def checkpoint(step):
    model = {"weight": torch.arange(6.0).reshape(2, 3).T, "steps": torch.tensor(step)}
    return Checkpoint(step, model, {"optimizer": {"state": {0: {"step": torch.tensor(1.5)}}, "names": ["a"]}})


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    loaded = load_checkpoint(path)
    assert loaded.step == 7
    assert torch.equal(loaded.model["weight"], checkpoint(7).model["weight"])
    assert loaded.training == checkpoint(7).training


def test_the_newest_stay(tmp_path):
    for step in (5, 90, 100, 1000):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00001000"


def test_there_may_be_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "notes").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_a_step_may_be_saved_again(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert load_checkpoint(save_checkpoint(tmp_path, checkpoint(5), keep=1)).step == 5


def test_an_interrupted_save_is_not_found_and_cleaned_away(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=3)
    (tmp_path / ".step-00000002.unfinished").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    save_checkpoint(tmp_path, checkpoint(3), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1), keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", full)
    with pytest.raises(ValueError, match="No space left on device"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(newest_checkpoint(tmp_path)).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    damage(path / name)
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        load_checkpoint(path)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    torch.save({"optimizer": Payload()}, path / "training_state.pt")
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_draws_depend_on_seed_step_process_and_batch_alone():
    def draw(**changes):
        torch.rand(3)
        seed_step(**{"seed": 0, "step": 1, "process": 0, "micro_batch": 0, **changes})
        return torch.rand(1).item()

    assert draw() == draw()
    changes = [{}, {"seed": 1}, {"step": 2}, {"process": 1}, {"micro_batch": 1}]
    assert len({draw(**change) for change in changes}) == 5


KILL_AT_EVERY_CALL = """
import os, shutil, signal, sys, torch
from pathlib import Path
from vit_adapter.training import checkpointing
from vit_adapter.training.checkpointing import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork

def checkpoint(step):
    return Checkpoint(step, {"weight": torch.full((300, 300), float(step))}, {"step": torch.full((300, 300), step)})

def dying(call, countdown):
    def wrapped(*arguments, **options):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapped

save_checkpoint(folder, checkpoint(1), keep=1)
finished = False
calls = 0
while not finished:
    calls += 1
    child = os.fork()
    if child == 0:
        countdown = [calls]
        for owner, name in [
            (checkpointing, "save_file"), (torch, "save"), (os, "fsync"), (Path, "rename"), (shutil, "rmtree"),
            (Path, "mkdir"),
        ]:
            setattr(owner, name, dying(getattr(owner, name), countdown))
        save_checkpoint(folder, checkpoint(calls + 1), keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    finished = os.WIFEXITED(status)
    assert finished or os.WTERMSIG(status) == signal.SIGKILL
    loaded = load_checkpoint(newest_checkpoint(folder))
    assert loaded.model["weight"].unique().tolist() == loaded.training["step"].unique().tolist() == [loaded.step]
assert loaded.step == calls + 1
print(calls)
"""


def test_whatever_call_of_a_save_is_the_last_a_whole_checkpoint_remains(tmp_path):
    command = [sys.executable, "-c", KILL_AT_EVERY_CALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8
