"""DINOv2 (Oquab et al., 2023, https://arxiv.org/abs/2304.07193), with registers (Darcet et al., 2023) or without.

Three ways of writing the same weights: the authors' `.pth` (also after the original's 14-to-16 script, and timm's
files, whose names agree), timm's packed SwiGLU, and Hugging Face's, which has had two generations of names on disk.
"""

from .detector import LAYER_SCALE, TRANSFORMER
from .mapping import Drop, New, Rename, Split, Table
from .patch_embedding import resize_patches, resize_positions

NO_PREFIX_TOKENS = "the published detectors keep neither class nor register tokens"
NO_FINAL_NORM = "the adapter takes the tokens before the final norm"
NO_MASKING = "only masked pre-training uses it"
NO_CLASSIFIER = "the classification head"
ADAPTERS = "the adapter's own"

ADAPTER_IS_NEW: Table = (
    New("spatial_prior.{rest}", ADAPTERS),
    New("stages.{rest}", ADAPTERS),
    New("upsample.{leaf}", ADAPTERS),
    New("norms.{i}.{leaf}", ADAPTERS),
)

TIMM_EMBEDDINGS: Table = (
    Rename("pos_embed", "embeddings.position_embeddings", resize_positions),
    Rename("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", resize_patches),
    Rename("patch_embed.proj.bias", "embeddings.patch_embeddings.projection.bias"),
)

DINOV2: Table = (
    *TIMM_EMBEDDINGS,
    Rename("blocks.{i}.ls{n}.gamma", "layers.{i}.layer_scale{n}.scale"),
    *LAYER_SCALE,  # after the 14-to-16 script
    *TRANSFORMER,
    Drop("cls_token", NO_PREFIX_TOKENS),
    Drop("register_tokens", NO_PREFIX_TOKENS),
    Drop("reg_token", NO_PREFIX_TOKENS),
    Drop("mask_token", NO_MASKING),
    Drop("norm.{leaf}", NO_FINAL_NORM),
    *ADAPTER_IS_NEW,
)

DINOV2_TIMM_GIANT: Table = (
    # timm's SwiGLUPacked calls gate and value together fc1.
    Split("blocks.{i}.mlp.fc1.{leaf}", ("layers.{i}.mlp.gate_proj.{leaf}", "layers.{i}.mlp.up_proj.{leaf}")),
    Rename("blocks.{i}.mlp.fc2.{leaf}", "layers.{i}.mlp.down_proj.{leaf}"),
    *DINOV2,
)


def _hugging_face(prefix: str) -> Table:
    layer, ours = prefix + "encoder.layer.{i}.", "layers.{i}."
    return (
        Rename(prefix + "embeddings.position_embeddings", "embeddings.position_embeddings", resize_positions),
        Rename(
            prefix + "embeddings.patch_embeddings.projection.weight",
            "embeddings.patch_embeddings.projection.weight",
            resize_patches,
        ),
        Rename(prefix + "embeddings.patch_embeddings.projection.bias", "embeddings.patch_embeddings.projection.bias"),
        Rename(layer + "norm{n}.{leaf}", ours + "norm{n}.{leaf}"),
        Rename(layer + "layer_scale{n}.lambda1", ours + "layer_scale{n}.scale"),
        # the first generation of names, which published files have
        Rename(layer + "attention.attention.query.{leaf}", ours + "attention.q_proj.{leaf}"),
        Rename(layer + "attention.attention.key.{leaf}", ours + "attention.k_proj.{leaf}"),
        Rename(layer + "attention.attention.value.{leaf}", ours + "attention.v_proj.{leaf}"),
        Rename(layer + "attention.output.dense.{leaf}", ours + "attention.o_proj.{leaf}"),
        Split(layer + "mlp.weights_in.{leaf}", (ours + "mlp.gate_proj.{leaf}", ours + "mlp.up_proj.{leaf}")),
        Rename(layer + "mlp.weights_out.{leaf}", ours + "mlp.down_proj.{leaf}"),
        # the second generation
        Rename(layer + "attention.{rest}", ours + "attention.{rest}"),
        Rename(layer + "mlp.{rest}", ours + "mlp.{rest}"),
        Drop(prefix + "embeddings.cls_token", NO_PREFIX_TOKENS),
        Drop(prefix + "embeddings.register_tokens", NO_PREFIX_TOKENS),
        Drop(prefix + "embeddings.mask_token", NO_MASKING),
        Drop(prefix + "layernorm.{leaf}", NO_FINAL_NORM),
    )


DINOV2_HUGGING_FACE: Table = (
    *_hugging_face(""),
    *_hugging_face("dinov2."),  # inside a classifier
    *_hugging_face("dinov2_with_registers."),
    Drop("classifier.{leaf}", NO_CLASSIFIER),
    *ADAPTER_IS_NEW,
)
