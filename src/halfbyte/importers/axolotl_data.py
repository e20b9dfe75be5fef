"""axolotl's `datasets`: prompt types into shapes, property mappings into columns, and the template that all of them share.

There every dataset has a type, which says both how records are read and how they become text; here the shape says the first and
one chat template for the run the second.
"""

from __future__ import annotations

import os
from typing import Any

from halfbyte.importers import common
from halfbyte.importers.data import LOADERS, Columns, list_turn_shape, put_columns
from halfbyte.importers.draft import Draft, is_on, unknown, words

TYPES: dict[str, tuple[str, dict[str, str], str]] = {
    "alpaca": ("alpaca", {}, "alpaca"),
    "alpaca.load_no_prompt": ("alpaca", {}, "alpaca"),
    "alpaca_instruct": ("alpaca", {}, "alpaca"),
    "alpaca_chat": ("alpaca", {}, "alpaca"),
    "alpaca_chat.load_concise": ("alpaca", {}, "alpaca"),
    "alpaca_chat.load_qa": ("alpaca", {"instruction": "question", "output": "answer"}, "alpaca"),
    "alpaca_w_system": ("alpaca", {}, "alpaca"),
    "alpaca_w_system.load_open_orca": (
        "alpaca",
        {"instruction": "question", "output": "response", "system": "system_prompt"},
        "alpaca",
    ),
    "completion": ("text", {}, ""),
    "chat_template": ("messages", {}, "chat"),
    "chat_template.default": ("messages", {}, "chat"),
    "messages.chat": ("messages", {}, "chat"),
    "sharegpt": ("sharegpt", {}, "chat"),
    "sharegpt.load_role": ("messages", {}, "chat"),
    "llama2_chat": ("sharegpt", {}, "chat"),
}
"""type -> shape, columns of other names, and the kind of template that it implies."""

NAMED = {
    **{name: name for name in ("chatml", "alpaca", "llama3", "gemma")},
    **{"phi_3": "phi3", "mistral_v2v3": "mistral", "mistral_v3_tekken": "mistral-tekken", "mistral_v7_tekken": "mistral-v7"},
}
"""Templates of a family's own format, which stand here under these names."""

IGNORED = {
    **dict.fromkeys(("shards", "shards_idx", "preprocess_shards"), "all of the split is read; `limit` takes the first examples"),
    **dict.fromkeys(("chat_template", "chat_template_jinja"), "one template serves the whole run: `data.template`"),
    **dict.fromkeys(("input_transform", "input_format", "skip"), "records are read as their shape says"),
    **dict.fromkeys(
        ("field_tools", "field_thinking", "template_thinking_key", "split_thinking"), "read where the template reads it"
    ),
    **dict.fromkeys(("logprobs_field", "temperature"), "of distillation, which is not built"),
    **dict.fromkeys(("ds_type", "conversation"), "found from the file"),
    "trust_remote_code": common.REMOTE_CODE,
}
WHOLE_TURN = "the answer and its end-of-turn token are learned, nothing else"


def datasets(draft: Draft, key: str, value: Any) -> None:
    """The training sources, what of them is learned, and the template."""
    kinds = [_entry(draft, f"datasets.{i}", f"data.train.{i}", entry) for i, entry in enumerate(draft.sections(key))]
    if not kinds:
        draft.note("refused", "no dataset to learn from", key)
    _learned(draft)
    _template(draft, [kind for kind in kinds if kind])


def held_out(draft: Draft, key: str, value: Any) -> None:
    """`val_set_size` (a share, or a count from 1 on), or sources of their own in `test_datasets`."""
    if key == "test_datasets":
        for i, entry in enumerate(draft.sections(key)):
            _entry(draft, f"{key}.{i}", f"data.eval.{i}", entry)
        if not value:
            draft.note("ignored", "empty in the source", key)
    elif draft.get("test_datasets"):
        draft.note("ignored", "`test_datasets` wins over it", key)
    else:
        held_out_share(draft, key)


