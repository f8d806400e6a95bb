"""From an exception to one sentence, an exit code and, on demand, a traceback.

| exit | when                                             |
|------|--------------------------------------------------|
| 1, 2 | a `CptqError`, by its own `exit_code` (2: usage) |
| 1    | no memory, no space, a path that cannot be used  |
| 70   | a defect of cptq                                 |
| 130  | interrupted                                      |
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from cptq.cli.console import Talk
from cptq.cli.environment import debugging
from cptq.errors import CptqError

INTERNAL, INTERRUPTED = 70, 130
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PATHS = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    FileExistsError,
)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What to tell about an exception."""

    kind: str
    problem: str
    exit_code: int
    allowed: str | None = None
    hint: str | None = None

    @property
    def sentence(self) -> str:
        """One line: what is wrong, what is allowed, what to do."""
        allowed = f"allowed: {self.allowed}" if self.allowed else None
        parts = [part for part in (self.problem, allowed, self.hint) if part]
        return " ".join("; ".join(parts).split())

    def to_dict(self) -> dict[str, Any]:
        """The document that `--format json` prints."""
        error = {name: getattr(self, name) for name in self.__slots__}
        return {"error": {**error, "message": self.sentence}}


def explain(error: BaseException) -> Failure:
    """The failure behind an exception and what caused it."""
    kind = type(error).__name__
    if isinstance(error, CptqError):
        return Failure(
            kind=kind,
            problem=error.problem,
            allowed=error.allowed,
            hint=error.hint,
            exit_code=error.exit_code,
        )
    if isinstance(error, KeyboardInterrupt):
        return Failure(kind=kind, problem=str(error) or "interrupted", exit_code=INTERRUPTED)
    return _of_the_machine(error) or Failure(
        kind=kind,
        problem=f"internal error: {kind}: {error}" if str(error) else f"internal error: {kind}",
        hint="this is a defect of cptq; set CPTQ_DEBUG=1 for the traceback",
        exit_code=INTERNAL,
    )


def _of_the_machine(error: BaseException) -> Failure | None:
    chain = list(_chain(error))
    kind = type(error).__name__
    if any(_is_full(link) for link in chain):
        where = next((str(link.filename) for link in chain if getattr(link, "filename", None)), "")
        problem = f"no space is left on the disk{f' for {where}' if where else ''}"
        hint = "nothing unfinished is kept; free some space, or choose another place with -o"
        return Failure(kind=kind, problem=problem, hint=hint, exit_code=1)
    if any(_is_memory(link) for link in chain):
        hint = (
            "try fewer --samples, a shorter --seqlen, a smaller --batch-size, or --dtype bfloat16"
        )
        return Failure(kind=kind, problem="the memory is not enough", hint=hint, exit_code=1)
    if isinstance(error, _PATHS) and error.filename:
        problem = f"{error.filename}: {(error.strerror or kind).lower()}"
        return Failure(kind=kind, problem=problem, exit_code=1)
    return None


def _chain(error: BaseException | None) -> Iterator[Any]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _is_full(error: BaseException) -> bool:
    """Also where a library in another language passes the system's words on as text."""
    code = error.errno if isinstance(error, OSError) else None
    return code in _FULL or "No space left on device" in str(error)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in text for words in _NO_MEMORY)
    )


@contextmanager
def guarded(talk: Talk) -> Iterator[None]:
    """Run a command; whatever it raises is told in a sentence and becomes the exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        talk.close()
        failure = explain(error)
        talk.fail(failure.sentence, failure.to_dict())
        if debugging(os.environ):
            talk.traceback(error)
        raise typer.Exit(failure.exit_code) from None
