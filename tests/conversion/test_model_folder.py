"""Folders and files that appear whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vit_adapter.conversion.model_folder import (
    new_file,
    new_folder,
    read_weights,
    verify_weights,
    weight_files,
    write_weights,
)


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0)
    nan = torch.tensor([float("nan"), 1.0])
    return {
        "first": base[:6],
        "second": base[6:],
        "turned": torch.arange(12.0).view(3, 4).mT,
        "nan": nan,
        "count": torch.tensor(3),
    }


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk full"), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_another_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "out"):
        pass


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "out.pth").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"), new_file(tmp_path / "out.pth") as partial:
        partial.write_text("half")
        raise RuntimeError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
    assert (tmp_path / "out.pth").read_text() == "old"
    with new_file(tmp_path / "out.pth") as partial:
        partial.write_text("new")
    assert (tmp_path / "out.pth").read_text() == "new"


def test_small_weights_are_one_file(tmp_path):
    write_weights(tmp_path, tensors())
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    verify_weights(tmp_path, tensors())


def test_large_weights_are_shards_with_an_index(tmp_path):
    weights = tensors()
    write_weights(tmp_path, weights, max_shard_bytes=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    for file in weight_files(tmp_path):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 50
    verify_weights(tmp_path, weights)


def test_verification_notices_a_single_bit(tmp_path):
    weights = tensors()
    write_weights(tmp_path, weights)
    verify_weights(tmp_path, weights)
    changed = weights["second"].clone()
    changed.view(torch.int32)[3] ^= 1
    with pytest.raises(OSError, match=r"differs in second$"):
        verify_weights(tmp_path, weights | {"second": changed})


def test_verification_notices_a_missing_and_an_added_tensor(tmp_path):
    weights = tensors()
    write_weights(tmp_path, weights)
    with pytest.raises(OSError, match="differs in other"):
        verify_weights(tmp_path, weights | {"other": torch.zeros(1)})
    with pytest.raises(OSError, match="differs in nan"):
        verify_weights(tmp_path, {name: tensor for name, tensor in weights.items() if name != "nan"})


def test_a_folder_without_weights_is_no_model_folder(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        read_weights(tmp_path)
