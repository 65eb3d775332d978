"""The backbone against the reference, and as a citizen of transformers.

Tolerances are those that its README calls fair: its float32 and float64 runs differ by up to 3e-5, and its reference
points are float32 even in the float64 run, which moves the maps by up to 2.5e-6.
"""

import copy
import weakref

import pytest
import torch
from transformers import AutoBackbone

from vit_adapter import ViTAdapterBackbone, ViTAdapterConfig
from vit_adapter.conversion.detector import backbone_state_to_reference

FLOAT32 = {"rtol": 1e-4, "atol": 2e-4}
FLOAT64 = {"rtol": 0, "atol": 1e-5}
GRADIENT_ERROR = 1e-4

CASES = ["backbone_dinov2_like", "backbone_deit_like", "backbone_augreg_like"]
LEVELS = range(1, 5)


def expected_maps(case, picture: int) -> dict[int, tuple[torch.Tensor, bool]]:
    """The stored maps of an input by level, and whether they are in float64."""
    maps = {}
    for level in LEVELS:
        for suffix in ("_float64", ""):
            if (stored := case.tensors.get(f"in{picture}.f{level}{suffix}")) is not None:
                maps.setdefault(level, (stored, bool(suffix)))
    return maps


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_maps_equal_the_reference_in_float32(name, attention, reference_case, reference_backbone):
    case = reference_case(name)
    model = reference_backbone(case)
    model.set_attn_implementation(attention)
    for picture in range(len(case.facts["inputs"])):
        with torch.no_grad():
            maps = model(case.pictures(f"in{picture}.u8")).feature_maps
        for level, (expected, _) in expected_maps(case, picture).items():
            torch.testing.assert_close(maps[level - 1], expected.float(), **FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_maps_equal_the_reference_in_float64(name, reference_case, reference_backbone):
    case = reference_case(name)
    with torch.no_grad():
        maps = reference_backbone(case).double()(case.pictures("in0.u8", torch.float64)).feature_maps
    precise = {level: stored for level, (stored, is_float64) in expected_maps(case, 0).items() if is_float64}
    assert set(precise) == {2, 3, 4}
    for level, expected in precise.items():
        torch.testing.assert_close(maps[level - 1], expected, **FLOAT64)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_equal_the_reference(mode, reference_case, reference_backbone):
    case, shared = reference_case(f"backbone_grad_{mode}"), reference_case("backbone_grad_train")
    model = reference_backbone(case, weights=shared.weights).train(mode == "train")
    maps = model(shared.pictures("u8")).feature_maps
    loss = sum((maps[level - 1] * shared.tensors[f"r{level}"]).sum() for level in LEVELS)
    loss.backward()
    assert loss.item() == pytest.approx(case.facts["loss"], rel=1e-4)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    state = model.state_dict() | gradients  # buffers keep their values, so that the conversion is complete
    ours = backbone_state_to_reference(state, model.config)
    expected = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
    compared = expected.keys() - set(case.facts["params_with_zero_gradient"])
    assert len(compared) > 60
    for name in compared:
        assert (ours[name] - expected[name]).norm() <= GRADIENT_ERROR * expected[name].norm(), name
    if mode == "train":
        for key, value in case.tensors.items():
            if key.startswith("after."):  # running statistics after one batch
                torch.testing.assert_close(ours[key.removeprefix("after.")], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, small_backbone_config):
    torch.manual_seed(0)
    model = ViTAdapterBackbone(small_backbone_config).train()
    pixel_values = torch.randn(
        2, 3, 64, 96, requires_grad=True
    )  # reentrant checkpointing needs an input with gradient

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(feature.sin().sum() for feature in model(pixel_values).feature_maps).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_batch_equals_its_pictures_one_by_one(small_backbone_config):
    torch.manual_seed(0)
    model = ViTAdapterBackbone(small_backbone_config).eval()
    pictures = torch.randn(3, 3, 96, 64)
    with torch.no_grad():
        together = model(pictures).feature_maps
        alone = [model(picture[None]).feature_maps for picture in pictures]
    for level, feature in enumerate(together):
        torch.testing.assert_close(feature, torch.cat([maps[level] for maps in alone]), rtol=1e-5, atol=1e-5)


def test_the_input_may_have_any_sides_that_are_multiples_of_32(small_backbone_config):
    model = ViTAdapterBackbone(small_backbone_config).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 32, 160)).feature_maps
    assert [tuple(feature.shape[2:]) for feature in maps] == [(8, 40), (4, 20), (2, 10), (1, 5)]


def test_sides_that_are_no_multiples_of_32_get_one_clear_sentence(small_backbone_config):
    with pytest.raises(ValueError, match="is 100 x 64 pixels, but both sides must be multiples of 32: pad"):
        ViTAdapterBackbone(small_backbone_config)(torch.zeros(1, 3, 100, 64))


def test_a_picture_without_a_batch_gets_one_clear_sentence(small_backbone_config):
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\), but .* give a single picture as a batch of one"):
        ViTAdapterBackbone(small_backbone_config)(torch.zeros(3, 64, 64))


def test_another_number_of_channels_gets_one_clear_sentence(small_backbone_config):
    with pytest.raises(ValueError, match="has 1 channels, but the model was built for 3"):
        ViTAdapterBackbone(small_backbone_config)(torch.zeros(1, 1, 64, 64))


