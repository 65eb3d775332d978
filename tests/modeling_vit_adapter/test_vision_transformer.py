"""Parts of the plain ViT on inputs that can be checked by hand, and against transformers' models."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from vit_adapter import ViTAdapterConfig
from vit_adapter.modeling_vit_adapter.token_pyramid import Grid
from vit_adapter.modeling_vit_adapter.vision_transformer import (
    DropPath,
    RotaryPositions,
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    from_windows,
    to_windows,
)

# Different kernels add up in different orders: float32 rounding of activations of about 1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def tiny_config(**arguments) -> ViTAdapterConfig:
    values = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "deformable_num_heads": 2,
        "interaction_indexes": [[0, 0], [1, 1]], "image_size": 48, "window_sizes": [0, 0], "drop_path_rate": 0.0,
    }  # fmt: skip
    return ViTAdapterConfig(**{**values, **arguments})


def test_windows_are_cut_from_the_top_left_and_padded_with_zeros():
    states = torch.arange(1.0, 7.0).reshape(1, 1, 6, 1)  # 1 2 3 / 4 5 6
    windows = to_windows(states, Grid(2, 3), 2)
    assert windows.squeeze().tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]


@pytest.mark.parametrize(("grid", "window"), [(Grid(4, 6), 2), (Grid(5, 7), 3), (Grid(2, 3), 14)])
def test_from_windows_inverts_to_windows(grid, window):
    states = torch.randn(2, 3, grid.area, 5)
    windows = to_windows(states, grid, window).transpose(1, 2)
    assert torch.equal(from_windows(windows, grid, window), states.transpose(1, 2))


def test_padded_positions_take_part_in_the_softmax():
    config = tiny_config(window_sizes=[3, 0], num_attention_heads=1, _attn_implementation="eager")
    attention = ViTAttention(config, window=3)
    # One token in a window of nine: eight padded keys of logit 0 join it, which is also its own logit here.
    torch.nn.init.zeros_(attention.k_proj.weight)
    torch.nn.init.zeros_(attention.k_proj.bias)
    _, weights = attention(torch.randn(1, 1, 16), Grid(1, 1), None)
    assert weights.shape == (1, 1, 9, 9) and torch.allclose(weights, torch.tensor(1 / 9))


@pytest.mark.parametrize("window", [0, 3])
def test_sdpa_equals_eager_attention(window):
    torch.manual_seed(0)
    tokens, grid = torch.randn(2, 20, 16), Grid(4, 5)
    attention = ViTAttention(tiny_config(_attn_implementation="eager"), window)
    expected, _ = attention(tokens, grid, None)
    attention.config._attn_implementation = "sdpa"
    torch.testing.assert_close(attention(tokens, grid, None)[0], expected, **ROUNDING)


def test_positions_are_not_resized_when_the_grid_is_the_stored_one():
    embeddings = ViTEmbeddings(tiny_config())
    torch.nn.init.normal_(embeddings.position_embeddings)
    assert torch.equal(embeddings.interpolate_positions(Grid(3, 3)), embeddings.position_embeddings[:, 1:])


def test_slot_of_the_class_token_changes_nothing_without_prefix_tokens():
    embeddings = ViTEmbeddings(tiny_config())
    pixel_values = torch.randn(1, 3, 32, 64)
    before = embeddings(pixel_values, Grid(2, 4))
    with torch.no_grad():
        embeddings.position_embeddings[:, 0] = 7
    assert torch.equal(embeddings(pixel_values, Grid(2, 4)), before)


def test_drop_path_keeps_or_drops_whole_pictures_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert torch.equal(dropped.amin(dim=(1, 2)), dropped.amax(dim=(1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)  # four standard deviations of 4000 draws


def test_drop_path_does_nothing_outside_training():
    branch = torch.randn(3, 2)
    assert torch.equal(DropPath(0.9).eval()(branch), branch)


def test_drop_path_rises_linearly_over_the_blocks():
    config = tiny_config(num_hidden_layers=3, interaction_indexes=[[0, 2]], window_sizes=[0] * 3, drop_path_rate=0.4)
    assert [ViTLayer(config, index).drop_path.rate for index in range(3)] == [0.0, 0.2, 0.4]


def test_prefix_tokens_pass_windowed_blocks_unchanged():
    config = tiny_config(num_prefix_tokens=2, window_sizes=[2, 0])
    tokens = torch.randn(1, 2 + 6, 16)
    windowed, global_ = ViTLayer(config, 0)(tokens, Grid(2, 3)), ViTLayer(config, 1)(tokens, Grid(2, 3))
    assert torch.equal(windowed[:, :2], tokens[:, :2]) and not torch.equal(global_[:, :2], tokens[:, :2])


def copy_block(layer: ViTLayer, other: torch.nn.Module) -> None:
    """Weights of a block of transformers, whose names differ from ours in the layer scales and in DINOv3's MLP."""
    names = {"lambda1": "scale"} if hasattr(layer.mlp, "gate_proj") else {
        "lambda1": "scale", "up_proj": "fc1", "down_proj": "fc2"
    }  # fmt: skip
    state = other.state_dict()
    for theirs, ours in names.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    layer.load_state_dict(state)


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_blocks_equal_those_of_dinov2_in_transformers(use_swiglu_ffn):
    torch.manual_seed(0)
    theirs = Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=48,
            use_swiglu_ffn=use_swiglu_ffn, layerscale_value=0.3, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    config = tiny_config(num_prefix_tokens=1, use_swiglu_ffn=use_swiglu_ffn, _attn_implementation="sdpa")
    embeddings = ViTEmbeddings(config)
    embeddings.load_state_dict(
        {
            "patch_embeddings.projection.weight": theirs.embeddings.patch_embeddings.projection.weight,
            "patch_embeddings.projection.bias": theirs.embeddings.patch_embeddings.projection.bias,
            "position_embeddings": theirs.embeddings.position_embeddings,
            "prefix_tokens": theirs.embeddings.cls_token,
        }
    )
    pixel_values = torch.randn(2, 3, 64, 96)
    grid = Grid(4, 6)
    tokens = embeddings(pixel_values, grid)
    for index, other in enumerate(theirs.encoder.layer):
        layer = ViTLayer(config, index)
        copy_block(layer, other)
        tokens = layer(tokens, grid)
    torch.testing.assert_close(theirs.layernorm(tokens), theirs(pixel_values).last_hidden_state, **ROUNDING)


