"""The published training augmentation, and its parts as data.

A recipe lists the steps; every draw comes from the generator that is passed in, in the order of the original release,
so that a picture's augmentation can be repeated exactly.

Masks are never resized: flip, nearest-neighbour resize and crop choose rows and columns, and choices compose. A `View`
therefore carries the original row of each of its rows and the original column of each of its columns, and the bitmaps
are cut out of the run-length codes once, at the end, inside each object's box only. The result equals that of resizing
the bitmaps step by step, pixel for pixel.

N: objects. H, W: height and width of the original picture. h, w: of the view. Boxes are xyxy in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from pycocotools import mask as coco_mask

from vit_adapter.modeling_vit_adapter.masks import resize_mask
from vit_adapter.modeling_vit_adapter.resampling import resize_bilinear, resized_size


class Draws(Protocol):
    """What the steps need of a `numpy.random.Generator`."""

    def random(self) -> float: ...

    def integers(self, low: int, high: int) -> int: ...


class View(NamedTuple):
    """A picture on its way through the steps, and how to get there from the original.

    Attributes:
        image: (3, h, w) uint8 RGB.
        boxes: (N, 4) float32 xyxy in pixels of `image`.
        kept: (N,) int64, which of the original's objects these are.
        rows: (h,) int64, the original row that nearest-neighbour resizing puts in each row.
        columns: (w,) int64, likewise.
    """

    image: torch.Tensor
    boxes: np.ndarray
    kept: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[-2], self.image.shape[-1]


class Step(Protocol):
    """One step of an augmentation."""

    def __call__(self, view: View, draws: Draws) -> View: ...


@dataclass(frozen=True)
class Flip:
    """Left becomes right, with a probability."""

    probability: float = 0.5

    def __call__(self, view: View, draws: Draws) -> View:
        if draws.random() >= self.probability:
            return view
        _, width = view.size
        left, top, right, bottom = view.boxes.T
        return view._replace(
            image=view.image.flip(-1),
            boxes=np.stack([width - right, top, width - left, bottom], axis=1),
            columns=view.columns[::-1],
        )


@dataclass(frozen=True)
class Resize:
    """The short side becomes one of `short_sides`, drawn evenly, unless the long side would pass `long_side`."""

    short_sides: tuple[int, ...]
    long_side: int = 1333

    def __post_init__(self) -> None:
        if not isinstance(self.short_sides, tuple) or not self.short_sides:
            raise ValueError(f"the step resize takes a list of short_sides, but got {self.short_sides!r}")

    def __call__(self, view: View, draws: Draws) -> View:
        short_side = self.short_sides[draws.integers(0, len(self.short_sides))]
        height, width = view.size
        new_height, new_width = resized_size(height, width, short_side, self.long_side)
        if (new_height, new_width) == (height, width):
            return view
        # In float32 as the original, so that boxes agree to the last bit.
        scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
        return _with_visible_objects(
            View(
                image=resize_bilinear(view.image, new_height, new_width),
                boxes=view.boxes * scale,
                kept=view.kept,
                rows=resize_mask(view.rows[None], 1, new_height)[0],
                columns=resize_mask(view.columns[None], 1, new_width)[0],
            )
        )


@dataclass(frozen=True)
class Crop:
    """A random window with sides drawn evenly from `smallest` to `largest`, both cut to the picture's own side.

    An object stays if its clipped box has positive area, even if no pixel of its mask is left; a window without any
    object is allowed.
    """

    smallest: int
    largest: int

    def __call__(self, view: View, draws: Draws) -> View:
        height, width = view.size
        window_height = draws.integers(min(height, self.smallest), min(height, self.largest) + 1)
        window_width = draws.integers(min(width, self.smallest), min(width, self.largest) + 1)
        top = draws.integers(0, height - window_height + 1)
        left = draws.integers(0, width - window_width + 1)
        return _with_visible_objects(
            View(
                image=view.image[:, top : top + window_height, left : left + window_width],
                boxes=view.boxes - np.array([left, top] * 2, dtype=np.float32),
                kept=view.kept,
                rows=view.rows[top : top + window_height],
                columns=view.columns[left : left + window_width],
            )
        )


@dataclass(frozen=True)
class OneOf:
    """One of several branches, drawn evenly; a branch is a sequence of steps."""

    branches: tuple[tuple[Step, ...], ...]

    def __call__(self, view: View, draws: Draws) -> View:
        return apply(self.branches[draws.integers(0, len(self.branches))], view, draws)


STEPS: Mapping[str, type] = {"flip": Flip, "resize": Resize, "crop": Crop}


def parse_steps(description: Sequence[Any]) -> tuple[Step, ...]:
    """The steps that a recipe describes: a list of `flip: {…}`, `resize: {…}`, `crop: {…}` and `one_of: [[…], …]`.

    Raises:
        ValueError: a step or an argument has an unknown name or an impossible value; the sentence shows it.
    """
    if not isinstance(description, Sequence) or isinstance(description, str):
        raise ValueError(f"an augmentation is a list of steps, but got {description!r}")
    return tuple(_parse_step(entry) for entry in description)


def view_of(image: torch.Tensor, boxes: np.ndarray) -> View:
    """The original (3, H, W) and its objects' boxes (N, 4), before any step."""
    _, height, width = image.shape
    return _with_visible_objects(
        View(image, boxes.astype(np.float32), np.arange(len(boxes)), np.arange(height), np.arange(width))
    )


