"""The benchmarks' own arithmetic: what a step must compute, which part a kernel belongs to, what a case means on a command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

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


@pytest.mark.parametrize(
    ("kernel", "op", "inputs", "part"),
    [
        ("nvjet_hsh_192x192_64x4_2x1_v_bz_TNT", "aten::mm", [[8192, 4096], [4096, 6144]], "base GEMM"),
        ("nvjet_hsh_64x8_64x16_1x4_h_bz_splitK_TNN", "aten::mm", [[8192, 4096], [4096, 48]], "LoRA products"),
        ("void cutlass::Kernel2<...>", "aten::addmm", [[16, 4096], [16, 8192], [8192, 4096]], "LoRA products"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_TNT", "aten::mm", [[2048, 4096], [4096, 128256]], "head"),
        ("nvjet_qqtst_128x256", "aten::_scaled_mm", [[8192, 4096], [4096, 6144], [], []], "base GEMM"),
        ("nvjet_hsh_192x192", "", [], "GEMM of unknown shape"),
        ("_add_norm", "", [], "norm"),
        ("_norm_gather", "", [], "rotary"),
        ("_augmented", "", [], "decode"),
        ("_gradient", "", [], "loss"),
        ("_step", "", [], "optimizer"),
        ("triton_tem_fused_flex_attention_0", "", [], "attention"),
        ("void at::native::reduce_kernel<512, 1, NormTwoOps<float>>", "", [], "optimizer"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop", "", [], "attention"),
        ("_rotate", "", [], "rotary"),
        ("indexSelectLargeIndex", "", [], "embedding"),
        ("Memset (Device)", "aten::zero_", [], "copies, memsets"),
        ("vectorized_elementwise_kernel", "aten::add", [], "other"),
    ],
)
def test_the_part_of_a_kernel(kernel: str, op: str, inputs: list[list[int]], part: str) -> None:
    assert bench("roofline").part_of(kernel, op, inputs, 128256) == part


def test_a_roofline_counts_every_kernel_once(tmp_path: Path) -> None:
    roofline = bench("roofline")

    def event(kind: DeviceType, name: str, start: int, end: int, kernels: tuple[object, ...] = (), shapes: object = ()) -> object:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(device_type=kind, name=name, time_range=span, kernels=kernels, input_shapes=shapes)

    product = SimpleNamespace(name="gemm", duration=100)
    events = [
        event(DeviceType.CPU, "aten::mm", 0, 5, (product,), [[8192, 4096], [4096, 6144]]),
        event(DeviceType.CUDA, "gemm", 10, 110),
        event(DeviceType.CUDA, "_add_norm", 100, 150),
        event(DeviceType.CUDA, "_add_norm", 200, 250),
    ]
    parts, busy = roofline.sort_kernels(events, 128256)
    assert busy == pytest.approx(0.19)
    assert roofline._summary(parts["base GEMM"])["ms"] == pytest.approx(0.1)
    assert roofline._summary(parts["norm"])["launches"] == 2
    line = {
        **{"size": "8b", "rows": 4, "tokens": 2048, "recompute": "none", "offload": False, "compute": "bf16", "layers": 2},
        **{"step_ms": 0.4, "busy_ms": 0.19, "sm_mhz": 1500, "hot_tflops": 700.0, "limit_ms": {"base GEMM": 0.08}},
        "parts": {part: roofline._summary(names) for part, names in parts.items()},
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    assert "| norm | 0.1 | 25.0% | 1.0 | 0 | 0.1 |" in roofline.markdown(tmp_path / "r.jsonl")


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
