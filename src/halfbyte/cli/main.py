"""`halfbyte`: the command line's entry. Every error becomes one message, one hint and an exit code.

Why nothing heavy is imported here: `halfbyte --help` answers in about 0.3 s. Each command's file imports what it needs inside
its body, so that neither torch nor pydantic is loaded before a command runs.
Exit codes: 0 done, 1 the user can mend it, 75 stopped and saved (run the same command again).
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer

from halfbyte import __version__
from halfbyte.cli import chat, data, doctor, evaluate, importing, init, inspect, merge, plan, quantize, schema, train
from halfbyte.cli.console import DEFAULTS_OF_LIBRARIES, fail
from halfbyte.errors import HalfbyteError

app = typer.Typer(
    name="halfbyte",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="First steps: `halfbyte init`, `halfbyte plan recipe.yaml`, `halfbyte train recipe.yaml`, `halfbyte chat runs/...`.",
)
app.command("init")(init.init)
app.command("import", short_help="Turn another trainer's settings into a recipe.")(importing.import_)
app.command("train")(train.train)
app.command("plan", short_help="Print the bytes of every part of a run: does it fit?")(plan.plan)
app.command("inspect", short_help="Print what of a model is packed, what is not and why.")(inspect.inspect)
app.add_typer(data.app, name="data")
app.command("chat")(chat.chat)
app.command("eval", short_help="Loss and accuracy of a base, and of what was trained.")(evaluate.evaluate)
app.command("quantize")(quantize.quantize)
app.command("merge", short_help="Merge an adapter into ordinary 16-bit weights.")(merge.merge)
app.command("doctor", short_help="Check this machine: platform, GPU, versions, kernels.")(doctor.doctor)
app.command("schema")(schema.schema)


# Newer releases of typer carry their own copy of click: the base of its usage errors is reached through a name that both export.
UsageError: Any = typer.BadParameter.__bases__[0]

CTRL_C = 130
"""What typer makes of a KeyboardInterrupt."""


def _version(asked: bool) -> None:
    if asked:
        print(f"halfbyte {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="On an error, print the traceback as well."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Fine-tune large language models on 4-bit frozen weights."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: list[str] | None = None) -> None:
    """Runs a command and exits. `--debug` may stand anywhere."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    for name, value in DEFAULTS_OF_LIBRARIES.items():
        os.environ.setdefault(name, value)
    sys.exit(_run([a for a in args if a != "--debug"], debug))


def _run(args: list[str], debug: bool) -> int:
    try:
        code = app(args, prog_name="halfbyte", standalone_mode=False)
        if code == CTRL_C:
            fail("stopped")
            return 1
        return code if isinstance(code, int) else 0
    except HalfbyteError as error:
        fail(error.message, error.hint, error.code)
        _trace(debug)
        return error.exit_code
    except UsageError as error:
        fail(error.format_message(), _usage(error, args))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped")
        return 1
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", "a file, disk or network error")
        _trace(debug)
        return 1
    except Exception as error:
        fail(f"unexpected {type(error).__name__}: {error}", "this is a defect in halfbyte; --debug prints where it happened")
        _trace(debug)
        return 1


def _usage(error: Any, args: list[str]) -> str:
    """The hint of a usage error. What takes a recipe's settings may have been given one as an option."""
    from halfbyte.cli.recipes import as_setting

    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    told = f"`{context.command_path if context else 'halfbyte'} --help` lists the options"
    settable = context is not None and any(p.name == "overrides" for p in context.command.params)
    return f"{as_setting(option, args)}; {told}" if option and settable else told


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


if __name__ == "__main__":
    main()
