"""The ViT-Adapter backbone: four maps at strides 4, 8, 16 and 32 from a plain ViT (Chen et al., ICLR 2023, figure 4).

Shape letters: B batch, C channels, H and W height and width of the picture in pixels.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.output_capturing import capture_outputs

from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .deformable_attention import DeformableAttention
from .interaction import AdapterStage, Injector
from .spatial_prior import SpatialPrior
from .token_pyramid import Grid, TokenPyramid
from .vision_transformer import LayerScale, RotaryPositions, ViTAttention, ViTEmbeddings, ViTLayer

COARSEST_STRIDE = 32


class ParentsInitialize:
    """Lets `_init_weights` see modules without parameters of their own, so that a parent may initialise its children.

    transformers skips those in code from outside its own tree, to guard against rules that overwrite loaded weights.
    Ours never do: `transformers.initialization` looks at each tensor.
    """

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module, is_custom_code=False)  # type: ignore[misc]  # PreTrainedModel's


class ViTAdapterPreTrainedModel(ParentsInitialize, PreTrainedModel):
    """Initialisation, and what the model can do within transformers."""

    config: ViTAdapterConfig
    base_model_prefix = "vit_adapter"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "SpatialPrior", "ViTLayer", "Injector", "Extractor"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": ViTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation of whatever no checkpoint fills.

        Modules come children first, so the rule of a parent overrides the general one for linear layers and
        convolutions, which is the adapter's.
        """
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            _zero_bias(module)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            _zero_bias(module)
        elif isinstance(module, nn.ConvTranspose2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            _zero_bias(module)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            super()._init_weights(module)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale, module.initial_value)
        elif isinstance(module, Injector):
            init.constant_(module.scale, module.initial_scale)
        elif isinstance(module, SpatialPrior):
            init.normal_(module.level_embeddings)
        elif isinstance(module, DeformableAttention):
            init.zeros_(module.sampling_offsets.weight)
            init.copy_(module.sampling_offsets.bias, module.initial_offsets())
            init.zeros_(module.attention_weights.weight)
            init.xavier_uniform_(module.value_proj.weight)
            init.xavier_uniform_(module.output_proj.weight)
        elif isinstance(module, ViTEmbeddings):
            if module.position_embeddings is not None:
                init.zeros_(module.position_embeddings)
            if module.num_prefix_tokens:
                init.trunc_normal_(module.prefix_tokens, std=self.config.initializer_range)
            _init_as_torch(module.patch_embeddings.projection)
        elif isinstance(module, ViTLayer):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    _init_as_torch(layer)


def _zero_bias(module: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    if module.bias is not None:
        init.zeros_(module.bias)


def _init_as_torch(module: nn.Linear | nn.Conv2d) -> None:
    """PyTorch's default, which the reference leaves to the transformer's own layers."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        bound = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.bias, -bound, bound)


class ViTAdapterBackbone(BackboneMixin, ViTAdapterPreTrainedModel):
    """A plain ViT with its adapter as a transformers backbone.

    Its stages are `stage1` to `stage4`, maps (B, C, H / s, W / s) at strides s of 4, 8, 16 and 32;
    `config.out_features` chooses which are returned. `hidden_states` are the tokens of the ViT before the first block
    and after each.

    Raises:
        ValueError: The configuration asks for the map of the stem, which the adapter has not.
    """

    def __init__(self, config: ViTAdapterConfig):
        super().__init__(config)
        if "stem" in self.out_features:
            raise ValueError(
                f"out_features is {self.out_features}, but the adapter has maps stage1 to stage4 (out_indices 1 to 4)."
            )
        self.num_features = [config.hidden_size] * len(self.stage_names)
        self.embeddings = ViTEmbeddings(config)
        self.rotary_positions = RotaryPositions(config) if config.position_embedding_type == "rope" else None
        self.layers = nn.ModuleList(ViTLayer(config, index) for index in range(config.num_hidden_layers))
        self.spatial_prior = SpatialPrior(config)
        # First and last block of each stage; the configuration fills them in where they were None.
        self.block_ranges = cast(Sequence[Sequence[int]], config.interaction_indexes)
        last = len(self.block_ranges) - 1
        self.stages: Any = nn.ModuleList(  # which cannot say that it holds AdapterStages
            AdapterStage(config, num_extractors=1 + (config.num_extra_extractors if stage == last else 0))
            for stage in range(last + 1)
        )
        self.upsample = nn.ConvTranspose2d(config.hidden_size, config.hidden_size, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(config.hidden_size) for _ in self.stage_names[1:])
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Maps of a batch of pictures.

        Args:
            pixel_values: (B, 3, H, W), normalised, H and W multiples of 32.

        Raises:
            ValueError: No batch of pictures, sides that are no multiple of 32, or another number of channels than the
                model's.
        """
        self._check_input(pixel_values)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        finest, prior = self.spatial_prior(pixel_values)
        grid = prior.grids[1]  # the ViT's patches have the stride of the prior's middle level
        tokens = self.embeddings(pixel_values, grid)
        rotation = self.rotary_positions and self.rotary_positions(grid, tokens.device, tokens.dtype)
        for stage, (first, last) in zip(self.stages, self.block_ranges, strict=True):
            prefix, vit = self._split_prefix(tokens, grid)
            tokens = self._join_prefix(prefix, stage.inject(vit, prior))
            for layer in self.layers[first : last + 1]:
                tokens = layer(tokens, grid, rotation, **kwargs)
            _, vit = self._split_prefix(tokens, grid)
            prior = stage.extract(prior, vit)
        maps = self._feature_maps(finest, prior, vit)
        return BackboneOutput(feature_maps=maps)  # type: ignore[arg-type]  # transformers writes a tuple of one map

    def _split_prefix(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, TokenPyramid]:
        prefix, patches = tokens.tensor_split([self.config.num_prefix_tokens], dim=1)
        return prefix, TokenPyramid(patches, (grid,))

    def _join_prefix(self, prefix: Tensor, vit: TokenPyramid) -> Tensor:
        return torch.cat([prefix, vit.tokens], dim=1) if self.config.num_prefix_tokens else vit.tokens

    def _feature_maps(self, finest: Tensor, prior: TokenPyramid, vit: TokenPyramid) -> tuple[Tensor, ...]:
        stride8, stride16, stride32 = prior.maps()
        maps = [finest + self.upsample(stride8), stride8, stride16, stride32]
        if self.config.add_vit_features:
            (tokens,) = vit.maps()
            maps = [feature + _resize(tokens, factor) for feature, factor in zip(maps, (4, 2, 1, 0.5), strict=True)]
        return tuple(
            norm(feature)
            for name, norm, feature in zip(self.stage_names[1:], self.norms, maps, strict=True)
            if name in self.out_features
        )

    def _check_input(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but (pictures, channels, height, width) was "
                "expected: give a single picture as a batch of one."
            )
        _, channels, height, width = pixel_values.shape
        if channels != self.config.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels, but the model was built for {self.config.num_channels}."
            )
        if height % COARSEST_STRIDE or width % COARSEST_STRIDE:
            raise ValueError(
                f"pixel_values is {height} x {width} pixels, but both sides must be multiples of {COARSEST_STRIDE}: "
                "pad the pictures at the right and bottom, as MaskRcnnImageProcessor does."
            )


def _resize(feature: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return feature
    return F.interpolate(feature, scale_factor=factor, mode="bilinear", align_corners=False)


__all__ = ["ViTAdapterBackbone", "ViTAdapterPreTrainedModel"]
