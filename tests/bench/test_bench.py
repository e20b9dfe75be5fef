"""The benchmarks' own arithmetic: what a step must compute, which part a kernel belongs to, what a case means on a command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .test_tables import ROOT, bench


def test_a_loss_is_plausible_where_it_is_that_of_a_random_head() -> None:
    """70B's lies 1.6 above ln(vocabulary), as its hidden states are 8,192 wide: so with random logits."""
    config = SimpleNamespace(vocab_size=8_192, hidden_size=8_192, initializer_range=0.02)
    logits = torch.randn(512, 8_192) @ (torch.randn(8_192, 8_192) * 0.02)
    loss = float(torch.nn.functional.cross_entropy(logits, torch.randint(0, 8_192, (512,))))
    plausible = bench("measured").plausible
    assert plausible(loss, config) and plausible(loss - 1, config)
    assert not plausible(loss + 0.6, config) and not plausible(loss - 2, config) and not plausible(float("nan"), config)


def test_operations_of_a_step() -> None:
    shapes = bench("shapes")
    shape = shapes.SIZES["8b"]
    assert shape.linear_parameters == 4096 * (6144 + 4096 + 28672 + 14336)
    work = shapes.flops(shape, 32, 8192, 8188, [2048] * 4)
    assert work["base GEMM"] == pytest.approx(4 * 6.979e9 * 8192, rel=1e-3)
    assert work["head"] == 4 * 4096 * 128256 * 8188
    assert work["attention"] == 7 * 4096 * 32 * 4 * 2048**2
    bytes_ = shapes.moved(shape, 32, 8192, 41_943_040, recompute=False)
    more = shapes.moved(shape, 32, 8192, 41_943_040, recompute=True)
    assert all(more[name] >= value for name, value in bytes_.items()) and more["decode"] == 1.5 * bytes_["decode"]


def test_a_case_is_its_command_line() -> None:
    engines, cases = bench("engines"), bench("cases")
    case = engines.Case("unsloth", rows=1, recompute="full", offload=True, optimizer="ours-fused")
    words = case.arguments()
    assert "--offload" in words and "--packed" not in words and words[words.index("--recompute") + 1] == "full"
    assert set(cases.CASES) - {"launches", "cold", "smoke"} == set(bench("tables").ROLES)


def test_labels_reach_a_peer_unshifted_and_never_across_documents() -> None:
    engines = bench("engines")
    labels = torch.tensor([[11, 12, -100, 21, 22, 23, -100, -100]])
    bounds = torch.tensor([0, 3, 7, 8, 8], dtype=torch.int32)
    rows = engines.Rows(torch.arange(8)[None], labels, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]]), bounds)
    inputs = engines._inputs(engines.Case("unsloth", rows=1, tokens=8, packed=True), rows)
    assert inputs["labels"].tolist() == [[-100, 11, 12, -100, 21, 22, 23, -100]]
    assert inputs["packed_seq_lengths"].tolist() == [3, 4, 1]
    assert rows.trained == 5 and int((inputs["labels"][0, 1:] != -100).sum()) == 5


@pytest.mark.cpu
def test_facts_of_this_machine(tmp_path: Path) -> None:
    """The script runs without a GPU on a few rows, and its table is readable."""
    script = str(ROOT / "bench" / "facts_gpu.py")
    pytest.importorskip("triton")
    subprocess.run([sys.executable, script, "--out", str(tmp_path), "--tokens", "64", "--only", "calls"], check=True, cwd=tmp_path)
    text = bench("facts_tables").markdown(tmp_path / "facts_gpu.jsonl")
    assert "| mm out |" in text


@pytest.mark.slow
def test_gradients_of_both_agree(tmp_path: Path) -> None:
    """`all` makes a tiny model on a CPU, proves its gradients and runs it."""
    pytest.importorskip("bitsandbytes")
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out.jsonl"
    _tokenizer(tokenizer)
    call = [sys.executable, str(ROOT / "bench" / "throughput.py"), "all", "--cases", "smoke", "--dir", str(tmp_path / "m")]
    done = subprocess.run([*call, "--tokenizer", str(tokenizer), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made, gate, line = map(json.loads, out.read_text().splitlines())
    assert made["made"] == "tiny-2" and gate["gate"] == "green", (made, gate)
    assert line["gate"] == "green" and line["tokens_per_s"] > 0 and line["trainable"] == 38_912
    assert len(done.stdout.splitlines()) == 3


def _tokenizer(folder: Path) -> None:
    """A word tokenizer of four words with the special tokens that a checkpoint needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    special = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def test_a_profile_folds_by_the_order_of_its_launches() -> None:
    fold = bench("profile_fold").fold

    def events(before: str, layer: str, behind: str) -> list[tuple[float, float, str]]:
        names, found, now = [*before, *(layer * 8), *behind], [], 0.0
        for _ in range(3):
            for name in names:  # each starts before the one in front has ended
                found.append((now - 1, now + 2, name))
                now += 2
        return found

    lines = fold(events("i", "ngagngg", "nghx"), 3, 8)
    assert [line["kernel"] for line in lines[:-1]] == list("ngagngg") and all(line["us"] == 3 for line in lines[:-1])
    assert [line["adds_us"] for line in lines[:-1]] == [2] * 7
    assert {k: lines[-1][k] for k in ("launches_a_layer", "layers", "us_a_layer", "us_behind")} == {
        "launches_a_layer": 7, "layers": 8, "us_a_layer": 14, "us_behind": 8,
    }  # fmt: skip
    other = fold(events("in", "gaggn", "h"), 3, 8)  # the norm stands behind: another cut of the same layer
    assert len(other) == 6
    with pytest.raises(ValueError, match="no cycle of 8 layers"):
        fold([(float(i), i + 1.0, f"k{i}") for i in range(60)], 1, 8)
