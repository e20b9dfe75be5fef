"""`halfbyte eval`: held-out loss of a base, and of what was trained on it; and what both answer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import typer

from halfbyte.errors import RecipeError

if TYPE_CHECKING:
    from halfbyte.cli.arguments import Loaded
    from halfbyte.data.config import DataConfig


def evaluate(
    target: str = typer.Argument(..., help="Run, adapter or base: a directory, Hub id, .gguf file or smollm2-135m."),
    data: list[str] = typer.Option(None, "--data", "-d", help="Files to evaluate on; default: the run's own held-out data."),
    tokens: int | None = typer.Option(None, "--tokens", min=16, help="Row length; default: the run's, or 1024."),
    loss_on: str | None = typer.Option(None, "--loss-on", help="assistant, last, each or all."),
    kind: str = typer.Option("nf4", "--format", "-f", help="Format of a base without an adapter."),
    model: str | None = typer.Option(None, "--model", "-m", help="Base of the adapter, where it does not say or lies elsewhere."),
    other_base: bool = typer.Option(False, "--other-base", help="Allow a base whose weights differ from those it was trained on."),
    compute: str = typer.Option("auto", "--compute", help="auto, bf16, fp16 or fp32."),
    prompts: list[str] = typer.Option(None, "--prompt", "-p", help="Also answer this question; may be given several times."),
    max_tokens: int = typer.Option(128, "--max-tokens", min=1, help="Longest answer, in tokens."),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Loss, perplexity and token accuracy of a base, and of the adapter on it; with `--prompt` what each of them answers.

    \b
    halfbyte eval runs/quickstart
    halfbyte eval runs/quickstart --data held-out.jsonl --json
    """
    from halfbyte.checkpoints.cache import cache_root
    from halfbyte.cli.arguments import load
    from halfbyte.cli.console import emit
    from halfbyte.data.prepare import prepare
    from halfbyte.train.evaluate import evaluate_base

    loaded = load(target, kind, model, compute, other_base=other_base)
    config, seed = _data(loaded, data or [], tokens, loss_on)
    sets = prepare(config, loaded.base.tokenizer, seed, cache_root()).eval
    if not sets and not prompts:
        raise RecipeError(f"{target}: the run held nothing out, so there is nothing to evaluate on", hint="give --data FILE")
    scores: dict[str, Any] = {}
    answers: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts or []]
    for name, on in (("base", False), ("adapter", True)) if loaded.adapter else (("base", True),):
        with loaded.adapter.enabled(on) if loaded.adapter else nullcontext():
            scores[name] = {part: score.document() for part, score in evaluate_base(loaded.base, sets, config.tokens).items()}
            for answer, text in zip(answers, _answers(loaded, prompts or [], max_tokens), strict=True):
                answer[name] = text
    if as_json:
        emit(scores | ({"answers": answers} if answers else {}))
    else:
        _show(scores, answers)


def _answers(loaded: Loaded, questions: list[str], max_tokens: int) -> list[str]:
    from halfbyte.generate.chat import answers

    return list(answers(loaded.base, questions, max_tokens, template=loaded.template, end_ids=loaded.end_ids))


def _show(scores: dict[str, Any], answers: list[dict[str, str]]) -> None:
    from halfbyte.train.progress import number

    for name, found in scores.items():
        for part, s in found.items():
            text = (
                f"loss {number(s['loss'], '.4f')}  perplexity {number(s['perplexity'], '.2f')}  token accuracy {s['accuracy']:.1%}"
            )
            print(f"{name:8} {part}: {text}  ({s['tokens']:,} tokens)")
    for answer in answers:
        print(f"\n> {answer['prompt']}")
        for name in scores:
            print(f"{name:8} {answer[name]}")


def _data(loaded: Loaded, files: list[str], tokens: int | None, loss_on: str | None) -> tuple[DataConfig, int]:
    """What to evaluate on, and the seed that held it out: as the run's recipe says, with the options' changes."""
    import tempfile
    from pathlib import Path

    from halfbyte.checkpoints.peft import TEMPLATE
    from halfbyte.cli.arguments import section
    from halfbyte.data.config import DataConfig
    from halfbyte.recipe import load_recipe

    values: dict[str, Any] = {"train": files, "tokens": 1024}
    seed = 0
    if loaded.recipe is not None:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "recipe.yaml"
            saved.write_text(loaded.recipe, encoding="utf-8")
            recipe = load_recipe(saved)
        values, seed = recipe.data.model_dump(), recipe.train.seed
        # The template that was saved, byte for byte: the recipe may name a file that has changed since.
        saved_template = loaded.files.directory / TEMPLATE if loaded.files and loaded.files.template is not None else "auto"
        values |= {"template": str(saved_template), "template_kwargs": {}}
    elif not files:
        raise RecipeError(f"on what? {loaded.base.name} has no run of its own", hint="give --data FILE")
    changes = {"train": files, "eval": files} if files else {}
    options = {k: v for k, v in (("tokens", tokens), ("loss_on", loss_on)) if v is not None}
    return section(DataConfig, values | changes | options), seed
