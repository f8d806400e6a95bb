"""What a person sees: data on stdout, talk on stderr.

`human`: tables on stdout; progress and notices on stderr. `json`: one document on stdout, errors
too. `quiet`: the path or the number on stdout, and nothing on stderr but errors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from traceback import format_exception
from typing import Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cptq.cli.format import Format
from cptq.cli.progress import Bars, Display, Lines, Nothing
from cptq.report.formatting import Table
from cptq.types import Event, Notice, Progress

#: notices of a kind that are printed while running; the report holds all of them
SHOWN = {"skipped": 6, "info": 6}
STYLES = {"warning": "bold yellow", "fallback": "yellow", "skipped": "dim", "info": "dim"}


def printable(text: str) -> str:
    """`text` without what would steer a terminal."""
    kept = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(kept)


class Talk:
    """One command's two streams."""

    def __init__(self, shape: Format = "human") -> None:
        self.shape = shape
        self.out = Console(markup=False, highlight=False, emoji=False)
        self.err = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self.counts: Counter[str] = Counter()
        self.display = self._display()

    def _display(self) -> Display:
        if self.shape == "quiet":
            return Nothing()
        return Bars(self.err) if self.err.is_terminal else Lines(self.say)

    def close(self) -> None:
        """End the display of progress; nothing happens the second time."""
        self.display.close()

    def emit(self, event: Event) -> None:
        """Show an event of the pipeline."""
        if isinstance(event, Progress):
            self.display.update(event)
        else:
            self._notice(event)

    def _notice(self, notice: Notice) -> None:
        self.counts[notice.kind] += 1
        limit = SHOWN.get(notice.kind)
        if limit is None or self.counts[notice.kind] <= limit:
            self.say(f"{notice.kind}: {notice.subject}: {notice.message}", STYLES[notice.kind])
        elif self.counts[notice.kind] == limit + 1:
            self.say(f"{notice.kind}: more of these follow; the report lists all", "dim")

    def say(self, words: str, style: str = "") -> None:
        """A line on stderr; quiet says nothing."""
        if self.shape != "quiet":
            self.err.print(Text(printable(words), style=style), soft_wrap=True)

    def fail(self, sentence: str, document: dict[str, Any]) -> None:
        """An error: one sentence on stderr and, for json, a document on stdout."""
        self.err.print(Text.assemble(("Error: ", "bold red"), printable(sentence)), soft_wrap=True)
        if self.shape == "json":
            self.document(document)

    def traceback(self, error: BaseException) -> None:
        """The whole traceback on stderr."""
        self.err.print(Text("".join(format_exception(error))), soft_wrap=True)

    def document(self, data: dict[str, Any]) -> None:
        """The one JSON document on stdout."""
        self.line(json.dumps(data, indent=1, allow_nan=False))

    def line(self, words: str) -> None:
        """A line of data on stdout, as it stands."""
        typer.echo(words)

    def table(self, table: Table) -> None:
        """A table of the report on stdout, folded to the terminal's width."""
        self.out.print(Text(table.title, style="bold"))
        self.out.print(_rich(table, self.out.width))
        if table.note:
            self.out.print(Text(printable(table.note), style="dim"))
        self.out.print()

    def tables(self, tables: Sequence[Table | None]) -> None:
        """The tables that have something to show."""
        for table in tables:
            if table is not None and table.rows:
                self.table(table)


def _rich(table: Table, width: int) -> RichTable:
    """The table for a terminal; columns move closer where that keeps it from folding."""
    headed = bool(table.columns[0])
    lengths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    roomy = sum(lengths) + 2 * (len(lengths) - 1) <= width
    rich = RichTable(
        box=box.SIMPLE_HEAD if headed else None,
        show_header=headed,
        show_edge=False,
        padding=(0, int(roomy) if headed else 2, 0, 0),
    )
    for name in table.columns:
        justify: Literal["right", "left"] = "right" if name in table.right else "left"
        rich.add_column(name, justify=justify, overflow="fold", no_wrap=name in table.right)
    for row in table.rows:
        named = zip(table.columns, row, strict=True)
        rich.add_row(*(Text(printable(_spoken(name, value))) for name, value in named))
    return rich


def _spoken(column: str, value: str) -> str:
    """A metric's name in words, so that it folds between them and not within one."""
    return value.replace("_", " ") if column == "metric" else value
