"""A small server that stands in for the Hugging Face hub, so that its real client can be tested without a network."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub: repositories that take files, the large ones by git's LFS, and give them back."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.downloads: list[str] = []

    def environment(self, home: Path, token: str = "hf_secret") -> dict[str, str]:
        local = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**local, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class HubRequest(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer(401, b'{"error": "Invalid username or password."}', {"Content-Type": "application/json"})
            return
        result = json.dumps(self.post(body)).encode()
        self.answer(200, result, {"Content-Type": "application/json"})

    def post(self, body: bytes) -> dict:
        hub = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.repositories.setdefault(f"{asked['organization']}/{asked['name']}", {})
            return {"url": f"{hub.address}/{asked['organization']}/{asked['name']}"}
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\npipeline_tag: ")
            return {"errors": [], "warnings": []}
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}} for one in objects
                ],
            }
        files = hub.repositories[self.path.split("/api/models/")[1].rsplit("/", 2)[0]]
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        assert self.path.endswith("/commit/main")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
        repository = next(name for name, held in hub.repositories.items() if held is files)
        return {"commitUrl": f"{hub.address}/{repository}/commit/{'b' * 40}", "commitOid": "b" * 40}

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, b"", {})

    def do_GET(self) -> None:
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        content = self.server.repositories.get(repository, {}).get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self.server.downloads.append(f"{self.command} {name}")
        self.answer(200, content, {"ETag": f'"{name}-1"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET
