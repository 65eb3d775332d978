"""The real Hub client against a server on this machine that speaks the Hub's HTTP API."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor, ViTAdapterBackbone
from vit_adapter.conversion.__main__ import main
from vit_adapter.conversion.convert import convert_source
from vit_adapter.conversion.hub import HubError, push_folder
from vit_adapter.conversion.hub_code import export_hub_code
from vit_adapter.conversion.model_card import model_card
from vit_adapter.conversion.source_files import SourceError, read_source

# The client's own way of uploading large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_loopback"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub(ThreadingHTTPServer):
    """Repositories in memory.

    commits: repository → path → bytes. refusal: status and error code that every request of a repository gets.
    broken_uploads: whether the connection breaks in the middle of an upload.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LoopbackHandler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.large_files: dict[str, bytes] = {}
        self.refusal: tuple[int, str] | None = None
        self.broken_uploads = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class LoopbackHandler(BaseHTTPRequestHandler):
    """The part of the Hub's API that uploading and downloading a model needs."""

    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def handle_request(self) -> None:
        if self.command == "PUT" and self.server.broken_uploads:
            self.rfile.read(1000)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self.answer({"error": code}, status, {"X-Error-Code": code})
        elif self.command == "GET" or self.command == "HEAD":
            self.read(path)
        elif self.command == "PUT":
            self.server.large_files[path.rpartition("/")[2]] = body
            self.answer({})
        else:
            self.write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read(self, path: str) -> None:
        commits = self.server.commits
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            repo = found.group(1)
            names = [{"rfilename": name} for name in commits.get(repo, {})]
            if repo in commits:
                self.answer({"id": repo, "sha": COMMIT, "siblings": names})
            else:
                self.missing("RepoNotFound")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in commits[found.group(1)].items()
            ]
            self.answer(entries)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo, name = found.groups()
            if repo not in commits:
                self.missing("RepoNotFound")
            elif name not in commits[repo]:
                self.answer({"error": name}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                data = commits[repo][name]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.answer(data, headers={"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))})
        else:
            self.missing("EntryNotFound")

    def write(self, path: str, body: bytes) -> None:
        url, commits = self.server.url, self.server.commits
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            status = 409 if repo in commits else 200
            commits.setdefault(repo, {})
            self.answer({"url": f"{url}/{repo}", "name": repo}, status)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    commits[found.group(1)][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    commits[found.group(1)][value["path"]] = self.server.large_files[value["oid"]]
            self.answer({"commitUrl": f"{url}/{found.group(1)}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.missing("EntryNotFound")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LoopbackHub]:
    """A running server that the client takes for the Hub; its cache is empty."""
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_client_at(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def point_client_at(monkeypatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the address


@pytest.fixture
def backbone_folder(tmp_path, vit_state, small_config) -> Path:
    torch.save(vit_state(24, 2, 4), tmp_path / "in.pth")
    convert_source(tmp_path / "in.pth", tmp_path / "folder", config=small_config())
    return tmp_path / "folder"


@pytest.fixture
def detector(small_config) -> MaskRcnnForInstanceSegmentation:
    torch.manual_seed(0)
    config = MaskRcnnConfig(backbone_config=small_config(), num_labels=3, fpn_channels=16, box_head_dim=16)
    return MaskRcnnForInstanceSegmentation(config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pushed_folder_comes_back_from_the_hub(hub, backbone_folder):
    before = contents(backbone_folder)
    url = push_folder(backbone_folder, "me/backbone")
    assert url == f"{hub.url}/me/backbone/commit/{COMMIT}"
    assert contents(backbone_folder) == before
    uploaded = hub.commits["me/backbone"]
    assert uploaded.keys() == before.keys()
    assert uploaded["model.safetensors"] == before["model.safetensors"]
    loaded = ViTAdapterBackbone.from_pretrained("me/backbone")
    assert loaded.config.provenance == json.loads(before["config.json"])["provenance"]
    state, written = loaded.state_dict(), read_source(backbone_folder).state
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


def test_the_card_names_the_repository_unless_somebody_wrote_it(hub, backbone_folder):
    push_folder(backbone_folder, "me/backbone")
    assert 'from_pretrained("me/backbone"' in hub.commits["me/backbone"]["README.md"].decode()
    (backbone_folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push_folder(backbone_folder, "me/backbone")
    assert hub.commits["me/backbone"]["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_a_backbone_on_the_hub_is_a_source(hub, backbone_folder, small_config, tmp_path):
    push_folder(backbone_folder, "me/backbone")
    source = read_source("me/backbone")
    assert source.name == "me/backbone"
    written = read_source(backbone_folder).state
    assert source.state.keys() == written.keys()
    assert all(torch.equal(source.state[name], written[name]) for name in written)
    convert_source("me/backbone", tmp_path / "again", config=small_config())


def test_a_pickle_is_fetched_only_where_there_is_no_safetensors_file(hub, backbone_folder, tmp_path, vit_state):
    push_folder(backbone_folder, "me/both")
    torch.save(vit_state(24, 2, 4), tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.commits["me/both"]["pytorch_model.bin"] = pickled
    hub.commits["me/old"] = {"pytorch_model.bin": pickled, "config.json": b"{}"}
    assert list(read_source("me/both").files) == ["model.safetensors"]
    assert not list(tmp_path.glob("cache/models--me--both/**/*.bin"))
    assert read_source("me/old").state.keys() == vit_state(24, 2, 4).keys()


def test_the_commands_push(hub, vit_state, tmp_path, capsys):
    torch.save(vit_state(192, 12, 14), tmp_path / "in.pth")
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out"), "--push-to-hub", "me/deit"]) == 0
    assert f"{hub.url}/me/deit/commit/{COMMIT}" in capsys.readouterr().out
    assert hub.commits["me/deit"] == contents(tmp_path / "out")  # the local card names the repository as well
    assert main(["push", str(tmp_path / "out"), "me/again", "--private"]) == 0
    assert hub.commits["me/again"]["model.safetensors"] == hub.commits["me/deit"]["model.safetensors"]
    hub.refusal = (401, "RepoNotFound")
    assert main(["push", str(tmp_path / "out"), "me/refused"]) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_model_and_processor_push_themselves(hub, detector):
    detector.push_to_hub("me/detector")
    MaskRcnnImageProcessor().push_to_hub("me/detector")
    loaded = AutoModelForInstanceSegmentation.from_pretrained("me/detector")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in detector.state_dict().items())
    assert isinstance(AutoImageProcessor.from_pretrained("me/detector"), MaskRcnnImageProcessor)


def test_a_folder_with_its_own_code_takes_it_along(hub, detector, tmp_path):
    detector.save_pretrained(tmp_path / "detector")
    export_hub_code(tmp_path / "detector", tmp_path / "code")
    push_folder(tmp_path / "code", "me/code")
    assert {"mask_rcnn.py", "configuration_mask_rcnn.py"} <= hub.commits["me/code"].keys()
    card = hub.commits["me/code"]["README.md"].decode()
    assert card == model_card(detector.config, "me/code", remote_code=True)


def test_a_wrong_token_is_explained_and_nothing_is_lost(hub, backbone_folder, monkeypatch):
    before = contents(backbone_folder)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"https://huggingface\.co/me/backbone.*hf auth login"):
        push_folder(backbone_folder, "me/backbone")
    assert hub.commits == {}
    assert contents(backbone_folder) == before


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, "RepoNotFound"), "401"),
        ((403, "GatedRepo"), r"is gated: ask for access at https://huggingface\.co/me/backbone"),
        ((400, "Whatever"), "status 400"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_page(hub, backbone_folder, refusal, sentence):
    before = contents(backbone_folder)
    hub.refusal = refusal
    with pytest.raises(HubError, match=sentence) as caught:
        push_folder(backbone_folder, "me/backbone")
    assert "https://huggingface.co/me/backbone" in str(caught.value)
    assert contents(backbone_folder) == before


def test_an_interrupted_upload_makes_no_commit_and_loses_nothing(hub, backbone_folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    before = contents(backbone_folder)
    hub.broken_uploads = True
    with pytest.raises(HubError, match="no commit was made and nothing local has changed"):
        push_folder(backbone_folder, "me/backbone")
    assert hub.commits["me/backbone"] == {}
    assert contents(backbone_folder) == before
    hub.broken_uploads = False
    push_folder(backbone_folder, "me/backbone")
    assert hub.commits["me/backbone"].keys() == before.keys()


def test_no_network_is_one_sentence(backbone_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    point_client_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens on port 9
    with pytest.raises(HubError, match="cannot be reached"):
        push_folder(backbone_folder, "me/backbone")
    with pytest.raises(SourceError, match="cannot be reached"):
        read_source("me/backbone")


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [((401, "GatedRepo"), "me/dinov2 is gated"), ((404, "RepoNotFound"), "no such public repository")],
)
def test_a_source_that_the_hub_does_not_give_is_explained(hub, refusal, sentence):
    hub.refusal = refusal
    with pytest.raises(SourceError, match=sentence):
        read_source("me/dinov2")


def test_a_name_that_cannot_be_a_repository_is_refused(hub, backbone_folder):
    with pytest.raises(HubError, match="is no name for a repository"):
        push_folder(backbone_folder, "a/b/c")


def test_another_folder_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        push_folder(tmp_path, "me/nothing")
    assert hub.commits == {}
