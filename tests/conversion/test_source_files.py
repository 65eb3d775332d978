"""Files from elsewhere: read without executing anything, or refused with one sentence."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vit_adapter.conversion.source_files import SourceError, SourceFiles, pickled_globals, read_source

ZIP, LEGACY = True, False


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(600.0).view(20, 30), "b.c": torch.tensor(3)}


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == tensors().keys() and all(torch.equal(state[name], tensors()[name]) for name in state)


@pytest.mark.parametrize("form", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_is_found_plain_or_inside_a_checkpoint(tmp_path, form, wrapper):
    file = tmp_path / "weights.pth"
    content = tensors() if wrapper is None else {wrapper: tensors(), "meta": {"CLASSES": ("cat", "dog")}, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=form)
    source = read_source(file)
    assert same(source.state)
    assert source.meta == ({} if wrapper is None else {"CLASSES": ("cat", "dog")})


def test_safetensors_and_npz_are_read(tmp_path):
    save_file(tensors(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **{name: tensor.numpy() for name, tensor in tensors().items()})
    assert same(read_source(tmp_path / "weights.safetensors").state)
    assert same(read_source(tmp_path / "weights.npz").state)


def test_a_folder_of_shards_is_read_whole(tmp_path):
    save_file({"a": tensors()["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.c": tensors()["b.c"]}, tmp_path / "model-00002-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b.c": "model-00002-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    source = read_source(tmp_path)
    assert same(source.state)
    assert list(source.digests()) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_source(tmp_path)


def test_a_folder_with_a_pickle_alone_is_read(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert same(read_source(tmp_path).state)


def test_the_digest_is_the_sha256_of_the_bytes(tmp_path):
    file = tmp_path / "weights.npz"
    file.write_bytes(b"abc")
    source = SourceFiles("x", {"weights.npz": file}, {})
    published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert source.digests() == {"weights.npz": {"sha256": published, "bytes": 3}}


@pytest.mark.parametrize("form", [ZIP, LEGACY, "pickle"], ids=["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_named_and_not_executed(tmp_path, form):
    marker, file = tmp_path / "executed", tmp_path / "weights.pth"
    content = {"a": torch.zeros(3), "b": Payload(marker)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form)
    with pytest.raises(SourceError, match=r"refused.*nothing of it was executed.*posix\.system"):
        read_source(file)
    assert not marker.exists()


def test_the_globals_of_an_ordinary_checkpoint_are_listed(tmp_path):
    torch.save(tensors(), tmp_path / "weights.pth")
    assert "torch._utils._rebuild_tensor_v2" in pickled_globals(tmp_path / "weights.pth")


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_a_truncated_file_is_one_sentence(tmp_path, suffix, share):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(tensors(), file)
    elif suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors().items()})
    else:
        save_file(tensors(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match="truncated or corrupt"):
        read_source(file)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3)])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match="no state dict"):
        read_source(tmp_path / "weights.pth")


def test_a_state_dict_with_other_things_than_tensors_is_refused(tmp_path):
    torch.save({"a": torch.zeros(3), "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match="more than tensors: epoch"):
        read_source(tmp_path / "weights.pth")


def test_an_object_array_in_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.array([{}], dtype=object))
    with pytest.raises(SourceError, match=r"no \.npz of plain arrays"):
        read_source(tmp_path / "weights.npz")


@pytest.mark.parametrize("name", ["missing.pth", "no/such/folder", "missing"])
def test_a_missing_source_is_one_sentence(tmp_path, name):
    with pytest.raises(SourceError, match="no such file or folder"):
        read_source(tmp_path / name)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds no model\.safetensors"):
        read_source(tmp_path)


def test_what_is_read_stays_on_the_disk(tmp_path):
    torch.save(tensors(), tmp_path / "weights.pth")
    file = tmp_path / "weights.pth"
    state = read_source(file).state
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(file))]
    address = state["a"].data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
