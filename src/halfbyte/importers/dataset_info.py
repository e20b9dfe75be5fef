"""LLaMA-Factory's `dataset_info.json`: what a dataset's name stands for.

The keys of an entry are few and closed (`DatasetAttr`), so that every one is read or refused here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from halfbyte.errors import RecipeError
from halfbyte.importers import common
from halfbyte.importers.data import Columns, list_turn_shape, put_columns
from halfbyte.importers.draft import Draft, unknown, whole, words
from halfbyte.mistakes import nearest

INFO = "dataset_info.json"
KEYS = (
    *(
        "hf_hub_url",
        "ms_hub_url",
        "om_hub_url",
        "script_url",
        "cloud_file_name",
        "file_name",
        "formatting",
        "ranking",
        "subset",
        "split",
    ),
    *("folder", "num_samples", "columns", "tags", "file_sha1"),
)
ALPACA = {"instruction": "prompt", "input": "query", "output": "response", "history": "history", "system": "system"}
"""Our columns of an alpaca record, and the names of their entries in `columns`."""
MEDIA = ("images", "videos", "audios")


def datasets(draft: Draft, key: str, value: Any) -> None:
    """The training sources."""
    _sources(draft, key, value, "data.train")
    if not value:
        draft.note("refused", "no dataset to learn from", key)
    if (strategy := draft.get("mix_strategy")) not in (None, "concat"):
        why = f"{strategy} by probabilities is not imported: give a source a `share` or a `weight`"
        draft.note("refused", why, *[k for k in ("mix_strategy", "interleave_probs") if k in draft.given])


def eval_datasets(draft: Draft, key: str, value: Any) -> None:
    """Held-out sources of their own."""
    if not value:
        draft.note("ignored", "empty in the source", key)
    _sources(draft, key, value, "data.eval")


def _sources(draft: Draft, key: str, value: Any, ours: str) -> None:
    names = words(value)
    if not names:
        return
    info, where = _info(draft)
    for i, name in enumerate(names):
        if name not in info:
            guess = nearest(name, info)
            hint = f"did you mean `{guess}`?" if guess else f"names there: {', '.join(list(info)[:8])}"
            raise RecipeError(f"{draft.place(key)}`{key}: {name}` is not in {where}", hint=hint, code="import.dataset")
        _entry(draft, key, name, _checked(info[name], f"{where}: `{name}`"), f"{ours}.{i}", where.parent)


def _checked(entry: Any, place: str) -> dict[str, Any]:
    """An entry that is an object, with objects where objects belong and text where text does."""
    named = {"columns": dict, "tags": dict} | dict.fromkeys(("file_name", "hf_hub_url", "formatting"), str)
    found = [("", entry, dict)] + [(f".{k}", entry.get(k), kind) for k, kind in named.items() if isinstance(entry, dict)]
    for key, value, kind in found:
        if not isinstance(value, kind) and (value is not None or not key):
            what = "an object" if kind is dict else "text"
            message = f"{place}{key} must be {what}, but is {repr(value)[:80]}"
            raise RecipeError(message, hint="is it LLaMA-Factory's?", code="import.dataset")
    return dict(entry)


def _info(draft: Draft) -> tuple[dict[str, Any], Path]:
    """The registry: given, or in `dataset_dir`, or beside the source."""
    folder, named = Path(draft.folder), Path(str(draft.get("dataset_dir")))
    given = draft.extra.get("dataset_info")
    tried = [Path(given)] if given else [named / INFO, folder / named / INFO, folder / INFO]
    found = next((path for path in tried if os.path.isfile(path)), None)
    if found is None:
        places = " or ".join(dict.fromkeys(str(path) for path in tried))
        hint = "its datasets are only names; give the file with --dataset-info"
        raise RecipeError(f"there is no {places}", hint=hint, code="import.dataset")
    try:
        raw = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{found} is not JSON: {error}", hint="is it LLaMA-Factory's dataset_info.json?", code="import.dataset"
        ) from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{found} is not an object of datasets", hint="is it LLaMA-Factory's?", code="import.dataset")
    return raw, found


def _entry(draft: Draft, key: str, name: str, entry: dict[str, Any], at: str, folder: Path) -> None:
    """One name: its place, its shape, its columns."""
    for inner, value in entry.items():
        draft.source[f"{name}.{inner}"] = value
        draft.given |= {f"{name}.{inner}"}
        if inner not in KEYS:
            unknown(draft, f"{name}.{inner}", inner, dict.fromkeys(KEYS))
    if entry.get("file_name"):
        draft.put(f"{at}.path", str(folder / entry["file_name"]), key, f"{name}.file_name", why=f"{INFO} says where {name} lies",
                  values=[name, entry["file_name"]])  # fmt: skip
    elif entry.get("hf_hub_url"):
        draft.put(
            f"{at}.path", entry["hf_hub_url"], key, f"{name}.hf_hub_url", why="a Hub dataset", values=[name, entry["hf_hub_url"]]
        )
    else:
        why = f"{name} is neither a file nor a Hub dataset (a script would be remote code; other hubs are not read)"
        draft.note("refused", why, key)
        return
    for theirs, ours in (("subset", "config"), ("split", "split")):
        if entry.get(theirs):
            draft.put(f"{at}.{ours}", str(entry[theirs]), f"{name}.{theirs}")
    if entry.get("folder"):
        draft.note("refused", "a folder within a Hub dataset cannot be named: download it and give its path", f"{name}.folder")
    limits = [
        whole(n, "num_samples or max_samples", draft.place(key)) for n in (entry.get("num_samples"), draft.get("max_samples")) if n
    ]
    if limits:
        keys = [k for k, n in ((f"{name}.num_samples", entry.get("num_samples")), ("max_samples", draft.get("max_samples"))) if n]
        draft.put(f"{at}.limit", min(limits), *keys)
    if entry.get("ranking") or (entry.get("columns") or {}).get("kto_tag"):
        draft.note("refused", common.PREFERENCES, f"{name}.ranking")
    _shape(draft, name, entry, at, key)


def _shape(draft: Draft, name: str, entry: dict[str, Any], at: str, key: str) -> None:
    formatting, named, tags = str(entry.get("formatting") or "alpaca"), entry.get("columns") or {}, entry.get("tags") or {}
    known = [k for k in (f"{name}.formatting", f"{name}.columns", f"{name}.tags") if k in draft.source] or [key]
    if media := [column for column in MEDIA if column in named]:
        draft.note("refused", common.MULTIMODAL, f"{name}.columns", value=", ".join(media))
    if draft.get("stage") == "pt":
        column = named.get("prompt", "instruction")
        draft.put(f"{at}.shape", "text", *known, why="`stage: pt` learns the prompt column as plain text")
        put_columns(draft, at, "text", Columns({"text": str(column)}), *known)
        return
    if formatting == "alpaca":
        columns = Columns(
            {ours: str(named.get(theirs) or ours) for ours, theirs in ALPACA.items() if ours not in ("history", "system")}
        )
        columns.of |= {ours: str(named[ours]) for ours in ("history", "system") if named.get(ours)}
        draft.put(f"{at}.shape", "alpaca", *known)
        put_columns(draft, at, "alpaca", columns, *known)
        return
    openai = formatting == "openai"
    columns = Columns({"messages": str(named.get("messages") or ("messages" if openai else "conversations"))})
    columns.role = str(tags.get("role_tag") or ("role" if openai else "from"))
    columns.content = str(tags.get("content_tag") or ("content" if openai else "value"))
    columns.roles = {str(tags[f"{role}_tag"]): role for role in ("user", "assistant", "system") if tags.get(f"{role}_tag")}
    if tags.get("observation_tag"):
        columns.roles[str(tags["observation_tag"])] = "tool"
    if named.get("system"):
        columns.of["system"] = str(named["system"])
    if named.get("tools"):
        columns.of["tools"] = str(named["tools"])
    shape = list_turn_shape(columns)
    draft.put(f"{at}.shape", shape, *known)
    put_columns(draft, at, shape, columns, *known)
