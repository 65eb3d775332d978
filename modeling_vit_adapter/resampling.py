"""How large pictures become, and bilinear resizing as OpenCV did it for the published detectors."""

import torch

WEIGHT_BITS = 11  # OpenCV weighs 8-bit pixels in whole 2048ths


def resized_size(height: int, width: int, shortest_edge: int | None, longest_edge: int | None) -> tuple[int, int]:
    """Height and width of a picture made as large as both edges allow, at its own ratio; each side at least 1.

    Rounded to the nearest as in the reference: 480 x 640 becomes 800 x 1067, where transformers has 800 x 1066.
    """
    scale = min(
        longest_edge / max(height, width) if longest_edge else float("inf"),
        shortest_edge / min(height, width) if shortest_edge else float("inf"),
    )
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture (..., h, w) uint8 at another size: bilinear, no antialiasing, bit for bit what `cv2.resize` gives.

    torch's own kernels weigh otherwise and differ by up to one grey level.
    """
    (left, left_weights), (right, right_weights) = _neighbours(image.shape[-1], width, image.device)
    (upper, upper_weights), (lower, lower_weights) = _neighbours(image.shape[-2], height, image.device)
    pixels = image.int()
    rows = pixels.index_select(-1, left).mul_(left_weights) + pixels.index_select(-1, right).mul_(right_weights)
    rows >>= 4
    above = rows.index_select(-2, upper).mul_(upper_weights[:, None])
    below = rows.index_select(-2, lower).mul_(lower_weights[:, None])
    above >>= 16  # each apart: OpenCV drops these bits before it adds
    below >>= 16
    return ((above + below + 2) >> 2).to(torch.uint8)


def _neighbours(
    old: int, new: int, device: torch.device
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The pixel before and the pixel after each of `new` sampling points along a side of `old` pixels.

    Returns:
        Twice (new,) int64 indices and (new,) int32 weights; beyond the border, both are the border pixel.
    """
    points = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    before = points.floor()
    share = points - before
    pairs = [
        (index.long().clamp(0, old - 1).to(device), (weight * (1 << WEIGHT_BITS)).round().int().to(device))
        for index, weight in ((before, 1 - share), (before + 1, share))
    ]
    return pairs[0], pairs[1]
