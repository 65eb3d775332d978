"""What PyTorch must know of the native operators beside their kernels: output shapes and derivatives.

Shapes make `torch.compile` and `torch.export` see through the operators without running them.
"""

from typing import Any

import torch
from torch import Tensor

_Grids = list[int]  # height, width, height, width ...


def register() -> None:
    """Registers shapes and derivatives. To be called once, after the library with the operators is loaded."""
    for name, shapes in (("ms_deform_attn", _attention_shape), ("ms_deform_attn_sample", _sample_shape)):
        torch.library.register_fake(f"vit_adapter::{name}", shapes)
        torch.library.register_fake(f"vit_adapter::{name}_backward", _gradient_shapes)
        torch.library.register_autograd(f"vit_adapter::{name}_backward", _refuse, setup_context=_forget)
    torch.library.register_autograd(
        "vit_adapter::ms_deform_attn", _attention_gradients, setup_context=_remember_attention
    )
    torch.library.register_autograd(
        "vit_adapter::ms_deform_attn_sample", _sample_gradients, setup_context=_remember_sample
    )


def _attention_shape(
    value: Tensor, offsets: Tensor, logits: Tensor, source_grids: _Grids, query_grids: _Grids, points: int
) -> Tensor:
    return _sample_shape(value, offsets, logits, source_grids)


def _sample_shape(value: Tensor, locations: Tensor, weights: Tensor, source_grids: _Grids) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, weights.shape[1], heads * channels))


def _gradient_shapes(
    grad_output: Tensor, value: Tensor, places: Tensor, weights: Tensor, *grids_and_points: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), places.new_empty(places.shape), weights.new_empty(weights.shape)


def _remember_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, offsets, logits, ctx.source_grids, ctx.query_grids, ctx.points = inputs
    ctx.save_for_backward(value, offsets, logits)


def _attention_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vit_adapter.ms_deform_attn_backward(
        grad_output, *ctx.saved_tensors, ctx.source_grids, ctx.query_grids, ctx.points
    )
    return *gradients, None, None, None


def _remember_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, ctx.source_grids = inputs
    ctx.save_for_backward(value, locations, weights)


def _sample_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vit_adapter.ms_deform_attn_sample_backward(grad_output, *ctx.saved_tensors, ctx.source_grids)
    return *gradients, None


def _forget(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *grad_outputs: Tensor) -> None:
    raise RuntimeError(
        "the native ms_deform_attn has first derivatives only; pass implementation='reference' for second ones"
    )
