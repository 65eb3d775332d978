"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00001234`, written under another name, forced to the disk and then renamed, which
happens at once or not at all. Resuming from one gives the weights of an uninterrupted run bit by bit, because
everything random is drawn anew from the seed, the step and the process (`seed_step`, and `data.TrainingBatches`).
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vit_adapter.conversion.model_folder import force_to_disk

STEP = re.compile(r"step-(\d{8})")
WEIGHTS = "model.safetensors"
STATE = "training_state.pt"


class Checkpoint(NamedTuple):
    """A run as it was after an optimizer step.

    Attributes:
        step: How many optimizer steps had been taken.
        model: The model's state.
        training: Whatever else the run needs: tensors, numbers, texts, lists and dicts of them.
    """

    step: int
    model: Mapping[str, torch.Tensor]
    training: Mapping[str, Any]


def seed_step(*, seed: int, step: int, process: int, micro_batch: int = 0) -> None:
    """Seeds torch's generators for one forward pass, so that its draws depend on nothing that came before."""
    entropy = np.random.SeedSequence([seed, step, process, micro_batch])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes a checkpoint into the folder of a run's checkpoints and removes all but the newest `keep`.

    Raises:
        ValueError: it cannot be written, for instance because the disk is full; older checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    unfinished = folder / f".{final.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        unfinished.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, unfinished / WEIGHTS)
        torch.save(dict(checkpoint.training), unfinished / STATE)
        for path in (unfinished / WEIGHTS, unfinished / STATE, unfinished):
            force_to_disk(path)
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        force_to_disk(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(f"{final}: the checkpoint cannot be written ({error}); earlier ones are untouched") from error
    for _, old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder of checkpoints."""
    found = _checkpoints(folder)
    return found[-1][1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, on the CPU.

    Raises:
        ValueError: files are missing or damaged.
    """
    match = STEP.fullmatch(path.name)
    if match is None or not path.is_dir():
        raise ValueError(f"{path}: not a checkpoint, which is a folder like step-00001234")
    try:
        model = load_file(path / WEIGHTS)
        training = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: the checkpoint is damaged ({reason}): remove it to go on from the one before"
        ) from error
    return Checkpoint(int(match[1]), model, training)


def remove_unfinished(folder: Path) -> None:
    """Removes what an interrupted save left behind."""
    for path in folder.glob(".step-*.unfinished"):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, oldest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in entries if (match := STEP.fullmatch(path.name)))
