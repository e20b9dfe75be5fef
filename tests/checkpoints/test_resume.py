"""The checkpoint protocol: exact round trip, every flipped byte found, fall back, a full disk, other runs refused."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfbyte.checkpoints import resume
from halfbyte.checkpoints.resume import Contents, Damaged, DiskFull
from halfbyte.errors import CheckpointError


def make(step: int, seed: int = 0, size: int = 50) -> Contents:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tensors = {
        "adapter_model": {"a": torch.randn(size, 3, generator=generator), "b": torch.randn(3, generator=generator).bfloat16()},
        "optimizer": {"first.a": torch.randn(size, 3, generator=generator), "count": torch.tensor(float(step))},
    }
    return Contents(step, tensors, {"trainer": {"step": step, "loss": 0.1 + step}, "data": {"row": 4 * step}}, {"train.lr": 1e-4})


def assert_equal(one: Contents, other: Contents) -> None:
    assert (one.step, one.documents, one.identity) == (other.step, other.documents, other.identity)
    assert one.tensors.keys() == other.tensors.keys()
    for stem, group in one.tensors.items():
        assert group.keys() == other.tensors[stem].keys()
        for name, tensor in group.items():
            assert tensor.dtype == other.tensors[stem][name].dtype
            assert torch.equal(tensor, other.tensors[stem][name])


class Told(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def told() -> Told:
    return Told()


def test_round_trip_is_exact(tmp_path: Path, told: Told) -> None:
    path = resume.save(tmp_path, make(7))
    assert path.name == "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_model.safetensors",
        "data.json",
        "manifest.json",
        "optimizer.safetensors",
        "trainer.json",
    ]
    found = resume.newest(tmp_path, told)
    assert found is not None
    assert_equal(found, make(7))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    assert not told


def test_the_newest_valid_one_is_found_and_a_damaged_one_set_aside(tmp_path: Path, told: Told) -> None:
    for step in (2, 4, 100000000):
        resume.save(tmp_path, make(step))
    (tmp_path / "step-100000000" / "optimizer.safetensors").unlink()
    found = resume.newest(tmp_path, told)
    assert found is not None
    assert_equal(found, make(4))
    assert (tmp_path / "step-100000000.corrupt").is_dir()
    assert len(told) == 1
    assert "WARNING" in told[0]
    assert "optimizer.safetensors" in told[0]


def test_no_checkpoint_is_none(tmp_path: Path, told: Told) -> None:
    assert resume.newest(tmp_path / "absent", told) is None
    assert resume.newest(tmp_path, told) is None


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = resume.save(tmp_path, make(3))
    files = sorted(path.iterdir())
    sizes = [f.stat().st_size for f in files]
    generator = random.Random(0)
    places = [(file, generator.randrange(size)) for file, size in zip(files, sizes, strict=True) for _ in range(20)]
    for file, at in places:
        data = bytearray(file.read_bytes())
        old = data[at]
        data[at] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        with pytest.raises(Damaged):
            resume.load(path)
        data[at] = old
        file.write_bytes(data)
    resume.load(path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_file_is_found(tmp_path: Path, name: str, keep: int) -> None:
    path = resume.save(tmp_path, make(3))
    os.truncate(path / name, keep)
    with pytest.raises(Damaged, match=name if name != "manifest.json" else "manifest"):
        resume.load(path)


def test_data_zeroed_by_a_crash_is_found(tmp_path: Path) -> None:
    path = resume.save(tmp_path, make(3))
    file = path / "optimizer.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(Damaged):
        resume.load(path)


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_alone(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "VERSION", 2)
    resume.save(tmp_path, make(3))
    monkeypatch.setattr(resume, "VERSION", 1)
    with pytest.raises(CheckpointError, match="version 2"):
        resume.newest(tmp_path, told)
    assert (tmp_path / "step-00000003").is_dir()


def test_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        resume.save(tmp_path, make(step))
        resume.prune(tmp_path, 2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]


def test_saving_a_step_again_replaces_it(tmp_path: Path, told: Told) -> None:
    resume.save(tmp_path, make(3, seed=1))
    resume.save(tmp_path, make(3, seed=2))
    found = resume.newest(tmp_path, told)
    assert found is not None
    assert_equal(found, make(3, seed=2))


def test_leftovers_of_dead_processes_are_swept(tmp_path: Path, told: Told) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f".step-00000002.tmp-{socket.gethostname()}-{dead.pid}"
    living = tmp_path / f".step-00000002.tmp-{socket.gethostname()}-{os.getpid()}"
    elsewhere = tmp_path / ".step-00000002.tmp-another-host-1"
    trash = tmp_path / ".trash-step-00000001-1"
    for directory in (gone, living, elsewhere, trash):
        directory.mkdir()
    resume.sweep(tmp_path, told)
    assert not gone.exists()
    assert not trash.exists()
    assert living.exists()
    assert elsewhere.exists()
    assert len(told) == 1


def test_another_run_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume.refuse_other_run(make(1), {"train.lr": 2e-4, "adapter.rank": 8}, tmp_path)
    assert "train.lr: 0.0001 in the checkpoint, 0.0002 now" in caught.value.message
    assert "adapter.rank: nothing in the checkpoint, 8 now" in caught.value.message
    resume.refuse_other_run(make(1), {"train.lr": 1e-4}, tmp_path)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, told: Told, small_files: None) -> None:
    resume.save(tmp_path, make(1))
    with pytest.raises(DiskFull, match="step-00000002"):
        resume.save(tmp_path, make(2, size=5000))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found = resume.newest(tmp_path, told)
    assert found is not None
    assert_equal(found, make(1))


def test_no_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="MiB needed"):
        resume.save(tmp_path, make(1))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = resume.save(tmp_path, make(1))
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert set(manifest["files"]) == {f.name for f in path.iterdir()} - {"manifest.json"}


@pytest.mark.cpu
def test_saving_and_verifying_hold_no_second_copy(tmp_path: Path) -> None:
    """Full fine-tuning would need the weights' and moments' bytes twice more at every save."""
    tensors = {f"t{i}": torch.full((1 << 19,), float(i)) for i in range(16)}  # 32 MiB
    tracemalloc.start()
    try:
        path = resume.save(tmp_path, Contents(1, {"optimizer": tensors}, {}, {}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert all(torch.equal(resume.load(path).tensors["optimizer"][name], tensor) for name, tensor in tensors.items())
