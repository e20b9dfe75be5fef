"""What `auto` becomes, and that it is kept."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import RecipeError
from halfbyte.train import choices
from halfbyte.train.choices import Choice
from halfbyte.train.determinism import deterministic

CPU = torch.device("cpu")


def test_what_is_asked_for_is_taken() -> None:
    assert choices.compute("fp16", CPU) == Choice("fp16", "asked for")


@pytest.mark.parametrize(("fast", "slow"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_faster_dtype_is_taken_on_a_cpu_with_both_times(monkeypatch: pytest.MonkeyPatch, fast: str, slow: str) -> None:
    times = {choices.DTYPES[fast]: 0.001, choices.DTYPES[slow]: 0.02}
    monkeypatch.setattr(choices, "_gemm_seconds", lambda dtype: times[dtype])
    found = choices.compute("auto", CPU)
    assert found.value == fast
    assert f"{fast} 1.0 ms" in found.reason
    assert f"{slow} 20.0 ms" in found.reason


def test_decoded_weights_are_held_where_the_plan_leaves_room() -> None:
    assert choices.decoded(100 << 20, 400 << 20).value == "on"
    short = choices.decoded(100 << 20, (400 << 20) - 1)
    assert short.value == "off" and "100 MiB" in short.reason
    assert choices.decoded(100 << 20, -1).value == "off"
    assert choices.decoded(0, 1 << 40).value == "off"


def test_threads_from_outside_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choices.threads(CPU) == Choice(torch.get_num_threads(), "OMP_NUM_THREADS")


def test_the_faster_number_of_threads_is_taken_and_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(choices, "_gemm_seconds", lambda dtype: {8: 0.02, 4: 0.01}[asked[-1]])
    assert choices.threads(CPU).value == 4
    assert asked[-1] == 8


def test_a_stored_choice_is_kept_unless_another_is_asked_for() -> None:
    kept = choices.from_document(choices.document({"compute": Choice("fp32", "auto: measured")}))
    assert choices.settle("compute", "auto", kept, lambda: Choice("bf16", "new")).value == "fp32"
    assert choices.settle("compute", "bf16", kept, lambda: Choice("bf16", "new")) == Choice("bf16", "asked for")
    assert choices.settle("threads", "auto", kept, lambda: Choice(2, "new")) == Choice(2, "new")
    twice = choices.settle(
        "compute", "auto", {"compute": choices.settle("compute", "auto", kept, lambda: Choice(0, ""))}, lambda: Choice(0, "")
    )
    assert twice.reason.count(choices.KEPT) == 1


def test_fp8_is_taken_only_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"8\.9 or newer") as refused:
        choices.require("fp8", CPU)
    assert refused.value.code == "recipe.compute" and "bf16" in refused.value.hint
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(RecipeError, match=r"a GPU has 8\.6"):
        choices.require("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    choices.require("fp8", torch.device("cuda"))
    choices.require("auto", CPU)
    assert choices.compute("fp8", torch.device("cuda")) == Choice("fp8", "asked for")
    assert choices.DTYPES["fp8"] == torch.bfloat16


def test_fp8_is_kept_and_never_chosen_by_auto() -> None:
    kept = {"compute": Choice("fp8", "asked for")}
    assert choices.settle("compute", "auto", kept, lambda: Choice("bf16", "auto")).value == "fp8"
    assert choices.compute("auto", CPU).value in ("fp32", "bf16")


def test_a_deterministic_run_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_gemm_seconds", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with deterministic(True):
        assert choices.compute("auto", CPU) == choices.Choice("fp32", choices.UNTIMED)
        assert choices.threads(CPU).value == torch.get_num_threads()