def test_out_features_choose_the_maps(small_backbone_config):
    config = copy.deepcopy(small_backbone_config)
    config.out_features = ["stage1", "stage4"]
    maps = ViTAdapterBackbone(config).eval()(torch.zeros(1, 3, 64, 96)).feature_maps
    assert [tuple(feature.shape[2:]) for feature in maps] == [(16, 24), (2, 3)]


def test_the_stem_has_no_map(small_backbone_config):
    config = copy.deepcopy(small_backbone_config)
    config.out_indices = [0, 1, 2, 3]
    with pytest.raises(ValueError, match="the adapter has maps stage1 to stage4"):
        ViTAdapterBackbone(config)


def test_hidden_states_and_attentions_are_returned_when_asked_for(small_backbone_config):
    model = ViTAdapterBackbone(small_backbone_config).eval()
    model.set_attn_implementation("eager")
    output = model(torch.randn(1, 3, 64, 96), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 24, 24)] * 5
    assert [tuple(weights.shape[1:]) for weights in output.attentions] == [(2, 9, 9), (2, 24, 24)] * 2


def test_tokens_are_kept_for_no_one_who_does_not_ask(small_backbone_config):
    model = ViTAdapterBackbone(small_backbone_config).eval()
    tokens = []
    model.layers[0].register_forward_hook(lambda module, arguments, output: tokens.append(weakref.ref(output)))
    model.layers[2].register_forward_hook(lambda *_: tokens.append(tokens[0]()))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).hidden_states is None
    assert tokens[1] is None  # the first block's tokens were gone before the third block had run


def test_a_tuple_is_returned_when_asked_for(small_backbone_config):
    model = ViTAdapterBackbone(small_backbone_config).eval()
    maps, states = model(torch.randn(1, 3, 64, 96), return_dict=False, output_hidden_states=True)
    assert len(maps) == 4 and len(states) == 5


def test_kept_prefix_tokens_reach_the_maps(small_backbone_config):
    torch.manual_seed(0)
    config = copy.deepcopy(small_backbone_config)
    config.num_prefix_tokens = 3
    model = ViTAdapterBackbone(config).eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(pixel_values).feature_maps[2]
        model.embeddings.prefix_tokens += torch.randn(1, 3, 24)
        after = model(pixel_values).feature_maps[2]
    assert before.shape == (1, 24, 4, 6) and not torch.allclose(before, after)


def test_rotary_positions_replace_the_stored_grid(small_backbone_config):
    config = copy.deepcopy(small_backbone_config)
    config.position_embedding_type = "rope"
    model = ViTAdapterBackbone(config)
    assert "embeddings.position_embeddings" not in model.state_dict()
    assert model(torch.randn(1, 3, 64, 96)).feature_maps[0].shape == (1, 24, 16, 24)


def test_no_conv_feed_forward_when_its_ratio_is_zero(small_backbone_config):
    config = copy.deepcopy(small_backbone_config)
    config.conv_ffn_ratio = 0
    model = ViTAdapterBackbone(config)
    assert not [name for name in model.state_dict() if "ffn" in name]
    assert len(model(torch.randn(1, 3, 64, 64)).feature_maps) == 4


def test_saving_and_loading_changes_no_bit(small_backbone_config, tmp_path):
    torch.manual_seed(0)
    model = ViTAdapterBackbone(small_backbone_config)
    model.save_pretrained(tmp_path)
    loaded = ViTAdapterBackbone.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tensors_missing_from_a_checkpoint_get_the_published_initialisation(small_backbone_config, tmp_path):
    torch.manual_seed(0)
    model = ViTAdapterBackbone(small_backbone_config)
    vit_only = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("embeddings.", "layers."))
    }  # fmt: skip
    model.save_pretrained(tmp_path, state_dict=vit_only)
    loaded, report = ViTAdapterBackbone.from_pretrained(tmp_path, output_loading_info=True)
    parameters = dict(loaded.named_parameters())
    assert report["missing_keys"] and not any(
        name.startswith(("embeddings.", "layers.")) for name in report["missing_keys"]
    )
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    assert parameters["spatial_prior.level_embeddings"].std().item() == pytest.approx(1, abs=0.35)  # 72 draws
    assert parameters["stages.0.injector.scale"].eq(0).all()
    bias = parameters["stages.0.extractors.0.attention.sampling_offsets.bias"]
    # Two heads look right and left; their four points lie 1 to 4 pixels away.
    expected = [coordinate for sign in (1, -1) for point in range(1, 5) for coordinate in (sign * point, 0)]
    torch.testing.assert_close(bias.detach(), torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


def test_auto_backbone_builds_the_class(small_backbone_config):
    assert type(AutoBackbone.from_config(small_backbone_config)) is ViTAdapterBackbone


def test_the_giant_has_the_parameters_of_dinov2_vit_g():
    from vit_adapter.configuration.presets import PRESETS

    with torch.device("meta"):
        model = ViTAdapterBackbone(ViTAdapterConfig(**PRESETS["dinov2-giant"].backbone))
    block = sum(parameter.numel() for parameter in model.layers[0].parameters())
    # qkv and projection, two norms, two layer scales, SwiGLU of width 4096.
    assert block == 4 * (1536**2 + 1536) + 6 * 1536 + 3 * 1536 * 4096 + 2 * 4096 + 1536
