"""Paged moments: the bits of the one launch whatever the chunks, whatever order the streams run in; saved, resumed, freed."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from halfbyte.kernels.adamw import CHUNK, SLOTS
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import Flat, flatten
from halfbyte.optim.paged import Lanes, Pages

ROLES = ("lora_a", "lora_b", "dense", "no_decay")
BLOCKS = 9


def build(bits: int, device: str = "cpu") -> AdamW:
    """Four roles in 9 blocks of 256; the moments on the device."""
    generator = torch.Generator().manual_seed(1)
    sizes = dict(zip(ROLES, (700, 300, 513, 10), strict=True))
    flat = flatten([(role, nn.Parameter(torch.randn(n, generator=generator).to(device)), role) for role, n in sizes.items()])
    assert len(flat.values) == BLOCKS * 256
    return AdamW(flat, OptimConfig(bits=bits, weight_decay=0.1, lora_plus=4.0))  # type: ignore[arg-type]


def pages(optimizer: AdamW, blocks: int, lanes: Lanes | None = None) -> Pages:
    values = optimizer.flat.values
    return Pages(len(values), optimizer.bits, values.device, 256 * blocks, lanes)


def train(optimizer: AdamW, steps: range, bad: int | None = None) -> None:
    """Steps on random gradients; that of step `bad` is not finite."""
    flat, device = optimizer.flat, optimizer.flat.values.device
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        for group in flat.groups:  # never the padding, whose moments are not saved
            for segment in group.segments:
                group.view(group.grads, segment).copy_(torch.randn(segment.shape, generator=generator))
        if i == bad:
            flat.grads[7] = float("inf")
        optimizer.clip(torch.ones((), device=device), torch.ones((), device=device), 1.0)
        optimizer.step(1e-2)


def everything(optimizer: AdamW) -> list[torch.Tensor]:
    state = optimizer.state_dict()  # first: it waits for the moments
    return [t.detach().cpu().clone() for t in (*state.values(), optimizer.flat.values, optimizer.flat.grads)]


def assert_same(one: AdamW, other: AdamW) -> None:
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("blocks", range(1, BLOCKS + 2))
def test_every_chunk_size_gives_the_bits_of_the_whole(bits: int, blocks: int) -> None:
    whole, chunked = build(bits), build(bits)
    chunked.page(pages(chunked, blocks))
    for optimizer in (whole, chunked):
        train(optimizer, range(5), bad=2)
    assert float(whole.kept.count) == 4
    assert_same(whole, chunked)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_state_moves_between_paged_and_not(bits: int) -> None:
    whole = build(bits)
    train(whole, range(6))
    one = build(bits)
    train(one, range(2))
    for start, blocks in ((2, 2), (4, None)):  # there, and back
        other = build(bits)
        if blocks is not None:
            other.page(pages(other, blocks))
        other.flat.values.copy_(one.flat.values)
        other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
        assert (other.pages is not None) == (blocks is not None), "loading changed where the moments are"
        train(other, range(start, start + 2))
        one = other
    assert_same(whole, one)


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_go_to_the_host_between_two_steps(bits: int) -> None:
    whole, moved = build(bits), build(bits)
    for optimizer in (whole, moved):
        train(optimizer, range(2))
    moved.page(pages(moved, 4))
    moved.page()  # nothing is done twice
    for optimizer in (whole, moved):
        train(optimizer, range(2, 4))
    assert_same(whole, moved)


def test_what_is_built_paged_starts_at_zero() -> None:
    for bits in (32, 8):
        whole = build(bits)
        other = AdamW(whole.flat, OptimConfig(bits=bits), paged=True)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(whole.moments.fields(), other.moments.fields(), strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("at", range(BLOCKS))
def test_a_step_that_ends_in_the_middle_goes_on_there(bits: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = build(bits), build(bits)
    for optimizer in (whole, broken):
        optimizer.page(pages(optimizer, 1))
        train(optimizer, range(1))
    train(whole, range(1, 3))
    from halfbyte.kernels import adamw

    original, calls = adamw.step, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("injected")
        original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(adamw, "step", failing)
        with pytest.raises(torch.OutOfMemoryError):
            train(broken, range(1, 2))
        broken.step(1e-2)
    train(broken, range(2, 3))
    assert_same(whole, broken)


class Queued:
    """A lane that works whenever it likes: a queue, emptied by chance, never past an event that is not there yet."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.queue: list[Callable[[], bool]] = []
        self.done = 0
        self.added = 0
        world.lanes.append(self)

    def run(self, work: Callable[[], None]) -> None:
        def item() -> bool:
            work()
            return True

        self._add(item)

    def record(self) -> tuple[Queued, int]:
        return self, self.added

    def wait(self, event: object) -> None:
        lane, count = event  # type: ignore[misc]
        self._add(lambda: lane.done >= count)

    def finish(self) -> None:
        while self.queue:
            self.world.turn()

    def _add(self, item: Callable[[], bool]) -> None:
        self.queue.append(item)
        self.added += 1
        self.world.some()


