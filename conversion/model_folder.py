"""Writing what `from_pretrained` reads: a folder that appears whole or not at all.

Tensors go to the disk shard by shard, from wherever they are: a memory-mapped source never becomes anonymous memory.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BaseImageProcessor, PreTrainedConfig

from .mapping import State

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 * 1024**3


def refuse_existing(out: Path) -> None:
    """Raises: ValueError: `out` exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already: name a new folder, or remove it first")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends, synced to the disk, or vanishes when it fails.

    Raises: ValueError: `out` exists and is not an empty folder.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's own is private
        for path in [*partial.rglob("*"), partial]:
            force_to_disk(path)
        partial.rename(out)
        force_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A path to write that replaces `out` when the block ends, synced to the disk, or vanishes when it fails."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        yield partial
        force_to_disk(partial)
        partial.replace(out)
    force_to_disk(out.parent)


def write_weights(folder: Path, tensors: State, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the tensors as safetensors: one file, or shards of at most this size and their index.

    Raises: OSError: the disk is full, for instance.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        contents = {key: tensors[key].contiguous() for key in shard}
        try:
            save_file(contents, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / name} cannot be written: {error}") from error
        (folder / name).chmod(0o644)  # safetensors makes it private


def write_checkpoint(out: Path, content: Mapping[str, object]) -> None:
    """Writes a `.pth` file, whole or not at all.

    Raises: OSError: the disk is full, for instance.
    """
    with new_file(out) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # how torch.save says it
            raise OSError(f"{out} cannot be written: {str(error).splitlines()[0]}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises: ValueError: the folder holds none.
    """
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} is no model folder: it holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    return [folder / WEIGHTS_FILE]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, memory-mapped."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors.update({name: file.get_tensor(name) for name in names})
    return tensors


def verify_weights(folder: Path, tensors: State) -> None:
    """Reads the folder again and compares every tensor bit for bit.

    Raises: OSError: a tensor is not what was written.
    """
    written = read_weights(folder)
    different = sorted(written.keys() ^ tensors.keys())
    different += [name for name, tensor in tensors.items() if name in written and not _same(written[name], tensor)]
    if different:
        raise OSError(f"{folder}: written, but what the disk gives back differs in {', '.join(different)}")


def write_model_folder(
    folder: Path,
    config: PreTrainedConfig,
    tensors: State,
    card: str,
    processor: BaseImageProcessor | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fills an empty folder with config.json, the weights, README.md and, for a detector, preprocessor_config.json."""
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_weights(folder, tensors, max_shard_bytes)


def _shards(tensors: State, max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, where NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def force_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of entries, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
