"""Reading weights that somebody else wrote: `.pth`, `.npz`, safetensors, a Hugging Face folder or a Hub id.

Nothing in a file is ever executed. Tensors are memory-mapped where the format allows it, so reading costs no memory.
"""

import hashlib
import io
import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

SAFE_FILES, PICKLE_FILES = ["*.safetensors", "*.json"], ["pytorch_model.bin"]
HARMLESS_GLOBALS = ("torch._utils._rebuild_", "torch.Float", "torch.Half", "torch.Long", "collections.OrderedDict")
UNPICKLER_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    KeyError,
    IndexError,
    ValueError,
    AttributeError,
)


class SourceError(ValueError):
    """The source cannot be read; the message is one sentence for whoever named it."""


@dataclass(frozen=True)
class SourceFiles:
    """A source as it was found.

    name: what the user asked for. files: on the disk, by name. state: tensors by the source's names. meta: what else
    the file holds beside the tensors (mmdetection: class names, versions).
    """

    name: str
    files: dict[str, Path]
    state: dict[str, torch.Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def digests(self) -> dict[str, dict[str, int | str]]:
        """sha256 and size in bytes of every file."""
        return {name: {"sha256": file_digest(path), "bytes": path.stat().st_size} for name, path in self.files.items()}


def file_digest(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_source(source: str | Path, revision: str | None = None) -> SourceFiles:
    """Reads a file, a Hugging Face folder, or a Hub id such as `facebook/dinov2-base`.

    Raises: SourceError: there is no such source, or it is damaged, unsafe or of another kind.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(str(source), path)
    if path.is_file():
        state, meta = _read_file(path)
        return SourceFiles(path.name, {path.name: path}, state, meta)
    if path.suffix in (".pth", ".pt", ".bin", ".tar", ".npz", ".safetensors") or str(source).count("/") != 1:
        raise SourceError(f"{source}: there is no such file or folder")
    folder = download(str(source), revision, SAFE_FILES)
    if not any(folder.glob("*.safetensors")):
        folder = download(str(source), revision, PICKLE_FILES)
    return _read_folder(str(source), folder)


def download(repo: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder in the local cache that holds a Hub repository.

    Raises: SourceError: the repository is missing, gated or out of reach.
    """
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SourceError(f"{repo} is gated: ask for access at {page}, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo}: no such folder here, and no such public repository at {page}") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"{repo}: no such folder here, and the Hub ({page}) cannot be reached") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise SourceError(f"{repo}: the Hub refused the download: {str(error).splitlines()[0]}") from error


def _read_folder(name: str, folder: Path) -> SourceFiles:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = [found for found in ("model.safetensors", "pytorch_model.bin") if (folder / found).is_file()][:1]
    if not shards:
        raise SourceError(f"{name}: holds no model.safetensors, model.safetensors.index.json or pytorch_model.bin")
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise SourceError(f"{name}: {shard} is missing, which the index names")
        state.update(_read_file(folder / shard)[0])
    return SourceFiles(name, {shard: folder / shard for shard in shards}, state)


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    if path.suffix == ".npz":
        return _read_npz(path), {}
    if path.suffix == ".safetensors":
        return _read_safetensors(path), {}
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: truncated or corrupt, or no safetensors file ({error})") from error


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, AttributeError) as error:
        raise SourceError(f"{path}: truncated or corrupt, or no .npz of plain arrays ({error})") from error


def _read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an unusual pickle protocol; what matters is said below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNPICKLER_ERRORS as error:
        unsafe = sorted(name for name in pickled_globals(path) if not name.startswith(HARMLESS_GLOBALS))
        if unsafe:
            raise SourceError(
                f"{path}: refused, and nothing of it was executed: loading it would call {', '.join(unsafe)}"
            ) from error
        raise SourceError(f"{path}: truncated or corrupt, or not written by torch.save") from error
    return _unwrap(path, checkpoint)


def _unwrap(path: Path, checkpoint: Any) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """The state dict inside a checkpoint, and the metadata beside it."""
    state, meta = checkpoint, None
    if isinstance(checkpoint, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(checkpoint.get(key), Mapping):
                state, meta = checkpoint[key], checkpoint.get("meta")
                break
    if not isinstance(state, Mapping) or not state:
        raise SourceError(f"{path}: holds no state dict (a mapping from name to tensor)")
    others = [str(name) for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        raise SourceError(f"{path}: holds more than tensors: {', '.join(others[:20])}")
    return dict(state), meta if isinstance(meta, Mapping) else {}


def pickled_globals(path: Path) -> set[str]:
    """Every function and class that the pickles in a checkpoint name, read without executing anything.

    A file that is no pickle, or breaks off, gives what was found until there.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith("data.pkl")]
        return {name for data in pickles for name in _globals_of(data)}
    with open(path, "rb") as file:
        return set(_globals_of(file))


def _globals_of(file: BinaryIO) -> Iterator[str]:
    strings: list[str] = []
    while True:  # the format before the zip archive is several pickles in a row, then the tensors' bytes
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:  # what genops raises for anything that is no pickle, the end of the file included
            return
