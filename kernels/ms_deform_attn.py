"""Multi-scale deformable attention over fixed grids: one operator, native where it can be, PyTorch elsewhere.

B: pictures, S: source tokens over all levels, Q: queries, M: heads, D: channels of a head, L: source levels,
P: points a level. Grids are (height, width) pairs, one a level, in the order of the tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import use_native
from .reference import ms_deform_attn_reference, ms_deform_attn_sample_reference


def ms_deform_attn(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    source_grids: Sequence[tuple[int, int]],
    query_grids: Sequence[tuple[int, int]],
    points: int,
    implementation: str = "auto",
) -> Tensor:
    """Lets every query attend to L * P points around its own place in every level of the source.

    The cell (i, j) of a query grid looks from the same place of the picture: in a source level that is
    x = (j + 0.5) * source_width / query_width - 0.5 in pixels of the level, y likewise, plus the offset.
    Samples are bilinear with zeros outside; a head's samples are ordered level by level.

    Args:
        value: (B, S, M, D).
        offsets: (B, Q, M, L * P, 2) as (x, y) in pixels of the sample's level; in value's dtype or float32.
        logits: (B, Q, M, L * P), before the softmax; in value's dtype or float32.
        source_grids: L grids with S cells together.
        query_grids: grids with Q cells together.
        points: P.
        implementation: "native", "reference", or "auto" for native where it can be.

    Returns:
        (B, Q, M * D) in value's dtype. Coordinates, softmax and sums are at least float32 inside.

    Raises:
        ValueError: shapes and grids do not fit together.
    """
    source_grids, query_grids = _as_grids(source_grids), _as_grids(query_grids)
    _check_shapes(value, offsets, logits, source_grids)
    if _cells(query_grids) != offsets.shape[1]:
        raise ValueError(f"query_grids hold {_cells(query_grids)} cells, but offsets have {offsets.shape[1]} queries")
    if len(source_grids) * points != offsets.shape[3]:
        raise ValueError(
            f"{len(source_grids)} levels of {points} points need {len(source_grids) * points} offsets a head, "
            f"but got {offsets.shape[3]}"
        )
    if _use_native(value, implementation):
        return torch.ops.vit_adapter.ms_deform_attn(
            value, offsets, logits, _flat(source_grids), _flat(query_grids), points
        )
    return ms_deform_attn_reference(value, offsets, logits, source_grids, query_grids, points)


def ms_deform_attn_sample(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    source_grids: Sequence[tuple[int, int]],
    implementation: str = "auto",
) -> Tensor:
    """Weighted sum of samples at given places: the general operator of Deformable DETR.

    Args:
        value: (B, S, M, D).
        locations: (B, Q, M, L * P, 2) as (x, y), 0 to 1 from the top-left corner of every level.
        weights: (B, Q, M, L * P), used as they are.
        source_grids: L grids with S cells together.
        implementation: "native", "reference", or "auto" for native where it can be.

    Returns:
        (B, Q, M * D) in value's dtype.

    Raises:
        ValueError: shapes and grids do not fit together.
    """
    source_grids = _as_grids(source_grids)
    _check_shapes(value, locations, weights, source_grids)
    if _use_native(value, implementation):
        return torch.ops.vit_adapter.ms_deform_attn_sample(value, locations, weights, _flat(source_grids))
    return ms_deform_attn_sample_reference(value, locations, weights, source_grids)


def _use_native(value: Tensor, implementation: str) -> bool:
    """Whether to run natively. An exported graph is for other runtimes, which know PyTorch's operators only."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    has_kernel = value.dtype != torch.float64 or value.device.type == "cpu"
    if implementation == "auto" and (exporting or not has_kernel):
        return False
    return use_native(value.device.type, implementation)


def _as_grids(grids: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(height, width) for height, width in grids]


def _flat(grids: Sequence[tuple[int, int]]) -> list[int]:
    return [size for grid in grids for size in grid]


def _cells(grids: Sequence[tuple[int, int]]) -> int:
    return sum(height * width for height, width in grids)


def _check_shapes(value: Tensor, places: Tensor, weights: Tensor, source_grids: Sequence[tuple[int, int]]) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be (batch, tokens, heads, channels), but has shape {tuple(value.shape)}")
    if weights.ndim != 4 or weights.shape[0] != value.shape[0] or weights.shape[2] != value.shape[2]:
        raise ValueError(
            f"one weight for every (picture, query, head, sample) of value {tuple(value.shape)} is needed, "
            f"but got {tuple(weights.shape)}"
        )
    if places.shape != (*weights.shape, 2):
        raise ValueError(
            f"an (x, y) for each of {tuple(weights.shape)} samples is needed, but got {tuple(places.shape)}"
        )
    if _cells(source_grids) != value.shape[1]:
        raise ValueError(f"source_grids hold {_cells(source_grids)} cells, but value has {value.shape[1]} tokens")
    if not source_grids or weights.shape[3] % len(source_grids):
        raise ValueError(f"{weights.shape[3]} samples a head do not divide among {len(source_grids)} levels")
