"""From any exception while a model is loaded to one sentence.

A damaged file, an odd setting or a missing package can make torch, transformers and NumPy raise
anything. What they raise is the checkpoint's fault and becomes a `ModelError`; what cptq's own code
raises stays as it is, so that a defect is not blamed on the model. Full disks and exhausted memory
are the machine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cptq.errors import CptqError, ModelError

_OWN = Path(__file__).resolve().parents[1]
_NOT_THE_MODEL = (CptqError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def explain_load_errors(source: str, method: str | None = None) -> Iterator[None]:
    """Turn any exception of a call of transformers into a sentence.

    Args:
        source: the model as typed.
        method: how it is compressed; None: it is not.

    Raises:
        ModelError: names the model and the reason.
    """
    try:
        yield
    except _NOT_THE_MODEL:
        raise
    except Exception as error:
        if method is not None and isinstance(error, ImportError):
            raise ModelError(
                f"{source} is compressed already ({method}), and transformers lacks a package to "
                f"open it: {extract_reason(error)}",
                hint="install that, or give the dense model that it was made from",
            ) from error
        raise ModelError(f"transformers cannot load {source}: {extract_reason(error)}") from error


@contextmanager
def refuse_library_errors(source: str) -> Iterator[None]:
    """Turn exceptions that were raised outside of cptq's own code into a sentence.

    Raises:
        ModelError: names the model and the reason.
    """
    try:
        yield
    except (*_NOT_THE_MODEL, OSError):
        raise
    except Exception as error:
        if _is_own(error):
            raise
        raise ModelError(
            f"{source} cannot be used: {type(error).__name__}: {extract_reason(error)}",
            hint="set CPTQ_DEBUG=1 to see where it was raised",
        ) from error


def _is_own(error: Exception) -> bool:
    """Return whether the statement that raised it is cptq's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or Path(trace.tb_frame.f_code.co_filename).is_relative_to(_OWN)


def extract_reason(error: Exception) -> str:
    """Return the first line of a message, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
