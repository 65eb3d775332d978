"""Configuration of the ViT-Adapter backbone.

Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023, https://arxiv.org/abs/2205.08534.
"""

import itertools

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

DEFAULT_NUM_STAGES = 4
DEFAULT_WINDOW_SIZE = 14


@strict
class ViTAdapterConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""What a ViT-Adapter backbone is. The defaults are the published DINOv2-S adapter.

    The plain ViT:

    Args:
        hidden_size: Width C of the tokens.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Attention heads of a block; they divide `hidden_size`.
        mlp_ratio: Width of the feed-forward network over `hidden_size`.
        intermediate_size: Width of the feed-forward network; `None` derives it from `mlp_ratio`. With SwiGLU that is
            DINOv2's rule, two thirds of it rounded up to a multiple of 8.
        hidden_act: Activation of the feed-forward network; SwiGLU always gates with SiLU.
        use_swiglu_ffn: SwiGLU in place of the two-layer feed-forward network (DINOv2 ViT-g).
        qkv_bias: Whether the query, key and value projections have a bias.
        key_bias: Whether the key projection keeps its bias (DINOv3 drops it).
        layer_norm_eps: Epsilon of every layer norm.
        layerscale_value: Initial value of the layer scales; `None` for blocks without layer scale.
        drop_path_rate: Stochastic depth: rises linearly from 0 over the blocks to this rate; the extractors use the
            full rate.
        patch_size: Side of a patch in pixels. The four maps have strides 4 to 32, so only 16 is possible.
        image_size: Side in pixels of the square pictures of pre-training; `image_size / patch_size` is the side of the
            stored grid of position embeddings.
        num_channels: Channels of a picture.
        position_embedding_type: `"learned"` or `"rope"` (DINOv3).
        rope_theta: Base of the rotary frequencies.
        num_prefix_tokens: Class and register tokens that the model keeps. 0 in every published detector. They take
            part in global blocks and pass windowed blocks unchanged.
        window_sizes: One entry a block: the side of its attention windows in patches, 0 for global attention. `None`:
            14 everywhere but in the last block of each stage, which is global.
        initializer_range: Standard deviation of the adapter's linear layers.

    The adapter:

    Args:
        interaction_indexes: First and last block of each stage. `None`: four equal stages.
        spatial_prior_channels: Width of the convolutional stem.
        deformable_num_heads: Heads of the deformable attention; they divide its width.
        deformable_num_points: Sampling points of a head on each level.
        deformable_value_ratio: Width of the sampled values over `hidden_size`.
        num_extra_extractors: Extractors that follow the last stage's own.
        conv_ffn_ratio: Width of the extractors' convolutional feed-forward network over `hidden_size`; 0 for none.
        injector_scale_init: Initial value of the injectors' per-channel scale.
        add_vit_features: Whether the ViT's last tokens are added to all four maps.

    The backbone's stages are `stage1` to `stage4`, the maps at strides 4, 8, 16 and 32; `out_features` or
    `out_indices` choose among them, and by default only the last is returned.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has the wrong type, or fields contradict each other; the
            message names both sides.
    """

    model_type = "vit_adapter"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float | int = 4
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    layer_norm_eps: float = 1e-6
    layerscale_value: float | int | None = 1.0
    drop_path_rate: float | int = 0.2
    patch_size: int = 16
    image_size: int = 592
    num_channels: int = 3
    position_embedding_type: str = "learned"
    rope_theta: float | int = 100.0
    num_prefix_tokens: int = 0
    window_sizes: list[int] | tuple[int, ...] | None = None
    initializer_range: float = 0.02

    interaction_indexes: list[list[int]] | list[tuple[int, ...]] | tuple[tuple[int, ...], ...] | None = None
    spatial_prior_channels: int = 64
    deformable_num_heads: int = 6
    deformable_num_points: int = 4
    deformable_value_ratio: float | int = 1.0
    num_extra_extractors: int = 2
    conv_ffn_ratio: float | int = 0.25
    injector_scale_init: float | int = 0.0
    add_vit_features: bool = True

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.interaction_indexes is None:
            bounds = [stage * self.num_hidden_layers // DEFAULT_NUM_STAGES for stage in range(DEFAULT_NUM_STAGES + 1)]
            self.interaction_indexes = [[first, end - 1] for first, end in itertools.pairwise(bounds)]
        self.interaction_indexes = [list(stage) for stage in self.interaction_indexes]
        if self.window_sizes is None:
            last_blocks = {stage[-1] for stage in self.interaction_indexes}
            self.window_sizes = [
                0 if block in last_blocks else DEFAULT_WINDOW_SIZE for block in range(self.num_hidden_layers)
            ]
        self.window_sizes = list(self.window_sizes)
        if self.intermediate_size is None:
            self.intermediate_size = int(self.hidden_size * self.mlp_ratio)
            if self.use_swiglu_ffn:
                self.intermediate_size = (int(self.intermediate_size * 2 / 3) + 7) // 8 * 8
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def deformable_value_size(self) -> int:
        """Width of the sampled values, shared out among the deformable heads."""
        return int(self.hidden_size * self.deformable_value_ratio)

    def validate_counts(self):  # first: validators run in the order of their names
        least = {
            "hidden_size": 1,
            "num_attention_heads": 1,
            "num_channels": 1,
            "num_prefix_tokens": 0,
            "spatial_prior_channels": 1,
            "deformable_num_heads": 1,
            "deformable_num_points": 1,
            "num_extra_extractors": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, but at least {smallest} was expected.")

    def validate_patches(self):
        if self.patch_size != 16:
            raise ValueError(
                f"patch_size is {self.patch_size}, but the adapter's maps at strides 4 to 32 need patches of 16 "
                "pixels: resize the patch embedding (vit-adapter convert does it for DINOv2's 14)."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}, which is no multiple of patch_size {self.patch_size}: it is the "
                "side of the stored position embedding in pixels, 592 for DINOv2's 37 x 37 grid."
            )
        if self.position_embedding_type not in ("learned", "rope"):
            raise ValueError(
                f'position_embedding_type is "{self.position_embedding_type}", but "learned" or "rope" was expected.'
            )

    def validate_widths(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}."
            )
        if self.deformable_value_size == 0 or self.deformable_value_size % self.deformable_num_heads:
            raise ValueError(
                f"deformable_num_heads {self.deformable_num_heads} does not divide the width of the sampled values, "
                f"hidden_size x deformable_value_ratio = {self.deformable_value_size}."
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rope" and head_dim % 4:
            raise ValueError(
                f"Rotary position embeddings rotate pairs in two directions and need a head width that is a multiple "
                f"of 4, but hidden_size / num_attention_heads is {head_dim}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}, but a probability in [0, 1) was expected.")

    def validate_stages(self):
        if not self.interaction_indexes or any(len(stage) != 2 for stage in self.interaction_indexes):
            raise ValueError(
                f"interaction_indexes is {self.interaction_indexes}, but [first, last] block of each stage was "
                "expected."
            )
        expected = 0
        for first, last in self.interaction_indexes:
            if first != expected or last < first:
                raise ValueError(
                    f"The stages {self.interaction_indexes} leave a gap or overlap: the stage [{first}, {last}] "
                    f"should begin at block {expected} and hold at least one block."
                )
            expected = last + 1
        if expected != self.num_hidden_layers:
            raise ValueError(
                f"The stages {self.interaction_indexes} end at block {expected - 1}, but there are num_hidden_layers "
                f"{self.num_hidden_layers} blocks, the last of which is {self.num_hidden_layers - 1}."
            )
        if len(self.window_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"window_sizes has {len(self.window_sizes)} entries, but one for each of the {self.num_hidden_layers} "
                "blocks was expected (0 for global attention)."
            )
        if any(size < 0 for size in self.window_sizes):
            raise ValueError(f"window_sizes is {self.window_sizes}, but sizes of at least 0 were expected.")


AutoConfig.register(ViTAdapterConfig.model_type, ViTAdapterConfig, exist_ok=True)

__all__ = ["ViTAdapterConfig"]
