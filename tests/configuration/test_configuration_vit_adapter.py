"""ViTAdapterConfig: derived values, and contradictions in clear words."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from vit_adapter import ViTAdapterConfig


def test_stages_are_equal_quarters_unless_given():
    config = ViTAdapterConfig(num_hidden_layers=8)
    assert config.interaction_indexes == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_last_block_of_each_stage_is_global_unless_windows_are_given():
    config = ViTAdapterConfig(num_hidden_layers=5, interaction_indexes=[[0, 1], [2, 4]])
    assert config.window_sizes == [14, 0, 14, 14, 0]


def test_width_of_the_feed_forward_network_follows_from_the_ratio():
    assert ViTAdapterConfig(hidden_size=384, mlp_ratio=4).intermediate_size == 1536


def test_width_of_swiglu_is_two_thirds_rounded_up_to_eight():
    config = ViTAdapterConfig(hidden_size=1536, num_attention_heads=24, deformable_num_heads=24, use_swiglu_ffn=True)
    assert config.intermediate_size == 4096


def test_only_the_last_map_is_returned_by_default():
    assert ViTAdapterConfig().out_features == ["stage4"]


def test_saving_and_loading_changes_nothing(tmp_path):
    config = ViTAdapterConfig(hidden_size=96, num_attention_heads=3, deformable_num_heads=3, out_indices=[1, 2, 3, 4])
    config.save_pretrained(tmp_path)
    assert ViTAdapterConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"interaction_indexes": [[0, 2], [4, 11]]}, r"gap or overlap: the stage \[4, 11\] should begin at block 3"),
        ({"interaction_indexes": [[0, 6], [6, 11]]}, r"gap or overlap: the stage \[6, 11\] should begin at block 7"),
        ({"interaction_indexes": [[0, 2], [3, 10]]}, r"end at block 10, but there are num_hidden_layers 12"),
        ({"interaction_indexes": [[0, 11, 12]]}, r"\[first, last\] block of each stage was expected"),
        ({"num_hidden_layers": 3}, r"hold at least one block"),
        ({"num_attention_heads": 5}, r"num_attention_heads 5 does not divide hidden_size 384"),
        ({"deformable_num_heads": 7}, r"deformable_num_heads 7 does not divide .* = 384"),
        ({"window_sizes": [14] * 11}, r"window_sizes has 11 entries, but one for each of the 12 blocks"),
        ({"window_sizes": [-1] * 12}, r"sizes of at least 0 were expected"),
        ({"patch_size": 14}, r"patch_size is 14, but .* patches of 16 pixels"),
        ({"image_size": 600}, r"image_size is 600, which is no multiple of patch_size 16"),
        ({"position_embedding_type": "sine"}, r'"learned" or "rope" was expected'),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0, but at least 1 was expected"),
        ({"num_prefix_tokens": -1}, r"num_prefix_tokens is -1, but at least 0 was expected"),
        ({"drop_path_rate": 1.0}, r"a probability in \[0, 1\) was expected"),
        ({"hidden_size": 90, "num_attention_heads": 15, "deformable_num_heads": 15, "position_embedding_type": "rope"},
         r"multiple of 4, but hidden_size / num_attention_heads is 6"),
        ({"hidden_size": "384"}, r"hidden_size"),
    ],
)  # fmt: skip
def test_contradictions_are_named(arguments, sentence):
    with pytest.raises(StrictDataclassError, match=sentence):
        ViTAdapterConfig(**arguments)
