"""What a person or a program sees: data on stdout, messages on stderr.

`human`: tables on stdout; progress and notices on stderr. `json`: one document on stdout, errors
included. `quiet`: the path or the number on stdout, and only errors on stderr.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from traceback import format_exception
from typing import Any, Literal

import typer
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table as RichTable
from rich.text import Text

from cptq.cli.columns import choose_widths, fold_text
from cptq.cli.parameters import OutputFormat
from cptq.cli.progress import (
    NoProgress,
    ProgressBars,
    ProgressDisplay,
    ProgressLog,
    ProgressTrace,
)
from cptq.report.formatting import Table
from cptq.types import Event, Fragment, Notice, Progress

#: how many notices of a kind are printed while running; the report lists all of them
SHOWN = {"skipped": 6, "info": 6}
STYLES = {"warning": "bold yellow", "fallback": "yellow", "skipped": "dim", "info": "dim"}


def make_printable(text: str) -> str:
    """Return `text` with control characters of a terminal replaced."""
    kept = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(kept)


class Console:
    """The two output streams of one command.

    `rank`: the index of this process among those that share the command; the first one speaks.
    `verbose`: show every event and every notice.
    """

    def __init__(
        self, output_format: OutputFormat = "human", rank: int = 0, *, verbose: bool = False
    ) -> None:
        self.output_format: OutputFormat = "quiet" if rank else output_format
        self.rank = rank
        self.verbose = verbose
        self.out = RichConsole(markup=False, highlight=False, emoji=False)
        self.err = RichConsole(stderr=True, markup=False, highlight=False, emoji=False)
        self.counts: Counter[str] = Counter()
        self.line_is_open = False
        self.progress = self._choose_progress()

    def _choose_progress(self) -> ProgressDisplay:
        if self.output_format == "quiet":
            return NoProgress()
        if self.verbose:
            return ProgressTrace(self.print_message)
        terminal = self.err.is_terminal
        return ProgressBars(self.err) if terminal else ProgressLog(self.print_message, beats=True)

    def close(self) -> None:
        """End the display of progress and the line of a text; a second call has no effect."""
        self.progress.close()
        self._end_line()

    def _end_line(self) -> None:
        if self.line_is_open:
            self.line_is_open = False
            self.print_line("")

    def emit(self, event: Event) -> None:
        """Show an event of the pipeline."""
        if isinstance(event, Progress):
            self.progress.update(event)
        elif isinstance(event, Fragment):
            self._print_fragment(event.text)
        else:
            self._print_notice(event)

    def _print_fragment(self, text: str) -> None:
        """Print a piece of a text on stdout at once; for json, the document will hold it whole.

        A terminal must not obey control characters that a model writes; a file gets all of them.
        """
        if self.output_format != "json":
            if not self.line_is_open:
                self.progress.close()
            typer.echo(make_printable(text) if self.out.is_terminal else text, nl=False)
            self.line_is_open = not text.endswith("\n")

    def _print_notice(self, notice: Notice) -> None:
        self.counts[notice.kind] += 1
        limit = None if self.verbose else SHOWN.get(notice.kind)
        if limit is None or self.counts[notice.kind] <= limit:
            text = f"{notice.kind}: {notice.subject}: {notice.message}"
            self.print_message(text, STYLES[notice.kind])
        elif self.counts[notice.kind] == limit + 1:
            self.print_message(f"{notice.kind}: more of these follow; the report lists all", "dim")

    def print_message(self, text: str, style: str = "") -> None:
        """Print a message on stderr, folded between words in a terminal, unless it is quiet."""
        if self.output_format != "quiet":
            if self.out.is_terminal:
                self._end_line()  # else the message would continue a text that is being written
            whole = not self.err.is_terminal
            self.err.print(Text(make_printable(text), style=style), soft_wrap=whole)

    def print_error(self, sentence: str, document: dict[str, Any]) -> None:
        """Print an error: one sentence on stderr and, for json, a document on stdout.

        It is not folded: a command in it can be copied as one line.
        """
        text = Text.assemble(("Error: ", "bold red"), make_printable(sentence))
        self.err.print(text, soft_wrap=True)
        if self.output_format == "json":
            self.print_document(document)

    def print_traceback(self, error: BaseException) -> None:
        """Print the whole traceback on stderr."""
        self.err.print(Text("".join(format_exception(error))), soft_wrap=True)

    def print_document(self, data: dict[str, Any]) -> None:
        """Print the one JSON document on stdout."""
        self.print_line(json.dumps(data, indent=1, allow_nan=False))

    def print_line(self, text: str) -> None:
        """Print a line of data on stdout, unchanged."""
        typer.echo(text)

    def print_table(self, table: Table) -> None:
        """Print a table of the report on stdout, folded to the width of the terminal."""
        self.out.print(Text(table.title, style="bold"))
        self.out.print(_make_rich_table(table, self.out.width))
        if table.note:
            self.out.print(Text(make_printable(table.note), style="dim"))
        self.out.print()

    def print_tables(self, tables: Iterable[Table | None]) -> None:
        """Print the tables that have rows."""
        for table in tables:
            if table is not None and table.rows:
                self.print_table(table)


def _make_rich_table(table: Table, width: int) -> RichTable:
    """Return the table for a terminal, folded between words, closer where that avoids folding."""
    headed = bool(table.columns[0])
    rows = [
        [make_printable(_separate(*cell)) for cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    columns = [list(column) for column in zip(table.columns, *rows, strict=True)]
    natural = sum(max(map(len, column)) for column in columns)
    gap = 2 if natural + 2 * (len(columns) - 1) <= width or not headed else 1
    widths = choose_widths(columns, width, gap)
    rich = RichTable(
        box=box.SIMPLE_HEAD if headed else None,
        show_header=headed,
        show_edge=False,
        padding=(0, gap - 1 if headed else gap, 0, 0),
        pad_edge=False,
    )
    for name, wide in zip(table.columns, widths, strict=True):
        justify: Literal["right", "left"] = "right" if name in table.right else "left"
        rich.add_column(fold_text(name, wide), justify=justify, width=wide, no_wrap=True)
    for row in rows:
        rich.add_row(*(Text(fold_text(text, wide)) for text, wide in zip(row, widths, strict=True)))
    return rich


def _separate(column: str, value: str) -> str:
    """Return a metric's name as separate words, so that it folds between and not within them."""
    return value.replace("_", " ") if column == "metric" else value
