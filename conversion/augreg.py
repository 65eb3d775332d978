"""AugReg ViT (Steiner et al., 2021, https://arxiv.org/abs/2106.10270): JAX `.npz`, and `.pth` or timm files.

JAX layout: a dense kernel is (in, out), a convolution (height, width, in, out), the query, key and value kernels are
(C, heads, head_dim) with biases (heads, head_dim), and the output projection is (heads, head_dim, C).
"""

import torch

from .deit import DEIT, NO_LAYER_SCALE
from .dinov2 import ADAPTER_IS_NEW, NO_CLASSIFIER, NO_FINAL_NORM, NO_PREFIX_TOKENS
from .mapping import Drop, Rename, Shape, Table
from .patch_embedding import resize_patches, resize_positions

AUGREG: Table = (
    *DEIT,
    Drop("pre_logits.{rest}", NO_CLASSIFIER),
)


def _transposed(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A dense kernel (in, out) as (out, in)."""
    return kernel.mT


def _heads_last(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A query, key or value kernel (C, heads, head_dim) as (heads · head_dim, C)."""
    return kernel.flatten(1).mT


def _heads_first(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The output projection (heads, head_dim, C) as (C, heads · head_dim)."""
    return kernel.flatten(0, 1).mT


def _flat(bias: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A bias (heads, head_dim) as (heads · head_dim)."""
    return bias.flatten()


def _patches(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A convolution (height, width, in, out) as (out, in, height, width), at the side that is asked for."""
    return resize_patches(kernel.permute(3, 2, 0, 1), shape)


_BLOCK, _LAYER = "Transformer/encoderblock_{i}/", "layers.{i}."
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"

AUGREG_JAX: Table = (
    Rename("embedding/kernel", "embeddings.patch_embeddings.projection.weight", _patches),
    Rename("embedding/bias", "embeddings.patch_embeddings.projection.bias"),
    Rename("Transformer/posembed_input/pos_embedding", "embeddings.position_embeddings", resize_positions),
    Rename(_BLOCK + "LayerNorm_0/scale", _LAYER + "norm1.weight"),
    Rename(_BLOCK + "LayerNorm_0/bias", _LAYER + "norm1.bias"),
    Rename(_ATTENTION + "query/kernel", _LAYER + "attention.q_proj.weight", _heads_last),
    Rename(_ATTENTION + "query/bias", _LAYER + "attention.q_proj.bias", _flat),
    Rename(_ATTENTION + "key/kernel", _LAYER + "attention.k_proj.weight", _heads_last),
    Rename(_ATTENTION + "key/bias", _LAYER + "attention.k_proj.bias", _flat),
    Rename(_ATTENTION + "value/kernel", _LAYER + "attention.v_proj.weight", _heads_last),
    Rename(_ATTENTION + "value/bias", _LAYER + "attention.v_proj.bias", _flat),
    Rename(_ATTENTION + "out/kernel", _LAYER + "attention.o_proj.weight", _heads_first),
    Rename(_ATTENTION + "out/bias", _LAYER + "attention.o_proj.bias"),
    Rename(_BLOCK + "LayerNorm_2/scale", _LAYER + "norm2.weight"),
    Rename(_BLOCK + "LayerNorm_2/bias", _LAYER + "norm2.bias"),
    Rename(_BLOCK + "MlpBlock_3/Dense_{n}/kernel", _LAYER + "mlp.fc{n+1}.weight", _transposed),
    Rename(_BLOCK + "MlpBlock_3/Dense_{n}/bias", _LAYER + "mlp.fc{n+1}.bias"),
    *NO_LAYER_SCALE,
    Drop("cls", NO_PREFIX_TOKENS),
    Drop("Transformer/encoder_norm/{rest}", NO_FINAL_NORM),
    Drop("pre_logits/{rest}", NO_CLASSIFIER),
    Drop("head/{rest}", NO_CLASSIFIER),
    *ADAPTER_IS_NEW,
)
