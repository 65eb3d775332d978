"""Instance masks as pixels and as COCO run lengths, in NumPy.

H, W: height and width of a picture. M: side of a predicted mask (28). A box is xyxy in pixels. A run-length encoding
(RLE) is COCO's dict of `size` (H, W) and `counts`, alternating runs of zeros and ones down the columns.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    from pycocotools import mask as coco_mask
except ImportError:  # only run lengths and polygons need it
    coco_mask = None

Box = Sequence[float] | np.ndarray
"""Left, top, right, bottom in pixels."""

# Pixels pasted at a time: bounds the memory of one mask, however large the picture (about 16 MiB of float32).
STRIP_PIXELS = 1 << 22


class Region(NamedTuple):
    """Whole pixels from `left` up to but without `right`, from `top` up to but without `bottom`."""

    left: int
    top: int
    right: int
    bottom: int


def paste_region(box: Box, height: int, width: int) -> Region:
    """The pixels that a mask predicted for `box` (4,) may fill: those it touches and one more on every side."""
    left, top, right, bottom = (float(side) for side in box)
    return Region(
        left=min(max(math.floor(left) - 1, 0), width),
        top=min(max(math.floor(top) - 1, 0), height),
        right=max(min(math.ceil(right) + 1, width), 0),
        bottom=max(min(math.ceil(bottom) + 1, height), 0),
    )


def paste_mask(probabilities: np.ndarray, box: Box, height: int, width: int, threshold: float = 0.5) -> np.ndarray:
    """The mask of an object in its picture: `probabilities` stretched over the box, where at least `threshold`.

    Args:
        probabilities: (M, M) float32, row by row, of the object inside its box.
        box: (4,) float32 xyxy in pixels of the picture.

    Returns:
        (H, W) bool.
    """
    mask = np.zeros((height, width), dtype=bool)
    region = paste_region(box, height, width)
    for first, strip in _pasted_strips(probabilities, box, region, threshold):
        mask[region.top : region.bottom, first : first + len(strip)] = strip.T
    return mask


def paste_mask_as_rle(
    probabilities: np.ndarray, box: Box, height: int, width: int, threshold: float = 0.5
) -> dict[str, Any]:
    """What `paste_mask` gives, as an RLE with `counts` a string; the picture itself is never laid out in memory.

    The law: decoding the result gives `paste_mask` of the same arguments.
    """
    region = paste_region(box, height, width)
    positions = [np.zeros(0, dtype=np.int64)]
    for first, strip in _pasted_strips(probabilities, box, region, threshold):
        columns, rows = _run_bounds(strip).T
        positions.append((first + columns) * height + region.top + rows)
    return _rle_from_positions(np.concatenate(positions), height, width)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """The RLE, with `counts` a string, of a mask (H, W) in which everything but zero belongs to the object."""
    height, width = mask.shape
    columns, rows = _run_bounds(mask.T != 0).T
    return _rle_from_positions(columns * height + rows, height, width)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of a COCO annotation's `segmentation`: polygons, or an RLE, compressed (str or bytes) or not (list).

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the segmentation is empty, a polygon has no three corners, or an RLE is of another picture's size.
    """
    return _require_coco_mask().decode(segmentation_as_rle(segmentation, height, width)).astype(bool)


def rasterize_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> tuple[np.ndarray, int, int]:
    """The pixels of an object given as polygons, only as far as they reach.

    The law: laid into zeros of the picture's size at (left, top), this is `decode_segmentation` of the same polygons.

    Args:
        polygons: Each x1, y1, x2, y2, ... in pixels.
        height, width: Size of the picture, which cuts the polygons off.

    Returns:
        (h, w) uint8, at least one pixel, with a border of zeros wherever the picture goes on; left; top.
    """
    corners = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
    left, top, right, bottom = paste_region([*corners.min(axis=0), *corners.max(axis=0)], height, width)
    if bottom <= top or right <= left:
        return np.zeros((1, 1), dtype=np.uint8), 0, 0
    # Cut off right and below only: moving the polygons would round some pixels of their edges otherwise.
    pixels = decode_segmentation(polygons, bottom, right)
    return pixels[top:, left:].astype(np.uint8), left, top