def held_out_share(draft: Draft, key: str) -> None:
    """A share below 1, a number of examples from 1 on."""
    size = draft.number(key) if draft.get(key) is not None else 0
    draft.put("data.eval", int(size) if size >= 1 or size == 0 else size, key)


def _entry(draft: Draft, at: str, ours: str, entry: dict[str, Any]) -> str:
    """One dataset; returns the kind of template it implies."""
    rest = dict(entry)
    for name, value in entry.items():
        draft.source[f"{at}.{name}"] = value
    draft.given |= {f"{at}.{name}" for name in entry}

    def take(name: str, default: Any = None) -> Any:
        found = rest.pop(name, None)
        return default if found is None else found

    _where(draft, at, ours, take)
    kind = str(take("type", "")) if not isinstance(entry.get("type"), dict) else "user_defined"
    rest.pop("type", None)
    known = TYPES.get(kind.partition(":")[0].removesuffix(".load"))
    if known is None:
        draft.note("refused", "this prompt type is not built; turn the records into messages", f"{at}.type", value=kind)
        shape, columns, template = "messages", Columns(), ""
    else:
        shape, columns, template = known[0], Columns(dict(known[1])), known[2]
    shape = _columns(draft, at, ours, shape, columns, take, known is not None, kind)
    _turns(draft, at, take)
    for name in rest:
        if name in IGNORED:
            draft.note("ignored", IGNORED[name], f"{at}.{name}")
        else:
            unknown(draft, f"{at}.{name}", name, dict.fromkeys([*IGNORED, *ENTRY]))
    return template


def _where(draft: Draft, at: str, ours: str, take: Any) -> None:
    path, files = str(take("path", "")), words(take("data_files"))
    if files and (path in LOADERS or os.path.isdir(path)):
        base = "" if path in LOADERS else f"{path.rstrip('/')}/"
        if len(files) > 1:
            draft.note("refused", "several files: give each an entry of its own", f"{at}.data_files")
        draft.put(f"{ours}.path", base + files[0], f"{at}.path", f"{at}.data_files", why="the file itself")
    else:
        draft.put(f"{ours}.path", path, f"{at}.path")
        if files:
            draft.note(
                "refused", "single files of a Hub dataset cannot be named: download them and give their path", f"{at}.data_files"
            )
    for theirs, name in (("name", "config"), ("split", "split"), ("revision", "revision")):
        if (value := take(theirs)) is not None:
            draft.put(f"{ours}.{name}", str(value), f"{at}.{theirs}")


def _columns(draft: Draft, at: str, ours: str, shape: str, columns: Columns, take: Any, known: bool, kind: str) -> str:
    """Shape and columns of an entry; returns the shape."""
    mappings = take("message_property_mappings", {}) or {}
    columns.role = str(mappings.get("role", take("message_field_role", "from" if shape == "sharegpt" else "role")))
    columns.content = str(mappings.get("content", take("message_field_content", "value" if shape == "sharegpt" else "content")))
    if (name := take("field_messages")) is not None and shape in ("messages", "sharegpt"):
        columns.of["messages"] = str(name)
    if (name := take("field")) is not None and shape == "text":
        columns.of["text"] = str(name)
    if (name := take("field_system")) is not None:
        columns.of["system"] = str(name)
    for role, names in (take("roles") or {}).items():
        columns.roles |= {str(name): {"human": "user", "gpt": "assistant"}.get(role, role) for name in words(names)}
    shape = list_turn_shape(columns) if shape in ("messages", "sharegpt") else shape
    told = [f"{at}.{n}" for n in COLUMN_KEYS if f"{at}.{n}" in draft.given]
    if known:
        draft.put(f"{ours}.shape", shape, f"{at}.type", *told, values=[kind, *[draft.get(k) for k in told]])
    elif told:
        draft.note("ignored", "belongs to a type that is not built", *told)
    extra = [f"{role}: {name}" for role, name in mappings.items() if role not in ("role", "content")]
    if extra:
        draft.note("ignored", f"further properties of a turn are not read: {', '.join(extra)}", f"{at}.message_property_mappings")
    put_columns(draft, ours, shape, columns, *(told or [f"{at}.type"]))
    for name in ("field_chosen", "field_rejected"):
        if take(name) is not None:
            draft.note("refused", common.PREFERENCES, f"{at}.{name}")
    return shape


