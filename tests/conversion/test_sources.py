"""Each source's table against its authors' model: the same pictures give the same tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vit_adapter import ViTAdapterBackbone, ViTAdapterConfig
from vit_adapter.conversion.augreg import AUGREG, AUGREG_JAX
from vit_adapter.conversion.deit import DEIT
from vit_adapter.conversion.detector import expected_shapes
from vit_adapter.conversion.dinov2 import DINOV2, DINOV2_HUGGING_FACE, DINOV2_TIMM_GIANT
from vit_adapter.conversion.mapping import Conversion, CoverageError, Table, convert
from vit_adapter.conversion.source_files import SourceFiles, read_source
from vit_adapter.conversion.source_kinds import KINDS, recognise

# float32 through two blocks; the order of sums differs between fused and separate projections.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
State = dict[str, torch.Tensor]


def converted(state: State, table: Table, config: ViTAdapterConfig) -> Conversion:
    with torch.no_grad():
        return convert(state, table, expected_shapes(ViTAdapterBackbone, config))


def tokens(conversion: Conversion, config: ViTAdapterConfig, prefix: torch.Tensor, pictures: torch.Tensor):
    """Our ViT's tokens after the last block, the prefix tokens kept so that they take part in the attention.

    The adapter is newly initialised: its injectors start at zero and leave the ViT's tokens alone.
    """
    config.num_prefix_tokens = prefix.shape[1]
    model = ViTAdapterBackbone(config).eval()
    state = {**conversion.tensors, "embeddings.prefix_tokens": prefix}
    missing = model.load_state_dict(state, strict=False).missing_keys  # PyTorch never misses a num_batches_tracked
    assert set(missing) == {name for name in conversion.new if not name.endswith("num_batches_tracked")}
    with torch.no_grad():
        return model(pictures, output_hidden_states=True).hidden_states[-1]


def dinov2_in_transformers(registers: int = 0, **others: Any) -> Dinov2Model | Dinov2WithRegistersModel:
    """A small DINOv2 of transformers with patches of 16 and no trivial weight."""
    torch.manual_seed(0)
    arguments = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 16,
        **others,
    }
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **arguments))
    else:
        model = Dinov2Model(Dinov2Config(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def authors_names(model: Dinov2Model | Dinov2WithRegistersModel) -> State:
    """The weights of transformers' DINOv2 under the names of the authors' `.pth`."""
    ours = model.state_dict()
    state = {
        "cls_token": ours["embeddings.cls_token"],
        "mask_token": ours["embeddings.mask_token"],
        "pos_embed": ours["embeddings.position_embeddings"],
        "patch_embed.proj.weight": ours["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": ours["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": ours["layernorm.weight"],
        "norm.bias": ours["layernorm.bias"],
    }
    if "embeddings.register_tokens" in ours:
        state["register_tokens"] = ours["embeddings.register_tokens"]
    for block in range(model.config.num_hidden_layers):
        theirs, here = f"blocks.{block}.", f"encoder.layer.{block}."
        for leaf in ("weight", "bias"):
            qkv = [ours[f"{here}attention.{part}_proj.{leaf}"] for part in "qkv"]
            state[f"{theirs}attn.qkv.{leaf}"] = torch.cat(qkv)
            state[f"{theirs}attn.proj.{leaf}"] = ours[f"{here}attention.o_proj.{leaf}"]
            for number in "12":
                state[f"{theirs}norm{number}.{leaf}"] = ours[f"{here}norm{number}.{leaf}"]
            if model.config.use_swiglu_ffn:
                gate_and_up = [ours[f"{here}mlp.{part}_proj.{leaf}"] for part in ("gate", "up")]
                state[f"{theirs}mlp.w12.{leaf}"] = torch.cat(gate_and_up)
                state[f"{theirs}mlp.w3.{leaf}"] = ours[f"{here}mlp.down_proj.{leaf}"]
            else:
                state |= {f"{theirs}mlp.fc{n}.{leaf}": ours[f"{here}mlp.fc{n}.{leaf}"] for n in "12"}
        for number in "12":
            state[f"{theirs}ls{number}.gamma"] = ours[f"{here}layer_scale{number}.lambda1"]
    return state


@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_the_tokens_of_transformers(swiglu, registers, small_config):
    theirs = dinov2_in_transformers(registers, use_swiglu_ffn=swiglu)
    config = small_config(use_swiglu_ffn=swiglu)
    conversion = converted(authors_names(theirs), DINOV2, config)
    state = theirs.state_dict()
    prefix = state["embeddings.cls_token"]
    if registers:
        prefix = torch.cat([prefix, state["embeddings.register_tokens"]], dim=1)
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(pictures, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(tokens(conversion, config, prefix, pictures), expected, **TOLERANCE)


@pytest.mark.parametrize("generation", ["disk", "memory"])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_both_hugging_face_generations_convert_as_the_authors_file_does(
    generation, swiglu, registers, small_config, tmp_path
):
    theirs = dinov2_in_transformers(registers, use_swiglu_ffn=swiglu)
    if generation == "disk":
        theirs.save_pretrained(tmp_path)
        files = read_source(tmp_path)
        assert any("attention.attention.query" in name for name in files.state)
    else:
        files = SourceFiles("memory", {}, theirs.state_dict())
    assert recognise(files) == "dinov2-hf"
    config = small_config(use_swiglu_ffn=swiglu)
    ours = converted(files.state, DINOV2_HUGGING_FACE, config).tensors
    expected = converted(authors_names(theirs), DINOV2, config).tensors
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_hugging_face_classifier_is_read_below_its_prefix(small_config):
    state = {f"dinov2.{name}": tensor for name, tensor in dinov2_in_transformers().state_dict().items()}
    state |= {"classifier.weight": torch.zeros(3, 48), "classifier.bias": torch.zeros(3)}
    assert recognise(SourceFiles("classifier", {}, state)) == "dinov2-hf"
    assert set(converted(state, DINOV2_HUGGING_FACE, small_config()).dropped) >= {"classifier.weight"}


def test_registers_are_dropped_with_a_reason(vit_state, small_config):
    state = vit_state(24, 2, 4, layer_scale="ls1.gamma", registers=4)
    assert recognise(SourceFiles("registers", {}, state)) == "dinov2"
    dropped = converted(state, DINOV2, small_config()).dropped
    assert set(dropped) == {"cls_token", "register_tokens", "mask_token", "norm.weight", "norm.bias"}
    assert "neither class nor register tokens" in dropped["register_tokens"]


def test_a_file_after_the_14_to_16_script_converts_alike(vit_state, small_config):
    before = vit_state(24, 2, 4, layer_scale="ls1.gamma")
    after = {name.replace("ls1.gamma", "gamma1").replace("ls2.gamma", "gamma2"): t for name, t in before.items()}
    expected = converted(before, DINOV2, small_config()).tensors
    ours = converted(after, DINOV2, small_config()).tensors
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is an optional test dependency")


def timm_tokens(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Class token and patch tokens after the last block, before the final norm."""
    with torch.no_grad():
        ((patches, prefix),) = model.forward_intermediates(
            pictures,
            indices=1,
            norm=False,
            intermediates_only=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
        )
    return torch.cat([prefix, patches], dim=1)


