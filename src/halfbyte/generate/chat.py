"""Answers: one prompt or conversation in, text out, token by token as it is made.

How tokens come is `routes`: one CUDA graph a token on a GPU, transformers' `generate` elsewhere. This file adds what a trained
adapter needs around it: the chat template that it was trained with, the tokens that end its turn, an answer that depends on
nothing but its arguments (greedy at temperature 0, a private random state otherwise), and a model that is left exactly as it was
found, so that a run can sample between two steps.
Cost: a pass over the prompt (in a `Chat` over what is new of it), then one pass a token; the cache holds
2 * layers * heads * head_dim numbers a token. On a CPU the weights are decoded once an answer and held meanwhile, when half of the
free memory has room for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import TemplateError
from torch import nn

from halfbyte.errors import DataError, RecipeError
from halfbyte.generate.routes import Request, Session, tokens_of
from halfbyte.generate.stream import TextStream
from halfbyte.layers.decoded import held

if TYPE_CHECKING:
    from halfbyte.checkpoints.base import Base

Message = dict[str, Any]
RAISED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template's own code may raise besides jinja's errors."""


@dataclass(frozen=True)
class Answer:
    """text: without special tokens. tokens: generated, the end token included. tokens_per_s: prefill included.

    stopped_by: `end` (the model ended its turn), `length` (max_tokens), `context` (the model's positions are used up).
    """

    text: str
    tokens: int
    tokens_per_s: float
    stopped_by: Literal["end", "length", "context"]
    prompt_tokens: int


def generate(
    base: Base,
    prompt: str | Sequence[Message],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
    *,
    template: str | None = None,
    end_ids: Iterable[int] = (),
    session: Session | None = None,
) -> Answer:
    """Answers `prompt`: a string is continued as it stands; messages (`role`, `content`) go through the chat template.

    temperature 0 takes the most likely token each time; above, tokens are drawn from the smallest set of probability top_p,
    the same ones for the same seed. stream: receives the text in pieces while it is made.
    template: Jinja text; default the tokenizer's own. end_ids: tokens that end an answer besides those that model, tokenizer and
    template show: what training used. session: keeps what the token engine has read for the next call (`Chat` has
    one); without it memory is given back. Raises DataError (no template, a prompt too long), RecipeError (arguments).
    """
    _check(max_tokens, temperature, top_p)
    ids = encode(base, prompt, template)
    ends = end_tokens(base, template if isinstance(prompt, str) else _template(base, template), end_ids)
    room, limited_by_context = _room(base.model, len(ids), max_tokens)
    pad = base.tokenizer.pad_token_id
    request = Request(ids, room, ends, temperature, top_p, seed, min(ends, default=0) if pad is None else pad)
    device = next(base.model.parameters()).device
    streamer = TextStream(base.tokenizer, len(ids), stream)
    started = time.perf_counter()
    with _evaluating(base.model), _seeded(seed, device), held(base.model, base.compute), torch.no_grad():
        new = tokens_of(base.model, request, streamer, session or Session())
    seconds = time.perf_counter() - started
    ended = bool(new) and new[-1] in ends
    text = str(base.tokenizer.decode(new, skip_special_tokens=True))
    stopped: Literal["end", "length", "context"] = "end" if ended else "context" if limited_by_context else "length"
    return Answer(text, len(new), len(new) / seconds, stopped, len(ids))


def answers(
    base: Base, questions: Iterable[str], max_tokens: int = 256, *, template: str | None = None, end_ids: Iterable[int] = ()
) -> Iterator[str]:
    """The texts that `generate` answers each question with, as a conversation of its own, from one engine for all of them."""
    session = Session()
    for question in questions:
        asked = [{"role": "user", "content": question}]
        yield generate(base, asked, max_tokens, template=template, end_ids=end_ids, session=session).text


