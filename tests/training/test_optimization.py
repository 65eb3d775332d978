"""Parameter groups, learning rates and two optimizer steps against the original release."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, Dinov2Config, ResNetConfig

from vit_adapter.conversion.detector import config_from_reference, state_from_reference, state_to_reference
from vit_adapter.modeling_vit_adapter import matching
from vit_adapter.modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation
from vit_adapter.training.optimization import learning_rate_factor, parameter_groups

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
MANIFESTS = sorted((REFERENCE / "manifests").glob("*.json"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_groups_are_those_of_the_published_configuration(path):
    manifest = json.loads(path.read_text())
    config = config_from_reference(manifest["resolved_config"]["model"])
    with torch.device("meta"):
        model = MaskRcnnForInstanceSegmentation(config)
    optimizer = manifest["resolved_config"]["optimizer"]
    groups = parameter_groups(
        model,
        lr=optimizer["lr"],
        weight_decay=optimizer["weight_decay"],
        layer_decay_rate=optimizer["paramwise_cfg"].get("layer_decay_rate"),
    )

    # Each parameter is filled with the number of its group and then renamed (and query, key, value joined).
    state = {
        name: torch.zeros((), dtype=torch.uint8).expand(value.shape) for name, value in model.state_dict().items()
    }
    for number, group in enumerate(groups):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state[name] = torch.tensor(number, dtype=torch.uint8).expand(parameter.shape)
    renamed = state_to_reference(state, config)
    for name, (_, lr_scale, lr, weight_decay) in manifest["param_groups"].items():
        (number,) = renamed[name].unique().tolist()
        group = groups[number]
        found = (group["lr_scale"], group["lr"], group["weight_decay"])
        assert found == pytest.approx((lr_scale, lr, weight_decay), rel=1e-12), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_position_and_level_embeddings_do_not_decay_as_intended():
    manifest = json.loads((REFERENCE / "manifests" / "mask_rcnn_dinov2_adapter_small_fpn_3x_coco.json").read_text())
    with torch.device("meta"):
        model = MaskRcnnForInstanceSegmentation(config_from_reference(manifest["resolved_config"]["model"]))
    decays = {
        quirks: {
            name: group["weight_decay"] > 0
            for group in parameter_groups(
                model, lr=1.0, weight_decay=0.05, layer_decay_rate=0.7, reference_quirks=quirks
            )
            for name in group["names"]
        }
        for quirks in (True, False)
    }
    differing = {name for name in decays[True] if decays[True][name] != decays[False][name]}
    assert differing == {"backbone.embeddings.position_embeddings", "backbone.spatial_prior.level_embeddings"}


def test_one_dimensional_parameters_never_decay_as_intended():
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, reference_quirks=False)
    decaying = [name for group in groups if group["weight_decay"] for name in group["names"]]
    assert decaying == ["backbone.0.weight"]


def test_layer_decay_works_on_backbones_of_transformers():
    backbone = AutoBackbone.from_config(Dinov2Config(hidden_size=8, num_hidden_layers=3, num_attention_heads=2))
    groups = parameter_groups(backbone, lr=1.0, weight_decay=0.1, layer_decay_rate=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["embeddings.patch_embeddings.projection.weight"] == 0.5**4
    assert scale["embeddings.position_embeddings"] == 0.5**4
    assert scale["encoder.layer.0.norm1.weight"] == 0.5**3
    assert scale["encoder.layer.2.norm1.weight"] == 0.5
    assert scale["layernorm.weight"] == 1


def test_layer_decay_of_a_backbone_without_blocks_is_refused():
    backbone = AutoBackbone.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match="needs transformer blocks, but ResNetBackbone"):
        parameter_groups(backbone, lr=1.0, weight_decay=0.1, layer_decay_rate=0.5)


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model, lr=1.0, weight_decay=0.1)
    assert group["names"] == ["weight"]


@pytest.mark.parametrize("table", ["3x_coco", "short_epochs_warmup_crosses_epochs"])
def test_learning_rates_are_the_references(reference_case, table):
    facts = reference_case("learning_rate").facts
    schedule = facts["tables"][table]
    factor = learning_rate_factor(
        steps_per_epoch=schedule["iters_per_epoch"],
        decay_epochs=schedule["step"],
        decay_factor=facts["gamma"],
        warmup_steps=facts["warmup_iters"],
        warmup_ratio=facts["warmup_ratio"],
    )
    for row in schedule["rows"]:
        found = [1e-4 * scale * factor(row["iter"]) for scale in (1, 0.7, 0.7**13)]
        assert found == pytest.approx(row["lr"], rel=1e-12), row["iter"]


def test_the_factor_drives_torchs_own_scheduler():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    factor = learning_rate_factor(steps_per_epoch=2, decay_epochs=[1], warmup_steps=1, warmup_ratio=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 2.0, 0.2, 0.2])


def test_a_step_of_adamw_gives_the_references_weights_and_next_loss(reference_case, monkeypatch):
    case, inference = reference_case("detector_training"), reference_case("detector_inference")
    monkeypatch.setattr(matching, "choose", lambda candidates, count, generator=None: candidates[:count])
    config = config_from_reference(case.facts["model_config"])
    model = MaskRcnnForInstanceSegmentation(config)
    model.load_state_dict(state_from_reference(inference.weights, config))
    model.train()
    facts = case.facts["optimizer_steps"]
    lr, weight_decay, rate = facts["lr"], facts["weight_decay"], facts["layer_decay_rate"]
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, layer_decay_rate=rate)
    optimizer = torch.optim.AdamW(groups)
    pixel_values = case.pictures("u8")
    pixel_mask = torch.zeros(pixel_values.shape[0], *pixel_values.shape[-2:], dtype=torch.int64)
    labels = []
    for picture, meta in enumerate(case.facts["img_metas"]):
        height, width, _ = meta["img_shape"]
        pixel_mask[picture, :height, :width] = 1
        names = {"boxes": "gt_bboxes", "class_labels": "gt_labels", "masks": "gt_masks"}
        labels.append({key: case.tensors[f"{name}.{picture}"] for key, name in names.items()})

    losses = []
    for _ in range(2):
        loss = model(pixel_values, pixel_mask, labels).loss
        losses.append(loss.item())
        if len(losses) == 1:
            loss.backward()
            optimizer.step()
    assert losses == pytest.approx(facts["loss_before_each_step"], rel=1e-4)

    # Adam's first step in closed form, from the reference's gradients. (Its stored weights after two steps are those
    # from before the first, so there is nothing to compare in them.)
    found = state_to_reference(model.state_dict(), config)
    scales = {"backbone.patch_embed.": rate**5, "backbone.pos_embed": rate**5}
    scales |= {f"backbone.blocks.{block}.": rate ** (4 - block) for block in range(4)}
    gradients = {
        name.removeprefix("first.bn_train.grad."): tensor
        for name, tensor in case.tensors.items()
        if name.startswith("first.bn_train.grad.")
    }
    assert len(gradients) > 20
    for name, gradient in gradients.items():
        before = inference.weights[name]
        step = lr * next((scale for start, scale in scales.items() if name.startswith(start)), 1.0)
        decayed = before * (1 - step * (weight_decay if before.ndim > 1 else 0))
        expected = decayed - step * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # where the sign is beyond float32's doubt
        torch.testing.assert_close(found[name][clear], expected[clear], atol=1e-3 * step, rtol=0)