def timm_vit(timm, **others: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**{**arguments, **others})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("table", [DEIT, AUGREG], ids=["deit", "augreg"])
def test_deit_and_augreg_give_the_tokens_of_timm(timm, table, small_config):
    theirs, config = timm_vit(timm), small_config()
    conversion = converted(theirs.state_dict(), table, config)
    assert set(conversion.filled) == {f"layers.{i}.layer_scale{n}.scale" for i in (0, 1) for n in (1, 2)}
    pictures = torch.randn(2, 3, 64, 64)
    ours = tokens(conversion, config, theirs.state_dict()["cls_token"], pictures)
    torch.testing.assert_close(ours, timm_tokens(theirs, pictures), **TOLERANCE)


def test_the_packed_swiglu_of_timm_gives_its_tokens(timm, small_config):
    packed = {"mlp_layer": timm.layers.SwiGLUPacked, "mlp_ratio": 64 * 2 / 24, "act_layer": torch.nn.SiLU}
    theirs = timm_vit(timm, init_values=1.0, num_classes=0, **packed)
    state, config = theirs.state_dict(), small_config(use_swiglu_ffn=True)
    assert recognise(SourceFiles("giant", {}, state)) == "dinov2-timm-giant"
    conversion = converted(state, DINOV2_TIMM_GIANT, config)
    pictures = torch.randn(2, 3, 64, 64)
    ours = tokens(conversion, config, state["cls_token"], pictures)
    torch.testing.assert_close(ours, timm_tokens(theirs, pictures), **TOLERANCE)


