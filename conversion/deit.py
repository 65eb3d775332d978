"""DeiT (Touvron et al., 2021, https://arxiv.org/abs/2012.12877): the authors' `.pth`; timm's files have its names."""

from .detector import TRANSFORMER
from .dinov2 import ADAPTER_IS_NEW, NO_CLASSIFIER, NO_FINAL_NORM, NO_PREFIX_TOKENS, TIMM_EMBEDDINGS
from .mapping import Drop, Fill, Table

IDENTITY = "the source has no layer scale, and one is the identity; it is trained, as in the original"

NO_LAYER_SCALE: Table = (Fill("layers.{i}.layer_scale{n}.scale", 1.0, IDENTITY),)

DEIT: Table = (
    *TIMM_EMBEDDINGS,
    *TRANSFORMER,
    *NO_LAYER_SCALE,
    Drop("cls_token", NO_PREFIX_TOKENS),
    Drop("norm.{leaf}", NO_FINAL_NORM),
    Drop("head.{leaf}", NO_CLASSIFIER),
    *ADAPTER_IS_NEW,
)
