"""What the trainers built on transformers have in common: batch, optimizer, schedule, steps, number types, trackers.

Each function is a rule (`draft.Rule`), or makes one for the names that a tool has for the same thing. The arithmetic that is
reported is the arithmetic that is done.
"""

from __future__ import annotations

from typing import Any

from halfbyte.importers.draft import Draft, Rule, is_on, words

FP32_MOMENTS = (
    "adamw adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_hf adamw_anyprecision"
)
BITS_8 = "adamw_8bit adamw_bnb_8bit adamw_torch_8bit ao_adamw_8bit"
FEWER = "adamw_torch_4bit ao_adamw_4bit ao_adamw_fp8"
PAGED = {"paged_adamw": "paged_adamw_32bit", "paged_adamw_32bit": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
TRACKERS = ("tensorboard", "wandb")
TRUNCATE = "truncate_right"
ALWAYS = 1000
"""Epochs that never come first: other trainers let `max_steps` win over the epochs."""

SEVERAL = ("deepspeed", "fsdp", "fsdp_config", "context_parallel_size", "tensor_parallel_size")
"""Keys of a run on several devices."""

NEVER = "never imported: "
REMOTE_CODE = f"{NEVER}code from a model or data repository is not run; a model that transformers knows needs none"
TOKEN = f"{NEVER}log in with `hf auth login`, or set HF_TOKEN"
HUB = f"{NEVER}nothing is uploaded; the adapter directory can be, by hand"
SPEED = "a matter of speed or memory alone: the numbers are the same, and the plan or a measurement decides it here"
LOADER = "how examples are fetched; here the packed rows lie in a memory-mapped cache"
DEVICES = "one device is used here; what does not fit is recomputed or offloaded by the plan"
LOGS = "what is logged, and where, does not change what is learned"
TRACKER = "of trackers tensorboard and wandb are built; `metrics.jsonl` holds the same numbers"
GENERATION = "generation settings: `train.prompts` are answered at temperature 0, `halfbyte chat` has options of its own"
RESUME = "the same command resumes by itself here; checkpoints of another tool cannot be resumed"
PREFERENCES = "learning from preferences or rewards is not built: only supervised fine-tuning is"
GALORE = "of optimizers only AdamW is built"
MULTIMODAL = "images, video and sound are not built"
NEW_TOKENS = "adding tokens to the vocabulary is not built"


def batch(micro: str, accumulation: str, packed: str = "") -> Rule:
    """micro x accumulation x processes rows a step. packed: the key that says whether examples were packed."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        rows, times = draft.whole(micro), draft.whole(accumulation)
        total = rows * times * draft.processes
        counted = f"{rows} x {times} x {draft.processes} process{'es' if draft.processes > 1 else ''}"
        draft.put("train.batch", total, micro, accumulation, why=counted)
        if draft.processes == 1 and (several := [k for k in SEVERAL if draft.on(k)]):
            draft.note("differs", "counted for one process; if there were more, name their number with --processes", *several)
        if not (packed and draft.on(packed)):
            tokens = draft.recipe.get("data.tokens", draft.get("sequence_len"))
            room = f" of {tokens} tokens" if tokens else ""
            why = (
                f"without packing {draft.tool}'s batch counts examples; here it counts packed rows{room}, which hold several: for "
                f"as many examples a step divide `train.batch: {total}` by the examples in a row (`halfbyte data preview` tells)"
            )
            draft.note("differs", why, *((packed,) if packed in draft.given else ()))

    return rule


def optimizer(draft: Draft, key: str, value: Any) -> None:
    """Names of transformers' optimizers."""
    name = str(value).lower().removeprefix("optimizernames.")
    if name in FP32_MOMENTS.split():
        draft.put("optim.kind", "adamw", key)
        draft.put("optim.bits", 32, key, why="moments of 32 bits")
    elif name in BITS_8.split():
        draft.put("optim.kind", "adamw", key)
        draft.put("optim.bits", 8, key, why="moments of 8 bits")
    elif name in FEWER.split():
        draft.put("optim.kind", "adamw", key)
        draft.put("optim.bits", 8, key, why=f"{name} keeps moments that are not built; 8 bits are nearest, and more precise")
    elif name in PAGED:
        draft.put("optim.kind", PAGED[name], key)
    else:
        draft.note("refused", f"{GALORE}; set it to adamw_torch or adamw_8bit", key)


def schedule(warmup: tuple[str, ...]) -> Rule:
    """Names of transformers' schedules. warmup: keys which `constant` does not read there."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        name = str(value).lower().removeprefix("schedulertype.")
        if name not in SCHEDULES:
            draft.note("refused", "of schedules cosine, linear and constant are built; set it to cosine or linear", key)
            return
        draft.put("train.schedule", SCHEDULES[name], key)
        if name == "constant":
            draft.put("train.warmup", 0, key, why="`constant` has no warm-up there (`constant_with_warmup` has)")

    return rule


def warmup(steps: str, ratio: str) -> Rule:
    """Steps, or a share of all steps; steps win where both are set. A float below 1 among the steps is a share."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if draft.recipe.get("train.schedule") == "constant" and draft.recipe.get("train.warmup") == 0:
            given = [k for k in (steps, ratio) if k in draft.given]
            if given:
                draft.note("ignored", "`constant` has no warm-up there", *given)
            return
        if draft.get(steps) is not None and draft.number(steps) > 0:
            used, found = steps, draft.number(steps)
        elif draft.get(ratio) is not None:
            used, found = ratio, draft.number(ratio)
        else:
            used, found = steps, 0
        other = ratio if used == steps else steps
        draft.put("train.warmup", found, used)
        if other in draft.given:
            why = "empty in the source" if draft.get(other) is None else f"`{used}` wins over it there"
            draft.note("ignored", why, other)

    return rule


def length(steps: str, epochs: str) -> Rule:
    """Epochs, unless a number of steps is set, which wins alone there; here whichever comes first."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        limit = draft.get(steps)
        if limit is None or draft.number(steps) <= 0:
            draft.put("train.epochs", draft.number(epochs), epochs)
            if steps in draft.given:
                draft.note("ignored", "no limit", steps)
            return
        draft.put("train.max_steps", draft.whole(steps), steps)
        why = f"`{steps}` alone ends the run there, whatever the epochs; so many epochs never come first"
        draft.put("train.epochs", ALWAYS, *((epochs,) if epochs in draft.given else (steps,)), why=why)

    return rule


def every(path: str, strategy: str, steps: str) -> Rule:
    """How often: never, every so many steps (a share of the run below 1), or once an epoch."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        name, count = str(draft.get(strategy) or "").lower().rpartition(".")[2], draft.get(steps)
        if not name:
            name = "steps" if count else "no"
        given = [k for k in (strategy, steps) if k in draft.given] or [strategy]
        if name == "no":
            draft.put(path, 0, *given)
        elif name == "epoch":
            share, why = once_an_epoch(draft)
            draft.put(path, share, *given, why=why)
        elif name == "best":
            draft.put(
                path, draft.recipe.get("train.eval_every", 0), *given, why="after every evaluation; the best one is kept anyway"
            )
        else:
            found = draft.number(steps if count is not None or draft.get("logging_steps") is None else "logging_steps")
            draft.put(path, found if 0 < found < 1 else int(found), *given)

    return rule


def once_an_epoch(draft: Draft, times: int = 1) -> tuple[float, str]:
    """The share of the run between so many events an epoch, and its arithmetic; 0 (at the end only) for one event in all."""
    if "train.max_steps" in draft.recipe:
        return 0, "how many steps an epoch has is known when the data is: at the end only"
    epochs = float(draft.recipe.get("train.epochs", 1))
    if times * epochs <= 1:
        return 0, f"{times} x {epochs:g} epochs: at the end only"
    return round(1 / (times * epochs), 6), f"1 / ({times} x {epochs:g} epochs) of the run"


def precision(bf16: str, fp16: str) -> Rule:
    """bf16, fp16 or neither."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        given = [k for k in (bf16, fp16) if k in draft.given] or [bf16]
        if str(draft.get(bf16)).lower() == "auto":
            draft.put("compute", "auto", *given)
        elif draft.on(bf16):
            draft.put("compute", "bf16", *given)
        elif draft.on(fp16):
            draft.put("compute", "fp16", *given)
        else:
            draft.put("compute", "fp32", *given, why="neither bf16 nor fp16")

    return rule


def checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Gradient checkpointing: the plan recomputes what does not fit, and no more."""
    draft.put("memory.recompute", "auto", key, why="what does not fit is recomputed, and no more; the numbers are the same")


def offloading(draft: Draft, key: str, value: Any) -> None:
    """Activation offloading: the plan's business too."""
    draft.put("memory.offload", "auto", key, why="what does not fit is offloaded, and no more; the numbers are the same")


def trackers(draft: Draft, key: str, value: Any) -> None:
    """`report_to`: a name or several."""
    asked = [name.lower() for name in words(value) if is_on(name)]
    built = [name for name in asked if name in TRACKERS]
    if "all" in asked:
        draft.note("ignored", "name the trackers: `log.to: [tensorboard, wandb]`", key)
    elif built:
        draft.put("log.to", built, key)
    if others := [name for name in asked if name not in (*TRACKERS, "all")]:
        draft.note("ignored", TRACKER, key, value=", ".join(others))
    elif not asked:
        draft.note("ignored", "no tracker", key)


def label_smoothing(draft: Draft, key: str, value: Any) -> None:
    """Part of the loss here as well."""
    draft.put("loss.label_smoothing", draft.number(key), key)


def keep(draft: Draft, key: str, value: Any) -> None:
    """How many checkpoints stay: two at least here, and the best one besides."""
    if value is None:
        draft.note("ignored", "every checkpoint is kept there; here `train.keep` of them", key)
        return
    count = max(2, draft.whole(key))
    draft.put("train.keep", count, key, why="" if count == draft.whole(key) else "two at least, so that a damaged one is no loss")


def neftune(draft: Draft, key: str, value: Any) -> None:
    """Noise on embeddings."""
    draft.note(
        "refused" if is_on(value) else "ignored", "NEFTune's noise on embeddings is not built" if is_on(value) else "off", key
    )


def initialisation(draft: Draft, key: str, value: Any) -> None:
    """How A and B start."""
    plain = value in (None, True, "true", "gaussian", "orthogonal")
    why = (
        "A is drawn uniformly (PEFT's default) and B is zero"
        if plain
        else "it changes the base; only PEFT's default start is built"
    )
    draft.note("ignored" if plain else "refused", why, key)