class World:
    """Lanes that run in an order of chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.lanes: list[Queued] = []

    def turn(self) -> None:
        lane = self.chance.choice([lane for lane in self.lanes if lane.queue])
        if lane.queue[0]():
            lane.queue.pop(0)
            lane.done += 1

    def some(self) -> None:
        while any(lane.queue for lane in self.lanes) and self.chance.random() < 0.4:
            self.turn()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_the_streams_changes_a_bit(bits: int, seed: int) -> None:
    whole, chunked = build(bits), build(bits)
    world = World(seed)
    chunked.page(pages(chunked, 1 + seed % 4, (Queued(world), Queued(world), Queued(world))))
    train(whole, range(4))
    # The queues hold the step's own work too: gradients must be read before the next step writes them.
    for i in range(4):
        train(chunked, range(i, i + 1))
        assert chunked.pages is not None
        chunked.pages.main.finish()
        chunked.applied = 0
    assert_same(whole, chunked)


def test_a_missing_event_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above has teeth: without the waits for `free`, or for `ready`, some order ends elsewhere."""
    for kind in ("inward", "main", "outward"):
        wrong = 0
        for seed in range(12):
            whole, chunked = build(32), build(32)
            world = World(seed)
            made = pages(chunked, 1, (Queued(world), Queued(world), Queued(world)))
            chunked.page(made)
            monkeypatch.setattr(getattr(made, kind), "wait", lambda event: None)
            for optimizer in (whole, chunked):
                for i in range(3):
                    train(optimizer, range(i, i + 1))
                    if optimizer is chunked:
                        made.main.finish()
                        chunked.applied = 0
            wrong += not all(torch.equal(a, b) for a, b in zip(everything(whole), everything(chunked), strict=True))
        assert wrong, f"the waits of `{kind}` decide nothing"


def test_the_memory_goes_with_the_optimizer() -> None:
    optimizer = build(32)
    optimizer.page(pages(optimizer, 2))
    train(optimizer, range(2))
    assert optimizer.pages is not None
    arena = weakref.ref(optimizer.pages.arena)
    slot = weakref.ref(optimizer.pages.slots[0].first)
    del optimizer
    gc.collect()
    assert arena() is None and slot() is None


def flat_of(n: int) -> Flat:
    return flatten([("x", nn.Parameter(torch.randn(n, device="cuda")), "lora_b")])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("chunk", [1 << 16, 1 << 18, 1 << 21])
def test_on_a_gpu_the_bits_are_those_of_one_launch(bits: int, chunk: int) -> None:
    whole, chunked = build_large(bits), build_large(bits)
    chunked.page(Pages(len(chunked.flat.values), bits, chunked.flat.values.device, chunk))
    assert chunked.moments.first.device.type == "cpu" and chunked.moments.first.is_pinned()
    for optimizer in (whole, chunked):
        generator = torch.Generator("cuda").manual_seed(3)
        for i in range(6):
            optimizer.flat.grads.normal_(generator=generator)
            if i == 2:
                optimizer.flat.grads[7] = float("nan")
            optimizer.clip(torch.ones((), device="cuda"), torch.ones((), device="cuda"), 1.0)
            optimizer.step(1e-2)
    assert_same(whole, chunked)


def build_large(bits: int) -> AdamW:
    torch.manual_seed(0)
    return AdamW(flat_of(5_000_123), OptimConfig(bits=bits))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_memory_is_what_was_said_and_comes_back() -> None:
    torch.cuda.empty_cache()
    flat = flat_of(1 << 24)
    before = torch.cuda.memory_allocated()
    optimizer = AdamW(flat, OptimConfig(), paged=True)
    taken = torch.cuda.memory_allocated() - before
    assert taken <= SLOTS * 8 * CHUNK + (1 << 20)
    optimizer.clip(torch.ones((), device="cuda"), torch.ones((), device="cuda"), 1.0)
    optimizer.step(1e-2)
    del optimizer
    gc.collect()
    assert torch.cuda.memory_allocated() == before
