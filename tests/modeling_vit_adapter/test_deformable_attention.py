"""The attention module with its projections against the reference."""

import pytest
import torch

from vit_adapter import ViTAdapterConfig
from vit_adapter.modeling_vit_adapter.deformable_attention import DeformableAttention
from vit_adapter.modeling_vit_adapter.token_pyramid import Grid

# The reference's float32 output, and its reference points in the float64 run, are float32.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


def attention_of(case) -> DeformableAttention:
    facts = case.facts
    config = ViTAdapterConfig(
        hidden_size=facts["d_model"],
        num_attention_heads=1,
        deformable_num_heads=facts["n_heads"],
        deformable_num_points=facts["n_points"],
        deformable_value_ratio=facts["ratio"],
    )
    return DeformableAttention(config, num_levels=facts["n_levels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(3))
def test_outputs_equal_the_reference(index, dtype, reference_case):
    case = reference_case(f"ms_deform_attn_module_{index}")
    attention = attention_of(case)
    attention.load_state_dict(case.weights)
    height, width = case.facts["image_hw"]
    source_grids = tuple(Grid(*shape) for shape in case.facts["spatial_shapes"])
    # One source level: the queries are the pyramid's tokens; three levels: they are the ViT's.
    strides = (8, 16, 32) if len(source_grids) == 1 else (16,)
    query_grids = tuple(Grid(height // stride, width // stride) for stride in strides)
    with torch.no_grad():
        output = attention.to(dtype)(
            case.tensors["query"].to(dtype), case.tensors["feat"].to(dtype), query_grids, source_grids
        )
    expected = case.tensors["output_float64"].to(dtype)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("index", range(3))
def test_initial_offsets_equal_the_reference(index, reference_case):
    case = reference_case(f"ms_deform_attn_module_{index}")
    expected = case.tensors["init.sampling_offsets.bias"]
    torch.testing.assert_close(attention_of(case).initial_offsets(), expected, rtol=0, atol=1e-6)