class Chat:
    """A conversation: keeps the history, and answers as the adapter or as the base beneath it.

    adapter: what `lora.attach` or `peft.load` returned for the same base; None chats with the base alone.
    `which` says who answers now; `use("base")` and `use("adapter")` switch, the history is kept. `reset()` forgets it.
    On a GPU a turn continues from the cache of the turns before: only what is new is read.
    """

    def __init__(
        self,
        base: Base,
        adapter: Any = None,
        *,
        template: str | None = None,
        end_ids: Iterable[int] = (),
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.base, self.adapter, self.template, self.system = base, adapter, template, system
        self.end_ids = tuple(end_ids)
        self.max_tokens, self.temperature, self.top_p, self.seed = max_tokens, temperature, top_p, seed
        self.which: Literal["base", "adapter"] = "base" if adapter is None else "adapter"
        self.messages: list[Message] = []
        self._session = Session()
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def use(self, which: Literal["base", "adapter"]) -> None:
        """Switches who answers. Raises RecipeError when there is no adapter to switch to."""
        if which == "adapter" and self.adapter is None:
            raise RecipeError("there is no adapter here, only a base", hint="start the chat with an adapter directory")
        self.which = which

    def say(self, text: str, stream: Callable[[str], object] | None = None) -> Answer:
        """One turn: adds `text` and the answer to the history. An interrupted or failed turn leaves the history as it was."""
        turn = [*self.messages, {"role": "user", "content": text}]
        turns = len([m for m in turn if m["role"] == "user"])
        with self._answering():
            answer = generate(
                self.base,
                turn,
                self.max_tokens,
                self.temperature,
                self.top_p,
                self.seed + turns - 1,
                stream,
                template=self.template,
                end_ids=self.end_ids,
                session=self._session,
            )
        self.messages = [*turn, {"role": "assistant", "content": answer.text}]
        return answer

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self.adapter is None:
            yield
            return
        with self.adapter.enabled(self.which == "adapter"):
            yield


def encode(base: Base, prompt: str | Sequence[Message], template: str | None = None) -> list[int]:
    """Token ids of a prompt: a string as it stands, with the tokenizer's own special tokens; messages by the template."""
    if isinstance(prompt, str):
        ids: list[int] = base.tokenizer(prompt)["input_ids"]
        if not ids and base.tokenizer.bos_token_id is not None:
            ids = [base.tokenizer.bos_token_id]
        if not ids:
            raise DataError("the prompt is empty", hint="give some text", code="generate.empty")
        return ids
    text = rendered(base, prompt, _template(base, template), prompt=True)
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(base: Base, messages: Sequence[Message], template: str, *, prompt: bool) -> str:
    """A conversation as the template writes it: the text that training saw, and with `prompt` what opens the next answer.

    Vision models' templates read the content as a list of parts and would drop plain text, so they get that.
    Raises DataError (`data.template`) where the template refuses the conversation.
    """
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages if isinstance(m["content"], str)]
    forms = [list(messages), parts] if len(parts) == len(messages) else [list(messages)]
    words = str(messages[-1]["content"]).strip()
    texts, refusals = [], []
    for form in forms:
        try:
            text = base.tokenizer.apply_chat_template(form, chat_template=template, add_generation_prompt=prompt, tokenize=False)
        except (TemplateError, *RAISED) as error:
            refusals.append(error)
            continue
        texts.append(str(text))
        if words in texts[-1]:
            return texts[-1]
    if not texts:
        raise DataError(
            f"the chat template of {base.name} refuses this conversation: {refusals[0]}",
            hint="some take no system message: leave --system out; /reset starts the conversation afresh",
            code="data.template",
        ) from refusals[0]
    return texts[0]


def end_tokens(base: Base, template: str | None = None, end_ids: Iterable[int] = ()) -> set[int]:
    """Tokens that end an answer: the model's and the tokenizer's end of sequence, what the template puts after a turn, and
    `end_ids` (what training used: it also saw how tool calls end)."""
    ends = set(end_ids)
    declared = [base.tokenizer.eos_token_id, base.model.config.get_text_config().eos_token_id]
    if base.model.generation_config is not None:
        declared.append(base.model.generation_config.eos_token_id)
    for value in declared:
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    if template is not None and (token := _end_of_turn(base, template)) is not None:
        ends.add(token)
    return ends


def _end_of_turn(base: Base, template: str) -> int | None:
    """The first special token after an assistant's words in a rendered conversation.

    Where a template closes no turn (GLM), it is the token that opens the next one.
    """
    words = "halfbyte end of turn"
    asked = {"role": "user", "content": "?"}
    special = set(base.tokenizer.all_special_ids) | set(base.tokenizer.added_tokens_decoder)
    for after in ([], [asked]):
        messages = [asked, {"role": "assistant", "content": words}, *after]
        try:
            text = rendered(base, messages, template, prompt=False)
        except DataError:  # it may refuse this one alone: some want a system message
            continue
        tail: list[int] = base.tokenizer(text.rpartition(words)[2], add_special_tokens=False)["input_ids"]
        if (found := next((token for token in tail if token in special), None)) is not None:
            return found
    return None


def _template(base: Base, template: str | None) -> str:
    chosen = template if template is not None else base.tokenizer.chat_template
    if isinstance(chosen, dict):
        chosen = chosen.get("default")
    if not chosen:
        raise DataError(
            f"{base.name} has no chat template, so messages cannot be written as tokens",
            hint="give a plain prompt, or name a template (data.template)",
            code="data.no-template",
        )
    return str(chosen)


def _room(model: nn.Module, prompt_tokens: int, max_tokens: int) -> tuple[int, bool]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    if limit is None or prompt_tokens + max_tokens <= limit:
        return max_tokens, False
    if prompt_tokens >= limit:
        raise DataError(
            f"the prompt has {prompt_tokens} tokens, the model can see {limit}",
            hint="shorten it, or start the conversation afresh (/reset)",
            code="generate.too-long",
        )
    return limit - prompt_tokens, True


def _check(max_tokens: int, temperature: float, top_p: float) -> None:
    wrong = []
    if max_tokens < 1:
        wrong.append(f"max_tokens is {max_tokens}, must be at least 1")
    if not temperature >= 0:
        wrong.append(f"temperature is {temperature}, must be 0 or more")
    if not 0 < top_p <= 1:
        wrong.append(f"top_p is {top_p}, must be above 0 and at most 1")
    if wrong:
        raise RecipeError("; ".join(wrong), hint="see `halfbyte chat --help`")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A private random state: the caller's is as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
