"""`cptq`: the app with its commands, and the entry point of every run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

from cptq import __version__
from cptq.cli.commands import COMMANDS
from cptq.cli.environment import replace_unencodable, set_defaults, silence_libraries

#: `\b` keeps Typer from filling the lines of a paragraph
EPILOG = """\b
Exit codes:
  0    success
  1    failure: model, data, memory, disk, or an artifact that does not verify
  2    usage error: an option, a name, a value or an output that must change
  70   internal error, a defect of cptq
  130  interrupted; 143 and 129: by SIGTERM and SIGHUP

CPTQ_DEBUG=1 shows tracebacks and the messages of libraries."""

app = typer.Typer(
    name="cptq",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cptq {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
]


@app.callback()
def root(version: Version = False) -> None:
    """Analyze, compress and evaluate Hugging Face models under an exact byte budget."""


for _command in COMMANDS:
    _command.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `arguments` (default: those of the process) and exit."""
    set_defaults(os.environ)
    silence_libraries()
    replace_unencodable()
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(words or ["--help"]))


def _run(words: list[str]) -> int:
    """Return the exit code; a line that cannot be parsed is reported as any other failure."""
    try:
        code = app(words, prog_name="cptq", standalone_mode=False)
    except typer.TyperException as error:
        return _report_usage(words, error.format_message().rstrip("."), error.exit_code)
    except typer.Abort:
        return _report_usage(words, "interrupted", 130)
    return code if isinstance(code, int) else 0


def _report_usage(words: list[str], problem: str, exit_code: int) -> int:
    from cptq.cli.console import Console
    from cptq.cli.failures import Failure

    known = [word for word in words[:1] if word in {command.name for command in COMMANDS}]
    hint = " ".join(["cptq", *known, "--help"]) + " lists what is available"
    failure = Failure(kind="UsageError", problem=problem, hint=hint, exit_code=exit_code)
    console = Console("json" if requests_json(words) else "human")
    console.print_error(failure.sentence, failure.to_dict())
    return exit_code


def requests_json(words: Sequence[str]) -> bool:
    """Return whether JSON output is requested, also where the rest of the line is not valid."""
    command = next((command for command in COMMANDS if command.name in words[:1]), None)
    flag = command.format_flag if command else "--format"
    return f"{flag}=json" in words or (flag, "json") in pairwise(words)
