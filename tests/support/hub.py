"""A server that plays the Hub on this machine: models to read, private and gated ones, and repositories to push to."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from .base_folders import use_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Plays the hub for the models of `folders`, and keeps what was asked.

    gated: only `token` opens the files. private: only `token` sees the repository. created: what was pushed is in
    folders here. revisions: those that every repository has; nobody may make a branch, and main is the only one listed.
    """

    def __init__(self, folders: dict[str, Path], created: Path | None = None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders, self.created = dict(folders), created
        self.revisions = {"main", COMMIT}
        self.gated, self.private, self.token = False, False, "hf_right"
        self.status, self.files_status = None, None  # of all answers, and of those about files
        self.asked: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        return [path for method, path in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], created: Path | None = None) -> Iterator[Hub]:
    """Serve the models of `folders` as the Hub that huggingface_hub asks."""
    server = Hub(folders, created)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def refused(self, path: str) -> bool:
        """Keep what was asked, and answer if it is refused whatever it is."""
        hub = self.server
        hub.asked.append((self.command, path))
        status = hub.status or (hub.files_status if "/resolve/" in path else None)
        if status:
            self.send(status)
        elif self.sent and self.sent != hub.token:
            self.send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            return False
        return True

    @property
    def sent(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if self.refused(path):
            return None
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        folder = hub.folders.get(name)
        if folder is None or (hub.private and self.sent != hub.token):
            return self.send(404 if self.sent else 401, {"X-Error-Code": "RepoNotFound"})
        if any(part in path for part in ("/revision/", "/resolve/", "/tree/")):
            revision = unquote(path.split(name, 1)[1].split("/")[2])
            if revision not in hub.revisions:
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        if api and "/tree/" in path:
            entries = [{"type": "file", "path": k, "size": f.stat().st_size, "oid": "0" * 40} for k, f in files.items()]
            return self.send(200, body=json.dumps(entries).encode())
        if path.endswith("/refs"):
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            return self.send(200, body=json.dumps({"branches": [main], "converts": [], "tags": []}).encode())
        if api:
            info = {"id": name, "modelId": name, "sha": COMMIT, "private": hub.private, "tags": [], "downloads": 0}
            info |= {"gated": "manual" if hub.gated else False, "siblings": [{"rfilename": k} for k in files]}
            return self.send(200, body=json.dumps(info).encode())
        if hub.gated and self.sent != hub.token:
            return self.send(403 if self.sent else 401, {"X-Error-Code": "GatedRepo"})
        file = files.get(path.split("/resolve/")[1].split("/", 1)[1])
        if file is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = file.read_bytes()
        return self.send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploads[self.path.removeprefix("/upload/")] = body
        self.send(200)

    def do_POST(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused(path):
            return None
        if self.sent != hub.token:
            return self.send(403 if self.sent else 401)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in hub.folders
            hub.folders.setdefault(name, hub.created / name.replace("/", "--")).mkdir(exist_ok=True)
            return self.answer({"url": f"{hub.address}/{name}"}, status=409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            return self.answer({"files": [
                {"path": each, "uploadMode": mode[each.endswith((".safetensors", ".pt"))], "shouldIgnore": False}
                for each in names
            ]})  # fmt: skip
        if "/branch/" in path:
            return self.send(403)
        if path.endswith("/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in body.splitlines():
                self.commit(hub.folders[name], **json.loads(line))
            answer = {"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            return self.answer(answer | {"pullRequestUrl": f"{hub.address}/{name}/discussions/1"})
        return self.send(404)

    def commit(self, folder: Path, key: str, value: dict) -> None:
        if key == "header":
            return
        path = folder / value["path"]
        if key == "deletedFile":
            path.unlink()
            while not any(path.parent.iterdir()):  # git knows no empty folders
                path = path.parent
                path.rmdir()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.server.uploads[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"]))

    def answer(self, content: dict, status: int = 200) -> None:
        self.send(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def send(self, status, headers=None, body=b""):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
