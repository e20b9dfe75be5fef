"""Adapter directories against PEFT itself: what we write loads there, what it writes loads here, the rest is an error."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints import atomic, peft, peft_config
from halfbyte.errors import CheckpointError, UnsafeFileError
from support import dense_twin, packed_base

pytestmark = [
    # PEFT 0.21 asks transformers by the old name of a property
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says so at every save of an adapter whose base has no Hub name
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    # and at every adapter with `modules_to_save` on a tied model, which the case below wants
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
IDS = torch.arange(24).reshape(2, 12) * 7 % 256
CASES = {
    "plain": ("llama", {}),
    "targets": ("llama", {"targets": ["q_proj", "down_proj"]}),
    "regex": ("qwen2", {"targets": r"model\.layers\.1\..*(q|up)_proj"}),
    "rslora": ("llama", {"rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}, "alpha_pattern": {"v_proj": 3.0}}),
    "bias-all": ("qwen2", {"bias": "all"}),
    "bias-lora-only": ("qwen2", {"bias": "lora_only", "targets": ["q_proj", "o_proj"]}),
    "saved": ("qwen3", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-tied": ("qwen3", {"modules_to_save": ["lm_head"]}),
    "saved-norm": ("llama", {"modules_to_save": ["norm"]}),
    "gpt2": ("gpt2", {"targets": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    "falcon": ("falcon", {}),
    "gpt2-dense": ("gpt2", {"targets": ["c_attn"]}),
}


def trained(base, **settings):
    """An adapter whose every parameter has moved, as training would."""
    adapter = lora.attach(base.model, AdapterConfig(rank=4, alpha=8, **settings), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter, _ in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save_and_answers_the_same(case, tmp_path):
    family, settings = CASES[case]
    base = packed_base(family, kind="none" if "dense" in case else "nf4", tie_word_embeddings="tied" in case or family == "gpt2")
    twin = dense_twin(base)
    before = logits(base.model)
    adapter = trained(base, **settings)
    ours = logits(base.model)
    assert (ours - before).abs().max() > 1e-2  # the adapter does something
    peft.save(adapter, tmp_path / "a", base)
    theirs = PeftModel.from_pretrained(twin, tmp_path / "a")
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "b")
    again, mine = load_file(tmp_path / "b" / peft.TENSORS), load_file(tmp_path / "a" / peft.TENSORS)
    assert again.keys() == mine.keys()
    assert all(torch.equal(again[name], mine[name]) for name in again)


PEFT_CASES = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "list": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.(gate|up)_proj"}),
    "layers": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "layer": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": ("llama", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 5}}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias-lora-only": ("qwen2", {"target_modules": "all-linear", "bias": "lora_only"}),
    "saved": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved-tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_trained_loads_here_and_answers_the_same(case, tmp_path):
    family, settings = PEFT_CASES[case]
    base = packed_base(family, tie_word_embeddings="tied" in case or family == "gpt2")
    theirs = get_peft_model(dense_twin(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    adapter = peft.load(tmp_path, base)
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=0, atol=1e-4)
    peft.save(adapter, tmp_path / "again", base)
    ours, original = load_file(tmp_path / "again" / peft.TENSORS), load_file(tmp_path / peft.TENSORS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)


UNBUILT = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 2]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.down_proj"],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"x": 1},
    "velora_config": {"x": 1},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa_niter_4",
    "loftq_config": {"loftq_bits": 4},
    "a_field_of_next_year": "on",
}


@pytest.mark.parametrize("field", UNBUILT)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(field, tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    edit(tmp_path, **{field: UNBUILT[field]})
    with pytest.raises(CheckpointError, match=field) as caught:
        peft.load(tmp_path, packed_base())
    assert caught.value.code == "adapter.not-built"


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused(init):
    with pytest.raises(CheckpointError, match=init):
        peft_config.refuse_unbuilt({"peft_type": "LORA", "init_lora_weights": init}, "here")


def test_all_refused_fields_are_told_at_once():
    raw = {"peft_type": "LORA", "use_dora": True, "lora_bias": True}
    with pytest.raises(CheckpointError, match=r"lora_bias = True; use_dora = True"):
        peft_config.refuse_unbuilt(raw, "here")


def test_every_field_of_the_installed_peft_is_known():
    """A field that neither side classified would be refused when set; one that is off must never be."""
    for built in (LoraConfig(), LoraConfig(r=2, target_modules=["q_proj"], bias="all")):
        raw = {key: list(value) if isinstance(value, set) else value for key, value in built.to_dict().items()}
        peft_config.refuse_unbuilt(raw | {"peft_type": "LORA"}, "here")


def test_another_kind_of_adapter_is_refused():
    with pytest.raises(CheckpointError, match="IA3"):
        peft_config.refuse_unbuilt({"peft_type": "IA3"}, "here")


def test_side_files_are_written_and_read(tmp_path):
    base = packed_base()
    extras = {peft.RECIPE: "model: tiny\n", peft.TEMPLATE: "{{ messages }}"}
    peft.save(trained(base), tmp_path / "a", base, extras)
    files = peft.read(tmp_path / "a")
    assert (files.recipe, files.template) == ("model: tiny\n", "{{ messages }}")
    assert files.record is not None and files.base_name == "tiny-llama"
    assert files.record.format["kind"] == "nf4" and files.record.compute == "float32"
    assert sorted(os.listdir(tmp_path)) == ["a"]  # nothing temporary is left


def test_an_adapter_of_another_base_is_refused_unless_told_otherwise(tmp_path):
    base = packed_base(seed=0)
    peft.save(trained(base), tmp_path, base)
    with pytest.raises(CheckpointError, match="another base") as caught:
        peft.load(tmp_path, packed_base(seed=1))
    assert caught.value.code == "adapter.other-base"
    peft.load(tmp_path, packed_base(seed=1), other_base=True)


def test_the_same_base_in_another_compute_dtype_is_not_another_base(tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    other = packed_base()
    other.digest, other.compute = "0" * 64, torch.bfloat16  # the digest covers norms and embeddings in the compute dtype
    peft.load(tmp_path, other)
    other = packed_base()
    other.digest, other.compute, other.name = "0" * 64, torch.bfloat16, "tiny-other"
    with pytest.raises(CheckpointError, match="another base"):
        peft.load(tmp_path, other)


def test_an_adapter_of_another_architecture_lists_what_does_not_fit(tmp_path):
    base = packed_base("llama", num_hidden_layers=3)
    peft.save(trained(base), tmp_path, base)
    with pytest.raises(CheckpointError, match=r"unexpected: .*layers\.2\.mlp\.down_proj"):
        peft.load(tmp_path, packed_base("llama"), other_base=True)
    with pytest.raises(CheckpointError, match="match nothing"):
        peft.load(tmp_path, packed_base("gpt2"), other_base=True)


def test_damage_is_found(tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    path = tmp_path / peft.TENSORS
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        peft.load(tmp_path, packed_base())
    assert caught.value.code == "adapter.damaged"
    (tmp_path / peft.RECORD).unlink()
    path.write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match="damaged"):
        peft.load(tmp_path, packed_base())


def test_pickles_are_refused(tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    (tmp_path / peft.TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeFileError, match=r"adapter_model\.bin"):
        peft.load(tmp_path, packed_base())


def test_what_is_not_an_adapter_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="no adapter directory"):
        peft.read(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        peft.read(tmp_path)
    (tmp_path / peft.CONFIG).write_text("{")
    save_file({"a": torch.zeros(1)}, tmp_path / peft.TENSORS)
    with pytest.raises(CheckpointError, match="not JSON"):
        peft.read(tmp_path)


def test_saving_again_replaces_and_never_overwrites_strangers(tmp_path):
    base = packed_base()
    adapter = trained(base)
    peft.save(adapter, tmp_path / "a", base, {peft.RECIPE: "one"})
    peft.save(adapter, tmp_path / "a", base)
    assert peft.read(tmp_path / "a").recipe is None
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        peft.save(adapter, tmp_path / "a", base)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_former_adapter(tmp_path, monkeypatch):
    base = packed_base()
    adapter = trained(base)
    peft.save(adapter, tmp_path / "a", base)
    before = (tmp_path / "a" / peft.TENSORS).read_bytes()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "_write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        peft.save(adapter, tmp_path / "a", base)
    assert (tmp_path / "a" / peft.TENSORS).read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_death_between_the_two_renames_is_mended(tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path / "a", base)
    (tmp_path / "a").rename(tmp_path / ".a.previous")
    assert peft.read(tmp_path / "a").base_name == "tiny-llama"
    with pytest.raises(CheckpointError, match="not empty"), atomic.directory(tmp_path / "a"):
        pass


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = [f".[a].tmp-{host}-{dead.pid}", f".[a].tmp-{host}-{2**40}"]
    kept = [
        f".[a].tmp-{host}-{os.getppid()}",
        f".[a].tmp-elsewhere-{dead.pid}",
        f".[a].tmp-{dead.pid}",
        f".a.tmp-{host}-{dead.pid}",
    ]
    for name in [*gone, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with atomic.directory(tmp_path / "[a]") as folder:
        (folder / "b").write_text("whole")
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, folder.name])
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "[a]"])


def test_a_killed_save_leaves_what_the_next_save_removes(tmp_path):
    code = "import os, sys; from pathlib import Path; from halfbyte.checkpoints import atomic\n"
    code += "with atomic.directory(Path(sys.argv[1])) as folder:\n  (folder / 'x').write_text('half'); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert killed.returncode == -9 and len(os.listdir(tmp_path)) == 1
    with atomic.directory(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == ["a"]


MALFORMED = {
    "target_modules": ["[", 5, {"q_proj": 1}, [5], "("],
    "exclude_modules": ["[", 5, [None]],
    "modules_to_save": ["lm_head", 5, ["["], [5]],
    "layers_pattern": ["[", 5, ["("]],
    "layers_to_transform": ["1", ["1"], 1.5],
    "rank_pattern": [{"[": 3}, 5, {"q_proj": "many"}],
    "alpha_pattern": [{"(": 3}, [1]],
    "r": ["many", {}],
    "lora_alpha": [[]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in MALFORMED.items() for value in values])
def test_a_malformed_field_names_the_file_and_itself(field, value, tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    edit(tmp_path, **{field: value})
    ours = {"r": "rank", "lora_alpha": "alpha|lora_alpha"}.get(field, field)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*({ours})"):
        peft.load(tmp_path, packed_base())


@pytest.mark.parametrize(
    ("field", "value"),
    [("compute", "nope"), ("compute", "nn"), ("compute", None), ("compute", ["float32"]), ("end_ids", None), ("end_ids", ["a"]),
     ("format", "nf4"), ("base", 5), ("revision", 5), ("sha256", None)],
)  # fmt: skip
def test_a_malformed_record_names_the_file_and_the_field(field, value, tmp_path):
    base = packed_base()
    peft.save(trained(base), tmp_path, base)
    raw = json.loads((tmp_path / peft.RECORD).read_text())
    (tmp_path / peft.RECORD).write_text(json.dumps(raw | {field: value}))
    with pytest.raises(CheckpointError, match=rf"halfbyte\.json is not a record of halfbyte's: {field} = ") as caught:
        peft.read(tmp_path)
    assert caught.value.code == "adapter.record"
    (tmp_path / peft.RECORD).write_text(json.dumps(raw))
    assert peft.read(tmp_path).record.compute == "float32"


def edit(directory, **fields):
    path = directory / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
