"""Load a tokenizer, and compare it with its model: a BOS that is missing, ids beyond the embedding.

Tokenizers with more tokens than their model has embeddings are common and work on texts that use
none of the others. So ids are looked at where a text is tokenised, before the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from cptq.checkpoint.load_errors import extract_reason
from cptq.checkpoint.model import ModelSpec
from cptq.checkpoint.special_tokens import find_bos
from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.types import Emit, Notice

#: the families start with these names; all their models were trained with a BOS before every text
NEED_BOS = ("gemma", "recurrent_gemma", "shieldgemma", "t5gemma")


def load_tokenizer(path: Path, settings: ModelSettings, emit: Emit) -> Any:
    """Return the tokenizer in a directory; None, with a warning, where there is none to load."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer.json raises errors of any type
        message = f"cannot be loaded: {extract_reason(error)}"
        emit(Notice(kind="warning", subject="tokenizer", message=message))
        return None


def report_missing_bos(model_type: str, tokenizer: Any, emit: Emit) -> None:
    """Warn where a family needs a BOS before every text and the tokenizer adds none.

    Texts are then tokenised without, as stock transformers does it.
    """
    if tokenizer is None or not model_type.startswith(NEED_BOS) or find_bos(tokenizer) is not None:
        return
    named = getattr(tokenizer, "bos_token", None)
    message = (
        f"it adds no BOS before a text, which {model_type} was trained with; as in stock "
        "transformers there is none, and results are those of a model without it"
    )
    message += f' (set "add_bos_token": true in tokenizer_config.json for {named})' if named else ""
    emit(Notice(kind="warning", subject="tokenizer", message=message))


def check_token_ids(spec: ModelSpec, ids: Iterable[Sequence[int] | Tensor]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        ModelError: names the token, its id and the number of embeddings.
    """
    rows = getattr(spec.config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    most = max((int(max(row)) for row in ids if len(row)), default=0)
    if most >= rows:
        token = getattr(spec.tokenizer, "convert_ids_to_tokens", str)(most)
        raise ModelError(
            f"the tokenizer of {spec.source} gives the id {most:,} ({token!r}) for this text, and "
            f"the model has embeddings for the ids 0 to {rows - 1:,}",
            allowed="a tokenizer and a model that belong together",
            hint="use the model's first tokenizer, or enlarge the model: "
            "model.resize_token_embeddings(len(tokenizer))",
        )
