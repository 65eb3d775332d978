"""The rename engine and the law of coverage, on tables that fit on a screen."""

import pytest
import torch

from vit_adapter.conversion.mapping import (
    CoverageError,
    Drop,
    Fill,
    New,
    Rename,
    Split,
    convert,
    expand,
    match,
    prefixed,
    revert,
)

TABLE = (
    Rename("stem.{i}.weight", "prior.{i-1}.weight"),
    Split("qkv.{leaf}", ("q.{leaf}", "k.{leaf}", "v.{leaf}")),
    Rename("kernel", "linear.weight", lambda kernel, shape: kernel.mT),
    Drop("head.{rest}", "nobody needs it"),
    Fill("gamma{n}", 1.0, "one is the identity"),
    New("adapter.{rest}", "it is the adapter's"),
)
EXPECTED = {
    "prior.0.weight": (2, 3),
    "q.bias": (2,),
    "k.bias": (2,),
    "v.bias": (2,),
    "linear.weight": (3, 2),
    "gamma1": (4,),
    "adapter.up.weight": (5,),
}


def source() -> dict[str, torch.Tensor]:
    return {
        "stem.1.weight": torch.arange(6.0).view(2, 3),
        "qkv.bias": torch.arange(6.0),
        "kernel": torch.arange(6.0).view(2, 3),
        "head.fc.weight": torch.zeros(9),
    }


def problems(state: dict[str, torch.Tensor], expected=EXPECTED) -> list[str]:
    with pytest.raises(CoverageError) as caught:
        convert(state, TABLE, expected)
    return caught.value.problems


@pytest.mark.parametrize(
    ("pattern", "name", "values"),
    [
        ("blocks.{i}.norm{n}.{leaf}", "blocks.11.norm2.bias", {"i": 11, "n": 2, "leaf": "bias"}),
        ("norms.{i-1}.weight", "norms.0.weight", {"i": 1}),
        ("a.{rest}", "a.b.c", {"rest": "b.c"}),
        ("a.{leaf}", "a.b.c", None),
        ("blocks.{i}", "blocks.x", None),
        ("a.b", "aXb", None),
        ("a.b", "a.b.c", None),
    ],
)
def test_a_pattern_fits_the_whole_name_and_expand_inverts_it(pattern, name, values):
    assert match(pattern, name) == values
    if values is not None:
        assert expand(pattern, values) == name


