"""The table of what other trainers do with planted mistakes, from `results/faults_peers.jsonl` into `docs/concepts/faults.md`.

    python bench/faults_table.py [--docs docs/concepts/faults.md]

A cell follows from what the run of `faults_peers.py` left: an exception ("says what" where its texts, or those of its causes,
name a line, a row, a column or the thing that is missing), fewer rows than were given, rows of which nothing is learned, rows cut
to the row length, or none of these. "logged": the log has a line on it that the run on sound data lacks. What was not run stands
in `READ`, and what a trainer cannot be asked in `UNASKED`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/faults_peers.jsonl"
PEERS = {"axolotl": "axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}
CLEAR = re.compile(
    r"\b(line|row) [1-9]|not/there|Messages is null|vision-related|Cannot find valid samples|corresponds to no data"
    r"|no system message|trainable tokens"
)
TOOLS = "tools that the template does not show"
UNTRAINED = "an embedding row that was never trained"
READ = {
    ("axolotl", UNTRAINED): "learns it",
    ("llamafactory", UNTRAINED): "learns it",
    ("trl", UNTRAINED): "learns it",
}
"""Read in their sources: none looks at the rows of tokens that the vocabulary has already."""
UNASKED = {("trl", "Alpaca without output")}
"""TRL reads no Alpaca records."""
HARMLESS = {
    "the mask stops before the end of turn": "unending",
    "pad = end of turn, masked by its id": "unending",
    "a template with two bos tokens": "twice",
    TOOLS: "unseen",
}
"""Mistakes that a trainer may be built so as not to feel, and the count that is 0 then."""
MEANT = {"two objects on a line", "a line break inside a string", "messages as JSON text"}
"""What another reader may understand: nothing is lost where as much is learned as from sound data."""
BAR = r"\|"
KINDS = ("stops, says what", "stops", "drops it, logged", "drops it", "keeps it, learns nothing", "cuts it", "learns it",
         "reads it as meant", "not affected", "not asked")  # fmt: skip


def cell(line: dict[str, Any], clean: dict[str, Any]) -> str:
    """What one trainer did with one mistake."""
    logged = ", logged" if line["said"] else ""
    if (line["peer"], line["fault"]) in UNASKED:
        return "not asked"
    if "error" in line:
        name = line["error"][0].partition(":")[0]
        return "stops, says what" if CLEAR.search(" ".join(line["error"])) else f"stops (`{name}`)"
    if line["fault"] in HARMLESS and not line[HARMLESS[line["fault"]]]:
        return "not affected"
    if line["fault"] == TOOLS:  # an example that is too long as well is another matter
        return "learns it"
    if line["rows"] < line["given"]:
        return f"drops it{logged}"
    if line["fault"] in MEANT and line["learned"] >= clean["learned"]:
        return "reads it as meant"
    if line["zero"] > clean["zero"]:
        return f"keeps it, learns nothing{logged}"
    if line["cut"]:
        return f"cuts it{logged}"
    return f"learns it{logged}"


def cells(results: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Mistake -> trainer -> cell, in the order of the results."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    clean = {line["peer"]: line for line in lines if line["fault"] == "nothing"}
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if line["fault"] != "nothing":
            found.setdefault(line["fault"], {})[line["peer"]] = cell(line, clean[line["peer"]])
    for (peer, fault), said in READ.items():
        found.setdefault(fault, {})[peer] = said
    return found


def versions(results: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Trainer -> package -> version that ran."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {line["peer"]: line["versions"] for line in lines if "versions" in line}


def kind(said: str) -> str:
    """The row of the summary that a cell counts in."""
    return next(k for k in KINDS if said == k or said.startswith(f"{k} (") or said == f"{k}, logged")


def text(results: Path = RESULTS) -> str:
    """The summary and the table, as Markdown."""
    found = cells(results)
    counts = {peer: Counter(kind(row[peer]) for row in found.values()) for peer in PEERS}
    ran = versions(results)
    names = [f"{PEERS[p]} {ran[p][p]} (transformers {ran[p]['transformers']}, datasets {ran[p]['datasets']})" for p in PEERS]
    lines = [f"{', '.join(names)}; {len(found)} mistakes.", ""]
    lines += [f"| in all | {' | '.join(PEERS.values())} |", "| --- | --- | --- | --- |"]
    for k in (k for k in KINDS if any(counts[p][k] for p in PEERS)):
        lines.append(f"| {k} | {' | '.join(str(counts[p][k]) for p in PEERS)} |")
    lines += ["", f"| planted | {' | '.join(PEERS.values())} |", "| --- | --- | --- | --- |"]
    lines += [f"| {name.replace('|', BAR)} | {' | '.join(row[p] for p in PEERS)} |" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/concepts/faults.md")
    page = parser.parse_args().docs
    old = page.read_text(encoding="utf-8")
    begin, end = "<!-- peers -->\n", "\n<!-- /peers -->"
    before, rest = old.split(begin)
    page.write_text(before + begin + text() + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