def test_blocks_with_rotary_positions_equal_those_of_dinov3_in_transformers():
    torch.manual_seed(0)
    theirs = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16,
            num_register_tokens=3, layerscale_value=0.3, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    config = tiny_config(
        num_prefix_tokens=4, position_embedding_type="rope", key_bias=False,
        layer_norm_eps=theirs.config.layer_norm_eps, _attn_implementation="sdpa",
    )  # fmt: skip
    embeddings, rotary = ViTEmbeddings(config), RotaryPositions(config)
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.copy_(theirs.embeddings.patch_embeddings.weight)
        embeddings.patch_embeddings.projection.bias.copy_(theirs.embeddings.patch_embeddings.bias)
        embeddings.prefix_tokens.copy_(torch.cat([theirs.embeddings.cls_token, theirs.embeddings.register_tokens], 1))
    pixel_values = torch.randn(2, 3, 64, 96)
    grid = Grid(4, 6)
    tokens = embeddings(pixel_values, grid)
    rotation = rotary(grid, tokens.device, tokens.dtype)
    for index, other in enumerate(theirs.model.layer):
        layer = ViTLayer(config, index)
        copy_block(layer, other)
        tokens = layer(tokens, grid, rotation)
    torch.testing.assert_close(theirs.norm(tokens), theirs(pixel_values).last_hidden_state, **ROUNDING)
