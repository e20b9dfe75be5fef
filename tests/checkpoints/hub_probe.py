"""Run by test_hub.py in a process of its own: loads each name given and prints, as JSON, what came of it.

A name may carry a revision after `@`. Reason for the process: the Hub's client reads its environment when it is imported.
"""

from __future__ import annotations

import json
import logging
import sys

import torch

from halfbyte.checkpoints import huggingface
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import HalfbyteError
from halfbyte.formats.config import FormatConfig

logging.basicConfig(level=logging.WARNING)
for argument in sys.argv[1:]:
    name, _, revision = argument.partition("@")
    model = ModelConfig(name=name, revision=revision or None)
    try:
        base = huggingface.load(model, FormatConfig(), torch.float32)
        answer = {"revision": base.revision, "digest": base.digest, "name": base.name, "source": str(base.source)}
    except HalfbyteError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint, "code": error.code}
    print("ANSWER " + json.dumps(answer), flush=True)
