"""The text of `cptq COMMAND --help`: options by section, wrapped to the terminal.

Typer's own help has sections only where Rich draws it, which takes as long again as all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap

import typer

from cptq.config.options import Option

WIDEST = 100
#: wider names of options have a line of their own
COLUMN = 26


def format_help(command: str, text: str, options: Sequence[Option]) -> str:
    """Return the help of a command; `options` are sorted by section."""
    width = max(40, min(typer.get_terminal_size().columns, WIDEST))
    usage = " ".join(["Usage:", command, "[OPTIONS]", *map(_spell_argument, options)])
    lines = [*wrap(usage, width, subsequent_indent="  "), ""]
    for paragraph in text.split("\n\n"):
        lines += [*_indent(" ".join(paragraph.split()), width, 2), ""]
    names = {option.name: _spell_option(option) for option in options}
    column = max(len(name) for name in names.values() if len(name) <= COLUMN)
    for section, members in groupby(options, lambda option: option.section):
        lines.append(f"{section}:")
        for option in members:
            lines += _format_entry(names[option.name], option.describe(), width, column + 4)
        lines.append("")
    return "\n".join(lines).rstrip()


def _spell_argument(option: Option) -> str:
    return option.metavar if option.positional else ""


def _spell_option(option: Option) -> str:
    """Return `-t, --target SIZE`, `--x / --no-x` or the name of an argument."""
    if option.positional:
        return option.metavar
    if option.default is True:
        return f"{option.flag} / {option.flag.replace('--', '--no-', 1)}"
    flags = sorted(option.flags, key=lambda flag: flag.startswith("--"))
    return " ".join(filter(None, [", ".join(flags), option.metavar]))


def _format_entry(name: str, text: str, width: int, indent: int) -> list[str]:
    """Return the name, and the text beside it, or below it where the name is long."""
    lines = _indent(text, width, indent)
    if len(name) + 4 > indent:
        return [f"  {name}", *lines]
    return [f"  {name}".ljust(indent) + lines[0].lstrip(), *lines[1:]]


def _indent(text: str, width: int, indent: int) -> list[str]:
    space = " " * indent
    return wrap(
        text,
        width,
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )
