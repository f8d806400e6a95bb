"""Sentence embeddings as sentence-transformers makes them.

The last hidden states are averaged over the attention mask ("mean"), or the first one is taken
("cls"), as `1_Pooling/config.json` in the checkpoint says; mean where there is no such file. Cut
at `max_seq_length` of `sentence_bert_config.json`, else at 128 tokens. Two embeddings are compared
by their cosine, so that normalising them changes nothing. Any other module that `modules.json`
lists (a dense layer, say) is refused: leaving it out would measure another model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cptq.errors import EvaluationError

Pooling = Literal["mean", "cls"]
DEFAULT_LENGTH = 128
_MODULES = ("Transformer", "Pooling", "Normalize")
_OLD_KEYS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


def pool(hidden_BTC: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """(batch, width) float32: the mean over the mask, or the first position."""
    if pooling == "cls":
        return hidden_BTC[:, 0].float()
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (hidden_BTC.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)


def cosine(left_NC: Tensor, right_NC: Tensor) -> Tensor:
    """(rows,) float64: the cosine of each pair of rows."""
    return torch.nn.functional.cosine_similarity(left_NC.double(), right_NC.double(), dim=1)


def read_pooling(path: Path) -> Pooling:
    """The pooling that a checkpoint's directory asks for.

    Raises:
        EvaluationError: it asks for another pooling, or for more modules than that.
    """
    _refuse_other_modules(path)
    settings = _json(path / "1_Pooling" / "config.json")
    if not settings:
        return "mean"
    modes = [_OLD_KEYS.get(key, key) for key, on in settings.items() if _is_mode(key) and on]
    stated = settings.get("pooling_mode", modes)
    chosen = [stated] if isinstance(stated, str) else list(stated)
    if chosen == ["mean"]:
        return "mean"
    if chosen == ["cls"]:
        return "cls"
    raise EvaluationError(
        f"{path / '1_Pooling'} asks for the pooling {', '.join(chosen) or 'none'}",
        allowed="mean, cls",
    )


def _is_mode(key: str) -> bool:
    return key.startswith("pooling_mode_")


def read_length(path: Path) -> int:
    """Tokens at which a sentence is cut."""
    return int(_json(path / "sentence_bert_config.json").get("max_seq_length") or DEFAULT_LENGTH)


def _refuse_other_modules(path: Path) -> None:
    modules = _json(path / "modules.json")
    types = [str(module.get("type", "")) for module in modules] if modules else []
    other = [name for name in types if name.rsplit(".", 1)[-1] not in _MODULES]
    if other:
        raise EvaluationError(
            f"{path} puts {', '.join(other)} on top of the encoder, which cptq does not run",
            allowed=", ".join(_MODULES),
        )


def _json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON: {error}") from error
