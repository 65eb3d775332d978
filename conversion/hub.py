"""A model folder to the Hub, in one commit: whatever goes wrong, the local folder stays as it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)

from ..configuration.configuration_mask_rcnn import MaskRcnnConfig
from ..configuration.configuration_vit_adapter import ViTAdapterConfig
from .model_card import model_card
from .model_folder import weight_files

CARD = "README.md"
CONFIGURATIONS = {config.model_type: config for config in (ViTAdapterConfig, MaskRcnnConfig)}


class HubError(ValueError):
    """The Hub was not reached or refused; the message is one sentence that names the page and the cure."""


def push_folder(folder: str | Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads a model folder to `repo` (created where it does not exist) and returns the commit's address.

    A card that is still the converter's own is written anew, so that its snippet names the repository.

    Raises:
        ValueError: the folder is no model folder.
        HubError: the Hub was not reached, or refused. Nothing local has changed, and on the Hub no commit was made.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    files = [*weight_files(folder), *(path for pattern in ("*.json", "*.py") for path in folder.glob(pattern))]
    api = HfApi(token=token)
    with _explained(repo):
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        operations = [CommitOperationAdd(path.name, path) for path in sorted(files)]
        operations.append(CommitOperationAdd(CARD, _card(folder, config, repo).encode()))
        commit = api.create_commit(repo, operations, commit_message="Upload a ViT-Adapter model")
    return str(commit.commit_url)


def read_model_config(folder: Path) -> ViTAdapterConfig | MaskRcnnConfig:
    """The configuration in a model folder of ours.

    Raises: ValueError: there is none, or one of another model.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = content["model_type"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no model folder: config.json is missing or damaged ({error})") from error
    if model_type not in CONFIGURATIONS:
        raise ValueError(f"{folder} holds a {model_type}, but {' or '.join(CONFIGURATIONS)} was expected")
    try:
        return CONFIGURATIONS[model_type].from_dict(content)
    except StrictDataclassError as error:
        raise ValueError(f"{folder}: config.json contradicts itself: {' '.join(str(error).split())}") from error


def _card(folder: Path, config: ViTAdapterConfig | MaskRcnnConfig, repo: str) -> str:
    """The folder's card, or where there is none, or the converter's own, one that names the repository."""
    own_code = any(folder.glob("modeling_*.py")) or "auto_map" in config.to_dict()
    card = model_card(config, repo, own_code)
    if not (folder / CARD).is_file():
        return card
    written = (folder / CARD).read_text(encoding="utf-8")
    return card if written == model_card(config, folder.resolve().name, own_code) else written


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Whatever the Hub's client raises, as one sentence."""
    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{repo} is gated: ask for access at {page}; nothing was uploaded") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo}: the Hub knows no such repository, or not this token (401): run `hf auth login` with a token "
            f"that may write to {page}; nothing was uploaded"
        ) from error
    except HFValidationError as error:
        raise HubError(f"{repo} is no name for a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        cure = "run `hf auth login` with a token that may write" if status in (401, 403) else "try again later"
        raise HubError(f"the Hub refused {page} with status {status}: {cure}; nothing local has changed") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{page} cannot be reached, because HF_HUB_OFFLINE is set; unset it") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how the client reports a failed upload
        raise HubError(
            f"{page} cannot be reached, or the connection broke ({error}): no commit was made and nothing local has "
            "changed; try again"
        ) from error
