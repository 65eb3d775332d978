"""A freshly built DINOv2-S detector against the statistics of the original's."""

import math

import pytest
import torch

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, ViTAdapterConfig
from vit_adapter.configuration.presets import PRESETS
from vit_adapter.conversion.detector import state_to_reference

STANDARD_ERRORS = 6  # over some 350 random tensors, two draws differ by more than this once in a million runs


@pytest.fixture(scope="module")
def fresh_state() -> dict[str, torch.Tensor]:
    """The state of a detector without a checkpoint, by the original's names."""
    torch.manual_seed(0)
    backbone = ViTAdapterConfig(**PRESETS["dinov2-small"].backbone, out_indices=[1, 2, 3, 4])
    config = MaskRcnnConfig(backbone_config=backbone, num_labels=80)
    return state_to_reference(MaskRcnnForInstanceSegmentation(config).state_dict(), config)


def test_every_parameter_is_initialised_as_in_the_reference(fresh_state, reference_case):
    statistics = reference_case("initialisation").facts["statistics"]
    assert len(statistics) > 150
    for name, expected in statistics.items():
        tensor = fresh_state[name].double()
        if expected["std"] == 0:
            assert tensor.eq(expected["mean"]).all(), name
            continue
        if "sampling_offsets.bias" in name:  # not random: the ring of directions
            assert (tensor.min().item(), tensor.max().item()) == pytest.approx((-4, 4)), name
            continue
        count = tensor.numel()
        # Both sides are one draw each, hence the factor of two in the variance.
        error = STANDARD_ERRORS * expected["std"] * math.sqrt(2 / count)
        assert tensor.mean().item() == pytest.approx(expected["mean"], abs=error), name
        assert tensor.std().item() == pytest.approx(expected["std"], abs=error), name
        # A uniform distribution ends at sqrt(3) deviations, a normal one goes far beyond: they must be of one kind.
        if count > 1000:
            kinds = [abs(extreme) > 2.2 * expected["std"] for extreme in (expected["max"], tensor.max().item())]
            assert kinds[0] == kinds[1], name


def test_sampling_starts_with_no_weights_but_a_ring_of_offsets(fresh_state):
    prefix = "backbone.interactions.0.injector.attn"
    assert fresh_state[f"{prefix}.sampling_offsets.weight"].eq(0).all()
    offsets = fresh_state[f"{prefix}.sampling_offsets.bias"].reshape(6, 3, 4, 2)  # heads, levels, points, (x, y)
    for point in range(4):
        assert offsets[0, 0, point].tolist() == pytest.approx([point + 1, 0], abs=1e-5)
        # The second head looks 60 degrees down: (1 / 2, sqrt(3) / 2) scaled to a larger coordinate of 1.
        assert offsets[1, 2, point].tolist() == pytest.approx([(point + 1) / math.sqrt(3), point + 1], abs=1e-5)
