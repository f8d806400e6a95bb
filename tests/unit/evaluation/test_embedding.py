from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cptq.errors import EvaluationError
from cptq.evaluation.sentences import compute_cosine, pool, read_max_length, read_pooling


def test_pooling_by_hand() -> None:
    hidden_BTC = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]]])
    mask_BT = torch.tensor([[1, 1, 0]])
    assert pool(hidden_BTC, mask_BT, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden_BTC, mask_BT, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden_BTC.half(), mask_BT, "mean").dtype == torch.float32


def test_cosine_by_hand() -> None:
    left, right = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [-3.0, -3.0]])
    assert compute_cosine(left, right).tolist() == pytest.approx([1 / math.sqrt(2), -1])


def write(path: Path, name: str, value: object) -> Path:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls", "embedding_dimension": 48}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_the_checkpoint_names_its_pooling(tmp_path: Path, settings, pooling: str) -> None:
    assert read_pooling(tmp_path) == "mean"
    assert read_pooling(write(tmp_path, "1_Pooling/config.json", settings)) == pooling


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "lasttoken"},
        {"pooling_mode_mean_tokens": False},
    ],
)
def test_another_pooling_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(EvaluationError) as caught:
        read_pooling(write(tmp_path, "1_Pooling/config.json", settings))
    assert caught.value.allowed == "mean, cls"


def test_a_dense_layer_on_top_is_refused(tmp_path: Path) -> None:
    names = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in names]
    write(tmp_path, "modules.json", modules[:2] + modules[3:])
    assert read_pooling(tmp_path) == "mean"
    with pytest.raises(EvaluationError, match=r"sentence_transformers\.models\.Dense"):
        read_pooling(write(tmp_path, "modules.json", modules))


def test_the_length_is_the_checkpoints_or_128(tmp_path: Path) -> None:
    assert read_max_length(tmp_path) == 128
    assert (
        read_max_length(write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 256}))
        == 256
    )
    (tmp_path / "sentence_bert_config.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"sentence_bert_config\.json"):
        read_max_length(tmp_path)
