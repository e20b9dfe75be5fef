"""`train`: a recipe in, an adapter out. Composes data, base, adapter and plan into `Parts`, runs the loop, and hands over.

Order: whatever can be wrong is found before the first step, the cheap mistakes first: lock, trackers, damaged checkpoints,
data, plan, base, targets, head, isolation of packed examples, disk. What `auto` becomes is said with its reason, kept in the
checkpoint, and not decided again on resume.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.adapters import checks as checks_of_adapter
from halfbyte.adapters import full, lora
from halfbyte.adapters import state as adapter_state
from halfbyte.adapters.lora import Adapter
from halfbyte.checkpoints import cache, description, hub, huggingface, peft_config, resume, vllm
from halfbyte.checkpoints.base import Base
from halfbyte.checkpoints.resume import Contents
from halfbyte.config import Recipe
from halfbyte.data import checks
from halfbyte.data.check import run as checking
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.errors import MemoryPlanError, ModelError, RecipeError
from halfbyte.generate.chat import answers
from halfbyte.layers import decoded, embedding, forward, head, recompute
from halfbyte.memory import measure, segments
from halfbyte.memory import plan as planning
from halfbyte.memory.budget import budget_here
from halfbyte.memory.choose import Chooser
from halfbyte.memory.plan import Plan
from halfbyte.memory.rungs import Rung
from halfbyte.memory.watch import Watch
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.flat import flatten
from halfbyte.optim.scaling import LossScale
from halfbyte.shortage import in_words, is_shortage
from halfbyte.train import account as accounting
from halfbyte.train import choices as choosing
from halfbyte.train import finish, fusing, graphs, ladder, lock, loop, metrics, saving, signals
from halfbyte.train.account import Account
from halfbyte.train.choices import Choice
from halfbyte.train.determinism import deterministic
from halfbyte.train.finish import Result
from halfbyte.train.graphs import Graphs
from halfbyte.train.identity import identity
from halfbyte.train.ladder import Ladder
from halfbyte.train.lengths import lengths
from halfbyte.train.report import OnEvent, Report
from halfbyte.train.state import Parts, State

log = logging.getLogger("halfbyte")
CHECKPOINTS = "checkpoints"
TOLD = (
    "compute",
    "threads",
    "attention",
    "layers",
    "microbatch",
    "recompute",
    "offload",
    "moments",
    "embedding",
    "decoded weights",
    "graphs",
)
"""Choices, in the order in which they are told."""


def train(recipe: Recipe, *, on_event: OnEvent | None = None, memory_timeline: bool = False) -> Result:
    """Run a recipe to its end, resuming where an earlier run in the same `output` stopped.

    on_event: called with every event (`train`, `eval`, `sample`, `anomaly`, `message`, ...), a JSON object each. memory_timeline:
    the memory of one step is recorded and drawn in `memory.png` over the plan's.
    Raises the errors of `halfbyte.errors`; Interrupted after a signal, when everything is saved.
    """
    output = Path(recipe.output).expanduser()
    report = Report(output, on_event)
    metrics.check_trackers(recipe.log.to)
    segments.grow()
    with lock.hold(output, report.tell), _words(report), deterministic(recipe.train.deterministic):
        resume.sweep(output / CHECKPOINTS, report.tell)
        stored = resume.newest(output / CHECKPOINTS, report.tell)
        try:
            base, adapter, prepared, parts, plan, account = _composed(recipe, report, stored, memory_timeline)
        finally:
            report.display.settled()  # what ends a preparation must not leave its bar, nor the cursor hidden
        state = State() if stored is None else saving.restore(parts, stored)
        if stored is not None:
            report.tell(f"resuming at step {state.step} of {parts.total_steps}, from {CHECKPOINTS}/step-{state.step:08d}")
        else:
            _room(parts)
        if memory_timeline and parts.total_steps - state.step < accounting.RECORDED:
            report.tell(
                f"WARNING: no step is recorded: step {accounting.RECORDED} of what is left would be, and the run ends before"
            )
        report.open(state, parts.total_steps, recipe.log.to, parts.choices["run"]["value"], recipe.model_dump(mode="json"))
        try:
            room = plan.spare if parts.choices["decoded weights"]["value"] == "on" else 0
            with signals.guard() as stop, decoded.held(base.model, base.compute, limit=room):
                loop.train(parts, state, stop)
        finally:
            fusing.forget(base.model)  # host memory that layers have pinned is no other run's otherwise
            report.close()
            finish.plot(parts, account, output, recipe.model.name)
        return finish.hand_over(recipe, base, adapter, prepared, parts, state, account, report)


Composed = tuple[Base, Adapter, Prepared, Parts, Plan, Account]


def _composed(recipe: Recipe, report: Report, stored: Contents | None, memory_timeline: bool) -> Composed:
    """`compose`; raises MemoryPlanError (train.out-of-memory) where others have taken the memory that the plan found free."""
    try:
        return compose(recipe, report, stored, memory_timeline)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        why = in_words(error, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    less = f"memory.gpu is {recipe.memory.gpu}, a size such as 16GiB caps it"
    hint = f"end other programs on the device, or let the plan use less: {less}"
    raise MemoryPlanError(f"before the first step: {why}", hint=hint, code="train.out-of-memory")


def compose(recipe: Recipe, report: Report, stored: Contents | None, memory_timeline: bool) -> Composed:
    """Everything a run is made of, checked."""
    started, device = measure.rss(), choosing.device(report.tell)
    choosing.require(recipe.compute, device)
    fusing.require(recipe.memory.offload, device)
    kept = choosing.from_document(stored.documents["choices"]) if stored is not None else {}
    chosen = {
        "compute": choosing.settle("compute", recipe.compute, kept, lambda: choosing.compute(recipe.compute, device)),
        "threads": choosing.settle("threads", "auto", kept, lambda: choosing.threads(device)),
        "run": kept.get("run", Choice(secrets.token_hex(8), "drawn")),
    }
    torch.set_num_threads(chosen["threads"].value)
    compute = choosing.DTYPES[chosen["compute"].value]
    prepared = _data(recipe, report)
    planned = recipe.model_copy(update={"compute": chosen["compute"].value})
    chooser = _chooser(planned, prepared, started if device.type == "cpu" else 0)
    plan = planning.settled(chooser).require()
    fallen = stored.documents["trainer"].get("shortages", []) if stored is not None else []
    rung, standing = ladder.begin(plan, recipe, kept, fallen)
    chosen |= standing
    _tell_beforehand(report, recipe, plan, fresh=stored is None)
    base = _base(recipe, compute, device, rung, report)
    chosen["embedding"], rung = _embedding(base, rung, chosen["embedding"])
    report.tell(f"base: {base.name}, {base.report.summary()}")
    chosen["attention"] = choosing.settle("attention", "auto", kept, lambda: Choice(_attention(base), "what the layers allow"))
    adapter = _adapter(recipe, base, report)
    wanted = decoded.size(base.model, base.compute) if device.type == "cpu" else 0
    by_plan = Choice("on" if rung.decoded else "off", chooser.decoded_reason(rung))
    chosen["decoded weights"] = choosing.decoded(wanted, plan.spare) if device.type == "cpu" else by_plan
    _check_embeddings(prepared, base)
    recompute.set_recompute(base.model, rung.recompute)
    forward.prove_isolation(base.model)
    flat = flatten(adapter.parameters())
    chosen |= fusing.place(
        base.model,
        device,
        compute=chosen["compute"].value,
        rung=rung,
        offload=chosen["offload"],
        decoded=chosen["decoded weights"],
        tell=report.tell,
    )
    rows = graphs.of(recipe.train.graphs, base.model, device, recipe.attention, plan.spare, report.tell)
    chosen["graphs"] = rows.choice
    for name in TOLD:
        report.tell(f"{name}: {chosen[name]}")
    on = {name: chosen[name].value == "on" for name in ("offload", "decoded weights")}
    rung = replace(rung, offload=on["offload"], decoded=on["decoded weights"] and device.type == "cuda")
    optimizer = AdamW(flat, recipe.optim, paged=rung.paged)
    steps = _ladder(plan, rung, base, optimizer, device, rows)
    account = Account(
        chooser, base.model, optimizer, wanted if on["decoded weights"] else 0, started, recipe.adapter.kind == "none"
    )
    account.told(rung, report.tell)
    watch = account.watch(device, accounting.RECORDED if memory_timeline else None)
    parts = _parts(recipe, report, device, compute, base, adapter, optimizer, prepared, chosen, steps, watch, rows)
    if stored is not None:
        resume.refuse_other_run(stored, parts.identity, parts.checkpoints)
    return base, adapter, prepared, parts, plan, account


def _chooser(recipe: Recipe, prepared: Prepared, context: int) -> Chooser:
    """context: on a CPU, what this process has: libraries take a quarter of a GiB more or less by processor and system."""
    found = planning.chooser(recipe, budget_here(recipe.memory.gpu), lengths=lengths(prepared, recipe))
    return replace(found, context=context)


def _data(recipe: Recipe, report: Report) -> Prepared:
    """The token sets; needs the tokenizer only, so that mistakes in data are told before a model is loaded."""
    tokenizer = description.read(hub.locate(recipe.model, weights=False).path).tokenizer
    prepared = prepare(recipe.data, tokenizer, recipe.train.seed, cache.cache_root(), report.display.advance)
    checked = checking.before_training(prepared, tokenizer, cache.cache_root(), report.display.advance)
    report.display.settled()
    for line in [*prepared.report.lines(), *checked.lines()]:
        report.tell(line)
    return prepared


def _tell_beforehand(report: Report, recipe: Recipe, plan: Plan, *, fresh: bool) -> None:
    if line := recipe.optim.understood():
        report.tell(line)
    if fresh:
        report.tell(plan.table())


def _check_embeddings(prepared: Prepared, base: Base) -> None:
    table = base.model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    checks.embeddings(prepared.train, base.tokenizer, table, trainable=table.requires_grad)


def _base(recipe: Recipe, compute: torch.dtype, device: torch.device, rung: Rung, report: Report) -> Base:
    stored, advance = _stored_dtype(recipe, compute), report.display.advance
    base = huggingface.load(recipe.model, recipe.format, stored, device, advance, embedding_away=rung.embedding_away)
    report.display.settled()
    return base


def _embedding(base: Base, rung: Rung, planned: Choice) -> tuple[Choice, Rung]:
    """Where the input embedding really is. Raises RecipeError (`memory.embedding`) where it was asked to be elsewhere."""
    device = next(base.model.parameters()).device
    if not rung.embedding_away or not (reason := embedding.send(base.model, device)):
        return planned, rung
    if planned.reason == planning.ASKED:
        message = f"memory.embedding: host cannot be had here: {reason}"
        raise RecipeError(message, hint="set `memory.embedding: auto`", code="memory.embedding")
    return Choice("on the device", f"auto: {reason}"), replace(rung, embedding_away=False)


def _adapter(recipe: Recipe, base: Base, report: Report) -> Adapter:
    if recipe.adapter.kind == "none":
        adapter = full.attach(base.model, recipe.adapter)
        report.tell(f"adapter: none, full fine-tuning of {adapter.trainable:,} parameters in fp32")
    else:
        adapter = lora.attach(base.model, recipe.adapter, recipe.train.seed)
        report.tell(f"adapter: {adapter.summary()}")
        _doubts(adapter, base, report)
    return adapter


def _doubts(adapter: Adapter, base: Base, report: Report) -> None:
    """What is doubtful about the adapter, and whether vLLM will load it: told before anything is learned. Raises ModelError for
    what cannot be trained (`adapter.head`)."""
    config = peft_config.to_peft(adapter, base)
    refused = vllm.obstacles(config, adapter_state.names(adapter))
    for finding in [*checks_of_adapter.findings(adapter), *refused]:
        if finding.stops:
            raise ModelError(finding.message, hint=finding.hint, code=finding.code)
        report.tell(f"WARNING: {finding}")
    if not refused:
        report.tell(f"vLLM loads this adapter with {vllm.flags(config)}")


def _parts(
    recipe: Recipe,
    report: Report,
    device: torch.device,
    compute: torch.dtype,
    base: Base,
    adapter: Adapter,
    optimizer: AdamW,
    prepared: Prepared,
    chosen: Mapping[str, Choice],
    steps: Ladder,
    watch: Watch,
    rows: Graphs,
) -> Parts:
    tokens = recipe.data.tokens
    loader = Loader(prepared.train, tokens, recipe.train.batch, recipe.train.seed)
    total = loader.steps(recipe.train.epochs, recipe.train.max_steps)
    config = recipe.train.in_steps(total)
    full_model = recipe.adapter.kind == "none"

    def restore(tensors: Mapping[str, Tensor]) -> None:
        adapter_state.load_state_dict(adapter, tensors, source="the checkpoint")

    modules = {path: [layer.lora_a.shape[0], layer.scale] for path, layer in adapter.layers.items()}
    return Parts(
        config=config,
        loss=recipe.loss,
        model=base.model,
        head=head.find(base.model),
        forward=rows,
        dropout=lambda seed, step, row: adapter.set_dropout_state(seed, step, row, tokens),
        weights=lambda: adapter_state.state_dict(adapter),
        restore=restore,
        answers=functools.partial(
            answers, base, max_tokens=config.sample_tokens, template=prepared.template.text, end_ids=prepared.end_ids
        ),
        flat=optimizer.flat,
        optimizer=optimizer,
        scale=LossScale.create(compute, device),
        loader=loader,
        evals={name: Loader(held, tokens, chosen["microbatch"].value, config.seed) for name, held in prepared.eval.items()},
        device=device,
        autocast=compute if full_model and compute != torch.float32 else None,
        ladder=steps,
        watch=watch,
        row_tokens=tokens,
        total_steps=total,
        checkpoints=Path(recipe.output).expanduser() / CHECKPOINTS,
        identity=identity(
            recipe,
            base=base.digest,
            data=prepared.digest,
            template=prepared.template.text,
            compute=chosen["compute"].value,
            adapter=modules,
        ),
        choices=choosing.document(chosen),
        report=report,
    )


def _ladder(plan: Plan, rung: Rung, base: Base, optimizer: AdamW, device: torch.device, rows: Graphs) -> Ladder:
    """Where the run stands, and the ways down from there."""

    def place(to: Rung) -> None:
        if to != rung:
            rows.drop()
        fusing.use(base.model, to)
        if to.embedding_away and (reason := embedding.send(base.model, device)):
            log.warning("the input embedding stays on the device: %s", reason)
        if to.paged:
            optimizer.page()

    def forget() -> None:
        fusing.forget(base.model)
        rows.drop()

    return Ladder(rung, device, plan.smaller, place, forget, advice="; ".join(plan.help))


def _stored_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """Full fine-tuning keeps fp32 masters and computes in autocast; a frozen base is stored in the compute dtype."""
    return torch.float32 if recipe.adapter.kind == "none" else compute


def _attention(base: Base) -> str:
    return base.report.attention or str(base.model.config._attn_implementation)


def _room(parts: Parts) -> None:
    """Refuse to start what cannot be saved: room for two checkpoints. Raises TrainingError (train.disk-full)."""
    parts.checkpoints.mkdir(parents=True, exist_ok=True)
    resume.require_space(parts.checkpoints, 2 * saving.contents(parts, State()).nbytes)


class _words(logging.Handler):
    """While inside, what the library's other parts log is told like everything else."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self.report = report
        self.logger = logging.getLogger("halfbyte")

    def emit(self, record: logging.LogRecord) -> None:
        warning = "WARNING: " if record.levelno >= logging.WARNING else ""
        self.report.tell(f"{warning}{record.getMessage()}")

    def __enter__(self) -> _words:
        self.before = self.logger.level
        self.logger.setLevel(logging.WARNING)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)
