"""From an index of annotations to training batches.

Everything random about a picture is drawn from a generator seeded with (seed, epoch, position), so that any batch can
be made again.

N: objects of a picture. H, W: height and width of a batch. h, w: of one picture in it. Boxes are xyxy in pixels.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from vit_adapter.training.augmentation import Step, apply, masks_of, view_of
from vit_adapter.training.coco_index import CocoIndex, find_pictures, read_picture, trainable_objects

SMALLEST_SIDE = 32  # pictures with a shorter side are not trained on
SIZE_DIVISOR = 32


class TrainingPictures(Dataset):
    """Augmented, normalised pictures with their objects, by (epoch, position among the pictures trained on).

    Args:
        steps: The augmentation.
        mean, std: (3,) normalisation of RGB in 0 to 255.
        label2id: Classes of the model; None: the categories in ascending order of their ids.
        keep_background: Whether pictures without annotations are kept.
    """

    def __init__(
        self,
        index: CocoIndex,
        folder: str | os.PathLike[str],
        *,
        steps: Sequence[Step],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        label2id: Mapping[str, int] | None = None,
        keep_background: bool = False,
    ) -> None:
        self.index = index
        self.root = find_pictures(index, folder)
        self.steps = tuple(steps)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self.seed = seed
        self.labels = index.labels(label2id)
        heights, widths = np.array(index.pictures["height"]), np.array(index.pictures["width"])
        annotated = np.array([keep_background or bool(ids) for ids in index.pictures["category_ids"]], dtype=bool)
        self.rows = np.flatnonzero(annotated & (np.minimum(heights, widths) >= SMALLEST_SIDE))
        self.is_wide = widths[self.rows] > heights[self.rows]
        if not self.rows.size:
            raise ValueError(f"{index.source}: no picture has a usable object and sides of at least {SMALLEST_SIDE}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, position = key
        row = self.index.pictures[int(self.rows[position])]
        chosen = trainable_objects(row)
        boxes = np.array([row["boxes"][i] for i in chosen], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        draws = np.random.default_rng([self.seed, epoch, position])
        view = apply(self.steps, view_of(read_picture(self.root, row), boxes), draws)
        size = [row["height"], row["width"]]
        run_lengths = [{"size": size, "counts": row["run_lengths"][i]} for i in chosen]
        classes = [self.labels[row["category_ids"][chosen[i]]] for i in view.kept]
        return {
            "image_id": row["image_id"],
            "pixel_values": view.image.float().sub_(self.mean).mul_(self.scale),
            "labels": {
                "boxes": torch.from_numpy(view.boxes),
                "class_labels": torch.tensor(classes, dtype=torch.int64),
                "masks": masks_of(view, run_lengths),
            },
        }


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch, padded with zeros at the right and bottom to the largest sides, rounded up to multiples of 32.

    Returns:
        `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) int64 with 1 where the picture is, `labels`, one dict a
        picture, and `image_ids`.
    """
    sizes = [sample["pixel_values"].shape[-2:] for sample in samples]
    height, width = (math.ceil(max(sides) / SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
    pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    for mask, (h, w) in zip(pixel_mask, sizes, strict=True):
        mask[:h, :w] = 1
    return {
        "image_ids": [sample["image_id"] for sample in samples],
        "pixel_values": torch.stack(
            [
                functional.pad(sample["pixel_values"], (0, width - w, 0, height - h))
                for sample, (h, w) in zip(samples, sizes, strict=True)
            ]
        ),
        "pixel_mask": pixel_mask,
        "labels": [sample["labels"] for sample in samples],
    }


def orientation_batches(
    is_wide: np.ndarray, *, batch_size: int, total_batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of an epoch, in random order, each with pictures that are all wide or all not.

    Pictures are repeated to fill each of the two groups to a multiple of `total_batch_size`, the pictures of one
    optimizer step over all processes, so that every step is full.
    """
    generator = np.random.default_rng([seed, epoch])
    batches = []
    for orientation in (False, True):
        group = generator.permutation(np.flatnonzero(is_wide == orientation))
        filled = np.resize(group, math.ceil(len(group) / total_batch_size) * total_batch_size)
        batches += filled.reshape(-1, batch_size).tolist()
    return [batches[i] for i in generator.permutation(len(batches))]


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process from a step of the training to its end, as lists of (epoch, position).

    Args:
        batch_size: Pictures of a process at a time.
        accumulation: Batches of a process in one optimizer step.
        first_step: Optimizer steps already taken.
        num_epochs, max_steps: Length of the training; the smaller holds.
    """

    def __init__(
        self,
        is_wide: np.ndarray,
        *,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        first_step: int = 0,
        num_epochs: int,
        max_steps: int | None = None,
    ) -> None:
        self.is_wide = is_wide
        self.batch_size = batch_size
        self.batches_per_step = accumulation * processes
        self.processes = processes
        self.process = process
        self.seed = seed
        self.first_step = first_step
        total_batch_size = batch_size * self.batches_per_step
        self.steps_per_epoch = sum(
            math.ceil(np.count_nonzero(is_wide == orientation) / total_batch_size) for orientation in (False, True)
        )
        self.last_step = num_epochs * self.steps_per_epoch
        if max_steps is not None:
            self.last_step = min(self.last_step, max_steps)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.batches_per_step // self.processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known_epoch, batches = None, []
        for step in range(self.first_step, self.last_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != known_epoch:
                known_epoch, batches = epoch, self._epoch(epoch)
            start = step_in_epoch * self.batches_per_step
            for batch in batches[start + self.process : start + self.batches_per_step : self.processes]:
                yield [(epoch, position) for position in batch]

    def _epoch(self, epoch: int) -> list[list[int]]:
        return orientation_batches(
            self.is_wide,
            batch_size=self.batch_size,
            total_batch_size=self.batch_size * self.batches_per_step,
            seed=self.seed,
            epoch=epoch,
        )