def _turns(draft: Draft, at: str, take: Any) -> None:
    """Which turns and which of their tokens are learned."""
    if (roles := take("roles_to_train")) is not None:
        spoken = {"human": "user", "gpt": "assistant", "model": "assistant"}
        wanted = [spoken.get(name.lower(), name.lower()) for name in words(roles)]
        if wanted == ["assistant"]:
            draft.note("ignored", WHOLE_TURN, f"{at}.roles_to_train")
        elif set(wanted) <= {"assistant", "user", "system"}:
            draft.put("data.loss_on", wanted, f"{at}.roles_to_train")
        else:
            draft.note("refused", "only turns of system, user and assistant can be learned", f"{at}.roles_to_train")
    for name in ("train_on_eos", "train_on_eot"):
        if (when := take(name)) is not None:
            same = str(when).lower() in ("turn", "true")
            draft.note("ignored" if same else "differs", WHOLE_TURN, f"{at}.{name}")
    for name in ("message_field_training", "message_field_training_detail"):
        if take(name) is not None:
            draft.note("refused", "a choice of turns within a conversation by a column of its own is not imported", f"{at}.{name}")
    if (drop := take("drop_system_message")) is not None:
        draft.note(
            "refused" if is_on(drop) else "ignored",
            "system messages of the data are kept" if is_on(drop) else "off",
            f"{at}.drop_system_message",
        )


def _learned(draft: Draft) -> None:
    if draft.on("train_on_inputs"):
        draft.put("data.loss_on", "all", "train_on_inputs")
    elif "train_on_inputs" in draft.given:
        draft.put("data.loss_on", "assistant", "train_on_inputs")


def _template(draft: Draft, kinds: list[str]) -> None:
    """One template for the run, from `chat_template` and from the prompt types."""
    name = str(draft.get("chat_template") or "")
    keys = [key for key in ("chat_template", "chat_template_jinja") if key in draft.given]
    if "chat" not in kinds and "alpaca" in kinds:
        draft.put("data.template", "alpaca", *keys, why="its prompt types are alpaca's")
        draft.note("differs", "the sentence before `### Instruction:` (`Below is an instruction ...`) is not written here")
        return
    if "alpaca" in kinds:
        draft.note("differs", "alpaca types get the run's one chat template here, not alpaca's headings")
    if name == "jinja":
        path = str(draft.get("chat_template_jinja") or "")
        if path.endswith((".jinja", ".jinja2")) or ("\n" not in path and path and os.path.isfile(path)):
            draft.put("data.template", path, *keys)
        else:
            draft.note("refused", "save the text of the template in a file, and give its path", *keys)
    elif name in NAMED:
        draft.put("data.template", NAMED[name], "chat_template")
    elif name:
        own = "" if name.startswith("tokenizer_default") else f"; {draft.tool}'s copy named {name} is not the tokenizer's text"
        draft.put("data.template", "auto", "chat_template", why=f"the tokenizer's own{own}")
    elif keys:
        draft.note("ignored", "empty in the source", *keys)


COLUMN_KEYS = (
    "field_messages",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "field",
    "field_system",
    "roles",
)
ENTRY = (
    *("path", "type", "name", "split", "revision", "data_files", "roles_to_train", "train_on_eos", "train_on_eot", "field_human"),
    *(
        "field_model",
        "message_field_training",
        "message_field_training_detail",
        "drop_system_message",
        "field_chosen",
        "field_rejected",
    ),
    *COLUMN_KEYS,
)
"""Every key of an entry that has a meaning here."""
