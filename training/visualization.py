"""Pictures for people: masks and boxes drawn over a photograph, two pictures side by side, the loss curve."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vit_adapter.modeling_vit_adapter.masks import decode_segmentation

MASK_OPACITY = 0.5
GOLDEN_RATIO = 0.618034  # turns of hue between neighbouring colours, so that any number of them stay apart


def draw_instances(
    image: Image.Image, instances: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> Image.Image:
    """A copy of a picture with its instances.

    Args:
        image: RGB.
        instances: COCO annotations or results: category_id, bbox (x, y, width, height), segmentation, and score for
            results. The first is drawn on top.
        names: Name by category id.
    """
    pixels = np.array(image, dtype=np.float32)
    for instance in reversed(instances):
        mask = decode_segmentation(instance["segmentation"], image.height, image.width)
        tint = np.array(_color(instance["category_id"]), dtype=np.float32)
        pixels[mask] = (1 - MASK_OPACITY) * pixels[mask] + MASK_OPACITY * tint
        pixels[_outline(mask)] = tint
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    canvas = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=max(12, min(image.size) // 32))
    for instance in reversed(instances):
        left, top, width, height = instance["bbox"]
        color = _color(instance["category_id"])
        canvas.rectangle((left, top, left + width, top + height), outline=color, width=2)
        caption = names[instance["category_id"]]
        if "score" in instance:
            caption = f"{caption} {instance['score']:.2f}"
        _write(canvas, (left, top), caption, font, color)
    return drawn


def side_by_side(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures of one height in a row, each under its caption."""
    font = ImageFont.load_default(size=16)
    bar, gap = 24, 8
    height = max(picture.height for picture in pictures)
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, height + bar), "white")
    canvas = ImageDraw.Draw(row)
    left = 0
    for picture, caption in zip(pictures, captions, strict=True):
        canvas.text((left + 4, 2), caption, fill="black", font=font)
        row.paste(picture, (left, bar))
        left += picture.width + gap
    return row


def draw_loss_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, its parts and the learning rate over the optimizer steps, as PNG.

    Args:
        records: Lines of metrics.jsonl with `step`, `loss`, `learning_rate` and parts called `loss_…`.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color="black", linewidth=2, label="loss")
    parts = [name for name in records[0] if name.startswith("loss_")] if records else []
    for part in parts:
        axes.plot(steps, [record[part] for record in records], linewidth=1, label=part)
    axes.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot(steps, [record["learning_rate"] for record in records], color="gray", linestyle=":", linewidth=1)
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    figure.savefig(path, dpi=120)


def _color(category_id: int) -> tuple[int, int, int]:
    """A bright colour for every category id, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(category_id * GOLDEN_RATIO % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _write(
    canvas: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    color: tuple[int, int, int],
) -> None:
    """A caption on its own ground, with its lower left at the corner if there is room above, otherwise below it."""
    _, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
    x, y = corner
    y = y - bottom - 2 if y - bottom - 2 >= 0 else y
    canvas.rectangle((x, y, x + right + 4, y + bottom + 2), fill=color)
    canvas.text((x + 2, y), text, fill="black", font=font)
