"""Hub ids, against a small Hub on this machine: download, revision, gated, private, missing, offline, and what is never fetched."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import huggingface
from halfbyte.formats.config import FormatConfig
from support import save_tiny

pytestmark = pytest.mark.cpu
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A minimal Hub: repositories as folders of bytes; every request is remembered with its token."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    port: int = 0

    def respond(self, method: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].strip("/")
        self.requests.append((method, path, token))
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        if name == "owner/gated" and token != "Bearer hf_granted":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/gated is restricted"}, b"{}"
        if name == "owner/broken":
            return 500, {}, b"{}"
        if name == "owner/denied":
            return 403, {}, b"{}"
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = self.repositories[name]
        if "revision" in parts and parts[parts.index("revision") + 1] not in ("main", "v1", SHA):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path.startswith("api/models/"):
            return 200, {"Content-Type": "application/json"}, json.dumps(self.describe(name, files, "tree" in parts)).encode()
        return self.file(files, "/".join(parts[4:]))

    def describe(self, name: str, files: dict[str, bytes], tree: bool) -> Any:
        if tree:
            return [
                {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for f, data in files.items()
            ]
        return {"id": name, "sha": SHA, "siblings": [{"rfilename": f} for f in files], "private": False, "tags": [], "downloads": 0}

    def file(self, files: dict[str, bytes], name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}, files[name]

    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {path.split("/", 4)[4] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    good = {p.name: p.read_bytes() for p in save_tiny(tmp_path / "good").iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "original/model.safetensors": b"no", "README.md": b"# hi", "modeling.py": b"boom"}
    pickles = {name: data for name, data in good.items() if name != "model.safetensors"} | {"pytorch_model.bin": b"pickle"}
    lora = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "optimizer.pt": b"pickle", "README.md": b"# hi"}
    server = Hub({"owner/good": good | extra, "owner/gated": good, "owner/pickle": pickles, "owner/gguf": {"m.Q4_K.gguf": b"GGUF"}})
    server.repositories["owner/lora"] = lora

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            status, headers, body = server.respond(self.command, self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *_: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server
    http.shutdown()
    http.server_close()
    thread.join()


def ask(names: list[str], hub: Hub, tmp_path: Path, child_env: dict[str, str], **env: str) -> list[dict[str, Any]]:
    """What a fresh process makes of each name."""
    environment = child_env | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1"} | env
    environment.pop("HF_TOKEN", None) if "HF_TOKEN" not in env else None
    probe = Path(__file__).with_name("hub_probe.py")
    done = subprocess.run([sys.executable, str(probe), *names], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


def test_names_on_the_hub(hub: Hub, tmp_path: Path, child_env: dict[str, str]) -> None:
    names = [
        "owner/good",
        "owner/good@v1",
        "owner/good@nope",
        "owner/gated",
        "owner/missing",
        "owner/pickle",
        "owner/gguf",
        "owner/denied",
    ]
    names += ["owner/broken"]
    good, tagged, wrong, gated, missing, pickled, ggufs, denied, broken = ask(names, hub, tmp_path, child_env)
    local = huggingface.load(str(tmp_path / "good"), FormatConfig(), torch.float32)
    assert good["digest"] == tagged["digest"] == local.digest
    assert good["revision"] == tagged["revision"] == SHA
    assert good["name"] == "owner/good"
    assert hub.fetched() == {p.name for p in (tmp_path / "good").iterdir()}, "no pickle, code, sub-folder or text"
    assert wrong["code"] == "hub.revision" and "nope" in wrong["message"]
    assert gated["code"] == "hub.gated" and "HF_TOKEN" in gated["hint"]
    assert missing["code"] == "hub.not-found" and "owner/missing" in missing["message"]
    assert pickled["error"] == "UnsafeFileError" and "pytorch_model.bin" in pickled["message"]
    assert "m.Q4_K.gguf" in ggufs["message"]
    assert denied["code"] == "hub.refused" and "HF_TOKEN" in denied["hint"]
    assert broken["code"] == "hub.http" and "500" in broken["message"]


def test_adapters_on_the_hub(hub: Hub, tmp_path: Path, child_env: dict[str, str]) -> None:
    names = ["adapter:owner/lora", "adapter:owner/good", "adapter:smollm2-135m", "adapter:owner/missing", "owner/lora"]
    lora, model, bundled, missing, as_base = ask(names, hub, tmp_path, child_env)
    assert lora["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert model["files"] is None and bundled["files"] is None
    assert missing["code"] == "hub.not-found"
    assert as_base["code"] == "hub.adapter" and "chat" in as_base["hint"]
    offline = ask(["adapter:owner/lora", "adapter:owner/good"], hub, tmp_path, child_env, HF_HUB_OFFLINE="1")
    assert [answer["files"] for answer in offline] == [lora["files"], None]


def test_a_token_opens_a_gated_model(hub: Hub, tmp_path: Path, child_env: dict[str, str]) -> None:
    (answer,) = ask(["owner/gated"], hub, tmp_path, child_env, HF_TOKEN="hf_granted")
    assert answer["revision"] == SHA


def test_offline(hub: Hub, tmp_path: Path, child_env: dict[str, str]) -> None:
    (online,) = ask(["owner/good"], hub, tmp_path, child_env)
    asked = len(hub.requests)
    offline, absent = ask(["owner/good", "owner/gated"], hub, tmp_path, child_env, HF_HUB_OFFLINE="1")
    assert offline == online
    assert len(hub.requests) == asked
    assert absent["code"] == "hub.offline" and "HF_HUB_OFFLINE" in absent["message"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    unreachable, absent = ask(["owner/good", "owner/gated"], hub, tmp_path, child_env, **nowhere)
    assert unreachable == online
    assert absent["code"] == "hub.offline" and "cannot be reached" in absent["message"]