def jax_arrays(width: int, depth: int, heads: int, side: int, patch: int = 16) -> dict[str, np.ndarray]:
    """A ViT in the layout of the AugReg `.npz` files, random values."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return 0.2 * generator.standard_normal(shape, dtype=np.float32)

    arrays = {
        "cls": random(1, 1, width),
        "embedding/kernel": random(patch, patch, 3, width),
        "embedding/bias": random(width),
        "Transformer/posembed_input/pos_embedding": random(1, 1 + side**2, width),
        "Transformer/encoder_norm/scale": random(width),
        "Transformer/encoder_norm/bias": random(width),
        "head/kernel": random(width, 5),
        "head/bias": random(5),
    }
    for block in range(depth):
        prefix = f"Transformer/encoderblock_{block}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{prefix}{norm}/scale": 1 + random(width), f"{prefix}{norm}/bias": random(width)}
        attention = f"{prefix}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            arrays[f"{attention}{part}/kernel"] = random(width, heads, width // heads)
            arrays[f"{attention}{part}/bias"] = random(heads, width // heads)
        arrays |= {
            f"{attention}out/kernel": random(heads, width // heads, width),
            f"{attention}out/bias": random(width),
        }
        for index, (rows, columns) in enumerate([(width, 4 * width), (4 * width, width)]):
            arrays[f"{prefix}MlpBlock_3/Dense_{index}/kernel"] = random(rows, columns)
            arrays[f"{prefix}MlpBlock_3/Dense_{index}/bias"] = random(columns)
    return arrays


def test_a_jax_file_gives_the_tokens_that_timm_reads_from_it(timm, small_config, tmp_path):
    file = tmp_path / "augreg.npz"
    np.savez(file, **jax_arrays(24, 2, 3, 4))
    theirs, config = timm_vit(timm), small_config()
    theirs.load_pretrained(str(file))
    files = read_source(file)
    assert recognise(files) == "augreg-jax"
    conversion = converted(files.state, AUGREG_JAX, config)
    pictures = torch.randn(2, 3, 64, 64)
    ours = tokens(conversion, config, files.state["cls"], pictures)
    torch.testing.assert_close(ours, timm_tokens(theirs, pictures), **TOLERANCE)


def test_position_embeddings_of_another_grid_are_resized(vit_state, small_config):
    conversion = converted(vit_state(24, 2, 6), DEIT, small_config())
    assert conversion.tensors["embeddings.position_embeddings"].shape == (1, 1 + 4**2, 24)


@pytest.mark.parametrize(
    ("kind", "spoiled"),
    [
        ("dinov2", "blocks.1.attn.qkv.weight"),
        ("dinov2", "pos_embed"),
        ("deit", "blocks.0.mlp.fc2.bias"),
        ("dinov2-hf", "encoder.layer.1.attention.o_proj.weight"),
        ("augreg-jax", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"),
    ],
)
def test_no_source_gets_away_with_an_added_removed_or_reshaped_tensor(kind, spoiled, vit_state, small_config):
    state = {
        "dinov2": lambda: vit_state(24, 2, 4, layer_scale="ls1.gamma"),
        "deit": lambda: vit_state(24, 2, 4),
        "dinov2-hf": lambda: dinov2_in_transformers().state_dict(),
        "augreg-jax": lambda: {name: torch.from_numpy(a) for name, a in jax_arrays(24, 2, 3, 4).items()},
    }[kind]()
    table = KINDS[kind].table
    converted(state, table, small_config())  # as it is, it converts
    without = {name: tensor for name, tensor in state.items() if name != spoiled}
    for changed in (without, state | {f"{spoiled}_extra": torch.zeros(1)}, state | {spoiled: torch.zeros(5, 7, 2)}):
        with pytest.raises(CoverageError, match=spoiled if changed is not without else "holds nothing for it"):
            converted(changed, table, small_config())
