"""How the small commands run: no settings file, no report; one answer in each of the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptq.cli.format import Format

if TYPE_CHECKING:
    from cptq.report.formatting import Table
    from cptq.types import Emit


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to print: tables for people, a document for programs, a line for scripts."""

    tables: Sequence[Table]
    document: Mapping[str, Any]
    line: str


def answer(shape: Format, work: Callable[[Emit], Answer]) -> None:
    """Do the work and print what it answers.

    Raises:
        typer.Exit: with the exit code of a failure, which has been told.
    """
    from cptq.cli.console import Talk
    from cptq.cli.failures import guarded

    talk = Talk(shape)
    with guarded(talk):
        found = work(talk.emit)
        talk.close()
        if shape == "json":
            talk.document(dict(found.document))
        elif shape == "quiet":
            talk.line(found.line)
        else:
            talk.tables(found.tables)