def segmentation_as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO annotation's `segmentation`, in any of its forms, as an RLE with `counts` a string.

    Raises:
        ValueError: as `decode_segmentation`.
    """
    if isinstance(segmentation, dict):
        return _compressed_rle(segmentation, height, width)
    if not isinstance(segmentation, Sequence) or not segmentation:
        raise ValueError(f"a segmentation must be a list of polygons or a run-length dict, but got {segmentation!r}")
    for polygon in segmentation:
        # pycocotools would read four numbers as a box.
        if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon needs at least three x, y pairs, but got {_shortened(polygon)}")
        if not are_finite_numbers(polygon):
            raise ValueError(f"a polygon's corners must be finite numbers, but got {_shortened(polygon)}")
    coco = _require_coco_mask()
    return _compressed_rle(coco.merge(coco.frPyObjects(list(segmentation), height, width)), height, width)


def are_finite_numbers(values: Any) -> bool:
    """Whether this is a flat list of numbers, none of them infinite or NaN."""
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        return False
    return array.ndim == 1 and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (..., H, W) at another size by nearest neighbour, as OpenCV picks it: floor(index · old / new)."""
    rows = _nearest_indices(mask.shape[-2], height)
    columns = _nearest_indices(mask.shape[-1], width)
    return mask[..., rows[:, None], columns]


def _nearest_indices(old: int, new: int) -> np.ndarray:
    # In double precision and through the reciprocal of new / old, so that exact ratios round as in OpenCV.
    return np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)


def _pasted_strips(
    probabilities: np.ndarray, box: Box, region: Region, threshold: float
) -> Iterator[tuple[int, np.ndarray]]:
    """The pasted mask in vertical strips from the left: (first column, (columns, rows of the region) bool).

    Bilinear sampling is separable, so a strip is two small matrix products; transposed, as run lengths want it.
    """
    rows = region.bottom - region.top
    if rows <= 0 or region.right <= region.left:
        return
    left, top, right, bottom = np.asarray(box, dtype=np.float32)
    by_row = _bilinear_weights(region.top, region.bottom, top, bottom, probabilities.shape[0])
    by_column = _bilinear_weights(region.left, region.right, left, right, probabilities.shape[1])
    stretched_down = probabilities.astype(np.float32).T @ by_row.T  # (M, rows)
    step = max(STRIP_PIXELS // rows, 1)
    for first in range(0, region.right - region.left, step):
        yield region.left + first, by_column[first : first + step] @ stretched_down >= threshold


def _bilinear_weights(first: int, last: int, start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """How much each of `count` cells spread over [start, end] gives to each pixel centre first, ..., last - 1.

    Linear between the centres of the cells, falling to zero half a cell beyond the outermost. Float32 as the
    reference, so that pixels at the threshold fall alike.

    Returns:
        (last - first, count) float32.
    """
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    # In a flat box every pixel samples the middle of the mask: so the reference replaces the infinities.
    relative = (centres - start) / (end - start) if end > start else np.full_like(centres, 0.5)
    positions = relative * np.float32(count) - np.float32(0.5)
    distances = np.abs(positions[:, None] - np.arange(count, dtype=np.float32))
    return np.maximum(np.float32(1) - distances, np.float32(0))


def _run_bounds(columns_of_mask: np.ndarray) -> np.ndarray:
    """Where runs of ones start and end (first pixel after), column by column, of a transposed mask (W, H) bool.

    Returns:
        (2R, 2) int64 of (column, row); a run ends within its column, so an end may lie at row H.
    """
    padded = np.pad(columns_of_mask, ((0, 0), (1, 1)))
    return np.argwhere(padded[:, 1:] != padded[:, :-1])


def _rle_from_positions(positions: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """The RLE of runs given by their starts and ends in turn, as offsets down the columns of an (H, W) picture."""
    # A run that reaches the bottom and goes on at the top of the next column is one run.
    joined = positions[1:-1].reshape(-1, 2)
    joined = joined[joined[:, 0] != joined[:, 1]].reshape(-1)
    counts = np.diff(np.concatenate([[0], positions[:1], joined, positions[-1:], [height * width]]))
    if counts.size > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return _compressed_rle({"size": [height, width], "counts": counts.tolist()}, height, width)


def _compressed_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """An RLE of a picture of this size with `counts` a string, whichever of COCO's three forms it came in."""
    if list(rle.get("size", ())) != [height, width]:
        raise ValueError(
            f"a run-length mask must have the picture's size {[height, width]} (height, width), "
            f"but got {rle.get('size')}"
        )
    counts = rle.get("counts")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts}
    if isinstance(counts, bytes):
        return {"size": [height, width], "counts": counts.decode("ascii")}
    if not isinstance(counts, Sequence) or sum(counts) != height * width or min(counts) < 0:
        raise ValueError(
            f"the counts of a run-length mask must be runs that add up to {height} x {width} pixels, "
            f"but got {_shortened(counts)}"
        )
    compressed = _require_coco_mask().frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": compressed["counts"].decode("ascii")}


def _require_coco_mask() -> Any:
    if coco_mask is None:
        raise ImportError("run-length masks and polygons need pycocotools: pip install pycocotools")
    return coco_mask


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
