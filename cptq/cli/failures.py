"""From an exception to one sentence, an exit code and, on request, a traceback.

| exit | when                                                |
|------|-----------------------------------------------------|
| 1, 2 | a `CptqError`, by its own `exit_code` (2: usage)    |
| 1    | out of memory, disk full, a path that is not usable |
| 70   | an internal error: a defect of cptq                 |
| 130  | interrupted (Ctrl-C, SIGINT)                        |
| 143  | ended by SIGTERM                                    |
| 129  | ended by SIGHUP: the terminal was closed            |

Of several processes that share a command one says what ended it: the first, if it lives.

Where a run has finished steps that are kept, the sentence ends with the command that goes on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import typer

from cptq.cli.console import Console
from cptq.cli.environment import is_debugging
from cptq.cli.signals import Signals
from cptq.errors import CptqError, ProcessError, copy_kept, count_kept

INTERNAL, INTERRUPTED = 70, 130
#: what shells add to the number of a signal
ENDED_BY_SIGNAL = 128
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_PATH_ERRORS = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    FileExistsError,
)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What to print about an exception. `resume`: the command that goes on, if there is one."""

    kind: str
    problem: str
    exit_code: int
    allowed: str | None = None
    hint: str | None = None
    resume: str | None = None

    @property
    def sentence(self) -> str:
        """One line: what is wrong, what is allowed, what to do."""
        allowed = f"allowed: {self.allowed}" if self.allowed else None
        parts = [part for part in (self.problem, allowed, self.hint) if part]
        sentence = " ".join("; ".join(parts).split())
        return sentence + (f"; to go on, type: {self.resume}" if self.resume else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `--format json` prints."""
        error = {name: getattr(self, name) for name in self.__slots__}
        if self.resume is None:
            del error["resume"]
        return {"error": {**error, "message": self.sentence}}


@contextmanager
def report_failures(
    console: Console,
    signals: Signals | None = None,
    spell_continuation: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Run a command; print any exception as one sentence and exit with its code.

    Args:
        console: where to print.
        signals: the signal that ended the command, if one did.
        spell_continuation: returns the command that goes on from finished steps, if it can.
    """
    try:
        yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as raised:
        if signals is not None:
            signals.ignored = True  # a launcher sends one after a death that is just being told
        error = _find_cause(raised)
        failure = describe_failure(error, signals)
        if console.rank != (error.speaker if isinstance(error, ProcessError) else 0):
            raise typer.Exit(failure.exit_code) from None
        if count_kept(error) is not None:
            failure = _add_continuation(failure, count_kept(error), spell_continuation())
        with suppress(OSError):  # a terminal that was closed takes no message
            console.close()
            console.print_error(failure.sentence, failure.to_dict())
            if is_debugging(os.environ):
                console.print_traceback(error)
        raise typer.Exit(failure.exit_code) from None


def _find_cause(error: BaseException) -> BaseException:
    """Return the death of another process behind an interrupt: launchers send signals after it."""
    if isinstance(error, KeyboardInterrupt):
        for link in _follow_causes(error):
            if isinstance(link, ProcessError):
                copy_kept(error, link)
                return link
    return error


def _add_continuation(failure: Failure, kept: int | None, command: str | None) -> Failure:
    """Say what is kept of the work, and the command that goes on."""
    if kept and command:
        words = "1 finished step is" if kept == 1 else f"{kept} finished steps are"
        hint = "; ".join(filter(None, [failure.hint, f"{words} kept"]))
        return replace(failure, hint=hint, resume=command)
    if failure.exit_code > ENDED_BY_SIGNAL:
        return replace(failure, hint="no step was finished yet, so nothing is kept")
    return failure


def describe_failure(error: BaseException, signals: Signals | None = None) -> Failure:
    """Return the failure behind an exception and its causes; `signals`: what ended the command.

    After a signal every exception is its consequence: libraries turn the interrupt into others.
    """
    kind = type(error).__name__
    # but a launcher sends a signal because another process has died
    others = isinstance(error, ProcessError)
    if signals is not None and signals.received is not None and not others:
        code, name = signals.exit_code, signals.received.name
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        problem = said or ("interrupted" if code == INTERRUPTED else f"interrupted by {name}")
        return Failure(kind=KeyboardInterrupt.__name__, problem=problem, exit_code=code)
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
    return _describe_system_failure(error) or Failure(
        kind=kind,
        problem=f"internal error: {kind}: {error}" if str(error) else f"internal error: {kind}",
        hint="this is a defect of cptq; set CPTQ_DEBUG=1 to see the traceback",
        exit_code=INTERNAL,
    )


def _describe_system_failure(error: BaseException) -> Failure | None:
    chain = list(_follow_causes(error))
    kind = type(error).__name__
    if any(_is_disk_full(link) for link in chain):
        where = next((str(link.filename) for link in chain if getattr(link, "filename", None)), "")
        problem = f"no space left on the disk{f' for {where}' if where else ''}"
        hint = "incomplete files were removed; free some space, or choose another place with -o"
        return Failure(kind=kind, problem=problem, hint=hint, exit_code=1)
    if any(_is_out_of_memory(link) for link in chain):
        hint = (
            "try fewer --samples, a shorter --seqlen, a smaller --batch-size, or --dtype bfloat16"
        )
        return Failure(kind=kind, problem="out of memory", hint=hint, exit_code=1)
    if isinstance(error, _PATH_ERRORS) and error.filename:
        problem = f"{error.filename}: {(error.strerror or kind).lower()}"
        return Failure(kind=kind, problem=problem, exit_code=1)
    return None


def _follow_causes(error: BaseException | None) -> Iterator[Any]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _is_disk_full(error: BaseException) -> bool:
    """Return whether the disk is full, also where a library reports it only as text."""
    code = error.errno if isinstance(error, OSError) else None
    return code in _DISK_FULL or "No space left on device" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in text for words in _NO_MEMORY)
    )
