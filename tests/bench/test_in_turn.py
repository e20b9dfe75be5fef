"""`throughput.py all` with processes that are only pretended: order, proofs, time limit, checkpoints made and removed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .test_tables import bench


class Pretended:
    """Processes that take as long as `seconds` says and are green but for what `red` names."""

    def __init__(self, root: Path, seconds: Mapping[str, float], red: Sequence[str] = ()) -> None:
        self.root, self.seconds, self.red = root, seconds, red
        self.calls: list[tuple[str, str, float]] = []
        self.now = 0.0
        self.most = 0

    def spawn(self, command: str, words: Sequence[str], more: Mapping[str, str], seconds: float) -> dict[str, Any]:
        values = dict(zip(words[::2], words[1::2], strict=False)) if "--offload" not in words else {"--impl": words[1]}
        self.calls.append((command, values["--impl"], seconds))
        if command == "make":
            case = bench("engines").Case(values["--impl"], values["--size"], int(values["--layers"]))
            folder = case.directory(str(self.root))
            folder.mkdir(parents=True)
            (folder / bench("random_model").MARK).touch()
            self.most = max(self.most, len(list(self.root.iterdir())))
            return {"made": folder.name}
        if command == "gate":
            return {"gate": "red" if any(word in words for word in self.red) else "green"}
        self.now += self.seconds.get(values["--impl"], 20.0)
        return {"gate": "green", "tokens_per_s": 1000, "cache_given": sorted(more)}


def turns(tmp_path: Path, names: Sequence[str], limit: float = 1e9, **pretended: Any) -> tuple[Pretended, list[dict[str, Any]]]:
    root = tmp_path / "m"
    stub = Pretended(root, pretended.pop("seconds", {}), **pretended)
    groups = {name: bench("cases").CASES[name] for name in names}
    with (tmp_path / "out.jsonl").open("a") as file:
        bench("in_turn").Turns(str(root), "tokenizer", None, limit, file, stub.spawn, lambda: stub.now).everything(groups)
    return stub, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_proofs_come_first_and_ours_frames_the_peers(tmp_path: Path) -> None:
    stub, lines = turns(tmp_path, ["nocheckpoint", "optimizer"])
    commands = [command for command, _, _ in stub.calls]
    assert commands[0] == "make" and sorted(commands[1:3]) == ["gate", "make"] and commands[3:] == ["run"] * 5
    assert [impl for command, impl, _ in stub.calls if command == "run"] == [
        "halfbyte",
        "unsloth",
        "peft-bnb-liger",
        "halfbyte",
        "unsloth",
    ]
    assert [line["group"] for line in lines[3:]] == ["nocheckpoint"] * 4 + ["optimizer"]
    unsloth = [seconds for _, impl, seconds in stub.calls if impl == "unsloth"]
    assert unsloth == [210, 90]  # its first run compiles


def test_cases_may_be_chosen() -> None:
    cases = bench("cases")
    chosen = [case.impl for case in cases.select(cases.CASES["full"], ["halfbyte", "unsloth"], once=True)]
    assert chosen == ["halfbyte", "unsloth"]
    assert cases.select(cases.CASES["full"], None, once=False) == cases.CASES["full"]
    assert len(cases.select(cases.CASES["70b"], ["unsloth"], once=True)) == 2


def test_no_figures_without_a_proof(tmp_path: Path) -> None:
    stub, lines = turns(tmp_path, ["fp8", "16bit-short"], red=["fp8"])
    assert [line.get("failed", "")[:10] for line in lines if line["group"] == "fp8"] == ["no figures"] * 3
    assert sum("tokens_per_s" in line for line in lines) == 3 == [c for c, *_ in stub.calls].count("run")


def test_what_does_not_fit_into_the_limit_is_left_out(tmp_path: Path) -> None:
    """A long case is passed over, a short one behind it is not; a second call goes on with the checkpoints of the first."""
    _, lines = turns(tmp_path, ["nocheckpoint", "full-on-gpu"], limit=100, seconds={"halfbyte": 20})
    assert [line["impl"] for line in lines if line.get("tokens_per_s")] == ["halfbyte", "peft-bnb-liger", "halfbyte", "halfbyte"]
    assert lines[-1] == {"group": "left out", "left_out": "nocheckpoint[1] unsloth"}
    stub, _ = turns(tmp_path, ["short"])
    assert [command for command, *_ in stub.calls].count("make") == 0


def test_the_disk_never_holds_what_no_case_needs(tmp_path: Path) -> None:
    stub, lines = turns(tmp_path, ["16bit", "1b", "70b", "launches"])
    made = [line["made"] for line in lines if line["group"] == "make"]
    assert sorted(made) == sorted(["8b-2", "8b-32", "8b-32-dense", "1b-16", "70b-4", "70b-2", "8b-4"])
    assert stub.most == 3 and {p.name for p in stub.root.iterdir()} == {"8b-2", "8b-4"}


def test_a_cold_cache_is_a_folder_of_its_own(tmp_path: Path) -> None:
    _, lines = turns(tmp_path, ["cold"])
    cold = [line for line in lines if line["group"] == "cold"]
    assert [(line["impl"], line["cache"]) for line in cold] == [(i, c) for i in ("halfbyte", "unsloth") for c in ("empty", "warm")]
    assert all(line["cache_given"] == ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"] for line in cold)
