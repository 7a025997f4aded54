"""Publishing, against a server that answers the few requests of the Hub's API that an upload makes."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from videollama2_hf.conversion import ConversionError
from videollama2_hf.conversion.hub import push_to_hub


TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """A Hub with one user, `me`. `status`: answered to every request instead, if set."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}
        self.status: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
        self.server.uploads[self.path.split("/")[-1]] = content
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status is not None:
            return self.answer({"error": "no such luck"}, self.server.status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if match and match[1] in self.server.repositories:
            return getattr(self, match[2])(match[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        self.answer({"error": f"not found: {path}"}, 404)

    def create(self, request):
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if not name.startswith("me/"):
            return self.answer({"error": "You don't have the rights to create a model there"}, 403)
        private = request.get("private") or request.get("visibility") == "private"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {"private": bool(private), "files": {}})
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if exists else 200)

    def preupload(self, name, body):
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for item in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def commit(self, name, body):
        files = self.server.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.uploads[line["value"]["oid"]]
        url = f"{self.server.url}/{name}/commit/{'c' * 40}"
        self.answer({"success": True, "commitUrl": url, "commitOid": "c" * 40, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "converted"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text('---\nlicense: mit\n---\n\n```python\ncheckpoint = "converted"\n```\n')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "original" / "config.json").write_text('{"original": true}')
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_every_file_arrives(hub, folder, private):
    url = push_to_hub(folder, "me/mine", private=private, token=TOKEN)
    assert url == f"{hub.url}/me/mine/commit/{'c' * 40}"
    repository = hub.repositories["me/mine"]
    assert repository["private"] is private
    expected = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repository["files"] == expected
    assert b'checkpoint = "me/mine"' in repository["files"]["README.md"]


def test_pushing_again_to_a_repository_of_the_user(hub, folder):
    push_to_hub(folder, "mine", token=TOKEN)
    (folder / "config.json").write_text('{"new": 1}')
    push_to_hub(folder, "mine", token=TOKEN)
    assert hub.repositories["me/mine"]["files"]["config.json"] == b'{"new": 1}'


def test_not_logged_in(hub, folder, monkeypatch):
    for token in ("hf_wrong", None):
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
        with pytest.raises(ConversionError, match="Log in with a token that has the right to write"):
            push_to_hub(folder, "me/mine", token=token)


def test_no_right(hub, folder):
    with pytest.raises(ConversionError, match="may not write to theirs/mine .*rights to create.*hf auth login"):
        push_to_hub(folder, "theirs/mine", token=TOKEN)


def test_names(hub, folder, tmp_path):
    with pytest.raises(ConversionError, match="'me/mine/too' is not a name of a Hub repository.*owner/name"):
        push_to_hub(folder, "me/mine/too", token=TOKEN)
    with pytest.raises(FileNotFoundError, match="not a converted checkpoint"):
        push_to_hub(tmp_path, "me/mine", token=TOKEN)
    assert not hub.repositories


def test_the_hub_is_broken(hub, folder):
    hub.status = 507
    with pytest.raises(ConnectionError, match="The Hub answered no such luck.*not sent twice"):
        push_to_hub(folder, "me/mine", token=TOKEN)


def test_no_network(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        push_to_hub(folder, "me/mine", token=TOKEN)


def test_offline(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set|cannot be reached"):
        push_to_hub(folder, "me/mine", token=TOKEN)
