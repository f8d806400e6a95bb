"""`cptq.load`: a model from any directory that cptq reads or writes, ready to run.

The public way to a model for whoever does not care how it is stored. It is transformers' own
`from_pretrained` with the auto class that config.json asks for, behind checks of the files; what
`AutoModel*.from_pretrained` would fill in with random numbers is an error here.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from cptq.types import Event, Notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """A transformers model in evaluation mode; packed, compressed-tensors or dense.

    Args:
        path: a directory, or a Hub id.
        device: "auto" (the first GPU where there is one, else the CPU), "cpu", "cuda", "cuda:N",
            "mps".
        dtype: the type it computes in: "auto" (float32 on a CPU, the checkpoint's on a GPU),
            "float32", "bfloat16", "float16". Packed codes stay packed whatever it is; their scales
            and all dense weights take it.
        revision: branch, tag or commit on the Hub.
        token: for the Hub.
        trust_remote_code: let Python code that comes with the model run.
        cache_dir: where downloads are kept.

    Raises:
        CptqError: not found, not readable, not a text model, or a file that does not fit; one
            sentence that says which and what to do.

    Warns:
        UserWarning: whatever `cptq` would print as a warning.
    """
    settings = ModelSettings(
        model=os.fspath(path),
        device=device,
        dtype=dtype,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    return cast("PreTrainedModel", load_model(settings, _warn).module)


def _warn(event: Event) -> None:
    if isinstance(event, Notice) and event.kind == "warning":
        warnings.warn(f"{event.subject}: {event.message}", stacklevel=4)
