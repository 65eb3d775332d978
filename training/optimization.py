"""Which parameter learns how fast, and the published learning-rate schedule.

Layer decay: Clark et al., "ELECTRA" (ICLR 2020), section 3.1; Bao et al., "BEiT" (ICLR 2022), for vision transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

NO_DECAY = 0.0


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay_rate: float | None = None,
    reference_quirks: bool = True,
) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, with layer decay over the transformer blocks if a rate is given.

    With n blocks the embeddings are layer 0, block i is layer i + 1 and everything else (adapter, neck, heads) is
    layer n + 1; a layer learns at `lr * layer_decay_rate ** (n + 1 - layer)`.

    One-dimensional parameters (biases, norms, scales) do not decay. The published runs deviate from their own intent,
    and `reference_quirks` follows them: with layer decay, position and level embeddings decay; without it, the scales
    of blocks and injectors and the batch norms of the spatial prior decay.

    Args:
        model: A detector (its `backbone` is looked into) or a backbone, ours or any of transformers.
        lr: Learning rate of layer n + 1.
        weight_decay: Of the parameters that decay.
        layer_decay_rate: Factor from a layer to the one before; None: one rate for all.
        reference_quirks: Whether weight decay follows the published runs or their intent.

    Returns:
        Groups with `params`, their `names`, `lr`, `lr_scale` and `weight_decay`, slowest first.

    Raises:
        ValueError: Layer decay of a backbone without transformer blocks.
    """
    depths = _depths(model) if layer_decay_rate is not None else {}
    if not reference_quirks:
        decays = _decays_as_intended
    elif layer_decay_rate is not None:
        decays = _decays_with_layer_decay
    else:
        decays = _decays_without_layer_decay

    prior = set(_backbone(model).get_submodule("spatial_prior").parameters()) if _has_prior(model) else set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for owner, name, parameter in _owned_parameters(model):
        if not parameter.requires_grad:
            continue
        lr_scale = layer_decay_rate ** depths.get(parameter, 0) if layer_decay_rate is not None else 1.0
        decay = weight_decay if decays(owner, name, parameter, parameter in prior) else NO_DECAY
        group = groups.setdefault(
            (lr_scale, decay),
            {"params": [], "names": [], "lr": lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def learning_rate_factor(
    *,
    steps_per_epoch: int,
    decay_epochs: Sequence[int],
    decay_factor: float = 0.1,
    warmup_steps: int = 500,
    warmup_ratio: float = 0.001,
) -> Callable[[int], float]:
    """The factor on every group's rate at an optimizer step, for `torch.optim.lr_scheduler.LambdaLR`.

    The rate drops by `decay_factor` at the start of each of `decay_epochs` (counted from 0). Over the first
    `warmup_steps` steps, across epoch borders, it rises linearly from `warmup_ratio` of the rate then valid.
    """

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        valid = decay_factor ** sum(epoch >= decay_epoch for decay_epoch in decay_epochs)
        if step < warmup_steps:
            return valid * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))
        return valid

    return factor


def _backbone(model: nn.Module) -> nn.Module:
    return getattr(model, "backbone", model)


def _has_prior(model: nn.Module) -> bool:
    return hasattr(_backbone(model), "spatial_prior")


def _owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter once, with the module that owns it and its full name."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield module, f"{prefix}.{name}" if prefix else name, parameter


def _depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers lie above: n + 1 for the embeddings, n - i for block i; all others are absent, at 0."""
    backbone = _backbone(model)
    blocks = _blocks(backbone)
    embeddings = next((m for name, m in backbone.named_modules() if name.rpartition(".")[2] == "embeddings"), None)
    if embeddings is None:
        raise ValueError(
            f"Layer decay needs the embeddings, but {type(backbone).__name__} has no module of that name: "
            "train it with layer_decay_rate null."
        )
    depths = {parameter: len(blocks) + 1 for parameter in embeddings.parameters()}
    for index, block in enumerate(blocks):
        depths.update({parameter: len(blocks) - index for parameter in block.parameters()})
    return depths


def _blocks(backbone: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the first list of modules with as many entries as the configuration has layers."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"Layer decay needs transformer blocks, but {type(backbone).__name__} has no list of num_hidden_layers: "
        "train it with layer_decay_rate null."
    )


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in ("position_embeddings", "level_embeddings", "prefix_tokens", "cls_token")


def _decays_as_intended(owner: nn.Module, name: str, parameter: nn.Parameter, in_prior: bool) -> bool:
    return parameter.ndim > 1 and not _is_embedding(name)


def _decays_with_layer_decay(owner: nn.Module, name: str, parameter: nn.Parameter, in_prior: bool) -> bool:
    """The reference names its exceptions without the `backbone.` prefix, so that they never apply."""
    return parameter.ndim > 1


def _decays_without_layer_decay(owner: nn.Module, name: str, parameter: nn.Parameter, in_prior: bool) -> bool:
    """The reference goes by substrings of its names, of which `gamma` and the prior's batch norms have none."""
    is_bias = name.rpartition(".")[2] == "bias"
    is_norm = isinstance(owner, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase)
    return not (is_bias or _is_embedding(name) or (is_norm and not in_prior))
