"""Resolve a Hub id or a directory to a local directory."""

from __future__ import annotations

import errno
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.types import Emit, Progress

#: files that a model needs to run and an artifact to be complete
WANTED = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*"),
    *("[0-9]_*/*", "additional_chat_templates/*"),
]
_TYPE_NEXT = "a local directory, or a Hub id such as facebook/opt-125m"


def resolve_checkpoint(settings: ModelSettings, emit: Emit) -> Path:
    """Return the local directory of a checkpoint, downloaded if necessary.

    Raises:
        ModelError: no such directory, no such model, no access, or offline and not cached.
    """
    path = Path(settings.model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{path} is a file; cptq takes the directory that holds it", hint=f"try {path.parent}"
        )
    if settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise ModelError(f"no directory {settings.model!r}", allowed=_TYPE_NEXT)
    return _download(settings, emit)


def _download(settings: ModelSettings, emit: Emit) -> Path:
    emit(Progress(stage="download", done=0, total=None, message=settings.model))
    extra = (["*.py"] if settings.trust_remote_code else []) + (
        ["*.bin"] if settings.allow_pickle else []
    )
    try:
        return Path(
            snapshot_download(
                settings.model,
                revision=settings.revision,
                token=settings.token,
                cache_dir=settings.cache_dir,
                allow_patterns=WANTED + extra,
            )
        )
    except Exception as error:  # the HTTP library's own errors share no base with the Hub's
        if _is_local_failure(error):
            raise
        raise _explain(settings, error) from error


def _is_local_failure(error: Exception) -> bool:
    """Return whether memory, disk space or a path failed on this machine, and not the Hub."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, MemoryError) or getattr(error, "filename", None) is not None


def _explain(settings: ModelSettings, error: Exception) -> ModelError:
    model = settings.model
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{model} is gated", hint="accept its licence and pass --token")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{model} has no revision {settings.revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelError(
            f"unknown model {model!r}: no such directory, and no such model on the Hub",
            allowed=_TYPE_NEXT,
            hint="a private model needs --token",
        )
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"unknown model {model!r}: no such directory, not in the cache, and HF_HUB_OFFLINE "
            "forbids asking the Hub",
            allowed=_TYPE_NEXT,
            hint="unset HF_HUB_OFFLINE to download it",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"unknown model {model!r}: no such directory, and the Hub cannot be reached ({reason})",
        allowed=_TYPE_NEXT,
    )
