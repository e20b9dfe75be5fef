"""Run by test_hub.py in a process of its own: loads each name given and prints, as JSON, what came of it.

A name may carry a revision after `@`; `adapter:NAME` asks whether it is an adapter.
Reason for the process: the Hub's client reads its environment when it is imported.
"""

from __future__ import annotations

import json
import logging
import sys

import torch

from halfbyte.checkpoints import hub, huggingface
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import HalfbyteError
from halfbyte.formats.config import FormatConfig

logging.basicConfig(level=logging.WARNING)
for argument in sys.argv[1:]:
    asked, _, revision = argument.partition("@")
    name = asked.removeprefix("adapter:")
    model = ModelConfig(name=name, revision=revision or None)
    try:
        if name != asked:
            folder = hub.adapter(name)
            print("ANSWER " + json.dumps({"files": sorted(p.name for p in folder.iterdir()) if folder else None}), flush=True)
            continue
        base = huggingface.load(model, FormatConfig(), torch.float32)
        answer = {"revision": base.revision, "digest": base.digest, "name": base.name, "source": str(base.source)}
    except HalfbyteError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "code": error.code}
    print("ANSWER " + json.dumps(answer), flush=True)
