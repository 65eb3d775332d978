"""Which anchor or proposal belongs to which object, and which of them enter the loss.

Shape letters: G objects, N candidates (anchors or proposals).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import box_iou

NEGATIVE = -1
UNUSED = -2

# Objects are matched in chunks whose overlap matrix has at most this many entries (128 MiB in float32), so that
# thousands of objects need no more memory than some.
MAX_OVERLAPS = 2**25


class Sample(NamedTuple):
    """Indices of the candidates that enter the loss, each ascending."""

    positive: Tensor
    negative: Tensor


def match(
    objects: Tensor, candidates: Tensor, *, positive_iou: float, negative_iou: float, min_positive_iou: float
) -> Tensor:
    """The object of each candidate, NEGATIVE, or UNUSED in between: (N,).

    A candidate belongs to the object it overlaps most, if by at least `positive_iou`; below `negative_iou` it is
    negative. Besides, each object takes all candidates that reach its best overlap, if that is at least
    `min_positive_iou`: later objects win, also over a better match, as in the reference.

    Args:
        objects: (G, 4) xyxy.
        candidates: (N, 4) xyxy.
    """
    best_iou = candidates.new_zeros(len(candidates))
    best_object = torch.zeros(len(candidates), dtype=torch.long, device=candidates.device)
    taken_by = torch.full_like(best_object, NEGATIVE)
    chunk = max(1, MAX_OVERLAPS // max(1, len(candidates)))
    for first in range(0, len(objects) if len(candidates) else 0, chunk):
        overlaps = box_iou(objects[first : first + chunk], candidates)  # (chunk, N)
        chunk_iou, chunk_object = overlaps.max(dim=0)
        better = chunk_iou > best_iou
        best_object = torch.where(better, chunk_object + first, best_object)
        best_iou = torch.where(better, chunk_iou, best_iou)
        best_of_object = overlaps.amax(dim=1, keepdim=True)
        reached = (overlaps == best_of_object) & (best_of_object >= min_positive_iou)
        last_object = torch.arange(first, first + len(overlaps), device=objects.device)[:, None]
        taken_by = torch.maximum(taken_by, torch.where(reached, last_object, NEGATIVE).amax(dim=0))
    matched = torch.where(best_iou < negative_iou, NEGATIVE, UNUSED)
    matched = torch.where((best_iou >= positive_iou) & bool(len(objects)), best_object, matched)
    return torch.where(taken_by >= 0, taken_by, matched)


def sample(matched: Tensor, batch_size: int, positive_fraction: float) -> Sample:
    """At most `batch_size` candidates for the loss, at most `positive_fraction` of them positive; negatives fill up.

    Args:
        matched: (N,) as `match` returns it.
    """
    positive = _at_most((matched >= 0).nonzero().flatten(), int(batch_size * positive_fraction))
    negative = _at_most((matched == NEGATIVE).nonzero().flatten(), batch_size - len(positive))
    return Sample(positive, negative)


def _at_most(candidates: Tensor, count: int) -> Tensor:
    return choose(candidates, count).sort().values if len(candidates) > count else candidates


def choose(candidates: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of the candidates (more than `count`), uniformly at random: the only random draw inside the losses."""
    order = torch.randperm(len(candidates), device=candidates.device, generator=generator)
    return candidates[order[:count]]
