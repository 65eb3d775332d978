"""Sources of weights that the tests of this folder write: random values under everybody's names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vit_adapter import ViTAdapterConfig

MANIFESTS = Path(__file__).resolve().parents[1] / "reference" / "manifests"
CLASS_TOKEN, REGISTERS = 1, 4
State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, Any]]:
    """A published configuration by its preset's name: names, shapes, resolved configuration."""

    def load(preset: str) -> dict[str, Any]:
        family, size = preset.split("-")
        file = MANIFESTS / f"mask_rcnn_{family}_adapter_{size}_fpn_3x_coco.json"
        return json.loads(file.read_text(encoding="utf-8"))

    return load


@pytest.fixture(scope="session")
def detector_state(manifest) -> Callable[..., State]:
    """A state dict laid out as a published detector: random values, or shapes alone on the meta device."""

    def build(preset: str, device: str = "cpu") -> State:
        generator = torch.Generator().manual_seed(0) if device == "cpu" else None
        state = {}
        for name, (shape, _) in manifest(preset)["state_dict"].items():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.tensor(7, device=device)
            else:
                state[name] = torch.randn(shape, generator=generator, device=device)
        return state

    return build


@pytest.fixture(scope="session")
def vit_state() -> Callable[..., State]:
    """A plain ViT as timm, DeiT and DINOv2 name it.

    layer_scale: "ls1.gamma" for DINOv2, "gamma1" after its 14-to-16 script, None for DeiT and AugReg.
    """

    def build(
        width: int,
        depth: int,
        side: int,
        *,
        patch: int = 16,
        layer_scale: str | None = None,
        swiglu: int = 0,
        registers: int = 0,
        device: str = "cpu",
    ) -> State:
        generator = torch.Generator().manual_seed(width + depth) if device == "cpu" else None

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5

        state = {"cls_token": random(1, 1, width), "pos_embed": random(1, 1 + side**2, width)}
        if registers:
            state["register_tokens"] = random(1, registers, width)
        if layer_scale:
            state["mask_token"] = random(1, width)
        state |= {"patch_embed.proj.weight": random(width, 3, patch, patch), "patch_embed.proj.bias": random(width)}
        mlp = {"w12": (2 * swiglu, width), "w3": (width, swiglu)} if swiglu else {"fc1": (4 * width, width)}
        mlp |= {} if swiglu else {"fc2": (width, 4 * width)}
        for block in range(depth):
            prefix = f"blocks.{block}."
            linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
            linear |= {f"mlp.{name}": shape for name, shape in mlp.items()}
            for name, (rows, columns) in linear.items():
                state |= {f"{prefix}{name}.weight": random(rows, columns), f"{prefix}{name}.bias": random(rows)}
            for number in "12":
                state |= {
                    f"{prefix}norm{number}.weight": 1 + random(width),
                    f"{prefix}norm{number}.bias": random(width),
                }
                if layer_scale:
                    state[prefix + layer_scale.replace("1", number)] = random(width)
        return state | {"norm.weight": 1 + random(width), "norm.bias": random(width)}

    return build


@pytest.fixture
def small_config() -> Callable[..., ViTAdapterConfig]:
    """A backbone of two blocks, two stages and width 24 that returns its four maps."""

    def build(**others: Any) -> ViTAdapterConfig:
        return ViTAdapterConfig(
            **{
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "deformable_num_heads": 3,
                "image_size": 64,
                "window_sizes": [0, 0],
                "interaction_indexes": [[0, 0], [1, 1]],
                "spatial_prior_channels": 8,
                "drop_path_rate": 0.0,
                "out_indices": [1, 2, 3, 4],
                **others,
            }
        )

    return build
