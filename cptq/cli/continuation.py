"""The command that goes on from the finished steps of one that did not end well."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cptq.config import COMMANDS, AnalyzeSettings, AnySettings, CompressSettings, command_line

RESUME = "--resume"
_SECRET = "--token"


def spell_continuation(settings: AnySettings, line: Sequence[str] = ()) -> str | None:
    """Return the command for a shell; None for a command that cannot be resumed.

    Args:
        settings: those of the command.
        line: the words of the process as it was started (`sys.argv`); where they are of another
            program, the command is made from the settings.
    """
    if not isinstance(settings, AnalyzeSettings | CompressSettings):
        return None
    if list(line[1:2]) != [COMMANDS[type(settings)]]:
        return command_line(replace(settings, resume=True))
    words = _leave_out_secret(line[1:])
    if RESUME not in words:
        words.insert(words.index("--") if "--" in words else len(words), RESUME)
    return shlex.join([*_spell_program(line[0]), *words])


def _spell_program(path: str) -> list[str]:
    """Return how the program was started: `cptq`, or `python -m cptq`."""
    return [sys.executable, "-m", "cptq"] if Path(path).name == "__main__.py" else ["cptq"]


def _leave_out_secret(words: Sequence[str]) -> list[str]:
    """Return the words without the access token, which messages do not show."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != _SECRET and not word.startswith(f"{_SECRET}="):
            kept.append(word)
        skip = word == _SECRET
    return kept
