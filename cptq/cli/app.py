"""`cptq`: the commands, and the door through which every run enters and leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

from cptq import __version__
from cptq.cli.commands.analyze import analyze
from cptq.cli.commands.compress import compress
from cptq.cli.commands.evaluate import evaluate
from cptq.cli.commands.export import export
from cptq.cli.commands.inspect import inspect
from cptq.cli.commands.verify import verify
from cptq.cli.environment import hush, prepare, tolerate_encodings

app = typer.Typer(
    name="cptq",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cptq {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
]


@app.callback()
def root(version: Version = False) -> None:
    """Analyze, compress and evaluate Hugging Face models under an exact byte budget."""


app.command("analyze")(analyze)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("export")(export)
app.command("inspect")(inspect)
app.command("verify")(verify)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: run `arguments` (default: those of the process) and exit."""
    prepare(os.environ)
    hush()
    tolerate_encodings()
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(words or ["--help"]))


def _run(words: list[str]) -> int:
    """The exit code; a line that cannot be read is told as every other failure."""
    try:
        code = app(words, prog_name="cptq", standalone_mode=False)
    except typer.TyperException as error:
        return _refuse(words, error.format_message(), error.exit_code)
    except typer.Abort:
        return _refuse(words, "interrupted", 130)
    return code if isinstance(code, int) else 0


def _refuse(words: list[str], problem: str, exit_code: int) -> int:
    from cptq.cli.console import Talk
    from cptq.cli.failures import Failure

    commands = {command.name for command in app.registered_commands}
    known = [word for word in words[:1] if word in commands]
    hint = " ".join(["cptq", *known, "--help"]) + " lists what there is"
    failure = Failure(kind="UsageError", problem=problem, hint=hint, exit_code=exit_code)
    talk = Talk("json" if asks_for_json(words) else "human")
    talk.fail(failure.sentence, failure.to_dict())
    return exit_code


def asks_for_json(words: Sequence[str]) -> bool:
    """`--format json` is on the line, also where the rest of it cannot be read.

    `export` calls it `--print`, as its `--format` is that of the file.
    """
    option = "--print" if "export" in words[:1] else "--format"
    return f"{option}=json" in words or (option, "json") in pairwise(words)