def apply(steps: Sequence[Step], view: View, draws: Draws) -> View:
    """The view after all steps."""
    for step in steps:
        view = step(view, draws)
    return view


def masks_of(view: View, run_lengths: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The bitmaps of the view's objects.

    Args:
        run_lengths: COCO RLE of every object of the original picture, at the original's size.

    Returns:
        (N, h, w) bool.
    """
    masks = np.zeros((len(view.kept), *view.size), dtype=bool)
    for mask, index in zip(masks, view.kept, strict=True):
        left, top, width, height = (int(side) for side in coco_mask.toBbox(run_lengths[index]))
        rows = _inside(view.rows, top, top + height)
        columns = _inside(view.columns, left, left + width)
        if rows.start < rows.stop and columns.start < columns.stop:
            bitmap = coco_mask.decode(run_lengths[index])
            mask[rows, columns] = bitmap[view.rows[rows, None], view.columns[columns]]
    return torch.from_numpy(masks)


def _with_visible_objects(view: View) -> View:
    """The boxes clipped to the picture, and without the objects of which nothing is left."""
    height, width = view.size
    boxes = np.clip(view.boxes, 0, np.array([width, height] * 2, dtype=np.float32))
    stays = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return view._replace(boxes=boxes[stays], kept=view.kept[stays])


def _inside(sources: np.ndarray, first: int, end: int) -> slice:
    """Where a rising or falling index vector takes values from `first` up to but without `end`."""
    inside = np.flatnonzero((sources >= first) & (sources < end))
    return slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0)


def _parse_step(entry: Any) -> Step:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"a step of the augmentation is one name with its arguments, but got {entry!r}")
    ((name, arguments),) = entry.items()
    if name == "one_of":
        if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
            raise ValueError(f"one_of takes a list of branches, each a list of steps, but got {arguments!r}")
        return OneOf(tuple(parse_steps(branch) for branch in arguments))
    if name not in STEPS:
        raise ValueError(f"the augmentation knows the steps {', '.join(STEPS)} and one_of, but got {name!r}")
    known = [field.name for field in fields(STEPS[name])]
    arguments = arguments or {}
    if not isinstance(arguments, Mapping) or not set(arguments) <= set(known):
        raise ValueError(f"the step {name} takes {', '.join(known)}, but got {arguments!r}")
    numbers = [n for value in arguments.values() for n in (value if isinstance(value, list) else [value])]
    if not all(isinstance(n, int | float) and n >= 0 for n in numbers):
        raise ValueError(f"the step {name} takes numbers of at least 0, but got {dict(arguments)!r}")
    try:
        return STEPS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except TypeError as error:
        raise ValueError(f"the step {name} takes {', '.join(known)}, but got {dict(arguments)!r}") from error