def test_conversion_renames_splits_transposes_fills_and_says_what_is_new():
    done = convert(source(), TABLE, EXPECTED)
    assert done.tensors["prior.0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [done.tensors[f"{part}.bias"].tolist() for part in "qkv"] == [[0, 1], [2, 3], [4, 5]]
    assert done.tensors["linear.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert done.tensors["gamma1"].tolist() == [1, 1, 1, 1]
    assert done.used == {
        "stem.1.weight": ("prior.0.weight",),
        "qkv.bias": ("q.bias", "k.bias", "v.bias"),
        "kernel": ("linear.weight",),
    }
    assert done.dropped == {"head.fc.weight": "nobody needs it"}
    assert done.filled == {"gamma1": "one is the identity"}
    assert done.new == {"adapter.up.weight": "it is the adapter's"}
    assert len(done.lines()) == 3 + 1 + 1 + 1


def test_what_keeps_its_values_is_a_view_of_the_source():
    state = source()
    done = convert(state, TABLE, EXPECTED)
    assert done.tensors["k.bias"].untyped_storage().data_ptr() == state["qkv.bias"].untyped_storage().data_ptr()


def test_the_first_row_that_fits_decides():
    table = (Rename("a.special", "b"), Rename("a.{leaf}", "c.{leaf}"))
    done = convert({"a.special": torch.zeros(1), "a.other": torch.ones(1)}, table, {"b": (1,), "c.other": (1,)})
    assert done.used == {"a.special": ("b",), "a.other": ("c.other",)}


def test_an_added_tensor_breaks_the_law():
    assert problems(source() | {"surprise": torch.zeros(2, 1)}) == ["surprise [2, 1]: no row of the table names it"]


def test_a_removed_tensor_breaks_the_law():
    state = source()
    del state["qkv.bias"]
    assert problems(state) == [f"{part}.bias [2]: the source holds nothing for it" for part in "qkv"]


def test_a_reshaped_tensor_breaks_the_law():
    (problem,) = problems(source() | {"stem.1.weight": torch.zeros(3, 2)})
    assert problem == "stem.1.weight [3, 2]: prior.0.weight would get the shape [3, 2] instead of [2, 3]"


def test_rows_that_cannot_be_shared_equally_break_the_law():
    assert problems(source() | {"qkv.bias": torch.zeros(7)}) == [
        "qkv.bias [7]: the rows of q.bias, k.bias, v.bias together are 6"
    ]


def test_a_tensor_that_the_model_lacks_breaks_the_law():
    expected = {name: shape for name, shape in EXPECTED.items() if name != "linear.weight"}
    assert problems(source(), expected) == ["kernel [2, 3]: the model has no linear.weight"]


def test_a_target_is_filled_only_once():
    table = (Rename("{leaf}", "target"),)
    with pytest.raises(CoverageError) as caught:
        convert({"a": torch.zeros(1), "b": torch.zeros(1)}, table, {"target": (1,)})
    assert caught.value.problems == ["b [1]: target is already filled by another tensor"]


def test_the_error_shows_the_whole_table_and_the_problems():
    with pytest.raises(CoverageError) as caught:
        convert(source() | {"surprise": torch.zeros(1)}, TABLE, EXPECTED)
    text = str(caught.value)
    for line in (
        "used     qkv.bias -> q.bias, k.bias, v.bias",
        "dropped  head.fc.weight: nobody needs it",
        "filled   gamma1: one is the identity",
        "new      adapter.up.weight: it is the adapter's",
        "PROBLEM  surprise [1]: no row of the table names it",
    ):
        assert line in text.splitlines()


REVERSIBLE = TABLE[:2]
REVERSIBLE_SHAPES = {name: shape for name, shape in EXPECTED.items() if name.startswith(("prior", "q", "k", "v"))}


def test_revert_inverts_convert_bit_for_bit():
    state = {name: source()[name] for name in ("stem.1.weight", "qkv.bias")}
    back = revert(convert(state, REVERSIBLE, REVERSIBLE_SHAPES).tensors, REVERSIBLE, REVERSIBLE_SHAPES)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_revert_is_as_strict():
    tensors = {name: torch.zeros(shape) for name, shape in REVERSIBLE_SHAPES.items()}
    for spoiled, sentence in (
        ({name: tensor for name, tensor in tensors.items() if name != "k.bias"}, "k.bias [2]: missing"),
        (tensors | {"other": torch.zeros(1)}, "other [1]: the model has no such tensor"),
        (tensors | {"k.bias": torch.zeros(3)}, "k.bias [3]: the model holds [2]"),
    ):
        with pytest.raises(CoverageError) as caught:
            revert(spoiled, REVERSIBLE, REVERSIBLE_SHAPES)
        assert caught.value.problems == [sentence]


def test_revert_needs_a_row_that_leads_back():
    with pytest.raises(CoverageError) as caught:
        revert({"linear.weight": torch.zeros(3, 2)}, TABLE, {"linear.weight": (3, 2)})
    assert caught.value.problems == ["linear.weight [3, 2]: no row of the table leads back"]


def test_revert_needs_all_parts_of_a_split():
    with pytest.raises(CoverageError) as caught:
        revert({"q.bias": torch.zeros(2)}, TABLE, {"q.bias": (2,)})
    assert caught.value.problems == ["q.bias [2]: qkv.bias needs k.bias, v.bias as well"]


def test_prefixes_go_on_either_side():
    table = prefixed(TABLE, "theirs.", "ours.")
    state = {f"theirs.{name}": tensor for name, tensor in source().items()}
    done = convert(state, table, {f"ours.{name}": shape for name, shape in EXPECTED.items()})
    assert set(done.tensors) | set(done.new) == {f"ours.{name}" for name in EXPECTED}
