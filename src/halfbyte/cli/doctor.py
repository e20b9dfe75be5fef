"""`halfbyte doctor`: is this machine ready? GPU, versions, kernels compiled and checked, disk.

One of the two places that catch every exception: a broken installation is what it is there to describe.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "gguf",
    "triton",
    "bitsandbytes",
)
OPTIONAL = ("triton", "bitsandbytes")


def doctor(as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON.")) -> None:
    """Check this machine: platform, GPU, versions, kernels compiled and compared with their references, disk."""
    from halfbyte.cli.console import emit, say

    findings = [_checked(name, check) for name, check in CHECKS.items()]
    if as_json:
        emit({"ok": all(f["state"] != "bad" for f in findings), "findings": findings})
    else:
        for found in findings:
            mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[found["state"]]
            print(f"{mark} {found['name']}: {found['text']}")
    if any(f["state"] == "bad" for f in findings):
        say("something is not right; see above")
        raise typer.Exit(1)


def _checked(name: str, check: Callable[[], tuple[str, str]]) -> dict[str, Any]:
    try:
        state, text = check()
    except Exception as error:
        state, text = "bad", f"{type(error).__name__}: {error}"
    return {"name": name, "state": state, "text": text}


def _platform() -> tuple[str, str]:
    system, machine = platform.system(), platform.machine()
    text = f"{system} {machine}, Python {platform.python_version()}"
    if system == "Linux":
        return "ok", text
    return "note", f"{text}; tested on Linux only (docs/guides/platforms.md)"


def _versions() -> tuple[str, str]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name not in OPTIONAL:
                missing.append(name)
    if missing:
        return "bad", f"missing: {', '.join(missing)}; installed: {', '.join(found)}"
    return "ok", ", ".join(found)


def _gpu() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            return "bad", f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: a CPU build, or a driver too old"
        return "note", "none; everything runs on the CPU, slowly"
    if torch.version.hip:
        return "note", f"{torch.cuda.get_device_name(0)} through ROCm: not tested"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    text = f"{names[0]}, compute capability {major}.{minor}, {memory}, CUDA {torch.version.cuda}"
    if len(names) > 1:
        text += f"; {len(names)} GPUs are here, one is used"
    return ("ok", text) if (major, minor) >= (7, 0) else ("bad", f"{text}; 7.0 (Volta) or later is needed")


def _kernels() -> tuple[str, str]:
    import torch

    from halfbyte.cli.arguments import device
    from halfbyte.formats.packed import Format
    from halfbyte.formats.quantize import dequantize, quantize
    from halfbyte.kernels.dequantize import dequantize as fast
    from halfbyte.kernels.dispatch import twin

    on = device()
    generator = torch.Generator().manual_seed(0)
    for fmt in (Format("nf4", 64, True), Format("fp4", 64), Format("int4", 64), Format("int8")):
        packed = quantize(torch.randn(96, 160, generator=generator).to(on), fmt, name="doctor")
        for dtype in (torch.float32, torch.bfloat16):
            if not torch.equal(fast(packed, dtype), dequantize(packed, dtype)):
                return "bad", f"the {twin(on)} kernel of {fmt.kind} differs from its reference in {dtype}"
    return "ok", f"{twin(on)} on {on}: nf4, fp4, int4, int8 equal their references"


def _memory() -> tuple[str, str]:
    from halfbyte.memory.measure import ram

    found = ram()
    return "ok", f"{found.free / 2**30:.1f} of {found.total / 2**30:.1f} GiB RAM available"


def _disk() -> tuple[str, str]:
    from halfbyte.checkpoints.cache import cache_root

    root = cache_root()
    near = next(p for p in (root, *root.parents) if p.exists())
    spots = {"cache": near, "here": Path.cwd()}
    free = {name: shutil.disk_usage(path).free for name, path in spots.items()}
    text = ", ".join(f"{count / 2**30:.1f} GiB free {'for the cache' if name == 'cache' else name}" for name, count in free.items())
    return ("ok" if min(free.values()) > 5 << 30 else "note"), f"{text} ({root})"


CHECKS = {"platform": _platform, "versions": _versions, "gpu": _gpu, "memory": _memory, "kernels": _kernels, "disk": _disk}
