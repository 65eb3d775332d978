"""What a training run consists of, and what is done with it; the loop itself is in `train.py`."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit_adapter.training.augmentation import parse_steps
from vit_adapter.training.checkpointing import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    seed_step,
)
from vit_adapter.training.coco_evaluation import best_line, detect, evaluate_results
from vit_adapter.training.coco_index import CocoIndex, find_pictures, open_coco
from vit_adapter.training.data import TrainingBatches, TrainingPictures, collate
from vit_adapter.training.optimization import learning_rate_factor, parameter_groups
from vit_adapter.training.recipe import Recipe
from vit_adapter.training.run_folder import RunFolder, model_card
from vit_adapter.training.starting_point import starting_point

Losses = dict[str, float]


class StopRequested(Exception):
    """SIGTERM came; what was done since the last checkpoint is saved, or will be done again."""


@dataclass(frozen=True)
class EvaluatedSet:
    """Pictures on which accuracy is measured."""

    name: str
    index: CocoIndex
    root: Path


class TrainingRun:
    """Everything that a recipe sets up.

    Attributes:
        first_step, last_step: Optimizer steps already taken, and their number at the end.
        steps_per_epoch: Optimizer steps in an epoch.
        batches: What the steps from `first_step` on take, for this process.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.began = time.monotonic()
        self.stop_requested = False
        self.recipe = recipe
        self.accelerator = Accelerator(mixed_precision=recipe.mixed_precision or "no")
        self.folder = RunFolder(recipe.output_dir or Path("runs") / recipe.name)
        share_cores(self.accelerator, recipe.cpu_threads)

        index = open_coco(recipe.train_annotations, recipe.cache_dir)
        start = starting_point(recipe, index.categories)
        self.processor = start.processor
        pictures = TrainingPictures(
            index,
            recipe.train_images,
            steps=parse_steps(recipe.augmentation),
            mean=start.mean,
            std=start.std,
            seed=recipe.seed,
            keep_background=recipe.keep_background,
        )
        self.evaluated = evaluated_sets(recipe, index)
        self.accumulation = accumulation(recipe, self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            self.folder.prepare(recipe)
        self.accelerator.wait_for_everyone()

        self.detector = start.model
        if self.accelerator.device.type == "cuda" and self.accelerator.num_processes > 1:
            self.detector = nn.SyncBatchNorm.convert_sync_batchnorm(self.detector)
        groups = parameter_groups(
            self.detector,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay_rate=recipe.layer_decay_rate,
            reference_quirks=recipe.reference_quirks,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.detector, torch.optim.AdamW(groups, fused=True))
        self.first_step = self._resume()

        sampler = TrainingBatches(
            pictures.is_wide,
            batch_size=recipe.batch_size,
            accumulation=self.accumulation,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
            seed=recipe.seed,
            first_step=self.first_step,
            num_epochs=recipe.num_epochs,
            max_steps=recipe.max_steps,
        )
        self.last_step, self.steps_per_epoch = sampler.last_step, sampler.steps_per_epoch
        self.batches: Iterator[dict[str, Any]] = iter(
            DataLoader(pictures, batch_sampler=sampler, collate_fn=collate, num_workers=recipe.num_workers)
        )
        self.rate_factor = learning_rate_factor(
            steps_per_epoch=self.steps_per_epoch,
            decay_epochs=recipe.lr_decay_epochs,
            decay_factor=recipe.lr_decay_factor,
            warmup_steps=recipe.warmup_steps,
            warmup_ratio=recipe.warmup_ratio,
        )
        signal.signal(signal.SIGTERM, self._request_stop)

    def take_step(self, step: int) -> tuple[Losses, bool]:
        """One optimizer step.

        Returns:
            The losses, averaged over the step's batches and all processes, and whether SIGTERM came to any process.

        Raises:
            ValueError: the loss is not finite; the weights are those before the step.
        """
        self._set_training_mode(step)
        self._set_learning_rates(step)
        image_ids, losses = [], []
        for micro_batch in range(self.accumulation):
            batch = next(self.batches)
            image_ids += batch.pop("image_ids")
            is_last = micro_batch == self.accumulation - 1
            seed_step(
                seed=self.recipe.seed,
                step=step,
                process=self.accelerator.process_index,
                micro_batch=micro_batch,
            )
            # Gradients of processes are averaged once, with the last batch.
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                outputs = self.model(**to_device(batch, self.accelerator.device))
                self.accelerator.backward(outputs.loss / self.accumulation)
            losses.append(torch.stack([outputs.loss, *outputs.loss_dict.values()]).detach().float())
        names = ["loss", *outputs.loss_dict]
        numbers = torch.cat([torch.stack(losses).mean(0), losses[0].new_tensor([self.stop_requested])])
        *means, stop = self.accelerator.reduce(numbers, "mean").tolist()
        self._check_finite(dict(zip(names, means, strict=True)), step, image_ids)
        if self.recipe.gradient_clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(zip(names, means, strict=True)), stop > 0

    def log(self, done: int, losses: Losses) -> None:
        """Writes a line of metrics.jsonl after `done` steps."""
        if self.accelerator.is_main_process:
            rate = self.recipe.learning_rate * self.rate_factor(done - 1)
            place = {"step": done, "epoch": (done - 1) // self.steps_per_epoch, "learning_rate": rate}
            self.folder.append({**place, **losses, "seconds": self._seconds()})

    def save_checkpoint(self, done: int) -> None:
        """Writes a checkpoint after `done` steps."""
        if self.accelerator.is_main_process:
            training: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                training["scaler"] = self.accelerator.scaler.state_dict()
            checkpoint = Checkpoint(done, self.detector.state_dict(), training)
            save_checkpoint(self.folder.checkpoints, checkpoint, keep=self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def evaluate(self, done: int, *, draw: bool = False) -> dict[str, Any]:
        """Measures accuracy on every evaluated set, the pictures shared out among the processes.

        Returns:
            For each set what `evaluate_results` returns; empty except in the main process.
        """
        metrics: dict[str, Any] = {}
        for name, index, root in ((chosen.name, chosen.index, chosen.root) for chosen in self.evaluated):
            rows = range(self.accelerator.process_index, len(index.pictures), self.accelerator.num_processes)
            with self.progress(f"evaluating {name}", len(rows)) as bar:

                def seen(bar: tqdm = bar) -> None:
                    bar.update()
                    if self.stop_requested:
                        raise StopRequested("stopped while evaluating: the same command evaluates anew")

                found = detect(
                    self.detector, self.processor, index, root, rows=rows, device=self.accelerator.device, seen=seen
                )
            results = gather_object(found)
            if self.accelerator.is_main_process:
                metrics[name] = evaluate_results(results, index)
                self.folder.append({"step": done, "evaluation": name, **metrics[name], "seconds": self._seconds()})
                tqdm.write(f"{name}: {best_line(metrics[name])}")
                if draw:
                    self.folder.draw_predictions(
                        name,
                        index,
                        root,
                        results,
                        count=self.recipe.draw_pictures,
                        threshold=self.recipe.draw_threshold,
                    )
        return metrics

    def finish(self) -> dict[str, Any]:
        """Writes the model folder, measures and draws, and ends the processes' connection; returns the metrics."""
        metrics = self.evaluate(self.last_step, draw=True)
        if self.accelerator.is_main_process:
            card = model_card(str(self.folder.model), self.recipe, metrics)
            self.folder.save_model(self.detector, self.processor, card)
            self.folder.draw_losses()
            losses = [record["loss"] for record in self.folder.records() if "loss" in record]
            metrics = {
                "steps": self.last_step,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "evaluation": metrics,
                "seconds": self._seconds(),
            }
            self.folder.finish(metrics)
            if self.recipe.note is not None:
                tqdm.write(self.recipe.note)
            tqdm.write(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; everything is in {self.folder.path}")
        self.accelerator.wait_for_everyone()
        return metrics

    def progress(self, title: str, total: int, done: int = 0) -> tqdm:
        """A progress bar, shown by the main process only."""
        return tqdm(total=total, initial=done, desc=title, disable=not self.accelerator.is_main_process)

    def _set_training_mode(self, step: int) -> None:
        self.model.train()
        first_frozen_epoch = self.recipe.freeze_batch_norm_epoch
        if first_frozen_epoch is not None and step // self.steps_per_epoch >= first_frozen_epoch:
            for module in self.detector.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _set_learning_rates(self, step: int) -> None:
        factor = self.rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * group["lr_scale"] * factor

    def _check_finite(self, losses: Losses, step: int, image_ids: list[int]) -> None:
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if wrong:
            pictures = ", ".join(str(image_id) for image_id in gather_object(image_ids))
            raise ValueError(
                f"{', '.join(wrong)} of step {step} is not finite, on the pictures {pictures}: try a lower "
                f"--learning_rate or a longer --warmup_steps; checkpoints are in {self.folder.checkpoints}"
            )

    def _resume(self) -> int:
        """Loads the newest checkpoint, if there is one, and returns how many steps have been taken."""
        path = newest_checkpoint(self.folder.checkpoints)
        if path is None:
            return 0
        checkpoint = load_checkpoint(path)
        try:
            self.detector.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            difference = str(error).splitlines()[1].strip()
            raise ValueError(f"{path}: the checkpoint belongs to another model ({difference})") from error
        self.optimizer.load_state_dict(checkpoint.training["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in checkpoint.training:
            self.accelerator.scaler.load_state_dict(checkpoint.training["scaler"])
        if self.accelerator.is_main_process:
            self.folder.forget_after(checkpoint.step)
            tqdm.write(f"going on from {path}")
        return checkpoint.step

    def _request_stop(self, *_: Any) -> None:
        self.stop_requested = True

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)


def evaluated_sets(recipe: Recipe, train_index: CocoIndex) -> list[EvaluatedSet]:
    """The data sets that a recipe evaluates on, checked."""
    sets = []
    if recipe.evaluate_on_train:
        sets.append(EvaluatedSet("train", train_index, recipe.train_images))
    if recipe.val_annotations is not None and recipe.val_images is not None:
        index = open_coco(recipe.val_annotations, recipe.cache_dir)
        index.labels({name: label for label, name in enumerate(train_index.categories.values())})
        sets.append(EvaluatedSet("val", index, find_pictures(index, recipe.val_images)))
    return sets


def accumulation(recipe: Recipe, processes: int) -> int:
    """Batches of a process in one optimizer step, so that `total_batch_size` holds for any number of processes."""
    together = recipe.batch_size * processes
    if recipe.total_batch_size % together:
        raise ValueError(
            f"total_batch_size {recipe.total_batch_size} is no multiple of {processes} processes x batch_size "
            f"{recipe.batch_size}: change one of them"
        )
    return recipe.total_batch_size // together


def share_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Without a GPU, gives each process its share of the cores; `accelerate launch` would give it one thread."""
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // accelerator.num_processes))


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors within lists and dicts on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, list):
        return [to_device(entry, device) for entry in value]
    return value
